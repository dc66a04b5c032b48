"""upsample_with_patches by a Triton kernel, in one launch, without gradients."""

from __future__ import annotations

from torch import Tensor

from icseg_kernels import triton_launch
from icseg_kernels.backend import without_gradients
from icseg_kernels.patches.gather_triton import corners


def unsupported(coarser: Tensor, patches: Tensor) -> list[str]:
    """Why the kernel cannot double `coarser`."""
    return [
        *triton_launch.unsupported_device("coarser", coarser),
        *triton_launch.unsupported_dtype("coarser", coarser),
        *without_gradients("coarser or patches", (coarser, patches)),
    ]


def upsample_with_patches(coarser: Tensor, patches: Tensor, coords: Tensor, height: int, width: int) -> Tensor:
    """As `reference.upsample_with_patches`. A map and patches of any strides."""
    from icseg_kernels.patches import gather_triton_kernels as shared
    from icseg_kernels.patches import upsample_triton_kernels as kernels

    batch, channels, low_height, low_width = coarser.shape
    patch_batch, count, patch_channels, patch_height, patch_width = patches.shape
    if (patch_batch, patch_channels) != (batch, channels) or patches.dtype != coarser.dtype:
        raise ValueError(
            "upsample_with_patches needs coarser [B, C, h, w] and patches [B, K, C, p, q] of one dtype, got "
            f"{list(coarser.shape)} of {coarser.dtype}, {list(patches.shape)} of {patches.dtype}"
        )
    coords, _ = corners(coords, (batch,), count)
    out = coarser.new_empty((batch, channels, height, width))
    align, blocks = shared.alignment(width), shared.tile_blocks(channels)
    triton_launch.launch(
        kernels.upsample_kernel,
        (shared.tile_programs(batch, channels, height, width, blocks),),
        coarser.device,
        coarser,
        patches,
        coords,
        out,
        channels,
        low_height,
        low_width,
        height,
        width // align,
        count,
        patch_height,
        patch_width,
        *coarser.stride(),
        *patches.stride(),
        ACCUMULATE=shared.accumulation(coarser.dtype),
        ALIGN=align,
        enable_fp_fusion=False,
        **blocks,
    )
    return out
