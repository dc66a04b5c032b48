"""scatter_patches by Triton kernels: one launch each way. Equal to the reference bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from icseg_kernels import triton_launch
from icseg_kernels.numerics import accumulation_dtype
from icseg_kernels.patches.gather_triton import corners, doubles


def unsupported(patches: Tensor) -> list[str]:
    """Why the kernels cannot write `patches` into images."""
    return triton_launch.unsupported_device("patches", patches) + triton_launch.unsupported_dtype("patches", patches)


def scatter(
    patches: Tensor,
    coords: Tensor,
    weight: Tensor | None,
    fill: float | Tensor,
    height: int,
    width: int,
    keep_total: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.scatter`. Patches of any strides."""
    from icseg_kernels.patches import scatter_triton_kernels as kernels
    from icseg_kernels.patches.gather_triton_kernels import accumulation, alignment, tile_blocks, tile_programs

    batch, count, channels, patch_size, patch_width = patches.shape
    sums = accumulation_dtype(patches.dtype)
    if patch_width != patch_size or not _is_table(weight, patch_size, sums):
        shape = None if weight is None else list(weight.shape)
        raise ValueError(
            f"scatter_patches needs patches [B, K, C, p, p] and weight [p, p] of {sums}, got {list(patches.shape)} "
            f"and {shape}"
        )
    coords, _ = corners(coords, (batch,), count)
    mean = patches.new_empty((batch, channels, height, width))
    total = patches.new_empty((batch, 1, height, width) if keep_total else 0, dtype=sums)
    coverage = patches.new_empty((batch, 1, height, width), dtype=torch.bool)
    value, fill_in_memory = doubles(patches.device, fill)
    align, blocks = alignment(width), tile_blocks(channels)
    triton_launch.launch(
        kernels.scatter_kernel,
        (tile_programs(batch, channels, height, width, blocks),),
        patches.device,
        patches,
        coords,
        None if weight is None else weight.contiguous(),
        value,
        mean,
        total if keep_total else None,
        coverage.view(torch.int8),
        channels,
        height,
        width // align,
        count,
        patch_size,
        *patches.stride(),
        WEIGHTED=weight is not None,
        FILL_IN_MEMORY=fill_in_memory,
        KEEP_TOTAL=keep_total,
        ACCUMULATE=accumulation(patches.dtype),
        ALIGN=align,
        enable_fp_fusion=False,
        **blocks,
    )
    return mean, total, coverage


def scatter_backward(grad: Tensor, total: Tensor, coords: Tensor, weight: Tensor | None, patch_size: int) -> Tensor:
    """As `reference.scatter_backward`. Gradients of any strides."""
    from icseg_kernels.patches import scatter_triton_kernels as kernels
    from icseg_kernels.patches.gather_triton_kernels import accumulation, alignment, patch_blocks, patch_programs

    batch, channels, height, width = grad.shape
    sums = accumulation_dtype(grad.dtype)
    if total.shape != (batch, 1, height, width) or total.dtype != sums or not _is_table(weight, patch_size, sums):
        shape = None if weight is None else list(weight.shape)
        raise ValueError(
            f"the gradient of scatter_patches needs grad [B, C, H, W], total [B, 1, H, W] and weight [p, p] of {sums}, "
            f"got {list(grad.shape)}, {list(total.shape)} of {total.dtype}, {shape}"
        )
    coords, count = corners(coords, (batch,))
    patches = grad.new_empty((batch, count, channels, patch_size, patch_size))
    align, blocks = alignment(patch_size), patch_blocks(channels, patch_size)
    triton_launch.launch(
        kernels.scatter_backward_kernel,
        (patch_programs(batch * count, channels, patch_size, blocks),),
        grad.device,
        grad,
        total.contiguous(),
        coords,
        None if weight is None else weight.contiguous(),
        patches,
        channels,
        height,
        width,
        count,
        patch_size // align,
        *grad.stride(),
        WEIGHTED=weight is not None,
        ACCUMULATE=accumulation(grad.dtype),
        ALIGN=align,
        enable_fp_fusion=False,
        **blocks,
    )
    return patches


def _is_table(weight: Tensor | None, patch_size: int, dtype: torch.dtype) -> bool:
    return weight is None or (weight.shape == (patch_size, patch_size) and weight.dtype == dtype)
