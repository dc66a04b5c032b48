"""Attention over selected keys in plain PyTorch: SDPA where every key is listed, written out where not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg_kernels.numerics import accumulation_dtype, deterministic_add


def turned(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """x [B, h, N, D] with consecutive pairs of channels turned, in float32 or wider; as it is without a rotation.

    cos, sin: broadcastable to [B, h, N, D / 2].
    """
    if cos is None or sin is None:
        return x
    even, odd = x.to(accumulation_dtype(x.dtype)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    queries: list[int],
    keys: list[int],
    sink: bool,
    scale: float | None,
) -> Tensor:
    """SDPA, one call for each run of `queries[i]` queries over the first `keys[i]` keys; no runs: over all.

    Returns [B, h, Nq, Dv].
    """
    q, k = turned(q, q_cos, q_sin).to(q.dtype), turned(k, k_cos, k_sin).to(k.dtype)
    if scale is not None and torch.compiler.is_compiling():
        q, scale = q * scale, 1.0  # as an argument of SDPA, every new scale would compile anew
    if sink:  # in front, so that it lies within every bound
        k, v, keys = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)), [n + 1 for n in keys]
    if not queries:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    if len(queries) == 1:
        (n,) = keys
        return F.scaled_dot_product_attention(q, k[:, :, :n], v[:, :, :n], scale=scale)
    parts = [
        F.scaled_dot_product_attention(run, k[:, :, :n], v[:, :, :n], scale=scale)
        for run, n in zip(q.split(queries, dim=2), keys, strict=True)
    ]
    return torch.cat(parts, dim=2)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    queries: list[int],
    keys: list[int],
    sink: bool,
    scale: Tensor | float | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, h, Nq, Dv] in the dtype of q, and logsumexp [B, h, Nq] in the dtype of the sums.

    index: [B, G, M] rows of k and v, one list for each of G equal groups of queries; None lists them all.
    Run i is `queries[i]` queries (whole groups, if G > 1) over the first `keys[i]` entries of their lists;
    no runs: all queries, whole lists. q_cos ... k_sin: as for `turned`. scale: a number or 0-dim; None is D ** -0.5.
    """
    kind, dtype, factor = q.dtype, accumulation_dtype(q.dtype), _factor(q, scale)
    q, k = turned(q, q_cos, q_sin), turned(k, k_cos, k_sin)
    outs, lses = [], []
    with torch.autocast(q.device.type, enabled=False):
        for run in _runs(q, k, index, queries, keys):
            scores = _scores(run.grouped(q, dtype), run.selected(k, dtype), run.valid, sink, factor)
            out = _probabilities(scores, sink) @ run.selected(v, dtype)
            outs.append(out.flatten(2, 3))
            lses.append(scores.logsumexp(dim=-1).flatten(2, 3))
    return torch.cat(outs, dim=2).to(kind), torch.cat(lses, dim=2)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    queries: list[int],
    keys: list[int],
    sink: bool,
    scale: Tensor | float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; the probabilities are computed again, without `out` and `lse`."""
    kinds = q.dtype, k.dtype, v.dtype
    dtype, factor = accumulation_dtype(q.dtype), _factor(q, scale)
    q, k = turned(q, q_cos, q_sin), turned(k, k_cos, k_sin)
    grad_k, grad_v = (torch.zeros(t.shape, dtype=dtype, device=t.device) for t in (k, v))
    grads_q = []
    with torch.autocast(q.device.type, enabled=False):
        for run in _runs(q, k, index, queries, keys):
            q_run, k_run, v_run = run.grouped(q, dtype), run.selected(k, dtype), run.selected(v, dtype)
            p = _probabilities(_scores(q_run, k_run, run.valid, sink, factor), sink)
            grad = run.grouped(grad_out, dtype)
            grad_p = grad @ v_run.mT
            mean = (p * grad_p).sum(dim=-1, keepdim=True)
            if grad_lse is not None:
                mean = mean - run.grouped(grad_lse[..., None], dtype)
            grad_scores = p * (grad_p - mean) * factor
            grads_q.append((grad_scores @ k_run).flatten(2, 3))
            rows = run.rows.flatten(1)
            deterministic_add(grad_k, rows, (grad_scores.mT @ q_run).flatten(2, 3), dim=2)
            deterministic_add(grad_v, rows, (p.mT @ grad).flatten(2, 3), dim=2)
    grad_q, grad_k = _turned_back(torch.cat(grads_q, dim=2), q_cos, q_sin), _turned_back(grad_k, k_cos, k_sin)
    return grad_q.to(kinds[0]), grad_k.to(kinds[1]), grad_v.to(kinds[2])


def _turned_back(grad: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    return turned(grad, cos, None if sin is None else -sin)


def _factor(q: Tensor, scale: Tensor | float | None) -> Tensor | float:
    return max(q.shape[3], 1) ** -0.5 if scale is None else scale


class _Run(NamedTuple):
    """Consecutive queries that attend to equally many entries of their lists."""

    queries: slice
    rows: Tensor  # [B, G, M] int64, 0 where not valid
    valid: Tensor  # [B, G, M] bool

    def grouped(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """The run's queries of [B, h, Nq, D], by group: [B, h, G, Nq / G, D]."""
        run = tokens[:, :, self.queries].to(dtype)
        groups = self.rows.shape[1]
        return run.unflatten(2, (groups, run.shape[2] // groups))

    def selected(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """The listed rows of [B, h, Nk, D], by group: [B, h, G, M, D]; zero where the list says none."""
        rows = self.rows.flatten(1)[:, None, :, None].expand(-1, tokens.shape[1], -1, tokens.shape[3])
        found = tokens.gather(2, rows).unflatten(2, self.rows.shape[1:])
        return found.masked_fill(~self.valid[:, None, :, :, None], 0).to(dtype)


def _runs(q: Tensor, k: Tensor, index: Tensor | None, queries: list[int], keys: list[int]) -> Iterator[_Run]:
    rows_of_k = k.shape[2]
    if index is None:
        index = torch.arange(rows_of_k, device=k.device).expand(k.shape[0], 1, rows_of_k)
    valid = (index >= 0) & (index < rows_of_k)
    rows = index.long().masked_fill(~valid, 0)
    per_group = q.shape[2] // index.shape[1]
    start = 0
    if not queries:
        queries, keys = [q.shape[2]], [index.shape[2]]
    for count, n in zip(queries, keys, strict=True):
        stop = start + count
        groups = slice(start // per_group, stop // per_group) if index.shape[1] > 1 else slice(None)
        n = n if rows_of_k else 0  # nothing to gather from
        yield _Run(slice(start, stop), rows[:, groups, :n], valid[:, groups, :n])
        start = stop


def _scores(q: Tensor, k: Tensor, valid: Tensor, sink: bool, factor: Tensor | float) -> Tensor:
    """[B, h, G, Nq / G, M], -inf where not valid; a sink is one more column, of zeros."""
    scores = (q @ k.mT * factor).masked_fill(~valid[:, None, :, None, :], float("-inf"))
    return F.pad(scores, (0, 1)) if sink else scores


def _probabilities(scores: Tensor, sink: bool) -> Tensor:
    """Of the listed keys: softmax, and 0 where a query has no key at all."""
    if sink:
        return scores.softmax(dim=-1)[..., :-1]
    return scores.softmax(dim=-1).masked_fill((scores == float("-inf")).all(dim=-1, keepdim=True), 0)
