"""upsample_with_patches by the native library: float32 on the CPU, without gradients."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from icseg_kernels import library
from icseg_kernels.backend import without_gradients

# coarser, patches, coords, out; B, C, h, w, H, W, K, p, q; strides of B, C, y
_upsample = library.function("icseg_upsample_with_patches_f32", [c_void_p] * 4 + [c_int64] * 12)


def unsupported(coarser: Tensor, patches: Tensor) -> list[str]:
    """Why the library cannot double `coarser`."""
    reasons = []
    if not coarser.is_cpu:
        reasons.append(f"it runs on the CPU, and coarser is on {coarser.device}")
    if coarser.dtype != torch.float32:
        reasons.append(f"it computes in float32, and coarser is {coarser.dtype}")
    return reasons + without_gradients("coarser or patches", (coarser, patches))


def upsample_with_patches(coarser: Tensor, patches: Tensor, coords: Tensor, height: int, width: int) -> Tensor:
    """As `reference.upsample_with_patches`. A map whose rows, and patches that are not contiguous, are copied."""
    shape, patch = coarser.shape, patches.shape
    # The last check before raw pointers: the library reads as much memory as the shapes promise.
    if (
        len(shape) != 4
        or len(patch) != 5
        or patch[0] != shape[0]
        or patch[2] != shape[1]
        or coords.shape != (patch[0], patch[1], 2)
        or coarser.dtype != torch.float32
        or patches.dtype != torch.float32
        or coords.is_floating_point()
        or not (coarser.is_cpu and patches.is_cpu and coords.is_cpu)
    ):
        given = ", ".join(
            f"{name} {list(x.shape)} of {x.dtype} on {x.device}"
            for name, x in (("coarser", coarser), ("patches", patches), ("coords", coords))
        )
        raise ValueError(
            "upsample_with_patches needs coarser [B, C, h, w] and patches [B, K, C, p, q] of float32 and integer "
            f"coords [B, K, 2], all on the CPU, got {given}"
        )
    if coarser.stride(3) != 1:
        coarser = coarser.contiguous()
    patches = patches if patches.is_contiguous() else patches.contiguous()
    if coords.dtype is not torch.int64:
        coords = coords.to(torch.int64)
    coords = coords if coords.is_contiguous() else coords.contiguous()
    out = coarser.new_empty((shape[0], shape[1], height, width))
    stride_batch, stride_channel, stride_y, _ = coarser.stride()
    code = _upsample(
        coarser.data_ptr(),
        patches.data_ptr(),
        coords.data_ptr(),
        out.data_ptr(),
        *shape,
        height,
        width,
        patch[1],
        patch[3],
        patch[4],
        stride_batch,
        stride_channel,
        stride_y,
    )
    if code:
        library.check(code)
    return out
