"""scatter_patches by Triton kernels: one launch each way.

Equal to the reference bit for bit; with Gaussian weights, which the kernels compute, up to rounding.
"""

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
    weight: Tensor | str | None,
    fill: float | Tensor,
    height: int,
    width: int,
    keep_total: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.scatter`; weight may also be "gaussian". Patches of any strides."""
    from icseg_kernels.patches import scatter_triton_kernels as kernels
    from icseg_kernels.patches.gather_triton_kernels import accumulation, alignment, tile_blocks, tile_programs

    batch, count, channels, patch_size, patch_width = patches.shape
    sums = accumulation_dtype(patches.dtype)
    table, kind = _table(weight, patch_size, sums)
    if patch_width != patch_size:
        raise ValueError(f"scatter_patches needs patches [B, K, C, p, p], got {list(patches.shape)}")
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
        table,
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
        WEIGHT=kind,
        FILL_IN_MEMORY=fill_in_memory,
        KEEP_TOTAL=keep_total,
        ACCUMULATE=accumulation(patches.dtype),
        ALIGN=align,
        enable_fp_fusion=False,
        **blocks,
    )
    return mean, total, coverage


def scatter_backward(
    grad: Tensor, total: Tensor, coords: Tensor, weight: Tensor | str | None, patch_size: int
) -> Tensor:
    """As `reference.scatter_backward`; weight may also be "gaussian". Gradients of any strides."""
    from icseg_kernels.patches import scatter_triton_kernels as kernels
    from icseg_kernels.patches.gather_triton_kernels import accumulation, alignment, patch_blocks, patch_programs

    batch, channels, height, width = grad.shape
    sums = accumulation_dtype(grad.dtype)
    table, kind = _table(weight, patch_size, sums)
    if total.shape != (batch, 1, height, width) or total.dtype != sums:
        raise ValueError(
            f"the gradient of scatter_patches needs total {[batch, 1, height, width]} of {sums}, got "
            f"{list(total.shape)} of {total.dtype}"
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
        table,
        patches,
        channels,
        height,
        width,
        count,
        patch_size // align,
        *grad.stride(),
        WEIGHT=kind,
        ACCUMULATE=accumulation(grad.dtype),
        ALIGN=align,
        enable_fp_fusion=False,
        **blocks,
    )
    return patches


def _table(weight: Tensor | str | None, patch_size: int, dtype: torch.dtype) -> tuple[Tensor | None, str]:
    """What a kernel takes for `weight`: a table or None, and which of them is meant."""
    if weight is None or isinstance(weight, str):
        return None, weight or "none"
    if weight.shape != (patch_size, patch_size) or weight.dtype != dtype:
        raise ValueError(
            f"scatter_patches needs weight {[patch_size] * 2} of {dtype}, got {list(weight.shape)} of {weight.dtype}"
        )
    return weight.contiguous(), "table"
