"""The convolution of every pair, by splitting the weight over its input channels."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Geometry(NamedTuple):
    """How a convolution moves over the images."""

    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]  # left, right, top, bottom
    pad_mode: str  # as in torch.nn.functional.pad


def cross_conv2d(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """[B, Sx, Sy, Co, Ho, Wo]; x or y may have no channels."""
    wx, wy = weight.split([x.shape[2], y.shape[2]], dim=1)
    zx, zy = _convolve_images(x, wx, bias, geometry), _convolve_images(y, wy, None, geometry)
    return zx[:, :, None] + zy[:, None]


def cross_conv2d_mean(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """[B, Sx, Co, Ho, Wo]: convolution is linear, so the mean over y may be taken before it."""
    return cross_conv2d(x, y.mean(dim=1, keepdim=True), weight, bias, geometry).squeeze(2)


def _convolve_images(images: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """[B, S, Co, Ho, Wo]; of images without channels the same in every pixel: [B, S, Co, 1, 1]."""
    if images.shape[2] == 0:
        constant = images.new_zeros(*images.shape[:2], weight.shape[0], 1, 1)
        return constant if bias is None else constant + bias[:, None, None]
    left, right, top, bottom = geometry.pads
    flat, padding = images.flatten(0, 1), (top, left)  # [B * S, C, H, W]
    if geometry.pad_mode != "constant" or (left, top) != (right, bottom):
        flat, padding = F.pad(flat, geometry.pads, mode=geometry.pad_mode), (0, 0)
    z = F.conv2d(flat, weight, bias, geometry.stride, padding, geometry.dilation)
    return z.unflatten(0, images.shape[:2])
