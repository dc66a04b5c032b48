"""torch.nn.functional.scaled_dot_product_attention over selected keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg_kernels import checks
from icseg_kernels.attention import selected_attention
from icseg_kernels.numerics import accumulation_dtype


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    index: Tensor | None = None,
    key_bias: Tensor | None = None,
    sink: bool = False,
) -> Tensor:
    """torch's function of this name, over the keys that are listed.

    query:    [B, h, Nq, D] or [B, Nq, D]; key and value likewise, Dv may differ from D (masks as values).
    attn_mask, dropout_p, is_causal, scale, enable_gqa: as torch has them. The first three go through torch's own
              attention over the gathered keys, all else through `icseg_kernels.selected_attention`.
    index:    [B, M] or [B, G, M] rows of key and value, one list for all queries or for each of G equal consecutive
              groups; entries out of range are no keys. None: all keys.
    key_bias: [B, Nk], finite, of the dtype of query: added to the scores of each key. Gradients reach it. Needs scale
              other than 0.
    sink:     also a key of zeros with a value of zeros.

    Returns [B, h, Nq, Dv] or [B, Nq, Dv]; 0 for a query without keys. Raises TypeError or ValueError.

    ```
    index = listed_by_score.topk(128).indices                                   # [B, 128] of all support tokens
    masks = scaled_dot_product_attention(q, k, support_masks, index=index)      # [B, Nq, classes]
    ```
    """
    for name, tokens in (("query", query), ("key", key), ("value", value)):
        checks.floating(name, tokens)
        if tokens.ndim not in (3, 4) or tokens.ndim != query.ndim:
            raise ValueError(
                f"{name} must have shape [B, h, N, D] or [B, N, D], as query has, got {list(tokens.shape)}"
            )
    dropout_p = checks.number("dropout_p", dropout_p, least=0)
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None where is_causal is True, got both")
    if query.ndim == 3:
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask[:, None]
        query, key, value = query[:, None], key[:, None], value[:, None]
        out = scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal,
            scale=scale, index=index, key_bias=key_bias, sink=sink,
        )  # fmt: skip
        return out[:, 0]
    if enable_gqa:
        key, value = _repeated("key", key, query), _repeated("value", value, query)
    scale = query.shape[3] ** -0.5 if scale is None and query.shape[3] else scale
    if key_bias is not None:
        _check_bias(key_bias, query, key)
    if attn_mask is not None or dropout_p or is_causal:
        return _masked(query, key, value, attn_mask, dropout_p, is_causal, scale, index, key_bias, sink)
    if key_bias is not None:
        if not scale:
            raise ValueError(f"scale must not be 0 with key_bias, got {scale}")
        channels = _bias_channels(key_bias, scale)[:, None].expand(-1, key.shape[1], -1, -1)
        query, key = F.pad(query, (0, channels.shape[3]), value=1.0), torch.cat([key, channels], dim=3)
    return selected_attention(query, key, value, index=index, scale=scale, sink=sink)


def _repeated(name: str, tokens: Tensor, query: Tensor) -> Tensor:
    heads, groups = query.shape[1], tokens.shape[1]
    if groups == 0 or heads % groups:
        raise ValueError(f"{name} must have a number of heads that divides {heads}, got {groups}")
    return tokens if groups == heads else tokens.repeat_interleave(heads // groups, dim=1)


def _check_bias(bias: Tensor, query: Tensor, key: Tensor) -> None:
    checks.device("key_bias", checks.floating("key_bias", bias), query.device)
    if bias.shape != (key.shape[0], key.shape[2]) or bias.dtype != query.dtype:
        wanted = f"[B, Nk] = {[key.shape[0], key.shape[2]]} and dtype {query.dtype}"
        raise ValueError(f"key_bias must have shape {wanted}, got {list(bias.shape)} and {bias.dtype}")


def _bias_channels(bias: Tensor, scale: float) -> Tensor:
    """[B, Nk, 1], the bias over scale; [B, Nk, 2] for the half types, with what they round off."""
    exact = bias.to(accumulation_dtype(bias.dtype)) / scale
    high = exact.to(bias.dtype)
    if exact.dtype == bias.dtype:
        return high[..., None]
    return torch.stack([high, (exact - high.to(exact.dtype)).to(bias.dtype)], dim=-1)


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    index: Tensor | None,
    key_bias: Tensor | None,
    sink: bool,
) -> Tensor:
    """torch's attention over the gathered keys, one list a group of queries."""
    (b, _, nq, _), nk = q.shape, k.shape[2]
    if is_causal:
        attn_mask = q.new_ones(nq, nk, dtype=torch.bool).tril()
    mask = _additive(attn_mask, q, nk)  # [1 or B, 1 or h, Nq, Nk]
    if key_bias is not None:
        mask = mask + key_bias[:, None, None]
    # A row of zeros behind the keys: the sink, or what stands for no key.
    k, v, mask = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), F.pad(mask, (0, 1), value=0.0 if sink else -torch.inf)
    if index is None:
        return _safe_attention(q, k, v, mask, dropout_p, scale)
    checks.device("index", checks.tensor("index", index), q.device)
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index must be int32 or int64, got {index.dtype}")
    if index.ndim not in (2, 3) or index.shape[0] != b or (index.ndim == 3 and nq % max(index.shape[1], 1)):
        raise ValueError(
            f"index must have shape [B, M] or [B, G, M] with B = {b} and G a divisor of {nq}, got {list(index.shape)}"
        )
    rows = index[:, None] if index.ndim == 2 else index
    rows = torch.where((rows >= 0) & (rows < nk), rows, nk).long()
    groups, most = rows.shape[1:]
    nothing = rows == nk
    if sink:
        rows = F.pad(rows, (0, 1), value=nk)
        nothing, most = F.pad(nothing, (0, 1), value=False), most + 1
    flat = rows.flatten(1)[:, None, :, None]
    k, v = (
        t.gather(2, flat.expand(-1, t.shape[1], -1, t.shape[3])).unflatten(2, (groups, most)) for t in (k, v)
    )  # [B, h, G, M, D]
    mask = mask.expand(b, -1, -1, -1).unflatten(2, (groups, nq // groups))
    mask = mask.gather(4, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3], -1))
    mask = mask.masked_fill(nothing[:, None, :, None], -torch.inf)
    return _safe_attention(q.unflatten(2, (groups, nq // groups)), k, v, mask, dropout_p, scale).flatten(2, 3)


def _additive(mask: Tensor | None, q: Tensor, nk: int) -> Tensor:
    nq = q.shape[2]
    if mask is None:
        return q.new_zeros(1, 1, nq, nk)
    if checks.tensor("attn_mask", mask).dtype == torch.bool:
        mask = q.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
    elif mask.dtype != q.dtype:
        raise TypeError(f"attn_mask must be bool or {q.dtype}, as query is, got {mask.dtype}")
    lengths = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    allowed = ((1, q.shape[0]), (1, q.shape[1]), (1, nq), (1, nk))
    if mask.ndim > 4 or any(n not in of for n, of in zip(lengths, allowed, strict=True)):
        raise ValueError(f"attn_mask must broadcast to {[*q.shape[:3], nk]}, got {list(mask.shape)}")
    return mask.reshape(lengths).expand(lengths[0], lengths[1], nq, nk)


def _safe_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout_p: float, scale: float | None) -> Tensor:
    """0, with gradient 0, where everything is masked."""
    empty = (mask == -torch.inf).all(dim=-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, mask.masked_fill(empty, 0.0), dropout_p, scale=scale)
    return out.masked_fill(empty, 0.0)
