"""gather_patches: C++ against the reference and against advanced indexing, exact copies of p x p patches."""

import pytest
import torch
from harness import compare

from icseg_kernels import gather_patches

CASES = [  # B, C, image side, K, p
    (1, 2, 256, 48, 16),
    (4, 2, 256, 48, 16),
    (4, 4, 512, 64, 8),
    (4, 4, 1024, 256, 16),
]


def advanced_indexing(source: torch.Tensor, coords: torch.Tensor, p: int) -> torch.Tensor:
    """What one writes without the op, for patches that lie inside."""
    batch = torch.arange(source.shape[0])[:, None, None, None]
    rows = (coords[..., 0, None] + torch.arange(p))[..., :, None]
    columns = (coords[..., 1, None] + torch.arange(p))[..., None, :]
    return source[batch, :, rows, columns].permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize(("batch", "channels", "side", "count", "p"), CASES)
def bench_gather_patches(record, batch, channels, side, count, p):
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(batch, channels, side, side, generator=generator)
    coords = torch.randint(0, side - p + 1, (batch, count, 2), generator=generator)
    rivals = {
        "reference": lambda: gather_patches(source, coords, p, backend="reference"),
        "advanced indexing": lambda: advanced_indexing(source, coords, p),
        "native": lambda: gather_patches(source, coords, p, backend="native"),
    }
    case = f"B{batch} C{channels} {side} px K{count} p{p}"
    record(compare("gather_patches", case, rivals, rounds=30, tolerance=0.0), rivals["native"])
