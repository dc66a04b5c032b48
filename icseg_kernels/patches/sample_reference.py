"""From an importance map to drawn patches, in plain PyTorch: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg_kernels.gumbel_topk import reference as gumbel_topk_reference
from icseg_kernels.numerics import accumulation_dtype
from icseg_kernels.patches.coords import NO_PATCH
from icseg_kernels.patches.windows import Windows, blur_kernel, blur_taps, candidate_grid

EPSILON = 1e-6


def window_logits(weights: Tensor, windows: Windows) -> Tensor:
    """[B, windows_y * windows_x] logits of every candidate window of weights [B, 1, H, W], row-major.

    float64 for float64 weights, else float32. Differentiable.
    """
    size, before, after = windows.patch_size, windows.before, windows.after
    map_ = F.pad(_finite(weights[:, 0]), (before, after, before, after)).unsqueeze(1)
    # Rows, then columns: the same maxima, and the same first one among equals, as over the square.
    pooled = F.max_pool2d(F.max_pool2d(map_, (1, size), 1), (size, 1), 1).squeeze(1)
    lowest, highest = pooled.amin((1, 2), keepdim=True), pooled.amax((1, 2), keepdim=True)
    scaled = (pooled - lowest) / (highest - lowest + EPSILON)
    return (blurred(scaled, windows.blur_sigma, windows.stride) / windows.temperature).flatten(1)


def _finite(map_: Tensor) -> Tensor:
    """`map_` [B, H, W] in float32 at least; NaN and -inf become its lowest finite value, inf its highest."""
    map_ = map_.to(accumulation_dtype(map_.dtype))
    finite = map_.isfinite()
    lowest = map_.masked_fill(~finite, torch.inf).amin((1, 2), keepdim=True).nan_to_num(posinf=0.0)
    highest = map_.masked_fill(~finite, -torch.inf).amax((1, 2), keepdim=True).nan_to_num(neginf=0.0)
    return torch.where(finite, map_, torch.where(map_ == torch.inf, highest, lowest))


def blurred(map_: Tensor, sigma: float, stride: int) -> Tensor:
    """Every stride-th row and column of the blur of map_ [B, H, W] with zeros outside."""
    if blur_taps(sigma) == 1:
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
    weights: Tensor, k: int, windows: Windows, seed: int | Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(coords int32 [B, k, 2], scores [B, k], indices int64 [B, k]): `gumbel_topk` of `window_logits`."""
    indices, scores, *_ = gumbel_topk_reference.gumbel_topk(window_logits(weights, windows), k, seed, noise)
    return corners(indices, weights, windows), scores, indices


def corners(indices: Tensor, weights: Tensor, windows: Windows) -> Tensor:
    """int32 [B, k, 2] (y, x) of the corners of windows int64 [B, k]; NO_PATCH for -1."""
    size, stride, before, after, _, _ = windows
    _, columns = candidate_grid(weights.shape[2], weights.shape[3], size, stride, (before, after))
    coords = torch.stack([indices // columns, indices % columns], dim=-1) * stride - before
    return coords.masked_fill(indices.unsqueeze(-1) < 0, NO_PATCH).to(torch.int32)
