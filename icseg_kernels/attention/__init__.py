"""selected_attention: softmax attention over lists of keys, with bounds for masks and an optional sink."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icseg_kernels import backend as backends
from icseg_kernels import checks, flops, numerics
from icseg_kernels.attention import reference

__all__ = ["KeyBounds", "selected_attention"]

KeyBounds = int | Sequence[tuple[int, int]]

backends.declare("selected_attention", {"reference": backends.Backend()})


@overload
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    index: Tensor | None = None,
    kv_end: KeyBounds | None = None,
    sink: bool = False,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    index: Tensor | None = None,
    kv_end: KeyBounds | None = None,
    sink: bool = False,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    index: Tensor | None = None,
    kv_end: KeyBounds | None = None,
    sink: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every query over the keys that its list names.

    q:          [B, h, Nq, D]; k: [B, h, Nk, D]; v: [B, h, Nk, Dv]; one floating dtype. Dv may differ from D.
    index:      [B, M], or [B, G, M] with one list for each of G equal, consecutive groups of Nq / G queries;
                int32 or int64 rows of k and v. An entry below 0 or not below Nk is no key; a row named twice
                counts twice. None lists every row once: the call is torch's scaled_dot_product_attention.
    kv_end:     how many keys, from the front of the list (of k and v, without index), a query attends to.
                An int for all queries, or consecutive runs of queries as (queries, keys) pairs whose queries
                add up to Nq; with G > 1 lists, a run must cover whole groups. Plain ints, so never a mask.
    sink:       a query may also attend to a key of zeros with a value of zeros (torch.nn.MultiheadAttention's
                add_zero_attn), wherever kv_end lies.
    scale:      factor of q k^T, finite; None is D ** -0.5. New values do not compile anew.
    return_lse: also return log(sum(exp(scores))) [B, h, Nq], sink included; float32, or float64 for float64.
                Two results over disjoint keys, without sinks, merge exactly with it.
    backend:    None or "reference".

    Returns [B, h, Nq, Dv] in the dtype of q, always a new tensor (there is no `out=`). A query with no key gives
    0, and logsumexp -inf (0 with a sink). Once differentiable in q, k and v, also through logsumexp; not in forward
    mode. Without index and logsumexp the half types are computed as SDPA does (under torch.compile, q times a given
    scale is rounded to its dtype first), otherwise in float32; autocast acts as on SDPA.
    Raises TypeError or ValueError for an argument of another type, dtype, shape, device or range, BackendError if
    the named backend cannot serve.

    Asymmetric attention without a mask. With 3 support tokens, 1 register and 2 target tokens laid out
    [support | register | target], support tokens see support and register, all others see everything:

    ```
    selected_attention(q, k, v, kv_end=[(3, 4), (3, 6)])     # q, k, v [B, h, 6, D]
    ```
    """
    q, k, v = _checked_tokens(q, k, v)
    if index is not None:
        index = _checked_index(index, q)
    queries: list[int] = []  # no runs: all queries, all listed keys
    keys: list[int] = []
    if isinstance(kv_end, Sequence):
        queries, keys = _checked_runs(kv_end, q, k, index)
    elif kv_end is not None:
        k, v, index = _first_keys(k, v, index, kv_end)
    scale = None if scale is None else checks.number("scale", scale)
    backends.select("selected_attention", backend, q, k, v, index)
    # SDPA of no key would be NaN where q is, and of no feature NaN everywhere.
    served_by_sdpa = index is None and q.shape[3] > 0 and (sink or 0 not in (keys or [k.shape[2]]))
    if served_by_sdpa and not return_lse:
        return reference.dense(q, k, v, queries, keys, sink, scale)
    factor = None if scale is None else numerics.scalar(scale, q.device)
    out, lse = backends.call(_SelectedAttention, _forward_op, q, k, v, index, queries, keys, sink, factor)
    return (out, lse) if return_lse else out


class _SelectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor | None,
        queries: list[int],
        keys: list[int],
        sink: bool,
        scale: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return _forward_op(q, k, v, index, queries, keys, sink, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, index, *ctx.settings, scale = inputs
        ctx.save_for_backward(q, k, v, index, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, scale = ctx.saved_tensors
        return *_backward_op(grad_out, grad_lse, *tensors, *ctx.settings, scale), *(None,) * 5


def _checked_tokens(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as autocast has them."""
    q, k, v = (numerics.autocast(checks.floating(name, t)) for name, t in (("q", q), ("k", k), ("v", v)))
    checks.device("k", k, q.device)
    checks.device("v", v, q.device)
    if q.ndim != 4:
        raise ValueError(f"q must have shape [B, h, Nq, D], got {list(q.shape)}")
    b, h, _, d = q.shape
    if k.ndim != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != d:
        raise ValueError(f"k must have shape [B, h, Nk, D] with B, h, D = {b}, {h}, {d}, got {list(k.shape)}")
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v must have shape [B, h, Nk, Dv] with B, h, Nk = {b}, {h}, {k.shape[2]}, got {list(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    return q, k, v


def _checked_index(index: Tensor, q: Tensor) -> Tensor:
    """index as [B, G, M]."""
    b, nq = q.shape[0], q.shape[2]
    checks.device("index", checks.tensor("index", index), q.device)
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"index must be int32 or int64, got {index.dtype}")
    if index.ndim not in (2, 3) or index.shape[0] != b:
        raise ValueError(f"index must have shape [B, M] or [B, G, M] with B = {b}, got {list(index.shape)}")
    if index.ndim == 2:
        return index[:, None]
    if index.shape[1] == 0 or nq % index.shape[1]:
        raise ValueError(f"index must name G groups that divide Nq = {nq}, got shape {list(index.shape)}")
    return index if nq else index[:, :1]


def _first_keys(k: Tensor, v: Tensor, index: Tensor | None, n: int) -> tuple[Tensor, Tensor, Tensor | None]:
    listed = k.shape[2] if index is None else index.shape[2]
    n = checks.integer("kv_end", n, 0, listed, otherwise=" or a sequence of (queries, keys) pairs of integers")
    return (k[:, :, :n], v[:, :, :n], None) if index is None else (k, v, index[:, :, :n])


def _checked_runs(
    kv_end: Sequence[tuple[int, int]], q: Tensor, k: Tensor, index: Tensor | None
) -> tuple[list[int], list[int]]:
    """Queries and keys of each run."""
    nq, groups, listed = q.shape[2], 1, k.shape[2]
    if index is not None:
        groups, listed = index.shape[1:]
    pairs = [checks.pair(f"kv_end[{i}]", run) for i, run in enumerate(kv_end)]
    queries = [count for count, _ in pairs if count != 0]
    keys = [n for count, n in pairs if count != 0]
    if sum(queries) != nq or any(count < 0 for count in queries):
        raise ValueError(f"kv_end must hold runs whose queries add up to Nq = {nq}, got {queries}")
    if any(not 0 <= n <= listed for n in keys):
        raise ValueError(f"kv_end must hold numbers of keys from 0 to {listed}, got {keys}")
    if groups > 1 and any(count % (nq // groups) for count in queries):
        raise ValueError(f"kv_end must hold runs of whole groups of {nq // groups} queries, got {queries}")
    return queries, keys


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    queries: list[int],
    keys: list[int],
    sink: bool,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    b, h, nq, _ = q.shape
    lse = q.new_empty(b, h, nq, dtype=numerics.accumulation_dtype(q.dtype))
    return q.new_empty(b, h, nq, v.shape[3]), lse


def _fake_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    queries: list[int],
    keys: list[int],
    sink: bool,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_forward_op = backends.register(
    "selected_attention(Tensor q, Tensor k, Tensor v, Tensor? index, SymInt[] queries, SymInt[] keys, "
    "bool sink, Tensor? scale) -> (Tensor, Tensor)",
    reference.forward,
    _fake_forward,
)
_backward_op = backends.register(
    "selected_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor q, Tensor k, Tensor v, "
    "Tensor? index, SymInt[] queries, SymInt[] keys, bool sink, Tensor? scale) -> (Tensor, Tensor, Tensor)",
    reference.backward,
    _fake_backward,
)


def _count_forward(
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    index: tuple[int, ...] | None,
    queries: list[int],
    keys: list[int],
    sink: bool,
    scale: Any,
    *,
    out_shape: Any,
) -> int:
    return flops.selected_attention_flops(q[0], q[1], _pairs(q, k, index, queries, keys), q[3], v[3])


def _count_backward(
    grad_out: tuple[int, ...],
    grad_lse: tuple[int, ...],
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    index: tuple[int, ...] | None,
    queries: list[int],
    keys: list[int],
    sink: bool,
    scale: Any,
    *,
    out_shape: Any,
) -> int:
    return flops.selected_attention_backward_flops(q[0], q[1], _pairs(q, k, index, queries, keys), q[3], v[3])


def _pairs(
    q: tuple[int, ...], k: tuple[int, ...], index: tuple[int, ...] | None, queries: list[int], keys: list[int]
) -> int:
    if not queries:
        return q[2] * (k[2] if index is None else index[2])
    return sum(count * n for count, n in zip(queries, keys, strict=True))


flops.register(_forward_op, _count_forward)
flops.register(_backward_op, _count_backward)
