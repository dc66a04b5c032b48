"""scatter_patches by the native library, on the CPU. Equal to the reference up to rounding."""

from __future__ import annotations

from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from icseg_kernels import library
from icseg_kernels.numerics import accumulation_dtype

_KERNELS = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}
# patches, coords, weight, mean, total, coverage; fill; B, K, C, p, H, W; strides of B, K, C, y, x; coords are int32
_scatter = {
    dtype: library.function(f"icseg_scatter_patches_{name}", [c_void_p] * 6 + [c_double] + [c_int64] * 12)
    for dtype, name in _KERNELS.items()
}
# grad, total, coords, weight, patches; B, K, C, p, H, W; strides of B, C, y, x; coords are int32
_scatter_backward = {
    dtype: library.function(f"icseg_scatter_patches_backward_{name}", [c_void_p] * 5 + [c_int64] * 11)
    for dtype, name in _KERNELS.items()
}


def unsupported(patches: Tensor) -> list[str]:
    """Why the library cannot write `patches` into images."""
    return [] if patches.is_cpu else [f"it runs on the CPU, and patches is on {patches.device}"]


def scatter(
    patches: Tensor,
    coords: Tensor,
    weight: Tensor | None,
    fill: float | Tensor,
    height: int,
    width: int,
    keep_total: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.scatter`. Patches of any strides; those of float16 are converted first."""
    dtype = patches.dtype
    values = patches if dtype in _KERNELS else patches.to(accumulation_dtype(dtype))
    batch, count, channels, patch_size, patch_width = values.shape
    if patch_width != patch_size:
        raise ValueError(f"patches must have shape [B, K, C, p, p], got {list(values.shape)}")
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    corners, table = _corners(coords, (batch, count, 2)), _table(weight, patch_size, sums)
    _on_the_cpu(values, corners, table)
    mean = torch.empty((batch, channels, height, width), dtype=values.dtype)
    total = torch.empty((batch, 1, height, width) if keep_total else 0, dtype=sums)
    coverage = torch.empty((batch, 1, height, width), dtype=torch.bool)
    code = _scatter[values.dtype](
        values.data_ptr(),
        corners.data_ptr(),
        None if table is None else table.data_ptr(),
        mean.data_ptr(),
        total.data_ptr() if keep_total else None,
        coverage.data_ptr(),
        float(fill),
        batch,
        count,
        channels,
        patch_size,
        height,
        width,
        *values.stride(),
        corners.dtype == torch.int32,
    )
    library.check(code)
    return mean if mean.dtype == dtype else mean.to(dtype), total, coverage


def scatter_backward(grad: Tensor, total: Tensor, coords: Tensor, weight: Tensor | None, patch_size: int) -> Tensor:
    """As `reference.scatter_backward`. Gradients of any strides."""
    dtype = grad.dtype
    values = grad if dtype in _KERNELS else grad.to(accumulation_dtype(dtype))
    batch, channels, height, width = values.shape
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    count = coords.shape[-2]
    corners, table = _corners(coords, (batch, count, 2)), _table(weight, patch_size, sums)
    _on_the_cpu(values, corners, table, total)
    if total.shape != (batch, 1, height, width) or total.dtype != sums:
        expected = f"{sums} of shape {[batch, 1, height, width]}"
        raise ValueError(f"total must be {expected}, got {total.dtype} of shape {list(total.shape)}")
    totals = total if total.is_contiguous() else total.contiguous()
    patches = torch.empty((batch, count, channels, patch_size, patch_size), dtype=values.dtype)
    code = _scatter_backward[values.dtype](
        values.data_ptr(),
        totals.data_ptr(),
        corners.data_ptr(),
        None if table is None else table.data_ptr(),
        patches.data_ptr(),
        batch,
        count,
        channels,
        patch_size,
        height,
        width,
        *values.stride(),
        corners.dtype == torch.int32,
    )
    library.check(code)
    return patches if patches.dtype == dtype else patches.to(dtype)


# The last checks before raw pointers: the library reads as much memory as the shapes promise.


def _corners(coords: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`coords` as the library reads them: int32 or int64, contiguous."""
    if coords.shape != shape:
        raise ValueError(f"coords must have shape {list(shape)}, got {list(coords.shape)}")
    if coords.dtype not in (torch.int64, torch.int32):
        coords = coords.to(torch.int64)
    return coords if coords.is_contiguous() else coords.contiguous()


def _table(weight: Tensor | None, patch_size: int, dtype: torch.dtype) -> Tensor | None:
    """`weight` as the library reads it: contiguous."""
    if weight is None:
        return None
    if weight.shape != (patch_size, patch_size) or weight.dtype != dtype:
        expected = f"{dtype} of shape {[patch_size, patch_size]}"
        raise ValueError(f"weight must be {expected}, got {weight.dtype} of shape {list(weight.shape)}")
    return weight if weight.is_contiguous() else weight.contiguous()


def _on_the_cpu(*tensors: Tensor | None) -> None:
    for given in tensors:
        if given is not None and not given.is_cpu:
            raise ValueError(f"native scatter_patches needs tensors on the CPU, got one on {given.device}")
