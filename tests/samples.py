"""What the tests of several ops share: which backends there are, and one call of every public op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from icseg_kernels import (
    BlockWeights,
    ConvLayer,
    Rotation,
    cross_conv2d,
    cross_conv2d_and_mean,
    cross_conv2d_mean,
    gather_patches,
    group_norm_film,
    gumbel_topk,
    halvings,
    library,
    qkv_projection,
    sample_patches,
    scatter_patches,
    selected_attention,
    small_convolutions,
    transformer_block,
    upsample_with_patches,
)
from icseg_kernels.transformer_block.native import shapes

BACKENDS = ["reference"] if library.missing() else ["native", "reference"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton kernels run: there in its interpreter
needs_native = pytest.mark.skipif(bool(library.missing()), reason="the native library is not built")

Run = Callable[..., list[Tensor]]
"""run(backend, gradients=True): the outputs of one call on inputs made before, and the inputs' gradients."""


def _normal(*shape: int, seed: int = 0) -> Tensor:
    """On torch's default device, the same values on all."""
    values = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return values.to(torch.get_default_device())


def _integers(least: int, most: int, *shape: int) -> Tensor:
    values = torch.randint(least, most, shape, generator=torch.Generator("cpu").manual_seed(9), device="cpu")
    return values.to(torch.get_default_device())


def _run(op: Callable[..., Any], *inputs: Tensor, **options: Any) -> Run:
    """`inputs`: all tensors of the call; the floating ones get gradients."""

    def run(backend: str | None = None, gradients: bool = True) -> list[Tensor]:
        given = [x.detach().requires_grad_(gradients and x.is_floating_point()) for x in inputs]
        found = op(*given, backend=backend, **options)
        outputs = [x for x in (found if isinstance(found, tuple) else (found,)) if x is not None]
        differentiable = [x for x in outputs if x.requires_grad]
        if differentiable:
            wanted = [x for x in given if x.requires_grad]
            upstream = [torch.linspace(-1, 1, x.numel()).view(x.shape) for x in differentiable]
            outputs += torch.autograd.grad(differentiable, wanted, upstream)
        return [x.detach() for x in outputs]

    return run


def _gumbel_topk(large: bool) -> Run:
    n = 20_000 if large else 40
    return _run(lambda logits, **options: gumbel_topk(logits, n // 10, seed=7, **options), _normal(4, n))


def _sample_patches(large: bool) -> Run:
    side, k = (320, 64) if large else (20, 4)
    options = {"stride": 2, "padding": (3, 4), "blur_sigma": 1.5, "seed": 5, "temperature": 0.3}
    return _run(lambda x, **named: sample_patches(x, k, 8, **options, **named), _normal(2, 1, side, side).sigmoid())


def _sample_patches_differentiable(large: bool) -> Run:
    side, k = (320, 64) if large else (20, 4)
    options = {"stride": 2, "padding": (3, 4), "blur_sigma": 1.5, "seed": 5, "differentiable": True}
    return _run(lambda x, **named: sample_patches(x, k, 8, **options, **named), _normal(2, 1, side, side).sigmoid())


def _gather_patches(large: bool) -> Run:
    side, k = (300, 64) if large else (14, 5)
    coords = _integers(-9, side + 2, 2, k, 2)
    return _run(lambda x, **named: gather_patches(x, coords, 16, **named), _normal(2, 3, side, side - 2))


def _gather_patches_resampled(large: bool) -> Run:
    side, k = (300, 64) if large else (14, 5)
    coords = _integers(-9, side + 2, 2, k, 2)
    return _run(lambda x, **named: gather_patches(x, coords, 16, out_size=12, **named), _normal(2, 3, side, side - 2))


def _scatter_patches(large: bool) -> Run:
    side, k = (300, 64) if large else (14, 5)
    coords = _integers(-9, side + 2, 2, k, 2)
    options = {"weight": "gaussian", "fill": -3.0}
    return _run(
        lambda x, **named: scatter_patches(x, coords, (side, side - 2), **options, **named), _normal(2, k, 3, 16, 16)
    )


def _selected_attention(large: bool) -> Run:
    n, m = (600, 300) if large else (12, 6)
    index = _integers(-2, n + 2, 2, m)

    def attend(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Any:
        return selected_attention(q, k, v, index=index, sink=True, scale=0.2, return_lse=True, **named)

    return _run(attend, *(_normal(2, 4, n, 16, seed=i) for i in range(3)))


def _cross_conv2d(large: bool, op: Callable[..., Any] = cross_conv2d) -> Run:
    side = 48 if large else 5
    shapes = ((2, 2, 3, side, side), (2, 4, 3, side, side), (8, 6, 3, 3), (8,))
    return _run(op, *(_normal(*shape, seed=i) for i, shape in enumerate(shapes)))


def _cross_conv2d_mean(large: bool) -> Run:
    return _cross_conv2d(large, cross_conv2d_mean)


def _cross_conv2d_and_mean(large: bool) -> Run:
    return _cross_conv2d(large, cross_conv2d_and_mean)


def _group_norm_film(large: bool) -> Run:
    samples, side = (64, 24) if large else (3, 4)

    def norm(x: Tensor, gain: Tensor, bias: Tensor, **named: Any) -> Tensor:
        return group_norm_film(x, 4, gain, bias, activation="gelu", **named)

    return _run(norm, _normal(samples, 16, side, side), _normal(samples, 16, seed=1), _normal(samples, 16, seed=2))


def _small_convolutions(large: bool) -> Run:
    """Of no inputs that get gradients, which are the reference's alone."""
    x, slope = _normal(*((70, 3, 16, 16) if large else (3, 3, 7, 6))), 0.01
    first = ConvLayer(
        _normal(12, 3, 3, 3, seed=1), _normal(12, seed=2), padding=1, replicate=True, negative_slope=slope
    )
    second = ConvLayer(_normal(20, 12, 4, 4, seed=3), stride=2, padding=1)
    return _run(lambda **named: small_convolutions(x, [first, second], **named))


def _transformer_block(large: bool) -> Run:
    """Of no inputs that get gradients, which are the reference's alone."""
    count, dim = (50, 64) if large else (4, 12)
    block = BlockWeights(*(_normal(*shape, seed=i) / dim**0.5 for i, shape in enumerate(shapes(dim, 2 * dim))))
    tokens, memory = (
        _normal(2, count, dim),
        [_normal(2, 3 * count, 2 * dim, seed=1), _normal(1, 5, 2 * dim).expand(2, -1, -1)],
    )
    index = _integers(-1, 4 * count + 5, 2, 4 * count)
    return _run(lambda **named: transformer_block(tokens, memory, block, heads=4, index=index, **named))


def _qkv_projection(large: bool) -> Run:
    count, dim = (300, 64) if large else (5, 16)
    angles = _normal(2, 4, count, dim // 8, seed=7)
    turn = Rotation(angles.cos(), angles.sin())

    def project(x: Tensor, q: Tensor, kv: Tensor, q_bias: Tensor, kv_bias: Tensor, *rest: Tensor, **named: Any) -> Any:
        *norm, added = rest
        weights, biases = [q, kv], [q_bias, kv_bias]
        return qkv_projection(x, weights, biases, heads=4, norm=tuple(norm), added=added, rotary=(turn, turn), **named)

    shapes_ = (2, count, dim), (dim, dim), (2 * dim, dim), (dim,), (2 * dim,), (dim,), (dim,), (count, dim)
    return _run(project, *(_normal(*shape, seed=i) for i, shape in enumerate(shapes_)))


def _halvings(large: bool) -> Run:
    image = _normal(*((2, 1, 400, 301) if large else (2, 1, 9, 6)))

    def halve(**named: Any) -> tuple[Tensor, ...]:
        means, deviations = halvings(image, 3, deviations=2, **named)
        return *means, *deviations

    return _run(halve)


def _upsample_with_patches(large: bool) -> Run:
    coarser, patches = _normal(2, 1, *((150, 201) if large else (5, 6))), _normal(2, 6, 1, 4, 4, seed=1)
    coords, size = _integers(-3, 9, 2, 6, 2), (300, 401) if large else (9, 12)
    return _run(lambda **named: upsample_with_patches(coarser, patches, coords, size, **named))


SAMPLES: dict[str, Callable[[bool], Run]] = {
    "gumbel_topk": _gumbel_topk,
    "sample_patches": _sample_patches,
    "sample_patches (differentiable)": _sample_patches_differentiable,
    "gather_patches": _gather_patches,
    "gather_patches (resampled)": _gather_patches_resampled,
    "scatter_patches": _scatter_patches,
    "selected_attention": _selected_attention,
    "cross_conv2d": _cross_conv2d,
    "cross_conv2d_mean": _cross_conv2d_mean,
    "cross_conv2d_and_mean": _cross_conv2d_and_mean,
    "group_norm_film": _group_norm_film,
    "small_convolutions": _small_convolutions,
    "transformer_block": _transformer_block,
    "qkv_projection": _qkv_projection,
    "halvings": _halvings,
    "upsample_with_patches": _upsample_with_patches,
}
"""prepare(large): inputs of one call, of a second's fraction; large: enough for several threads."""
