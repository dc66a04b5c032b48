"""From the gradients of drawn patches' scores to that of the importance map, as a Triton kernel of five steps.

A small map takes one program, which goes from step to step; a larger one many programs and a launch for each step.
Launched with `enable_fp_fusion=False`, as the forward kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from icseg_kernels.arithmetic_triton_kernels import divide
from icseg_kernels.compilation import Compilation
from icseg_kernels.patches.sample_triton_kernels import (
    SMALL_WARPS,
    blurs,
    compiled,
    finite_or_zero,
    least,
    marked,
    replaced,
    temperature_of,
    total_of,
)


@triton.jit
def _pixel_extremes(  # type: ignore[no-untyped-def]
    map_pointer,
    partials_pointer,
    block,
    height,
    width,
    stride_y,
    stride_x,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The lowest and minus the highest finite pixel of ROWS rows of the map: partial numbers 0 and 1."""
    y = block * ROWS + tl.arange(0, ROWS)[:, None]
    least, least_negative = (
        tl.full([ROWS, COLUMNS], float("inf"), DTYPE),
        tl.full([ROWS, COLUMNS], float("inf"), DTYPE),
    )
    for start in range(0, width, COLUMNS):
        x = start + tl.arange(0, COLUMNS)[None, :]
        place = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
        value = tl.load(map_pointer + place, mask=(y < height) & (x < width), other=float("inf")).to(DTYPE)
        finite = (value < float("inf")) & (value > float("-inf"))
        least = tl.minimum(least, tl.where(finite, value, float("inf")))
        least_negative = tl.minimum(least_negative, tl.where(finite, -value, float("inf")))
    tl.store(partials_pointer + block * 8, tl.min(least))
    tl.store(partials_pointer + block * 8 + 1, tl.min(least_negative))


@triton.jit
def _scatter_scores(  # type: ignore[no-untyped-def]
    grad_scores_pointer,
    indices_pointer,
    grad_logits_pointer,
    temperature,
    first,
    last,
    k,
    DTYPE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Gradients of the undivided logits from `first` to `last`; the drawn indices differ from each other."""
    for start in range(first, last, BLOCKS):
        place = start + tl.arange(0, BLOCKS)
        tl.store(grad_logits_pointer + place, tl.zeros([BLOCKS], DTYPE), mask=place < last)
    tl.debug_barrier()  # what other threads stored is stored again
    for start in range(0, k, BLOCKS):
        drawn = start + tl.arange(0, BLOCKS)
        index = tl.load(indices_pointer + drawn, mask=drawn < k, other=-1)
        value = tl.load(grad_scores_pointer + drawn, mask=drawn < k, other=0.0)
        here = (index >= first) & (index < last)
        tl.store(grad_logits_pointer + index, divide(value.to(DTYPE), temperature), mask=here)


@triton.jit
def _first_maxima(  # type: ignore[no-untyped-def]
    map_pointer,
    vertical_pointer,
    vertical_row_pointer,
    pooled_pointer,
    row_pointer,
    partials_pointer,
    lowest,
    highest,
    block,
    height,
    width,
    stride_y,
    stride_x,
    patch,
    before,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Maxima of ROWS rows of windows and the padded row of each: the first of a window, row by row.

    Also partial numbers 2 and 3: the lowest, and minus the highest, of them.
    """
    y = block * ROWS + tl.arange(0, ROWS)[:, None]
    across = tl.arange(0, COLUMNS)[None, :]
    for start in range(0, width, COLUMNS):
        x = start + across
        inside = (y < rows) & (x < width)
        top = tl.full([ROWS, COLUMNS], float("-inf"), DTYPE)
        first = tl.zeros([ROWS, COLUMNS], tl.int32)
        for i in range(patch):
            row = y + (i - before)
            there = inside & (row >= 0) & (row < height)
            place = row.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
            value = marked(tl.load(map_pointer + place, mask=there, other=0.0).to(DTYPE))
            value = tl.where(there, replaced(value, lowest, highest), 0.0)
            first = tl.where(value > top, y + i, first)
            top = tl.maximum(top, value)
        tl.store(vertical_pointer + y.to(tl.int64) * width + x, top, mask=inside)
        tl.store(vertical_row_pointer + y.to(tl.int64) * width + x, first, mask=inside)
    tl.debug_barrier()  # what other threads stored is read
    least, least_negative = (
        tl.full([ROWS, COLUMNS], float("inf"), DTYPE),
        tl.full([ROWS, COLUMNS], float("inf"), DTYPE),
    )
    for start in range(0, columns, COLUMNS):
        x = start + across
        inside = (y < rows) & (x < columns)
        top = tl.full([ROWS, COLUMNS], float("-inf"), DTYPE)
        first = tl.zeros([ROWS, COLUMNS], tl.int32)
        for j in range(patch):
            column = x + (j - before)
            there = inside & (column >= 0) & (column < width)
            at = y.to(tl.int64) * width + column
            value = tl.load(vertical_pointer + at, mask=there, other=0.0)
            row = tl.where(there, tl.load(vertical_row_pointer + at, mask=there, other=0), y)
            first = tl.where((value > top) | ((value == top) & (row < first)), row, first)
            top = tl.maximum(top, value)
        tl.store(pooled_pointer + y.to(tl.int64) * columns + x, top, mask=inside)
        tl.store(row_pointer + y.to(tl.int64) * columns + x, first, mask=inside)
        least = tl.minimum(least, tl.where(inside, top, float("inf")))
        least_negative = tl.minimum(least_negative, tl.where(inside, -top, float("inf")))
    tl.store(partials_pointer + block * 8 + 2, tl.min(least))
    tl.store(partials_pointer + block * 8 + 3, tl.min(least_negative))


@triton.jit
def _grad_of_scaled(  # type: ignore[no-untyped-def]
    grad_logits_pointer,
    vertical_pointer,
    pooled_pointer,
    grad_scaled_pointer,
    taps_pointer,
    partials_pointer,
    low,
    high,
    block,
    stride,
    rows,
    columns,
    kept_rows,
    kept_columns,
    taps,
    BLUR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The blur's adjoint for ROWS rows of windows, and what the rescaling's needs: partial numbers 4 to 7."""
    y = block * ROWS + tl.arange(0, ROWS)[:, None]
    across = tl.arange(0, COLUMNS)[None, :]
    radius = taps // 2
    if BLUR:
        for start in range(0, kept_columns, COLUMNS):
            kept_x = start + across
            inside = (y < rows) & (kept_x < kept_columns)
            total = tl.zeros([ROWS, COLUMNS], DTYPE)
            for i in range(taps):
                from_y = y + (radius - i)
                there = inside & (from_y >= 0) & (from_y % stride == 0) & (from_y // stride < kept_rows)
                place = (from_y // stride).to(tl.int64) * kept_columns + kept_x
                total += tl.load(grad_logits_pointer + place, mask=there, other=0.0) * tl.load(taps_pointer + i)
            tl.store(vertical_pointer + y.to(tl.int64) * kept_columns + kept_x, total, mask=inside)
        tl.debug_barrier()  # what other threads stored is read
    sums, products = tl.zeros([ROWS, COLUMNS], DTYPE), tl.zeros([ROWS, COLUMNS], DTYPE)
    lowest, highest = tl.zeros([ROWS, COLUMNS], tl.int32), tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, columns, COLUMNS):
        x = start + across
        inside = (y < rows) & (x < columns)
        grad = tl.zeros([ROWS, COLUMNS], DTYPE)
        if BLUR:
            for j in range(taps):
                from_x = x + (radius - j)
                there = inside & (from_x >= 0) & (from_x % stride == 0) & (from_x // stride < kept_columns)
                place = y.to(tl.int64) * kept_columns + from_x // stride
                grad += tl.load(vertical_pointer + place, mask=there, other=0.0) * tl.load(taps_pointer + j)
        else:
            there = inside & (y % stride == 0) & (x % stride == 0)
            place = (y // stride).to(tl.int64) * kept_columns + x // stride
            grad += tl.load(grad_logits_pointer + place, mask=there, other=0.0)
        at = y.to(tl.int64) * columns + x
        tl.store(grad_scaled_pointer + at, grad, mask=inside)
        pooled = tl.load(pooled_pointer + at, mask=inside, other=0.0)
        sums += grad
        products += tl.where(inside, grad * (pooled - low), 0.0)
        lowest += (inside & (pooled == low)).to(tl.int32)
        highest += (inside & (pooled == high)).to(tl.int32)
    tl.store(partials_pointer + block * 8 + 4, tl.sum(sums))
    tl.store(partials_pointer + block * 8 + 5, tl.sum(products))
    tl.store(partials_pointer + block * 8 + 6, tl.sum(lowest).to(DTYPE))
    tl.store(partials_pointer + block * 8 + 7, tl.sum(highest).to(DTYPE))


@triton.jit
def _grad_of_pixels(  # type: ignore[no-untyped-def]
    map_pointer,
    pooled_pointer,
    row_pointer,
    grad_scaled_pointer,
    horizontal_pointer,
    column_pointer,
    grad_pixels_pointer,
    partials_pointer,
    lowest,
    highest,
    low,
    high,
    inverse,
    of_low,
    of_high,
    block,
    height,
    width,
    stride_y,
    stride_x,
    patch,
    before,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Gradients of ROWS rows of pixels, as if all were finite, each from the windows whose first maximum it is.

    Also partial numbers 2 to 5: sums of those of pixels that count as the lowest and as the highest, and how many
    finite pixels are these.
    """
    y = block * ROWS + tl.arange(0, ROWS)[:, None]
    across = tl.arange(0, COLUMNS)[None, :]
    for start in range(0, columns, COLUMNS):
        window_x = start + across
        inside = (y < height) & (window_x < columns)
        total = tl.zeros([ROWS, COLUMNS], DTYPE)
        top = tl.full([ROWS, COLUMNS], float("-inf"), DTYPE)
        first = tl.zeros([ROWS, COLUMNS], tl.int32)
        for i in range(patch):
            window_y = y + (before - i)
            there = inside & (window_y >= 0) & (window_y < rows)
            at = window_y.to(tl.int64) * columns + window_x
            there &= tl.load(row_pointer + at, mask=there, other=-1) == y + before
            pooled = tl.load(pooled_pointer + at, mask=there, other=0.0)
            grad = tl.load(grad_scaled_pointer + at, mask=there, other=0.0) * inverse
            grad += tl.where(pooled == low, of_low, 0.0) + tl.where(pooled == high, of_high, 0.0)
            total += tl.where(there, grad, 0.0)
            x = window_x + (i - before)
            of_map = inside & (x >= 0) & (x < width)
            place = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
            value = marked(tl.load(map_pointer + place, mask=of_map, other=0.0).to(DTYPE))
            value = tl.where(of_map, replaced(value, lowest, highest), 0.0)
            first = tl.where(value > top, window_x + i, first)
            top = tl.maximum(top, value)
        tl.store(horizontal_pointer + y.to(tl.int64) * columns + window_x, total, mask=inside)
        tl.store(column_pointer + y.to(tl.int64) * columns + window_x, first, mask=inside)
    tl.debug_barrier()  # what other threads stored is read
    sums_low, sums_high = tl.zeros([ROWS, COLUMNS], DTYPE), tl.zeros([ROWS, COLUMNS], DTYPE)
    count_low, count_high = tl.zeros([ROWS, COLUMNS], tl.int32), tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, width, COLUMNS):
        x = start + across
        inside = (y < height) & (x < width)
        total = tl.zeros([ROWS, COLUMNS], DTYPE)
        for j in range(patch):
            window_x = x + (before - j)
            there = inside & (window_x >= 0) & (window_x < columns)
            at = y.to(tl.int64) * columns + window_x
            there &= tl.load(column_pointer + at, mask=there, other=-1) == x + before
            total += tl.load(horizontal_pointer + at, mask=there, other=0.0)
        tl.store(grad_pixels_pointer + y.to(tl.int64) * width + x, total, mask=inside)
        place = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
        value = marked(tl.load(map_pointer + place, mask=inside, other=0.0).to(DTYPE))
        sums_low += tl.where(inside & (value == float("-inf")), total, 0.0)
        sums_high += tl.where(inside & (value == float("inf")), total, 0.0)
        count_low += (inside & (value == lowest)).to(tl.int32)
        count_high += (inside & (value == highest)).to(tl.int32)
    tl.store(partials_pointer + block * 8 + 2, tl.sum(sums_low))
    tl.store(partials_pointer + block * 8 + 3, tl.sum(sums_high))
    tl.store(partials_pointer + block * 8 + 4, tl.sum(count_low).to(DTYPE))
    tl.store(partials_pointer + block * 8 + 5, tl.sum(count_high).to(DTYPE))


@triton.jit
def _grad_of_map(  # type: ignore[no-untyped-def]
    map_pointer,
    grad_pixels_pointer,
    grad_pointer,
    lowest,
    highest,
    of_lowest,
    of_highest,
    block,
    height,
    width,
    stride_y,
    stride_x,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Gradients of ROWS rows of the map: those of pixels that are not finite go to the extreme ones."""
    y = block * ROWS + tl.arange(0, ROWS)[:, None]
    for start in range(0, width, COLUMNS):
        x = start + tl.arange(0, COLUMNS)[None, :]
        inside = (y < height) & (x < width)
        place = y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
        value = marked(tl.load(map_pointer + place, mask=inside, other=0.0).to(DTYPE))
        at = y.to(tl.int64) * width + x
        grad = tl.load(grad_pixels_pointer + at, mask=inside, other=0.0)
        grad += tl.where(value == lowest, of_lowest, 0.0) + tl.where(value == highest, of_highest, 0.0)
        finite = (value < float("inf")) & (value > float("-inf"))
        grad = tl.where(finite, grad, 0.0).to(grad_pointer.dtype.element_ty)
        tl.store(grad_pointer + at, grad, mask=inside)


@triton.jit
def _share(total, count):  # type: ignore[no-untyped-def]
    return tl.where(count > 0, total / tl.maximum(count, 1.0), 0.0)


@triton.jit(
    do_not_specialize=[
        "temperature",
        "k",
        "stride_batch",
        "size",
        "integer_size",
        "height",
        "patch",
        "stride",
        "before",
        "rows",
        "kept_rows",
        "taps",
        "map_blocks",
        "window_blocks",
        "blocks",
    ]
)
def backward_kernel(  # type: ignore[no-untyped-def]
    map_pointer,
    indices_pointer,
    grad_scores_pointer,
    grad_pointer,
    workspace_pointer,
    integers_pointer,
    taps_pointer,
    temperature_pointer,
    temperature,
    k,
    stride_batch,
    stride_y,
    stride_x,
    size,
    integer_size,
    height,
    width,
    patch,
    stride,
    before,
    rows,
    columns,
    kept_rows,
    kept_columns,
    taps,
    map_blocks,
    window_blocks,
    blocks,
    STEP: tl.constexpr,
    BLUR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One STEP of backward, 0 to 4, on a grid of samples times its blocks of rows; or all (5), on a grid of samples.

    workspace: [B, size]: gradients of the logits [kept_rows * kept_columns], window maxima and the gradients of what
    they were rescaled to [rows, columns] each, those of pixels [height, width], partial numbers of the rows of the map
    [map_blocks, 8] and of windows [window_blocks, 8], and what a step's first pass leaves. integers:
    [B, integer_size]: rows of the first maxima [rows, columns], and what a first pass leaves.
    """
    sample, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    pixels = map_pointer + sample * stride_batch
    grad_logits = workspace_pointer + sample * size
    candidates = kept_rows * kept_columns
    windows = rows.to(tl.int64) * columns
    pooled = grad_logits + candidates
    grad_scaled = pooled + windows
    grad_pixels = grad_scaled + windows
    of_map = grad_pixels + height.to(tl.int64) * width
    of_windows = of_map + map_blocks * 8
    first_pass = of_windows + window_blocks * 8
    row_of = integers_pointer + sample * integer_size
    integer_pass = row_of + windows
    if STEP == 5:
        first_of_map, last_of_map, first_of_windows, last_of_windows = 0, map_blocks, 0, window_blocks
    else:
        first_of_map, last_of_map, first_of_windows, last_of_windows = block, block + 1, block, block + 1
    if STEP == 0 or STEP == 5:
        for b in range(first_of_map, last_of_map):
            _pixel_extremes(pixels, of_map, b, height, width, stride_y, stride_x, ROWS, COLUMNS, DTYPE)
    if STEP == 5:
        tl.debug_barrier()  # what other threads stored is read
    if STEP != 0:
        lowest = finite_or_zero(least(of_map, map_blocks, 0, DTYPE, BLOCKS))
        highest = finite_or_zero(-least(of_map, map_blocks, 1, DTYPE, BLOCKS))
    if STEP == 1 or STEP == 5:
        for b in range(first_of_windows, last_of_windows):
            share = (candidates + window_blocks - 1) // window_blocks
            _scatter_scores(
                grad_scores_pointer + sample * k,
                indices_pointer + sample * k,
                grad_logits,
                temperature_of(temperature_pointer, temperature, DTYPE),
                tl.minimum(b * share, candidates),
                tl.minimum((b + 1) * share, candidates),
                k,
                DTYPE,
                BLOCKS,
            )
            _first_maxima(
                pixels,
                first_pass,
                integer_pass,
                pooled,
                row_of,
                of_windows,
                lowest,
                highest,
                b,
                height,
                width,
                stride_y,
                stride_x,
                patch,
                before,
                rows,
                columns,
                ROWS,
                COLUMNS,
                DTYPE,
            )
    if STEP == 5:
        tl.debug_barrier()  # what other threads stored is read
    if STEP == 2 or STEP == 3 or STEP == 5:
        low = least(of_windows, window_blocks, 2, DTYPE, BLOCKS)
        high = -least(of_windows, window_blocks, 3, DTYPE, BLOCKS)
    if STEP == 2 or STEP == 5:
        for b in range(first_of_windows, last_of_windows):
            _grad_of_scaled(
                grad_logits,
                first_pass,
                pooled,
                grad_scaled,
                taps_pointer,
                of_windows,
                low,
                high,
                b,
                stride,
                rows,
                columns,
                kept_rows,
                kept_columns,
                taps,
                BLUR,
                ROWS,
                COLUMNS,
                DTYPE,
            )
    if STEP == 5:
        tl.debug_barrier()  # what other threads stored is read
    if STEP == 3 or STEP == 5:
        inverse = divide(tl.full((), 1.0, DTYPE), (high - low) + 1e-6)
        spread = -total_of(of_windows, window_blocks, 5, DTYPE, BLOCKS) * inverse * inverse
        of_low = -total_of(of_windows, window_blocks, 4, DTYPE, BLOCKS) * inverse - spread
        of_low = _share(of_low, total_of(of_windows, window_blocks, 6, DTYPE, BLOCKS))
        of_high = _share(spread, total_of(of_windows, window_blocks, 7, DTYPE, BLOCKS))
        for b in range(first_of_map, last_of_map):
            _grad_of_pixels(
                pixels,
                pooled,
                row_of,
                grad_scaled,
                first_pass,
                integer_pass,
                grad_pixels,
                of_map,
                lowest,
                highest,
                low,
                high,
                inverse,
                of_low,
                of_high,
                b,
                height,
                width,
                stride_y,
                stride_x,
                patch,
                before,
                rows,
                columns,
                ROWS,
                COLUMNS,
                DTYPE,
            )
    if STEP == 5:
        tl.debug_barrier()  # what other threads stored is read
    if STEP == 4 or STEP == 5:
        of_lowest = _share(
            total_of(of_map, map_blocks, 2, DTYPE, BLOCKS), total_of(of_map, map_blocks, 4, DTYPE, BLOCKS)
        )
        of_highest = _share(
            total_of(of_map, map_blocks, 3, DTYPE, BLOCKS), total_of(of_map, map_blocks, 5, DTYPE, BLOCKS)
        )
        for b in range(first_of_map, last_of_map):
            _grad_of_map(
                pixels,
                grad_pixels,
                grad_pointer + sample * height * width,
                lowest,
                highest,
                of_lowest,
                of_highest,
                b,
                height,
                width,
                stride_y,
                stride_x,
                ROWS,
                COLUMNS,
                DTYPE,
            )


def _compilations() -> Iterator[Compilation]:
    for of, blur in blurs():
        for dtype in ("float32", "float16", "bfloat16"):
            small = {"STEP": 5, **blur}
            yield compiled(f"backward, small, {dtype}, {of}", backward_kernel, dtype, 64, SMALL_WARPS, **small)
            for step in range(5):
                yield compiled(f"backward {step}, {dtype}, {of}", backward_kernel, dtype, 256, STEP=step, **blur)


COMPILATIONS = list(_compilations())
