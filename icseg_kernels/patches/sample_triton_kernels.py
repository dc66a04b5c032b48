"""From an importance map to drawn patches, as Triton kernels.

The steps work on blocks of rows of one sample, through a workspace. A small map takes one program, which goes from
step to step; a larger one many programs and a launch for each step after which programs wait for each other.

Bits equal the reference's if nothing is contracted: launch with `enable_fp_fusion=False`.
"""

from __future__ import annotations

from collections.abc import Iterator
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
def marked(x):  # type: ignore[no-untyped-def]
    """NaN as -inf: the two count as the lowest finite value, inf as the highest."""
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def replaced(x, lowest, highest):  # type: ignore[no-untyped-def]
    return tl.where(x == float("-inf"), lowest, tl.where(x == float("inf"), highest, x))


@triton.jit
def _touches_padding(y, x, patch, before, height, width):  # type: ignore[no-untyped-def]
    """Whether the windows at (y, x) of the padded map [H, W] reach beyond the map."""
    return (y < before) | (x < before) | (y + patch > before + height) | (x + patch > before + width)


@triton.jit
def _resolved(pooled, touches, lowest, highest):  # type: ignore[no-untyped-def]
    """Window maxima, of which those of pixels that are not finite are still inf and -inf."""
    marked = (pooled == float("inf")) | (pooled == float("-inf"))
    value = replaced(pooled, lowest, highest)
    return tl.where(marked & touches, tl.maximum(value, 0.0), value)


@triton.jit
def least(pointer, blocks, field: tl.constexpr, DTYPE: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The least of one of the partial numbers of all blocks of rows."""
    found = tl.full([BLOCKS], float("inf"), DTYPE)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        found = tl.minimum(found, tl.load(pointer + block * 8 + field, mask=block < blocks, other=float("inf")))
    return tl.min(found)


@triton.jit
def total_of(pointer, blocks, field: tl.constexpr, DTYPE: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of one of the partial numbers of all blocks of rows."""
    found = tl.zeros([BLOCKS], DTYPE)
    for start in range(0, blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        found += tl.load(pointer + block * 8 + field, mask=block < blocks, other=0.0)
    return tl.sum(found)


@triton.jit
def finite_or_zero(x):  # type: ignore[no-untyped-def]
    return tl.where((x < float("inf")) & (x > float("-inf")), x, 0.0)


@triton.jit
def extremes(partials, blocks, DTYPE: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The lowest and highest finite pixel, and the lowest and highest window maximum."""
    lowest = finite_or_zero(least(partials, blocks, 0, DTYPE, BLOCKS))
    highest = finite_or_zero(-least(partials, blocks, 1, DTYPE, BLOCKS))
    low, high = least(partials, blocks, 2, DTYPE, BLOCKS), -least(partials, blocks, 3, DTYPE, BLOCKS)
    # What windows without a finite pixel come to: low inside, low at the border, high inside, high at the border.
    for field in tl.static_range(4, 8):
        value = lowest if field < 6 else highest
        if field % 2 == 1:
            value = tl.maximum(value, 0.0)
        there = least(partials, blocks, field, DTYPE, BLOCKS) < 0
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
            value = marked(tl.load(map_pointer + place, mask=there, other=float("-inf")).to(DTYPE))
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
def scaled(pooled_pointer, y, x, there, columns, patch, before, height, width, lowest, highest, low, spread):  # type: ignore[no-untyped-def]
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
                value = scaled(
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
            total = scaled(
                pooled_pointer, y, x, inside, columns, patch, before, height, width, lowest, highest, low, spread
            )
        tl.store(logits_pointer + kept_y.to(tl.int64) * kept_columns + kept_x, divide(total, temperature), mask=inside)


@triton.jit
def temperature_of(pointer, value, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
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
    lowest, highest, low, high = extremes(partials, pool_blocks, DTYPE, BLOCKS)
    _logits_of_rows(
        pooled,
        partials + pool_blocks * 8,
        logits,
        taps_pointer,
        temperature_of(temperature_pointer, temperature, DTYPE),
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
    lowest, highest, low, high = extremes(partials, pool_blocks, DTYPE, BLOCKS)
    for block in range(blocks):
        _logits_of_rows(
            pooled,
            passes,
            logits_pointer,
            taps_pointer,
            temperature_of(temperature_pointer, temperature, DTYPE),
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


def block(columns: int, small: bool) -> tuple[int, int]:
    """(ROWS, COLUMNS) of a block of a map of so many columns, a small one in one program or not."""
    across = min(64 if small else 256, max(32 if small else 128, triton.next_power_of_2(columns)))
    return (2 * _PIXELS if small else _PIXELS) // across, across


def tile_of_candidates(candidates: int) -> tuple[int, int]:
    """(TILE, num_warps) of the draw from a small map: so many warps that no register is spilled."""
    tile = max(256, triton.next_power_of_2(candidates))
    return tile, SMALL_WARPS if tile <= 1024 else 32


_TYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


def compiled(name: str, kernel: Any, dtype: str, width: int, warps: int = 4, **options: Any) -> Compilation:
    """One of a map of `dtype` that is `width` windows or pixels wide; options: constants besides the blocks'."""
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
    constants: dict[str, Any] = {"DTYPE": tl.float32, "BLOCKS": BLOCKS, "stride_x": 1, "NO_PATCH": 0, "RANKS": 64}
    constants |= dict(zip(("ROWS", "COLUMNS"), block(width, warps >= SMALL_WARPS), strict=True)) | options
    types = integers | draw | dict.fromkeys(floats, "*fp32")
    types |= dict.fromkeys(("map_pointer", "grad_pointer"), _TYPES[dtype])
    types |= {"integers_pointer": "*i32", "temperature_pointer": "*fp64", "temperature": "fp32", "seed_pointer": "*i64"}
    names = kernel.arg_names
    return Compilation(
        f"sample_patches: {name}",
        kernel,
        {n: types[n] for n in names if n in types and n not in constants},
        {n: constants[n] for n in names if n in constants},
        aligned=tuple(n for n in ("width", "stride_y") if n in names),
        num_warps=warps,
        enable_fp_fusion=False,
    )


def blurs() -> list[tuple[str, dict[str, Any]]]:
    """Without a blur and with one: what reports call it, and its constants."""
    return [("no blur", {"BLUR": False, "taps_pointer": None}), ("blur", {"BLUR": True})]


def _compilations() -> Iterator[Compilation]:
    given: dict[str, Any] = {"temperature_pointer": None}  # and the temperature as a number
    seeds: dict[str, dict[str, Any]] = {
        "none": {"noise_pointer": None, "seed_pointer": None, "noise_stride": 1},
        "given": {"seed_pointer": None, "noise_stride": 1},
        "pointer": {"noise_pointer": None, "noise_stride": 1},
        "words": {"noise_pointer": None, "seed_pointer": None, "noise_stride": 1},
    }
    for dtype in _TYPES:
        for width in (128, 256) if dtype == "float32" else (256,):
            yield compiled(f"pool, {dtype}, {width}", pool_kernel, dtype, width)
    cases = [("float32", 32, 256, "pointer"), *(("float32", 64, count, "pointer") for count in (512, 1024, 2048))]
    cases += [("float32", 64, 2048, noise) for noise in ("none", "given", "words")]
    cases += [("float16", 64, 2048, "pointer"), ("bfloat16", 64, 2048, "pointer")]
    for of, blur in blurs():
        for width in (128, 256):
            yield compiled(f"logits, {width}, {of}", logits_kernel, "float32", width, **blur)
        yield compiled(f"logits, 256, {of}, temperature given", logits_kernel, "float32", 256, **blur, **given)
        for dtype, width, candidates, noise in cases:
            tile, warps = tile_of_candidates(candidates)
            name = f"small, {dtype}, {width}, {candidates}, noise {noise}, {of}"
            options = {"TILE": tile, "NOISE": noise, **blur, **seeds[noise]}
            yield compiled(name, sample_kernel, dtype, width, warps, **options)


COMPILATIONS = list(_compilations())
