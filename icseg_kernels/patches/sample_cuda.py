"""sample_patches by the CUDA library: a map in shared memory from its pixels to the draw, in one launch.

What it draws equals the reference on the CPU bit for bit, but for the sign of a zero. Maps of any strides are read
where they lie; float16 and bfloat16 are converted first. It has no gradients.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import Array, addressof, c_double, c_float, c_int64, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

from icseg_kernels import cuda_library
from icseg_kernels.patches.windows import Windows, blur_kernel, blur_taps, candidate_grid


class _Settings(ctypes.Structure):
    """struct icseg_cuda_windows."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "height", "width", "stride_batch", "stride_y", "stride_x")),
        *((name, c_int64) for name in ("patch", "stride", "before", "after")),
        ("taps", c_void_p),
        ("tap_count", c_int64),
        ("temperature", c_void_p),
        ("temperature_value", c_double),
    ]


# settings, maps, noise, its rows' stride, seed, k, seeded, seed, indices, scores, coords
_ARGUMENTS = [c_void_p] * 3 + [c_int64, c_void_p] + [c_int64] * 2 + [c_uint64] + [c_void_p] * 3
_draw = cuda_library.function("icseg_cuda_sample_patches_f32", _ARGUMENTS)

_MOST_PIXELS_OF_99_KIB = 12288


def unsupported(weights: Tensor, candidates: int, windows: Windows, k: int, differentiable: bool) -> list[str]:
    """Why the library cannot draw k of the `candidates` windows of `weights`."""
    reasons = cuda_library.unsupported_tensor("weights", weights)
    padding = windows.before + windows.after
    pixels = (weights.shape[2] + padding) * (weights.shape[3] + padding)
    if pixels > (most := _most_pixels(weights)):
        reasons.append(f"it keeps at most {most} pixels of a padded map, got {pixels}")
    if k > cuda_library.MOST_DRAWS:
        reasons.append(f"it draws at most {cuda_library.MOST_DRAWS} windows, got k = {k}")
    if (taps := blur_taps(windows.blur_sigma)) > cuda_library.MOST_TAPS:
        reasons.append(f"it blurs with at most {cuda_library.MOST_TAPS} taps, and blur_sigma needs {taps}")
    if differentiable:
        reasons.append("it has no gradients")
    return reasons


def _most_pixels(weights: Tensor) -> int:
    """Pixels of a padded map that fit the shared memory of a block, where `weights` is: 163 KiB or more, or 99 KiB."""
    if weights.is_cuda:
        properties = torch.cuda.get_device_properties(weights.device)
        if properties.major == 12 or (properties.major == 8 and properties.minor in (6, 9)):
            return _MOST_PIXELS_OF_99_KIB
    return cuda_library.MOST_PIXELS


def sample_patches(
    weights: Tensor, k: int, windows: Windows, seed: int | Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(coords int32 [B, k, 2], scores [B, k], indices int64 [B, k]) of the windows drawn."""
    device = weights.device
    maps = weights.to(torch.float32)
    batch, _, height, width = maps.shape
    if noise is not None:
        rows, columns = candidate_grid(
            height, width, windows.patch_size, windows.stride, (windows.before, windows.after)
        )
        noise = noise.to(torch.float32).expand(batch, rows * columns)
        noise = noise if noise.stride(1) == 1 else noise.contiguous()
    temperature = windows.temperature
    on_device = isinstance(temperature, Tensor) and temperature.is_cuda
    taps = _taps(windows.blur_sigma)
    settings = _Settings(
        batch,
        height,
        width,
        maps.stride(0),
        maps.stride(2),
        maps.stride(3),
        windows.patch_size,
        windows.stride,
        windows.before,
        windows.after,
        None if taps is None else addressof(taps),
        blur_taps(windows.blur_sigma),
        temperature.data_ptr() if isinstance(temperature, Tensor) and on_device else None,
        0.0 if on_device else float(temperature),
    )
    coords = torch.empty(batch, k, 2, dtype=torch.int32, device=device)
    scores = torch.empty(batch, k, dtype=torch.float32, device=device)
    indices = torch.empty(batch, k, dtype=torch.int64, device=device)
    seed_pointer, seeded, seed_value = cuda_library.seed_arguments(seed)
    _draw(
        device,
        addressof(settings),
        maps.data_ptr(),
        None if noise is None else noise.data_ptr(),
        0 if noise is None else noise.stride(0),
        seed_pointer,
        k,
        seeded,
        seed_value,
        indices.data_ptr(),
        scores.data_ptr(),
        coords.data_ptr(),
    )
    return coords, scores, indices


@functools.lru_cache(maxsize=16)
def _taps(sigma: float) -> Array[Any] | None:
    """The blur's taps in float32; None for no blur."""
    return None if blur_taps(sigma) == 1 else (c_float * blur_taps(sigma))(*blur_kernel(sigma))
