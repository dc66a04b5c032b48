"""Overlap and distance of two masks, with a defined value where a mask is empty."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torch import Tensor

EMPTY_VALUES = ("defined", "nan")


def dice(prediction: Tensor, target: Tensor, *, empty: str = "defined") -> Tensor:
    """Dice coefficient of each sample: float32 [B].

    prediction, target: [B, ...] bool; threshold probabilities first. Both empty: 1; one empty: 0.
    empty="nan" gives NaN where both are empty, for means over samples that hold the structure.
    """
    overlap, first, second = _counts(prediction, target)
    return _ratio(2 * overlap, first + second, empty)


def iou(prediction: Tensor, target: Tensor, *, empty: str = "defined") -> Tensor:
    """Intersection over union of each sample: float32 [B]; arguments and empty masks as in `dice`."""
    overlap, first, second = _counts(prediction, target)
    return _ratio(overlap, first + second - overlap, empty)


def soft_dice(probability: Tensor, target: Tensor, *, empty: str = "defined") -> Tensor:
    """Dice of probabilities in [0, 1], not thresholded: float32 [B]; shapes and empty masks as in `dice`."""
    _check_shapes(probability, target)
    probability, target = probability.float().flatten(1), target.float().flatten(1)
    return _ratio(2 * (probability * target).sum(1), probability.sum(1) + target.sum(1), empty)


def hausdorff95(
    prediction: ArrayLike,
    target: ArrayLike,
    *,
    spacing: float | Sequence[float] = 1.0,
    empty: str = "defined",
) -> float:
    """95th percentile of the surface distances between two masks, the larger of both directions.

    prediction, target: [H, W] or [D, H, W], non-zero is foreground. spacing: size of a pixel along each axis;
    the distance has its unit. Both empty: 0; one empty: the diagonal of the image. empty="nan" gives NaN for
    either.
    """
    first, second = np.asarray(prediction) != 0, np.asarray(target) != 0
    _check_shapes(first, second)
    _check_empty(empty)
    step = np.broadcast_to(np.asarray(spacing, dtype=float), (first.ndim,))
    if not (first.any() and second.any()):
        if empty == "nan":
            return math.nan
        diagonal = math.sqrt(sum(((n - 1) * s) ** 2 for n, s in zip(first.shape, step, strict=True)))
        return diagonal if first.any() or second.any() else 0.0
    a, b = _boundary(first), _boundary(second)
    there = ndimage.distance_transform_edt(~b, sampling=step)[a]
    back = ndimage.distance_transform_edt(~a, sampling=step)[b]
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


def _boundary(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Foreground pixels with a background pixel, or the border of the image, beside them."""
    return mask & ~ndimage.binary_erosion(mask)


def _counts(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for name, mask in (("prediction", prediction), ("target", target)):
        if mask.dtype != torch.bool:
            raise TypeError(f"{name} must be a bool tensor, got {mask.dtype}")
    _check_shapes(prediction, target)
    a, b = prediction.flatten(1), target.flatten(1)
    return (a & b).sum(1).float(), a.sum(1).float(), b.sum(1).float()


def _ratio(numerator: Tensor, denominator: Tensor, empty: str) -> Tensor:
    _check_empty(empty)
    value = torch.full_like(denominator, 1.0 if empty == "defined" else math.nan)
    return torch.where(denominator > 0, numerator / denominator.clamp_min(1e-12), value)


def _check_shapes(prediction: Tensor | NDArray[np.bool_], target: Tensor | NDArray[np.bool_]) -> None:
    if prediction.shape != target.shape:
        raise ValueError(f"target must have the shape of prediction {list(prediction.shape)}, got {list(target.shape)}")


def _check_empty(empty: str) -> None:
    if empty not in EMPTY_VALUES:
        raise ValueError(f"empty must be one of {', '.join(EMPTY_VALUES)}, got {empty!r}")
