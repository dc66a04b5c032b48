"""group_norm_film: group normalisation, scale and shift, activation, in one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icseg_kernels import backend as backends
from icseg_kernels import checks, flops, library, triton_launch
from icseg_kernels.group_norm_film import native, reference, triton
from icseg_kernels.numerics import accumulation_dtype

__all__ = ["group_norm_film"]

_IMPLEMENTATIONS: dict[str, Any] = {"triton": triton, "native": native, "reference": reference}


def group_norm_film(
    x: Tensor,
    groups: int,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """activation(gain * group_norm(x, groups) + bias), reading x once and writing once.

    Group normalisation (arXiv 1803.08494) whose gain and bias may differ from sample to sample, as feature-wise
    modulation (FiLM, arXiv 1709.07871) has it.

    x:          [N, C, *spatial] float16, bfloat16, float32 or float64, any strides; what is not contiguous is copied.
    groups:     of C / groups channels each; mean and variance (of all values, not corrected) are those of a group.
    gain, bias: [C], or [N, C] for one a sample, any strides, any of these dtypes; None: 1 and 0.
    activation: None or "gelu", exact (by the error function).
    eps:        added to the variance.
    backend:    None, "triton" (CUDA, not float64), "native" (CPU) or "reference". Computed in float32 for the 16-bit
                types, else in the dtype of x.
    Returns [N, C, *spatial], contiguous, of the dtype of x. Once differentiable with respect to x, gain and bias; the
    gradients are bitwise reproducible. Raises TypeError or ValueError for an argument of another type, dtype, shape,
    device or range, BackendError if the named backend cannot serve.

    ```
    x = torch.randn(48, 64, 16, 16)                                  # 48 patches
    gain, bias = torch.nn.Linear(32, 128)(torch.randn(32)).chunk(2)  # [64] each, from a condition
    group_norm_film(x, 8, gain, bias, activation="gelu")             # F.gelu(gain * F.group_norm(x, 8) + bias)
    ```
    """
    checks.floating("x", x)
    shape = x.shape
    if len(shape) < 2:
        raise ValueError(f"x must have shape [N, C, *spatial], got {list(shape)}")
    checks.integer("groups", groups, 1)
    if shape[1] % groups:
        raise ValueError(f"groups must divide the {shape[1]} channels of x, got {groups}")
    if gain is not None:
        _check_film("gain", gain, x, shape[0], shape[1])
    if bias is not None:
        _check_film("bias", bias, x, shape[0], shape[1])
    if activation is not None and activation != "gelu":
        raise ValueError(f'activation must be "gelu" or None, got {activation!r}')
    if type(eps) is not float or not 0 <= eps < math.inf:
        eps = checks.number("eps", eps, least=0)
    name = backends.select("group_norm_film", backend, x)
    out, _ = backends.call(_GroupNormFilm, _forward, x, groups, gain, bias, activation, eps, name)
    return out


def _check_film(name: str, values: Tensor, x: Tensor, samples: int, channels: int) -> None:
    checks.device(name, checks.floating(name, values), x.device)
    if values.shape != (channels,) and values.shape != (samples, channels):
        raise ValueError(f"{name} must have shape [{channels}] or [{samples}, {channels}], got {list(values.shape)}")


class _GroupNormFilm(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        groups: int,
        gain: Tensor | None,
        bias: Tensor | None,
        activation: str | None,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        return _forward(x, groups, gain, bias, activation, eps, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.groups, gain, bias, ctx.activation, _, ctx.backend = inputs
        ctx.save_for_backward(x, gain, bias, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x, gain, bias, stats = ctx.saved_tensors
        grad_x, sums = _backward(grad, x, stats, ctx.groups, gain, bias, ctx.activation, ctx.backend)
        grad_gain = _like(sums[0], gain) if ctx.needs_input_grad[2] else None
        grad_bias = _like(sums[1], bias) if ctx.needs_input_grad[3] else None
        return grad_x, None, grad_gain, grad_bias, None, None, None


def _like(sums: Tensor, values: Tensor) -> Tensor:
    """The gradient of gain or bias, from that of every sample, [N, C]."""
    total = sums.sum(dim=0) if values.ndim == 1 else sums
    return total if total.dtype == values.dtype else total.to(values.dtype)


def _forward_implementation(
    x: Tensor,
    groups: int,
    gain: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _IMPLEMENTATIONS[backend].group_norm_film(x, groups, gain, bias, activation, eps)


def _forward_fake(x: Tensor, groups: int, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(2, x.shape[0], groups, dtype=accumulation_dtype(x.dtype))


def _backward_implementation(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    groups: int,
    gain: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _IMPLEMENTATIONS[backend].group_norm_film_backward(grad, x, stats, groups, gain, bias, activation)


def _backward_fake(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(2, *x.shape[:2], dtype=accumulation_dtype(x.dtype))


_forward = backends.register(
    "group_norm_film(Tensor x, SymInt groups, Tensor? gain, Tensor? bias, str? activation, float eps, str backend)"
    " -> (Tensor, Tensor)",
    _forward_implementation,
    _forward_fake,
)
_backward = backends.register(
    "group_norm_film_backward(Tensor grad, Tensor x, Tensor stats, SymInt groups, Tensor? gain, Tensor? bias,"
    " str? activation, str backend) -> (Tensor, Tensor)",
    _backward_implementation,
    _backward_fake,
)
backends.declare(
    "group_norm_film",
    {
        "triton": backends.Backend(triton_launch.missing, triton.unsupported, triton_launch.slower),
        "native": backends.Backend(library.missing, native.unsupported),
        "reference": backends.Backend(),
    },
)


def _flops(*_: Any, **__: Any) -> int:
    return flops.group_norm_film_flops()


flops.register(_forward, _flops)
flops.register(_backward, _flops)
