"""Floors: masks that need no model. A model that does not beat them has learned nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg.metrics import dice

_BINS = 256
_LEVELS = 64  # of the intensity band: finer ones would fit the noise of three images


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


def intensity_band(target: Tensor, support_images: Tensor, support_masks: Tensor) -> Tensor:
    """The pixels of each target whose grey level lies in the band that fits its supports best: bool [B, 1, H, W].

    target: [B, 1, H, W] in [0, 1]; support_images, support_masks: [B, S, 1, h, w] in [0, 1], S > 0.
    """
    if support_images.ndim != 5 or support_images.shape[1] == 0 or support_images.shape != support_masks.shape:
        raise ValueError(
            "support_images and support_masks must have one shape [B, S, 1, H, W] with S > 0, "
            f"got {list(support_images.shape)} and {list(support_masks.shape)}"
        )
    bands = torch.tensor([fit_band(*pair) for pair in zip(support_images, support_masks, strict=True)])
    low, high = bands.to(target.device).view(-1, 2, 1, 1, 1).unbind(1)
    levels = _levels(target)
    return (levels >= low) & (levels <= high)


def fit_band(images: Tensor, masks: Tensor) -> tuple[int, int]:
    """The lowest and the highest of 64 grey levels between which lies what is most like the masks.

    images, masks: of one shape, in [0, 1]. It has the largest Dice of all bands, pixels of all images taken together.
    Of bands that are equally good (levels that no pixel has) the ends are in the middle.
    """
    levels = _levels(images) + _LEVELS * (masks > 0.5).to(torch.uint8)
    outside, inside = torch.bincount(levels.flatten(), minlength=2 * _LEVELS).double().view(2, _LEVELS)
    overlap, size = _sums(inside), _sums(inside + outside)
    scores = 2 * overlap / (size + inside.sum()).clamp_min(1)
    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).tril(-1), -1)
    best = scores == scores.max()
    high = int(best.any(0).nonzero()[0])
    low = _middle(best[:, high])
    return low, _middle(best[low])


def _sums(counts: Tensor) -> Tensor:
    """[low, high]: the sum of counts[low] to counts[high]."""
    cumulative = F.pad(counts.cumsum(0), (1, 0))
    return cumulative[None, 1:] - cumulative[:-1, None]


def _levels(image: Tensor) -> Tensor:
    return (image * _LEVELS).to(torch.uint8).clamp(max=_LEVELS - 1)


def _middle(chosen: Tensor) -> int:
    indices = chosen.nonzero().flatten()
    return int(indices[len(indices) // 2])
