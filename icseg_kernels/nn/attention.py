"""torch.nn.MultiheadAttention over selected keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icseg_kernels import checks
from icseg_kernels.nn.functional import scaled_dot_product_attention
from icseg_kernels.nn.selection import Selected, Selection, check_rows, listed


class SelectedAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention whose queries attend to selected keys; without a selection, to all.

    Constructor, state dict and calls with need_weights=False are those of torch.nn.MultiheadAttention, whose
    checkpoints load; outputs are equal where all keys are selected. Where one list serves all queries, other keys are
    not projected. The parameters of a learned selection come on top, under "selection.". Gradients once, in reverse
    mode, as `icseg_kernels.selected_attention` has them.

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

        key_padding_mask: [B, Nk] (unbatched [Nk]); bool, True for padding, or floating, added to the scores. A
                          selection takes keys of -inf, or of the lowest number of its dtype, for padding.
        need_weights:     False; the weights never exist as a matrix.
        attn_mask:        [Nq, Nk] or [B * h, Nq, Nk]; bool, True where attention is not allowed, or floating, added to
                          the scores. With it, with floating key_padding_mask, or with dropout in training, torch's
                          attention serves, over the gathered keys.
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
        device, batched = query.device, query.ndim == 3
        for name, given in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask), ("select", select)):
            if given is not None:
                checks.device(name, checks.tensor(name, given), device)
        if not batched:
            query, key, value = _each(lambda tokens: tokens[None], query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
            select = None if select is None else select[None]
        elif not self.batch_first:
            query, key, value = _each(lambda tokens: tokens.transpose(0, 1), query, key, value)
        b, nk = query.shape[0], key.shape[1]
        if key.shape[0] != b or value.shape[:2] != key.shape[:2]:
            raise ValueError(
                f"key and value must have the batch of query, {b}, and one length, "
                f"got {list(key.shape[:2])} and {list(value.shape[:2])}"
            )
        valid = self._valid(key_padding_mask, b, nk)
        mask = self._additive(attn_mask, key_padding_mask, query, nk)
        index: Tensor | None = None
        bias: Tensor | None = None
        if self.selection is not None:
            index, bias = self._selected(self.selection, key, select, valid)
        elif key_padding_mask is not None and key_padding_mask.dtype == torch.bool:
            index = listed(~key_padding_mask)
        if index is not None and index.ndim == 2 and index.shape[1] < nk:
            # Only the listed keys are projected. Indexing, whose gradient is summed in one order; a gather's is not.
            exists = (index >= 0) & (index < nk)
            rows = index.long().masked_fill(~exists, 0)
            of_batch = torch.arange(b, device=device)[:, None]
            kept = key[of_batch, rows]
            key, value = kept, kept if value is key else value[of_batch, rows]
            bias = None if bias is None else bias[of_batch, rows]
            if mask is not None:
                mask = mask.expand(b, -1, -1, -1)
                mask = mask.gather(3, rows[:, None, None].expand(-1, *mask.shape[1:3], -1))
            nk = rows.shape[1]
            index = torch.where(exists, torch.arange(nk, device=device), -1)
        q, k, v = (t.unflatten(2, (self.num_heads, self.head_dim)) for t in self._projected(query, key, value))
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
            None if mask is None else mask.to(q.dtype),
            self.dropout if self.training else 0.0,
            index=index,
            key_bias=None if bias is None else bias.to(q.dtype),
            sink=self.add_zero_attn,
        )
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], None
        return out if self.batch_first else out.transpose(0, 1), None

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        # False keeps torch.nn.TransformerEncoderLayer off its fused path, which reads the weights and calls no module.
        self._qkv_same_embed_dim = False

    def _check_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        sizes = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (tokens, size) in sizes.items():
            checks.device(name, checks.floating(name, tokens), query.device)
            if tokens.is_nested:
                raise TypeError(
                    f"{name} must be a dense tensor, got a nested one "
                    "(torch.nn.TransformerEncoder makes none with enable_nested_tensor=False, or once built with "
                    "use_nested_tensor = False)"
                )
            if tokens.ndim not in (2, 3) or tokens.ndim != query.ndim or tokens.shape[-1] != size:
                axes = "[Nq, E]" if query.ndim == 2 else "[B, N, E]" if self.batch_first else "[N, B, E]"
                raise ValueError(f"{name} must have shape {axes} with E = {size}, got {list(tokens.shape)}")

    def _valid(self, padding: Tensor | None, b: int, nk: int) -> Tensor | None:
        """Which keys are no padding, [B, Nk] bool, or None."""
        if padding is None:
            return None
        if padding.shape != (b, nk):
            raise ValueError(f"key_padding_mask must have shape [B, Nk] = {[b, nk]}, got {list(padding.shape)}")
        _check_mask("key_padding_mask", padding, "padding")
        return ~padding if padding.dtype == torch.bool else padding > torch.finfo(padding.dtype).min

    def _additive(self, mask: Tensor | None, padding: Tensor | None, query: Tensor, nk: int) -> Tensor | None:
        """attn_mask and floating padding, added up: floating [1 or B, 1 or h, 1 or Nq, Nk]."""
        b, nq, _ = query.shape
        if mask is not None:
            if mask.shape not in ((nq, nk), (b * self.num_heads, nq, nk)):
                wanted = f"{[nq, nk]} or {[b * self.num_heads, nq, nk]}"
                raise ValueError(
                    f"attn_mask must have shape [Nq, Nk] or [B * h, Nq, Nk], {wanted}, got {list(mask.shape)}"
                )
            _check_mask("attn_mask", mask, "a key not to attend to")
            if mask.dtype == torch.bool:
                mask = query.new_zeros(mask.shape).masked_fill(mask, -torch.inf)
            mask = mask[None, None] if mask.ndim == 2 else mask.unflatten(0, (b, self.num_heads))
        if padding is None or padding.dtype == torch.bool:
            return mask
        return padding[:, None, None] if mask is None else mask + padding[:, None, None]

    @staticmethod
    def _selected(selection: Selection, key: Tensor, select: Tensor | None, valid: Tensor | None) -> Selected:
        found = selection(key, select, valid)
        if not isinstance(found, Selected):
            raise TypeError(f"selection must return a Selected, got {type(found).__name__}")
        check_rows("rows of the selection", found.rows, key.shape[0], key.device)
        if found.bias is not None and checks.floating("bias of the selection", found.bias).shape != key.shape[:2]:
            raise ValueError(
                f"bias of the selection must have shape [B, N] = {list(key.shape[:2])}, got {list(found.bias.shape)}"
            )
        return found

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, E] each; what is given more than once goes through one product."""
        weight, bias, e = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if weight is not None and query is key and key is value:
            q, k, v = F.linear(query, weight, bias).chunk(3, dim=-1)
            return q, k, v
        biases = (None, None, None) if bias is None else bias.chunk(3)
        if weight is not None and key is value:
            k, v = F.linear(key, weight[e:], None if bias is None else bias[e:]).chunk(2, dim=-1)
            return F.linear(query, weight[:e], biases[0]), k, v
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.chunk(3)
        q, k, v = (F.linear(t, w, c) for t, w, c in zip((query, key, value), weights, biases, strict=True))
        return q, k, v


def _each(
    change: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`change` of each, one tensor still where one tensor was given."""
    changed = change(query)
    k = changed if key is query else change(key)
    return changed, k, k if value is key else change(value)


def _check_mask(name: str, mask: Tensor, true: str) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool, True for {true}, or floating-point, to be added, got {mask.dtype}")


def _within(index: Tensor, nk: int) -> Tensor:
    """index without the entry Nk, which is about to become a key."""
    return index.masked_fill(index >= nk, -1)
