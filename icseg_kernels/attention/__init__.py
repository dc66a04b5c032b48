"""selected_attention: softmax attention over lists of keys, with bounds for masks and an optional sink."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icseg_kernels import backend as backends
from icseg_kernels import checks, flops, library, numerics, triton_launch
from icseg_kernels.attention import native, reference, triton

__all__ = ["KeyBounds", "Rotation", "selected_attention"]

KeyBounds = int | Sequence[tuple[int, int]]


class Rotation(NamedTuple):
    """Cosines and sines [B, h, N, D / 2] of the angles by which consecutive pairs of channels are turned."""

    cos: Tensor
    sin: Tensor


Rotary = tuple[Rotation | None, Rotation | None]

_IMPLEMENTATIONS: dict[str, Any] = {"triton": triton, "native": native, "reference": reference}
_NO_ANGLES = (None,) * 4

backends.declare(
    "selected_attention",
    {
        "triton": backends.Backend(triton_launch.missing, triton.unsupported, triton.slower),
        "native": backends.Backend(library.missing, native.unsupported, native.slower),
        "reference": backends.Backend(),
    },
)


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
    rotary: Rotary | None = None,
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
    rotary: Rotary | None = None,
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
    rotary: Rotary | None = None,
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
    rotary:     rotary position embedding, (rotation of q, rotation of k), each a `Rotation` of cosines and sines or
                None: channels (2i, 2i + 1) of a token become (a cos - b sin, a sin + b cos) before the scores, in
                float32 or wider. Tensors broadcastable to [B, h, N, D / 2], float32 (float64 for float64), of any
                strides; they get no gradient. Rows of k that no list names are not turned.
    return_lse: also return log(sum(exp(scores))) [B, h, Nq], sink included; float32, or float64 for float64.
                Two results over disjoint keys, without sinks, merge exactly with it.
    backend:    None, "triton", "native" or "reference". Without index and logsumexp, the reference is torch's SDPA,
                and None takes it where it is the faster one (`triton.slower`, `native.slower`). Triton serves up to 256
                channels (128 that are turned) and up to 4 runs of kv_end.

    Returns [B, h, Nq, Dv] in the dtype of q, always a new tensor (there is no `out=`). A query with no key gives
    0, and logsumexp -inf (0 with a sink). Once differentiable in q, k and v, also through logsumexp; not in forward
    mode. Without index and logsumexp the half types are computed as SDPA does (under torch.compile, q times a given
    scale is rounded to its dtype first), otherwise in float32; but factors of Triton's products are rounded to the
    half type, and to TF32 where torch.set_float32_matmul_precision allows it. Autocast acts as on SDPA.
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
    if kv_end is not None:
        queries, keys = _checked_runs(kv_end, q, k, index)
    scale = None if scale is None else checks.number("scale", scale)
    # SDPA of no key would be NaN where q is, and of no feature NaN everywhere.
    by_sdpa = index is None and not return_lse and q.shape[3] > 0 and (sink or 0 not in (keys or [k.shape[2]]))
    name = backends.select("selected_attention", backend, q, k, v, index, by_sdpa, len(queries), rotary is not None)
    angles = _NO_ANGLES if rotary is None else _checked_rotary(rotary, q, k)
    if by_sdpa and name == "reference":
        return reference.dense(q, k, v, *angles, queries, keys, sink, scale)
    out, lse = backends.call(_SelectedAttention, _forward_op, q, k, v, index, *angles, queries, keys, sink, scale, name)
    return (out, lse) if return_lse else out


class _SelectedAttention(torch.autograd.Function):
    @staticmethod
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
        scale: Tensor | None,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        call = q, k, v, index, q_cos, q_sin, k_cos, k_sin, queries, keys, sink, scale, backend
        return _forward_implementation(*call) if backends.unwatched(call) else _forward_op(*call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, queries, keys, sink, scale, backend = inputs
        ctx.set_materialize_grads(False)
        ctx.settings = queries, keys, sink, backend
        ctx.save_for_backward(*output, *tensors, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        queries, keys, sink, backend = ctx.settings
        *tensors, scale = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(tensors[0])
        call = grad_out, grad_lse, *tensors, queries, keys, sink, scale, backend
        grads = _backward_implementation(*call) if backends.unwatched(call) else _backward_op(*call)
        return *grads, *(None,) * 10


def _checked_tokens(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as autocast has them."""
    checks.floating("q", q), checks.floating("k", k), checks.floating("v", v)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (numerics.autocast(t) for t in (q, k, v))
    device = q.device
    if k.device != device or v.device != device:
        checks.device("k", k, device)
        checks.device("v", v, device)
    shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if len(shape) != 4:
        raise ValueError(f"q must have shape [B, h, Nq, D], got {list(shape)}")
    b, h, _, d = shape
    if len(k_shape) != 4 or (k_shape[0], k_shape[1], k_shape[3]) != (b, h, d):
        raise ValueError(f"k must have shape [B, h, Nk, D] with B, h, D = {b}, {h}, {d}, got {list(k_shape)}")
    if len(v_shape) != 4 or v_shape[:3] != k_shape[:3]:
        raise ValueError(
            f"v must have shape [B, h, Nk, Dv] with B, h, Nk = {b}, {h}, {k_shape[2]}, got {list(v_shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    return q, k, v


def _checked_rotary(
    rotary: Rotary, q: Tensor, k: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Cosines and sines for q, then for k."""
    if not isinstance(rotary, tuple) or len(rotary) != 2:
        raise TypeError(f"rotary must be a pair of rotations, of q and of k, got {checks.shown(rotary)}")
    angles: list[Tensor | None] = []
    for name, tokens, rotation in (("rotary[0]", q, rotary[0]), ("rotary[1]", k, rotary[1])):
        if rotation is None:
            angles += [None, None]
            continue
        if not isinstance(rotation, tuple) or len(rotation) != 2:
            raise TypeError(f"{name} must be a Rotation or None, got {checks.shown(rotation)}")
        b, h, n, d = tokens.shape
        wanted = numerics.accumulation_dtype(tokens.dtype)
        if d % 2:
            raise ValueError(f"{name} turns pairs of channels, so D must be even, got {d}")
        for part, t in zip(("cos", "sin"), rotation, strict=True):
            checks.device(f"{name}.{part}", checks.tensor(f"{name}.{part}", t), tokens.device)
            if t.dtype != wanted:
                raise TypeError(f"{name}.{part} must be {wanted} for tokens of {tokens.dtype}, got {t.dtype}")
            if t.ndim > 4 or any(size not in (1, n) for size, n in zip(t.shape[::-1], (d // 2, n, h, b), strict=False)):
                raise ValueError(
                    f"{name}.{part} must be broadcastable to {[b, h, n, d // 2]}, got shape {list(t.shape)}"
                )
            angles.append(t.detach())
    q_cos, q_sin, k_cos, k_sin = angles
    return q_cos, q_sin, k_cos, k_sin


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


def _checked_runs(kv_end: KeyBounds, q: Tensor, k: Tensor, index: Tensor | None) -> tuple[list[int], list[int]]:
    """Queries and keys of each run."""
    nq, groups, listed = q.shape[2], 1, k.shape[2]
    if index is not None:
        groups, listed = index.shape[1:]
    if not isinstance(kv_end, Sequence):
        n = checks.integer("kv_end", kv_end, 0, listed, otherwise=" or a sequence of (queries, keys) pairs of integers")
        return ([nq], [n]) if nq else ([], [])
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
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    queries: list[int],
    keys: list[int],
    sink: bool,
    scale: Tensor | float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    (b, h, nq, _), dv = q.shape, v.shape[3]
    lse = q.new_empty(b, h, nq, dtype=numerics.accumulation_dtype(q.dtype))
    if backend in ("triton", "native"):
        return q.new_empty(b, nq, h, dv).transpose(1, 2), lse
    return q.new_empty(b, h, nq, dv), lse


def _fake_backward(
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _forward_implementation(*arguments: Any) -> tuple[Tensor, Tensor]:
    *rest, backend = arguments
    return _IMPLEMENTATIONS[backend].forward(*rest)


def _backward_implementation(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rest, backend = arguments
    return _IMPLEMENTATIONS[backend].backward(*rest)


_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? index, Tensor? q_cos, Tensor? q_sin, Tensor? k_cos, Tensor? k_sin, "
    "SymInt[] queries, SymInt[] keys, bool sink, Tensor? scale, str backend"
)
_forward_op = backends.register(
    f"selected_attention({_CALL}) -> (Tensor, Tensor)", _forward_implementation, _fake_forward
)
_backward_op = backends.register(
    f"selected_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_CALL}) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_implementation,
    _fake_backward,
)

_Shape = tuple[int, ...]


def _count_forward(q: _Shape, k: _Shape, v: _Shape, index: _Shape | None, *rest: Any, out_shape: Any) -> int:
    queries, keys = rest[4:6]
    return flops.selected_attention_flops(q[0], q[1], _pairs(q, k, index, queries, keys), q[3], v[3])


def _count_backward(*arguments: Any, out_shape: Any) -> int:
    q, k, v, index, *rest = arguments[4:]
    queries, keys = rest[4:6]
    return flops.selected_attention_backward_flops(q[0], q[1], _pairs(q, k, index, queries, keys), q[3], v[3])


def _pairs(q: _Shape, k: _Shape, index: _Shape | None, queries: list[int], keys: list[int]) -> int:
    if not queries:
        return q[2] * (k[2] if index is None else index[2])
    return sum(count * n for count, n in zip(queries, keys, strict=True))


flops.register(_forward_op, _count_forward)
flops.register(_backward_op, _count_backward)
