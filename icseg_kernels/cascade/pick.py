"""Which patches of a support set are encoded, at all levels in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icseg_kernels import triton_launch
from icseg_kernels.cascade.write import MOST_CELLS, MOST_PICKS, PATCH, check, counters_for
from icseg_kernels.numerics import accumulation_dtype

MOST_LEVELS = 6


def pick_support(
    masks: Sequence[Tensor],
    counts: Sequence[int],
    foreground_share: float,
    chance: Sequence[Tensor],
    *,
    counters: Tensor | None = None,
) -> list[Tensor]:
    """Corners (y, x) int64 [N, K, 2] of the cells to encode, one tensor a level, K the level's count or all cells.

    A share of a count goes to the boundary, then the foreground, in turn for each class; the rest to other cells, those
    near the foreground first, as in the network's own selection.

    masks:    of at most MOST_LEVELS levels [N, C, h, w] in [0, 1], contiguous, of one dtype, on one device.
    counts:   of each level, at most MOST_PICKS where it has more cells, of which there are at most MOST_CELLS.
    foreground_share: in [0, 1].
    chance:   of each level [2, cells] draws in (0, 1), of the dtype of the masks, that decide between equals; between
              equal draws the lower index.
    counters: int32 [levels * N] zeros, and zeros again afterwards: of nothing that runs at the same time. None: made,
              by an operation of its own.
    Raises ValueError for other shapes, dtypes, devices or strides, and for larger ones.
    """
    from icseg_kernels.cascade import pick_triton_kernels as kernels

    if not 1 <= len(masks) <= MOST_LEVELS or len(counts) != len(masks) or len(chance) != len(masks):
        raise ValueError(
            f"masks, counts and chance must be of as many levels, 1 to {MOST_LEVELS}, got {len(masks)}, {len(counts)}, "
            f"{len(chance)}"
        )
    if not 0 <= foreground_share <= 1:
        raise ValueError(f"foreground_share must be in [0, 1], got {foreground_share}")
    like = masks[0]
    if len(like.shape) != 4 or like.shape[1] == 0:
        raise ValueError(f"masks must have shape [N, C, h, w] with C > 0, got {list(like.shape)}")
    if reasons := [
        *triton_launch.unsupported_device("masks", like),
        *triton_launch.unsupported_dtype("masks", like),
    ]:
        raise ValueError("; ".join(reasons))
    images, channels = like.shape[:2]
    sizes, cells, kept = [], [], []
    for level, (mask, count, draws) in enumerate(zip(masks, counts, chance, strict=True)):
        height, width = mask.shape[-2:]
        number = -(-height // PATCH) * -(-width // PATCH)
        if not 1 <= number <= MOST_CELLS or channels * height * width >= 2**31:
            raise ValueError(f"masks[{level}] must have 1 to {MOST_CELLS} cells, got {list(mask.shape)}")
        if count < 0 or (count > MOST_PICKS and count < number):
            raise ValueError(f"counts[{level}] must be from 0 to {MOST_PICKS}, or all cells, got {count} of {number}")
        check(f"masks[{level}]", mask, (images, channels, height, width), like)
        check(f"chance[{level}]", draws, (2, number), like)
        sizes.append((height, width))
        cells.append(number)
        kept.append(min(count, number))
    levels = len(masks)
    most = max(count if count < number else 1 for count, number in zip(kept, cells, strict=True))
    options = kernels.options(like.dtype, max(cells))
    boundaries = [round(foreground_share * count) for count in kept]
    counters = counters_for(levels * images, counters, like)
    corners = torch.empty(images * sum(kept), 2, dtype=torch.int64, device=like.device)
    slots, most_cells = levels * images, max(cells)
    notes = torch.empty(slots, channels + 1, most_cells, dtype=torch.int8, device=like.device)
    worth = like.new_empty((slots, most_cells), dtype=accumulation_dtype(like.dtype))
    index = like.new_empty((slots, most), dtype=torch.int32)
    turns = like.new_empty((slots, most_cells), dtype=torch.int32) if channels > 1 else None
    programs = sum(-(-h // options["BLOCK_Y"]) * -(-w // options["BLOCK_X"]) for h, w in sizes)
    order = range(levels - 1, -1, -1)  # what takes longest first
    absent = MOST_LEVELS - levels
    triton_launch.launch(
        kernels.pick_kernel,
        (images * programs,),
        like.device,
        *(masks[i] for i in order),
        *[None] * absent,
        *(chance[i] for i in order),
        *[None] * absent,
        corners,
        notes,
        worth,
        index,
        turns,
        counters,
        images,
        channels,
        most,
        most_cells,
        *(sizes[i][0] for i in order),
        *[0] * absent,
        *(sizes[i][1] for i in order),
        *[0] * absent,
        *(kept[i] for i in order),
        *[0] * absent,
        *(boundaries[i] for i in order),
        *[0] * absent,
        **kernels.constants(like.dtype),
        **options,
    )
    parts = corners.split([images * kept[i] for i in order])
    return [part.view(images, kept[i], 2) for i, part in zip(order, parts, strict=True)][::-1]
