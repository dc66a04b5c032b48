"""Patch coordinates: what they mean, and the checks that every patch op shares."""

from __future__ import annotations

import torch
from torch import Tensor

NO_PATCH = -(2**30)
"""The coordinate written where a sampler found no patch. Any patch wholly outside the image counts as none:
it gathers zeros, contributes nothing to a scatter, and gets and gives no gradient. This one stays outside
every image after a shift or a rescaling by a factor of 2**-14 or more, and is exact in float32."""


def check_coords(coords: Tensor, expected: tuple[int, ...], layout: str, device: torch.device) -> None:
    """Raise unless `coords` has shape `expected`, `layout` in words, and is real, on `device`."""
    if tuple(coords.shape) != expected:
        raise ValueError(f"coords must have shape {layout} = {list(expected)}, got {list(coords.shape)}")
    if coords.dtype == torch.bool or coords.dtype.is_complex:
        raise TypeError(f"coords must be an integer or floating-point tensor, got {coords.dtype}")
    if coords.device != device:
        raise ValueError(f"coords must be on the device of the images, {device}, got {coords.device}")


def check_integer(coords: Tensor, otherwise: str) -> None:
    """Raise TypeError unless `coords` is an integer tensor; `otherwise` says what the caller could do."""
    if coords.dtype.is_floating_point:
        raise TypeError(f"coords must be an integer tensor{otherwise}, got {coords.dtype}")
