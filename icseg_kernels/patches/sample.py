"""Draw the patches of an image where an importance map is high."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from icseg_kernels import backend as backends
from icseg_kernels import flops
from icseg_kernels.gumbel_topk import gumbel_topk, noise_source
from icseg_kernels.patches import sample_reference
from icseg_kernels.patches.coords import NO_PATCH

_IMPLEMENTATIONS = {"reference": sample_reference.sample_patches}

backends.declare("sample_patches", {"reference": backends.Backend()})


class PatchSample(NamedTuple):
    """k patches of each map, in the order drawn.

    coords:  int32 [B, k, 2], (y, x) of the top-left corner in pixels of the unpadded map; negative where the
             patch begins in the padding, NO_PATCH (-2^30) where none was left to draw.
    scores:  [B, k] perturbed logits, descending; -inf where none was left.
    indices: int64 [B, k] flat index of the window, row-major over `candidate_grid`; -1 where none was left.
    weights: [B, k] with sum 1 and gradients to the map if the draw was differentiable, else None.
    """

    coords: Tensor
    scores: Tensor
    indices: Tensor
    weights: Tensor | None


def candidate_grid(
    height: int, width: int, patch_size: int, stride: int, padding: tuple[int, int]
) -> tuple[int, int]:
    """(rows, columns) of the grid of windows that `sample_patches` draws from; 0 where no window fits."""
    slack = sum(padding) - patch_size
    return max(0, (height + slack) // stride + 1), max(0, (width + slack) // stride + 1)


def sample_patches(
    weights: Tensor,
    k: int,
    patch_size: int,
    *,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    temperature: float = 1.0,
    blur_sigma: float = 0.0,
    seed: int | Tensor | None = None,
    noise: float | Tensor | None = None,
    differentiable: bool = False,
    backend: str | None = None,
) -> PatchSample:
    """Draw k windows of an importance map without replacement, the likelier the higher their maximum.

    The chain of PatchICL (arXiv 2604.12752): zero-pad the map; take the maximum over every window of
    patch_size x patch_size pixels; rescale each sample's maxima to [0, 1], (m - min) / (max - min + 1e-6);
    blur them with a normalised Gaussian of int(4 * sigma + 1) | 1 taps, zeros outside; keep every stride-th
    window on both axes; divide by the temperature; draw with `gumbel_topk`. A constant map draws uniformly.

    weights:        [B, 1, H, W] float16, bfloat16, float32 or float64 (narrow types compute in float32), any
                    strides. NaN and -inf count as the map's lowest finite value, +inf as its highest.
    k:              patches to draw, at most the number of candidate windows (`candidate_grid`).
    patch_size:     p, in pixels.
    stride:         pixels between candidate windows.
    padding:        zeros (before, after) on both axes, in pixels.
    temperature:    > 0; the logits lie in [0, 1 / temperature].
    blur_sigma:     standard deviation in pixels; 0 for no blur.
    seed, noise:    as in `gumbel_topk`; noise is [B, candidates] (or broadcastable), or 0 for the best k.
    differentiable: also return weights: the softmax of the perturbed scores over all windows, taken at the
                    drawn ones and renormalised to sum 1, which is the softmax over the drawn ones. scores and
                    weights then carry gradients to the map and to noise; otherwise nothing does.
    backend:        "reference", or None for the best.

    Raises TypeError or ValueError for arguments of other types, shapes or ranges.
    """
    _check(weights, patch_size, stride, padding, temperature, blur_sigma)
    batch, _, height, width = weights.shape
    grid = candidate_grid(height, width, patch_size, stride, padding)
    if min(grid) == 0:
        padded = f"{height + sum(padding)} x {width + sum(padding)}"
        raise ValueError(f"patch_size must fit the padded map of {padded} pixels, got {patch_size}")
    if not 0 <= k <= grid[0] * grid[1]:
        raise ValueError(f"k must lie in [0, {grid[0] * grid[1]}], the number of candidate windows, got {k}")
    chosen = backends.select("sample_patches", backend, weights)
    if differentiable:
        logits = sample_reference.window_logits(weights, patch_size, stride, padding, temperature, blur_sigma)
        indices, scores, _, _ = gumbel_topk(logits, k, seed=seed, noise=noise, backend=backend)
        drawn_weights = _softmax_over_drawn(scores, indices)
    else:
        seeded, noise = noise_source(seed, noise, (batch, grid[0] * grid[1]), weights.device)
        map_, noise = weights.detach(), None if noise is None else noise.detach()
        indices, scores = _op(
            map_,
            k,
            patch_size,
            stride,
            *padding,
            float(temperature),
            float(blur_sigma),
            seeded,
            noise,
            chosen,
        )
        drawn_weights = None
    return PatchSample(_coords(indices, grid[1], stride, padding[0]), scores, indices, drawn_weights)


def _check(
    weights: Tensor,
    patch_size: int,
    stride: int,
    padding: tuple[int, int],
    temperature: float,
    blur_sigma: float,
) -> None:
    if not weights.is_floating_point():
        raise TypeError(f"weights must be a floating-point tensor, got {weights.dtype}")
    if weights.ndim != 4 or weights.shape[1] != 1 or 0 in weights.shape[2:]:
        raise ValueError(f"weights must have shape [B, 1, H, W] with H, W > 0, got {list(weights.shape)}")
    if patch_size < 1 or stride < 1:
        raise ValueError(f"patch_size and stride must be at least 1, got {patch_size} and {stride}")
    if len(padding) != 2 or min(padding) < 0:
        raise ValueError(f"padding must be (before, after), neither negative, got {padding}")
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, got {temperature}")
    if not 0 <= blur_sigma < float("inf"):
        raise ValueError(f"blur_sigma must be at least 0, got {blur_sigma}")


def _softmax_over_drawn(scores: Tensor, indices: Tensor) -> Tensor:
    """[B, k] with sum 1 over the patches drawn; 0 for those that were not, also where none was."""
    drawn = indices >= 0
    return scores.masked_fill(~drawn, torch.finfo(scores.dtype).min).softmax(1).masked_fill(~drawn, 0.0)


def _coords(indices: Tensor, columns: int, stride: int, before: int) -> Tensor:
    row, column = indices // columns, indices % columns
    coords = torch.stack([row, column], dim=-1) * stride - before
    return coords.masked_fill(indices.unsqueeze(-1) < 0, NO_PATCH).to(torch.int32)


def _implementation(
    weights: Tensor,
    k: int,
    patch_size: int,
    stride: int,
    before: int,
    after: int,
    temperature: float,
    blur_sigma: float,
    seed: Tensor | None,
    noise: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    implementation = _IMPLEMENTATIONS[backend]
    return implementation(
        weights, k, patch_size, stride, (before, after), temperature, blur_sigma, seed, noise
    )


def _fake(weights: Tensor, k: int, *_: object) -> tuple[Tensor, Tensor]:
    shape = (weights.shape[0], k)
    dtype = torch.promote_types(weights.dtype, torch.float32)
    return weights.new_empty(shape, dtype=torch.int64), weights.new_empty(shape, dtype=dtype)


_op = backends.register(
    "sample_patches(Tensor weights, int k, int patch_size, int stride, int before, int after, "
    "float temperature, float blur_sigma, Tensor? seed, Tensor? noise, str backend) -> (Tensor, Tensor)",
    _implementation,
    _fake,
)


def _count(
    weights: Any,
    k: int,
    patch_size: int,
    stride: int,
    before: int,
    after: int,
    temperature: float,
    blur_sigma: float,
    *_: Any,
    out_shape: Any = None,
) -> int:
    batch, _, height, width = weights
    windows = candidate_grid(height, width, patch_size, 1, (before, after))
    kept = candidate_grid(height, width, patch_size, stride, (before, after))
    taps = len(sample_reference.blur_kernel(blur_sigma)) if blur_sigma > 0 else 0
    return flops.sample_patches_flops(batch, windows[0] * windows[1], kept[0] * kept[1], taps)


flops.register(_op, _count)
