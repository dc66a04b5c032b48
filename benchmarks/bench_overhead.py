"""What a call of an op costs where there is next to nothing to compute: checks, dispatch, the way to C++ and back."""

from collections.abc import Callable

import pytest
import torch
from harness import compare

from icseg_kernels import (
    BlockWeights,
    ConvLayer,
    gather_patches,
    group_norm_film,
    gumbel_topk,
    halvings,
    sample_patches,
    scatter_patches,
    selected_attention,
    small_convolutions,
    transformer_block,
    upsample_with_patches,
)
from icseg_kernels.transformer_block.native import shapes

SOURCE = torch.rand(1, 1, 8, 8)
COORDS = torch.zeros(1, 1, 2, dtype=torch.int64)
PATCHES = torch.rand(1, 1, 1, 2, 2)
LOGITS = torch.rand(1, 8)
TOKENS = torch.rand(1, 1, 4, 8)
MAPS, GAIN, BIAS = torch.rand(2, 8, 2, 2), torch.rand(8), torch.rand(8)
LAYERS = [ConvLayer(torch.rand(2, 8, 1, 1), torch.rand(2)), ConvLayer(torch.rand(2, 2, 1, 1))]
BLOCK = BlockWeights(*(torch.rand(shape) / 8 for shape in shapes(8, 8)))
MEMORY = [torch.rand(1, 2, 16)]
INDEX = torch.tensor([[0, 2]])
CALLS: dict[str, Callable[[str], torch.Tensor]] = {
    "gather_patches": lambda backend: gather_patches(SOURCE, COORDS, 2, backend=backend),
    "gather_patches out_size": lambda backend: gather_patches(SOURCE, COORDS, 2, out_size=2, backend=backend),
    "scatter_patches": lambda backend: scatter_patches(PATCHES, COORDS, (8, 8), backend=backend).mean,
    "gumbel_topk": lambda backend: gumbel_topk(LOGITS, 2, seed=1, backend=backend).scores,
    "sample_patches": lambda backend: sample_patches(SOURCE, 2, 2, seed=1, backend=backend).scores,
    "selected_attention index": lambda backend: selected_attention(
        TOKENS, TOKENS, TOKENS, index=INDEX, backend=backend
    ),
    "selected_attention": lambda backend: selected_attention(TOKENS, TOKENS, TOKENS, backend=backend),
    "group_norm_film": lambda backend: group_norm_film(MAPS, 4, GAIN, BIAS, activation="gelu", backend=backend),
    "small_convolutions": lambda backend: small_convolutions(MAPS, LAYERS, backend=backend),
    "transformer_block": lambda backend: transformer_block(TOKENS[0], MEMORY, BLOCK, heads=2, backend=backend)[0],
    "halvings": lambda backend: halvings(SOURCE, 1, backend=backend)[0][0],
    "upsample_with_patches": lambda backend: upsample_with_patches(SOURCE, PATCHES, COORDS, (16, 16), backend=backend),
}


@pytest.mark.quick(op="gather_patches")
@pytest.mark.quick(op="selected_attention")
@pytest.mark.parametrize("op", CALLS)
def bench_overhead(record, op):
    rivals = {backend: lambda backend=backend: CALLS[op](backend) for backend in ("reference", "native")}
    row = compare("overhead", op, rivals, threads=1, repeats=200, tolerance=1e-5)
    record(row, rivals["native"])
