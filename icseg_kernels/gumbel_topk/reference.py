"""Sampling without replacement by perturbed top-k, in plain PyTorch: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg_kernels.numerics import nan_as_minus_infinity
from icseg_kernels.philox import noise_reference


def gumbel_topk(logits: Tensor, k: int, seed: Tensor | None, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The k + 1 largest of logits + noise, descending, ties to the lower index.

    logits [B, N]; the noise is the contract's under `seed` (0-dim int64), or `noise` [B, N], or none.
    Returns indices int64 [B, k + 1] and scores [B, k + 1] (-1 and -inf where nothing above -inf is left), and
    logsumexp(logits) [B].
    """
    logits = nan_as_minus_infinity(logits)
    if seed is not None:
        noise = noise_reference(seed, *logits.shape)
    perturbed = logits if noise is None else nan_as_minus_infinity(logits + noise.to(logits.dtype))
    # One element of -inf beyond the end is the (k + 1)-th where k = N.
    scores, order = F.pad(perturbed, (0, 1), value=-torch.inf).sort(dim=1, descending=True, stable=True)
    scores, order = scores[:, : k + 1].contiguous(), order[:, : k + 1]
    return order.masked_fill(scores == -torch.inf, -1), scores, logits.logsumexp(dim=1)
