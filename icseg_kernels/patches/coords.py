"""Patch coordinates: what they mean, their checks, and where the samples of a resampled patch lie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from icseg_kernels import checks

NO_PATCH = -(2**30)
"""The coordinate written where a sampler found no patch. Any patch wholly outside the image counts as none:
it gathers zeros, contributes nothing to a scatter, and gets and gives no gradient. This one stays outside
every image after a shift or a rescaling by a factor of 2**-14 or more, and is exact in float32."""

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_coords(coords: Any, expected: tuple[int, ...], layout: str, device: torch.device) -> None:
    """Raise unless `coords` is a tensor of shape `expected`, `layout` in words, of numbers, on `device`."""
    checks.tensor("coords", coords)
    if coords.shape != expected:
        raise ValueError(f"coords must have shape {layout} = {list(expected)}, got {list(coords.shape)}")
    if coords.dtype not in INTEGERS and coords.dtype not in checks.FLOATING:
        raise TypeError(f"coords must be a tensor of int64, int32, int16, int8, uint8 or floats, got {coords.dtype}")
    checks.device("coords", coords, device)


def check_integer(coords: Tensor, otherwise: str) -> None:
    """Raise TypeError unless `coords` is an integer tensor; `otherwise` says what the caller could do."""
    if coords.dtype not in INTEGERS:
        raise TypeError(f"coords must be an integer tensor{otherwise}, got {coords.dtype}")


def sample_positions(
    coords: Tensor,
    extent: tuple[Tensor | float, Tensor | float],
    out_size: int,
    edge_to_edge: bool,
    size: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """[..., K, 2] -> [..., K, 2, n]: rows and columns of each patch's samples, in pixels from the first pixel's centre.

    NaN along an axis on which the patch lies wholly outside an image of `size`.
    """
    along = [
        _positions_along(coords[..., axis], extent[axis], out_size, edge_to_edge, size[axis], dtype) for axis in (0, 1)
    ]
    return torch.stack(along, -2)


def _positions_along(
    corner: Tensor, extent: Tensor | float, out_size: int, edge_to_edge: bool, length: int, dtype: torch.dtype
) -> Tensor:
    number = torch.arange(out_size, dtype=dtype, device=corner.device)
    if edge_to_edge:
        steps = max(out_size - 1, 1)
        line = (2 * number - steps) / (2 * steps)  # from -1/2 to 1/2
        offsets = line * extent + (extent / 2 - 0.5)
    else:
        offsets = (number + 0.5) * extent / out_size - 0.5
    corner = corner.double()  # integers may be too large for `dtype`
    inside = (corner > -extent) & (corner < length)
    return corner.masked_fill(~inside, torch.nan).to(dtype)[..., None] + offsets
