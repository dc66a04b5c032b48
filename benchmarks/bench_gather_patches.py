"""gather_patches: C++ against the reference, what one writes in plain PyTorch, and torch.compile of that.

Copies of p x p patches, and patches resampled to p x p samples; forward, and forward + backward.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from harness import Run, compare, compiled, thread_counts, with_backward

from icseg_kernels import flops, gather_patches

CASES = [  # B, C, image side, K, p
    (1, 1, 128, 16, 8),
    (1, 2, 256, 64, 16),
    (4, 4, 512, 64, 8),
    (4, 4, 512, 256, 16),
    (1, 1, 1024, 16, 16),
    (4, 4, 1024, 256, 16),
    (4, 64, 128, 256, 16),
]
RESAMPLED = [CASES[0], CASES[1], CASES[3]]


def advanced_indexing(source: torch.Tensor, coords: torch.Tensor, p: int) -> torch.Tensor:
    """What one writes without the op, for patches that lie inside."""
    batch = torch.arange(source.shape[0])[:, None, None, None]
    rows = (coords[..., 0, None] + torch.arange(p))[..., :, None]
    columns = (coords[..., 1, None] + torch.arange(p))[..., None, :]
    return source[batch, :, rows, columns].permute(0, 1, 4, 2, 3)


def grid_sample(source: torch.Tensor, coords: torch.Tensor, extent: float, n: int) -> torch.Tensor:
    """What one writes without the op: all patches of an image as one grid, n x n samples each."""
    cell = (torch.arange(n) + 0.5) * extent / n
    y, x = ((coords[..., axis, None] + cell) / source.shape[2 + axis] * 2 - 1 for axis in (0, 1))
    points = torch.stack(torch.broadcast_tensors(x[..., None, :], y[..., :, None]), -1)  # [B, K, n, n, 2]
    samples = F.grid_sample(source, points.flatten(1, 2), padding_mode="border", align_corners=False)
    return samples.unflatten(2, (-1, n)).movedim(2, 1).contiguous()


COMPILED = {advanced_indexing: compiled(advanced_indexing), grid_sample: compiled(grid_sample)}


def inputs(
    batch: int, channels: int, side: int, count: int, p: int, backward: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(batch, channels, side, side, generator=generator).requires_grad_(backward)
    return source, torch.randint(0, side - p + 1, (batch, count, 2), generator=generator, dtype=torch.int32)


def least_traffic(batch: int, channels: int, side: int, count: int, p: int, extent: float, backward: bool) -> int:
    """Bytes of patches cut; with their gradient, also the patches' gradients read and the images' written."""
    copied = flops.gather_patches_bytes(batch, count, channels, math.ceil(extent), p)
    return copied + backward * 4 * batch * channels * (count * p * p + side * side)


@pytest.mark.quick(case=CASES[1], work="forward")
@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize("work", ["forward", "forward + backward"])
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_gather_patches(record, case, work, threads):
    *_, p = case
    backward = work != "forward"
    source, coords = inputs(*case, backward)
    ways = {
        "reference": lambda x: gather_patches(x, coords, p, backend="reference"),
        "advanced indexing": lambda x: advanced_indexing(x, coords, p),
        "advanced indexing, compiled": lambda x: COMPILED[advanced_indexing](x, coords, p),
        "native": lambda x: gather_patches(x, coords, p, backend="native"),
    }
    keep(record, "gather_patches", case, work, threads, ways, source, p, 1e-4 if backward else 0.0)


@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize("work", ["forward", "forward + backward"])
@pytest.mark.parametrize("case", RESAMPLED, ids=str)
def bench_gather_patches_resampled(record, case, work, threads):
    *_, p = case
    source, coords = inputs(*case, work != "forward")
    extent = 1.25 * p
    ways = {
        "reference": lambda x: gather_patches(x, coords, extent, out_size=p, backend="reference"),
        "grid_sample": lambda x: grid_sample(x, coords, extent, p),
        "grid_sample, compiled": lambda x: COMPILED[grid_sample](x, coords, extent, p),
        "native": lambda x: gather_patches(x, coords, extent, out_size=p, backend="native"),
    }
    keep(record, "gather_patches, resampled", case, work, threads, ways, source, extent, 1e-3)


def keep(record, subject, case, work, threads, ways, source, extent, tolerance):
    batch, channels, side, count, p = case
    backward = work != "forward"
    rivals: dict[str, Run] = {
        name: with_backward(way, source) if backward else (lambda way=way: way(source)) for name, way in ways.items()
    }
    name = f"B{batch} C{channels} {side} px K{count} p{p}"
    traffic = least_traffic(*case, extent, backward)
    row = compare(subject, name, rivals, work=work, threads=threads, bytes=traffic, tolerance=tolerance)
    record(row, rivals["native"])
