"""Ops on patches in plain PyTorch: the definition that every other backend must match.

Deterministic on every device: equal inputs give equal bits, whatever the number of threads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg_kernels.numerics import accumulation_dtype, deterministic_add
from icseg_kernels.patches.coords import sample_positions

# A copy moves bits; torch indexes these dtypes, but not every other of their size.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def gather(source: Tensor, coords: Tensor, patch_size: int) -> Tensor:
    """[..., C, H, W], integer [..., K, 2] -> [..., K, C, p, p]; zero outside the image."""
    rows, cols, inside = _pixels(coords, patch_size, *source.shape[-2:])
    bits = source.view(_BITS[source.dtype.itemsize])
    return _take(bits, rows, cols).masked_fill_(~inside, 0).view(source.dtype)


def gather_backward(grad: Tensor, coords: Tensor, height: int, width: int) -> Tensor:
    """Adjoint of `gather`: [..., K, C, p, p] added up into [..., C, H, W]."""
    rows, cols, inside = _pixels(coords, grad.shape[-1], height, width)
    values = grad.to(accumulation_dtype(grad.dtype)).masked_fill(~inside, 0)
    return _add(values, rows, cols, height, width).to(grad.dtype)


def gather_bilinear(
    source: Tensor,
    coords: Tensor,
    extent_y: Tensor | float,
    extent_x: Tensor | float,
    out_size: int,
    edge_to_edge: bool,
) -> Tensor:
    """[..., C, H, W], [..., K, 2] -> [..., K, C, n, n]: samples of patches of the given extent, borders replicated."""
    image = source.to(accumulation_dtype(source.dtype))
    height, width = image.shape[-2:]
    positions = sample_positions(coords, (extent_y, extent_x), out_size, edge_to_edge, (height, width), image.dtype)
    taps, inside = _taps(positions, height, width)
    total = image.new_zeros(*positions.shape[:-2], image.shape[-3], *inside.shape[-2:])
    for rows, cols, weight in taps:
        total += weight * _take(image, rows, cols)
    return total.masked_fill_(~inside, 0).to(source.dtype)


def gather_bilinear_backward(
    grad: Tensor,
    coords: Tensor,
    extent_y: Tensor | float,
    extent_x: Tensor | float,
    edge_to_edge: bool,
    height: int,
    width: int,
) -> Tensor:
    """Adjoint of `gather_bilinear` with respect to its source: [..., K, C, n, n] -> [..., C, H, W]."""
    values = grad.to(accumulation_dtype(grad.dtype))
    positions = sample_positions(
        coords, (extent_y, extent_x), grad.shape[-1], edge_to_edge, (height, width), values.dtype
    )
    taps, inside = _taps(positions, height, width)
    values = values.masked_fill(~inside, 0)
    total = values.new_zeros(*grad.shape[:-4], grad.shape[-3], height, width)
    for rows, cols, weight in taps:
        total += _add(weight * values, rows, cols, height, width)
    return total.to(grad.dtype)


def scatter(
    patches: Tensor,
    coords: Tensor,
    weight: Tensor | None,
    fill: float | Tensor,
    height: int,
    width: int,
    keep_total: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, K, C, p, p], [B, K, 2], [p, p] (None: ones) -> weighted mean [B, C, H, W], total weight [B, 1, H, W],
    empty unless it is to be kept, and where that is positive."""
    weight = _ones(patches) if weight is None else weight
    rows, cols, inside = _pixels(coords, patches.shape[-1], height, width)
    counted = inside & (weight > 0)  # [B, K, 1, p, p]
    weights = weight.expand_as(counted).masked_fill(~counted, 0)
    weighted = (patches.to(weight.dtype) * weight).masked_fill_(~counted, 0)
    sums = _add(torch.cat([weighted, weights], dim=-3), rows, cols, height, width)
    total = sums[:, -1:]
    coverage = total > 0
    mean = torch.where(coverage, sums[:, :-1] / total, fill).to(patches.dtype)
    return mean, total.contiguous() if keep_total else total.new_empty(0), coverage


def scatter_backward(grad: Tensor, total: Tensor, coords: Tensor, weight: Tensor | None, patch_size: int) -> Tensor:
    """Adjoint of `scatter` with respect to its patches: [B, C, H, W] -> [B, K, C, p, p]."""
    share = torch.where(total > 0, grad.to(total.dtype) / total, 0)
    shares = gather(share, coords, patch_size)
    return (shares if weight is None else torch.where(weight > 0, shares * weight, 0)).to(grad.dtype)


def upsample_with_patches(coarser: Tensor, patches: Tensor, coords: Tensor, height: int, width: int) -> Tensor:
    """[B, C, h, w], [B, K, C, p, q], [B, K, 2] -> [B, C, H, W], contiguous; with torch's own gradients."""
    doubled = F.interpolate(coarser, scale_factor=2.0, mode="bilinear", align_corners=False)
    doubled = doubled[..., :height, :width].to(coarser.dtype)  # float32 under autocast
    batch, count, channels, patch_height, patch_width = patches.shape
    rows, rows_inside = _pixels_along(coords[..., 0], patch_height, height)
    cols, cols_inside = _pixels_along(coords[..., 1], patch_width, width)
    inside = rows_inside[..., :, None] & cols_inside[..., None, :]  # [B, K, p, q]
    pixels = (rows[..., :, None] * width + cols[..., None, :]).flatten(1)
    numbers = torch.arange(count, dtype=torch.int32, device=coords.device).view(-1, 1, 1)
    numbers = torch.where(inside, numbers, -1).flatten(1)
    last = numbers.new_full((batch, height * width), -1).scatter_reduce_(1, pixels, numbers, "amax")  # at each pixel
    hidden = (numbers < 0) | (numbers < last.gather(1, pixels))
    values = patches.transpose(1, 2).flatten(2).masked_fill(hidden.unsqueeze(1), 0)  # [B, C, K * p * q]
    written = deterministic_add(values.new_zeros(batch, channels, height * width), pixels, values).view(doubled.shape)
    return torch.where(last.view(batch, 1, height, width) >= 0, written, doubled)


def _ones(patches: Tensor) -> Tensor:
    """[p, p] in the dtype of the sums."""
    return patches.new_ones(patches.shape[-2:], dtype=accumulation_dtype(patches.dtype))


def _pixels(coords: Tensor, patch_size: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """rows, cols [..., K, p], clamped into the image; inside [..., K, 1, p, p], where no clamp was needed."""
    rows, rows_inside = _pixels_along(coords[..., 0], patch_size, height)
    cols, cols_inside = _pixels_along(coords[..., 1], patch_size, width)
    return rows, cols, (rows_inside[..., :, None] & cols_inside[..., None, :]).unsqueeze(-3)


def _pixels_along(corner: Tensor, patch_size: int, length: int) -> tuple[Tensor, Tensor]:
    # Clamped before the sum, which could overflow: at -patch_size or at length a patch is wholly outside.
    corner = corner.long().clamp(-patch_size, length)
    positions = corner[..., None] + torch.arange(patch_size, device=corner.device)
    return positions.clamp(0, length - 1), (positions >= 0) & (positions < length)


def _taps(positions: Tensor, height: int, width: int) -> tuple[Iterator[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """The four neighbours of each sample: rows, cols [..., K, n] and weights [..., K, 1, n, n];
    and inside [..., K, 1, n, n], False where a position is NaN."""
    y_taps, y_inside = _taps_along(positions[..., 0, :], height)
    x_taps, x_inside = _taps_along(positions[..., 1, :], width)
    taps = (
        (rows, cols, (wy[..., :, None] * wx[..., None, :]).unsqueeze(-3))
        for (rows, wy), (cols, wx) in itertools.product(y_taps, x_taps)
    )
    return taps, (y_inside[..., :, None] & x_inside[..., None, :]).unsqueeze(-3)


def _taps_along(positions: Tensor, length: int) -> tuple[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], Tensor]:
    inside = ~positions.isnan()
    last = max(length - 1, 0)
    positions = positions.masked_fill(~inside, 0).clamp(0, last)
    low = positions.long()
    fraction = positions - low
    return ((low, 1 - fraction), ((low + 1).clamp(max=last), fraction)), inside


def _take(source: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """source [..., C, H, W] at rows [..., K, m] x cols [..., K, n] -> [..., K, C, m, n]."""
    *lead, channels, height, width = source.shape
    index = rows[..., :, None] * width + cols[..., None, :]  # [..., K, m, n]
    shape = (*lead, channels, *index.shape[-3:])
    if height * width == 0:
        return source.new_zeros(shape).movedim(-4, -3).contiguous()
    flat = index.flatten(-3).unsqueeze(-2).expand(*lead, channels, -1)
    return source.flatten(-2).gather(-1, flat).view(shape).movedim(-4, -3).contiguous()


def _add(values: Tensor, rows: Tensor, cols: Tensor, height: int, width: int) -> Tensor:
    """values [..., K, C, m, n] added up at rows x cols -> [..., C, H, W], in the order of K."""
    values = values.movedim(-4, -3).flatten(-3)  # [..., C, K * m * n]
    index = (rows[..., :, None] * width + cols[..., None, :]).flatten(-3)
    *lead, channels, count = values.shape
    batch = math.prod(lead)
    total = values.new_zeros(batch, channels, height * width)
    deterministic_add(total, index.reshape(batch, count), values.reshape(batch, channels, count))
    return total.view(*lead, channels, height, width)
