"""The tail of a convolution of pairs, and its gradients: in plain PyTorch.

zx [B, Sx, Co, Ho, Wo] and zy [B, Sy, Co, Ho, Wo] are the convolutions of the images; pairs[b, i, j] =
activation(zx[b, i] + zy[b, j]), and mean[b, i] is the mean of those over j.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg_kernels.numerics import accumulation_dtype


def tail(
    zx: Tensor, zy: Tensor, pairs: bool, mean: bool, activation: str | None, slope: float
) -> tuple[Tensor, Tensor]:
    """Pairs and mean; without elements where not wanted."""
    z = _sums(zx, zy)
    match activation:
        case "relu":
            z = z.relu()
        case "leaky_relu":
            z = F.leaky_relu(z, slope)
        case "gelu":
            z = F.gelu(z)
    return z.to(zx.dtype) if pairs else zx.new_empty(0), z.mean(dim=2).to(zx.dtype) if mean else zx.new_empty(0)


def tail_backward(
    zx: Tensor,
    zy: Tensor,
    grad_pairs: Tensor | None,
    grad_mean: Tensor | None,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of zx and zy; None: nothing depends on it."""
    z = _sums(zx, zy)
    grad = torch.zeros_like(z)
    if grad_pairs is not None:
        grad = grad + grad_pairs
    if grad_mean is not None:
        grad = grad + grad_mean[:, :, None].to(z.dtype) / max(z.shape[2], 1)
    match activation:
        case "relu":
            grad = grad.masked_fill(z <= 0, 0)
        case "leaky_relu":
            grad = torch.where(z > 0, grad, grad * slope)
        case "gelu":
            below = 0.5 * torch.erfc(z * -math.sqrt(0.5))
            grad = grad * (below + z * torch.exp(-0.5 * z * z) * math.sqrt(0.5 / math.pi))
    return grad.sum(dim=2).to(zx.dtype), grad.sum(dim=1).to(zy.dtype)


def _sums(zx: Tensor, zy: Tensor) -> Tensor:
    """[B, Sx, Sy, Co, Ho, Wo]"""
    dtype = accumulation_dtype(zx.dtype)
    return (zx.to(dtype)[:, :, None] + zy.to(dtype)[:, None]).contiguous()
