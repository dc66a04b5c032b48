"""Patch ops by the native library, on the CPU. Equal to the reference bit for bit."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from icseg_kernels import library
from icseg_kernels.numerics import accumulation_dtype

# source, coords, patches; outer, inner, C, H, W, K, p; strides of outer, inner, C, H, W; bytes an element
_gather = library.function("icseg_gather_patches", [c_void_p] * 3 + [c_int64] * 13)
# patches, coords, images; outer, inner, K, C, p, H, W; strides of outer, inner, K, C, y, x
_BACKWARD = {
    torch.float32: library.function("icseg_gather_patches_backward_f32", [c_void_p] * 3 + [c_int64] * 13),
    torch.float64: library.function("icseg_gather_patches_backward_f64", [c_void_p] * 3 + [c_int64] * 13),
}


def unsupported(source: Tensor, resampled: bool) -> list[str]:
    """Why the library cannot cut patches out of `source`."""
    reasons = []
    if source.device.type != "cpu":
        reasons.append(f"it runs on the CPU, and source is on {source.device}")
    if source.dtype.is_complex:
        reasons.append(f"source must be real, got {source.dtype}")
    if resampled:
        reasons.append("it copies patches and does not resample them (out_size)")
    return reasons


def gather(source: Tensor, coords: Tensor, patch_size: int) -> Tensor:
    """[..., C, H, W], integer [..., K, 2] -> [..., K, C, p, p]; zero outside the image."""
    _guard(source, coords, (*source.shape[:-3], coords.shape[-2], 2))
    images, corners = _two_leading(source, 3), coords.to(torch.int64).contiguous()
    patches = source.new_empty(*coords.shape[:-1], source.shape[-3], patch_size, patch_size)
    code = _gather(
        images.data_ptr(),
        corners.data_ptr(),
        patches.data_ptr(),
        *images.shape,
        coords.shape[-2],
        patch_size,
        *images.stride(),
        source.element_size(),
    )
    library.check(code)
    return patches


def gather_backward(grad: Tensor, coords: Tensor, height: int, width: int) -> Tensor:
    """Adjoint of `gather`: [..., K, C, p, p] added up into [..., C, H, W]."""
    *lead, channels, patch_height, patch_width = grad.shape
    _guard(grad, coords, (*lead, 2))
    if patch_height != patch_width:
        raise ValueError(f"grad must have shape [..., K, C, p, p], got {list(grad.shape)}")
    values, corners = grad.to(accumulation_dtype(grad.dtype)), coords.to(torch.int64).contiguous()
    if values.dtype not in _BACKWARD:
        raise TypeError(f"grad must be a floating-point tensor, got {grad.dtype}")
    images = values.new_empty(*lead[:-1], channels, height, width)
    patches = _two_leading(values, 4)
    code = _BACKWARD[values.dtype](
        patches.data_ptr(),
        corners.data_ptr(),
        images.data_ptr(),
        *patches.shape[:-1],
        height,
        width,
        *patches.stride(),
    )
    library.check(code)
    return images.to(grad.dtype)


def _guard(values: Tensor, coords: Tensor, shape: tuple[int, ...]) -> None:
    """The last check before raw pointers: the library reads as much memory as the shapes promise."""
    if not (values.is_cpu and coords.is_cpu):
        raise ValueError(f"native patch ops need tensors on the CPU, got {values.device} and {coords.device}")
    if coords.shape != shape:
        raise ValueError(f"coords must have shape {list(shape)}, got {list(coords.shape)}")


def _two_leading(tensor: Tensor, trailing: int) -> Tensor:
    """A view with two dimensions before the `trailing` last (a copy if there are more that do not merge)."""
    leading = tensor.ndim - trailing
    if leading > 2:
        return tensor.flatten(0, leading - 2)
    return tensor[(None,) * (2 - leading)]
