"""Sampling without replacement by perturbed top-k, in plain PyTorch: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg_kernels.numerics import nan_as_minus_infinity
from icseg_kernels.philox import noise_reference


def gumbel_topk(
    logits: Tensor, k: int, seed: int | Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The k largest of logits + noise, descending, ties to the lower index.

    logits [B, N]; the noise is the contract's under `seed` (int, or 0-dim int64), or `noise` [B, N], or none.
    Returns indices int64 [B, k] and scores [B, k] (-1 and -inf where nothing above -inf is left), logsumexp(logits)
    [B], and the (k + 1)-th score [B] and its index [B].
    """
    logits = nan_as_minus_infinity(logits)
    if seed is not None:
        seeded = torch.full((), seed, dtype=torch.int64, device=logits.device) if isinstance(seed, int) else seed
        noise = noise_reference(seeded, *logits.shape)
    perturbed = logits if noise is None else nan_as_minus_infinity(logits + noise.to(logits.dtype))
    # One element of -inf beyond the end is the (k + 1)-th where k = N.
    scores, order = F.pad(perturbed, (0, 1), value=-torch.inf).sort(dim=1, descending=True, stable=True)
    scores, order = scores[:, : k + 1], order[:, : k + 1]
    order = order.masked_fill(scores == -torch.inf, -1)
    (indices, kappa_index), (scores, kappa) = order.split([k, 1], 1), scores.split([k, 1], 1)
    kappa_index, kappa = kappa_index.squeeze(1).clone(), kappa.squeeze(1).clone()
    return indices.contiguous(), scores.contiguous(), logits.logsumexp(dim=1), kappa, kappa_index


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
    """Gradient [B, N] of scores, logsumexp and kappa to the logits, or of_noise to the noise, which moves no logsumexp.

    In the dtype of logsumexp.
    """
    drawn, places = torch.cat([grad_scores, grad_kappa[:, None]], 1), torch.cat([indices, kappa_index[:, None]], 1)
    grad = scattered(drawn, places, logits.shape[1])
    if of_noise:
        return grad.contiguous()
    probability = (logits.to(grad.dtype) - logsumexp.unsqueeze(1)).exp().nan_to_num(nan=0.0)
    return grad + grad_logsumexp.unsqueeze(1) * probability


def scattered(values: Tensor, indices: Tensor, size: int) -> Tensor:
    """[B, size] zeros with values [B, k] at indices [B, k]; index -1 goes nowhere."""
    spare_first = values.new_zeros(values.shape[0], size + 1)
    return spare_first.scatter(1, indices + 1, values)[:, 1:]
