"""torch.nn.MultiheadAttention over selected keys."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icseg_kernels import checks
from icseg_kernels.nn.functional import scaled_dot_product_attention
from icseg_kernels.nn.selection import Selection, finite, listed


class SelectedAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention whose queries attend to selected keys; without a selection, to all.

    Constructor, state dict and calls with need_weights=False are those of torch.nn.MultiheadAttention, whose
    checkpoints load; outputs are equal where all keys are selected. The parameters of a learned selection come on top,
    under "selection.".

    selection: `SelectByMask`, `SelectByScore`, `SelectByIndex`, or another `Selection`; None: all keys.

    ```
    attention = SelectedAttention(256, 8, batch_first=True, selection=SelectByMask(512))
    attention.load_state_dict(torch_attention.state_dict())
    out, _ = attention(target, support, support, select=foreground)      # foreground [B, N] bool
    ```
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        selection: Selection | None = None,
    ) -> None:
        if selection is not None and not isinstance(selection, Selection):
            raise TypeError(f"selection must be a Selection or None, got {checks.shown(selection)}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.selection = selection if selection is None else selection.to(device=device, dtype=dtype)
        # False keeps torch.nn.TransformerEncoderLayer off its fused path, which reads the weights and calls no module.
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        select: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """(out, None), out in the layout of query: [B, Nq, E] (batch_first), [Nq, B, E], or [Nq, E] unbatched.

        key_padding_mask: [B, Nk] (unbatched [Nk]); bool, True for padding, or floating, added to the scores.
        need_weights:     False; the weights never exist as a matrix.
        attn_mask:        [Nq, Nk] or [B * h, Nq, Nk]; bool, True where attention is not allowed, or floating, added to
                          the scores. With it, or with dropout in training, torch's attention serves, over the gathered
                          keys.
        is_causal:        a hint that attn_mask is causal; not used.
        select:           what the selection reads: a mask, a score or a list (see there), batch first, or unbatched.

        Where torch's module gives NaN, for a query without keys, the attention gives 0. Raises TypeError, ValueError,
        or NotImplementedError for need_weights=True.
        """
        if need_weights:
            raise NotImplementedError("need_weights must be False: attention weights are never computed, got True")
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given where is_causal is True, got None")
        if select is not None and self.selection is None:
            raise ValueError(f"select must be None without a selection, got {checks.shown(select)}")
        self._check_tokens(query, key, value)
        batched = query.ndim == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
            select = None if select is None else select[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        b, nq, nk = query.shape[0], query.shape[1], key.shape[1]
        if key.shape[0] != b or value.shape[:2] != key.shape[:2]:
            raise ValueError(
                f"key and value must have the batch of query, {b}, and one length, "
                f"got {list(key.shape[:2])} and {list(value.shape[:2])}"
            )
        valid, bias = self._padding(key_padding_mask, b, nk)
        if self.selection is not None:
            index, extra = self.selection(key, select, valid)
            bias = extra if bias is None else bias if extra is None else bias + extra
        else:
            index = None if valid is None else listed(valid)
        q, k, v = (t.unflatten(2, (self.num_heads, self.head_dim)) for t in self._projected(query, key, value))
        mask = self._additive(attn_mask, b, nq, nk, q.dtype)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(b, 1, -1).unflatten(2, k.shape[2:])], dim=1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(b, 1, -1).unflatten(2, v.shape[2:])], dim=1)
            index = None if index is None else F.pad(_within(index, nk), (0, 1), value=nk)
            bias = None if bias is None else F.pad(bias, (0, 1))
            mask = None if mask is None else F.pad(mask, (0, 1))
        out = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            mask,
            self.dropout if self.training else 0.0,
            index=index,
            key_bias=None if bias is None else bias.to(q.dtype),
            sink=self.add_zero_attn,
        )
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], None
        return out if self.batch_first else out.transpose(0, 1), None

    def _check_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        sizes = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (tokens, size) in sizes.items():
            if checks.floating(name, tokens).is_nested:
                raise TypeError(
                    f"{name} must be a dense tensor, got a nested one "
                    "(torch.nn.TransformerEncoder makes none with enable_nested_tensor=False)"
                )
            if tokens.ndim not in (2, 3) or tokens.ndim != query.ndim or tokens.shape[-1] != size:
                axes = "[Nq, E]" if query.ndim == 2 else "[B, N, E]" if self.batch_first else "[N, B, E]"
                raise ValueError(f"{name} must have shape {axes} with E = {size}, got {list(tokens.shape)}")

    def _padding(self, mask: Tensor | None, b: int, nk: int) -> tuple[Tensor | None, Tensor | None]:
        """Which keys are no padding, [B, Nk] bool, and what is added to their scores; or None."""
        if mask is None:
            return None, None
        if checks.tensor("key_padding_mask", mask).shape != (b, nk):
            raise ValueError(f"key_padding_mask must have shape [B, Nk] = {[b, nk]}, got {list(mask.shape)}")
        if mask.dtype == torch.bool:
            return ~mask, None
        checks.floating("key_padding_mask", mask)
        return mask > -torch.inf, finite(mask)

    def _additive(self, mask: Tensor | None, b: int, nq: int, nk: int, dtype: torch.dtype) -> Tensor | None:
        """attn_mask as floating [1 or B, 1 or h, Nq, Nk]."""
        if mask is None:
            return None
        shape = checks.tensor("attn_mask", mask).shape
        if shape not in ((nq, nk), (b * self.num_heads, nq, nk)):
            wanted = f"{[nq, nk]} or {[b * self.num_heads, nq, nk]}"
            raise ValueError(f"attn_mask must have shape [Nq, Nk] or [B * h, Nq, Nk], {wanted}, got {list(shape)}")
        if mask.dtype == torch.bool:
            mask = torch.zeros(shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
        mask = checks.floating("attn_mask", mask).to(dtype)
        return mask[None, None] if mask.ndim == 2 else mask.unflatten(0, (b, self.num_heads))

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, E] each."""
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            return q, k, v
        else:
            weights = self.in_proj_weight.chunk(3)
        q, k, v = (F.linear(t, w, c) for t, w, c in zip((query, key, value), weights, biases, strict=True))
        return q, k, v


def _within(index: Tensor, nk: int) -> Tensor:
    """index without the entry Nk, which is about to become a key."""
    return index.masked_fill(index >= nk, -1)
