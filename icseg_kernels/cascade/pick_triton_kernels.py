"""The patches of the support set as one Triton kernel for all levels.

A program owns a tile of the masks of one image at one level, whole cells of it, and notes what lies in them; the last
program of an image and level to come picks its cells.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from icseg_kernels.cascade.write_triton_kernels import best_into, is_last, picking, ranked, store_corners, store_picks
from icseg_kernels.compilation import Compilation
from icseg_kernels.patches.gather_triton_kernels import POINTERS, accumulation

MOST_LEVELS = 6


@triton.jit
def _as_in(values, like):  # type: ignore[no-untyped-def]
    """values, rounded to the dtype that `like` points to."""
    return values.to(like.dtype.element_ty).to(values.dtype)


@triton.jit
def _note(  # type: ignore[no-untyped-def]
    mask, notes, most_cells, channels, height, width, top, left, TOUCHED: tl.constexpr, FULL: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """notes [C + 1, most_cells] of a tile of mask [C, h, w].

    Of each class, 1 where the highest pixel of a cell is above TOUCHED, plus 2 where the lowest is below FULL; then 1
    where any class is touched, plus 2 where any pixel is NaN.
    """
    CELLS_Y: tl.constexpr = BLOCK_Y // 8
    CELLS_X: tl.constexpr = BLOCK_X // 8
    y, x = top + tl.arange(0, BLOCK_Y), left + tl.arange(0, BLOCK_X)
    y, x = tl.minimum(y, height - 1), tl.minimum(x, width - 1)  # the border is replicated
    row, column = top // 8 + tl.arange(0, CELLS_Y), left // 8 + tl.arange(0, CELLS_X)
    columns = tl.cdiv(width, 8)
    written = (row < tl.cdiv(height, 8))[:, None] & (column < columns)[None, :]
    cell = (row * columns)[:, None] + column[None, :]
    any_touched = tl.zeros([CELLS_Y, CELLS_X], tl.int32)
    any_nan = tl.zeros([CELLS_Y, CELLS_X], tl.int32)
    for c in range(channels):
        plane = mask + c * height * width
        pixels = tl.load(plane + ((y * width)[:, None] + x[None, :])).to(ACCUMULATE)
        above, below = (pixels > TOUCHED).to(tl.int32), (pixels < FULL).to(tl.int32)
        counted = above + (below << 8) + ((pixels != pixels).to(tl.int32) << 16)  # each at most 64 in a cell
        counted = tl.sum(tl.sum(counted.reshape([CELLS_Y, 8, CELLS_X, 8]), 3), 1)
        nan = counted >> 16
        touched = ((counted & 0xFF) > 0) & (nan == 0)
        mixed = ((counted >> 8 & 0xFF) > 0) & (nan == 0)
        tl.store(
            notes + c * most_cells + cell, (touched.to(tl.int32) + mixed.to(tl.int32) * 2).to(tl.int8), mask=written
        )
        any_touched |= touched.to(tl.int32)
        any_nan |= (nan > 0).to(tl.int32)
    tl.store(notes + channels * most_cells + cell, (any_touched + any_nan * 2).to(tl.int8), mask=written)


@triton.jit
def _want(worth, notes, chance, cells, ACCUMULATE: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """worth [cells]: how much a class wants them: its boundary, then its foreground, then others, by chance."""
    for start in range(0, cells, TILE):
        cell = start + tl.arange(0, TILE)
        there = cell < cells
        note = tl.load(notes + cell, mask=there, other=0, cache_modifier=".cg").to(tl.int32)
        first = tl.load(chance + cell, mask=there, other=0.0).to(ACCUMULATE)
        kind = _as_in(1.0 + (note >> 1).to(ACCUMULATE) + _as_in(1.5 * first, chance), chance)
        tl.store(worth + cell, tl.where((note & 1) > 0, kind, first), mask=there)
    tl.debug_barrier()


@triton.jit
def _take_turns(  # type: ignore[no-untyped-def]
    worth, notes, most_cells, chance, cells, turns, index, boundary, channels,
    ACCUMULATE: tl.constexpr, CHUNKS: tl.constexpr, TILE: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """worth [cells]: minus each cell's first turn where the classes choose their best in turn, -inf for the last.

    No cell that comes after `boundary` others in every class is among the first `boundary`: those have no turn.
    """
    never = 1 << 30
    for start in range(0, cells, TILE):
        cell = start + tl.arange(0, TILE)
        tl.store(turns + cell, tl.full([TILE], never, tl.int32), mask=cell < cells)
    for c in range(channels):
        of_class = notes + c * most_cells
        _want(worth, of_class, chance, cells, ACCUMULATE, TILE)
        found, _ = best_into(index, worth, cells, boundary, 0, False, CHUNKS, TILE)
        for start in range(0, found, RANKS):
            which, place, there = ranked(start, found, index, worth, False, RANKS)
            note = tl.load(of_class + which, mask=there, other=0, cache_modifier=".cg").to(tl.int32)
            rank = tl.where((note & 1) > 0, place, place + cells)
            rank = tl.minimum(rank, tl.load(turns + which, mask=there, other=0))
            tl.store(turns + which, rank, mask=there)
        tl.debug_barrier()
    for start in range(0, cells, TILE):
        cell = start + tl.arange(0, TILE)
        first = tl.load(chance + cell, mask=cell < cells, other=0.0).to(ACCUMULATE)
        earliest = tl.load(turns + cell, mask=cell < cells, other=0)
        turn = tl.where(earliest < never, earliest, 0).to(ACCUMULATE)
        wanted = -_as_in(_as_in(turn, chance) + first, chance)
        tl.store(worth + cell, tl.where(earliest < never, wanted, float("-inf")), mask=cell < cells)
    tl.debug_barrier()


@triton.jit
def _want_rest(  # type: ignore[no-untyped-def]
    worth, notes, chance, rows, columns, index, found, NEAR: tl.constexpr, ACCUMULATE: tl.constexpr, TILE: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    """worth [cells] where index [found] are taken: by chance, more where any class touches a cell or one beside it and
    no pixel there is NaN."""
    tl.debug_barrier()  # all have read what is there
    cells = rows * columns
    for start in range(0, cells, TILE):
        cell = start + tl.arange(0, TILE)
        row, column, seen = cell // columns, cell % columns, tl.zeros([TILE], tl.int32)
        for side in range(9):
            y, x = row + (side // 3 - 1), column + (side % 3 - 1)
            inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
            seen |= tl.load(notes + y * columns + x, mask=inside, other=0, cache_modifier=".cg").to(tl.int32)
        wanted = tl.load(chance + cells + cell, mask=cell < cells, other=0.0).to(ACCUMULATE)
        tl.store(worth + cell, wanted + tl.where(seen == 1, NEAR, 0.0), mask=cell < cells)
    tl.debug_barrier()
    for start in range(0, found, RANKS):
        taken = start + tl.arange(0, RANKS)
        which = tl.load(index + taken, mask=taken < found, other=0)
        tl.store(worth + which, tl.full([RANKS], float("-inf"), ACCUMULATE), mask=taken < found)
    tl.debug_barrier()


@triton.jit
def _programs(images, height, width, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr):  # type: ignore[no-untyped-def]
    return images * tl.cdiv(height, BLOCK_Y) * tl.cdiv(width, BLOCK_X)


@triton.jit
def _or_after(  # type: ignore[no-untyped-def]
    level, begins, corners, mask, chance, height, width, count, boundary,
    next_begins, next_corners, next_mask, next_chance, next_height, next_width, next_count, next_boundary,
):  # fmt: skip
    """The second of two levels, where this program belongs to that or one after it."""
    if tl.program_id(0) >= next_begins:
        level += 1
        begins, corners, mask, chance = next_begins, next_corners, next_mask, next_chance
        height, width, count, boundary = next_height, next_width, next_count, next_boundary
    return level, begins, corners, mask, chance, height, width, count, boundary


@triton.jit(
    do_not_specialize=[
        "images", "channels", "most", "most_cells",
        *(f"{name}_{i}" for name in ("height", "width", "count", "boundary") for i in range(MOST_LEVELS)),
    ]
)  # fmt: skip
def pick_kernel(  # type: ignore[no-untyped-def]
    mask_0, mask_1, mask_2, mask_3, mask_4, mask_5,
    chance_0, chance_1, chance_2, chance_3, chance_4, chance_5,
    coords, notes, worth, index, turns, counters,
    images, channels, most, most_cells,
    height_0, height_1, height_2, height_3, height_4, height_5,
    width_0, width_1, width_2, width_3, width_4, width_5,
    count_0, count_1, count_2, count_3, count_4, count_5,
    boundary_0, boundary_1, boundary_2, boundary_3, boundary_4, boundary_5,
    TOUCHED: tl.constexpr,
    FULL: tl.constexpr,
    NEAR: tl.constexpr,
    OUTSIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    """mask_i [N, C, h_i, w_i], chance_i [2, cells] -> coords [N, count_i, 2] of all levels, one after the other."""
    program, of_level = tl.program_id(0), images.to(tl.int64) * 2
    level, begins, corners, mask, chance = program * 0, program * 0, coords, mask_0, chance_0
    height, width, count, boundary = height_0, width_0, count_0, boundary_0
    ends, after = _programs(images, height_0, width_0, BLOCK_Y, BLOCK_X), coords + of_level * count_0
    if mask_1 is not None:
        level, begins, corners, mask, chance, height, width, count, boundary = _or_after(
            level, begins, corners, mask, chance, height, width, count, boundary,
            ends, after, mask_1, chance_1, height_1, width_1, count_1, boundary_1,
        )  # fmt: skip
        ends, after = ends + _programs(images, height_1, width_1, BLOCK_Y, BLOCK_X), after + of_level * count_1
    if mask_2 is not None:
        level, begins, corners, mask, chance, height, width, count, boundary = _or_after(
            level, begins, corners, mask, chance, height, width, count, boundary,
            ends, after, mask_2, chance_2, height_2, width_2, count_2, boundary_2,
        )  # fmt: skip
        ends, after = ends + _programs(images, height_2, width_2, BLOCK_Y, BLOCK_X), after + of_level * count_2
    if mask_3 is not None:
        level, begins, corners, mask, chance, height, width, count, boundary = _or_after(
            level, begins, corners, mask, chance, height, width, count, boundary,
            ends, after, mask_3, chance_3, height_3, width_3, count_3, boundary_3,
        )  # fmt: skip
        ends, after = ends + _programs(images, height_3, width_3, BLOCK_Y, BLOCK_X), after + of_level * count_3
    if mask_4 is not None:
        level, begins, corners, mask, chance, height, width, count, boundary = _or_after(
            level, begins, corners, mask, chance, height, width, count, boundary,
            ends, after, mask_4, chance_4, height_4, width_4, count_4, boundary_4,
        )  # fmt: skip
        ends, after = ends + _programs(images, height_4, width_4, BLOCK_Y, BLOCK_X), after + of_level * count_4
    if mask_5 is not None:
        level, begins, corners, mask, chance, height, width, count, boundary = _or_after(
            level, begins, corners, mask, chance, height, width, count, boundary,
            ends, after, mask_5, chance_5, height_5, width_5, count_5, boundary_5,
        )  # fmt: skip

    tiles_x = tl.cdiv(width, BLOCK_X)
    tiles = tl.cdiv(height, BLOCK_Y) * tiles_x
    image, tile = (program - begins) // tiles, (program - begins) % tiles
    slot = (level * images + image).to(tl.int64)
    notes += slot * (channels + 1) * most_cells
    mask += image.to(tl.int64) * channels * height * width
    top, left = tile // tiles_x * BLOCK_Y, tile % tiles_x * BLOCK_X
    _note(mask, notes, most_cells, channels, height, width, top, left, TOUCHED, FULL, BLOCK_Y, BLOCK_X, ACCUMULATE)
    if is_last(counters + slot, tiles):
        worth, index, corners = worth + slot * most_cells, index + slot * most, corners + image.to(tl.int64) * count * 2
        rows, columns = tl.cdiv(height, 8), tl.cdiv(width, 8)
        cells = rows * columns
        if count == cells:
            for start in range(0, cells, TILE):
                cell = start + tl.arange(0, TILE)
                store_corners(corners, cell, cell, columns, cell < cells)
        else:
            if turns is None:
                _want(worth, notes, chance, cells, ACCUMULATE, TILE)
            else:
                of_slot = turns + slot * most_cells
                _take_turns(
                    worth, notes, most_cells, chance, cells, of_slot, index, boundary, channels,
                    ACCUMULATE, CHUNKS, TILE, RANKS,
                )  # fmt: skip
            found, _ = best_into(index, worth, cells, boundary, 0, False, CHUNKS, TILE)
            store_picks(corners, boundary, index, found, worth, columns, False, OUTSIDE, RANKS)
            of_any, rest = notes + channels * most_cells, count - boundary
            _want_rest(worth, of_any, chance, rows, columns, index, found, NEAR, ACCUMULATE, TILE, RANKS)
            found, _ = best_into(index, worth, cells, rest, 0, False, CHUNKS, TILE)
            store_picks(corners + boundary * 2, rest, index, found, worth, columns, False, OUTSIDE, RANKS)


def options(dtype: torch.dtype, most_cells: int) -> dict[str, Any]:
    """Of a launch for levels of at most so many cells."""
    picked = picking(most_cells)
    if most_cells > 1024:  # with 8 warps, or more ranks at a time, registers are spilled
        picked |= {"num_warps": 16, "RANKS": 32}
    rows = 2 * picked["num_warps"]
    return {
        "ACCUMULATE": accumulation(dtype),
        "BLOCK_Y": rows,
        "BLOCK_X": 128,
        "num_stages": 1,
        "enable_fp_fusion": False,
        **picked,
    }


@functools.cache
def constants(dtype: torch.dtype) -> dict[str, float]:
    """The thresholds as numbers of `dtype`, and what is added near the foreground, of float32."""
    touched, full = (torch.tensor(value, dtype=dtype).item() for value in (0.3, 0.7))
    return {
        "TOUCHED": touched,
        "FULL": full,
        "NEAR": torch.tensor(0.35, dtype=torch.float32).item(),
        "OUTSIDE": -(2**16),
    }


def _compilation(dtype: torch.dtype, levels: int, several: bool) -> Compilation:
    """Of levels from 32 pixels on; several classes or one."""
    chosen, pointer = options(dtype, 16 << 2 * (levels - 1)), POINTERS[dtype]
    of_launch = {name: chosen.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    types = {f"{name}_{i}": pointer for name in ("mask", "chance") for i in range(levels)}
    types |= {"coords": "*i64", "notes": "*i8", "worth": "*fp32", "index": "*i32", "counters": "*i32"}
    types |= {"turns": "*i32"} if several else {}
    names = [name for name in pick_kernel.arg_names if not name.isupper()]
    absent = [name for name in names if name.startswith(("mask", "chance", "turns")) and name not in types]
    return Compilation(
        f"pick_support: {pointer[1:]} {levels} levels{', classes' if several else ''}",
        pick_kernel,
        {name: types.get(name, "i32") for name in names if name not in absent},
        dict.fromkeys(absent) | constants(dtype) | chosen,
        **of_launch,
    )


_CASES = ((5, False), (5, True), (6, False))
COMPILATIONS = [_compilation(dtype, *case) for dtype in POINTERS for case in _CASES]
