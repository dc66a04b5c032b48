"""gather_patches by the native library, on the CPU.

Copies, and the gradients of copies, equal the reference bit for bit; what is resampled equals it within rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_double, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from icseg_kernels import library
from icseg_kernels.numerics import accumulation_dtype

_GRID = [c_double, c_double, c_int]
# source, coords, patches; outer, inner, C, H, W, K, p; strides of outer, inner, C, y, x; bytes an element; coords' type
_gather = library.function("icseg_gather_patches", [c_void_p] * 3 + [c_int64] * 13 + [c_int])


def _of_dtypes(name: str, arguments: list[type]) -> dict[torch.dtype, Callable[..., int]]:
    return {
        torch.float32: library.function(f"{name}_f32", arguments),
        torch.float64: library.function(f"{name}_f64", arguments),
    }


# patches, coords, images; outer, inner, K, C, p, H, W; strides of outer, inner, K, C, y, x; coords' type
_BACKWARD = _of_dtypes("icseg_gather_patches_backward", [c_void_p] * 3 + [c_int64] * 13 + [c_int])
# As copies, without the bytes; extents of y and x, whether from edge to edge
_BILINEAR = _of_dtypes("icseg_gather_patches_bilinear", [c_void_p] * 3 + [c_int64] * 12 + [c_int, *_GRID])
_BILINEAR_BACKWARD = _of_dtypes(
    "icseg_gather_patches_bilinear_backward", [c_void_p] * 3 + [c_int64] * 13 + [c_int, *_GRID]
)

_COORDS_TYPES = {torch.int32: 0, torch.int64: 1, torch.float32: 2, torch.float64: 3}


def unsupported(source: Tensor) -> list[str]:
    """Why the library cannot cut patches out of `source`."""
    reasons = []
    if not source.is_cpu:
        reasons.append(f"it runs on the CPU, and source is on {source.device}")
    if source.dtype.is_complex:
        reasons.append(f"source must be real, got {source.dtype}")
    return reasons


def gather(source: Tensor, coords: Tensor, patch_size: int) -> Tensor:
    """[..., C, H, W], integer [..., K, 2] -> [..., K, C, p, p]; zero outside the image."""
    source, lead, sizes, strides = _two_leading(source, 3)
    coords, count, coords_type = _checked(coords, source, lead)
    patches = source.new_empty((*lead, count, sizes[2], patch_size, patch_size))
    code = _gather(
        source.data_ptr(),
        coords.data_ptr(),
        patches.data_ptr(),
        *sizes,
        count,
        patch_size,
        *strides,
        source.itemsize,
        coords_type,
    )
    if code:
        library.check(code)
    return patches


def gather_backward(grad: Tensor, coords: Tensor, height: int, width: int) -> Tensor:
    """Adjoint of `gather`: [..., K, C, p, p] added up into [..., C, H, W]."""
    return _backward(_BACKWARD, grad, coords, height, width)


def gather_bilinear(
    source: Tensor,
    coords: Tensor,
    extent_y: Tensor | float,
    extent_x: Tensor | float,
    out_size: int,
    edge_to_edge: bool,
) -> Tensor:
    """[..., C, H, W], [..., K, 2] -> [..., K, C, n, n]: samples of patches of the given extent, borders replicated."""
    dtype = source.dtype
    if dtype not in _BILINEAR:
        source = _summable("source", source)
    source, lead, sizes, strides = _two_leading(source, 3)
    coords, count, coords_type = _checked(coords, source, lead)
    patches = source.new_empty((*lead, count, sizes[2], out_size, out_size))
    code = _BILINEAR[source.dtype](
        source.data_ptr(),
        coords.data_ptr(),
        patches.data_ptr(),
        *sizes,
        count,
        out_size,
        *strides,
        coords_type,
        float(extent_y),
        float(extent_x),
        edge_to_edge,
    )
    if code:
        library.check(code)
    return patches if patches.dtype == dtype else patches.to(dtype)


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
    grid = float(extent_y), float(extent_x), edge_to_edge
    return _backward(_BILINEAR_BACKWARD, grad, coords, height, width, *grid)


def _backward(
    functions: dict[torch.dtype, Callable[..., int]],
    grad: Tensor,
    coords: Tensor,
    height: int,
    width: int,
    *grid: float,
) -> Tensor:
    dtype = grad.dtype
    if dtype not in functions:
        grad = _summable("grad", grad)
    grad, lead, sizes, strides = _two_leading(grad, 4)
    coords, _, coords_type = _checked(coords, grad, lead, sizes[2])
    if sizes[-1] != sizes[-2]:
        raise ValueError(f"grad must have shape [..., K, C, p, p], got {list(grad.shape)}")
    images = grad.new_empty((*lead, sizes[3], height, width))
    code = functions[grad.dtype](
        grad.data_ptr(),
        coords.data_ptr(),
        images.data_ptr(),
        *sizes[:-1],
        height,
        width,
        *strides,
        coords_type,
        *grid,
    )
    if code:
        library.check(code)
    return images if images.dtype == dtype else images.to(dtype)


def _summable(name: str, values: Tensor) -> Tensor:
    """`values` of a 16-bit floating dtype as float32."""
    if not values.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {values.dtype}")
    return values.to(accumulation_dtype(values.dtype))


def _checked(
    coords: Tensor, values: Tensor, lead: tuple[int, ...], count: int | None = None
) -> tuple[Tensor, int, int]:
    """(coords, their K, the number of their type), contiguous and of a type that the library reads.

    The last check before raw pointers: the library reads as much memory as the shapes promise.
    """
    if not (values.is_cpu and coords.is_cpu):
        raise ValueError(f"native patch ops need tensors on the CPU, got {values.device} and {coords.device}")
    shape = tuple(coords.shape)
    if count is None:
        count = shape[-2] if len(shape) > 1 else 0
    if shape != (*lead, count, 2):
        raise ValueError(f"coords must have shape {[*lead, count, 2]}, got {list(shape)}")
    kind = _COORDS_TYPES.get(coords.dtype)
    if kind is None:
        coords = coords.to(torch.float64 if coords.is_floating_point() else torch.int64)
        kind = _COORDS_TYPES[coords.dtype]
    return coords if coords.is_contiguous() else coords.contiguous(), count, kind


def _two_leading(tensor: Tensor, trailing: int) -> tuple[Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
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
