"""The convolutions of a convolution of pairs, by splitting the weight over its input channels."""

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


def convolve_both(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """[B, Sx, Co, Ho, Wo] and [B, Sy, Co, Ho, Wo] whose pairwise sums are the convolved pairs.

    That of x or of y without channels is the same in every pixel: [B, S, Co, 1, 1].
    """
    wx, wy = weight.split([x.shape[2], y.shape[2]], dim=1)
    return _convolve_images(x, wx, bias, geometry), _convolve_images(y, wy, None, geometry)


def _convolve_images(images: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    if images.shape[2] == 0:
        constant = images.new_zeros(*images.shape[:2], weight.shape[0], 1, 1)
        return constant if bias is None else constant + bias[:, None, None]
    left, right, top, bottom = geometry.pads
    flat, padding = images.flatten(0, 1), (top, left)  # [B * S, C, H, W]
    if geometry.pad_mode != "constant" or (left, top) != (right, bottom):
        flat, padding = F.pad(flat, geometry.pads, mode=geometry.pad_mode), (0, 0)
    z = F.conv2d(flat, weight, bias, geometry.stride, padding, geometry.dilation)
    return z.unflatten(0, images.shape[:2])
