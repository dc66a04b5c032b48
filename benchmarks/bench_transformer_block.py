"""transformer_block: C++ against torch's layers and attention, one after the other; also compiled."""

import pytest
import torch
import torch.nn.functional as F
from harness import compare, compiled, thread_counts

from icseg_kernels import BlockWeights, flops, transformer_block
from icseg_kernels.transformer_block.native import shapes

DIM, HEADS, HIDDEN = 128, 4, 256
# Samples, tokens of each, tokens of every piece of memory: a target's patches, then a support set's.
CASES = [
    (1, 6, [52]),
    (1, 20, [120, 10, 20]),
    (1, 60, [180, 10, 20, 40]),
    (1, 150, []),
    (4, 100, []),
    (16, 52, []),
]


def by_hand(tokens: torch.Tensor, memory: list[torch.Tensor], b: BlockWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """What one writes without the op."""
    batch, count, dim = tokens.shape
    x = F.layer_norm(tokens, (dim,), b.norm_attention_weight, b.norm_attention_bias, b.eps)
    own = F.linear(x, b.key_value_weight, b.key_value_bias)
    q = F.linear(x, b.query_weight, b.query_bias).view(batch, count, HEADS, -1).transpose(1, 2)
    pairs = torch.cat([*memory, own], 1) if memory else own
    k, v = pairs.view(batch, -1, 2, HEADS, dim // HEADS).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, dim)
    tokens = tokens + F.linear(attended, b.out_weight, b.out_bias)
    x = F.layer_norm(tokens, (dim,), b.norm_mlp_weight, b.norm_mlp_bias, b.eps)
    x = F.gelu(F.linear(x, b.mlp_in_weight, b.mlp_in_bias))
    return tokens + F.linear(x, b.mlp_out_weight, b.mlp_out_bias), own


COMPILED = compiled(by_hand, dynamic=True)


@pytest.mark.quick(count=60)
@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize(("batch", "count", "pieces"), CASES)
def bench_transformer_block(record, batch, count, pieces, threads):
    generator = torch.Generator().manual_seed(0)
    block = BlockWeights(*(torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes(DIM, HIDDEN)))
    tokens = torch.randn(batch, count, DIM, generator=generator)
    memory = [torch.randn(batch, n, 2 * DIM, generator=generator) for n in pieces]
    runs = {
        "torch": lambda: by_hand(tokens, memory, block),
        "torch.compile": lambda: COMPILED(tokens, memory, block),
        "reference": lambda: transformer_block(tokens, memory, block, heads=HEADS, backend="reference"),
        "native": lambda: transformer_block(tokens, memory, block, heads=HEADS, backend="native"),
    }
    work = flops.transformer_block_flops(batch, count, sum(pieces) + count, DIM, HIDDEN)
    least = flops.transformer_block_bytes(batch, count, sum(pieces), DIM, HIDDEN)
    case = f"B{batch} N{count} memory {sum(pieces)} in {len(pieces)}"
    with torch.no_grad():
        row = compare(
            "transformer_block",
            case,
            runs,
            threads=threads,
            tolerance=1e-4,
            flops=dict.fromkeys(runs, work),
            bytes=least,
        )
        record(row, runs["native"])
