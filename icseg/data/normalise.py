"""Intensities to [0, 1]: by the percentiles of the image or volume, or by a window that the user gives."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from icseg.data.formats.content import Array

PERCENTILES = (0.5, 99.5)


def check_window(window: tuple[float, float] | None) -> None:
    """Raise ValueError unless `window` is None or (low, high) with low < high, both finite."""
    if window is None:
        return
    if len(window) != 2 or not np.isfinite(window).all() or not window[0] < window[1]:
        raise ValueError(f"window must be (low, high), finite, with low < high, got {tuple(window)}")


def intensity_window(array: Array, name: str) -> tuple[float, float]:
    """The 0.5 and 99.5 percentiles of `array`, or its extremes where these agree.

    Raises ValueError, naming the image `name`, if a value is not finite or all are equal.
    """
    least, most = check_intensities(array, name)
    low, high = np.percentile(array, PERCENTILES)
    return (float(low), float(high)) if low < high else (least, most)  # else: few bright pixels on even ground


def check_intensities(array: Array, name: str) -> tuple[float, float]:
    """The extremes of `array`. Raises ValueError, naming it, if a value is not finite or all are equal."""
    low, high = array.min(), array.max()  # NaN wins both
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{name} must hold finite values, got {array[~np.isfinite(array)][0]}")
    if low == high:
        raise ValueError(f"{name} must not be constant, got {low:g} everywhere")
    return float(low), float(high)


def normalise(array: Array, window: tuple[float, float]) -> NDArray[np.float32]:
    """Map low to 0 and high to 1, linearly, and clip to [0, 1]."""
    low, high = window
    scaled = (array.astype(np.float32) - np.float32(low)) / np.float32(high - low)
    return np.clip(scaled, 0, 1, out=scaled)
