"""selected_attention by Triton kernels, on CUDA devices."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icseg_kernels import numerics, triton_launch
from icseg_kernels.attention import native

_MOST_CHANNELS = 256
_MOST_TURNED_CHANNELS = 128  # more need more registers than there are
_MOST_RUNS = 4
# Multiply-adds of a call without gradients from which on torch's attention is faster, though it first turns q and k in
# passes of their own. An estimate, not a measurement.
_FASTER_WITH_ROTARY = 2**35


def unsupported(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor | None, by_sdpa: bool, runs: int = 0, rotary: bool = False
) -> list[str]:
    """Why the kernels cannot serve these tensors."""
    reasons = [*triton_launch.unsupported_device("q", q), *triton_launch.unsupported_dtype("q", q)]
    d, dv = q.shape[3], v.shape[3]
    if rotary and d > _MOST_TURNED_CHANNELS:
        reasons.append(f"it turns D up to {_MOST_TURNED_CHANNELS}, got {d}")
    for name, channels in (("D", d), ("Dv", dv)):
        if channels > _MOST_CHANNELS:
            reasons.append(f"it serves {name} up to {_MOST_CHANNELS}, got {channels}")
    if runs > _MOST_RUNS:
        reasons.append(f"it serves up to {_MOST_RUNS} runs of kv_end, got {runs}")
    return reasons


def slower(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor | None, by_sdpa: bool, runs: int = 0, rotary: bool = False
) -> bool:
    """Whether torch's own attention is the better choice, for a call that it could serve (`by_sdpa`)."""
    if triton_launch.slower():
        return True
    if not by_sdpa:
        return False
    if not rotary or torch.compiler.is_compiling() or native.transformed():
        return True
    (b, h, nq, d), (_, _, nk, dv) = q.shape, v.shape
    return b * h * nq * nk * (d + dv) >= _FASTER_WITH_ROTARY


class _Bounds(NamedTuple):
    """Runs of queries that see equally many keys."""

    lengths: list[int]  # of queries
    stops: tuple[int, int, int]  # where the first three runs end
    ends: tuple[int, int, int, int]  # keys that each run sees

    def between(self, listed: int) -> list[int]:
        """How many keys there are from 0 to `listed` between consecutive bounds."""
        bounds = [0, *sorted(self.ends), listed]
        return [b - a for a, b in itertools.pairwise(bounds)]


def _bounds(queries: list[int], keys: list[int], nq: int, listed: int) -> _Bounds:
    lengths: list[int] = []
    ends: list[int] = []
    for count, n in zip(queries, keys, strict=True) if queries else ((nq, listed),):
        if ends and ends[-1] == n:
            lengths[-1] += count
        else:
            lengths.append(count)
            ends.append(n)
    if len(lengths) > _MOST_RUNS or sum(lengths) != nq or min(lengths) < 0 or not 0 <= min(ends) <= max(ends) <= listed:
        raise ValueError(f"runs must be up to {_MOST_RUNS} that add up to {nq} queries, of up to {listed} keys")
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))] + [nq] * _MOST_RUNS
    ends = ends + [ends[-1]] * _MOST_RUNS
    return _Bounds(lengths, (stops[0], stops[1], stops[2]), (ends[0], ends[1], ends[2], ends[3]))


class _Call(NamedTuple):
    """What every kernel is told of a call."""

    tensors: tuple[Any, ...]  # q to the pointer of the scale
    scale: float
    strides: tuple[int, ...]  # of q, k, v, index and the cosines
    options: dict[str, Any]
    groups: int
    listed: int
    bounds: _Bounds

    @property
    def lengths(self) -> list[int]:
        """Of what no tile of queries straddles."""
        return [sum(self.bounds.lengths) // self.groups] * self.groups if self.groups > 1 else self.bounds.lengths


def _call(
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
    scale: Tensor | float | None,
) -> _Call:
    import triton.language as tl

    from icseg_kernels.attention import triton_kernels as kernels

    (b, h, nq, d), (_, _, nk, dv) = q.shape, v.shape
    _guard("k", k, (b, h, nk, d), q)
    _guard("v", v, (b, h, nk, dv), q)
    groups, listed = 1, nk
    strides: tuple[int, ...] = (0, 0, 0)
    if index is not None:
        _, groups, listed = index.shape
        _guard("index", index, (b, groups, listed), q, index.dtype)
        strides = index.stride()
    q_cos, q_sin, q_turn = _rotation(q_cos, q_sin, (b, h, nq, d // 2), q)
    k_cos, k_sin, k_turn = _rotation(k_cos, k_sin, (b, h, nk, d // 2), q)
    rotary = q_cos is not None or k_cos is not None
    pointer = scale if isinstance(scale, Tensor) else None
    factor = max(d, 1) ** -0.5 if scale is None else 0.0 if pointer is not None else float(scale)
    total = numerics.accumulation_dtype(q.dtype)
    # The interpreter's products of bfloat16 are wrong.
    exact = triton_launch.INTERPRETED and q.dtype == torch.bfloat16
    options = {
        "D": d,
        "DV": dv,
        "GROUPED": groups > 1,
        "ROTARY": rotary,
        "BLOCK_D": kernels.padded(d, rotary),
        "BLOCK_DV": kernels.padded(dv, False),
        "SUM": getattr(tl, str(total).removeprefix("torch.")),
        "FACTOR": getattr(tl, str(torch.float32 if exact else q.dtype).removeprefix("torch.")),
        "PRECISION": precision(),
    }
    return _Call(
        (q, k, v, index, q_cos, q_sin, k_cos, k_sin, pointer),
        factor,
        (*q.stride(), *k.stride(), *v.stride(), *strides, *q_turn, *k_turn),
        options,
        groups,
        listed,
        _bounds(queries, keys, nq, listed),
    )


def precision() -> str:
    """Of products of float32, as torch's matrix products have it."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _rotation(
    cos: Tensor | None, sin: Tensor | None, shape: tuple[int, ...], q: Tensor
) -> tuple[Tensor | None, Tensor | None, tuple[int, ...]]:
    """Cosines and sines of `shape`, of the same strides."""
    if cos is None or sin is None:
        return None, None, (0, 0, 0, 0)
    if q.shape[3] % 2:
        raise ValueError(f"a rotation turns pairs of channels, so D must be even, got {q.shape[3]}")
    cos, sin = cos.expand(shape), sin.expand(shape)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    _guard("a rotation", cos, shape, q, numerics.accumulation_dtype(q.dtype))
    _guard("a rotation", sin, shape, q, cos.dtype)
    return cos, sin, cos.stride()


def _guard(name: str, tensor: Tensor, shape: tuple[int, ...], q: Tensor, dtype: torch.dtype | None = None) -> None:
    """The last check before raw pointers: kernels read as much memory as the shapes promise."""
    dtype = q.dtype if dtype is None else dtype
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != q.device:
        raise ValueError(
            f"{name} must have shape {list(shape)} and be {dtype} on {q.device}, got {list(tensor.shape)} "
            f"{tensor.dtype} on {tensor.device}"
        )


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
    """As the reference's; the output lies in memory as [B, Nq, h, Dv], so that heads are joined without a copy."""
    from icseg_kernels.attention import triton_kernels as kernels

    call = _call(q, k, v, index, q_cos, q_sin, k_cos, k_sin, queries, keys, scale)
    (b, h, nq, _), (_, _, nk, dv) = q.shape, v.shape
    total = numerics.accumulation_dtype(q.dtype)
    out, lse = q.new_empty((b, nq, h, dv)), q.new_empty((b, h, nq), dtype=total)
    block_dv = call.options["BLOCK_DV"]
    rotary = call.options["ROTARY"]
    blocks = kernels.forward_blocks(q.dtype, call.options["BLOCK_D"], block_dv, rotary, call.lengths, b * h)
    tiles = kernels.tiles(call.lengths, blocks.queries)
    seen = max(call.bounds.ends)
    splits, chunk = kernels.splits(b * h * tiles, seen, blocks.keys)
    part_out, part_lse = out, lse
    if splits > 1:
        part_out = q.new_empty((splits, b, nq, h, dv), dtype=total)
        part_lse = q.new_empty((splits, b, h, nq), dtype=total)
    triton_launch.launch(
        kernels.forward_kernel,
        (b * h * splits * tiles,),
        q.device,
        *call.tensors,
        part_out,
        part_lse,
        call.scale,
        *call.strides,
        b,
        h,
        nq,
        nk,
        nq // call.groups,
        tiles,
        splits,
        chunk,
        *call.bounds.stops,
        *call.bounds.ends,
        SINK=sink,
        BLOCK_M=blocks.queries,
        BLOCK_N=blocks.keys,
        **call.options,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    if splits > 1:
        tiles = kernels.tiles([nq], kernels.MERGED)
        triton_launch.launch(
            kernels.merge_kernel,
            (b * h * tiles,),
            q.device,
            part_out,
            part_lse,
            out,
            lse,
            b,
            h,
            nq,
            tiles,
            splits,
            DV=dv,
            BLOCK_M=kernels.MERGED,
            BLOCK_DV=block_dv,
            SUM=call.options["SUM"],
        )
    return out.transpose(1, 2), lse


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
    """Gradients of q, k and v; the probabilities are computed again, from `lse`."""
    from icseg_kernels.attention import triton_kernels as kernels

    call = _call(q, k, v, index, q_cos, q_sin, k_cos, k_sin, queries, keys, scale)
    (b, h, nq, d), (_, _, nk, dv) = q.shape, v.shape
    total = numerics.accumulation_dtype(q.dtype)
    _guard("grad_out", grad_out, (b, h, nq, dv), q)
    _guard("out", out, (b, h, nq, dv), q)
    _guard("lse", lse, (b, h, nq), q, total)
    lse = lse.contiguous()
    if grad_lse is not None:
        _guard("grad_lse", grad_lse, (b, h, nq), q, total)
        grad_lse = grad_lse.contiguous()
    bounds, groups, listed = call.bounds, call.groups, call.listed
    grad_q, mean = q.new_empty(q.shape), torch.empty_like(lse)
    ordered = sorted(bounds.ends)
    pieces = [listed] * groups if groups > 1 else bounds.between(listed)
    block_d, block_dv, rotary = (call.options[name] for name in ("BLOCK_D", "BLOCK_DV", "ROTARY"))
    of_queries, of_keys = kernels.backward_blocks(q.dtype, block_d, block_dv, rotary, call.lengths, pieces, b * h)
    tiles = kernels.tiles(call.lengths, of_queries.queries)
    triton_launch.launch(
        kernels.backward_queries_kernel,
        (b * h * tiles,),
        q.device,
        *call.tensors,
        grad_out,
        out,
        lse,
        grad_lse,
        mean,
        grad_q,
        call.scale,
        *call.strides,
        *grad_out.stride(),
        *out.stride(),
        h,
        nq,
        nk,
        nq // groups,
        tiles,
        *bounds.stops,
        *bounds.ends,
        BLOCK_M=of_queries.queries,
        BLOCK_N=of_queries.keys,
        **call.options,
        num_warps=of_queries.num_warps,
        num_stages=of_queries.num_stages,
    )

    grad_k, grad_v = q.new_empty(k.shape), q.new_empty(v.shape)
    part_k, part_v = grad_k, grad_v
    if index is not None:
        part_k = q.new_empty((b, groups, listed, h, d), dtype=total)
        part_v = q.new_empty((b, groups, listed, h, dv), dtype=total)
    tiles = kernels.tiles(pieces, of_keys.keys) // groups
    triton_launch.launch(
        kernels.backward_keys_kernel,
        (b * h * groups * tiles,),
        q.device,
        *call.tensors,
        grad_out,
        lse,
        mean,
        part_k,
        part_v,
        call.scale,
        *call.strides,
        *grad_out.stride(),
        h,
        nq,
        nk,
        listed,
        groups,
        nq // groups,
        tiles,
        1 if groups > 1 else len(bounds.lengths),
        *bounds.stops,
        *bounds.ends,
        *ordered,
        BLOCK_M=of_keys.queries,
        BLOCK_N=of_keys.keys,
        **call.options,
        num_warps=of_keys.num_warps,
        num_stages=of_keys.num_stages,
    )
    if index is not None:
        positions = groups * listed
        by_position = nk > 2 * positions
        if by_position:
            grad_k.zero_()
            grad_v.zero_()
        block = kernels.rows_block(h, d, dv)
        triton_launch.launch(
            kernels.rows_kernel,
            (b * (positions if by_position else nk) * -(-h // block.heads),),
            q.device,
            index,
            part_k,
            part_v,
            grad_k,
            grad_v,
            *index.stride(),
            h,
            nk,
            listed,
            positions,
            -(-h // block.heads),
            D=d,
            DV=dv,
            HEADS=block.heads,
            BY_POSITION=by_position,
            CHUNK=kernels.CHUNK,
            BLOCK_K=block.k,
            BLOCK_V=block.v,
            SUM=call.options["SUM"],
            num_warps=kernels.ROWS_WARPS,
        )
    return grad_q, grad_k, grad_v
