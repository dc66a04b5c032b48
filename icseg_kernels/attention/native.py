"""selected_attention by the native library, on the CPU."""

from __future__ import annotations

import functools
import struct
from ctypes import byref, c_char_p, c_int64, c_void_p

import torch
from torch import Tensor
from torch.autograd import forward_ad

from icseg_kernels import library

# call, runs and how many, as bytes; out, lse
_ARGUMENTS = [c_char_p, c_char_p, c_int64, c_void_p, c_void_p]
_FORWARD = {
    torch.float32: library.function("icseg_selected_attention_f32", _ARGUMENTS),
    torch.float64: library.function("icseg_selected_attention_f64", _ARGUMENTS),
}
# call, runs and how many; out, grad_out; lse, grad_lse; gradients of q, k and v
_BACKWARD_ARGUMENTS = [c_char_p, c_char_p, c_int64, c_char_p, c_char_p] + [c_void_p] * 5
_BACKWARD = {
    torch.float32: library.function("icseg_selected_attention_backward_f32", _BACKWARD_ARGUMENTS),
    torch.float64: library.function("icseg_selected_attention_backward_f64", _BACKWARD_ARGUMENTS),
}
_workspace = library.function("icseg_selected_attention_workspace", [c_int64] * 12 + [c_void_p])

_call_bytes = struct.Struct("35q 5q 8q q d 3q").pack  # icseg_attention
_heads_bytes = struct.Struct("5q").pack  # icseg_heads
_NONE: tuple[int, ...] = (0, 0, 0, 0, 0)
_NO_ANGLES: tuple[int, ...] = _NONE * 4


def unsupported(q: Tensor, k: Tensor, v: Tensor, index: Tensor | None, *_: object) -> list[str]:
    """Why the library cannot serve these tensors."""
    return [] if q.is_cpu else [f"it runs on the CPU, and q is on {q.device}"]


# Multiply-adds of a call from which on this is not slower than torch's own attention, whose wrapper costs less: about
# 55 queries and keys in 4 heads of 64 channels; 350 where gradients are recorded.
_NOT_SLOWER = 1.5 * 10**6
_NOT_SLOWER_WITH_GRADIENTS = 64 * 10**6


def slower(q: Tensor, k: Tensor, v: Tensor, index: Tensor | None, by_sdpa: bool, *rest: object) -> bool:
    """Whether torch's own attention is the better choice, for a call that it could serve (`by_sdpa`)."""
    if not by_sdpa:
        return False
    if torch.compiler.is_compiling() or q.dtype.itemsize < 4 or transformed():
        return True
    (b, h, nq, d), (_, _, nk, dv) = q.shape, v.shape
    differentiated = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return b * h * nq * nk * (d + dv) < (_NOT_SLOWER_WITH_GRADIENTS if differentiated else _NOT_SLOWER)


def transformed() -> bool:
    """Whether the call is differentiated in forward mode or by a function transform."""
    return forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None


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
    dtype = q.dtype
    if dtype.itemsize < 4:
        q, k, v = q.float(), k.float(), v.float()
    (b, h, nq, _), dv = q.shape, v.shape[3]
    out = q.new_empty_strided((b, h, nq, dv), (nq * h * dv, dv, h * dv, 1))
    lse = q.new_empty((b, h, nq))
    _workspace_in_use, call = _call(q, k, v, index, q_cos, q_sin, k_cos, k_sin, len(queries), sink, scale, False)
    runs = _runs(queries, keys) if queries else None
    library.check(_FORWARD[q.dtype](call, runs, len(queries), out.data_ptr(), lse.data_ptr()))
    return (out if dtype == q.dtype else out.to(dtype)), lse


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
    kind, shape = q.dtype, (*q.shape[:3], v.shape[3])
    if kind.itemsize < 4:
        grad_out, out, q, k, v = (t.float() for t in (grad_out, out, q, k, v))
    dtype = q.dtype
    _guard("grad_out", grad_out, shape, dtype)
    _guard("out", out, shape, dtype)
    _guard("lse", lse, shape[:3], dtype)
    lse = lse.contiguous()
    if grad_lse is not None:
        _guard("grad_lse", grad_lse, shape[:3], dtype)
        grad_lse = grad_lse.contiguous()
    grad_q, grad_k, grad_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    _workspace_in_use, call = _call(q, k, v, index, q_cos, q_sin, k_cos, k_sin, len(queries), sink, scale, True)
    code = _BACKWARD[dtype](
        call,
        _runs(queries, keys) if queries else None,
        len(queries),
        _heads_bytes(out.data_ptr(), *out.stride()),
        _heads_bytes(grad_out.data_ptr(), *grad_out.stride()),
        lse.data_ptr(),
        None if grad_lse is None else grad_lse.data_ptr(),
        grad_q.data_ptr(),
        grad_k.data_ptr(),
        grad_v.data_ptr(),
    )
    library.check(code)
    return (grad_q, grad_k, grad_v) if dtype == kind else (grad_q.to(kind), grad_k.to(kind), grad_v.to(kind))


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor | None,
    q_cos: Tensor | None,
    q_sin: Tensor | None,
    k_cos: Tensor | None,
    k_sin: Tensor | None,
    runs: int,
    sink: bool,
    scale: Tensor | float | None,
    backward: bool,
) -> tuple[Tensor, bytes]:
    """The workspace, which must outlive the call, and the library's description of the call."""
    (b, h, nq, d), (_, _, nk, dv), dtype = q.shape, v.shape, q.dtype
    _guard("q", q, (b, h, nq, d), dtype)
    _guard("k", k, (b, h, nk, d), dtype)
    _guard("v", v, (b, h, nk, dv), dtype)
    groups, listed, lists = 1, nk, _NONE
    if index is not None:
        _, groups, listed = index.shape
        _guard("index", index, (b, groups, listed), index.dtype)
        if index.dtype.is_floating_point or index.element_size() < 4:
            raise TypeError(f"index must be int32 or int64, got {index.dtype}")
        lists = (index.data_ptr(), index.element_size(), *index.stride())
    angles = _NO_ANGLES
    if q_cos is not None or k_cos is not None:
        if d % 2:
            raise ValueError(f"a rotation turns pairs of channels, so D must be even, got {d}")
        q_shape, k_shape = (b, h, nq, d // 2), (b, h, nk, d // 2)
        angles = _rotation(q_cos, q_shape, dtype) + _rotation(q_sin, q_shape, dtype)
        angles += _rotation(k_cos, k_shape, dtype) + _rotation(k_sin, k_shape, dtype)
    slots = torch.get_num_threads()
    size = _workspace_bytes(b, h, nq, d, dv, groups, listed, index is not None, runs, slots, dtype.itemsize, backward)
    workspace = torch.empty(size, dtype=torch.uint8)
    call = _call_bytes(
        q.data_ptr(),
        *q.stride(),
        k.data_ptr(),
        *k.stride(),
        v.data_ptr(),
        *v.stride(),
        *angles,
        *lists,
        b,
        h,
        nq,
        nk,
        d,
        dv,
        groups,
        listed,
        sink,
        max(d, 1) ** -0.5 if scale is None else float(scale),
        workspace.data_ptr(),
        size,
        slots,
    )
    return workspace, call


@functools.lru_cache(maxsize=1024)
def _workspace_bytes(*sizes: int) -> int:
    size = c_int64()
    library.check(_workspace(*sizes, byref(size)))
    return size.value


def _runs(queries: list[int], keys: list[int]) -> bytes:
    return struct.pack(f"{2 * len(queries)}q", *(n for run in zip(queries, keys, strict=True) for n in run))


def _rotation(turned: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """An address and the strides of `turned` as of a tensor of `shape`, to which it is broadcast."""
    if turned is None:
        return _NONE
    sizes, strides = turned.shape, turned.stride()
    missing = 4 - len(sizes)
    if missing < 0 or any(n not in (1, wanted) for n, wanted in zip(sizes, shape[missing:], strict=True)):
        raise ValueError(f"a rotation must be broadcastable to {list(shape)}, got {list(sizes)}")
    _guard("a rotation", turned, sizes, dtype)
    return (
        turned.data_ptr(),
        *_NONE[:missing],
        *(0 if n == 1 else stride for n, stride in zip(sizes, strides, strict=True)),
    )


def _guard(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The last check before raw pointers: the library reads as much memory as the shapes promise."""
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_cpu:
        raise ValueError(
            f"{name} must have shape {list(shape)} and be {dtype} on the CPU, got {list(tensor.shape)} {tensor.dtype} "
            f"on {tensor.device}"
        )
