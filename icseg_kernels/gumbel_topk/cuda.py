"""gumbel_topk by the CUDA library. Indices and scores equal the reference on the CPU bit for bit."""

from __future__ import annotations

from ctypes import c_int64, c_uint64, c_void_p

import torch
from torch import Tensor

from icseg_kernels import cuda_library

# logits, noise, seed, indices, scores, logsumexp, kappa, kappa_index; B, N, k; strides of the rows of logits and noise;
# seeded, seed
_draw = cuda_library.function("icseg_cuda_gumbel_topk_f32", [c_void_p] * 8 + [c_int64] * 6 + [c_uint64])
# logits, indices, kappa_index, logsumexp, grad_scores, grad_logsumexp, grad_kappa, grad; B, N, k; stride of the rows
_backward = cuda_library.function("icseg_cuda_gumbel_topk_backward_f32", [c_void_p] * 8 + [c_int64] * 4)

_MOST_CANDIDATES = 2**16  # one block draws a row


def unsupported(logits: Tensor, k: int) -> list[str]:
    """Why the library cannot draw k of `logits`."""
    count = logits.shape[1]
    reasons = cuda_library.unsupported_tensor("logits", logits)
    if count > _MOST_CANDIDATES:
        reasons.append(f"it draws from at most {_MOST_CANDIDATES} candidates, got {count}")
    if k >= cuda_library.MOST_DRAWS and count > cuda_library.MOST_DRAWS:
        reasons.append(f"it draws at most {cuda_library.MOST_DRAWS - 1} of more candidates than that, got k = {k}")
    return reasons


def gumbel_topk(
    logits: Tensor, k: int, seed: int | Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the reference's, in one launch. float16 and bfloat16 are converted first, scattered rows copied."""
    device = logits.device
    rows = _contiguous_rows(logits)
    values = None if noise is None else _contiguous_rows(noise)
    batch, count = rows.shape
    indices = torch.empty(batch, k, dtype=torch.int64, device=device)
    scores = torch.empty(batch, k, dtype=torch.float32, device=device)
    logsumexp = torch.empty(batch, dtype=torch.float32, device=device)
    kappa = torch.empty_like(logsumexp)
    kappa_index = torch.empty(batch, dtype=torch.int64, device=device)
    seed_pointer, seeded, seed_value = cuda_library.seed_arguments(seed)
    _draw(
        device,
        rows.data_ptr(),
        None if values is None else values.data_ptr(),
        seed_pointer,
        indices.data_ptr(),
        scores.data_ptr(),
        logsumexp.data_ptr(),
        kappa.data_ptr(),
        kappa_index.data_ptr(),
        batch,
        count,
        k,
        rows.stride(0),
        0 if values is None else values.stride(0),
        seeded,
        seed_value,
    )
    return indices, scores, logsumexp, kappa, kappa_index


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
    """As the reference's, in one launch; an index that does not exist goes nowhere."""
    batch, count = logits.shape
    rows = logits if of_noise else _contiguous_rows(logits)
    indices, kappa_index, logsumexp, grad_scores, grad_logsumexp, grad_kappa = (
        x.contiguous() for x in (indices, kappa_index, logsumexp, grad_scores, grad_logsumexp, grad_kappa)
    )
    grad = torch.empty((batch, count), dtype=torch.float32, device=logits.device)
    _backward(
        logits.device,
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
        indices.shape[1],
        rows.stride(0),
    )
    return grad


def _contiguous_rows(x: Tensor) -> Tensor:
    """`x` [B, N] in float32, each row contiguous; the rows may lie anywhere."""
    x = x.to(torch.float32)
    return x if x.stride(1) == 1 else x.contiguous()
