"""group_norm_film by the native library, on the CPU. float16 and bfloat16 are converted to float32 and back."""

from __future__ import annotations

import math
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from icseg_kernels import library
from icseg_kernels.numerics import accumulation_dtype

# x, gain, bias, out, stats; N, C, L, G; strides of N and C of gain, of bias; gelu; eps
_FORWARD = {
    torch.float32: library.function("icseg_group_norm_film_f32", [c_void_p] * 5 + [c_int64] * 9 + [c_double]),
    torch.float64: library.function("icseg_group_norm_film_f64", [c_void_p] * 5 + [c_int64] * 9 + [c_double]),
}
# grad, x, stats, gain, bias, grad_x, sums; N, C, L, G; strides of N and C of gain, of bias; gelu
_BACKWARD = {
    torch.float32: library.function("icseg_group_norm_film_backward_f32", [c_void_p] * 7 + [c_int64] * 9),
    torch.float64: library.function("icseg_group_norm_film_backward_f64", [c_void_p] * 7 + [c_int64] * 9),
}


def unsupported(x: Tensor) -> list[str]:
    """Why the library cannot normalise `x`."""
    return [] if x.is_cpu else [f"it runs on the CPU, and x is on {x.device}"]


def group_norm_film(
    x: Tensor, groups: int, gain: Tensor | None, bias: Tensor | None, activation: str | None, eps: float
) -> tuple[Tensor, Tensor]:
    """[N, C, *spatial] -> the same, contiguous, and the groups' means and reciprocal standard deviations, [2, N, G]."""
    samples, channels, *spatial = x.shape
    dtype = x.dtype
    wide = _dense(x, dtype if dtype in _FORWARD else accumulation_dtype(dtype))
    gain, gain_sample, gain_channel = _film("gain", gain, wide, samples, channels)
    bias, bias_sample, bias_channel = _film("bias", bias, wide, samples, channels)
    out, stats = torch.empty_like(wide), torch.empty(2, samples, groups, dtype=wide.dtype)
    code = _FORWARD[wide.dtype](
        wide.data_ptr(),
        None if gain is None else gain.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        stats.data_ptr(),
        samples,
        channels,
        math.prod(spatial),
        groups,
        gain_sample,
        gain_channel,
        bias_sample,
        bias_channel,
        activation == "gelu",
        eps,
    )
    if code:
        library.check(code)
    return out if wide.dtype == dtype else out.to(dtype), stats


def group_norm_film_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    groups: int,
    gain: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of gain and bias, a sample at a time: [2, N, C]."""
    samples, channels, *spatial = x.shape
    wide = _dense(x, accumulation_dtype(x.dtype))
    outer = _dense(grad, wide.dtype)
    saved = _dense(stats, wide.dtype)
    if outer.shape != x.shape or saved.shape != (2, samples, groups):
        raise ValueError(f"grad and stats must be those of x {list(x.shape)}, got {list(grad.shape)}, {stats.shape}")
    gain, gain_sample, gain_channel = _film("gain", gain, wide, samples, channels)
    bias, bias_sample, bias_channel = _film("bias", bias, wide, samples, channels)
    grad_x, sums = torch.empty_like(wide), wide.new_empty((2, samples, channels))
    code = _BACKWARD[wide.dtype](
        outer.data_ptr(),
        wide.data_ptr(),
        saved.data_ptr(),
        None if gain is None else gain.data_ptr(),
        None if bias is None else bias.data_ptr(),
        grad_x.data_ptr(),
        sums.data_ptr(),
        samples,
        channels,
        math.prod(spatial),
        groups,
        gain_sample,
        gain_channel,
        bias_sample,
        bias_channel,
        activation == "gelu",
    )
    library.check(code)
    return grad_x.to(x.dtype), sums


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor`, contiguous and of `dtype`: the library takes no other."""
    if not tensor.is_cpu:
        raise ValueError(f"native group_norm_film needs tensors on the CPU, got {tensor.device}")
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _film(name: str, values: Tensor | None, x: Tensor, samples: int, channels: int) -> tuple[Tensor | None, int, int]:
    """Gain or bias in the dtype of `x`, and how far apart its samples and channels are."""
    if values is None:
        return None, 0, 0
    shape = values.shape
    if not values.is_cpu or (shape != (channels,) and shape != (samples, channels)):
        raise ValueError(f"{name} must be on the CPU, [C] or [N, C] of x {list(x.shape)}, got {list(shape)}")
    if values.dtype != x.dtype:
        values = values.to(x.dtype)
    strides = values.stride()
    return values, 0 if len(shape) == 1 else strides[0], strides[-1]
