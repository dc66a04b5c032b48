"""gather_patches and scatter_patches in plain PyTorch: the definition that every other backend must match.

Deterministic on every device: equal inputs give equal bits, whatever the number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def gather(source: Tensor, coords: Tensor, patch_size: int) -> Tensor:
    """[..., C, H, W], integer [..., K, 2] -> [..., K, C, p, p]; zero outside the image."""
    rows, cols, inside = _pixels(coords, patch_size, *source.shape[-2:])
    return _take(source, rows, cols).masked_fill_(~inside, 0)


def gather_backward(grad: Tensor, coords: Tensor, height: int, width: int) -> Tensor:
    """Adjoint of `gather`: [..., K, C, p, p] added up into [..., C, H, W]."""
    rows, cols, inside = _pixels(coords, grad.shape[-1], height, width)
    values = grad.to(accumulation_dtype(grad.dtype)).masked_fill(~inside, 0)
    return _add(values, rows, cols, height, width).to(grad.dtype)


def gather_bilinear(
    source: Tensor, coords: Tensor, extent: tuple[float, float], out_size: int, edge_to_edge: bool
) -> Tensor:
    """[..., C, H, W], [..., K, 2] -> [..., K, C, n, n]: n x n samples over `extent` pixels."""
    image = source.to(accumulation_dtype(source.dtype))
    taps, inside = _taps(coords, extent, out_size, edge_to_edge, image)
    total = image.new_zeros(*coords.shape[:-1], image.shape[-3], out_size, out_size)
    for rows, cols, weight in taps:
        total += weight * _take(image, rows, cols)
    return total.masked_fill_(~inside, 0).to(source.dtype)


def gather_bilinear_backward(
    grad: Tensor, coords: Tensor, extent: tuple[float, float], edge_to_edge: bool, height: int, width: int
) -> Tensor:
    """Adjoint of `gather_bilinear` with respect to its source: [..., K, C, n, n] -> [..., C, H, W]."""
    lead, channels, out_size = coords.shape[:-2], grad.shape[-3], grad.shape[-1]
    total = grad.new_zeros(*lead, channels, height, width, dtype=accumulation_dtype(grad.dtype))
    taps, inside = _taps(coords, extent, out_size, edge_to_edge, total)
    values = grad.to(total.dtype).masked_fill(~inside, 0)
    for rows, cols, weight in taps:
        total += _add(weight * values, rows, cols, height, width)
    return total.to(grad.dtype)


def scatter(
    patches: Tensor, coords: Tensor, weight: Tensor, height: int, width: int, fill: float
) -> tuple[Tensor, Tensor]:
    """[B, K, C, p, p], [B, K, 2], [p, p] -> weighted mean [B, C, H, W], total weight [B, 1, H, W]."""
    rows, cols, inside = _pixels(coords, patches.shape[-1], height, width)
    weights = weight.expand_as(inside).masked_fill(~inside, 0)  # [B, K, 1, p, p]
    weighted = (patches.to(weight.dtype) * weight).masked_fill_(~inside, 0)
    sums = _add(torch.cat([weighted, weights], dim=-3), rows, cols, height, width)
    total = sums[:, -1:].contiguous()
    return torch.where(total > 0, sums[:, :-1] / total, fill).to(patches.dtype), total


def scatter_backward(grad: Tensor, total: Tensor, coords: Tensor, weight: Tensor) -> Tensor:
    """Adjoint of `scatter` with respect to its patches: [B, C, H, W] -> [B, K, C, p, p]."""
    share = torch.where(total > 0, grad.to(total.dtype) / total, 0)
    return (gather(share, coords, weight.shape[-1]) * weight).to(grad.dtype)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums and interpolations of the 16-bit types are taken in float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


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


def _taps(
    coords: Tensor, extent: tuple[float, float], out_size: int, edge_to_edge: bool, image: Tensor
) -> tuple[Iterator[tuple[Tensor, Tensor, Tensor]], Tensor]:
    """The four neighbours of each sample: rows, cols [..., K, n] and weights [..., K, 1, n, n];
    and inside [..., K, 1, 1, 1], False for a patch wholly outside the image."""
    y_taps, y_inside = _taps_along(
        coords[..., 0], extent[0], out_size, edge_to_edge, image.shape[-2], image.dtype
    )
    x_taps, x_inside = _taps_along(
        coords[..., 1], extent[1], out_size, edge_to_edge, image.shape[-1], image.dtype
    )
    taps = (
        (rows, cols, (wy[..., :, None] * wx[..., None, :]).unsqueeze(-3))
        for (rows, wy), (cols, wx) in itertools.product(y_taps, x_taps)
    )
    return taps, (y_inside & x_inside)[..., None, None, None]


def _taps_along(
    corner: Tensor, extent: float, out_size: int, edge_to_edge: bool, length: int, dtype: torch.dtype
) -> tuple[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], Tensor]:
    inside = (corner > -extent) & (corner < length)
    offsets = sample_offsets(extent, out_size, edge_to_edge, dtype, corner.device)
    positions = torch.where(inside, corner, 0).to(dtype)[..., None] + offsets
    positions = positions.clamp(0, max(length - 1, 0))
    low = positions.long()
    high = (low + 1).clamp(max=max(length - 1, 0))
    fraction = positions - low
    return ((low, 1 - fraction), (high, fraction)), inside


def sample_offsets(
    extent: float, out_size: int, edge_to_edge: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[n] positions of a patch's samples, in pixels from the centre of its first pixel."""
    if edge_to_edge:
        half = extent / 2
        return torch.linspace(-half, half, out_size, dtype=dtype, device=device) + (half - 0.5)
    return (torch.arange(out_size, dtype=dtype, device=device) + 0.5) * (extent / out_size) - 0.5


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
    lead, channels = values.shape[:-4], values.shape[-3]
    total = values.new_zeros(*lead, channels, height * width)
    if total.numel() == 0:
        return total.view(*lead, channels, height, width)
    flat = (
        (rows[..., :, None] * width + cols[..., None, :])
        .flatten(-3)
        .unsqueeze(-2)
        .expand(*lead, channels, -1)
    )
    values = values.movedim(-4, -3).flatten(-3)  # [..., C, K * m * n]
    if values.is_cuda:
        # scatter_add_ adds in any order there; index_put_ sorts first.
        planes = torch.arange(total.numel() // total.shape[-1], device=total.device)[:, None]
        total.view(-1, height * width).index_put_(
            (planes, flat.flatten(0, -2)), values.flatten(0, -2), accumulate=True
        )
    else:
        total.scatter_add_(-1, flat, values)
    return total.view(*lead, channels, height, width)
