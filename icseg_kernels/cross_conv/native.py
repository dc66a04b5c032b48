"""The tail of cross_conv2d by the native library, on the CPU. 16-bit types are converted to float32 and back."""

from __future__ import annotations

import math
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from icseg_kernels import library
from icseg_kernels.numerics import accumulation_dtype

# zx, zy, pairs, mean; B, Sx, Sy, elements an image; activation, slope
_TAIL = {
    torch.float32: library.function("icseg_cross_tail_f32", [c_void_p] * 4 + [c_int64] * 5 + [c_double]),
    torch.float64: library.function("icseg_cross_tail_f64", [c_void_p] * 4 + [c_int64] * 5 + [c_double]),
}
# zx, zy, grad_pairs, grad_mean, grad_zx, grad_zy; as above
_BACKWARD = {
    torch.float32: library.function("icseg_cross_tail_backward_f32", [c_void_p] * 6 + [c_int64] * 5 + [c_double]),
    torch.float64: library.function("icseg_cross_tail_backward_f64", [c_void_p] * 6 + [c_int64] * 5 + [c_double]),
}
_ACTIVATIONS = {None: 0, "relu": 1, "leaky_relu": 2, "gelu": 3}


def unsupported(x: Tensor) -> list[str]:
    """Why the library cannot serve images such as `x`."""
    return [] if x.is_cpu else [f"it runs on the CPU, and x is on {x.device}"]


def tail(
    zx: Tensor, zy: Tensor, pairs: bool, mean: bool, activation: str | None, slope: float, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Pairs [B, Sx, Sy, Co, Ho, Wo] and their mean [B, Sx, Co, Ho, Wo]; without elements where not wanted.

    overwrite: pairs may lie in the memory of zy, which is lost.
    """
    dtype = zx.dtype
    zx, zy = _dense(zx, accumulation_dtype(dtype)), _dense(zy, accumulation_dtype(dtype))
    image, batch, xs, ys = _sizes(zx, zy)
    if mean and ys == 0:
        raise ValueError("zy must hold at least one image to take the mean of, got Sy = 0")
    if not pairs:
        all_pairs = zx.new_empty(0)
    elif overwrite and xs == 1:
        all_pairs = zy.view(batch, xs, ys, *image)
    else:
        all_pairs = zx.new_empty((batch, xs, ys, *image))
    means = zx.new_empty(zx.shape if mean else 0)
    code = _TAIL[zx.dtype](
        zx.data_ptr(),
        zy.data_ptr(),
        all_pairs.data_ptr() if pairs else None,
        means.data_ptr() if mean else None,
        batch,
        xs,
        ys,
        math.prod(image),
        _ACTIVATIONS[activation],
        slope,
    )
    library.check(code)
    return (all_pairs, means) if zx.dtype == dtype else (all_pairs.to(dtype), means.to(dtype))


def tail_backward(
    zx: Tensor,
    zy: Tensor,
    grad_pairs: Tensor | None,
    grad_mean: Tensor | None,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of zx and zy; None: nothing depends on it."""
    dtype = zx.dtype
    wide = accumulation_dtype(dtype)
    zx, zy = _dense(zx, wide), _dense(zy, wide)
    image, batch, xs, ys = _sizes(zx, zy)
    of_pairs = None if grad_pairs is None else _dense(grad_pairs, wide)
    of_mean = None if grad_mean is None else _dense(grad_mean, wide)
    for name, grad, shape in (("pairs", of_pairs, (batch, xs, ys, *image)), ("mean", of_mean, zx.shape)):
        if grad is not None and grad.shape != shape:
            raise ValueError(f"the gradient of {name} must have shape {list(shape)}, got {list(grad.shape)}")
    grad_zx, grad_zy = torch.empty_like(zx), torch.empty_like(zy)
    code = _BACKWARD[wide](
        zx.data_ptr(),
        zy.data_ptr(),
        None if of_pairs is None else of_pairs.data_ptr(),
        None if of_mean is None else of_mean.data_ptr(),
        grad_zx.data_ptr(),
        grad_zy.data_ptr(),
        batch,
        xs,
        ys,
        math.prod(image),
        _ACTIVATIONS[activation],
        slope,
    )
    library.check(code)
    return grad_zx.to(dtype), grad_zy.to(dtype)


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor`, contiguous and of `dtype`: the library takes no other."""
    if not tensor.is_cpu:
        raise ValueError(f"the native tail of cross_conv2d needs tensors on the CPU, got {tensor.device}")
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _sizes(zx: Tensor, zy: Tensor) -> tuple[tuple[int, ...], int, int, int]:
    """Shape of an image; B, Sx, Sy."""
    shape, other = zx.shape, zy.shape
    if len(shape) != 5 or len(other) != 5 or other[0] != shape[0] or other[2:] != shape[2:] or zy.dtype != zx.dtype:
        raise ValueError(f"zx and zy must have shapes [B, Sx, C, H, W], [B, Sy, C, H, W], got {shape}, {other}")
    return shape[2:], shape[0], shape[1], other[1]
