"""gumbel_topk by the native library, on the CPU. Indices and scores equal the reference bit for bit."""

from __future__ import annotations

from ctypes import c_int64, c_uint64, c_void_p

import torch
from torch import Tensor

from icseg_kernels import library
from icseg_kernels.numerics import accumulation_dtype

# logits, noise, indices, scores, logsumexp, kappa, kappa_index, workspace; its bytes, B, N, k; strides of the rows of
# logits and noise; seeded, seed
_DRAW_ARGUMENTS = [c_void_p] * 8 + [c_int64] * 7 + [c_uint64]
_DRAW = {
    torch.float32: library.function("icseg_gumbel_topk_f32", _DRAW_ARGUMENTS),
    torch.float64: library.function("icseg_gumbel_topk_f64", _DRAW_ARGUMENTS),
}
# logits, indices, kappa_index, logsumexp, grad_scores, grad_logsumexp, grad_kappa, grad; B, N, k; stride of the rows
_BACKWARD_ARGUMENTS = [c_void_p] * 8 + [c_int64] * 4
_BACKWARD = {
    torch.float32: library.function("icseg_gumbel_topk_backward_f32", _BACKWARD_ARGUMENTS),
    torch.float64: library.function("icseg_gumbel_topk_backward_f64", _BACKWARD_ARGUMENTS),
}
_MOST_CANDIDATES = 2**31 - 1
_STACK_DRAWS = 256  # more need a workspace


def unsupported(logits: Tensor, k: int) -> list[str]:
    """Why the library cannot draw from `logits`."""
    reasons = []
    if not logits.is_cpu:
        reasons.append(f"it runs on the CPU, and logits is on {logits.device}")
    if logits.shape[1] > _MOST_CANDIDATES:
        reasons.append(f"it draws from at most {_MOST_CANDIDATES} candidates, got {logits.shape[1]}")
    return reasons


def gumbel_topk(
    logits: Tensor, k: int, seed: int | Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the reference's. float16 and bfloat16 are converted first, and rows that are not contiguous copied."""
    values = None
    dtype = logits.dtype if logits.dtype in _DRAW else accumulation_dtype(logits.dtype)
    if noise is not None:
        if noise.shape != logits.shape or not noise.is_cpu:
            raise ValueError(
                f"noise must have the shape {list(logits.shape)} of logits and be on the CPU, "
                f"got {list(noise.shape)} on {noise.device}"
            )
        values = _contiguous_rows(noise, dtype)
    if not logits.is_cpu:
        raise ValueError(f"logits must be on the CPU, got {logits.device}")
    rows = _contiguous_rows(logits, dtype)
    batch, count = rows.shape
    indices = torch.empty(batch, k, dtype=torch.int64)
    scores = torch.empty(batch, k, dtype=dtype)
    logsumexp = torch.empty(batch, dtype=dtype)
    kappa = torch.empty_like(logsumexp)
    kappa_index = torch.empty(batch, dtype=torch.int64)
    workspace = None if k <= _STACK_DRAWS else _workspace(batch, count, k, dtype)
    code = _DRAW[dtype](
        rows.data_ptr(),
        None if values is None else values.data_ptr(),
        indices.data_ptr(),
        scores.data_ptr(),
        logsumexp.data_ptr(),
        kappa.data_ptr(),
        kappa_index.data_ptr(),
        None if workspace is None else workspace.data_ptr(),
        0 if workspace is None else workspace.numel(),
        batch,
        count,
        k,
        rows.stride(0),
        0 if values is None else values.stride(0),
        seed is not None,
        0 if seed is None else int(seed),
    )
    if code:
        library.check(code)
    return indices, scores, logsumexp, kappa, kappa_index


def _workspace(batch: int, count: int, k: int, dtype: torch.dtype) -> Tensor:
    """Bytes for the threads' draws of k from rows of `count` logits of `dtype`."""
    row = 4 * dtype.itemsize * (min(count, 2 * k + 258) + 1)
    return torch.empty(row * max(1, min(batch, torch.get_num_threads())), dtype=torch.uint8)


def gumbel_topk_backward(
    logits: Tensor,
    indices: Tensor,
    kappa_index: Tensor,
    logsumexp: Tensor,
    grad_scores: Tensor,
    grad_logsumexp: Tensor,
    grad_kappa: Tensor,
    of_noise: bool,
) -> Tensor:
    """As the reference's; an index that does not exist goes nowhere."""
    dtype = logsumexp.dtype
    batch, count = logits.shape
    k = indices.shape[1] if indices.ndim == 2 else -1
    for name, value, shape, wanted in (
        ("logits", logits, (batch, count), logits.dtype),
        ("indices", indices, (batch, k), torch.int64),
        ("kappa_index", kappa_index, (batch,), torch.int64),
        ("logsumexp", logsumexp, (batch,), accumulation_dtype(logits.dtype)),
        ("grad_scores", grad_scores, (batch, k), dtype),
        ("grad_logsumexp", grad_logsumexp, (batch,), dtype),
        ("grad_kappa", grad_kappa, (batch,), dtype),
    ):
        if value.shape != shape or value.dtype != wanted or not value.is_cpu:
            raise ValueError(
                f"{name} must have shape {list(shape)} and dtype {wanted} on the CPU, "
                f"got {list(value.shape)}, {value.dtype} on {value.device}"
            )
    rows = logits if of_noise else _contiguous_rows(logits, dtype)
    indices, kappa_index, logsumexp, grad_scores, grad_logsumexp, grad_kappa = (
        x.contiguous() for x in (indices, kappa_index, logsumexp, grad_scores, grad_logsumexp, grad_kappa)
    )
    grad = torch.empty((batch, count), dtype=dtype)
    code = _BACKWARD[dtype](
        rows.data_ptr(),
        indices.data_ptr(),
        kappa_index.data_ptr(),
        logsumexp.data_ptr(),
        grad_scores.data_ptr(),
        None if of_noise else grad_logsumexp.data_ptr(),
        grad_kappa.data_ptr(),
        grad.data_ptr(),
        batch,
        count,
        k,
        rows.stride(0),
    )
    library.check(code)
    return grad


def _contiguous_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` [B, N] in `dtype`, each row contiguous; the rows may lie anywhere."""
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.stride(1) == 1 else x.contiguous()
