"""From an importance map to drawn patches, in plain PyTorch: the definition."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg_kernels.gumbel_topk import reference as gumbel_topk_reference

EPSILON = 1e-6


def window_logits(
    weights: Tensor,
    patch_size: int,
    stride: int,
    padding: tuple[int, int],
    temperature: float,
    blur_sigma: float,
) -> Tensor:
    """[B, windows_y * windows_x] logits of every candidate window of weights [B, 1, H, W], row-major.

    float64 for float64 weights, else float32. Differentiable.
    """
    before, after = padding
    map_ = F.pad(_finite(weights[:, 0]), (before, after, before, after)).unsqueeze(1)
    # Rows, then columns: the same maxima, and the same first one among equals, as over the square.
    pooled = F.max_pool2d(F.max_pool2d(map_, (1, patch_size), 1), (patch_size, 1), 1).squeeze(1)
    lowest, highest = pooled.amin((1, 2), keepdim=True), pooled.amax((1, 2), keepdim=True)
    scaled = (pooled - lowest) / (highest - lowest + EPSILON)
    return (blurred(scaled, blur_sigma, stride) / temperature).flatten(1)


def _finite(map_: Tensor) -> Tensor:
    """`map_` [B, H, W] in float32 at least; NaN and -inf become its lowest finite value, inf its highest."""
    map_ = map_.to(torch.promote_types(map_.dtype, torch.float32))
    finite = map_.isfinite()
    lowest = map_.masked_fill(~finite, torch.inf).amin((1, 2), keepdim=True).nan_to_num(posinf=0.0)
    highest = map_.masked_fill(~finite, -torch.inf).amax((1, 2), keepdim=True).nan_to_num(neginf=0.0)
    return torch.where(finite, map_, torch.where(map_ == torch.inf, highest, lowest))


def blur_kernel(sigma: float) -> list[float]:
    """Normalised Gaussian of int(4 * sigma + 1) | 1 taps."""
    size = int(4 * sigma + 1) | 1
    taps = [math.exp(-((i - size // 2) ** 2) / (2 * sigma**2)) for i in range(size)]
    return [tap / sum(taps) for tap in taps]


def blurred(map_: Tensor, sigma: float, stride: int) -> Tensor:
    """Every stride-th row and column of the blur of map_ [B, H, W] with zeros outside; sigma 0 is no blur."""
    if sigma == 0:
        return map_[:, ::stride, ::stride]
    taps = blur_kernel(sigma)
    return _correlated(_correlated(map_, taps, 1, stride), taps, 2, stride)


def _correlated(map_: Tensor, taps: list[float], dim: int, stride: int) -> Tensor:
    """Only the outputs that are kept are computed, each summed from the first tap to the last."""
    radius = len(taps) // 2
    padded = F.pad(map_, (0, 0, radius, radius) if dim == 1 else (radius, radius))
    size = map_.shape[dim]
    shifted = [padded.narrow(dim, i, size) for i in range(len(taps))]
    shifted = [x[:, ::stride] if dim == 1 else x[:, :, ::stride] for x in shifted]
    total = shifted[0] * taps[0]
    for x, tap in zip(shifted[1:], taps[1:], strict=True):
        total = total + x * tap
    return total


def sample_patches(
    weights: Tensor,
    k: int,
    patch_size: int,
    stride: int,
    padding: tuple[int, int],
    temperature: float,
    blur_sigma: float,
    seed: Tensor | None,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(flat window indices int64 [B, k], scores [B, k]), as `gumbel_topk` of `window_logits`."""
    logits = window_logits(weights, patch_size, stride, padding, temperature, blur_sigma)
    indices, scores, _ = gumbel_topk_reference.gumbel_topk(logits, k, seed, noise)
    return indices[:, :k].contiguous(), scores[:, :k].contiguous()
