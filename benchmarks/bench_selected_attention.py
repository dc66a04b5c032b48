"""selected_attention: C++ against torch's attentions, over all keys, over rows gathered first, and after a rotation."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import compare, compiled, thread_counts, with_backward
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from icseg_kernels import Rotation, flops, selected_attention
from icseg_kernels.attention.reference import turned

DENSE = [  # B, h, Nq, Nk, D
    (1, 4, 60, 60, 64),
    (1, 4, 256, 256, 64),
    (4, 4, 256, 256, 32),
    (1, 4, 1024, 1024, 64),
    (1, 4, 2560, 1152, 16),  # label propagation
    (1, 4, 320, 320, 32),  # blocks of the sparse model
]
SELECTED = [(1, 4, 60, 60, 64), (1, 4, 256, 256, 32), (4, 4, 256, 256, 64), (1, 4, 1024, 1024, 64)]


def tokens(b: int, h: int, nq: int, nk: int, d: int, *, gradients: bool) -> list[Tensor]:
    """Heads split from [B, N, h * D], as projections give them."""
    generator = torch.Generator().manual_seed(0)
    split = [torch.randn(b, n, h, d, generator=generator).transpose(1, 2) for n in (nq, nk, nk)]
    return [t.requires_grad_(gradients) for t in split]


def gathered(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    """What one writes without the op."""
    if len(index) == 1:
        return F.scaled_dot_product_attention(q, k.index_select(2, index[0]), v.index_select(2, index[0]))
    rows = index[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    return F.scaled_dot_product_attention(q, k.gather(2, rows), v.gather(2, rows))


compiled_gathered = compiled(gathered, dynamic=False)


def turned_then_sdpa(q: Tensor, k: Tensor, v: Tensor, turn: Rotation) -> Tensor:
    return F.scaled_dot_product_attention(turned(q, *turn), turned(k, *turn), v)


compiled_turned_then_sdpa = compiled(turned_then_sdpa, dynamic=False)


FLEX = "FlexAttention, compiled"
FORWARD_ALONE = {FLEX: "torch's FlexAttention has no backward on CPUs"}
compiled_flex = torch.compile(flex_attention, dynamic=False)  # of as many threads as at compilation


def mask_of(index: Tensor, queries: int, keys: int) -> BlockMask:
    """FlexAttention's form of a list of keys of each sample."""
    listed = torch.zeros(len(index), keys, dtype=torch.bool).scatter_(1, index, True)

    def is_listed(b: Tensor, _h: Tensor, _q: Tensor, k: Tensor) -> Tensor:
        return listed[b, k]

    return create_block_mask(is_listed, len(index), None, queries, keys, device="cpu")


def rivals_of(
    gradients: bool, inputs: list[Tensor], rivals: dict[str, Callable[..., Tensor]]
) -> dict[str, Callable[[], Tensor | list[Tensor]]]:
    if gradients:
        return {name: with_backward(run, *inputs) for name, run in rivals.items()}
    return {name: lambda run=run: run(*inputs) for name, run in rivals.items()}


def work_of(gradients: bool) -> str:
    return "forward + backward" if gradients else "forward"


@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("b", "h", "nq", "nk", "d"), DENSE)
def bench_all_keys(record, b, h, nq, nk, d, gradients, threads):
    inputs = tokens(b, h, nq, nk, d, gradients=gradients)
    rivals = {
        "SDPA": F.scaled_dot_product_attention,
        **({} if gradients else {FLEX: compiled_flex}),
        "native": lambda q, k, v: selected_attention(q, k, v, backend="native"),
        "chosen": lambda q, k, v: selected_attention(q, k, v),
    }
    rivals = rivals_of(gradients, inputs, rivals)
    case = f"all keys B{b} h{h} Nq{nq} Nk{nk} D{d}"
    count = flops.selected_attention_flops(b, h, nq * nk, d, d)
    row = compare(
        "selected_attention",
        case,
        rivals,
        tolerance=1e-4,
        work=work_of(gradients),
        threads=threads,
        flops={} if gradients else dict.fromkeys(rivals, count),
        bytes=0 if gradients else flops.selected_attention_bytes(b, h, nq, nk, d, d),
        left_out=FORWARD_ALONE if gradients else {},
    )
    record(row, rivals["native"])


@pytest.mark.quick(b=1, nq=256, gradients=False)
@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("b", "h", "nq", "nk", "d"), SELECTED)
def bench_half_of_the_keys(record, b, h, nq, nk, d, gradients, threads):
    """FlexAttention has its mask made before; it spares whole blocks of keys, of which a random half has none."""
    inputs = tokens(b, h, nq, nk, d, gradients=gradients)
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(nk, generator=generator)[: nk // 2] for _ in range(b)])
    rivals = {
        "SDPA over gathered rows": lambda q, k, v: gathered(q, k, v, index),
        "compiled": lambda q, k, v: compiled_gathered(q, k, v, index),
        **({} if gradients else {FLEX: functools.partial(compiled_flex, block_mask=mask_of(index, nq, nk))}),
        "reference": lambda q, k, v: selected_attention(q, k, v, index=index, backend="reference"),
        "native": lambda q, k, v: selected_attention(q, k, v, index=index, backend="native"),
    }
    rivals = rivals_of(gradients, inputs, rivals)
    case = f"half of the keys B{b} h{h} Nq{nq} Nk{nk} D{d}"
    count = flops.selected_attention_flops(b, h, nq * (nk // 2), d, d)
    row = compare(
        "selected_attention",
        case,
        rivals,
        tolerance=1e-4,
        work=work_of(gradients),
        threads=threads,
        flops={} if gradients else dict.fromkeys(rivals, count),
        bytes=0 if gradients else flops.selected_attention_bytes(b, h, nq, nk // 2, d, d),
        left_out=FORWARD_ALONE if gradients else {},
    )
    record(row, rivals["native"])


@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("b", "h", "n", "d"), [(1, 4, 256, 64), (4, 4, 256, 64)])
def bench_rotary(record, b, h, n, d, gradients, threads):
    inputs = tokens(b, h, n, n, d, gradients=gradients)
    angles = torch.randn(b, n, h, d // 2, generator=torch.Generator().manual_seed(2)).transpose(1, 2)
    turn = Rotation(angles.cos(), angles.sin())
    rivals = {
        "turned, then SDPA": lambda q, k, v: turned_then_sdpa(q, k, v, turn),
        "compiled": lambda q, k, v: compiled_turned_then_sdpa(q, k, v, turn),
        "native": lambda q, k, v: selected_attention(q, k, v, rotary=(turn, turn), backend="native"),
    }
    rivals = rivals_of(gradients, inputs, rivals)
    case = f"rotary B{b} h{h} N{n} D{d}"
    row = compare("selected_attention", case, rivals, tolerance=1e-4, work=work_of(gradients), threads=threads)
    record(row, rivals["native"])
