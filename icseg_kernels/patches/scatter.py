"""scatter_patches: write patches back into images, averaging where they overlap."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icseg_kernels import backend as backends
from icseg_kernels import flops
from icseg_kernels.patches import reference
from icseg_kernels.patches.coords import check_coords, check_integer


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
        patches: [B, K, C, p, p] floating-point, any strides.
        coords: [B, K, 2] integer (y, x) of each patch's top-left corner. What lies outside the image is
            dropped; a patch wholly outside contributes nothing. A patch given twice counts twice.
        size: (H, W) of the images.
        weight: of a pixel by its place in the patch. None: all equal. "gaussian": `gaussian_weight(p)`.
            A tensor [p, p], not negative; where it is 0 the patch covers nothing. It gets no gradient.
        fill: the value where no patch lies.
        backend: see `icseg_kernels.backend`.

    Returns:
        Scatter(mean [B, C, H, W] in the dtype of `patches`, coverage [B, 1, H, W] bool). Sums are taken in
        the order of K, with any number of threads, in float32 for the 16-bit types. Autocast changes nothing.

    Once differentiable with respect to `patches`.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device.
        BackendError: the named backend cannot serve the call.
    """
    if patches.ndim != 5 or patches.shape[-1] != patches.shape[-2]:
        raise ValueError(f"patches must have shape [B, K, C, p, p], got {list(patches.shape)}")
    if not patches.dtype.is_floating_point:
        raise TypeError(f"patches must be a floating-point tensor, got {patches.dtype}")
    check_coords(coords, (*patches.shape[:2], 2), "[B, K, 2]", patches.device)
    check_integer(coords, "")
    height, width = size
    if height < 0 or width < 0:
        raise ValueError(f"size must be (height, width), neither negative, got {tuple(size)}")
    name = backends.select("scatter_patches", backend, patches)
    mean, total = _ScatterPatches.apply(
        patches, coords, _weight(weight, patches), height, width, float(fill), name
    )
    return Scatter(mean, total > 0)


def gaussian_weight(
    patch_size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """[p, p] Gaussian of sigma p / 8 about the patch's centre (p - 1) / 2, 1 at the centre, never below 1e-3.

    The importance map of sliding-window inference (nnU-Net, Isensee et al. 2021). The floor keeps the mean
    well defined in the corners.
    """
    offset = torch.arange(patch_size, dtype=dtype, device=device) - (patch_size - 1) / 2
    line = torch.exp(-0.5 * (offset / (patch_size / 8)) ** 2)
    return (line[:, None] * line).clamp(min=1e-3)


def _weight(weight: str | Tensor | None, patches: Tensor) -> Tensor:
    """The weight as a tensor [p, p] in the dtype of the sums."""
    patch_size, dtype = patches.shape[-1], reference.accumulation_dtype(patches.dtype)
    if weight is None:
        return torch.ones(patch_size, patch_size, dtype=dtype, device=patches.device)
    if isinstance(weight, str):
        if weight != "gaussian":
            raise ValueError(f'weight must be None, "gaussian" or a tensor, got {weight!r}')
        return gaussian_weight(patch_size, dtype=dtype, device=patches.device)
    if tuple(weight.shape) != (patch_size, patch_size):
        raise ValueError(f"weight must have shape [p, p] with p = {patch_size}, got {list(weight.shape)}")
    return weight.detach().to(device=patches.device, dtype=dtype)


class _ScatterPatches(torch.autograd.Function):
    @staticmethod
    def forward(
        patches: Tensor, coords: Tensor, weight: Tensor, height: int, width: int, fill: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        return _scatter(patches, coords, weight, height, width, fill, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, coords, weight, *_, ctx.backend = inputs
        _mean, total = output
        ctx.mark_non_differentiable(total)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(coords, weight, total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        coords, weight, total = ctx.saved_tensors
        found = None if grad is None else _scatter_backward(grad, total, coords, weight, ctx.backend)
        return found, *(None,) * 6


def _scatter_implementation(
    patches: Tensor, coords: Tensor, weight: Tensor, height: int, width: int, fill: float, backend: str
) -> tuple[Tensor, Tensor]:
    return reference.scatter(patches, coords, weight, height, width, fill)


def _scatter_fake(
    patches: Tensor, coords: Tensor, weight: Tensor, height: int, width: int, fill: float, backend: str
) -> tuple[Tensor, Tensor]:
    batch, channels = patches.shape[0], patches.shape[2]
    return patches.new_empty(batch, channels, height, width), weight.new_empty(batch, 1, height, width)


def _scatter_backward_implementation(
    grad: Tensor, total: Tensor, coords: Tensor, weight: Tensor, backend: str
) -> Tensor:
    return reference.scatter_backward(grad, total, coords, weight)


def _scatter_backward_fake(
    grad: Tensor, total: Tensor, coords: Tensor, weight: Tensor, backend: str
) -> Tensor:
    return grad.new_empty(*coords.shape[:-1], grad.shape[1], *weight.shape)


_scatter = backends.register(
    "scatter_patches(Tensor patches, Tensor coords, Tensor weight, SymInt height, SymInt width, float fill, "
    "str backend) -> (Tensor, Tensor)",
    _scatter_implementation,
    _scatter_fake,
)
_scatter_backward = backends.register(
    "scatter_patches_backward(Tensor grad, Tensor total, Tensor coords, Tensor weight, str backend) "
    "-> Tensor",
    _scatter_backward_implementation,
    _scatter_backward_fake,
)
backends.declare("scatter_patches", {"reference": backends.Backend()})


def _scatter_flops(
    patches: Any, coords: Any, weight: Any, height: int, width: int, *_: Any, out_shape: Any = None
) -> int:
    batch, count, channels, patch_size, _patch_size = patches
    return flops.scatter_patches_flops(batch, count, channels, patch_size, height, width)


def _scatter_backward_flops(grad: Any, *_: Any, out_shape: Any = None) -> int:
    """One division a pixel, one multiplication a patch pixel."""
    return math.prod(grad) + math.prod(out_shape)


flops.register(_scatter, _scatter_flops)
flops.register(_scatter_backward, _scatter_backward_flops)
