"""Queries, keys and values by linear projections, and the rotation of queries and keys: in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from icseg_kernels.attention.reference import turned

Angles = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def qkv_projection(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    heads: int,
    kv_heads: int,
    queries: int,
    norm: tuple[Tensor, Tensor | None] | None,
    eps: float,
    added: Tensor | None,
    angles: Angles,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, N, C] -> q [B, heads, queries, d], k and v [B, kv_heads, N, d], with torch's own gradients.

    weights: one, of queries, keys and values; two, of queries, and of keys and values; or three. angles: cosines and
    sines for q, then for k.
    """
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], *norm, eps)
    if added is not None:
        x = x + added
    last = x[:, x.shape[1] - queries :]
    of_linear: list[Tensor | None] = [None] * len(weights) if biases is None else [*biases]
    if len(weights) == 1:
        (weight,), (bias,) = weights, of_linear
        width = weight.shape[0] // (heads + 2 * kv_heads)
        sections = [heads * width, kv_heads * width, kv_heads * width]
        if queries == x.shape[1]:
            q, k, v = F.linear(x, weight, bias).split(sections, -1)
        else:
            parts = [None, None, None] if bias is None else bias.split(sections)
            of_q, of_k, of_v = zip(weight.split(sections), parts, strict=True)
            q, k, v = F.linear(last, *of_q), F.linear(x, *of_k), F.linear(x, *of_v)
    else:
        of_q, *others = zip(weights, of_linear, strict=True)
        q = F.linear(last, *of_q)
        k, v = F.linear(x, *others[0]).chunk(2, -1) if len(others) == 1 else (F.linear(x, *other) for other in others)
    q, k, v = (t.unflatten(-1, (n, -1)).transpose(1, 2) for t, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
    q_cos, q_sin, k_cos, k_sin = angles
    return turned(q, q_cos, q_sin).to(q.dtype), turned(k, k_cos, k_sin).to(k.dtype), v
