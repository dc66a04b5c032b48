"""qkv_projection by Triton: one launch forward.

Backward, the first launch turns the gradients of queries and keys back, and joins them with those of values to one
matrix, and normalises x anew where that is what was projected. Of these torch's products make the gradients of x and
weight: the rotation lies between attention and them, so that they have nothing to be fused with, and each side is read
by both. With a norm, another launch goes back through it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from icseg_kernels import triton_launch
from icseg_kernels.numerics import accumulation_dtype


def unsupported(x: Tensor, weight: Tensor, *_: Tensor) -> list[str]:
    """Why the kernels cannot project `x`."""
    reasons = triton_launch.unsupported_device("x", x)
    for name, tensor in (("x", x), ("weight", weight)):
        reasons += triton_launch.unsupported_dtype(name, tensor)
    return reasons


def stats_shape(x: Tensor, norm_weight: Tensor | None) -> tuple[int, ...]:
    """Of means and reciprocal deviations, of which there are none without a norm."""
    return (0,) if norm_weight is None else (2, *x.shape[:2])


def gradients(
    x: Tensor,
    norm_weight: Tensor | None,
    weights: Sequence[Tensor],
    wants_input: bool,
    wants_weight: bool,
    wants_bias: bool,
    wants_added: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fresh memory for gradients of x, of what is added to it where that is another one, norm, weight and bias.

    None are of shape [0]. wants_input: of x, norm or added; that of what is added without a norm is that of x.
    """
    first, rows = weights[0], sum(w.shape[0] for w in weights)
    normed = wants_input and norm_weight is not None
    return (
        x.new_empty(x.shape if wants_input else (0,)),
        first.new_empty(x.shape if normed and wants_added else (0,)),
        x.new_empty((2, x.shape[2]) if normed else (0,), dtype=accumulation_dtype(x.dtype)),
        first.new_empty((rows, x.shape[2]) if wants_weight else (0,)),
        first.new_empty((rows,) if wants_bias else (0,)),
    )


def qkv_projection(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [B, N, C] -> q [B, heads, queries, D], k and v [B, kv_heads, N, D], and what its norm found, `stats_shape`."""
    from icseg_kernels.qkv_projection import triton_kernels as kernels

    weights = [w for w in (weight, weight_2, weight_3) if w is not None]
    width = _width(x, weights, heads, kv_heads, queries)
    batch, count, channels = x.shape
    biases = [b for b in (bias, bias_2, bias_3) if b is not None]
    for w, b in zip(weights, biases, strict=True) if biases else ():
        _guard("bias", b, w.shape[:1], x, weight.dtype)
    q, k, v = (weight.new_empty((batch, *shape, width)) for shape in ((heads, queries), *[(kv_heads, count)] * 2))
    stats = x.new_empty(stats_shape(x, norm_weight), dtype=accumulation_dtype(x.dtype))
    if batch == 0 or count == 0:
        return q, k, v, stats
    sizes = [heads * width, kv_heads * width, kv_heads * width]
    x, norm_weight, norm_bias, added, strides = _entering(x, norm_weight, norm_bias, added)
    q_cos, q_sin, q_turn = _rotation(q_cos, q_sin, (batch, heads, queries, width), x, weight.dtype)
    k_cos, k_sin, k_turn = _rotation(k_cos, k_sin, (batch, kv_heads, count, width), x, weight.dtype)
    tf32 = weight.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    plain = norm_weight is None and added is None and x.dtype == weight.dtype
    options = kernels.project_options(batch * count, channels, sum(sizes), weight.dtype, tf32, plain)
    of_queries = _tiles(batch * queries, options["BLOCK_T"]) * _tiles(sizes[0], options["BLOCK_O"])
    of_keys = _tiles(batch * count, options["BLOCK_T"]) * _tiles(sizes[1], options["BLOCK_O"])
    # The interpreter's products of bfloat16 are wrong.
    exact = triton_launch.INTERPRETED and weight.dtype == torch.bfloat16
    triton_launch.launch(
        kernels.project_kernel, (of_queries + 2 * of_keys,), x.device,
        x, norm_weight, norm_bias, added, *_sections(weights, sizes), *_sections(biases, sizes),
        q_cos, q_sin, k_cos, k_sin, q, k, v, None if norm_weight is None else stats,
        *strides, *q_turn, *k_turn, batch, count, queries, of_queries, eps,
        C=channels, HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=width, SUM=triton_launch.triton_dtype(_sums(x, weight)),
        FACTOR=triton_launch.triton_dtype(torch.float32 if exact else weight.dtype),
        PRECISION="tf32" if tf32 else "ieee", **options,
    )  # fmt: skip
    return q, k, v, stats


def qkv_projection_backward(
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    stats: Tensor,
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
    wants_input: bool,
    wants_weight: bool,
    wants_bias: bool,
    wants_added: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `gradients` has them."""
    from icseg_kernels.qkv_projection import triton_kernels as kernels

    weights = [w for w in (weight, weight_2, weight_3) if w is not None]
    width = _width(x, weights, heads, kv_heads, queries)
    batch, count, channels = x.shape
    rows, outputs = batch * count, (heads + 2 * kv_heads) * width
    wants = wants_input, wants_weight, wants_bias, wants_added
    if rows == 0 or not any(wants):
        nothing = gradients(x, norm_weight, weights, *wants)
        return nothing[0], nothing[1], nothing[2].zero_(), nothing[3].zero_(), nothing[4].zero_()
    if norm_weight is not None:
        _guard("stats", stats, stats_shape(x, norm_weight), x, accumulation_dtype(x.dtype))
    shape = x.shape
    x, norm_weight, norm_bias, added, strides = _entering(x, norm_weight, norm_bias, added)
    q_cos, q_sin, q_turn = _rotation(q_cos, q_sin, (batch, heads, queries, width), x, weight.dtype)
    k_cos, k_sin, k_turn = _rotation(k_cos, k_sin, (batch, kv_heads, count, width), x, weight.dtype)
    grads = []
    sizes = (heads, queries), (kv_heads, count), (kv_heads, count)
    for name, grad, size in zip("qkv", (grad_q, grad_k, grad_v), sizes, strict=True):
        whole = (batch, *size, width)
        grad = weight.new_zeros(()).expand(whole) if grad is None else grad
        _guard(f"grad_{name}", grad, whole, x, weight.dtype)
        grads.append(grad)
    joined = weight.new_empty((rows, outputs))
    plain = norm_weight is None and added is None and x.dtype == weight.dtype
    entering = weight.new_empty((rows, channels)) if wants_weight and not plain else None
    columns = kernels.ADJOINT["BLOCK_O"]
    blocks = sum(_tiles(n * width, columns) for n in (heads, kv_heads, kv_heads))
    blocks += 0 if entering is None else _tiles(channels, columns)
    found = None if norm_weight is None else stats.contiguous()
    triton_launch.launch(
        kernels.adjoint_kernel, (_tiles(rows, kernels.ADJOINT["BLOCK_T"]) * blocks,), x.device,
        *grads, q_cos, q_sin, k_cos, k_sin, x, norm_weight, norm_bias, added, found, joined, entering,
        *(stride for grad in grads for stride in grad.stride()), *q_turn, *k_turn, *strides, batch, count, queries,
        C=channels, HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=width, SUM=triton_launch.triton_dtype(_sums(x, weight)),
        **kernels.ADJOINT,
    )  # fmt: skip
    none = gradients(x, norm_weight, weights, False, False, False, False)
    grad_x, grad_input, grad_norm, grad_weight, grad_bias = none
    with torch.autocast(x.device.type, enabled=False):
        if wants_weight:
            grad_weight = joined.mT @ (x.reshape(rows, channels) if entering is None else entering)
        if wants_bias:
            grad_bias = joined.sum(0)
        if not wants_input:
            return grad_x, grad_input, grad_norm, grad_weight, grad_bias
        first = weight.shape[0]
        grad = joined[:, :first] @ weight
        for w in weights[1:]:
            grad.addmm_(joined[:, first : first + w.shape[0]], w)
            first += w.shape[0]
    if norm_weight is None:
        return grad.view(shape).to(x.dtype), grad_input, grad_norm, grad_weight, grad_bias
    grad_x = x.new_empty(shape)
    options = kernels.norm_options(rows, channels)
    programs = _tiles(rows, options["BLOCK_T"])
    partial = grad_norm.new_empty((programs, 2, channels))
    triton_launch.launch(
        kernels.norm_kernel, (programs,), x.device, grad, x, norm_weight, found, grad_x, partial, *strides[:2], batch,
        count, C=channels, **options,
    )  # fmt: skip
    return grad_x, grad.view(shape) if wants_added else grad_input, partial.sum(0), grad_weight, grad_bias


def _width(x: Tensor, weights: Sequence[Tensor], heads: int, kv_heads: int, queries: int) -> int:
    """Channels of a head, where all sizes are those of a projection."""
    if x.ndim != 3 or heads < 1 or kv_heads < 1 or not 0 <= queries <= x.shape[1]:
        raise ValueError(f"x must be [B, N, C], heads positive and queries up to N, got {list(x.shape)}, {queries}")
    rows = [w.shape[0] for w in weights]
    width = sum(rows) // (heads + 2 * kv_heads)
    wanted = {
        1: [(heads + 2 * kv_heads) * width],
        2: [heads * width, 2 * kv_heads * width],
        3: [heads * width, kv_heads * width, kv_heads * width],
    }[len(weights)]
    if width < 1 or rows != wanted:
        raise ValueError(f"weight must have the same rows for each of {heads} and twice {kv_heads} heads, got {rows}")
    for w in weights:
        _guard("weight", w, (w.shape[0], x.shape[2]), x, weights[0].dtype)
    return width


def _guard(name: str, tensor: Tensor, shape: Sequence[int], x: Tensor, dtype: torch.dtype) -> None:
    """The last check before raw pointers: kernels read as much memory as the shapes promise."""
    if tensor.shape != tuple(shape) or tensor.dtype != dtype or tensor.device != x.device:
        raise ValueError(
            f"{name} must have shape {list(shape)} and be {dtype} on {x.device}, got {list(tensor.shape)} "
            f"{tensor.dtype} on {tensor.device}"
        )


def _entering(
    x: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, added: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, tuple[int, int, int, int]]:
    """What is projected, with rows without gaps, and strides of samples and tokens of x and of what is added."""
    batch, count, channels = x.shape
    if channels > 1 and x.stride(2) != 1:
        x = x.contiguous()
    if norm_weight is not None:
        _guard("norm_weight", norm_weight, (channels,), x, norm_weight.dtype)
        norm_weight = norm_weight.contiguous()
    if norm_bias is not None:
        _guard("norm_bias", norm_bias, (channels,), x, norm_bias.dtype)
        norm_bias = norm_bias.contiguous()
    batch_stride = token_stride = 0
    if added is not None:
        if channels > 1 and (added.ndim == 0 or added.shape[-1] == 1 or added.stride(-1) != 1):
            added = added.expand(*added.shape[:-1], channels).contiguous()
        added = added.expand(batch, count, channels)
        _guard("added", added, x.shape, x, added.dtype)
        batch_stride, token_stride = added.stride()[:2]
    return x, norm_weight, norm_bias, added, (x.stride(0), x.stride(1), batch_stride, token_stride)


def _rotation(
    cos: Tensor | None, sin: Tensor | None, shape: tuple[int, ...], x: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, tuple[int, ...]]:
    """Cosines and sines for the pairs of channels of `shape`, of the same strides."""
    if cos is None or sin is None:
        return None, None, (0, 0, 0, 0)
    *outer, width = shape
    if width % 2:
        raise ValueError(f"a rotation turns pairs of channels, so D must be even, got {width}")
    shape = (*outer, width // 2)
    cos, sin = cos.expand(shape), sin.expand(shape)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    _guard("a rotation", cos, shape, x, accumulation_dtype(dtype))
    _guard("a rotation", sin, shape, x, cos.dtype)
    return cos, sin, cos.stride()


def _sections(tensors: Sequence[Tensor], sizes: list[int]) -> list[Tensor | None]:
    """Rows of queries, of keys and of values."""
    if not tensors:
        return [None, None, None]
    rows = [t.contiguous() for t in tensors]
    if len(rows) == 1:
        return list(rows[0].split(sizes))
    return [rows[0], *rows[1].split(sizes[1:])] if len(rows) == 2 else list(rows)


def _sums(x: Tensor, weight: Tensor) -> torch.dtype:
    return accumulation_dtype(torch.promote_types(x.dtype, weight.dtype))


def _tiles(size: int, block: int) -> int:
    return math.ceil(size / block)
