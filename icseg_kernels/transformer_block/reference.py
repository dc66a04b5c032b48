"""A transformer block whose keys and values are extended by a memory: in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg_kernels.attention import selected_attention

if TYPE_CHECKING:
    from icseg_kernels.transformer_block import BlockWeights


def transformer_block(
    tokens: Tensor, memory: Sequence[Tensor], block: BlockWeights, heads: int, index: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """tokens [B, N, D], memory [B, M_i, 2D] -> tokens, own [B, N, 2D], contiguous; with torch's own gradients.

    backend: that of `selected_attention`.
    """
    width = tokens.shape[-1:]
    x = F.layer_norm(tokens, width, block.norm_attention_weight, block.norm_attention_bias, block.eps)
    own = F.linear(x, block.key_value_weight, block.key_value_bias)
    q = F.linear(x, block.query_weight, block.query_bias)
    k, v = torch.cat([*(other.to(own.dtype) for other in memory), own], 1).chunk(2, -1)
    attended = _attention(_split(q, heads), _split(k, heads), _split(v, heads), index, backend)
    tokens = tokens + F.linear(attended.transpose(1, 2).flatten(2), block.out_weight, block.out_bias)
    x = F.layer_norm(tokens, width, block.norm_mlp_weight, block.norm_mlp_bias, block.eps)
    hidden = F.gelu(F.linear(x, block.mlp_in_weight, block.mlp_in_bias))
    tokens = tokens + F.linear(hidden, block.mlp_out_weight, block.mlp_out_bias)
    return tokens.contiguous(), own.contiguous()


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, index: Tensor | None, backend: str | None) -> Tensor:
    """Under autocast on a CPU in float32: the half types' backward pass is slow there."""
    if q.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return selected_attention(q, k, v, index=index, backend=backend)
    with torch.autocast("cpu", enabled=False):
        return selected_attention(q.float(), k.float(), v.float(), index=index, backend=backend)
