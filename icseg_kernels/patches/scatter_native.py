"""scatter_patches by the native library, on the CPU. Equal to the reference up to rounding."""

from __future__ import annotations

from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from icseg_kernels import library
from icseg_kernels.numerics import accumulation_dtype

_KERNELS = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}
_SUMS = {dtype: accumulation_dtype(dtype) for dtype in _KERNELS}
_NO_TOTAL = {dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in set(_SUMS.values())}
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
    if dtype not in _KERNELS:
        wide = patches.to(accumulation_dtype(dtype))
        mean, total, coverage = scatter(wide, coords, weight, fill, height, width, keep_total)
        return mean.to(dtype), total, coverage
    batch, count, channels, patch_size, patch_width = patches.shape
    sums = _SUMS[dtype]
    # The last check before raw pointers: the library reads as much memory as the shapes promise.
    if (
        patch_width != patch_size
        or coords.shape != (batch, count, 2)
        or not (patches.is_cpu and coords.is_cpu)
        or not (weight is None or _is_table(weight, patch_size, sums))
    ):
        given = _given(patches=patches, coords=coords, weight=weight)
        raise ValueError(f"scatter_patches needs patches [B, K, C, p, p], coords [B, K, 2], weight [p, p], {given}")
    coords, weight = _corners(coords), None if weight is None else weight.contiguous()
    mean = patches.new_empty((batch, channels, height, width))
    total = torch.empty((batch, 1, height, width), dtype=sums) if keep_total else _NO_TOTAL[sums]
    coverage = torch.empty((batch, 1, height, width), dtype=torch.bool)
    code = _scatter[dtype](
        patches.data_ptr(),
        coords.data_ptr(),
        None if weight is None else weight.data_ptr(),
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
        *patches.stride(),
        coords.dtype == torch.int32,
    )
    if code:
        library.check(code)
    return mean, total, coverage


def scatter_backward(grad: Tensor, total: Tensor, coords: Tensor, weight: Tensor | None, patch_size: int) -> Tensor:
    """As `reference.scatter_backward`. Gradients of any strides; those of float16 are converted first."""
    dtype = grad.dtype
    if dtype not in _KERNELS:
        return scatter_backward(grad.to(accumulation_dtype(dtype)), total, coords, weight, patch_size).to(dtype)
    batch, channels, height, width = grad.shape
    count = coords.shape[-2]
    sums = _SUMS[dtype]
    if (
        coords.shape != (batch, count, 2)
        or total.shape != (batch, 1, height, width)
        or total.dtype != sums
        or not (grad.is_cpu and total.is_cpu and coords.is_cpu)
        or not (weight is None or _is_table(weight, patch_size, sums))
    ):
        given = _given(grad=grad, total=total, coords=coords, weight=weight)
        layout = "grad [B, C, H, W], total [B, 1, H, W], coords [B, K, 2], weight [p, p]"
        raise ValueError(f"the gradient of scatter_patches needs {layout}, {given}")
    coords, weight = _corners(coords), None if weight is None else weight.contiguous()
    total = total.contiguous()
    patches = torch.empty((batch, count, channels, patch_size, patch_size), dtype=dtype)
    code = _scatter_backward[dtype](
        grad.data_ptr(),
        total.data_ptr(),
        coords.data_ptr(),
        None if weight is None else weight.data_ptr(),
        patches.data_ptr(),
        batch,
        count,
        channels,
        patch_size,
        height,
        width,
        *grad.stride(),
        coords.dtype == torch.int32,
    )
    if code:
        library.check(code)
    return patches


def _corners(coords: Tensor) -> Tensor:
    """`coords` as the library reads them: int32 or int64, contiguous."""
    if coords.dtype is not torch.int32 and coords.dtype is not torch.int64:
        coords = coords.to(torch.int64)
    return coords if coords.is_contiguous() else coords.contiguous()


def _is_table(weight: Tensor, patch_size: int, dtype: torch.dtype) -> bool:
    return weight.is_cpu and weight.shape == (patch_size, patch_size) and weight.dtype == dtype


def _given(**tensors: Tensor | None) -> str:
    listed = (f"{name} {list(x.shape)} of {x.dtype} on {x.device}" for name, x in tensors.items() if x is not None)
    return f"weight and total in the dtype of the sums, all on the CPU; got {', '.join(listed)}"
