"""Floors: masks that need no model. A model that does not beat them has learned nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from icseg.metrics import dice

_BINS = 256


def copy_support(support_masks: Tensor) -> Tensor:
    """The mean support mask, thresholded at one half: [B, S, 1, H, W] in [0, 1] to bool [B, 1, H, W]."""
    if support_masks.ndim != 5 or support_masks.shape[1] == 0:
        raise ValueError(f"support_masks must have shape [B, S, 1, H, W] with S > 0, got {list(support_masks.shape)}")
    return support_masks.float().mean(1) >= 0.5


def otsu_threshold(image: Tensor) -> Tensor:
    """Otsu's threshold (1979) of each image: [B, ...] in [0, 1] to [B]; foreground is what lies above it.

    Of thresholds that separate equally well (a gap in the histogram) the middle one is taken. A constant
    image has none: its own grey level is returned.
    """
    levels = (image.flatten(1).double() * (_BINS - 1)).round().clamp(0, _BINS - 1).long()
    counts = torch.zeros(len(levels), _BINS, dtype=torch.float64, device=image.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels, dtype=torch.float64))
    grey = torch.arange(_BINS, dtype=torch.float64, device=image.device)
    below = counts.cumsum(1)
    above = below[:, -1:] - below
    sum_below = (counts * grey).cumsum(1)
    mean_below = sum_below / below.clamp_min(1)
    mean_above = (sum_below[:, -1:] - sum_below) / above.clamp_min(1)
    between = below * above * (mean_below - mean_above) ** 2
    best = between >= between.amax(1, keepdim=True) * (1 - 1e-12)
    threshold = (best * grey).sum(1) / best.sum(1)
    constant = between.amax(1) == 0
    return torch.where(constant, levels[:, 0].double(), threshold).float() / (_BINS - 1)


def otsu(target: Tensor, target_mask: Tensor) -> Tensor:
    """Otsu's mask of each target with the better polarity: bool [B, 1, H, W].

    target: [B, 1, H, W] in [0, 1]; target_mask: the same shape, bool. The polarity is chosen by the true
    mask, so its Dice is an upper bound of what a global threshold by Otsu can reach.
    """
    if target.shape != target_mask.shape:
        raise ValueError(
            f"target_mask must have the shape of target {list(target.shape)}, got {list(target_mask.shape)}"
        )
    bright = target > otsu_threshold(target).view(-1, 1, 1, 1)
    better = dice(bright, target_mask) >= dice(~bright, target_mask)
    return torch.where(better.view(-1, 1, 1, 1), bright, ~bright)
