"""gather_patches by Triton kernels: one launch each way.

Copies, and the gradients of copies, equal the reference bit for bit; what is resampled equals it within rounding.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from icseg_kernels import triton_launch

# A copy moves bits; Triton has no name for every dtype.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def unsupported(source: Tensor) -> list[str]:
    """Why the kernels cannot cut patches out of `source`."""
    reasons = triton_launch.unsupported_device("source", source)
    if source.dtype.is_complex:
        reasons.append(f"source must be real, got {source.dtype}")
    return reasons


def gather(source: Tensor, coords: Tensor, patch_size: int) -> Tensor:
    """[..., C, H, W], integer [..., K, 2] -> [..., K, C, p, p]; zero outside the image."""
    from icseg_kernels.patches import gather_triton_kernels as kernels

    source, lead, sizes, strides = two_leading(source, 3)
    coords, count = corners(coords, lead)
    outer, inner, channels, height, width = sizes
    patches = source.new_empty((*lead, count, channels, patch_size, patch_size))
    align, blocks = kernels.alignment(patch_size), kernels.patch_blocks(channels, patch_size)
    bits = _BITS[source.itemsize]
    triton_launch.launch(
        kernels.copy_kernel,
        (kernels.patch_programs(outer * inner * count, channels, patch_size, blocks),),
        source.device,
        source.view(bits),
        coords,
        patches.view(bits),
        inner,
        channels,
        height,
        width,
        count,
        patch_size // align,
        *strides,
        ALIGN=align,
        **blocks,
    )
    return patches


def gather_backward(grad: Tensor, coords: Tensor, height: int, width: int) -> Tensor:
    """Adjoint of `gather`: [..., K, C, p, p] added up into [..., C, H, W]."""
    from icseg_kernels.patches.gather_triton_kernels import copy_backward_kernel, tile_blocks

    return _backward(copy_backward_kernel, tile_blocks, grad, coords, height, width, (), {})


def gather_bilinear(
    source: Tensor,
    coords: Tensor,
    extent_y: Tensor | float,
    extent_x: Tensor | float,
    out_size: int,
    edge_to_edge: bool,
) -> Tensor:
    """[..., C, H, W], [..., K, 2] -> [..., K, C, n, n]: samples of patches of the given extent, borders replicated."""
    from icseg_kernels.patches import gather_triton_kernels as kernels
    from icseg_kernels.patches.gather_bilinear_triton_kernels import bilinear_kernel

    _check_floating("source", source)
    source, lead, sizes, strides = two_leading(source, 3)
    coords, count = corners(coords, lead)
    outer, inner, channels, height, width = sizes
    patches = source.new_empty((*lead, count, channels, out_size, out_size))
    align, blocks = kernels.alignment(out_size), kernels.patch_blocks(channels, out_size)
    *extents, in_memory = doubles(source.device, extent_y, extent_x)
    triton_launch.launch(
        bilinear_kernel,
        (kernels.patch_programs(outer * inner * count, channels, out_size, blocks),),
        source.device,
        source,
        coords,
        patches,
        *extents,
        inner,
        channels,
        height,
        width,
        count,
        out_size // align,
        *strides,
        EXTENT_IN_MEMORY=in_memory,
        EDGE_TO_EDGE=edge_to_edge,
        ACCUMULATE=kernels.accumulation(source.dtype),
        ALIGN=align,
        enable_fp_fusion=False,
        **blocks,
    )
    return patches


def gather_bilinear_backward(
    grad: Tensor,
    coords: Tensor,
    extent_y: Tensor | float,
    extent_x: Tensor | float,
    edge_to_edge: bool,
    height: int,
    width: int,
) -> Tensor:
    """Adjoint of `gather_bilinear` with respect to its source: [..., K, C, n, n] -> [..., C, H, W]."""
    from icseg_kernels.patches.gather_bilinear_triton_kernels import adjoint_blocks, bilinear_backward_kernel

    *extents, in_memory = doubles(grad.device, extent_y, extent_x)
    options = {"EXTENT_IN_MEMORY": in_memory, "EDGE_TO_EDGE": edge_to_edge}
    return _backward(bilinear_backward_kernel, adjoint_blocks, grad, coords, height, width, tuple(extents), options)


def _backward(
    kernel: Any,
    blocks_for: Callable[[int], dict[str, int]],
    grad: Tensor,
    coords: Tensor,
    height: int,
    width: int,
    extents: tuple[Any, ...],
    options: dict[str, Any],
) -> Tensor:
    from icseg_kernels.patches import gather_triton_kernels as kernels

    _check_floating("grad", grad)
    grad, lead, sizes, strides = two_leading(grad, 4)
    outer, inner, count, channels, side, other_side = sizes
    if side != other_side:
        raise ValueError(f"grad must have shape [..., K, C, p, p], got {list(grad.shape)}")
    coords, _ = corners(coords, lead, count)
    images = grad.new_empty((*lead, channels, height, width))
    align, blocks = kernels.alignment(width), blocks_for(channels)
    programs = kernels.tile_programs(outer * inner, channels, height, width, blocks) if channels else 0
    triton_launch.launch(
        kernel,
        (programs,),
        grad.device,
        grad,
        coords,
        images,
        *extents,
        inner,
        channels,
        height,
        width // align,
        count,
        side,
        *strides,
        ACCUMULATE=kernels.accumulation(grad.dtype),
        ALIGN=align,
        enable_fp_fusion=False,
        **options,
        **blocks,
    )
    return images


def doubles(device: torch.device, *values: Tensor | float) -> tuple[Any, ...]:
    """Numbers for a kernel that reads them as float64, and whether they lie in its device's memory.

    A tensor that does is read by the kernel; else the integers of the same bits are passed, since Triton passes a
    float as float32.
    """
    if all(isinstance(value, Tensor) and value.device == device for value in values):
        return *values, True
    return *(struct.unpack("=q", struct.pack("=d", float(value)))[0] for value in values), False


def corners(coords: Tensor, lead: tuple[int, ...], count: int | None = None) -> tuple[Tensor, int]:
    """(coords, their K), contiguous. The last check before a kernel reads as much memory as the shapes promise."""
    shape = tuple(coords.shape)
    if count is None:
        count = shape[-2] if len(shape) > 1 else 0
    if shape != (*lead, count, 2):
        raise ValueError(f"coords must have shape {[*lead, count, 2]}, got {list(shape)}")
    return coords.contiguous(), count


def two_leading(tensor: Tensor, trailing: int) -> tuple[Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(tensor, its leading dimensions, its sizes, its strides), the last two with two dimensions before the `trailing`.

    A copy only if there are more leading ones that do not merge.
    """
    sizes, strides = tuple(tensor.shape), tensor.stride()
    lead = sizes[:-trailing]
    if len(lead) == 1:
        return tensor, lead, (1, *sizes), (0, *strides)
    if len(lead) == 0:
        return tensor, lead, (1, 1, *sizes), (0, 0, *strides)
    if len(lead) > 2:
        tensor = tensor.flatten(0, len(lead) - 2)
    return tensor, lead, tuple(tensor.shape), tensor.stride()


def _check_floating(name: str, values: Tensor) -> None:
    if not values.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {values.dtype}")
