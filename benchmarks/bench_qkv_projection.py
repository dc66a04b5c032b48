"""qkv_projection with the attention that follows: by hand, also compiled, against turning in either of the two ops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import compare, compiled, thread_counts, with_backward
from torch import Tensor

from icseg_kernels import Rotation, flops, qkv_projection, selected_attention
from icseg_kernels.attention.reference import turned

HEADS = 4
CASES = [(1, 60, 256), (1, 320, 256), (4, 256, 256), (1, 1024, 256)]  # B, N, C; blocks as published


def by_hand(x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What one writes without the ops."""
    y = F.linear(F.layer_norm(x, x.shape[-1:], gain, shift), weight, bias)
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in y.chunk(3, -1))
    return F.scaled_dot_product_attention(turned(q, cos, sin), turned(k, cos, sin), v)


compiled_by_hand = compiled(by_hand, dynamic=False)


def turned_by_projection(
    x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    turn = Rotation(cos, sin)
    return selected_attention(*qkv_projection(x, weight, bias, heads=HEADS, norm=(gain, shift), rotary=(turn, turn)))


def turned_by_attention(
    x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    turn = Rotation(cos, sin)
    q, k, v = qkv_projection(x, weight, bias, heads=HEADS, norm=(gain, shift))
    return selected_attention(q, k, v, rotary=(turn, turn))


@pytest.mark.quick(count=320, work="forward")
@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize("work", ["forward", "forward + backward"])
@pytest.mark.parametrize(("batch", "count", "channels"), CASES)
def bench_qkv_projection(record, batch, count, channels, work, threads):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, count, channels), (3 * channels, channels), (3 * channels,), (channels,), (channels,)
    scales = 1, channels**-0.5, 1, 1, 1
    tensors = [scale * torch.randn(shape, generator=generator) for shape, scale in zip(shapes, scales, strict=True)]
    inputs = [t.requires_grad_(work != "forward") for t in tensors]
    angles = torch.randn(batch, count, HEADS, channels // HEADS // 2, generator=generator).transpose(1, 2)
    inputs += [angles.cos(), angles.sin()]
    rivals = {
        "torch": by_hand,
        "torch compiled": compiled_by_hand,
        "turned by the projection": turned_by_projection,
        "turned by attention": turned_by_attention,
    }
    runs = {
        name: (lambda run=run: run(*inputs)) if work == "forward" else with_backward(run, *inputs)
        for name, run in rivals.items()
    }
    width = channels // HEADS
    count_of_flops = flops.qkv_projection_flops(batch, count, channels, HEADS, width)
    count_of_flops += flops.selected_attention_flops(batch, HEADS, count * count, width, width)
    # Tokens, angles and weights in, attended values out; queries, keys and values need not leave the caches.
    least = 4 * (3 * batch * count * channels + 3 * channels * (channels + 1) + 2 * channels)
    case = f"B{batch} N{count} C{channels}"
    # Gradients of weight are sums over all tokens.
    tolerance = 1e-4 if work == "forward" else 1e-4 * (batch * count) ** 0.5
    row = compare(
        "qkv_projection",
        case,
        runs,
        work=work,
        threads=threads,
        tolerance=tolerance,
        flops=dict.fromkeys(runs, count_of_flops) if work == "forward" else {},
        bytes=least if work == "forward" else 0,
    )
    record(row, runs["turned by attention"])
