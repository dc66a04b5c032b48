"""Masks at the resolution of a level."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def level_mask(mask: Tensor, size: tuple[int, int], touched_value: float) -> Tensor:
    """Masks [N, C, H, W] in [0, 1] at `size`: the mean over each area, at least `touched_value` times its maximum.

    At 0 it is the mean. At 1, as published (arXiv 2604.12752), any touched pixel counts in full: nothing vanishes,
    and thin structures get wider. Where the sides of `size` were rounded up, to whole patches or pixels, the mask is
    continued by its border: both sides keep one scale.
    """
    height, width = mask.shape[-2:]
    if (height, width) == size:
        return mask
    scale = max(size) / max(height, width)
    below, right = (max(0, round(n / scale) - m) for n, m in zip(size, (height, width), strict=True))
    if below or right:
        mask = F.pad(mask, (0, right, 0, below), mode="replicate")
    mean = F.adaptive_avg_pool2d(mask, size)
    return torch.maximum(mean, F.adaptive_max_pool2d(mask, size) * touched_value) if touched_value else mean
