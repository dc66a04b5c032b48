"""upsample_with_patches: a map at twice its size, with patches in place of what lies under them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from icseg_kernels import backend as backends
from icseg_kernels import checks, flops, library, triton_launch
from icseg_kernels.patches import reference, upsample_native, upsample_triton
from icseg_kernels.patches.coords import check_coords, check_integer

_IMPLEMENTATIONS: dict[str, Any] = {"triton": upsample_triton, "native": upsample_native}


def upsample_with_patches(
    coarser: Tensor, patches: Tensor, coords: Tensor, size: tuple[int, int], *, backend: str | None = None
) -> Tensor:
    """Double a map bilinearly and put patches in its place where they lie.

    coarser: [B, C, h, w] float16, bfloat16, float32 or float64, any strides; C, h, w > 0.
    patches: [B, K, C, p, q] of the dtype of `coarser`, p and q at least 1, any strides.
    coords:  [B, K, 2] integer (y, x) of each patch's top-left corner, on the device of `coarser`. What lies outside the
             map is dropped; a patch wholly outside writes nothing. Where patches overlap, the last one is seen.
    size:    (H, W) of the result: 2h or 2h - 1, and 2w or 2w - 1.
    backend: None, "triton" (on CUDA devices, not float64, no gradients), "native" (float32 on the CPU, no gradients) or
             "reference". Equal up to rounding.
    Returns [B, C, H, W], contiguous: F.interpolate(coarser, scale_factor=2, mode="bilinear", align_corners=False), cut
    to `size`, with the patches written over it. Differentiable with respect to `coarser` and `patches`; if a gradient
    is wanted, the reference serves. Autocast changes nothing. Raises TypeError or ValueError for an argument of another
    type, dtype, shape or device, BackendError if the named backend cannot serve.

    ```
    coarser = torch.tensor([[[[0.0, 4.0]]]])
    patches = torch.full((1, 1, 1, 2, 2), 9.0)
    upsample_with_patches(coarser, patches, torch.tensor([[[1, 2]]]), (2, 4))   # [[[[0, 1, 3, 4], [0, 1, 9, 9]]]]
    ```
    """
    checks.floating("coarser", coarser)
    checks.floating("patches", patches)
    shape, patch = coarser.shape, patches.shape
    if len(shape) != 4 or 0 in shape[1:]:
        raise ValueError(f"coarser must have shape [B, C, h, w] with C, h, w > 0, got {list(shape)}")
    checks.device("patches", patches, coarser.device)
    if patches.dtype != coarser.dtype:
        raise TypeError(f"patches must have the dtype of coarser, {coarser.dtype}, got {patches.dtype}")
    if len(patch) != 5 or patch[0] != shape[0] or patch[2] != shape[1] or 0 in patch[3:]:
        raise ValueError(f"patches must have shape [{shape[0]}, K, {shape[1]}, p, q] with p, q > 0, got {list(patch)}")
    check_coords(coords, (patch[0], patch[1], 2), "[B, K, 2]", coarser.device)
    check_integer(coords, "")
    height, width = checks.pair("size", size, 1)
    if (height + 1) // 2 != shape[2] or (width + 1) // 2 != shape[3]:
        raise ValueError(f"size must be twice that of coarser, {[*shape[2:]]}, or one less, got {[height, width]}")
    name = backends.select("upsample_with_patches", backend, coarser, patches)
    if name == "reference":
        return reference.upsample_with_patches(coarser, patches, coords, height, width)
    if backends.unwatched((coarser, patches, coords)):
        return _implementation(coarser, patches, coords, height, width, name)
    return _upsample(coarser, patches, coords, height, width, name)


def _implementation(coarser: Tensor, patches: Tensor, coords: Tensor, height: int, width: int, backend: str) -> Tensor:
    return _IMPLEMENTATIONS[backend].upsample_with_patches(coarser, patches, coords, height, width)


def _fake(coarser: Tensor, patches: Tensor, coords: Tensor, height: int, width: int, backend: str) -> Tensor:
    return coarser.new_empty((*coarser.shape[:2], height, width))


_upsample = backends.register(
    "upsample_with_patches(Tensor coarser, Tensor patches, Tensor coords, SymInt height, SymInt width, str backend) "
    "-> Tensor",
    _implementation,
    _fake,
)
backends.declare(
    "upsample_with_patches",
    {
        "triton": backends.Backend(triton_launch.missing, upsample_triton.unsupported, triton_launch.slower),
        "native": backends.Backend(library.missing, upsample_native.unsupported),
        "reference": backends.Backend(),
    },
)


def _no_flops(*_: Any, **__: Any) -> int:
    return 0


flops.register(_upsample, _no_flops)
