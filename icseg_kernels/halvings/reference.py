"""Halvings of an image and the deviations inside their pixels: in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from icseg_kernels.numerics import accumulation_dtype

LEAST_VARIANCE = 1e-12


def halvings(image: Tensor, count: int, deviations: int) -> list[Tensor]:
    """`count` means, then `deviations` standard deviations; with torch's own gradients."""
    mean = image.to(accumulation_dtype(image.dtype)).contiguous()
    square = mean * mean if deviations else mean
    means, spreads = [], []
    for level in range(count):
        mean = _halve(mean)
        means.append(mean.to(image.dtype))
        if level < deviations:
            square = _halve(square)
            spreads.append((square - mean * mean).clamp_min(LEAST_VARIANCE).sqrt().to(image.dtype))
    return means + spreads


def _halve(x: Tensor) -> Tensor:
    """[N, C, h, w] to half its size, rounded up; a last row or column without a partner is its own."""
    height, width = x.shape[2:]
    if height % 2:
        x = torch.cat([x, x[:, :, -1:]], 2)
    if width % 2:
        x = torch.cat([x, x[..., -1:]], 3)
    columns = x[:, :, ::2] + x[:, :, 1::2]
    return (columns[..., ::2] + columns[..., 1::2]) * 0.25
