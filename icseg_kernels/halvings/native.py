"""halvings by the native library: float32 on the CPU, without gradients; means have the bits of the reference."""

from __future__ import annotations

import functools
import struct
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from icseg_kernels import library
from icseg_kernels.backend import without_gradients

# image, means, deviations; N, C, h, w, count, deviations; strides of N, C, y; workspace, its bytes
_halve = library.function("icseg_halvings_f32", [c_void_p] * 3 + [c_int64] * 9 + [c_void_p, c_int64])


def unsupported(image: Tensor) -> list[str]:
    """Why the library cannot halve `image`."""
    reasons = []
    if not image.is_cpu:
        reasons.append(f"it runs on the CPU, and image is on {image.device}")
    if image.dtype != torch.float32:
        reasons.append(f"it computes in float32, and image is {image.dtype}")
    return reasons + without_gradients("image", (image,))


def halvings(image: Tensor, count: int, deviations: int) -> list[Tensor]:
    """As `reference.halvings`. An image whose rows are not contiguous is copied."""
    if not image.is_cpu or image.dtype != torch.float32 or len(image.shape) != 4:
        raise ValueError(
            f"image must be float32 [N, C, h, w] on the CPU, got {list(image.shape)} {image.dtype} on {image.device}"
        )
    images, channels, height, width = image.shape
    if image.stride(3) != 1:
        image = image.contiguous()
    means: list[Tensor] = []
    spreads: list[Tensor] = []
    rows, columns, squares = height, width, 0
    for level in range(count):
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
        shape = (images, channels, rows, columns)
        means.append(image.new_empty(shape))
        if level < deviations:
            spreads.append(image.new_empty(shape))
            if level + 1 < deviations:
                squares += images * channels * rows * columns
    workspace = image.new_empty(squares) if squares else None
    pointers = _pointers(len(means)), _pointers(len(spreads))
    stride_image, stride_channel, stride_y, _ = image.stride()
    code = _halve(
        image.data_ptr(),
        pointers[0].pack(*[mean.data_ptr() for mean in means]),
        pointers[1].pack(*[spread.data_ptr() for spread in spreads]),
        images,
        channels,
        height,
        width,
        count,
        deviations,
        stride_image,
        stride_channel,
        stride_y,
        None if workspace is None else workspace.data_ptr(),
        4 * squares,
    )
    if code:
        library.check(code)
    return means + spreads


@functools.lru_cache(maxsize=64)
def _pointers(count: int) -> struct.Struct:
    return struct.Struct(f"={count}Q")
