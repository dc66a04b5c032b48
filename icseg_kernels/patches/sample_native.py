"""sample_patches by the native library, on the CPU.

What it draws equals the reference bit for bit, but for the sign of a zero. Maps of any strides are read where they
lie; float16 and bfloat16 are converted first.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import Array, addressof, c_double, c_float, c_int64, c_uint64, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icseg_kernels import library
from icseg_kernels.numerics import accumulation_dtype
from icseg_kernels.patches.windows import Windows, blur_kernel, blur_taps, candidate_grid


class _Settings(ctypes.Structure):
    """struct icseg_windows."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "height", "width", "stride_batch", "stride_y", "stride_x")),
        *((name, c_int64) for name in ("patch", "stride", "before", "after")),
        ("taps", c_void_p),
        ("tap_count", c_int64),
        ("temperature", c_double),
        ("threads", c_int64),
    ]


# settings, maps, noise, its rows' stride, k, seeded, seed, indices, scores, coords, workspace, its bytes
_DRAW_ARGUMENTS = [c_void_p] * 3 + [c_int64] * 3 + [c_uint64] + [c_void_p] * 4 + [c_int64]
_DRAW = {
    torch.float32: library.function("icseg_sample_patches_f32", _DRAW_ARGUMENTS),
    torch.float64: library.function("icseg_sample_patches_f64", _DRAW_ARGUMENTS),
}
# settings, maps, grad_logits, grad_maps, workspace, its bytes
_BACKWARD_ARGUMENTS = [c_void_p] * 5 + [c_int64]
_BACKWARD = {
    torch.float32: library.function("icseg_window_logits_backward_f32", _BACKWARD_ARGUMENTS),
    torch.float64: library.function("icseg_window_logits_backward_f64", _BACKWARD_ARGUMENTS),
}
# settings, bytes an element, k, backward, bytes
_workspace_bytes = library.function("icseg_sample_patches_workspace", [c_void_p, c_int64, c_int64, c_int64, c_void_p])

_MOST = 2**31 - 1


def unsupported(weights: Tensor, candidates: int, *_: object) -> list[str]:
    """Why the library cannot draw from `candidates` windows of `weights`."""
    reasons = []
    if not weights.is_cpu:
        reasons.append(f"it runs on the CPU, and weights is on {weights.device}")
    if candidates > _MOST:
        reasons.append(f"it draws from at most {_MOST} windows, got {candidates}")
    return reasons


def sample_patches(
    weights: Tensor, k: int, windows: Windows, seed: int | Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(coords int32 [B, k, 2], scores [B, k], indices int64 [B, k]) of the windows drawn."""
    maps, dtype, plan = _planned(weights, windows, k)
    if noise is not None:
        noise = _noise_rows(noise, plan.shape, dtype)
    batch = plan.shape[0]
    coords = torch.empty(batch, k, 2, dtype=torch.int32)
    scores = torch.empty(batch, k, dtype=dtype)
    indices = torch.empty(batch, k, dtype=torch.int64)
    workspace = torch.empty(plan.bytes, dtype=torch.uint8)
    code = _DRAW[dtype](
        plan.settings,
        maps.data_ptr(),
        None if noise is None else noise.data_ptr(),
        0 if noise is None else noise.stride(0),
        k,
        seed is not None,
        0 if seed is None else int(seed),
        indices.data_ptr(),
        scores.data_ptr(),
        coords.data_ptr(),
        workspace.data_ptr(),
        plan.bytes,
    )
    if code:
        library.check(code)
    return coords, scores, indices


def window_logits_backward(grad: Tensor, weights: Tensor, windows: Windows) -> Tensor:
    """Gradient [B, 1, H, W] of the reference's window_logits to weights, as autograd's."""
    maps, dtype, plan = _planned(weights, windows, backward=True)
    if grad.shape != plan.shape or grad.dtype != dtype or not grad.is_cpu:
        raise ValueError(
            f"grad must have shape {list(plan.shape)} and dtype {dtype} on the CPU, "
            f"got {list(grad.shape)}, {grad.dtype} on {grad.device}"
        )
    grad = grad.contiguous()
    grad_maps = torch.empty(weights.shape, dtype=dtype)
    workspace = torch.empty(plan.bytes, dtype=torch.uint8)
    code = _BACKWARD[dtype](
        plan.settings, maps.data_ptr(), grad.data_ptr(), grad_maps.data_ptr(), workspace.data_ptr(), plan.bytes
    )
    library.check(code)
    return grad_maps.to(weights.dtype)


def sample_patches_backward(grad: Tensor, indices: Tensor, weights: Tensor, windows: Windows) -> Tensor:
    """Gradient [B, 1, H, W] of the scores [B, k] of windows int64 [B, k] to weights; -1 is no window."""
    if grad.shape != indices.shape or grad.shape[:1] != weights.shape[:1] or not indices.is_cpu:
        raise ValueError(
            f"grad and indices must have one shape [B, k] with B = {weights.shape[0]} on the CPU, "
            f"got {list(grad.shape)} and {list(indices.shape)} on {indices.device}"
        )
    # Dense: what to add goes nowhere else for -1, so it adds zero.
    everywhere = grad.new_zeros(weights.shape[0], _planned(weights, windows, backward=True)[2].shape[1])
    everywhere.scatter_add_(1, indices.clamp(min=0), grad.masked_fill(indices < 0, 0.0))
    return window_logits_backward(everywhere, weights, windows)


class _Plan(NamedTuple):
    """What the library wants to know of a call, but for its tensors."""

    settings: int  # address of kept[0]
    bytes: int  # of workspace
    shape: tuple[int, int]  # B, candidates
    kept: tuple[_Settings, Array[Any] | None]


def _planned(
    weights: Tensor, windows: Windows, k: int = 0, backward: bool = False
) -> tuple[Tensor, torch.dtype, _Plan]:
    """`weights` in the dtype to compute in, that dtype, and the plan."""
    if not weights.is_cpu:
        raise ValueError(f"native sample_patches needs weights on the CPU, got {weights.device}")
    dtype = weights.dtype
    if dtype not in _DRAW:
        dtype = accumulation_dtype(dtype)
        weights = weights.to(dtype)
    if isinstance(windows.temperature, Tensor):
        windows = windows._replace(temperature=float(windows.temperature))
    return weights, dtype, _plan(weights.shape, weights.stride(), dtype, windows, k, backward, torch.get_num_threads())


# The same calls come again and again: a plan costs more than a small map's draw.
@functools.lru_cache(maxsize=256)
def _plan(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    windows: Windows,
    k: int,
    backward: bool,
    threads: int,
) -> _Plan:
    if len(shape) != 4 or shape[1] != 1 or dtype not in _DRAW:
        raise ValueError(f"native sample_patches needs floating-point [B, 1, H, W], got {list(shape)}, {dtype}")
    batch, _, height, width = shape
    size, stride, before, after, temperature, sigma = windows
    taps = _taps(sigma, dtype)
    settings = _Settings(
        batch,
        height,
        width,
        strides[0],
        *strides[2:],
        size,
        stride,
        before,
        after,
        None if taps is None else addressof(taps),
        blur_taps(sigma),
        temperature,
        threads,
    )
    found = c_int64()
    library.check(_workspace_bytes(addressof(settings), dtype.itemsize, k, backward, addressof(found)))
    rows, columns = candidate_grid(height, width, size, stride, (before, after))
    return _Plan(addressof(settings), found.value, (batch, rows * columns), (settings, taps))


@functools.lru_cache(maxsize=16)
def _taps(sigma: float, dtype: torch.dtype) -> Array[Any] | None:
    """The blur's taps in `dtype`; None for no blur."""
    if blur_taps(sigma) == 1:
        return None
    kind = c_float if dtype == torch.float32 else c_double
    return (kind * blur_taps(sigma))(*blur_kernel(sigma))


def _noise_rows(noise: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`noise` [B, candidates] in `dtype`, each row contiguous; the rows may lie anywhere."""
    if noise.shape != shape or not noise.is_cpu:
        raise ValueError(f"noise must have shape {list(shape)} on the CPU, got {list(noise.shape)} on {noise.device}")
    if noise.dtype != dtype:
        noise = noise.to(dtype)
    return noise if noise.stride(1) == 1 else noise.contiguous()
