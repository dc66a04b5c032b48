"""The convolution of every pair, by splitting the weight over its input channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Pads = tuple[int, int, int, int]


def cross_conv2d(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    pads: Pads,
    dilation: tuple[int, int],
    mode: str,
) -> Tensor:
    """[B, Sx, Sy, Co, Ho, Wo]; pads are (left, right, top, bottom), mode as in torch.nn.functional.pad."""
    wx, wy = weight.split([x.shape[2], y.shape[2]], dim=1)
    zx = _convolve_images(x, wx, bias, stride, pads, dilation, mode)
    zy = _convolve_images(y, wy, None, stride, pads, dilation, mode)
    return zx[:, :, None] + zy[:, None]


def cross_conv2d_mean(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    pads: Pads,
    dilation: tuple[int, int],
    mode: str,
) -> Tensor:
    """[B, Sx, Co, Ho, Wo]: convolution is linear, so the mean over y may be taken before it."""
    pairs = cross_conv2d(x, y.mean(dim=1, keepdim=True), weight, bias, stride, pads, dilation, mode)
    return pairs.squeeze(2)


def _convolve_images(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    pads: Pads,
    dilation: tuple[int, int],
    mode: str,
) -> Tensor:
    left, right, top, bottom = pads
    flat = images.flatten(0, 1)  # [B * S, C, H, W]
    padding = (top, left)
    if mode != "constant" or (left, top) != (right, bottom):
        flat, padding = F.pad(flat, pads, mode=mode), (0, 0)
    z = F.conv2d(flat, weight, bias, stride, padding, dilation)
    return z.unflatten(0, images.shape[:2])
