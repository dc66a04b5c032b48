"""gather_patches: cut patches out of images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icseg_kernels import backend as backends
from icseg_kernels import flops, library
from icseg_kernels.patches import native, reference
from icseg_kernels.patches.coords import check_coords, check_integer

ALIGNMENTS = ("pixel", "published")
_IMPLEMENTATIONS: dict[str, Any] = {"native": native, "reference": reference}


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
        source: [..., C, H, W], any dtype (floating-point with `out_size`), any strides.
        coords: [..., K, 2] (y, x) of each patch's top-left corner in pixels of `source`, with the leading
            dimensions of `source`. Integers; with `out_size` also floats. They may be negative or outside: a
            patch wholly outside the image is all zeros. The same patch may come more than once.
        patch_size: p, in pixels. With `out_size` it may be a fraction, or a pair (height, width).
        out_size: n, samples a side; None copies.
        alignment: "pixel" or "published"; only with `out_size`.
        backend: see `icseg_kernels.backend`.

    Returns:
        [..., K, C, p, p], or [..., K, C, n, n]; the dtype of `source`. Resampling is computed in float32 for
        the 16-bit types, and in the dtype of `source` otherwise. Autocast changes nothing.

    Once differentiable with respect to `source`; the gradient is bitwise reproducible.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
        BackendError: the named backend cannot serve the call.
    """
    if source.ndim < 3:
        raise ValueError(f"source must have shape [..., C, H, W], got {list(source.shape)}")
    k = coords.shape[-2] if coords.ndim > 1 else 0
    check_coords(
        coords, (*source.shape[:-3], k, 2), "[..., K, 2] with the leading dimensions of source", source.device
    )
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment must be one of {', '.join(ALIGNMENTS)}, got {alignment!r}")
    name = backends.select("gather_patches", backend, source, out_size is not None)
    if out_size is None:
        check_integer(coords, " (floating-point coords need out_size)")
        _check_copied(patch_size, alignment)
        return _GatherPatches.apply(source, coords, patch_size, name)
    _check_resampled(source, out_size)
    height, width = _extent(patch_size)
    return _GatherPatchesBilinear.apply(
        source, coords, height, width, out_size, alignment == "published", name
    )


def _check_copied(patch_size: object, alignment: str) -> None:
    if not isinstance(patch_size, int | torch.SymInt):
        raise TypeError(
            f"patch_size must be an integer (a fraction or a pair needs out_size), got {patch_size!r}"
        )
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    if alignment != "pixel":
        raise ValueError(f"alignment={alignment!r} needs out_size: a copied patch has nothing to align")


def _check_resampled(source: Tensor, out_size: int) -> None:
    if not source.dtype.is_floating_point:
        raise TypeError(
            f"source must be a floating-point tensor to be resampled to out_size, got {source.dtype}"
        )
    if out_size < 1:
        raise ValueError(f"out_size must be at least 1, got {out_size}")


def _extent(patch_size: float | tuple[float, float]) -> tuple[float, float]:
    height, width = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
    if not (height > 0 and width > 0):
        raise ValueError(f"patch_size must be positive, got {patch_size}")
    return float(height), float(width)


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
        height: float,
        width: float,
        out_size: int,
        edge_to_edge: bool,
        backend: str,
    ) -> Tensor:
        return _bilinear(source, coords, height, width, out_size, edge_to_edge, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        source, coords, height, width, _, edge_to_edge, ctx.backend = inputs
        ctx.patch = (height, width, edge_to_edge)
        ctx.size = source.shape[-2:]
        ctx.save_for_backward(coords)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (coords,) = ctx.saved_tensors
        return _bilinear_backward(grad, coords, *ctx.patch, *ctx.size, ctx.backend), *(None,) * 6


def _gather_implementation(source: Tensor, coords: Tensor, patch_size: int, backend: str) -> Tensor:
    return _IMPLEMENTATIONS[backend].gather(source, coords, patch_size)


def _gather_fake(source: Tensor, coords: Tensor, patch_size: int, backend: str) -> Tensor:
    return source.new_empty(*coords.shape[:-1], source.shape[-3], patch_size, patch_size)


def _gather_backward_implementation(
    grad: Tensor, coords: Tensor, height: int, width: int, backend: str
) -> Tensor:
    return _IMPLEMENTATIONS[backend].gather_backward(grad, coords, height, width)


def _gather_backward_fake(grad: Tensor, coords: Tensor, height: int, width: int, backend: str) -> Tensor:
    return grad.new_empty(*coords.shape[:-2], grad.shape[-3], height, width)


def _bilinear_implementation(
    source: Tensor,
    coords: Tensor,
    height: float,
    width: float,
    out_size: int,
    edge_to_edge: bool,
    backend: str,
) -> Tensor:
    return reference.gather_bilinear(source, coords, (height, width), out_size, edge_to_edge)


def _bilinear_fake(
    source: Tensor,
    coords: Tensor,
    height: float,
    width: float,
    out_size: int,
    edge_to_edge: bool,
    backend: str,
) -> Tensor:
    return source.new_empty(*coords.shape[:-1], source.shape[-3], out_size, out_size)


def _bilinear_backward_implementation(
    grad: Tensor,
    coords: Tensor,
    height: float,
    width: float,
    edge_to_edge: bool,
    image_height: int,
    image_width: int,
    backend: str,
) -> Tensor:
    return reference.gather_bilinear_backward(
        grad, coords, (height, width), edge_to_edge, image_height, image_width
    )


def _bilinear_backward_fake(
    grad: Tensor,
    coords: Tensor,
    height: float,
    width: float,
    edge_to_edge: bool,
    image_height: int,
    image_width: int,
    backend: str,
) -> Tensor:
    return grad.new_empty(*coords.shape[:-2], grad.shape[-3], image_height, image_width)


_gather = backends.register(
    "gather_patches(Tensor source, Tensor coords, SymInt patch_size, str backend) -> Tensor",
    _gather_implementation,
    _gather_fake,
)
_gather_backward = backends.register(
    "gather_patches_backward(Tensor grad, Tensor coords, SymInt height, SymInt width, str backend) -> Tensor",
    _gather_backward_implementation,
    _gather_backward_fake,
)
_bilinear = backends.register(
    "gather_patches_bilinear(Tensor source, Tensor coords, float height, float width, SymInt out_size, "
    "bool edge_to_edge, str backend) -> Tensor",
    _bilinear_implementation,
    _bilinear_fake,
)
_bilinear_backward = backends.register(
    "gather_patches_bilinear_backward(Tensor grad, Tensor coords, float height, float width, "
    "bool edge_to_edge, SymInt image_height, SymInt image_width, str backend) -> Tensor",
    _bilinear_backward_implementation,
    _bilinear_backward_fake,
)
backends.declare(
    "gather_patches",
    {"native": backends.Backend(library.missing, native.unsupported), "reference": backends.Backend()},
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
