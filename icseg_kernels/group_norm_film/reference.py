"""Group normalisation, gain and bias, GELU, and the gradients: in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from icseg_kernels.numerics import accumulation_dtype


def group_norm_film(
    x: Tensor, groups: int, gain: Tensor | None, bias: Tensor | None, activation: str | None, eps: float
) -> tuple[Tensor, Tensor]:
    """[N, C, *spatial] -> the same, and the groups' means and reciprocal standard deviations, [2, N, G]."""
    grouped = _grouped(x, groups)  # [N, G, C / G, L]
    mean = grouped.mean(dim=(2, 3))
    variance = (grouped - mean[:, :, None, None]).square().mean(dim=(2, 3))
    stats = torch.stack([mean, (variance + eps).rsqrt()])
    _, v = _normalised(grouped, stats, gain, bias)
    out = torch.nn.functional.gelu(v) if activation == "gelu" else v
    return out.view(x.shape).to(x.dtype), stats


def group_norm_film_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    groups: int,
    gain: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of gain and bias, a sample at a time: [2, N, C]."""
    grouped = _grouped(x, groups)
    normed, v = _normalised(grouped, stats, gain, bias)
    inner = grad.to(v.dtype).reshape(v.shape)
    if activation == "gelu":
        below = 0.5 * torch.erfc(v * -math.sqrt(0.5))
        inner = inner * (below + v * torch.exp(-0.5 * v * v) * math.sqrt(0.5 / math.pi))
    sums = torch.stack([(inner * normed).sum(dim=-1), inner.sum(dim=-1)])  # [2, N, G, C / G]
    pulled = inner if gain is None else inner * _a_channel(gain, grouped)
    level = pulled.mean(dim=(2, 3), keepdim=True)
    tilt = (pulled * normed).mean(dim=(2, 3), keepdim=True)
    grad_x = stats[1][:, :, None, None] * (pulled - level - normed * tilt)
    return grad_x.view(x.shape).to(x.dtype), sums.flatten(2)


def _grouped(x: Tensor, groups: int) -> Tensor:
    wide = x.to(accumulation_dtype(x.dtype))
    return wide.reshape(x.shape[0], groups, x.shape[1] // groups, math.prod(x.shape[2:]))


def _normalised(grouped: Tensor, stats: Tensor, gain: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x - mean) / standard deviation, and that times gain plus bias."""
    mean, rstd = stats[..., None, None]
    normed = v = (grouped - mean) * rstd
    if gain is not None:
        v = v * _a_channel(gain, grouped)
    if bias is not None:
        v = v + _a_channel(bias, grouped)
    return normed, v


def _a_channel(values: Tensor, grouped: Tensor) -> Tensor:
    """[C] or [N, C] -> [1 or N, G, C / G, 1]."""
    return values.to(grouped.dtype).reshape(1 if values.ndim == 1 else len(values), *grouped.shape[1:3], 1)
