"""upsample_with_patches: C++ against torch's interpolation and a write by indices, or by scatter_patches and where."""

import pytest
import torch
import torch.nn.functional as F
from harness import compare, thread_counts

from icseg_kernels import flops, scatter_patches, upsample_with_patches

PATCH = 8
CASES = ((128, 64), (256, 64), (512, 256), (1024, 256), (1024, 1024))  # side, patches


def indexed(coarser: torch.Tensor, patches: torch.Tensor, coords: torch.Tensor, side: int) -> torch.Tensor:
    """What one writes for patches on a grid that are all inside."""
    doubled = F.interpolate(coarser, scale_factor=2.0, mode="bilinear", align_corners=False)
    cells = doubled.view(*doubled.shape[:2], side // PATCH, PATCH, side // PATCH, PATCH)
    batch = torch.arange(len(patches)).unsqueeze(1)
    cells.permute(0, 2, 4, 1, 3, 5)[batch, coords[..., 0] // PATCH, coords[..., 1] // PATCH] = patches
    return doubled


def scattered(coarser: torch.Tensor, patches: torch.Tensor, coords: torch.Tensor, side: int) -> torch.Tensor:
    """What one writes for any that do not overlap."""
    doubled = F.interpolate(coarser, scale_factor=2.0, mode="bilinear", align_corners=False)
    written = scatter_patches(patches, coords, (side, side), fill=0.0)
    return torch.where(written.coverage, written.mean, doubled)


@pytest.mark.quick(side=512, batch=1)
@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("side", "count"), CASES)
def bench_upsample_with_patches(record, side, count, batch, threads):
    generator = torch.Generator().manual_seed(0)
    coarser = torch.randn(batch, 1, side // 2, side // 2, generator=generator)
    patches = torch.randn(batch, count, 1, PATCH, PATCH, generator=generator)
    cells = torch.stack([torch.randperm((side // PATCH) ** 2, generator=generator)[:count] for _ in range(batch)])
    coords = torch.stack([cells // (side // PATCH), cells % (side // PATCH)], -1) * PATCH
    runs = {
        "torch, by indices": lambda: indexed(coarser, patches, coords, side),
        "torch, scatter_patches and where": lambda: scattered(coarser, patches, coords, side),
        "native": lambda: upsample_with_patches(coarser, patches, coords, (side, side), backend="native"),
    }
    least = flops.upsample_with_patches_bytes(batch, count, 1, PATCH**2, side, side)
    with torch.no_grad():
        row = compare(
            "upsample_with_patches", f"B{batch} {side} px K{count}", runs, threads=threads, tolerance=1e-5, bytes=least
        )
        record(row, runs["native"])
