"""What torch.utils.flop_counter and fvcore count for each public op is what its formula says, once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from icseg_kernels import (
    cross_conv2d,
    cross_conv2d_mean,
    flops,
    gather_patches,
    gumbel_topk,
    sample_patches,
    scatter_patches,
    selected_attention,
)

B, H, NQ, NK, D, DV, M = 2, 3, 6, 9, 8, 5, 4


def counted(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def tokens(*, dv: int = DV, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(B, H, n, d, requires_grad=grad) for n, d in ((NQ, D), (NK, D), (NK, dv)))
    return q, k, v


def test_selected_attention_by_hand() -> None:
    """2 x 3 heads, 6 queries of 4 keys: 8 multiply-adds for a score, 5 for a value."""
    assert flops.selected_attention_flops(B, H, NQ * M, D, DV) == 2 * 6 * 24 * (8 + 5)
    assert flops.selected_attention_backward_flops(B, H, NQ * M, D, DV) == 2 * 6 * 24 * (3 * 8 + 2 * 5)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("dv", [D, DV])
@pytest.mark.parametrize(("kv_end", "pairs"), [(None, NQ * NK), (5, NQ * 5), ([(2, 3), (4, 9)], 2 * 3 + 4 * 9), (0, 0)])
def test_selected_attention(kv_end: int | list[tuple[int, int]] | None, pairs: int, dv: int, return_lse: bool) -> None:
    q, k, v = tokens(dv=dv)
    expected = flops.selected_attention_flops(B, H, pairs, D, dv)
    assert counted(lambda: selected_attention(q, k, v, kv_end=kv_end, return_lse=return_lse)) == expected


@pytest.mark.parametrize(("kv_end", "pairs"), [(None, NQ * M), (3, NQ * 3), ([(2, 1), (4, 4)], 2 * 1 + 4 * 4)])
def test_selected_attention_with_index(kv_end: int | list[tuple[int, int]] | None, pairs: int) -> None:
    q, k, v = tokens(grad=True)
    index = torch.randint(-1, NK, (B, M))
    forward = flops.selected_attention_flops(B, H, pairs, D, DV)
    backward = flops.selected_attention_backward_flops(B, H, pairs, D, DV)

    def attend() -> Tensor:
        return selected_attention(q, k, v, index=index, kv_end=kv_end, sink=True)

    assert counted(attend) == forward
    assert counted(lambda: attend().sum().backward()) == forward + backward


def test_selected_attention_backward_as_sdpa() -> None:
    """The CPU's SDPA kernel, which torch leaves out of its own registry."""
    q, k, v = tokens(dv=D, grad=True)
    forward = flops.selected_attention_flops(B, H, NQ * NK, D, D)
    backward = flops.selected_attention_backward_flops(B, H, NQ * NK, D, D)
    assert counted(lambda: selected_attention(q, k, v).sum().backward()) == forward + backward
    assert counted(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward()) == forward + backward


def test_a_sink_is_one_more_key_of_sdpa() -> None:
    q, k, v = tokens(dv=D)
    expected = flops.selected_attention_flops(B, H, NQ * (NK + 1), D, D)
    assert counted(lambda: selected_attention(q, k, v, sink=True, backend="reference")) == expected


@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_cross_conv2d(padding: int | str) -> None:
    x, y, weight = torch.randn(B, 2, 4, 9, 7), torch.randn(B, 3, 5, 9, 7), torch.randn(6, 9, 3, 3)
    out = (7, 5) if padding == 0 else (9, 7)
    formula = flops.cross_conv2d_flops(B, 2, 3, 4, 5, 6, (3, 3), out)
    assert counted(lambda: cross_conv2d(x, y, weight, padding=padding)) == formula
    assert formula == 2 * B * (2 * 4 + 3 * 5) * 6 * 9 * out[0] * out[1]
    formula = flops.cross_conv2d_mean_flops(B, 2, 4, 5, 6, (3, 3), out)
    assert counted(lambda: cross_conv2d_mean(x, y, weight, padding=padding)) == formula
    assert formula == 2 * B * (2 * 4 + 5) * 6 * 9 * out[0] * out[1]


def test_cross_conv2d_saves_what_the_pairs_would_repeat() -> None:
    """UniverSeg's figure for one layer of 64 channels: (Sx + Sy) / (2 Sx Sy) of the concatenation."""
    ours = flops.cross_conv2d_flops(1, 1, 8, 64, 64, 64, (3, 3), (128, 128))
    pairs = 2 * 8 * 128 * 64 * 9 * 128**2
    assert ours / pairs == 9 / 16


def test_gather_patches() -> None:
    source = torch.randn(B, 3, 16, 16)
    coords = torch.randint(-2, 14, (B, 5, 2))
    assert counted(lambda: gather_patches(source, coords, 4)) == flops.gather_patches_flops(B, 5, 3, 4) == 0
    bilinear = flops.gather_patches_flops(B, 5, 3, 6, bilinear=True)
    assert counted(lambda: gather_patches(source, coords, 4, out_size=6)) == bilinear == 8 * B * 5 * 3 * 36


def test_scatter_patches() -> None:
    patches, coords = torch.randn(B, 5, 3, 4, 4), torch.randint(-2, 14, (B, 5, 2))
    formula = flops.scatter_patches_flops(B, 5, 3, 4, 16, 12)
    assert counted(lambda: scatter_patches(patches, coords, (16, 12))) == formula
    assert formula == B * 3 * (2 * 5 * 16 + 16 * 12)


@pytest.mark.parametrize("arguments", [{"seed": 1}, {"seed": None}])
def test_gumbel_topk(arguments: dict[str, int | None]) -> None:
    logits = torch.randn(B, 50)
    assert counted(lambda: gumbel_topk(logits, 4, **arguments)) == flops.gumbel_topk_flops(B, 50)


@pytest.mark.parametrize(("blur_sigma", "taps"), [(0.0, 0), (0.1, 0), (1.0, 5)])
def test_sample_patches(blur_sigma: float, taps: int) -> None:
    weights = torch.rand(B, 1, 20, 16)
    formula = flops.sample_patches_flops(B, (17, 13), (9, 7), taps)
    assert counted(lambda: sample_patches(weights, 3, 4, stride=2, blur_sigma=blur_sigma, seed=1)) == formula


def test_sample_patches_by_hand() -> None:
    """The blur's first pass makes 9 of 17 rows, 13 columns wide; the second 9 x 7."""
    draw = flops.gumbel_topk_flops(2, 9 * 7)
    assert flops.sample_patches_flops(2, (17, 13), (9, 7)) == 2 * 2 * 17 * 13 + draw
    assert flops.sample_patches_flops(2, (17, 13), (9, 7), 5) == 2 * (2 * 17 * 13 + 10 * (9 * 13 + 9 * 7)) + draw


def test_counts_double_with_the_batch() -> None:
    assert flops.gumbel_topk_flops(4, 50) == 2 * flops.gumbel_topk_flops(2, 50)
    assert flops.sample_patches_flops(4, (6, 5), (5, 4), 5) == 2 * flops.sample_patches_flops(2, (6, 5), (5, 4), 5)
    assert flops.scatter_patches_flops(4, 5, 3, 4, 16, 12) == 2 * flops.scatter_patches_flops(2, 5, 3, 4, 16, 12)


def test_compulsory_bytes_are_those_of_the_tensors() -> None:
    def bytes_of(*tensors: Tensor) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    q, k, v = tokens()
    out = selected_attention(q, k, v)
    assert flops.selected_attention_bytes(B, H, NQ, NK, D, DV) == bytes_of(q, k, v, out)

    x, y, weight = torch.randn(B, 2, 4, 9, 7), torch.randn(B, 3, 5, 9, 7), torch.randn(6, 9, 3, 3)
    sizes = (B, 2, 3, 4, 5, 6, (3, 3), (9, 7), (9, 7))
    assert flops.cross_conv2d_bytes(*sizes) == bytes_of(x, y, weight, cross_conv2d(x, y, weight))
    mean = cross_conv2d_mean(x, y, weight)
    assert flops.cross_conv2d_bytes(*sizes, mean=True) == bytes_of(x, y, weight, mean)

    source, coords = torch.randn(B, 3, 16, 12), torch.zeros(B, 5, 2, dtype=torch.int32)
    patches = gather_patches(source, coords, 4)
    assert flops.gather_patches_bytes(B, 5, 3, 4) == bytes_of(coords, patches, patches)
    resampled = gather_patches(source, coords, 4, out_size=6)
    assert flops.gather_patches_bytes(B, 5, 3, 4, 6) == bytes_of(coords, patches, resampled)
    written = scatter_patches(patches, coords, (16, 12))
    assert flops.scatter_patches_bytes(B, 5, 3, 4, 16, 12) == bytes_of(patches, coords, *written)

    logits = torch.randn(B, 50)
    assert flops.gumbel_topk_bytes(B, 50, 4) == bytes_of(logits, *gumbel_topk(logits, 4, seed=1))
    weights = torch.rand(B, 1, 20, 16)
    drawn = sample_patches(weights, 3, 4, seed=1)
    assert flops.sample_patches_bytes(B, 320, 3) == bytes_of(weights, drawn.coords, drawn.scores, drawn.indices)


class Attention(torch.nn.Module):
    def __init__(self, kv_end: list[tuple[int, int]] | None) -> None:
        super().__init__()
        self.kv_end = kv_end

    def forward(self, q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        return selected_attention(q, k, v, index=index, kv_end=self.kv_end)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("kv_end", "pairs"), [(None, NQ * M), ([(2, 1), (4, 3)], 2 * 1 + 4 * 3)])
def test_fvcore_handles_read_a_traced_graph(kv_end: list[tuple[int, int]] | None, pairs: int) -> None:
    """As fvcore does it: a handle gets the inputs and outputs of its node, and a multiply-add counts once."""
    inputs = (*tokens(), torch.randint(-1, NK, (B, M)))
    with torch.no_grad():
        graph = torch.jit.trace(Attention(kv_end), inputs).graph
    handles = flops.fvcore_handles()
    counts = [
        handles[node.kind()](list(node.inputs()), list(node.outputs()))
        for node in graph.nodes()
        if node.kind() in handles
    ]
    assert counts == [flops.selected_attention_flops(B, H, pairs, D, DV) // 2]


def test_fvcore_handles_cover_every_registered_op() -> None:
    names = {"selected_attention", "gather_patches", "scatter_patches", "gumbel_topk", "sample_patches"}
    names |= {"cross_conv2d_tail", "group_norm_film", "small_convolutions", "transformer_block"}
    names |= {"halvings", "upsample_with_patches", "qkv_projection"}
    assert {f"icseg::{name}" for name in names} <= flops.fvcore_handles().keys()
