"""Which keys a query attends to: by mask, by score, or by index."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from icseg_kernels import checks
from icseg_kernels.gumbel_topk import gumbel_topk


class Selected(NamedTuple):
    """rows: [B, M] or [B, G, M], the list of `icseg_kernels.selected_attention`; -1 is no key.

    bias: floating [B, N] to add to the attention scores of the keys, or None.
    """

    rows: Tensor
    bias: Tensor | None = None


class Selection(nn.Module):
    """A policy of selection. One's own is a subclass with `forward` alone, which returns a `Selected`."""

    def forward(self, keys: Tensor, select: Tensor | None, valid: Tensor | None) -> Selected:
        """keys:   [B, N, E], the tokens to choose from, before any projection.

        select: what the policy reads, given with the call; or None.
        valid:  [B, N] bool, False for padding; or None. Padding is not selected.
        """
        raise NotImplementedError


class SelectByMask(Selection):
    """The keys under a mask, the first `k` of them (all: None), in their order.

    Reads a bool mask [B, N], or [B, G, N] with one for each group of queries; None means all that is no padding. The
    list has min(k, N) entries whatever the mask, so that shapes depend on no values.
    """

    def __init__(self, k: int | None = None) -> None:
        super().__init__()
        self.k = None if k is None else checks.integer("k", k, 0, otherwise=" or None")

    def forward(self, keys: Tensor, select: Tensor | None, valid: Tensor | None) -> Selected:
        mask = keys.new_ones(keys.shape[:2], dtype=torch.bool) if select is None else select
        _check("mask", mask, keys)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, True for a key to attend to, got {mask.dtype}")
        return Selected(listed(mask if valid is None else mask & _beside(valid, mask), self.k))

    def extra_repr(self) -> str:
        return f"k={self.k}"


class SelectByScore(Selection):
    """The `k` keys of the highest scores; in training a draw without replacement, with odds exp(score).

    k:        keys of each list, at most; fewer where fewer have a score above -inf.
    features: E, to learn the score as a linear map of the keys; None if it is given with the call, as floating-point
              [B, N], or [B, G, N] with one for each group of queries.
    biased:   whether the score is also added to the attention scores, by which gradients reach it; only for [B, N].
              None: if it is learned.
    gumbel:   whether to draw in training (`icseg_kernels.gumbel_topk`; the seed comes from torch's generator).
    """

    def __init__(self, k: int, features: int | None = None, *, biased: bool | None = None, gumbel: bool = True) -> None:
        super().__init__()
        self.k = checks.integer("k", k, 0)
        self.score = None if features is None else nn.Linear(checks.integer("features", features, 1), 1, bias=False)
        self.biased = features is not None if biased is None else biased
        self.gumbel = gumbel

    def forward(self, keys: Tensor, select: Tensor | None, valid: Tensor | None) -> Selected:
        score = self._scored(keys, select)
        _check("score", checks.floating("score", score), keys)
        if self.biased and score.ndim != 2:
            raise ValueError(
                f"score must have shape [B, N] where it is added to the attention, got {list(score.shape)}"
            )
        logits = score.detach()
        if valid is not None:
            logits = logits.masked_fill(~_beside(valid, logits), -torch.inf)
        k = min(self.k, logits.shape[-1])
        noise = None if self.gumbel and self.training else 0.0
        index = gumbel_topk(logits.flatten(0, -2), k, noise=noise).indices.unflatten(0, logits.shape[:-1])
        return Selected(index, finite(score) if self.biased else None)

    def _scored(self, keys: Tensor, select: Tensor | None) -> Tensor:
        if self.score is not None:
            if select is not None:
                raise ValueError(f"score must not be given where it is learned, got {checks.shown(select)}")
            if keys.shape[-1] != self.score.in_features:
                wanted = self.score.in_features
                raise ValueError(f"keys must have the {wanted} features of the learned score, got {keys.shape[-1]}")
            scores: Tensor = self.score(keys)
            return scores.squeeze(-1)
        if select is None:
            raise ValueError("score must be given with the call, got None")
        return select

    def extra_repr(self) -> str:
        return f"k={self.k}, biased={self.biased}, gumbel={self.gumbel}"


class SelectByIndex(Selection):
    """The keys of a list given with the call: [B, M] or [B, G, M] int32 or int64; one listed twice counts twice.

    An entry below 0 or not below N is no key.
    """

    def forward(self, keys: Tensor, select: Tensor | None, valid: Tensor | None) -> Selected:
        if select is None:
            raise ValueError("index must be given with the call, got None")
        n = keys.shape[1]
        check_rows("index", select, keys.shape[0], keys.device)
        if valid is None or n == 0:
            return Selected(select)
        rows = select.long().clamp(0, n - 1)
        kept = valid.gather(1, rows.flatten(1)).unflatten(1, rows.shape[1:])
        return Selected(select.masked_fill(~kept, -1))


def check_rows(name: str, rows: Tensor, batch: int, device: torch.device) -> None:
    """Raise TypeError or ValueError unless `rows` are lists of keys, [B, M] or [B, G, M]."""
    checks.device(name, checks.tensor(name, rows), device)
    if rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {rows.dtype}")
    if rows.ndim not in (2, 3) or rows.shape[0] != batch:
        raise ValueError(f"{name} must have shape [B, M] or [B, G, M] with B = {batch}, got {list(rows.shape)}")


def listed(mask: Tensor, k: int | None = None) -> Tensor:
    """bool [..., N] -> int64 [..., min(k, N)]: the places of the first k that are True, then -1."""
    n = mask.shape[-1]
    most = n if k is None else min(k, n)
    place = mask.cumsum(-1) - 1
    slot = torch.where(mask & (place < most), place, most)  # slot `most` takes the rest
    rows = torch.arange(n, device=mask.device).expand_as(slot)
    return slot.new_full((*mask.shape[:-1], most + 1), -1).scatter(-1, slot, rows)[..., :most]


def finite(bias: Tensor) -> Tensor:
    """A bias whose -inf and NaN, of keys that are never selected, are 0."""
    return torch.where(bias.isfinite(), bias, 0)


def _check(name: str, value: Tensor, keys: Tensor) -> None:
    checks.device(name, checks.tensor(name, value), keys.device)
    b, n = keys.shape[:2]
    if value.ndim not in (2, 3) or value.shape[0] != b or value.shape[-1] != n:
        raise ValueError(f"{name} must have shape [B, N] or [B, G, N] with B, N = {b}, {n}, got {list(value.shape)}")


def _beside(valid: Tensor, other: Tensor) -> Tensor:
    return valid[:, None] if other.ndim == 3 else valid
