"""torch.nn.functional.scaled_dot_product_attention over selected keys."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg_kernels import checks
from icseg_kernels.attention import selected_attention
from icseg_kernels.nn.selection import check_rows
from icseg_kernels.numerics import accumulation_dtype, autocast


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

    query:    [..., Nq, D], key [..., Nk, D] and value [..., Nk, Dv] of one floating dtype, whatever autocast makes of
              them; Dv may differ from D (masks as values). The axes in front broadcast. The first of them is the
              batch B, all others are heads; without any, B is 1.
    attn_mask, dropout_p, is_causal, scale, enable_gqa: as torch has them. The first three go through torch's own
              attention over the gathered keys, all else through `icseg_kernels.selected_attention`.
    index:    [B, M] or [B, G, M] rows of key and value, one list for all queries or for each of G equal consecutive
              groups; entries out of range are no keys, one named twice counts twice. None: all keys.
    key_bias: [B, Nk], finite, of the dtype of query: added to the scores of each key. Gradients reach it. Without
              attn_mask, dropout_p and is_causal it needs a scale other than 0, and is clamped to 1e37 (float16:
              65504 * scale).
    sink:     also a key of zeros with a value of zeros.

    Returns [..., Nq, Dv]; 0 for a query without keys. Gradients once, in reverse mode, as
    `icseg_kernels.selected_attention` has them. Raises TypeError or ValueError.

    ```
    index = listed_by_score.topk(128).indices                                   # [B, 128] of all support tokens
    masks = scaled_dot_product_attention(q, k, support_masks, index=index)      # [B, Nq, classes]
    ```
    """
    query, key, value, lead = _checked_tokens(query, key, value, enable_gqa)
    dropout_p = checks.number("dropout_p", dropout_p, least=0)
    if dropout_p > 1:
        raise ValueError(f"dropout_p must be at most 1, got {dropout_p}")
    scale = None if scale is None else checks.number("scale", scale)
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None where is_causal is True, got both")
    shape = *lead, query.shape[-2], value.shape[-1]
    lead = lead or (1,)
    mask = None if attn_mask is None else _additive(attn_mask, query, lead, key.shape[-2])
    query, key, value = (_four_axes(t, lead) for t in (query, key, value))
    if key_bias is not None:
        key_bias = _checked_bias(key_bias, query, key)
    if scale is None and query.shape[3]:
        scale = query.shape[3] ** -0.5
    if mask is not None or dropout_p or is_causal:
        out = _masked(query, key, value, mask, dropout_p, is_causal, scale, index, key_bias, sink)
        return out.reshape(shape)
    if key_bias is not None:
        if not scale:
            raise ValueError(f"scale must not be 0 with key_bias, got {scale}")
        channels = _bias_channels(key_bias, scale)[:, None].expand(-1, key.shape[1], -1, -1)
        query, key = F.pad(query, (0, channels.shape[3]), value=1.0), torch.cat([key, channels], dim=3)
    out = selected_attention(query, key, value, index=index, scale=scale, sink=sink)
    return out if len(shape) == 4 else out.reshape(shape)


def _checked_tokens(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Query, key and value as autocast has them, with as many heads each, and the axes in front that they share."""
    for name, tokens in (("query", query), ("key", key), ("value", value)):
        if checks.floating(name, tokens).ndim < 2:
            raise ValueError(f"{name} must have shape [..., N, D], got {list(tokens.shape)}")
        checks.device(name, tokens, query.device)
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = autocast(query), autocast(key), autocast(value)
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key and value must have one floating dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if enable_gqa:
        key, value = _repeated("key", key, query), _repeated("value", value, query)
    lead = _broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    if lead is None or key.shape[-1] != query.shape[-1] or value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"key and value must have shape [..., Nk, {query.shape[-1]}] and [..., Nk, Dv], with axes in front that "
            f"broadcast with {list(query.shape[:-2])} of query, got {list(key.shape)} and {list(value.shape)}"
        )
    return query, key, value, lead


def _broadcast(*shapes: tuple[int, ...]) -> tuple[int, ...] | None:
    if all(shape == shapes[0] for shape in shapes):
        return tuple(shapes[0])
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        return None


def _four_axes(t: Tensor, lead: tuple[int, ...]) -> Tensor:
    """[..., N, D] -> [B, h, N, D], the axes in front expanded to `lead`."""
    if t.shape[:-2] == lead and len(lead) == 2:
        return t
    return t.expand(*lead, -1, -1).reshape(lead[0], math.prod(lead[1:]), *t.shape[-2:])


def _repeated(name: str, tokens: Tensor, query: Tensor) -> Tensor:
    if query.ndim < 3 or tokens.ndim < 3:
        raise ValueError(f"{name} and query must have shape [..., h, N, D] with enable_gqa, got {list(tokens.shape)}")
    heads, groups = query.shape[-3], tokens.shape[-3]
    if groups == 0 or heads % groups:
        raise ValueError(f"{name} must have a number of heads that divides {heads}, got {groups}")
    return tokens if groups == heads else tokens.repeat_interleave(heads // groups, dim=-3)


def _checked_bias(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """As autocast has it."""
    checks.device("key_bias", checks.floating("key_bias", bias), query.device)
    bias = autocast(bias)
    if bias.shape != (key.shape[0], key.shape[2]) or bias.dtype != query.dtype:
        wanted = f"[B, Nk] = {[key.shape[0], key.shape[2]]} and dtype {query.dtype}"
        raise ValueError(f"key_bias must have shape {wanted}, got {list(bias.shape)} and {bias.dtype}")
    return bias


def _bias_channels(bias: Tensor, scale: float) -> Tensor:
    """[B, Nk, 1], the bias over scale; [B, Nk, 2] for the half types, with what they round off.

    The lowest number of a dtype, as masks have it, must stay finite over scale and in base 2.
    """
    most = min(torch.finfo(bias.dtype).max, 1e37)
    exact = (bias.to(accumulation_dtype(bias.dtype)).clamp(-most, most) / scale).clamp(-most, most)
    high = exact.to(bias.dtype)
    if exact.dtype == bias.dtype:
        return high[..., None]
    return torch.stack([high, (exact - high.to(exact.dtype)).to(bias.dtype)], dim=-1)


def _masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    index: Tensor | None,
    key_bias: Tensor | None,
    sink: bool,
) -> Tensor:
    """torch's attention over the gathered keys, one list a group of queries; mask as `_additive` has it."""
    (b, _, nq, _), nk = q.shape, k.shape[2]
    if mask is None and index is None and key_bias is None and not sink and nk:
        return F.scaled_dot_product_attention(q, k, v, None, dropout_p, is_causal, scale=scale)
    if is_causal:
        mask = q.new_full((1, 1, nq, nk), -torch.inf).triu(1)
    elif mask is None:
        mask = q.new_zeros(1, 1, 1, nk)
    if key_bias is not None:
        mask = mask + key_bias[:, None, None]
    if index is None and not sink and nk:
        return _safe_attention(q, k, v, mask, dropout_p, scale)
    # A row of zeros behind the keys: the sink, or what stands for no key.
    k, v, mask = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), F.pad(mask, (0, 1), value=0.0 if sink else -torch.inf)
    if index is None:
        return _safe_attention(q, k, v, mask, dropout_p, scale)
    check_rows("index", index, b, q.device)
    rows = index[:, None] if index.ndim == 2 else index
    groups = rows.shape[1]
    if groups == 0 or nq % groups:
        raise ValueError(f"index must name G groups that divide Nq = {nq}, got shape {list(index.shape)}")
    rows = torch.where((rows >= 0) & (rows < nk), rows, nk).long()
    nothing = rows == nk
    if sink:
        rows, nothing = F.pad(rows, (0, 1), value=nk), F.pad(nothing, (0, 1), value=False)
    flat = rows.flatten(1)[:, None, :, None]
    k, v = (
        t.gather(2, flat.expand(-1, t.shape[1], -1, t.shape[3])).unflatten(2, rows.shape[1:]) for t in (k, v)
    )  # [B, h, G, M, D]
    per = 1 if mask.shape[2] == 1 else nq // groups
    mask = mask.expand(b, -1, groups * per, -1).unflatten(2, (groups, per))
    mask = mask.gather(4, rows[:, None, :, None].expand(-1, mask.shape[1], -1, per, -1))
    mask = mask.masked_fill(nothing[:, None, :, None], -torch.inf)
    return _safe_attention(q.unflatten(2, (groups, nq // groups)), k, v, mask, dropout_p, scale).flatten(2, 3)


def _additive(mask: Tensor, query: Tensor, lead: tuple[int, ...], nk: int) -> Tensor:
    """attn_mask as floating [1 or B, 1 or h, 1 or Nq, Nk]."""
    checks.device("attn_mask", checks.tensor("attn_mask", mask), query.device)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    elif not mask.is_floating_point() or autocast(mask).dtype != query.dtype:
        raise TypeError(f"attn_mask must be bool or {query.dtype}, as query is, got {mask.dtype}")
    mask = autocast(mask)
    full = *lead, query.shape[-2], nk
    if mask.ndim > len(full) or any(n not in (1, of) for n, of in zip(mask.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"attn_mask must broadcast to {list(full)}, got {list(mask.shape)}")
    mask = mask.reshape((1,) * (len(full) - mask.ndim) + tuple(mask.shape))
    mask = mask.expand(*mask.shape[:-1], nk)
    return mask if len(lead) == 2 else _four_axes(mask, lead)


def _safe_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout_p: float, scale: float | None) -> Tensor:
    """0, with gradient 0, where everything is masked."""
    empty = (mask == -torch.inf).all(dim=-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, mask.masked_fill(empty, 0.0), dropout_p, scale=scale)
    return out.masked_fill(empty, 0.0)
