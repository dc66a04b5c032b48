"""From an importance map to drawn patches, and back, as Triton kernels.

The steps work on blocks of rows of one sample, through a workspace. A small map takes one program, which goes from
step to step; a larger one many programs and a launch for each step after which programs wait for each other.

Bits equal the reference's if nothing is contracted: launch with `enable_fp_fusion=False`.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from icseg_kernels.arithmetic_triton_kernels import divide
from icseg_kernels.compilation import Compilation
from icseg_kernels.gumbel_topk.triton_kernels import draw_tile, perturbed

BLOCKS = 64  # of which the partial numbers are read at a time
SMALL_WARPS = 16  # of the program of a small map, backward
_PIXELS = 512  # of a block of rows and columns


@triton.jit
def _marked(x):  # type: ignore[no-untyped-def]
    """NaN as -inf: the two count as the lowest finite value, inf as the highest."""
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def _replaced(x, lowest, highest):  # type: ignore[no-untyped-def]
    return tl.where(x == float("-inf"), lowest, tl.where(x == float("inf"), highest, x))


@triton.jit
def _touches_padding(y, x, patch, before, height, width):  # type: ignore[no-untyped-def]
    """Whether the windows at (y, x) of the padded map [H, W] reach beyond the map."""
    return (y < before) | (x < before) | (y + patch > before + height) | (x + patch > before + width)


@triton.jit
def _resolved(pooled, touches, lowest, highest):  # type: ignore[no-untyped-def]
    """Window maxima, of which those of pixels that are not finite are still inf and -inf."""
    marked = (pooled == float("inf")) | (pooled == float("-inf"))
    value = _replaced(pooled, lowest, highest)
    return tl.where(marked & touches, tl.maximum(value, 0.0), value)


@triton.jit
def _least(pointer, blocks, field: tl.constexpr, DTYPE: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The least of one of the partial numbers of all blocks of rows."""
    found = tl.full([BLOCKS], float("inf"), DTYPE)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        found = tl.minimum(found, tl.load(pointer + block * 8 + field, mask=block < blocks, other=float("inf")))
    return tl.min(found)


@triton.jit
def _total(pointer, blocks, field: tl.constexpr, DTYPE: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of one of the partial numbers of all blocks of rows."""
    found = tl.zeros([BLOCKS], DTYPE)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        found += tl.load(pointer + block * 8 + field, mask=block < blocks, other=0.0)
    return tl.sum(found)


@triton.jit
def _finite_or_zero(x):  # type: ignore[no-untyped-def]
    return tl.where((x < float("inf")) & (x > float("-inf")), x, 0.0)


@triton.jit
def _extremes(partials, blocks, DTYPE: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The lowest and highest finite pixel, and the lowest and highest window maximum."""
    lowest = _finite_or_zero(_least(partials, blocks, 0, DTYPE, BLOCKS))
    highest = _finite_or_zero(-_least(partials, blocks, 1, DTYPE, BLOCKS))
    low, high = _least(partials, blocks, 2, DTYPE, BLOCKS), -_least(partials, blocks, 3, DTYPE, BLOCKS)
    # What windows without a finite pixel come to: low inside, low at the border, high inside, high at the border.
    for field in tl.static_range(4, 8):
        value = lowest if field < 6 else highest
        if field % 2 == 1:
            value = tl.maximum(value, 0.0)
        there = _least(partials, blocks, field, DTYPE, BLOCKS) < 0
        low = tl.where(there, tl.minimum(low, value), low)
        high = tl.where(there, tl.maximum(high, value), high)
    return lowest, highest, low, high


@triton.jit
def _pool_rows(  # type: ignore[no-untyped-def]
    map_pointer,
    vertical_pointer,
    pooled_pointer,
    partials_pointer,
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
    """Maxima [ROWS, columns] of windows over the padded map, down the columns first, and what the sample needs of them.

    Those of pixels that are not finite stay marked by inf and -inf, which only the whole map's extremes resolve.
    """
    y = block * ROWS + tl.arange(0, ROWS)[:, None]
    across = tl.arange(0, COLUMNS)[None, :]
    least, most = (
        tl.full([ROWS, COLUMNS], float("inf"), DTYPE),
        tl.full([ROWS, COLUMNS], float("-inf"), DTYPE),
    )
    for start in range(0, width, COLUMNS):
        x = start + across
        inside = (y < rows) & (x < width)
        top = tl.full([ROWS, COLUMNS], float("-inf"), DTYPE)
        for i in range(patch):
            row = y + (i - before)
            there = inside & (row >= 0) & (row < height)
            place = row.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
            value = _marked(tl.load(map_pointer + place, mask=there, other=float("-inf")).to(DTYPE))
            top = tl.maximum(top, value)
            finite = (value < float("inf")) & (value > float("-inf"))
            least = tl.minimum(least, tl.where(finite, value, float("inf")))
            most = tl.maximum(most, tl.where(finite, value, float("-inf")))
        tl.store(vertical_pointer + y.to(tl.int64) * width + x, top, mask=inside)
    tl.store(partials_pointer + block * 8, tl.min(least))
    tl.store(partials_pointer + block * 8 + 1, -tl.max(most))
    tl.debug_barrier()  # what other threads stored is read
    least, most = (
        tl.full([ROWS, COLUMNS], float("inf"), DTYPE),
        tl.full([ROWS, COLUMNS], float("-inf"), DTYPE),
    )
    marks = tl.zeros([ROWS, COLUMNS], tl.int32)
    for start in range(0, columns, COLUMNS):
        x = start + across
        inside = (y < rows) & (x < columns)
        top = tl.full([ROWS, COLUMNS], float("-inf"), DTYPE)
        for j in range(patch):
            column = x + (j - before)
            there = inside & (column >= 0) & (column < width)
            value = tl.load(vertical_pointer + y.to(tl.int64) * width + column, mask=there, other=float("-inf"))
            top = tl.maximum(top, value)
        touches = _touches_padding(y, x, patch, before, height, width)
        reaches = (y + patch > before) & (x + patch > before) & (y < before + height) & (x < before + width)
        low, high = top == float("-inf"), top == float("inf")
        finite = ~(low | high)
        top = tl.where(reaches, tl.where(finite & touches, tl.maximum(top, 0.0), top), 0.0)
        tl.store(pooled_pointer + y.to(tl.int64) * columns + x, top, mask=inside)
        finite = inside & (finite | ~reaches)
        least = tl.minimum(least, tl.where(finite, top, float("inf")))
        most = tl.maximum(most, tl.where(finite, top, float("-inf")))
        mark = tl.where(touches, 2, 1) << tl.where(high, 2, 0)
        marks |= tl.where(inside & reaches & (low | high), mark, 0)
    tl.store(partials_pointer + block * 8 + 2, tl.min(least))
    tl.store(partials_pointer + block * 8 + 3, -tl.max(most))
    for field in tl.static_range(4):
        tl.store(partials_pointer + block * 8 + 4 + field, -tl.max((marks >> field) & 1).to(DTYPE))


@triton.jit
def _scaled(pooled_pointer, y, x, there, columns, patch, before, height, width, lowest, highest, low, spread):  # type: ignore[no-untyped-def]
    """Rescaled window maxima at (y, x), 0 where there is no window."""
    pooled = tl.load(pooled_pointer + y.to(tl.int64) * columns + x, mask=there, other=0.0)
    value = _resolved(pooled, _touches_padding(y, x, patch, before, height, width), lowest, highest)
    return tl.where(there, divide(value - low, spread), 0.0)


@triton.jit
def _logits_of_rows(  # type: ignore[no-untyped-def]
    pooled_pointer,
    vertical_pointer,
    logits_pointer,
    taps_pointer,
    temperature,
    lowest,
    highest,
    low,
    high,
    block,
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
    BLUR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Logits of ROWS rows of kept windows: rescaled, blurred down the columns, then along the rows, divided."""
    spread = (high - low) + 1e-6
    kept_y = block * ROWS + tl.arange(0, ROWS)[:, None]
    across = tl.arange(0, COLUMNS)[None, :]
    if BLUR:
        radius = taps // 2
        for start in range(0, columns, COLUMNS):
            x = start + across
            inside = (kept_y < kept_rows) & (x < columns)
            total = tl.zeros([ROWS, COLUMNS], DTYPE)
            for i in range(taps):
                y = kept_y * stride + (i - radius)
                there = inside & (y >= 0) & (y < rows)
                value = _scaled(
                    pooled_pointer, y, x, there, columns, patch, before, height, width, lowest, highest, low, spread
                )
                total += value * tl.load(taps_pointer + i)
            tl.store(vertical_pointer + kept_y.to(tl.int64) * columns + x, total, mask=inside)
        tl.debug_barrier()  # what other threads stored is read
    for start in range(0, kept_columns, COLUMNS):
        kept_x = start + across
        inside = (kept_y < kept_rows) & (kept_x < kept_columns)
        if BLUR:
            total = tl.zeros([ROWS, COLUMNS], DTYPE)
            for j in range(taps):
                x = kept_x * stride + (j - radius)
                there = inside & (x >= 0) & (x < columns)
                value = tl.load(vertical_pointer + kept_y.to(tl.int64) * columns + x, mask=there, other=0.0)
                total += value * tl.load(taps_pointer + j)
        else:
            y, x = kept_y * stride, kept_x * stride
            total = _scaled(
                pooled_pointer, y, x, inside, columns, patch, before, height, width, lowest, highest, low, spread
            )
        tl.store(logits_pointer + kept_y.to(tl.int64) * kept_columns + kept_x, divide(total, temperature), mask=inside)


@triton.jit
def _temperature(pointer, value, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.cast(value, DTYPE) if pointer is None else tl.load(pointer).to(DTYPE)


@triton.jit(do_not_specialize=["stride_batch", "size", "candidates", "height", "patch", "before", "rows", "blocks"])
def pool_kernel(  # type: ignore[no-untyped-def]
    map_pointer,
    workspace_pointer,
    stride_batch,
    stride_y,
    stride_x,
    size,
    candidates,
    height,
    width,
    patch,
    before,
    rows,
    columns,
    blocks,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Window maxima, marked, on a grid of samples times blocks of rows.

    workspace: [B, size]: logits [candidates], maxima [rows, columns], partial numbers [blocks, 8], and rows of either
    step's first pass.
    """
    sample, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    pooled = workspace_pointer + sample * size + candidates
    partials = pooled + rows.to(tl.int64) * columns
    _pool_rows(
        map_pointer + sample * stride_batch,
        partials + blocks * 8,
        pooled,
        partials,
        block,
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


_LOGITS_INTEGERS = ["temperature", "size", "candidates", "height", "patch", "stride", "before", "rows", "kept_rows"]


@triton.jit(do_not_specialize=[*_LOGITS_INTEGERS, "taps", "pool_blocks", "blocks"])
def logits_kernel(  # type: ignore[no-untyped-def]
    workspace_pointer,
    taps_pointer,
    temperature_pointer,
    temperature,
    size,
    candidates,
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
    pool_blocks,
    blocks,
    BLUR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Logits from what `pool_kernel` left in the workspace, on a grid of samples times blocks of kept rows."""
    sample, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    logits = workspace_pointer + sample * size
    pooled = logits + candidates
    partials = pooled + rows.to(tl.int64) * columns
    lowest, highest, low, high = _extremes(partials, pool_blocks, DTYPE, BLOCKS)
    _logits_of_rows(
        pooled,
        partials + pool_blocks * 8,
        logits,
        taps_pointer,
        _temperature(temperature_pointer, temperature, DTYPE),
        lowest,
        highest,
        low,
        high,
        block,
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
        BLUR,
        ROWS,
        COLUMNS,
        DTYPE,
    )


@triton.jit(
    do_not_specialize=[
        *_LOGITS_INTEGERS,
        "taps",
        "pool_blocks",
        "blocks",
        "seed_low",
        "seed_high",
        "k",
        "stride_batch",
    ]
)
def sample_kernel(  # type: ignore[no-untyped-def]
    map_pointer,
    workspace_pointer,
    taps_pointer,
    temperature_pointer,
    noise_pointer,
    seed_pointer,
    survivors_pointer,
    indices_pointer,
    scores_pointer,
    coords_pointer,
    temperature,
    seed_low,
    seed_high,
    k,
    stride_batch,
    stride_y,
    stride_x,
    noise_row_stride,
    noise_stride,
    size,
    candidates,
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
    pool_blocks,
    blocks,
    BLUR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
    NOISE: tl.constexpr,
    DTYPE: tl.constexpr,
    NO_PATCH: tl.constexpr,
):
    """All of it, on a grid of samples of at most TILE candidates."""
    sample = tl.program_id(0).to(tl.int64)
    logits_pointer = workspace_pointer + sample * size
    pooled = logits_pointer + candidates
    partials = pooled + rows.to(tl.int64) * columns
    passes = partials + pool_blocks * 8
    for block in range(pool_blocks):
        _pool_rows(
            map_pointer + sample * stride_batch,
            passes,
            pooled,
            partials,
            block,
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
    tl.debug_barrier()  # what other threads stored is read
    lowest, highest, low, high = _extremes(partials, pool_blocks, DTYPE, BLOCKS)
    for block in range(blocks):
        _logits_of_rows(
            pooled,
            passes,
            logits_pointer,
            taps_pointer,
            _temperature(temperature_pointer, temperature, DTYPE),
            lowest,
            highest,
            low,
            high,
            block,
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
            BLUR,
            ROWS,
            COLUMNS,
            DTYPE,
        )
    tl.debug_barrier()  # what other threads stored is read
    element = tl.arange(0, TILE)
    logits = tl.load(logits_pointer + element, mask=element < candidates, other=float("-inf"))
    scores = perturbed(
        logits,
        noise_pointer,
        seed_pointer,
        seed_low,
        seed_high,
        tl.program_id(0),
        0,
        candidates,
        noise_row_stride,
        noise_stride,
        TILE,
        NOISE,
    )
    draw_tile(
        logits,
        scores,
        survivors_pointer,
        indices_pointer,
        scores_pointer,
        None,
        None,
        None,
        coords_pointer,
        tl.program_id(0),
        k,
        kept_columns,
        stride,
        before,
        TILE,
        RANKS,
        True,
        NO_PATCH,
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
            value = _marked(tl.load(map_pointer + place, mask=there, other=0.0).to(DTYPE))
            value = tl.where(there, _replaced(value, lowest, highest), 0.0)
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
            value = _marked(tl.load(map_pointer + place, mask=of_map, other=0.0).to(DTYPE))
            value = tl.where(of_map, _replaced(value, lowest, highest), 0.0)
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
        value = _marked(tl.load(map_pointer + place, mask=inside, other=0.0).to(DTYPE))
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
        value = _marked(tl.load(map_pointer + place, mask=inside, other=0.0).to(DTYPE))
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
        lowest = _finite_or_zero(_least(of_map, map_blocks, 0, DTYPE, BLOCKS))
        highest = _finite_or_zero(-_least(of_map, map_blocks, 1, DTYPE, BLOCKS))
    if STEP == 1 or STEP == 5:
        for b in range(first_of_windows, last_of_windows):
            share = (candidates + window_blocks - 1) // window_blocks
            _scatter_scores(
                grad_scores_pointer + sample * k,
                indices_pointer + sample * k,
                grad_logits,
                _temperature(temperature_pointer, temperature, DTYPE),
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
        low = _least(of_windows, window_blocks, 2, DTYPE, BLOCKS)
        high = -_least(of_windows, window_blocks, 3, DTYPE, BLOCKS)
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
        spread = -_total(of_windows, window_blocks, 5, DTYPE, BLOCKS) * inverse * inverse
        of_low = -_total(of_windows, window_blocks, 4, DTYPE, BLOCKS) * inverse - spread
        of_low = _share(of_low, _total(of_windows, window_blocks, 6, DTYPE, BLOCKS))
        of_high = _share(spread, _total(of_windows, window_blocks, 7, DTYPE, BLOCKS))
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
        of_lowest = _share(_total(of_map, map_blocks, 2, DTYPE, BLOCKS), _total(of_map, map_blocks, 4, DTYPE, BLOCKS))
        of_highest = _share(_total(of_map, map_blocks, 3, DTYPE, BLOCKS), _total(of_map, map_blocks, 5, DTYPE, BLOCKS))
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


def block(columns: int, small: bool) -> tuple[int, int]:
    """(ROWS, COLUMNS) of a block of a map of so many columns, a small one in one program or not."""
    across = min(64 if small else 256, max(32, triton.next_power_of_2(columns)))
    return (2 * _PIXELS if small else _PIXELS) // across, across


def tile_of_candidates(candidates: int) -> tuple[int, int]:
    """(TILE, num_warps) of the draw from a small map: so many warps that no register is spilled."""
    tile = max(256, triton.next_power_of_2(candidates))
    return tile, SMALL_WARPS if tile <= 1024 else 32


_TYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


def _compilations() -> list[Compilation]:
    integers = dict.fromkeys(
        ("stride_batch", "stride_y", "noise_row_stride", "size", "integer_size", "candidates", "height", "width")
        + ("patch", "stride", "before", "rows", "columns", "kept_rows", "kept_columns", "taps", "pool_blocks")
        + ("map_blocks", "window_blocks", "blocks", "k", "seed_low", "seed_high"),
        "i32",
    )
    draw = {
        "survivors_pointer": "*fp32",
        "indices_pointer": "*i64",
        "scores_pointer": "*fp32",
        "coords_pointer": "*i32",
    }
    floats = ("workspace_pointer", "taps_pointer", "noise_pointer", "grad_scores_pointer")
    found = []

    def add(name: str, kernel: Any, map_type: str, warps: int = 4, **options: Any) -> None:
        across = options.pop("width")
        constants: dict[str, Any] = {"DTYPE": tl.float32, "BLOCKS": BLOCKS, "stride_x": 1, "NO_PATCH": 0, "RANKS": 64}
        constants |= dict(zip(("ROWS", "COLUMNS"), block(across, warps >= SMALL_WARPS), strict=True)) | options
        types = integers | draw | dict.fromkeys(floats, "*fp32")
        types |= {"map_pointer": map_type, "grad_pointer": map_type, "integers_pointer": "*i32"}
        types |= {"temperature_pointer": "*fp64", "temperature": "fp32", "seed_pointer": "*i64"}
        names = kernel.arg_names
        found.append(
            Compilation(
                f"sample_patches: {name}",
                kernel,
                {n: types[n] for n in names if n in types and n not in constants},
                {n: constants[n] for n in names if n in constants},
                aligned=tuple(n for n in ("width", "stride_y") if n in names),
                num_warps=warps,
                enable_fp_fusion=False,
            )
        )

    given: dict[str, Any] = {"temperature_pointer": None}  # and the temperature as a number
    seeds: dict[str, dict[str, Any]] = {
        "none": {"noise_pointer": None, "seed_pointer": None, "noise_stride": 1},
        "given": {"seed_pointer": None, "noise_stride": 1},
        "pointer": {"noise_pointer": None, "noise_stride": 1},
        "words": {"noise_pointer": None, "seed_pointer": None, "noise_stride": 1},
    }
    for dtype, kind in _TYPES.items():
        for width in (32, 64, 128, 256) if dtype == "float32" else (256,):
            add(f"pool, {dtype}, {width}", pool_kernel, kind, width=width)
    for blur in (False, True):
        sharp: dict[str, Any] = {"BLUR": blur} if blur else {"BLUR": blur, "taps_pointer": None}
        of = "blur" if blur else "no blur"
        for width in (32, 64, 128, 256):
            add(f"logits, {width}, {of}", logits_kernel, "*fp32", width=width, **sharp)
        add(f"logits, 256, {of}, temperature given", logits_kernel, "*fp32", width=256, **sharp, **given)
        cases = [
            ("float32", 32, 256, "pointer"),
            *(("float32", 64, count, "pointer") for count in (512, 1024, 2048)),
        ]
        cases += [("float32", 64, 2048, noise) for noise in ("none", "given", "words")]
        cases += [
            ("float16", 64, 2048, "pointer"),
            ("bfloat16", 64, 2048, "pointer"),
        ]
        for dtype, width, candidates, noise in cases:
            tile, warps = tile_of_candidates(candidates)
            options = {"TILE": tile, "NOISE": noise, **sharp, **seeds[noise]}
            name = f"small, {dtype}, {width}, {candidates}, noise {noise}, {of}"
            add(name, sample_kernel, _TYPES[dtype], warps, width=width, **options)
        for dtype, kind in _TYPES.items():
            add(f"backward, small, {dtype}, {of}", backward_kernel, kind, SMALL_WARPS, width=64, STEP=5, **sharp)
            for step in range(5):
                add(f"backward {step}, {dtype}, {of}", backward_kernel, kind, width=256, STEP=step, **sharp)
    return found


COMPILATIONS = _compilations()
