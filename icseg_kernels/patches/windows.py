"""The candidate windows of a map: how many there are, and what makes one likely."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Windows(NamedTuple):
    """The settings of `sample_patches`."""

    patch_size: int
    stride: int
    before: int
    after: int
    temperature: float | Tensor  # a tensor: 0-dim float64, on the device of the map
    blur_sigma: float


def candidate_grid(height: int, width: int, patch_size: int, stride: int, padding: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the grid of windows that `sample_patches` draws from; 0 where no window fits."""
    slack = sum(padding) - patch_size
    return max(0, (height + slack) // stride + 1), max(0, (width + slack) // stride + 1)


def blur_taps(sigma: float) -> int:
    """The number of taps of the blur; 1, which is no blur, for sigma below 1/4."""
    return int(4 * sigma + 1) | 1


def blur_kernel(sigma: float) -> list[float]:
    """Its taps, for sigma of at least 1/4: a normalised Gaussian."""
    size = blur_taps(sigma)
    taps = [math.exp(-((i - size // 2) ** 2) / (2 * sigma**2)) for i in range(size)]
    return [tap / sum(taps) for tap in taps]
