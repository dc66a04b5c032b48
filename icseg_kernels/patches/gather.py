"""gather_patches: cut patches out of images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icseg_kernels import backend as backends
from icseg_kernels import checks, flops, library, triton_launch
from icseg_kernels.patches import gather_native, gather_triton, reference
from icseg_kernels.patches.coords import check_coords, check_integer

ALIGNMENTS = ("pixel", "published")
_IMPLEMENTATIONS: dict[str, Any] = {"triton": gather_triton, "native": gather_native, "reference": reference}


def gather_patches(
    source: Tensor,
    coords: Tensor,
    patch_size: int | float | tuple[float, float],
    *,
    out_size: int | None = None,
    alignment: str = "pixel",
    backend: str | None = None,
) -> Tensor:
    """Cut K square patches out of each image, all images in one call.

    Without `out_size` a patch is an exact copy of p x p pixels, zero outside the image:

    ```
    source = torch.arange(12.0).view(1, 3, 4)                    # [C, H, W]
    gather_patches(source, torch.tensor([[1, 2]]), 2)            # [[[[6, 7], [10, 11]]]]   [K, C, p, p]
    gather_patches(source, torch.tensor([[2, -1]]), 2)           # [[[[0, 8], [0, 0]]]]
    ```

    With `out_size=n` it is resampled to n x n bilinearly, the image's border replicated (not antialiased).
    Sample i lies, in pixels from the image's first pixel centre, along each axis at

    - alignment="pixel":     coord + (i + 0.5) * p / n - 0.5, the centres of n equal cells of the patch;
    - alignment="published": coord + p / 2 + linspace(-p / 2, p / 2, n)[i] - 0.5, from edge to edge, as the
      published PatchICL samples its features (arXiv 2604.12752).

    Args:
        source: [..., C, H, W], any strides, any dtype; float16, bfloat16, float32 or float64 with `out_size`.
        coords: [..., K, 2] (y, x) of each patch's top-left corner in pixels of `source`, with the leading
            dimensions of `source`, on its device. Integers (uint8 or signed); with `out_size` also floats. They
            may be negative or outside: a patch wholly outside the image is all zeros, as is one at NaN. The same
            patch may come more than once. They get no gradient, floats neither.
        patch_size: p, in pixels. With `out_size` it may be a fraction, or a pair (height, width).
        out_size: n, samples a side; None copies.
        alignment: "pixel" or "published"; only with `out_size`.
        backend: "triton" (real dtypes on CUDA devices), "native" (real dtypes on the CPU), "reference", or None; see
            `icseg_kernels.backend`. They copy the same bits, and their gradients of copies are the same; what they
            resample differs by rounding.

    Returns:
        [..., K, C, p, p], or [..., K, C, n, n]; the dtype of `source`. Resampling is computed in float32 for
        the 16-bit types (the whole of `source` is converted), and in the dtype of `source` otherwise. Autocast
        changes nothing. Always a new tensor; there is no out= yet.

    Once differentiable with respect to `source`, if that is complex or of a dtype that can be resampled; the
    gradient is bitwise reproducible, with any number of threads.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        BackendError: the named backend cannot serve the call.
    """
    shape = checks.tensor("source", source).shape
    if len(shape) < 3:
        raise ValueError(f"source must have shape [..., C, H, W], got {list(shape)}")
    k = coords.shape[-2] if isinstance(coords, Tensor) and coords.ndim > 1 else 0
    layout = "[..., K, 2] with the leading dimensions of source"
    check_coords(coords, (*shape[:-3], k, 2), layout, source.device)
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment must be one of {', '.join(ALIGNMENTS)}, got {alignment!r}")
    name = backends.select("gather_patches", backend, source)
    if out_size is None:
        check_integer(coords, " (floating-point coords need out_size)")
        side = checks.integer("patch_size", patch_size, 1, otherwise=" (a fraction or a pair needs out_size)")
        if alignment != "pixel":
            raise ValueError(f"alignment={alignment!r} needs out_size: a copied patch has nothing to align")
        return backends.call(_GatherPatches, _gather, source, coords, side, name)
    checks.floating("source with out_size", source)
    extent = _extent(patch_size)
    side = checks.integer("out_size", out_size, 1)
    edge_to_edge = alignment == "published"
    corners = coords.detach() if coords.requires_grad else coords
    return backends.call(_GatherPatchesBilinear, _bilinear, source, corners, *extent, side, edge_to_edge, name)


def _extent(patch_size: Any) -> tuple[float, float]:
    """(height, width) of a patch in pixels."""
    if not isinstance(patch_size, tuple | list):
        side = checks.number("patch_size", patch_size, above=0)
        return side, side
    if len(patch_size) != 2:
        raise ValueError(f"patch_size must be a number or a pair (height, width), got {patch_size!r}")
    height, width = patch_size
    return checks.number("patch_size[0]", height, above=0), checks.number("patch_size[1]", width, above=0)


class _GatherPatches(torch.autograd.Function):
    @staticmethod
    def forward(source: Tensor, coords: Tensor, patch_size: int, backend: str) -> Tensor:
        return _gather(source, coords, patch_size, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        source, coords, _, ctx.backend = inputs
        ctx.size = source.shape[-2:]
        ctx.save_for_backward(coords)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (coords,) = ctx.saved_tensors
        return _gather_backward(grad, coords, *ctx.size, ctx.backend), None, None, None


class _GatherPatchesBilinear(torch.autograd.Function):
    @staticmethod
    def forward(
        source: Tensor,
        coords: Tensor,
        extent_y: Tensor,
        extent_x: Tensor,
        out_size: int,
        edge_to_edge: bool,
        backend: str,
    ) -> Tensor:
        return _bilinear(source, coords, extent_y, extent_x, out_size, edge_to_edge, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        source, coords, extent_y, extent_x, _, ctx.edge_to_edge, ctx.backend = inputs
        ctx.size = source.shape[-2:]
        ctx.save_for_backward(coords, extent_y, extent_x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        where = ctx.saved_tensors
        return _bilinear_backward(grad, *where, ctx.edge_to_edge, *ctx.size, ctx.backend), *(None,) * 6


def _gather_implementation(source: Tensor, coords: Tensor, patch_size: int, backend: str) -> Tensor:
    return _IMPLEMENTATIONS[backend].gather(source, coords, patch_size)


def _gather_fake(source: Tensor, coords: Tensor, patch_size: int, backend: str) -> Tensor:
    return source.new_empty(*coords.shape[:-1], source.shape[-3], patch_size, patch_size)


def _gather_backward_implementation(grad: Tensor, coords: Tensor, height: int, width: int, backend: str) -> Tensor:
    if not grad.dtype.is_complex:
        checks.floating("the gradient of gather_patches", grad)
    return _IMPLEMENTATIONS[backend].gather_backward(grad, coords, height, width)


def _backward_fake(grad: Tensor, coords: Tensor, height: int, width: int, backend: str) -> Tensor:
    return grad.new_empty(*grad.shape[:-4], grad.shape[-3], height, width)


def _bilinear_implementation(source: Tensor, *arguments: Any) -> Tensor:
    *where, backend = arguments
    return _IMPLEMENTATIONS[backend].gather_bilinear(source, *where)


def _bilinear_fake(source: Tensor, coords: Tensor, y: Tensor, x: Tensor, out_size: int, *_: object) -> Tensor:
    return source.new_empty(*coords.shape[:-1], source.shape[-3], out_size, out_size)


def _bilinear_backward_implementation(grad: Tensor, *arguments: Any) -> Tensor:
    *where, backend = arguments
    return _IMPLEMENTATIONS[backend].gather_bilinear_backward(grad, *where)


def _bilinear_backward_fake(grad: Tensor, *arguments: Any) -> Tensor:
    *_, height, width, _backend = arguments
    return grad.new_empty(*grad.shape[:-4], grad.shape[-3], height, width)


_gather = backends.register(
    "gather_patches(Tensor source, Tensor coords, SymInt patch_size, str backend) -> Tensor",
    _gather_implementation,
    _gather_fake,
)
_gather_backward = backends.register(
    "gather_patches_backward(Tensor grad, Tensor coords, SymInt height, SymInt width, str backend) -> Tensor",
    _gather_backward_implementation,
    _backward_fake,
)
_bilinear = backends.register(
    "gather_patches_bilinear(Tensor source, Tensor coords, Tensor extent_y, Tensor extent_x, SymInt out_size, "
    "bool edge_to_edge, str backend) -> Tensor",
    _bilinear_implementation,
    _bilinear_fake,
)
_bilinear_backward = backends.register(
    "gather_patches_bilinear_backward(Tensor grad, Tensor coords, Tensor extent_y, Tensor extent_x, "
    "bool edge_to_edge, SymInt height, SymInt width, str backend) -> Tensor",
    _bilinear_backward_implementation,
    _bilinear_backward_fake,
)
backends.declare(
    "gather_patches",
    {
        "triton": backends.Backend(triton_launch.missing, gather_triton.unsupported, triton_launch.slower),
        "native": backends.Backend(library.missing, gather_native.unsupported),
        "reference": backends.Backend(),
    },
)


def _gather_flops(*_: Any, **__: Any) -> int:
    return flops.gather_patches_flops(0, 0, 0, 0)


def _gather_backward_flops(grad: Any, *_: Any, out_shape: Any = None) -> int:
    return math.prod(grad)


def _bilinear_flops(*_: Any, out_shape: Any = None) -> int:
    *batch, patches, channels, out_size, _out_size = out_shape
    return flops.gather_patches_flops(math.prod(batch), patches, channels, out_size, bilinear=True)


def _bilinear_backward_flops(grad: Any, *_: Any, out_shape: Any = None) -> int:
    return _bilinear_flops(out_shape=grad)


flops.register(_gather, _gather_flops)
flops.register(_gather_backward, _gather_backward_flops)
flops.register(_bilinear, _bilinear_flops)
flops.register(_bilinear_backward, _bilinear_backward_flops)
