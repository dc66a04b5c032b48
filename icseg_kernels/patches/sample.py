"""Draw the patches of an image where an importance map is high."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icseg_kernels import backend as backends
from icseg_kernels import checks, cuda_library, flops, library, triton_launch
from icseg_kernels.gumbel_topk import gumbel_topk, noise_source
from icseg_kernels.gumbel_topk.reference import scattered
from icseg_kernels.numerics import accumulation_dtype, scalar
from icseg_kernels.patches import sample_cuda, sample_native, sample_reference, sample_triton
from icseg_kernels.patches.windows import Windows, blur_taps, candidate_grid

_IMPLEMENTATIONS: dict[str, Any] = {
    "cuda": sample_cuda,
    "triton": sample_triton,
    "native": sample_native,
    "reference": sample_reference,
}

_LEAST_TEMPERATURE = 1e-30  # far below any use; below 1e-38 the logits would not be finite in float32

backends.declare(
    "sample_patches",
    {
        "cuda": backends.Backend(cuda_library.missing, sample_cuda.unsupported, triton_launch.slower),
        "triton": backends.Backend(triton_launch.missing, sample_triton.unsupported, triton_launch.slower),
        "native": backends.Backend(library.missing, sample_native.unsupported),
        "reference": backends.Backend(),
    },
)


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
    temperature:    at least 1e-30; the logits lie in [0, 1 / temperature]. New values do not compile anew.
    blur_sigma:     standard deviation in pixels, at least 0; below 1/4 there is no blur. New values compile anew.
    seed, noise:    as in `gumbel_topk`; noise is [B, candidates] (or broadcastable), or 0 for the best k.
    differentiable: also return weights: the softmax of the perturbed scores over all windows, taken at the
                    drawn ones and renormalised to sum 1, which is the softmax over the drawn ones. scores and
                    weights then carry gradients to the map and to noise; otherwise nothing does.
    backend:        "triton" (on CUDA devices), "native" (C++, on the CPU), "reference", or None for the best.

    Raises TypeError or ValueError for arguments of other types, shapes, devices or ranges, BackendError if the
    named backend cannot serve.
    """
    batch, height, width = _checked_size(weights)
    k = checks.integer("k", k, 0)
    before, after = checks.pair("padding", padding, 0)
    windows, candidates = _windows(height, width, patch_size, stride, before, after, temperature, blur_sigma)
    if k > candidates:
        raise ValueError(f"k must lie in [0, {candidates}], the number of candidate windows, got {k}")
    chosen = backends.select("sample_patches", backend, weights, candidates, windows, k, differentiable)
    if differentiable and chosen == "reference":
        temperature_ = scalar(cast(float, windows.temperature), weights.device)
        logits = sample_reference.window_logits(weights, windows._replace(temperature=temperature_))
        indices, scores, _, _ = gumbel_topk(logits, k, seed=seed, noise=noise, backend=backend)
        coords = sample_reference.corners(indices, weights, windows)
        return PatchSample(coords, scores, indices, _softmax_over_drawn(scores, indices))
    seeded, noise = noise_source(seed, noise, (batch, candidates), weights.device)
    if not differentiable:
        weights = weights.detach() if weights.requires_grad else weights
        noise = None if noise is None else noise.detach()
    coords, scores, indices = backends.call(_SamplePatches, _op, weights, k, *windows, seeded, noise, chosen)
    return PatchSample(coords, scores, indices, _softmax_over_drawn(scores, indices) if differentiable else None)


def _checked_size(weights: Tensor) -> tuple[int, int, int]:
    """B, H, W."""
    checks.floating("weights", weights)
    shape = weights.shape
    if len(shape) != 4 or shape[1] != 1 or shape[2] == 0 or shape[3] == 0:
        raise ValueError(f"weights must have shape [B, 1, H, W] with H, W > 0, got {list(shape)}")
    return shape[0], shape[2], shape[3]


def _windows(*settings: Any) -> tuple[Windows, int]:
    """`_checked_windows`, whose checks take as long as a small map's draw, remembered where they can be."""
    if not torch.compiler.is_compiling():
        try:
            return _remembered_windows(*settings)
        except TypeError:  # one of them may have no hash
            pass
    return _checked_windows(*settings)


def _checked_windows(
    height: int,
    width: int,
    patch_size: int,
    stride: int,
    before: int,
    after: int,
    temperature: float,
    blur_sigma: float,
) -> tuple[Windows, int]:
    """The settings, and how many windows a map has."""
    windows = Windows(
        checks.integer("patch_size", patch_size, 1),
        checks.integer("stride", stride, 1),
        before,
        after,
        checks.number("temperature", temperature, least=_LEAST_TEMPERATURE),
        checks.number("blur_sigma", blur_sigma, least=0),
    )
    rows, columns = candidate_grid(height, width, windows.patch_size, windows.stride, (before, after))
    if rows == 0 or columns == 0:
        padded = f"{height + before + after} x {width + before + after}"
        raise ValueError(f"patch_size must fit the padded map of {padded} pixels, got {patch_size}")
    return windows, rows * columns


_remembered_windows = functools.lru_cache(maxsize=256, typed=True)(_checked_windows)


def _grid(shape: tuple[int, ...], windows: Windows) -> tuple[int, int]:
    _, _, height, width = shape
    return candidate_grid(height, width, windows.patch_size, windows.stride, (windows.before, windows.after))


def _softmax_over_drawn(scores: Tensor, indices: Tensor) -> Tensor:
    """[B, k] with sum 1 over the patches drawn; 0 for those that were not, also where none was."""
    drawn = indices >= 0
    return scores.masked_fill(~drawn, torch.finfo(scores.dtype).min).softmax(1).masked_fill(~drawn, 0.0)


class _SamplePatches(torch.autograd.Function):
    @staticmethod
    def forward(
        weights: Tensor,
        k: int,
        patch_size: int,
        stride: int,
        before: int,
        after: int,
        temperature: Tensor,
        blur_sigma: float,
        seed: Tensor | None,
        noise: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, ...]:
        drawn: tuple[Tensor, ...] = _op(
            weights, k, patch_size, stride, before, after, temperature, blur_sigma, seed, noise, backend
        )
        return drawn

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        weights, _, *ctx.sizes, temperature, ctx.blur_sigma, _, noise, ctx.backend = inputs
        coords, _, indices = output
        ctx.mark_non_differentiable(coords, indices)
        ctx.save_for_backward(indices, weights, temperature)
        ctx.noise = None if noise is None else (noise.shape[1], noise.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _coords: Tensor, grad: Tensor, _indices: Tensor) -> tuple[Tensor | None, ...]:
        indices, weights, temperature = ctx.saved_tensors
        grad_weights = grad_noise = None
        if ctx.needs_input_grad[0]:
            grad_weights = _backward(grad, indices, weights, *ctx.sizes, temperature, ctx.blur_sigma, ctx.backend)
        if ctx.needs_input_grad[9]:
            candidates, dtype = ctx.noise
            grad_noise = scattered(grad, indices, candidates).to(dtype)
        return grad_weights, None, None, None, None, None, None, None, None, grad_noise, None


def _implementation(weights: Tensor, k: int, *arguments: Any) -> tuple[Tensor, ...]:
    seed, noise, backend = arguments[-3:]
    windows = Windows(*arguments[:-3])
    drawn: tuple[Tensor, ...] = _IMPLEMENTATIONS[backend].sample_patches(weights, k, windows, seed, noise)
    return drawn


def _fake(weights: Tensor, k: int, *_: object) -> tuple[Tensor, ...]:
    shape = (weights.shape[0], k)
    return (
        weights.new_empty((*shape, 2), dtype=torch.int32),
        weights.new_empty(shape, dtype=accumulation_dtype(weights.dtype)),
        weights.new_empty(shape, dtype=torch.int64),
    )


def _backward_implementation(grad: Tensor, indices: Tensor, weights: Tensor, *arguments: Any) -> Tensor:
    *windows, backend = arguments
    implementation = _IMPLEMENTATIONS[backend]
    grad_weights: Tensor = implementation.sample_patches_backward(grad, indices, weights, Windows(*windows))
    return grad_weights


def _backward_fake(grad: Tensor, indices: Tensor, weights: Tensor, *_: object) -> Tensor:
    return weights.new_empty(weights.shape)


_WINDOWS = "SymInt patch_size, SymInt stride, SymInt before, SymInt after, Tensor temperature, float blur_sigma"
_op = backends.register(
    f"sample_patches(Tensor weights, SymInt k, {_WINDOWS}, Tensor? seed, Tensor? noise, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _implementation,
    _fake,
)
_backward = backends.register(
    f"sample_patches_backward(Tensor grad, Tensor indices, Tensor weights, {_WINDOWS}, str backend) -> Tensor",
    _backward_implementation,
    _backward_fake,
)


def _count(weights: Any, k: int, *arguments: Any, out_shape: Any = None) -> int:
    windows = Windows(*arguments[: len(Windows._fields)])
    every, kept = _grid(weights, windows._replace(stride=1)), _grid(weights, windows)
    taps = blur_taps(windows.blur_sigma)
    return flops.sample_patches_flops(weights[0], every, kept, taps if taps > 1 else 0)


def _backward_count(grad: Any, indices: Any, weights: Any, *arguments: Any, out_shape: Any = None) -> int:
    """The adjoint of every linear step: as many as forward, less the draw's."""
    rows, columns = _grid(weights, Windows(*arguments[: len(Windows._fields)]))
    return _count(weights, 0, *arguments) - flops.gumbel_topk_flops(weights[0], rows * columns)


flops.register(_op, _count)
flops.register(_backward, _backward_count)
