"""scatter_patches: C++ against the reference, against what one writes without the op, and against that compiled."""

import pytest
import torch
from harness import compare, compiled, thread_counts, with_backward
from torch import Tensor

from icseg_kernels import flops, scatter_patches
from icseg_kernels.patches import gaussian_weight

CASES = [  # B, C, image side, K, p, weight
    (1, 1, 128, 16, 16, None),
    (1, 2, 256, 64, 16, "gaussian"),
    (1, 1, 1024, 256, 16, None),
    (4, 4, 1024, 256, 16, "gaussian"),
    (4, 64, 64, 64, 8, None),
]
FILL = -10.0


def by_scatter_add(patches: Tensor, coords: Tensor, weight: Tensor, side: int) -> Tensor:
    """For patches that lie inside: one scatter_add_ of all pixels."""
    batch, count, channels, p, _ = patches.shape
    rows, columns = (coords[..., axis, None] + torch.arange(p) for axis in (0, 1))  # [B, K, p]
    index = (rows[..., :, None] * side + columns[..., None, :]).view(batch, 1, count * p * p)
    values = (patches * weight).movedim(2, 1).reshape(batch, channels, count * p * p)
    weights = weight.expand(batch, count, p, p).reshape(batch, 1, count * p * p)
    sums = patches.new_zeros(batch, channels, side * side).scatter_add_(2, index.expand_as(values), values)
    total = patches.new_zeros(batch, 1, side * side).scatter_add_(2, index, weights)
    return torch.where(total > 0, sums / total, FILL).view(batch, channels, side, side)


def by_slices(patches: Tensor, coords: Tensor, weight: Tensor, side: int) -> Tensor:
    """For patches that lie inside: one after the other."""
    batch, _, channels, p, _ = patches.shape
    sums, total = patches.new_zeros(batch, channels, side, side), patches.new_zeros(batch, 1, side, side)
    weighted = patches * weight
    for b, corners in enumerate(coords.tolist()):
        for k, (y, x) in enumerate(corners):
            sums[b, :, y : y + p, x : x + p] += weighted[b, k]
            total[b, :, y : y + p, x : x + p] += weight
    return torch.where(total > 0, sums / total, FILL)


by_compiled_scatter_add = compiled(by_scatter_add)


@pytest.mark.quick(side=256, work="forward")
@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize("work", ["forward", "forward + backward"])
@pytest.mark.parametrize(("batch", "channels", "side", "count", "p", "weight"), CASES)
def bench_scatter_patches(record, batch, channels, side, count, p, weight, work, threads):
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(batch, count, channels, p, p, generator=generator)
    coords = torch.randint(0, side - p + 1, (batch, count, 2), generator=generator, dtype=torch.int32)
    table = torch.ones(p, p) if weight is None else gaussian_weight(p)

    def by_op(backend: str, patches: Tensor) -> Tensor:
        return scatter_patches(patches, coords, (side, side), weight=weight, fill=FILL, backend=backend).mean

    backward = work != "forward"
    forms = {
        "reference": lambda x: by_op("reference", x),
        "slices": lambda x: by_slices(x, coords, table, side),
        "scatter_add": lambda x: by_scatter_add(x, coords, table, side),
        "compiled scatter_add": lambda x: by_compiled_scatter_add(x, coords, table, side),
        "native": lambda x: by_op("native", x),
    }
    traffic = flops.scatter_patches_bytes(batch, count, channels, p, side, side)
    if backward:
        del forms["slices"]  # a gradient of thousands of slices takes seconds
        patches.requires_grad_()
        # The mean's gradient is read, the patches' written.
        traffic += 4 * batch * channels * (side * side + count * p * p)
    rivals = {
        name: with_backward(form, patches) if backward else (lambda form=form: form(patches))
        for name, form in forms.items()
    }
    row = compare(
        "scatter_patches",
        f"B{batch} C{channels} {side} px K{count} p{p} {weight or 'uniform'}",
        rivals,
        tolerance=1e-5,
        work=work,
        threads=threads,
        bytes=traffic,
        repeats=20 if side <= 128 else 1,
    )
    record(row, rivals["native"])
