"""What a level of the cascade leaves to the next, in one launch: its map, the expected error, and the picks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from icseg_kernels import triton_launch
from icseg_kernels.numerics import accumulation_dtype

PATCH = 8
OUTSIDE = -(2**16)  # where an entry that is no patch lies
LEAST_FOREGROUND = 0.002  # share of the image that an expected foreground counts at least
MOST_CELLS, MOST_PICKS = 16384, 1024


class Written(NamedTuple):
    """map: [B, C, h, w]; divided: the same divided by the temperature, None without one. None at the last level:

    error:     [B, C, rows, columns] expected in the cells of the next level;
    coords:    [B, picks, 2] int64 of its picks, best first, OUTSIDE where no cell is left;
    uncovered: [B] float32 (float64 for float64), the expected error of the other cells, as a share of twice the
               expected foreground.
    """

    map: Tensor
    error: Tensor | None
    coords: Tensor | None
    uncovered: Tensor | None
    divided: Tensor | None


def write_and_pick(
    coarser: Tensor | None,
    patches: Tensor,
    errors: Tensor,
    coords: Tensor,
    size: tuple[int, int],
    error: Tensor | None,
    next_size: tuple[int, int] | None,
    picks: int,
    *,
    temperature: Tensor | None = None,
    counters: Tensor | None = None,
) -> Written:
    """The map of a level, and where the next one looks. All tensors contiguous, of one dtype, on one device.

    coarser:   [B, C, (h + 1) // 2, (w + 1) // 2] logits, doubled bilinearly where no patch lies; None: 0 there.
    patches:   [B, K, C, 8, 8] logits, errors: [B, K, C, 8, 8] logits of their error.
    coords:    int64 [B, K, 2] (y, x) of their corners: of different cells of the grid of 8 x 8, or negative, which
               writes nothing.
    size:      (h, w) of the map. error: [B, C, rows, columns] expected in its cells, inherited where no patch lies;
               None: 0 there.
    next_size: (h, w) of the next level, twice `size` or one less; None at the last level, where nothing is picked.
    picks:     at most MOST_PICKS, of at most MOST_CELLS cells: those of the highest error times the cell's share of the
               image, over twice the foreground expected from the map, in the worst class. Of equals the first; NaN
               counts as 0, less than 0 never.
    temperature: a number in memory, of any floating dtype.
    counters:  int32 [B] zeros, and zeros again afterwards: of nothing that runs at the same time. None: made, by an
               operation of its own.
    Raises ValueError for other shapes, dtypes, devices or strides, and for larger ones.
    """
    from icseg_kernels.cascade import write_triton_kernels as kernels

    if len(patches.shape) != 5 or patches.shape[2] == 0 or patches.shape[3:] != (PATCH, PATCH):
        raise ValueError(f"patches must have shape [B, K, C, 8, 8] with C > 0, got {list(patches.shape)}")
    batch, count, channels = patches.shape[:3]
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size must be at least 1 x 1, got {height} x {width}")
    if reasons := [
        *triton_launch.unsupported_device("patches", patches),
        *triton_launch.unsupported_dtype("patches", patches),
    ]:
        raise ValueError("; ".join(reasons))
    if channels * max(height * width, count * PATCH**2) >= 2**31:
        raise ValueError(f"map and patches of a sample must be smaller, got {channels} x {height} x {width}, {count}")
    rows, columns = -(-height // PATCH), -(-width // PATCH)
    check("errors", errors, patches.shape, patches)
    check("coords", coords, (batch, count, 2), patches, torch.int64)
    if coarser is not None:
        check("coarser", coarser, (batch, channels, (height + 1) // 2, (width + 1) // 2), patches)
    if error is not None:
        check("error", error, (batch, channels, rows, columns), patches)
    if temperature is not None and (temperature.numel() != 1 or temperature.device != patches.device):
        raise ValueError(f"temperature must be one number on {patches.device}, got {list(temperature.shape)}")
    cells = None if next_size is None else _next_cells(size, next_size, picks)
    options = kernels.options(patches.dtype, cells)
    tiles = -(-height // options["BLOCK_Y"]) * -(-width // options["BLOCK_X"])
    out = patches.new_empty((batch, channels, height, width))
    divided = None if temperature is None else torch.empty_like(out)
    next_error = partials = worth = index = next_coords = uncovered = None
    next_height, next_width = (0, 0) if next_size is None else next_size
    if next_size is None:
        counters = None
    else:
        sums = accumulation_dtype(patches.dtype)
        counters = counters_for(batch, counters, patches)
        next_error = patches.new_empty((batch, channels, -(-next_height // PATCH), -(-next_width // PATCH)))
        partials = patches.new_empty((batch, channels, tiles), dtype=sums)
        worth = torch.empty_like(next_error, dtype=sums)
        index = patches.new_empty((batch, picks + kernels.SPARE), dtype=torch.int32)
        next_coords = coords.new_empty((batch, picks, 2))
        uncovered = patches.new_empty(batch, dtype=sums)
    triton_launch.launch(
        kernels.write_kernel,
        (batch * channels * tiles,),
        patches.device,
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
        LEAST_FOREGROUND=LEAST_FOREGROUND,
        OUTSIDE=OUTSIDE,
        **options,
    )
    return Written(out, next_error, next_coords, uncovered, divided)


def _next_cells(size: tuple[int, int], next_size: tuple[int, int], picks: int) -> int:
    """How many cells there are to pick among."""
    if tuple((length + 1) // 2 for length in next_size) != tuple(size):
        raise ValueError(f"next_size must be twice size = {list(size)}, or one less, got {list(next_size)}")
    cells = -(-next_size[0] // PATCH) * -(-next_size[1] // PATCH)
    if cells > MOST_CELLS:
        raise ValueError(f"next_size must have at most {MOST_CELLS} cells, got {cells}")
    if not 0 <= picks <= MOST_PICKS:
        raise ValueError(f"picks must be from 0 to {MOST_PICKS}, got {picks}")
    return cells


def counters_for(count: int, counters: Tensor | None, like: Tensor) -> Tensor:
    """`counters`, or zeros [count]: how many programs of each sample have come."""
    if counters is None:
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    check("counters", counters, (count,), like, torch.int32)
    return counters


def check(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> None:
    """The last check before raw pointers: contiguous [shape] on the device of `like`, of its dtype or of `dtype`."""
    dtype = dtype or like.dtype
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != like.device or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {dtype} {list(shape)} on {like.device}, got {tensor.dtype} "
            f"{list(tensor.shape)} of strides {list(tensor.stride())} on {tensor.device}"
        )
