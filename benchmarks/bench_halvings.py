"""halvings: C++ against slices and additions, and against pooling."""

import pytest
import torch
import torch.nn.functional as F
from harness import compare, compiled, thread_counts

from icseg_kernels import flops, halvings

CASES = [(1, 128), (4, 256), (1, 512), (1, 1024)]


def sliced(image: torch.Tensor, count: int, deviations: int) -> list[torch.Tensor]:
    """What one writes without the op, for even sizes."""
    means, spreads, mean, square = [], [], image, image * image
    for level in range(count):
        mean, square = (quarter_sums(x) * 0.25 for x in (mean, square))
        means.append(mean)
        if level < deviations:
            spreads.append((square - mean * mean).clamp_min(1e-12).sqrt())
    return means + spreads


def quarter_sums(x: torch.Tensor) -> torch.Tensor:
    columns = x[..., ::2, :] + x[..., 1::2, :]
    return columns[..., ::2] + columns[..., 1::2]


def pooled(image: torch.Tensor, count: int, deviations: int) -> list[torch.Tensor]:
    means, spreads, mean, square = [], [], image, image * image
    for level in range(count):
        mean, square = F.avg_pool2d(mean, 2), F.avg_pool2d(square, 2)
        means.append(mean)
        if level < deviations:
            spreads.append((square - mean * mean).clamp_min(1e-12).sqrt())
    return means + spreads


def flat(means: list[torch.Tensor], deviations: list[torch.Tensor]) -> list[torch.Tensor]:
    return means + deviations


pooled_compiled = compiled(pooled, dynamic=False)


@pytest.mark.quick(side=512, deviating=True)
@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize("deviating", [True, False])
@pytest.mark.parametrize(("batch", "side"), CASES)
def bench_halvings(record, side, batch, deviating, threads):
    image = torch.rand(batch, 1, side, side, generator=torch.Generator().manual_seed(0))
    count = side.bit_length() - 4  # down to 8 pixels
    deviations = count - 2 if deviating else 0
    runs = {
        "torch, slices": lambda: sliced(image, count, deviations),
        "torch, avg_pool2d": lambda: pooled(image, count, deviations),
        "torch, compiled": lambda: pooled_compiled(image, count, deviations),
        "native": lambda: flat(*halvings(image, count, deviations=deviations, backend="native")),
    }
    least = flops.halvings_bytes(batch, 1, side, side, count, deviations)
    case = f"B{batch} {side} px, {count} halvings, {deviations} deviations"
    with torch.no_grad():
        row = compare("halvings", case, runs, threads=threads, tolerance=1e-4, bytes=least)
        record(row, runs["native"])
