"""Intensities to [0, 1]: by the percentiles of the image or volume, or by a window that the user gives."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from icseg.data.formats.content import Array

PERCENTILES = (0.5, 99.5)


def check_window(window: tuple[float, float] | None) -> None:
    """Raise ValueError unless `window` is None or (low, high) with low < high, at a finite distance."""
    if window is None:
        return
    if len(window) != 2 or not window[0] < window[1] or not math.isfinite(window[1] - window[0]):
        given = ", ".join(f"{value:g}" for value in window)
        raise ValueError(f"window must be (low, high), finite, with low < high, got ({given})")


def intensity_window(array: Array, name: str) -> tuple[float, float]:
    """The 0.5 and 99.5 percentiles of `array`, or its extremes where these agree.

    Raises ValueError, naming the image `name`, if a value is not finite or all are equal.
    """
    least, most = check_intensities(array, name)
    low, high = np.percentile(array, PERCENTILES)
    return (float(low), float(high)) if low < high else (least, most)  # else: few bright pixels on even ground


def check_intensities(array: Array, name: str) -> tuple[float, float]:
    """The extremes of `array`, in double precision.

    Raises ValueError, naming it, if a value is not finite, all are equal, or their range is not finite.
    """
    low, high = float(array.min()), float(array.max())  # NaN wins both
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} must hold finite values, got {array[~np.isfinite(array)][0]}")
    if low == high:
        raise ValueError(f"{name} must not be constant, got {low:g} everywhere")
    if not math.isfinite(high - low):
        raise ValueError(f"{name} must hold values of a finite range, got {low:g} to {high:g}")
    return low, high


def normalise(array: Array, window: tuple[float, float]) -> NDArray[np.float32]:
    """Map low to 0 and high to 1, linearly, and clip to [0, 1]; in double precision up to the result."""
    low, high = window
    inside = np.clip(array.astype(np.float64), low, high)
    return ((inside - low) / (high - low)).astype(np.float32)
