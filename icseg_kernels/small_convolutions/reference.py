"""Convolutions of small images, one after the other: in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from icseg_kernels.small_convolutions import ConvLayer


def small_convolutions(x: Tensor, layers: Sequence[ConvLayer]) -> Tensor:
    """[N, C, h, w] -> [N, C', h', w'], contiguous; with torch's own gradients."""
    for weight, bias, stride, padding, replicate, negative_slope in layers:
        if padding and replicate:
            x, padding = F.pad(x, (padding,) * 4, mode="replicate"), 0
        x = F.conv2d(x, weight, bias, stride, padding)
        if negative_slope is not None:
            x = F.leaky_relu(x, negative_slope)
    return x.contiguous()
