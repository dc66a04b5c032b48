"""Attention over selected keys as Triton kernels.

A tile of queries lies in one group of queries and one run of kv_end, so that all its rows see the same keys; a tile of
keys, which gathers gradients, lies between two bounds of kv_end, so that a run sees all its keys or none. With a
rotation, even and odd channels are apart from the load on, and a product over channels is the sum of two.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from icseg_kernels.compilation import Compilation

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)

# Numbers that vary from call to call, of which no kernel needs to know more.
_VARYING = [
    "batches", "heads", "queries", "rows", "listed", "groups", "per_group", "tiles", "splits", "chunk", "runs",
    "stop0", "stop1", "stop2", "end0", "end1", "end2", "end3", "bound0", "bound1", "bound2", "bound3", "positions",
    "slices",
]  # fmt: skip


@triton.jit
def _piece(tile, a, b, c, d, total, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """First and stop of a tile of BLOCK items that straddles none of the bounds a <= b <= c <= d <= total."""
    t0 = tl.cdiv(a, BLOCK)
    t1 = t0 + tl.cdiv(b - a, BLOCK)
    t2 = t1 + tl.cdiv(c - b, BLOCK)
    t3 = t2 + tl.cdiv(d - c, BLOCK)
    before = tl.where(tile < t0, 0, tl.where(tile < t1, t0, tl.where(tile < t2, t1, tl.where(tile < t3, t2, t3))))
    start = tl.where(tile < t0, 0, tl.where(tile < t1, a, tl.where(tile < t2, b, tl.where(tile < t3, c, d))))
    stop = tl.where(tile < t0, a, tl.where(tile < t1, b, tl.where(tile < t2, c, tl.where(tile < t3, d, total))))
    return start + (tile - before) * BLOCK, stop


@triton.jit
def _of_run(position, stop0, stop1, stop2, a, b, c, d):  # type: ignore[no-untyped-def]
    """That of a, b, c, d which belongs to the run in which `position` lies."""
    return tl.where(position < stop0, a, tl.where(position < stop1, b, tl.where(position < stop2, c, d)))


@triton.jit
def _tile_of_queries(  # type: ignore[no-untyped-def]
    tile, per_group, queries, stop0, stop1, stop2, end0, end1, end2, end3, GROUPED: tl.constexpr, BLOCK: tl.constexpr
):
    """Group, first query, stop, and how many listed keys the queries of a tile see."""
    if GROUPED:
        tiles = tl.cdiv(per_group, BLOCK)
        group = tile // tiles
        first = group * per_group + (tile % tiles) * BLOCK
        stop = (group + 1) * per_group
    else:
        group = 0
        first, stop = _piece(tile, stop0, stop1, stop2, queries, queries, BLOCK)
    return group, first, stop, _of_run(first, stop0, stop1, stop2, end0, end1, end2, end3)


@triton.jit
def _row_of(index, position, stride, stop, rows):  # type: ignore[no-untyped-def]
    """Rows (int32, 0 where not valid) that a list names at `position`, and which are valid."""
    valid = position < stop
    if index is not None:
        row = tl.load(index + position.to(tl.int64) * stride, mask=valid, other=-1)
        valid = valid & (row >= 0) & (row < rows)
        row = tl.where(valid, row, 0).to(tl.int32)
    else:
        row = position
    return row, valid


@triton.jit
def _channels(pointer, row, row_stride, channel_stride, valid, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """[R, BLOCK]; 0 in rows that are not valid and in channels from CHANNELS on."""
    channel = tl.arange(0, BLOCK)
    mask = valid[:, None]
    if CHANNELS < BLOCK:
        mask = mask & (channel[None, :] < CHANNELS)
    where = pointer + row[:, None].to(tl.int64) * row_stride + channel[None, :].to(tl.int64) * channel_stride
    return tl.load(where, mask=mask, other=0.0)


@triton.jit
def _halves(  # type: ignore[no-untyped-def]
    x, cos, sin, row, row_stride, channel_stride, valid, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, SUM: tl.constexpr
):
    """Even and odd channels of x [R, BLOCK], turned if there are cosines."""
    even, odd = tl.split(tl.reshape(x.to(SUM), (x.shape[0], BLOCK // 2, 2)))
    if cos is not None:
        c = _channels(cos, row, row_stride, channel_stride, valid, CHANNELS // 2, BLOCK // 2).to(SUM)
        s = _channels(sin, row, row_stride, channel_stride, valid, CHANNELS // 2, BLOCK // 2).to(SUM)
        even, odd = even * c - odd * s, even * s + odd * c
    return even, odd


@triton.jit
def _whole(  # type: ignore[no-untyped-def]
    even, odd, cos, sin, row, row_stride, channel_stride, valid, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):
    """[R, BLOCK] of a gradient of even and odd channels, turned back if there are cosines."""
    if cos is not None:
        c = _channels(cos, row, row_stride, channel_stride, valid, CHANNELS // 2, BLOCK // 2).to(even.dtype)
        s = _channels(sin, row, row_stride, channel_stride, valid, CHANNELS // 2, BLOCK // 2).to(even.dtype)
        even, odd = even * c + odd * s, odd * c - even * s
    return tl.reshape(tl.join(even, odd), (even.shape[0], BLOCK))


@triton.jit
def _number(pointer, value, SUM: tl.constexpr):  # type: ignore[no-untyped-def]
    """What lies at `pointer`, or without one `value`."""
    return tl.load(pointer).to(SUM) if pointer is not None else tl.full((), value, SUM)


@triton.jit
def _product(a, b, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """a [M, K] times the transpose of b [N, K]."""
    return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit(do_not_specialize=_VARYING)
def forward_kernel(  # type: ignore[no-untyped-def]
    q, k, v, index, q_cos, q_sin, k_cos, k_sin, scale_pointer, out, lse, scale,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, index_b, index_g, index_m,
    qc_b, qc_h, qc_n, qc_d, kc_b, kc_h, kc_n, kc_d,
    batches, heads, queries, rows, per_group, tiles, splits, chunk,
    stop0, stop1, stop2, end0, end1, end2, end3,
    D: tl.constexpr, DV: tl.constexpr, GROUPED: tl.constexpr, ROTARY: tl.constexpr, SINK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SUM: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out [splits, B, Nq, h, Dv] and lse [splits, B, h, Nq] on a grid of B * h * splits * tiles of queries.

    Split i sees the keys [i * chunk, (i + 1) * chunk) of a list, the first one also the sink.
    FACTOR: dtype of the factors of products; SUM: of sums and of all else.
    """
    program = tl.program_id(0)
    tile, program = program % tiles, program // tiles
    split, program = program % splits, program // splits
    head, batch = (program % heads).to(tl.int64), (program // heads).to(tl.int64)
    group, first, stop, end = _tile_of_queries(
        tile, per_group, queries, stop0, stop1, stop2, end0, end1, end2, end3, GROUPED, BLOCK_M
    )
    query = first + tl.arange(0, BLOCK_M)
    present = query < stop
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    if index is not None:
        index += batch * index_b + group * index_g
    if k_cos is not None:
        k_cos += batch * kc_b + head * kc_h
        k_sin += batch * kc_b + head * kc_h
    if q_cos is not None:
        q_cos += batch * qc_b + head * qc_h
        q_sin += batch * qc_b + head * qc_h
    scale = _number(scale_pointer, scale, SUM)
    factor = scale * _LOG2_E  # of scores in base 2

    x = _channels(q + batch * q_b + head * q_h, query, q_n, q_d, present, D, BLOCK_D)
    if ROTARY:
        q_even, q_odd = _halves(x, q_cos, q_sin, query, qc_n, qc_d, present, D, BLOCK_D, SUM)
        q_even, q_odd = q_even.to(FACTOR), q_odd.to(FACTOR)
    else:
        x = x.to(FACTOR)

    largest = tl.full((BLOCK_M,), float("-inf"), SUM)
    total = tl.zeros((BLOCK_M,), SUM)
    if SINK:
        largest = tl.where(split == 0, 0.0, largest)
        total = tl.where(split == 0, 1.0, total)
    sums = tl.zeros((BLOCK_M, BLOCK_DV), SUM)
    start = split * chunk
    for position in range(start, tl.minimum(end, start + chunk), BLOCK_N):
        row, valid = _row_of(index, position + tl.arange(0, BLOCK_N), index_m, end, rows)
        y = _channels(k, row, k_n, k_d, valid, D, BLOCK_D)
        if ROTARY:
            k_even, k_odd = _halves(y, k_cos, k_sin, row, kc_n, kc_d, valid, D, BLOCK_D, SUM)
            scores = _product(q_even, k_even.to(FACTOR), PRECISION) + _product(q_odd, k_odd.to(FACTOR), PRECISION)
        else:
            scores = _product(x, y.to(FACTOR), PRECISION)
        scores = tl.where(valid[None, :], scores * factor, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)  # -inf - -inf would be NaN
        p = tl.exp2(scores - shift[:, None])
        shrunk = tl.exp2(largest - shift)
        total = total * shrunk + tl.sum(p, 1)
        z = _channels(v, row, v_n, v_d, valid, DV, BLOCK_DV).to(FACTOR)
        sums = sums * shrunk[:, None] + tl.dot(p.to(FACTOR), z, input_precision=PRECISION)
        largest = larger

    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    logarithm = (largest + tl.log2(total)) * _LN_2
    logarithm = tl.where(nothing | (largest == float("inf")), largest, logarithm)
    part = split.to(tl.int64) * batches + batch
    tl.store(lse + (part * heads + head) * queries + query, logarithm, mask=present)
    channel = tl.arange(0, BLOCK_DV)
    where = out + (((part * queries + query) * heads + head) * DV)[:, None] + channel[None, :]
    sums = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(where, sums, mask=present[:, None] & (channel[None, :] < DV))


@triton.jit(do_not_specialize=_VARYING)
def merge_kernel(  # type: ignore[no-untyped-def]
    part_out, part_lse, out, lse, batches, heads, queries, tiles, splits,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """out [B, Nq, h, Dv] and lse [B, h, Nq] from those of the splits, on a grid of B * h * tiles of queries."""
    program = tl.program_id(0)
    tile, program = program % tiles, program // tiles
    head, batch = (program % heads).to(tl.int64), (program // heads).to(tl.int64)
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    present = query < queries
    channel = tl.arange(0, BLOCK_DV)
    mask = present[:, None] & (channel[None, :] < DV)
    of_lse = (batch * heads + head) * queries + query
    of_out = (((batch * queries + query) * heads + head) * DV)[:, None] + channel[None, :]
    size = batches.to(tl.int64) * heads * queries

    largest = tl.full((BLOCK_M,), float("-inf"), SUM)
    total = tl.zeros((BLOCK_M,), SUM)
    sums = tl.zeros((BLOCK_M, BLOCK_DV), SUM)
    for split in range(splits):
        part = tl.load(part_lse + split * size + of_lse, mask=present, other=float("-inf"))
        larger = tl.maximum(largest, part)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        weight, shrunk = tl.exp(part - shift), tl.exp(largest - shift)
        total = total * shrunk + weight
        z = tl.load(part_out + split * size * DV + of_out, mask=mask, other=0.0)
        sums = sums * shrunk[:, None] + z * weight[:, None]
        largest = larger
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    logarithm = tl.where(nothing | (largest == float("inf")), largest, largest + tl.log(total))
    tl.store(lse + of_lse, logarithm, mask=present)
    tl.store(out + of_out, (sums / total[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _base_2(lse):  # type: ignore[no-untyped-def]
    """logsumexp in base 2; inf where there is no key, so that probabilities are 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse * _LOG2_E)


@triton.jit(do_not_specialize=_VARYING)
def backward_queries_kernel(  # type: ignore[no-untyped-def]
    q, k, v, index, q_cos, q_sin, k_cos, k_sin, scale_pointer, grad_out, out, lse, grad_lse, mean, grad_q, scale,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, index_b, index_g, index_m,
    qc_b, qc_h, qc_n, qc_d, kc_b, kc_h, kc_n, kc_d, go_b, go_h, go_n, go_d, o_b, o_h, o_n, o_d,
    heads, queries, rows, per_group, tiles,
    stop0, stop1, stop2, end0, end1, end2, end3,
    D: tl.constexpr, DV: tl.constexpr, GROUPED: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SUM: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q [B, h, Nq, D] and mean [B, h, Nq], on a grid of B * h * tiles of queries.

    mean: of the gradients of a query's probabilities, less the gradient of its logsumexp.
    """
    program = tl.program_id(0)
    tile, program = program % tiles, program // tiles
    head, batch = (program % heads).to(tl.int64), (program // heads).to(tl.int64)
    group, first, stop, end = _tile_of_queries(
        tile, per_group, queries, stop0, stop1, stop2, end0, end1, end2, end3, GROUPED, BLOCK_M
    )
    query = first + tl.arange(0, BLOCK_M)
    present = query < stop
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    if index is not None:
        index += batch * index_b + group * index_g
    if k_cos is not None:
        k_cos += batch * kc_b + head * kc_h
        k_sin += batch * kc_b + head * kc_h
    if q_cos is not None:
        q_cos += batch * qc_b + head * qc_h
        q_sin += batch * qc_b + head * qc_h
    scale = _number(scale_pointer, scale, SUM)
    factor = scale * _LOG2_E

    of_query = (batch * heads + head) * queries + query
    grad = _channels(grad_out + batch * go_b + head * go_h, query, go_n, go_d, present, DV, BLOCK_DV)
    found = _channels(out + batch * o_b + head * o_h, query, o_n, o_d, present, DV, BLOCK_DV)
    average = tl.sum(grad.to(SUM) * found.to(SUM), 1)
    if grad_lse is not None:
        average -= tl.load(grad_lse + of_query, mask=present, other=0.0)
    tl.store(mean + of_query, average, mask=present)
    norm = _base_2(tl.load(lse + of_query, mask=present, other=float("-inf")))
    grad = grad.to(SUM).to(FACTOR)

    x = _channels(q + batch * q_b + head * q_h, query, q_n, q_d, present, D, BLOCK_D)
    if ROTARY:
        q_even, q_odd = _halves(x, q_cos, q_sin, query, qc_n, qc_d, present, D, BLOCK_D, SUM)
        q_even, q_odd = q_even.to(FACTOR), q_odd.to(FACTOR)
        sums_even = tl.zeros((BLOCK_M, BLOCK_D // 2), SUM)
        sums_odd = tl.zeros((BLOCK_M, BLOCK_D // 2), SUM)
    else:
        x = x.to(FACTOR)
        sums = tl.zeros((BLOCK_M, BLOCK_D), SUM)
    for position in range(0, end, BLOCK_N):
        row, valid = _row_of(index, position + tl.arange(0, BLOCK_N), index_m, end, rows)
        y = _channels(k, row, k_n, k_d, valid, D, BLOCK_D)
        z = _channels(v, row, v_n, v_d, valid, DV, BLOCK_DV).to(FACTOR)
        if ROTARY:
            k_even, k_odd = _halves(y, k_cos, k_sin, row, kc_n, kc_d, valid, D, BLOCK_D, SUM)
            k_even, k_odd = k_even.to(FACTOR), k_odd.to(FACTOR)
            scores = _product(q_even, k_even, PRECISION) + _product(q_odd, k_odd, PRECISION)
        else:
            y = y.to(FACTOR)
            scores = _product(x, y, PRECISION)
        p = tl.exp2(scores * factor - norm[:, None])
        grad_scores = p * (_product(grad, z, PRECISION) - average[:, None])
        grad_scores = tl.where(valid[None, :], grad_scores, 0.0).to(FACTOR)
        if ROTARY:
            sums_even += tl.dot(grad_scores, k_even, input_precision=PRECISION)
            sums_odd += tl.dot(grad_scores, k_odd, input_precision=PRECISION)
        else:
            sums += tl.dot(grad_scores, y, input_precision=PRECISION)
    if ROTARY:
        sums = _whole(sums_even, sums_odd, q_cos, q_sin, query, qc_n, qc_d, present, D, BLOCK_D)
    channel = tl.arange(0, BLOCK_D)
    where = grad_q + (of_query * D)[:, None] + channel[None, :]
    tl.store(where, (sums * scale).to(grad_q.dtype.element_ty), mask=present[:, None] & (channel[None, :] < D))


@triton.jit(do_not_specialize=_VARYING)
def backward_keys_kernel(  # type: ignore[no-untyped-def]
    q, k, v, index, q_cos, q_sin, k_cos, k_sin, scale_pointer, grad_out, lse, mean, grad_k, grad_v, scale,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, index_b, index_g, index_m,
    qc_b, qc_h, qc_n, qc_d, kc_b, kc_h, kc_n, kc_d, go_b, go_h, go_n, go_d,
    heads, queries, rows, listed, groups, per_group, tiles, runs,
    stop0, stop1, stop2, end0, end1, end2, end3, bound0, bound1, bound2, bound3,
    D: tl.constexpr, DV: tl.constexpr, GROUPED: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SUM: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of listed keys and values, on a grid of B * h * G * tiles of the list.

    grad_k, grad_v: [B, G, M, h, D or Dv] with lists, otherwise [B, h, Nk, D or Dv].
    bound0 to bound3: end0 to end3 in order.
    """
    program = tl.program_id(0)
    tile, program = program % tiles, program // tiles
    group, program = program % groups, program // groups
    head, batch = (program % heads).to(tl.int64), (program // heads).to(tl.int64)
    if GROUPED:
        first, stop = tile * BLOCK_N, listed
        seen = _of_run(group * per_group, stop0, stop1, stop2, end0, end1, end2, end3)
    else:
        first, stop = _piece(tile, bound0, bound1, bound2, bound3, listed, BLOCK_N)
        seen = stop
    q += batch * q_b + head * q_h
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    grad_out += batch * go_b + head * go_h
    lse += (batch * heads + head) * queries
    mean += (batch * heads + head) * queries
    if index is not None:
        index += batch * index_b + group * index_g
    if k_cos is not None:
        k_cos += batch * kc_b + head * kc_h
        k_sin += batch * kc_b + head * kc_h
    if q_cos is not None:
        q_cos += batch * qc_b + head * qc_h
        q_sin += batch * qc_b + head * qc_h
    scale = _number(scale_pointer, scale, SUM)
    factor = scale * _LOG2_E

    position = first + tl.arange(0, BLOCK_N)
    row, valid = _row_of(index, position, index_m, tl.minimum(seen, stop), rows)
    y = _channels(k, row, k_n, k_d, valid, D, BLOCK_D)
    z = _channels(v, row, v_n, v_d, valid, DV, BLOCK_DV).to(FACTOR)
    if ROTARY:
        k_even, k_odd = _halves(y, k_cos, k_sin, row, kc_n, kc_d, valid, D, BLOCK_D, SUM)
        k_even, k_odd = k_even.to(FACTOR), k_odd.to(FACTOR)
        sums_even = tl.zeros((BLOCK_N, BLOCK_D // 2), SUM)
        sums_odd = tl.zeros((BLOCK_N, BLOCK_D // 2), SUM)
    else:
        y = y.to(FACTOR)
        sums = tl.zeros((BLOCK_N, BLOCK_D), SUM)
    sums_v = tl.zeros((BLOCK_N, BLOCK_DV), SUM)
    for run in range(runs):
        if GROUPED:
            start = group * per_group
            halt = tl.where(seen > first, start + per_group, start)
        else:
            start = _of_run(run, 1, 2, 3, 0, stop0, stop1, stop2)
            halt = _of_run(run, 1, 2, 3, stop0, stop1, stop2, queries)
            halt = tl.where(_of_run(run, 1, 2, 3, end0, end1, end2, end3) > first, halt, start)
        for here in range(start, halt, BLOCK_M):
            query = here + tl.arange(0, BLOCK_M)
            present = query < halt
            norm = _base_2(tl.load(lse + query, mask=present, other=float("-inf")))
            average = tl.load(mean + query, mask=present, other=0.0)
            x = _channels(q, query, q_n, q_d, present, D, BLOCK_D)
            grad = _channels(grad_out, query, go_n, go_d, present, DV, BLOCK_DV).to(SUM).to(FACTOR)
            if ROTARY:
                q_even, q_odd = _halves(x, q_cos, q_sin, query, qc_n, qc_d, present, D, BLOCK_D, SUM)
                q_even, q_odd = q_even.to(FACTOR), q_odd.to(FACTOR)
                scores = _product(k_even, q_even, PRECISION) + _product(k_odd, q_odd, PRECISION)
            else:
                x = x.to(FACTOR)
                scores = _product(y, x, PRECISION)
            p = tl.exp2(scores * factor - norm[None, :])  # [BLOCK_N, BLOCK_M]
            grad_scores = (p * (_product(z, grad, PRECISION) - average[None, :])).to(FACTOR)
            sums_v += tl.dot(p.to(FACTOR), grad, input_precision=PRECISION)
            if ROTARY:
                sums_even += tl.dot(grad_scores, q_even, input_precision=PRECISION)
                sums_odd += tl.dot(grad_scores, q_odd, input_precision=PRECISION)
            else:
                sums += tl.dot(grad_scores, x, input_precision=PRECISION)
    if ROTARY:
        sums = _whole(sums_even, sums_odd, k_cos, k_sin, row, kc_n, kc_d, valid, D, BLOCK_D)
    if index is not None:
        place = ((batch * groups + group) * listed + position) * heads + head
    else:
        place = (batch * heads + head) * listed + position
    # What no query sees gets 0, whatever the products with rows of zeros gave.
    sums = tl.where(valid[:, None], sums * scale, 0.0)
    sums_v = tl.where(valid[:, None], sums_v, 0.0)
    inside = (position < stop)[:, None]
    channel = tl.arange(0, BLOCK_D)
    where = grad_k + (place * D)[:, None] + channel[None, :]
    tl.store(where, sums.to(grad_k.dtype.element_ty), mask=inside & (channel[None, :] < D))
    channel = tl.arange(0, BLOCK_DV)
    where = grad_v + (place * DV)[:, None] + channel[None, :]
    tl.store(where, sums_v.to(grad_v.dtype.element_ty), mask=inside & (channel[None, :] < DV))


@triton.jit(do_not_specialize=_VARYING)
def rows_kernel(  # type: ignore[no-untyped-def]
    index, part_k, part_v, grad_k, grad_v, index_b, index_g, index_m, heads, rows, listed, positions, slices,
    D: tl.constexpr, DV: tl.constexpr, HEADS: tl.constexpr, BY_POSITION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """grad_k [B, h, Nk, D], grad_v [B, h, Nk, Dv]: sums of part_k, part_v [B, G, M, h, ...] in the order of the lists.

    A program has HEADS heads of one row. The grid is B * Nk * slices of heads; BY_POSITION, it is B * G * M * slices,
    only the first program that has a row works, and rows that no list names are not written.
    """
    program = tl.program_id(0)
    piece, program = program % slices, program // slices
    head = piece * HEADS
    if BY_POSITION:
        mine, batch = program % positions, (program // positions).to(tl.int64)
    else:
        mine, batch = program % rows, (program // rows).to(tl.int64)
    index += batch * index_b
    begin, stop = 0, positions
    if BY_POSITION:
        row = tl.load(index + (mine // listed).to(tl.int64) * index_g + (mine % listed).to(tl.int64) * index_m)
        row = row.to(tl.int64)
        begin = mine
        earlier = 0
        if (row >= 0) & (row < rows):
            for start in range(0, mine, CHUNK):
                position = start + tl.arange(0, CHUNK)
                where = (position // listed).to(tl.int64) * index_g + (position % listed).to(tl.int64) * index_m
                named = tl.load(index + where, mask=position < mine, other=-1)
                earlier += tl.sum((named == row).to(tl.int32), 0)
        stop = tl.where((row >= 0) & (row < rows) & (earlier == 0), positions, mine)
    else:
        row = mine.to(tl.int64)

    k_channel, v_channel = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    k_mask = (k_channel < HEADS * D) & (k_channel < (heads - head) * D)
    v_mask = (v_channel < HEADS * DV) & (v_channel < (heads - head) * DV)
    sums_k = tl.zeros((BLOCK_K,), SUM)
    sums_v = tl.zeros((BLOCK_V,), SUM)
    for start in range(begin, stop, CHUNK):
        position = start + tl.arange(0, CHUNK)
        where = (position // listed).to(tl.int64) * index_g + (position % listed).to(tl.int64) * index_m
        named = tl.load(index + where, mask=position < positions, other=-1)
        found = named == row
        last = start - 1
        for _ in range(tl.sum(found.to(tl.int32), 0)):
            last = tl.min(tl.where(found & (position > last), position, positions), 0)
            part = (batch * positions + last) * heads + head
            sums_k += tl.load(part_k + part * D + k_channel, mask=k_mask, other=0.0)
            sums_v += tl.load(part_v + part * DV + v_channel, mask=v_mask, other=0.0)
    k_mask = k_mask & (begin < stop)
    v_mask = v_mask & (begin < stop)
    if D > 0:
        place = ((batch * heads + head + k_channel // D) * rows + row) * D + k_channel % D
        tl.store(grad_k + place, sums_k.to(grad_k.dtype.element_ty), mask=k_mask)
    if DV > 0:
        place = ((batch * heads + head + v_channel // DV) * rows + row) * DV + v_channel % DV
        tl.store(grad_v + place, sums_v.to(grad_v.dtype.element_ty), mask=v_mask)


class Blocks(NamedTuple):
    """How a launch is divided: queries and keys of a tile, warps and stages of a program."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# Programs that keep a large GPU busy: an H100 has 132 multiprocessors.
_PROGRAMS = 132


def padded(channels: int, rotary: bool) -> int:
    """Channels of a tile: products need 16 of them, also of even and odd channels apart."""
    return max(32 if rotary else 16, triton.next_power_of_2(channels))


def tiles(lengths: list[int], block: int) -> int:
    """Tiles of consecutive runs, none of which straddles two."""
    return sum(-(-n // block) for n in lengths)


def forward_blocks(
    dtype: torch.dtype, block_d: int, block_dv: int, rotary: bool, lengths: list[int], heads: int
) -> Blocks:
    """For `lengths` of runs or groups of queries, in each of `heads` heads of the batch."""
    found = _forward_blocks(dtype, max(block_d, block_dv), rotary)
    return next((blocks for blocks in found if heads * tiles(lengths, blocks.queries) >= _PROGRAMS), found[-1])


def _forward_blocks(dtype: torch.dtype, wide: int, rotary: bool) -> list[Blocks]:
    """Of ever fewer queries, for more programs; no more, nor more stages, than registers suffice for."""
    if dtype.itemsize == 2:
        most, keys = 64 if wide <= 64 or not rotary else 32, 64 if wide <= 128 else 32
        stages = 3 if wide <= 64 else 2 if wide <= 128 or not rotary else 1
        return [Blocks(n, keys, 4 if wide <= 128 else 8, stages) for n in (64, 32, 16) if n <= most]
    most, keys = 64 if wide <= 64 else 32 if wide <= 128 else 16, 32 if wide <= (64 if rotary else 128) else 16
    return [Blocks(n, keys, 8 if n == 64 or wide > 64 else 4, 2) for n in (64, 32, 16) if n <= most]


def splits(programs: int, listed: int, block: int) -> tuple[int, int]:
    """How often the keys of a list are divided where programs are few, and how many each part has."""
    count = min(8, _PROGRAMS // max(programs, 1), listed // (2 * block)) if programs < _PROGRAMS // 2 else 1
    if count < 2:
        return 1, listed
    chunk = -(-listed // (count * block)) * block
    return -(-listed // chunk), chunk


def backward_blocks(
    dtype: torch.dtype,
    block_d: int,
    block_dv: int,
    rotary: bool,
    lengths: list[int],
    pieces: list[int],
    heads: int,
) -> tuple[Blocks, Blocks]:
    """For the gradients of queries, and for those of keys and values of `pieces` between the bounds of kv_end."""
    found = _backward_blocks(dtype, max(block_d, block_dv), rotary)
    return (
        next((a for a, _ in found if heads * tiles(lengths, a.queries) >= _PROGRAMS), found[-1][0]),
        next((b for _, b in found if heads * tiles(pieces, b.keys) >= _PROGRAMS), found[-1][1]),
    )


def _backward_blocks(dtype: torch.dtype, wide: int, rotary: bool) -> list[tuple[Blocks, Blocks]]:
    """Of ever fewer queries, and of ever fewer keys; no more, nor more stages, than registers suffice for."""
    if dtype.itemsize == 2:
        most = 64 if wide <= 64 or (wide <= 128 and not rotary) else 16 if wide > 128 and rotary else 32
        keys = 64 if wide <= 64 and not rotary else 32 if wide <= 128 or not rotary else 16
        queries = 16 if rotary and wide == 64 else min(keys, 32)
        warps, warps_of_keys = 4 if wide <= (32 if rotary else 64) else 8, 4 if wide <= 64 else 8
    else:
        most = 32 if wide <= 128 else 16
        keys, queries = 32 if wide <= 64 and not rotary else 16, 16
        warps = warps_of_keys = 8
    stages = 1 if dtype.itemsize > 2 and rotary else 2
    stages_of_keys = stages if 16 < wide <= 128 else 1
    return [
        (Blocks(size, keys, warps, stages), Blocks(queries, size, warps_of_keys, stages_of_keys))
        for size in (64, 32, 16)
        if size <= most
    ]


MERGED = 16  # queries of a program that merges splits
CHUNK = 512  # positions of lists that are compared at once
ROWS_WARPS = 2


class RowsBlock(NamedTuple):
    """Heads of a program that sums gradients of rows, and their channels, padded."""

    heads: int
    k: int
    v: int


def rows_block(heads: int, d: int, dv: int) -> RowsBlock:
    heads = max(1, min(heads, 512 // max(d, dv, 1)))
    return RowsBlock(heads, triton.next_power_of_2(max(1, heads * d)), triton.next_power_of_2(max(1, heads * dv)))


_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_OF_SUMS = {"lse", "grad_lse", "mean", "q_cos", "q_sin", "k_cos", "k_sin", "part_lse", "part_out", "part_k", "part_v"}
_OF_TOKENS = {"q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v"}


def _compilation(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    sums: set[str],
    without: set[str],
    blocks: Blocks,
    **constants: Any,
) -> Compilation:
    """sums: tensors of tokens that are in the dtype of sums here; without: tensors that are None."""
    signature: dict[str, str] = {}
    aligned = []
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        if argument in without:
            constants[argument] = None
        elif argument == "index":
            signature[argument] = "*i64"
        elif argument in ("scale", "scale_pointer"):
            signature[argument] = "fp32" if argument == "scale" else "*fp64"
        elif argument in _OF_TOKENS | _OF_SUMS:
            signature[argument] = "*fp32" if argument in _OF_SUMS | sums else _POINTERS[dtype]
        elif argument in _VARYING:
            signature[argument] = "i32"
        elif argument.endswith(("_d", "_m")):
            constants[argument] = 1
        else:
            signature[argument] = "i32"
            aligned.append(argument)
    return Compilation(
        f"selected_attention: {name}",
        kernel,
        signature,
        constants,
        aligned=tuple(aligned),
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
        tensor_cores="PRECISION" in constants and dtype.itemsize == 2,
    )


def _compilations(dtype: torch.dtype, d: int, dv: int, *, indexed: bool, rotary: bool, few: bool) -> list[Compilation]:
    """All of one kind of call; few: only the largest blocks.

    With a rotation, the scale lies at a pointer; without one, there are groups if there are lists.
    """
    block_d, block_dv = padded(d, rotary), padded(dv, False)
    wide = max(block_d, block_dv)
    kind = f"{str(dtype).removeprefix('torch.')} {d}x{dv}{' index' if indexed else ''}{' rotary' if rotary else ''}"
    without = set() if rotary else {"scale_pointer", "grad_lse", "q_cos", "q_sin", "k_cos", "k_sin"}
    without |= set() if indexed else {"index"}
    options: dict[str, Any] = {
        "D": d,
        "DV": dv,
        "GROUPED": indexed and not rotary,
        "ROTARY": rotary,
        "BLOCK_D": block_d,
    }
    options |= {"BLOCK_DV": block_dv, "SUM": tl.float32, "FACTOR": _TYPES[dtype], "PRECISION": "ieee"}
    found = []
    for blocks in _forward_blocks(dtype, wide, rotary)[: 1 if few else None]:
        sizes = {"BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys}
        for parts in (False, True)[: 1 + (blocks.queries == 16 and not few)]:
            name, sums = f"forward {kind} {blocks.queries}{' split' if parts else ''}", {"out"} if parts else set()
            sizes["SINK"] = parts
            found.append(_compilation(name, forward_kernel, dtype, sums, without, blocks, **sizes, **options))
    for of_queries, of_keys in _backward_blocks(dtype, wide, rotary)[: 1 if few else None]:
        name = f"backward of {of_queries.queries} queries {kind}"
        sizes = {"BLOCK_M": of_queries.queries, "BLOCK_N": of_queries.keys}
        kernel = backward_queries_kernel
        found.append(_compilation(name, kernel, dtype, set(), without, of_queries, **sizes, **options))
        name, sums = f"backward of {of_keys.keys} keys {kind}", {"grad_k", "grad_v"} if indexed else set()
        sizes = {"BLOCK_M": of_keys.queries, "BLOCK_N": of_keys.keys}
        kernel = backward_keys_kernel
        found.append(_compilation(name, kernel, dtype, sums, without, of_keys, **sizes, **options))
    return found


COMPILATIONS = [
    *(
        compilation
        for indexed, rotary in ((True, False), (False, True))
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
        for compilation in _compilations(dtype, 64, 64, indexed=indexed, rotary=rotary, few=dtype != torch.float16)
    ),
    *(
        compilation
        for d, dv, rotary in (
            (16, 16, False),
            (32, 32, True),
            (128, 128, False),
            (128, 128, True),
            (128, 256, True),
            (256, 256, False),
        )
        for compilation in _compilations(torch.float16, d, dv, indexed=True, rotary=rotary, few=True)
    ),
    *_compilations(torch.float32, 128, 128, indexed=True, rotary=True, few=True),
    *_compilations(torch.float32, 256, 256, indexed=True, rotary=False, few=True),
    _compilation(
        "merge float16 64",
        merge_kernel,
        torch.float16,
        set(),
        set(),
        Blocks(MERGED, 0, 4, 3),
        DV=64,
        BLOCK_M=MERGED,
        BLOCK_DV=64,
        SUM=tl.float32,
    ),
    *(
        _compilation(
            f"rows float16 4x64{' by position' if by_position else ''}",
            rows_kernel,
            torch.float16,
            set(),
            set(),
            Blocks(0, CHUNK, ROWS_WARPS, 3),
            D=64,
            DV=64,
            HEADS=4,
            BY_POSITION=by_position,
            CHUNK=CHUNK,
            BLOCK_K=256,
            BLOCK_V=256,
            SUM=tl.float32,
        )
        for by_position in (False, True)
    ),
]
