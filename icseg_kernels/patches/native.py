"""Patch ops by the native library, on the CPU. Equal to the reference bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from icseg_kernels import library
from icseg_kernels.patches.reference import accumulation_dtype


def unsupported(source: Tensor, resampled: bool) -> list[str]:
    """Why the library cannot cut patches out of `source`."""
    reasons = []
    if source.device.type != "cpu":
        reasons.append(f"it runs on the CPU, and source is on {source.device}")
    if source.dtype.is_complex or source.is_quantized or source.layout != torch.strided:
        reasons.append(f"source must be a dense real tensor, got {source.dtype}, {source.layout}")
    if resampled:
        reasons.append("it copies patches and does not resample them (out_size)")
    return reasons


def gather(source: Tensor, coords: Tensor, patch_size: int) -> Tensor:
    """[..., C, H, W], integer [..., K, 2] -> [..., K, C, p, p]; zero outside the image."""
    images, corners = _two_leading(source, 3), coords.to(torch.int64).contiguous()
    patches = source.new_empty(*coords.shape[:-1], source.shape[-3], patch_size, patch_size)
    code = library.get().icseg_gather_patches(
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
    values, corners = grad.to(accumulation_dtype(grad.dtype)), coords.to(torch.int64).contiguous()
    images = values.new_empty(*coords.shape[:-2], grad.shape[-3], height, width)
    patches = _two_leading(values, 4)
    native = library.get()
    add = (
        native.icseg_gather_patches_backward_f64
        if values.dtype == torch.float64
        else native.icseg_gather_patches_backward_f32
    )
    library.check(
        add(
            patches.data_ptr(),
            corners.data_ptr(),
            images.data_ptr(),
            *patches.shape[:-1],
            height,
            width,
            *patches.stride(),
        )
    )
    return images.to(grad.dtype)


def _two_leading(tensor: Tensor, trailing: int) -> Tensor:
    """A view with two dimensions before the `trailing` last (a copy if there are more that do not merge)."""
    leading = tensor.ndim - trailing
    if leading > 2:
        return tensor.flatten(0, leading - 2)
    return tensor[(None,) * (2 - leading)]
