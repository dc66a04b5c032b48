"""sample_patches by the native library, on the CPU. What it draws equals the reference bit for bit.

Maps of any strides are read where they lie; float16 and bfloat16 are converted first.
"""

from __future__ import annotations

import functools
from ctypes import Array, addressof, c_double, c_float, c_int64, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

from icseg_kernels import library
from icseg_kernels.numerics import accumulation_dtype
from icseg_kernels.patches.windows import Windows, blur_kernel, blur_taps, candidate_grid

# maps, taps, noise, indices, scores, coords, workspace; its bytes; B, H, W, p, stride, before, after, taps, k, threads;
# strides of B, H, W and of the noise's rows; temperature; seeded, seed
_DRAW_ARGUMENTS = [c_void_p] * 7 + [c_int64] * 15 + [c_double, c_int64, c_uint64]
_DRAW = {
    torch.float32: library.function("icseg_sample_patches_f32", _DRAW_ARGUMENTS),
    torch.float64: library.function("icseg_sample_patches_f64", _DRAW_ARGUMENTS),
}
# maps, taps, logits, workspace; its bytes; B, H, W, p, stride, before, after, taps, threads; strides of B, H, W;
# temperature
_LOGITS_ARGUMENTS = [c_void_p] * 4 + [c_int64] * 13 + [c_double]
_LOGITS = {
    torch.float32: library.function("icseg_window_logits_f32", _LOGITS_ARGUMENTS),
    torch.float64: library.function("icseg_window_logits_f64", _LOGITS_ARGUMENTS),
}
# maps, grad_logits, taps, grad_maps, workspace; as above
_BACKWARD_ARGUMENTS = [c_void_p] * 5 + _LOGITS_ARGUMENTS[4:]
_BACKWARD = {
    torch.float32: library.function("icseg_window_logits_backward_f32", _BACKWARD_ARGUMENTS),
    torch.float64: library.function("icseg_window_logits_backward_f64", _BACKWARD_ARGUMENTS),
}
# bytes; bytes an element; B, H, W, p, stride, before, after, taps, k, threads; backward
_plan = library.function("icseg_sample_patches_workspace", [c_void_p] + [c_int64] * 12)
_MOST = 2**31 - 1


def unsupported(weights: Tensor, candidates: int) -> list[str]:
    """Why the library cannot draw from `candidates` windows of `weights`."""
    reasons = []
    if weights.device.type != "cpu":
        reasons.append(f"it runs on the CPU, and weights is on {weights.device}")
    if candidates > _MOST:
        reasons.append(f"it draws from at most {_MOST} windows, got {candidates}")
    return reasons


def sample_patches(
    weights: Tensor, k: int, windows: Windows, seed: int | Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(coords int32 [B, k, 2], scores [B, k], indices int64 [B, k]) of the windows drawn."""
    dtype = accumulation_dtype(weights.dtype)
    maps, sizes = _maps(weights, dtype, windows)
    batch = sizes[0]
    if noise is not None:
        noise = _noise_rows(noise, weights, windows, dtype)
    coords = torch.empty((batch, k, 2), dtype=torch.int32)
    scores = torch.empty((batch, k), dtype=dtype)
    indices = torch.empty((batch, k), dtype=torch.int64)
    threads = torch.get_num_threads()
    workspace = _workspace(dtype.itemsize, *sizes, k, threads, False)
    taps = _taps(windows.blur_sigma, dtype)
    code = _DRAW[dtype](
        maps.data_ptr(),
        None if taps is None else addressof(taps),
        None if noise is None else noise.data_ptr(),
        indices.data_ptr(),
        scores.data_ptr(),
        coords.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        *sizes,
        k,
        threads,
        *_strides(maps),
        0 if noise is None else noise.stride(0),
        float(windows.temperature),
        seed is not None,
        0 if seed is None else int(seed),
    )
    library.check(code)
    return coords, scores, indices


def window_logits(weights: Tensor, windows: Windows) -> Tensor:
    """[B, windows_y * windows_x] logits of every candidate window, as the reference's."""
    dtype = accumulation_dtype(weights.dtype)
    maps, sizes = _maps(weights, dtype, windows)
    logits = torch.empty((sizes[0], _candidates(weights, windows)), dtype=dtype)
    threads = torch.get_num_threads()
    workspace = _workspace(dtype.itemsize, *sizes, 0, threads, False)
    taps = _taps(windows.blur_sigma, dtype)
    code = _LOGITS[dtype](
        maps.data_ptr(),
        None if taps is None else addressof(taps),
        logits.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        *sizes,
        threads,
        *_strides(maps),
        float(windows.temperature),
    )
    library.check(code)
    return logits


def window_logits_backward(grad: Tensor, weights: Tensor, windows: Windows) -> Tensor:
    """Gradient [B, 1, H, W] of the logits to weights, as autograd's of the reference."""
    dtype = accumulation_dtype(weights.dtype)
    maps, sizes = _maps(weights, dtype, windows)
    wanted = (sizes[0], _candidates(weights, windows))
    if grad.shape != wanted or grad.dtype != dtype or not grad.is_cpu:
        raise ValueError(
            f"grad must have shape {list(wanted)} and dtype {dtype} on the CPU, "
            f"got {list(grad.shape)}, {grad.dtype} on {grad.device}"
        )
    grad = grad.contiguous()
    grad_maps = torch.empty(weights.shape, dtype=dtype)
    threads = torch.get_num_threads()
    workspace = _workspace(dtype.itemsize, *sizes, 0, threads, True)
    taps = _taps(windows.blur_sigma, dtype)
    code = _BACKWARD[dtype](
        maps.data_ptr(),
        grad.data_ptr(),
        None if taps is None else addressof(taps),
        grad_maps.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        *sizes,
        threads,
        *_strides(maps),
        float(windows.temperature),
    )
    library.check(code)
    return grad_maps.to(weights.dtype)


def _maps(weights: Tensor, dtype: torch.dtype, windows: Windows) -> tuple[Tensor, tuple[int, ...]]:
    """`weights` in `dtype`, and B, H, W, p, stride, before, after, taps."""
    if weights.ndim != 4 or weights.shape[1] != 1 or not weights.is_cpu or dtype not in _DRAW:
        raise ValueError(
            f"native sample_patches needs floating-point weights [B, 1, H, W] on the CPU, "
            f"got {list(weights.shape)}, {weights.dtype} on {weights.device}"
        )
    batch, _, height, width = weights.shape
    size, stride, before, after, _, sigma = windows
    sizes = (batch, height, width, size, stride, before, after, blur_taps(sigma))
    return weights if weights.dtype == dtype else weights.to(dtype), sizes


def _strides(maps: Tensor) -> tuple[int, int, int]:
    batch, _, y, x = maps.stride()
    return batch, y, x


def _candidates(weights: Tensor, windows: Windows) -> int:
    size, stride, before, after, _, _ = windows
    rows, columns = candidate_grid(weights.shape[2], weights.shape[3], size, stride, (before, after))
    return rows * columns


def _noise_rows(noise: Tensor, weights: Tensor, windows: Windows, dtype: torch.dtype) -> Tensor:
    """`noise` [B, candidates] in `dtype`, each row contiguous; the rows may lie anywhere."""
    wanted = (weights.shape[0], _candidates(weights, windows))
    if noise.shape != wanted or not noise.is_cpu:
        raise ValueError(
            f"noise must have shape {list(wanted)} on the CPU, got {list(noise.shape)} on {noise.device}"
        )
    if noise.dtype != dtype:
        noise = noise.to(dtype)
    return noise if noise.stride(1) == 1 else noise.contiguous()


def _workspace(*plan: int) -> Tensor:
    return torch.empty(_workspace_bytes(*plan), dtype=torch.uint8)


@functools.lru_cache(maxsize=256)
def _workspace_bytes(*plan: int) -> int:
    size = c_int64()
    library.check(_plan(addressof(size), *plan))
    return size.value


@functools.lru_cache(maxsize=16)
def _taps(sigma: float, dtype: torch.dtype) -> Array[Any] | None:
    """The blur's taps in `dtype`; None for no blur."""
    if blur_taps(sigma) == 1:
        return None
    kind = c_float if dtype == torch.float32 else c_double
    return (kind * blur_taps(sigma))(*blur_kernel(sigma))
