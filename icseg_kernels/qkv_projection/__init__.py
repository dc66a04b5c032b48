"""qkv_projection: queries, keys and values of attention in one call, split into heads and turned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icseg_kernels import backend as backends
from icseg_kernels import checks, flops, numerics, triton_launch
from icseg_kernels.attention import Rotary
from icseg_kernels.qkv_projection import reference, triton
from icseg_kernels.qkv_projection.reference import Angles

__all__ = ["qkv_projection"]


def qkv_projection(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor] | None = None,
    *,
    heads: int,
    kv_heads: int | None = None,
    queries: int | None = None,
    norm: tuple[Tensor, Tensor | None] | None = None,
    eps: float = 1e-5,
    added: Tensor | None = None,
    rotary: Rotary | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values for `selected_attention`: layer norm, linear projection and rotation in one launch.

    With y = layer_norm(x) + added, both where given: q, k and v are y weight^T + bias, split into heads; then
    consecutive pairs of channels of q and k are turned.

    x:        [B, N, C] float16, bfloat16, float32 or float64, any strides.
    weight:   [(heads + 2 kv_heads) D, C], the rows of queries first, then of keys, then of values; head i has rows i D
              and following of its part. Or a sequence of weights of these rows: two, of queries, and of keys and
              values; or three. D follows from their rows.
    bias:     as many values as weight has rows, in as many tensors; None: 0.
    kv_heads: of keys and values; None: heads.
    queries:  how many tokens, the last ones, get queries; None: all.
    norm:     weight [C] and bias ([C] or None) of a layer norm of x; eps: added to its variance.
    added:    broadcastable to [B, N, C]: what comes to tokens here only, such as an embedding of their place or kind.
    rotary:   as in `selected_attention`, which then takes q and k without one: (rotation of q, rotation of k), each a
              `Rotation` or None, broadcastable to [B, heads, queries, D / 2] and [B, kv_heads, N, D / 2]. In float32 or
              wider, without gradients.
    backend:  None, "triton" (CUDA, not float64) or "reference", torch's own layers.
    Returns q [B, heads, queries, D], k and v [B, kv_heads, N, D], new tensors of the dtype of weight; of which strides
    depends on the backend: Triton's are contiguous. It normalises and turns in float32 and rounds once before the
    products, which are TF32 where torch.set_float32_matmul_precision allows it, and once after. Its gradients, of x,
    weight, bias, norm and added, are bitwise reproducible and once differentiable; the reference's are torch's own.
    All tensors but rotary have one dtype, except under autocast, which acts as on torch's linear layers.
    Raises TypeError or ValueError for an argument of another type, dtype, shape, device or range, BackendError if the
    named backend cannot serve.

    ```
    layer = torch.nn.Linear(64, 3 * 64)
    q, k, v = qkv_projection(x, layer.weight, layer.bias, heads=4, rotary=(turn, turn))  # x [B, N, 64]
    out = selected_attention(q, k, v)
    ```
    """
    shape = checks.floating("x", x).shape
    if len(shape) != 3 or shape[2] < 1:
        raise ValueError(f"x must have shape [B, N, C] with C > 0, got {list(shape)}")
    heads = checks.integer("heads", heads, 1)
    kv_heads = heads if kv_heads is None else checks.integer("kv_heads", kv_heads, 1, otherwise=" or None")
    queries = shape[1] if queries is None else checks.integer("queries", queries, 0, shape[1], otherwise=" or None")
    kind = x.device.type
    autocasting = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    weights = _checked_weights(weight, x, heads, kv_heads, autocasting)
    biases = None if bias is None else _checked_biases(bias, weights, x, autocasting)
    if norm is not None:
        _check_norm(norm, x, autocasting)
    if type(eps) is not float or not 0 <= eps < 1:
        eps = checks.number("eps", eps, least=0)
    if added is not None:
        _check_like("added", added, x, autocasting)
        if added.ndim > 3 or any(n not in (1, m) for n, m in zip(added.shape[::-1], shape[::-1], strict=False)):
            raise ValueError(f"added must be broadcastable to {list(shape)}, got shape {list(added.shape)}")
    dtype = weights[0].dtype
    if autocasting and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    angles: Angles = (None,) * 4
    if rotary is not None:
        width = sum(w.shape[0] for w in weights) // (heads + 2 * kv_heads)
        shapes = (shape[0], heads, queries, width), (shape[0], kv_heads, shape[1], width)
        angles = _checked_rotary(rotary, shapes, dtype, x.device)
    name = backends.select("qkv_projection", backend, x, *weights)
    if name == "reference":
        return reference.qkv_projection(x, weights, biases, heads, kv_heads, queries, norm, eps, added, angles)
    of_linear: list[Tensor | None] = [None] * 6
    of_linear[: len(weights)] = weights
    if biases is not None:
        of_linear[3 : 3 + len(biases)] = biases
    if autocasting:
        of_linear = [None if t is None else numerics.autocast(t) for t in of_linear]
    call = x, *(norm or (None, None)), added, *of_linear, *angles, heads, kv_heads, queries, eps, name
    q, k, v, _ = backends.call(_QKVProjection, _forward_op, *call)
    return q, k, v


def _check_like(name: str, value: Any, x: Tensor, autocasting: bool) -> Tensor:
    checks.device(name, checks.floating(name, value), x.device)
    if value.dtype != x.dtype and (not autocasting or torch.float64 in (value.dtype, x.dtype)):
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {value.dtype}")
    return value


def _checked_weights(weight: Any, x: Tensor, heads: int, kv_heads: int, autocasting: bool) -> list[Tensor]:
    channels, parts = x.shape[2], heads + 2 * kv_heads
    if isinstance(weight, Tensor):
        weights, names, units = [weight], ["weight"], [parts]
    elif isinstance(weight, list | tuple):
        weights = list(weight)
        if len(weights) not in (2, 3):
            raise ValueError(f"weight must be a tensor, two or three of them, got {len(weights)}")
        names = [f"weight[{i}]" for i in range(len(weights))]
        units = [heads, 2 * kv_heads] if len(weights) == 2 else [heads, kv_heads, kv_heads]
    else:
        raise TypeError(f"weight must be a torch.Tensor or a sequence of them, got {type(weight).__name__}")
    width = 0
    for name, w, unit in zip(names, weights, units, strict=True):
        _check_like(name, w, x, autocasting)
        if w.ndim != 2 or w.shape[1] != channels or w.shape[0] < unit or w.shape[0] % unit:
            raise ValueError(f"{name} must have shape [{unit} D, {channels}] with D > 0, got {list(w.shape)}")
        width = width or w.shape[0] // unit
        if w.shape[0] != width * unit:
            raise ValueError(f"{name} must have {width * unit} rows, {width} a head, got {w.shape[0]}")
    if any(w.dtype != weights[0].dtype for w in weights):
        raise TypeError(f"weight must be of one dtype, got {', '.join(str(w.dtype) for w in weights)}")
    return weights


def _checked_biases(bias: Any, weights: list[Tensor], x: Tensor, autocasting: bool) -> list[Tensor]:
    if isinstance(bias, Tensor):
        biases, names = [bias], ["bias"]
    elif isinstance(bias, list | tuple):
        biases, names = list(bias), [f"bias[{i}]" for i in range(len(bias))]
    else:
        raise TypeError(f"bias must be a torch.Tensor, a sequence of them or None, got {type(bias).__name__}")
    if len(biases) != len(weights):
        raise ValueError(f"bias must be as many tensors as weight, {len(weights)}, got {len(biases)}")
    for name, b, w in zip(names, biases, weights, strict=True):
        _check_like(name, b, x, autocasting)
        if b.shape != w.shape[:1]:
            raise ValueError(f"{name} must have shape [{w.shape[0]}], got {list(b.shape)}")
    return biases


def _check_norm(norm: Any, x: Tensor, autocasting: bool) -> None:
    if not isinstance(norm, tuple) or len(norm) != 2:
        raise TypeError(f"norm must be a pair of weight and bias, or None, got {checks.shown(norm)}")
    for name, value in zip(("norm[0]", "norm[1]"), norm, strict=True):
        if value is None and name == "norm[1]":
            continue
        _check_like(name, value, x, autocasting)
        if value.shape != x.shape[2:]:
            raise ValueError(f"{name} must have shape [{x.shape[2]}], got {list(value.shape)}")


def _checked_rotary(
    rotary: Any, shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> Angles:
    """Cosines and sines for q and k of `shapes`."""
    if not isinstance(rotary, tuple) or len(rotary) != 2:
        raise TypeError(f"rotary must be a pair of rotations, of q and of k, got {checks.shown(rotary)}")
    wanted = numerics.accumulation_dtype(dtype)
    angles: list[Tensor | None] = []
    for name, rotation, (*outer, width) in zip(("rotary[0]", "rotary[1]"), rotary, shapes, strict=True):
        if rotation is None:
            angles += [None, None]
            continue
        if not isinstance(rotation, tuple) or len(rotation) != 2:
            raise TypeError(f"{name} must be a Rotation or None, got {checks.shown(rotation)}")
        if width % 2:
            raise ValueError(f"{name} must turn pairs of channels, D even, got D = {width}")
        full = [*outer, width // 2]
        for part, t in zip(("cos", "sin"), rotation, strict=True):
            checks.device(f"{name}.{part}", checks.tensor(f"{name}.{part}", t), device)
            if t.dtype != wanted:
                raise TypeError(f"{name}.{part} must be {wanted} for tokens of {dtype}, got {t.dtype}")
            if t.ndim > 4 or any(size not in (1, n) for size, n in zip(t.shape[::-1], full[::-1], strict=False)):
                raise ValueError(f"{name}.{part} must be broadcastable to {full}, got shape {list(t.shape)}")
            angles.append(t.detach())
    q_cos, q_sin, k_cos, k_sin = angles
    return q_cos, q_sin, k_cos, k_sin


class _QKVProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        added: Tensor | None,
        weight: Tensor,
        weight_2: Tensor | None,
        weight_3: Tensor | None,
        bias: Tensor | None,
        bias_2: Tensor | None,
        bias_3: Tensor | None,
        q_cos: Tensor | None,
        q_sin: Tensor | None,
        k_cos: Tensor | None,
        k_sin: Tensor | None,
        heads: int,
        kv_heads: int,
        queries: int,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        of_linear = weight, weight_2, weight_3, bias, bias_2, bias_3
        angles = q_cos, q_sin, k_cos, k_sin
        return _forward_op(
            x, norm_weight, norm_bias, added, *of_linear, *angles, heads, kv_heads, queries, eps, backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, heads, kv_heads, queries, _, backend = inputs
        ctx.set_materialize_grads(False)
        ctx.settings = heads, kv_heads, queries, backend
        stats = output[3]
        ctx.mark_non_differentiable(stats)
        ctx.save_for_backward(stats, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        heads, kv_heads, queries, backend = ctx.settings
        stats, *tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad
        wants = any(needed[:4]), any(needed[4:7]), any(needed[7:10])
        grad_x, grad_input, grad_norm, grad_weight, grad_bias = _backward_op(
            *grads[:3], stats, *tensors, heads, kv_heads, queries, *wants, needed[3], backend
        )
        found: list[Tensor | None] = [grad_x if needed[0] else None]
        norm_weight, norm_bias, added, *of_linear = tensors[1:10]
        for i, values in enumerate((norm_weight, norm_bias)):
            found.append(grad_norm[i].to(values.dtype) if needed[1 + i] else None)
        found.append((grad_x if norm_weight is None else grad_input).sum_to_size(added.shape) if needed[3] else None)
        if found[3] is not None:
            found[3] = found[3].to(added.dtype)
        for parts, grad in ((of_linear[:3], grad_weight), (of_linear[3:], grad_bias)):
            first = 0
            for part in parts:
                rows = 0 if part is None else part.shape[0]
                found.append(grad[first : first + rows] if needed[len(found)] else None)
                first += rows
        return *found, *(None,) * 9


def _fake_forward(x: Tensor, norm_weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    weights = [w for w in rest[2:5] if w is not None]
    heads, kv_heads, queries = rest[12:15]
    (batch, count, _), rows = x.shape, sum(w.shape[0] for w in weights)
    width = rows // (heads + 2 * kv_heads)
    of_keys = batch, kv_heads, count, width
    return (
        weights[0].new_empty(batch, heads, queries, width),
        weights[0].new_empty(of_keys),
        weights[0].new_empty(of_keys),
        x.new_empty(triton.stats_shape(x, norm_weight), dtype=numerics.accumulation_dtype(x.dtype)),
    )


def _fake_backward(
    grad_q: Tensor | None, grad_k: Tensor | None, grad_v: Tensor | None, stats: Tensor, x: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    norm_weight, weights = rest[0], [w for w in rest[3:6] if w is not None]
    return triton.gradients(x, norm_weight, weights, *rest[16:20])


def _forward_implementation(*arguments: Any) -> tuple[Tensor, ...]:
    return triton.qkv_projection(*arguments[:-1])


def _backward_implementation(*arguments: Any) -> tuple[Tensor, ...]:
    return triton.qkv_projection_backward(*arguments[:-1])


_CALL = (
    "Tensor x, Tensor? norm_weight, Tensor? norm_bias, Tensor? added, Tensor weight, Tensor? weight_2, "
    "Tensor? weight_3, Tensor? bias, Tensor? bias_2, Tensor? bias_3, Tensor? q_cos, Tensor? q_sin, Tensor? k_cos, "
    "Tensor? k_sin, SymInt heads, SymInt kv_heads, SymInt queries, "
)
_forward_op = backends.register(
    f"qkv_projection({_CALL}float eps, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_implementation,
    _fake_forward,
)
_backward_op = backends.register(
    f"qkv_projection_backward(Tensor? grad_q, Tensor? grad_k, Tensor? grad_v, Tensor stats, {_CALL}"
    "bool wants_input, bool wants_weight, bool wants_bias, bool wants_added, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_implementation,
    _fake_backward,
)
backends.declare(
    "qkv_projection",
    {
        "triton": backends.Backend(triton_launch.missing, triton.unsupported, triton_launch.slower),
        "reference": backends.Backend(),
    },
)


def _count_forward(x: Any, *rest: Any, out_shape: Any) -> int:
    weights, (heads, kv_heads, queries) = rest[3:6], rest[13:16]
    rows = sum(w[0] for w in weights if w is not None)
    width = rows // (heads + 2 * kv_heads)
    return flops.qkv_projection_flops(x[0], x[1], x[2], heads, width, kv_heads, queries)


def _count_backward(*arguments: Any, out_shape: Any) -> int:
    x, *rest = arguments[4:]
    return _count_forward(x, *rest, out_shape=None) * (int(rest[16]) + int(rest[17]))


flops.register(_forward_op, _count_forward)
flops.register(_backward_op, _count_backward)
