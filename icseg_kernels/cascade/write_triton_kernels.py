"""A level's map, the error expected at the next, and the picks there, as one Triton kernel.

A program owns a tile of one class of a map, whole cells of it. It leaves the sum of its probabilities; the last program
of a sample to come adds these up in the order of the tiles, and picks. Who is last is counted by atomic integers, which
it sets back to 0.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from icseg_kernels.arithmetic_triton_kernels import divide
from icseg_kernels.compilation import Compilation
from icseg_kernels.gumbel_topk.triton_kernels import _interval, _ordered, _places
from icseg_kernels.patches.gather_triton_kernels import POINTERS, accumulation
from icseg_kernels.patches.upsample_triton_kernels import halfway

CHUNK = 128  # patches that are compared with the cells of a tile at once
SPARE = 64  # more cells that are ranked, rather than told from the picks by bisection
SUMS = 256  # partial sums that are added at once


@triton.jit
def probability(logits):  # type: ignore[no-untyped-def]
    power = tl.exp(-tl.abs(logits))
    return tl.where(logits >= 0, 1.0, power) / (1.0 + power)


@triton.jit
def is_last(counter, programs):  # type: ignore[no-untyped-def]
    """Whether all `programs` that share the counter have come; then it is 0 again, and what they wrote can be read."""
    tl.debug_barrier()  # what other threads stored is released too
    ticket = tl.atomic_add(counter, 1, sem="acq_rel")
    last = ticket == programs - 1
    if last:
        tl.store(counter, 0)
    tl.debug_barrier()
    return last


@triton.jit
def score_of(worth, FROM_ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    """NaN as 0; FROM_ZERO: what is below 0 as -inf."""
    score = tl.where(worth == worth, worth, 0.0)
    if FROM_ZERO:
        score = tl.where(score >= 0, score, float("-inf"))
    return score


@triton.jit
def _scores(worth, start, cells, FROM_ZERO: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What worth [cells] says of TILE cells from `start` on, and their scores, -inf beyond the end."""
    cell = start + tl.arange(0, TILE)
    value = tl.load(worth + cell, mask=cell < cells, other=float("-inf"))
    return value, score_of(value, FROM_ZERO)


@triton.jit
def _counts(keys, a, b):  # type: ignore[no-untyped-def]
    """[TILE]: whether a key is at least a, plus 2^16 times whether it is at least b."""
    return (keys >= a).to(tl.int32) + ((keys >= b).to(tl.int32) << 16)


@triton.jit
def best_into(  # type: ignore[no-untyped-def]
    index, worth, cells, wanted, spare, FROM_ZERO: tl.constexpr, CHUNKS: tl.constexpr, TILE: tl.constexpr
):
    """Write the elements of the `wanted` best scores above -inf to index, ascending, and maybe `spare` more.

    Of worth [cells], at most TILE, or with CHUNKS 2^16 - 1. How many were written: at most wanted + spare, fewer than
    wanted where no more are above -inf; and the sum of what the others are worth.
    Keys of the scores' order are counted above the ends of an interval that shrinks, until enough are above its start.
    """
    value, score = _scores(worth, 0, cells, FROM_ZERO, TILE)
    keys = _ordered(score)
    low, high = _interval(score.dtype)
    count = (keys >= low).to(tl.int32)
    if CHUNKS:
        for start in range(TILE, cells, TILE):
            value, score = _scores(worth, start, cells, FROM_ZERO, TILE)
            count += (_ordered(score) >= low).to(tl.int32)
    from_low = tl.sum(count)
    from_high = from_low * 0
    wanted = tl.minimum(from_low, wanted)
    while (high - low > 1) & (from_low > wanted + spare):
        third = tl.maximum((high - low) // 3, 1)
        a = low + third
        b = a + third
        if CHUNKS:
            counts = tl.zeros([TILE], tl.int32)
            for start in range(0, cells, TILE):
                _, score = _scores(worth, start, cells, FROM_ZERO, TILE)
                counts += _counts(_ordered(score), a, b)
        else:
            counts = _counts(keys, a, b)
        total = tl.sum(counts)
        from_a, from_b = total & 0xFFFF, total >> 16
        above_a, above_b = from_a >= wanted, from_b >= wanted
        high = tl.where(above_a, tl.where(above_b, high, b), a)
        from_high = tl.where(above_a, tl.where(above_b, from_high, from_b), from_a)
        low = tl.where(above_b, b, tl.where(above_a, a, low))
        from_low = tl.where(above_b, from_b, tl.where(above_a, from_a, from_low))
    found = tl.where(from_low > wanted + spare, wanted, from_low)
    left = tl.zeros([TILE], score.dtype)
    above, equal = from_low * 0, from_low * 0
    tl.debug_barrier()  # all have read what was in index before
    for start in range(0, cells, TILE):
        value, score = _scores(worth, start, cells, FROM_ZERO, TILE)
        chosen, place, above, equal = _places(_ordered(score), low, high, above, equal, found - from_high)
        cell = start + tl.arange(0, TILE)
        tl.store(index + place, cell, mask=chosen)
        left += tl.where(chosen | (cell >= cells), 0.0, value)
    tl.debug_barrier()
    return found, tl.sum(left)


@triton.jit
def ranked(first, found, index, worth, FROM_ZERO: tl.constexpr, RANKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of RANKS entries of index [found], from `first` on: elements, places by their scores, and which there are.

    Of equals the first comes first.
    """
    mine = first + tl.arange(0, RANKS)
    there = mine < found
    element = tl.load(index + mine, mask=there, other=0)
    scores = score_of(tl.load(worth + element, mask=there, other=0.0), FROM_ZERO)
    place = tl.zeros([RANKS], tl.int32)
    for start in range(0, found, RANKS):
        theirs = start + tl.arange(0, RANKS)
        others = tl.load(index + theirs, mask=theirs < found, other=0)
        others = score_of(tl.load(worth + others, mask=theirs < found, other=0.0), FROM_ZERO)
        ahead = (others[None, :] > scores[:, None]) | (
            (others[None, :] == scores[:, None]) & (theirs[None, :] < mine[:, None])
        )
        place += tl.sum((ahead & (theirs < found)[None, :]).to(tl.int32), 1)
    return element, place, there


@triton.jit
def store_corners(corners, place, cell, columns, mask):  # type: ignore[no-untyped-def]
    """The corners (y, x) of a grid's cells, at `place` in corners [..., 2]."""
    tl.store(corners + place * 2, (cell // columns * 8).to(tl.int64), mask=mask)
    tl.store(corners + place * 2 + 1, (cell % columns * 8).to(tl.int64), mask=mask)


@triton.jit
def store_picks(  # type: ignore[no-untyped-def]
    corners,
    wanted,
    index,
    found,
    worth,
    columns,
    FROM_ZERO: tl.constexpr,
    OUTSIDE: tl.constexpr,
    RANKS: tl.constexpr,
):
    """corners [wanted, 2] of the best cells of index [found], best first, then OUTSIDE; what the others are worth."""
    left = tl.sum(tl.zeros([RANKS], worth.dtype.element_ty))
    for first in range(0, found, RANKS):
        cell, place, there = ranked(first, found, index, worth, FROM_ZERO, RANKS)
        store_corners(corners, place, cell, columns, there & (place < wanted))
        left += tl.sum(tl.load(worth + cell, mask=there & (place >= wanted), other=0.0))
    for first in range(found, wanted, RANKS):
        empty = first + tl.arange(0, RANKS)
        for axis in tl.static_range(2):
            tl.store(corners + empty * 2 + axis, tl.full([RANKS], OUTSIDE, tl.int64), mask=empty < wanted)
    return left


@triton.jit
def _of_cells(values, CELLS_Y: tl.constexpr, CELLS_X: tl.constexpr, SIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """[CELLS_Y * CELLS_X] -> [CELLS_Y * SIDE, CELLS_X * SIDE]: each value SIDE times along both axes."""
    spread = tl.broadcast_to(values.reshape([CELLS_Y, 1, CELLS_X, 1]), [CELLS_Y, SIDE, CELLS_X, SIDE])
    return spread.reshape([CELLS_Y * SIDE, CELLS_X * SIDE])


@triton.jit
def _of_mean(partials, tiles, pixels, LEAST_FOREGROUND: tl.constexpr, ACCUMULATE: tl.constexpr, SUMS: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """1 / (2 foreground), of sums of its parts, always in one order."""
    total = tl.zeros([SUMS], ACCUMULATE)
    for start in range(0, tiles, SUMS):
        tile = start + tl.arange(0, SUMS)
        total += tl.load(partials + tile, mask=tile < tiles, other=0.0, cache_modifier=".cg")
    foreground = tl.sum(total) / pixels.to(ACCUMULATE)
    return 0.5 / tl.where(foreground < LEAST_FOREGROUND, LEAST_FOREGROUND, foreground)  # NaN stays


@triton.jit
def _pick(  # type: ignore[no-untyped-def]
    partials,
    worth,
    index,
    next_coords,
    uncovered,
    channels,
    tiles,
    pixels,
    cells,
    columns,
    picks,
    LEAST_FOREGROUND: tl.constexpr,
    OUTSIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
    SPARE: tl.constexpr,
    SUMS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Of one sample: coords [picks, 2] of the cells of the highest scores, and the sum of the others'.

    worth [C, cells]: errors times the cells' shares of the image. Then the scores lie in those of the first class.
    """
    for start in range(0, cells, TILE):
        cell = start + tl.arange(0, TILE)
        highest = tl.full([TILE], float("-inf"), ACCUMULATE)
        for c in range(channels):
            scale = _of_mean(partials + c * tiles, tiles, pixels, LEAST_FOREGROUND, ACCUMULATE, SUMS)
            value = tl.load(worth + c * cells + cell, mask=cell < cells, other=0.0, cache_modifier=".cg") * scale
            highest = tl.where((value > highest) | (value != value), value, highest)
        tl.debug_barrier()
        tl.store(worth + cell, highest, mask=cell < cells)
    tl.debug_barrier()
    found, left = best_into(index, worth, cells, picks, SPARE, True, CHUNKS, TILE)
    left += store_picks(next_coords, picks, index, found, worth, columns, True, OUTSIDE, RANKS)
    tl.store(uncovered, left)


@triton.jit(do_not_specialize=["channels", "count", "next_height", "next_width", "picks"])
def write_kernel(  # type: ignore[no-untyped-def]
    coarser,
    patches,
    errors,
    coords,
    error,
    temperature,
    out,
    divided,
    next_error,
    partials,
    worth,
    index,
    next_coords,
    uncovered,
    counters,
    channels,
    height,
    width,
    count,
    next_height,
    next_width,
    picks,
    LEAST_FOREGROUND: tl.constexpr,
    OUTSIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
    SPARE: tl.constexpr,
    CHUNK: tl.constexpr,
    SUMS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """coarser [B, C, h / 2, w / 2], patches and errors [B, K, C, 8, 8] -> out [B, C, h, w]; next_error, picks."""
    CELLS_Y: tl.constexpr = BLOCK_Y // 8
    CELLS_X: tl.constexpr = BLOCK_X // 8
    CELLS: tl.constexpr = CELLS_Y * CELLS_X
    rows, columns = tl.cdiv(height, 8), tl.cdiv(width, 8)
    tiles_x = tl.cdiv(width, BLOCK_X)
    tiles = tl.cdiv(height, BLOCK_Y) * tiles_x
    program = tl.program_id(0)
    tile, plane = program % tiles, program // tiles
    image, channel = (plane // channels).to(tl.int64), plane % channels
    top, left = tile // tiles_x * BLOCK_Y, tile % tiles_x * BLOCK_X

    # The last patch of each cell of the tile.
    row, column = top // 8 + tl.arange(0, CELLS) // CELLS_X, left // 8 + tl.arange(0, CELLS) % CELLS_X
    cell = tl.where((row < rows) & (column < columns), row * columns + column, -2)
    number = tl.full([CELLS], -1, tl.int32)
    coords += image * count * 2
    for start in range(0, count, CHUNK):
        k = start + tl.arange(0, CHUNK)
        y = tl.load(coords + k * 2, mask=k < count, other=-1)
        x = tl.load(coords + k * 2 + 1, mask=k < count, other=-1)
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        of_patch = tl.where(inside, y.to(tl.int32) // 8 * columns + x.to(tl.int32) // 8, -1)
        number = tl.maximum(number, tl.max(tl.where(of_patch[None, :] == cell[:, None], k[None, :], -1), 1))

    y, x = top + tl.arange(0, BLOCK_Y), left + tl.arange(0, BLOCK_X)
    inside = (y < height)[:, None] & (x < width)[None, :]
    of_pixel = _of_cells(number, CELLS_Y, CELLS_X, 8)
    hidden = of_pixel >= 0
    in_patches = (image * count * channels + channel) * 64
    offsets = of_pixel * (channels * 64) + ((y % 8 * 8)[:, None] + (x % 8)[None, :])
    values = tl.load(patches + in_patches + offsets, mask=hidden & inside, other=0.0)
    if coarser is not None:
        low_height, low_width = (height + 1) // 2, (width + 1) // 2
        upper, lower, down = halfway(y, low_height)
        before, after, right = halfway(x, low_width)
        down, right = down.to(ACCUMULATE) * 0.25, right.to(ACCUMULATE) * 0.25
        coarser += plane.to(tl.int64) * low_height * low_width
        read = inside & (of_pixel < 0)
        doubled = tl.zeros([BLOCK_Y, BLOCK_X], ACCUMULATE)
        for low in tl.static_range(2):
            line, of_line = upper, 1.0 - down
            if low == 1:
                line, of_line = lower, down
            begins = (line.to(tl.int32) * low_width)[:, None]
            first = tl.load(coarser + (begins + before.to(tl.int32)[None, :]), mask=read, other=0.0).to(ACCUMULATE)
            second = tl.load(coarser + (begins + after.to(tl.int32)[None, :]), mask=read, other=0.0).to(ACCUMULATE)
            doubled += (first * (1.0 - right)[None, :] + second * right[None, :]) * of_line[:, None]
        values = tl.where(hidden, values, doubled.to(out.dtype.element_ty))
    in_map = plane.to(tl.int64) * height * width + ((y * width)[:, None] + x[None, :])
    tl.store(out + in_map, values, mask=inside)
    logits = values.to(ACCUMULATE)
    if temperature is not None:
        by = tl.load(temperature).to(out.dtype.element_ty).to(ACCUMULATE)
        scaled = divide(logits, tl.full([BLOCK_Y, BLOCK_X], 1.0, ACCUMULATE) * by)
        tl.store(divided + in_map, scaled.to(out.dtype.element_ty), mask=inside)

    if next_error is not None:
        tl.store(partials + plane.to(tl.int64) * tiles + tile, tl.sum(tl.where(inside, probability(logits), 0.0)))
        next_rows, next_columns = tl.cdiv(next_height, 8), tl.cdiv(next_width, 8)
        wrong = tl.load(errors + in_patches + offsets, mask=hidden, other=0.0).to(ACCUMULATE)
        wrong = tl.reshape(probability(wrong), [CELLS_Y * 2, 4, CELLS_X * 2, 4])
        expected = tl.sum(tl.sum(wrong, 3), 1) * 0.0625
        inherited = tl.zeros([CELLS], ACCUMULATE)
        if error is not None:
            of_plane = error + plane.to(tl.int64) * rows * columns
            inherited = tl.load(of_plane + cell, mask=cell >= 0, other=0.0).to(ACCUMULATE)
        there = _of_cells(number, CELLS_Y, CELLS_X, 2) >= 0
        expected = tl.where(there, expected, _of_cells(inherited, CELLS_Y, CELLS_X, 2))
        row, column = top // 4 + tl.arange(0, CELLS_Y * 2), left // 4 + tl.arange(0, CELLS_X * 2)
        in_grid = plane.to(tl.int64) * next_rows * next_columns + ((row * next_columns)[:, None] + column[None, :])
        written = (row < next_rows)[:, None] & (column < next_columns)[None, :]
        rounded = expected.to(out.dtype.element_ty)
        tl.store(next_error + in_grid, rounded, mask=written)
        down = tl.minimum(next_height - row * 8, 8).to(ACCUMULATE) / next_height.to(ACCUMULATE)
        along = tl.minimum(next_width - column * 8, 8).to(ACCUMULATE) / next_width.to(ACCUMULATE)
        tl.store(worth + in_grid, rounded.to(ACCUMULATE) * (down[:, None] * along[None, :]), mask=written)
        if is_last(counters + image, channels * tiles):
            _pick(
                partials + image * channels * tiles,
                worth + image * channels * next_rows * next_columns,
                index + image * (picks + SPARE),
                next_coords + image * picks * 2,
                uncovered + image,
                channels,
                tiles,
                height * width,
                next_rows * next_columns,
                next_columns,
                picks,
                LEAST_FOREGROUND,
                OUTSIDE,
                ACCUMULATE,
                CHUNKS,
                TILE,
                SPARE,
                SUMS,
                RANKS,
            )


def picking(cells: int) -> dict[str, Any]:
    """Of a program that picks among so many cells: in one tile, or in chunks."""
    tile, num_warps = (1024, 4) if cells <= 1024 else (4096, 8 if cells <= 4096 else 16)
    return {"TILE": tile, "CHUNKS": cells > tile, "RANKS": 8 * min(num_warps, 8), "num_warps": num_warps}


def options(dtype: torch.dtype, next_cells: int | None) -> dict[str, Any]:
    """Of a launch that picks among so many cells; None: it does not pick."""
    picks = picking(next_cells or 0)
    rows, columns = (8, 32) if picks["TILE"] == 1024 else (16, 64) if picks["CHUNKS"] else (16, 32)
    if next_cells is None:
        rows, picks["TILE"] = 16, 1
    return {
        "ACCUMULATE": accumulation(dtype),
        "BLOCK_Y": rows,
        "BLOCK_X": columns,
        "SPARE": SPARE,
        "CHUNK": CHUNK,
        "SUMS": SUMS,
        "num_stages": 1,
        "enable_fp_fusion": False,
        **picks,
    }


def _compilation(dtype: torch.dtype, height: int, first: bool, last: bool) -> Compilation:
    """Of a level of `height` x `height` pixels."""
    chosen, pointer = options(dtype, None if last else (2 * height // 8) ** 2), POINTERS[dtype]
    types = {
        "coarser": pointer,
        "patches": pointer,
        "errors": pointer,
        "coords": "*i64",
        "error": pointer,
        "temperature": "*fp32",
        "out": pointer,
        "divided": pointer,
        "next_error": pointer,
        "partials": "*fp32",
        "worth": "*fp32",
        "index": "*i32",
        "next_coords": "*i64",
        "uncovered": "*fp32",
        "counters": "*i32",
    }
    absent = ["coarser", "error"] if first else []
    if last:
        absent += ["next_error", "partials", "worth", "index", "next_coords", "uncovered", "counters"]
    else:
        absent += ["temperature", "divided"]
    sizes = ("channels", "height", "width", "count", "next_height", "next_width", "picks")
    of_launch = {name: chosen.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    kind = "first" if first else "last" if last else f"picks of {(2 * height // 8) ** 2}"
    return Compilation(
        f"write_and_pick: {pointer[1:]} {kind}",
        write_kernel,
        {name: kind for name, kind in types.items() if name not in absent} | dict.fromkeys(sizes, "i32"),
        dict.fromkeys(absent) | {"LEAST_FOREGROUND": 0.002, "OUTSIDE": -(2**16)} | chosen,
        aligned=("height", "width"),
        **of_launch,
    )


_LEVELS = ((32, True, False), (128, False, False), (256, False, False), (512, False, True), (512, False, False))
COMPILATIONS = [_compilation(dtype, *level) for dtype in POINTERS for level in _LEVELS]
