"""scatter_patches: write patches back into images, averaging where they overlap."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icseg_kernels import backend as backends
from icseg_kernels import checks, flops, library, triton_launch
from icseg_kernels.numerics import accumulation_dtype
from icseg_kernels.patches import reference, scatter_native, scatter_triton
from icseg_kernels.patches.coords import check_coords, check_integer

_IMPLEMENTATIONS: dict[str, Any] = {"triton": scatter_triton, "native": scatter_native, "reference": reference}


class Scatter(NamedTuple):
    """mean: [B, C, H, W], the fill value where no patch lies. coverage: [B, 1, H, W] bool, where one does."""

    mean: Tensor
    coverage: Tensor


def scatter_patches(
    patches: Tensor,
    coords: Tensor,
    size: tuple[int, int],
    *,
    weight: str | Tensor | None = None,
    fill: float = -10.0,
    backend: str | None = None,
) -> Scatter:
    """Write patches back into images; where they overlap, the weighted mean.

    ```
    patches = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1, 1).expand(1, 2, 1, 2, 2)
    coords = torch.tensor([[[0, 0], [0, 1]]])
    scatter_patches(patches, coords, (2, 4)).mean                # [[[[1, 2, 3, -10], [1, 2, 3, -10]]]]
    ```

    Args:
        patches: [B, K, C, p, p] float16, bfloat16, float32 or float64, p at least 1, any strides.
        coords: [B, K, 2] integer (y, x) of each patch's top-left corner, on the device of `patches`. What lies
            outside the image is dropped; a patch wholly outside contributes nothing. A patch given twice counts
            twice.
        size: (H, W) of the images.
        weight: of a pixel by its place in the patch. None: all equal. "gaussian": `gaussian_weight(p)`.
            A tensor [p, p] of any real dtype, cast to that of the sums, on the device of `patches`. Where it is
            not positive the patch covers nothing, whatever its values, and gets no gradient. It gets none itself.
        fill: the value where no patch lies, a finite number; rounded to the dtype of `patches`.
        backend: "triton" (on CUDA devices, not float64), "native" (C++, on the CPU), "reference", or None for the
            best that can; see `icseg_kernels.backend`.

    Returns:
        Scatter(mean [B, C, H, W] in the dtype of `patches`, coverage [B, 1, H, W] bool). Sums are taken in
        the order of K, with any number of threads, in float32 for the 16-bit types. Autocast changes nothing.
        Always new tensors; there is no out= yet.

    Once differentiable with respect to `patches`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        BackendError: the named backend cannot serve the call.
    """
    checks.floating("patches", patches)
    shape = patches.shape
    if len(shape) != 5 or shape[4] != shape[3] or shape[4] < 1:
        raise ValueError(f"patches must have shape [B, K, C, p, p] with p at least 1, got {list(shape)}")
    check_coords(coords, (shape[0], shape[1], 2), "[B, K, 2]", patches.device)
    check_integer(coords, "")
    height, width = checks.pair("size", size, 0)
    gaussian = isinstance(weight, str)
    table = None if weight is None else _checked(weight, patches)
    value = checks.number("fill", fill)
    name = backends.select("scatter_patches", backend, patches)
    mean, _, coverage = backends.call(
        _ScatterPatches, _scatter, patches, coords, table, gaussian, value, height, width, False, name
    )
    return Scatter(mean, coverage)


def gaussian_weight(
    patch_size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """[p, p] Gaussian of sigma p / 8 about the patch's centre (p - 1) / 2, 1 at the centre, never below 1e-3.

    The importance map of sliding-window inference (nnU-Net, Isensee et al. 2021). The floor keeps the mean
    well defined in the corners.
    """
    side = checks.integer("patch_size", patch_size, 1)
    offset = torch.arange(side, dtype=dtype, device=device) - (side - 1) / 2
    line = torch.exp(-0.5 * (offset / (side / 8)) ** 2)
    return (line[:, None] * line).clamp(min=1e-3)


@functools.lru_cache(maxsize=8)
def _cached_gaussian_weight(patch_size: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return gaussian_weight(patch_size, dtype=dtype, device="cpu")


def _checked(weight: Any, patches: Tensor) -> Tensor | None:
    """`weight` [p, p] in the dtype of the sums; None for the Gaussian, which the op makes."""
    patch_size, dtype = patches.shape[-1], accumulation_dtype(patches.dtype)
    if isinstance(weight, str):
        if weight != "gaussian":
            raise ValueError(f'weight must be None, "gaussian" or a tensor, got {weight!r}')
        return None
    checks.tensor("weight", weight)
    if weight.dtype.is_complex:
        raise TypeError(f"weight must be real, got {weight.dtype}")
    if tuple(weight.shape) != (patch_size, patch_size):
        raise ValueError(f"weight must have shape [p, p] with p = {patch_size}, got {list(weight.shape)}")
    checks.device("weight", weight, patches.device)
    return weight.detach().to(dtype)


class _ScatterPatches(torch.autograd.Function):
    @staticmethod
    def forward(
        patches: Tensor,
        coords: Tensor,
        weight: Tensor | None,
        gaussian: bool,
        fill: Tensor,
        height: int,
        width: int,
        keep_total: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _scatter(patches, coords, weight, gaussian, fill, height, width, True, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        patches, coords, weight, ctx.gaussian, *_, ctx.backend = inputs
        _mean, total, coverage = output
        ctx.patch_size = patches.shape[-1]
        ctx.mark_non_differentiable(total, coverage)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(coords, weight, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 9
        coords, weight, total = ctx.saved_tensors
        found = _scatter_backward(grad, total, coords, weight, ctx.gaussian, ctx.patch_size, ctx.backend)
        return found, *(None,) * 8


def _gaussian_for(values: Tensor, patch_size: int, backend: str) -> Tensor | str:
    """The Gaussian weight [p, p] in the dtype of the sums, on the device of `values`; Triton's kernels compute it."""
    if backend == "triton":
        return "gaussian"
    dtype = accumulation_dtype(values.dtype)
    if values.is_cpu:
        return _cached_gaussian_weight(patch_size, dtype)
    return gaussian_weight(patch_size, dtype=dtype, device=values.device)


def _scatter_implementation(
    patches: Tensor,
    coords: Tensor,
    weight: Tensor | None,
    gaussian: bool,
    fill: float | Tensor,
    height: int,
    width: int,
    keep_total: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    table = _gaussian_for(patches, patches.shape[-1], backend) if gaussian else weight
    return _IMPLEMENTATIONS[backend].scatter(patches, coords, table, fill, height, width, keep_total)


def _scatter_backward_implementation(
    grad: Tensor, total: Tensor, coords: Tensor, weight: Tensor | None, gaussian: bool, patch_size: int, backend: str
) -> Tensor:
    table = _gaussian_for(grad, patch_size, backend) if gaussian else weight
    return _IMPLEMENTATIONS[backend].scatter_backward(grad, total, coords, table, patch_size)


def _scatter_fake(
    patches: Tensor,
    coords: Tensor,
    weight: Tensor | None,
    gaussian: bool,
    fill: Tensor,
    height: int,
    width: int,
    keep_total: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels = patches.shape[0], patches.shape[2]
    totals = (batch, 1, height, width)
    return (
        patches.new_empty(batch, channels, height, width),
        patches.new_empty(totals if keep_total else 0, dtype=accumulation_dtype(patches.dtype)),
        patches.new_empty(totals, dtype=torch.bool),
    )


def _scatter_backward_fake(
    grad: Tensor, total: Tensor, coords: Tensor, weight: Tensor | None, gaussian: bool, patch_size: int, backend: str
) -> Tensor:
    return grad.new_empty(*coords.shape[:-1], grad.shape[1], patch_size, patch_size)


_scatter = backends.register(
    "scatter_patches(Tensor patches, Tensor coords, Tensor? weight, bool gaussian, Tensor fill, SymInt height, "
    "SymInt width, bool keep_total, str backend) -> (Tensor, Tensor, Tensor)",
    _scatter_implementation,
    _scatter_fake,
)
_scatter_backward = backends.register(
    "scatter_patches_backward(Tensor grad, Tensor total, Tensor coords, Tensor? weight, bool gaussian, "
    "SymInt patch_size, str backend) -> Tensor",
    _scatter_backward_implementation,
    _scatter_backward_fake,
)
backends.declare(
    "scatter_patches",
    {
        "triton": backends.Backend(triton_launch.missing, scatter_triton.unsupported, triton_launch.slower),
        "native": backends.Backend(library.missing, scatter_native.unsupported),
        "reference": backends.Backend(),
    },
)


def _scatter_flops(
    patches: Any,
    coords: Any,
    weight: Any,
    gaussian: bool,
    fill: Any,
    height: int,
    width: int,
    *_: Any,
    out_shape: Any = None,
) -> int:
    batch, count, channels, patch_size, _patch_size = patches
    return flops.scatter_patches_flops(batch, count, channels, patch_size, height, width)


def _scatter_backward_flops(grad: Any, *_: Any, out_shape: Any = None) -> int:
    """One division a pixel, one multiplication a patch pixel."""
    return math.prod(grad) + math.prod(out_shape)


flops.register(_scatter, _scatter_flops)
flops.register(_scatter_backward, _scatter_backward_flops)
