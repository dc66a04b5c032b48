"""An image at the resolution of every level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg.resize import resize

CONTEXT_STEPS = 2  # the context of a patch is seen at a resolution 2^2 times coarser


def level_count(height: int, width: int, levels: tuple[int, ...]) -> int:
    """How many of `levels` (longer sides) an image uses: up to the one nearest to its own size, in ratio."""
    longer = max(height, width)
    ratios = [abs(math.log(side / longer)) for side in levels]
    return len(levels) - ratios[::-1].index(min(ratios))


def finest_size(height: int, width: int, longer_side: int) -> tuple[int, int]:
    """(h, w) of an image scaled by one factor to `longer_side`."""
    scale = longer_side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def to_size(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, C, H, W] to `size`: the mean over whole pixels, as `halve` takes it, where it is a divisor, else `resize`."""
    rows, columns = x.shape[-2] / size[0], x.shape[-1] / size[1]
    if rows.is_integer() and columns.is_integer():
        return x if rows == columns == 1 else F.avg_pool2d(x, (int(rows), int(columns)))
    return resize(x, size)


def halve(x: Tensor) -> Tensor:
    """[N, C, h, w] to half its size, rounded up: the mean of each 2 x 2 pixels that exist."""
    height, width = x.shape[-2:]
    if height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")
    columns = x[..., ::2, :] + x[..., 1::2, :]
    return (columns[..., ::2] + columns[..., 1::2]) * 0.25


def double(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, C, h, w] bilinearly to twice its size, cut to `size`: the way back from `halve`."""
    doubled = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
    return doubled[..., : size[0], : size[1]]


def halvings(x: Tensor, count: int) -> list[Tensor]:
    """`x` and `count` halvings of it, the smallest first."""
    steps = [x]
    for _ in range(count):
        steps.append(halve(steps[-1]))
    return steps[::-1]


@dataclass
class Pyramid:
    """images [N, 1, h, w] of every level, the mean over each pixel's area, after CONTEXT_STEPS coarser ones.

    details: of every level but the finest, the standard deviation of the finest level's pixels inside each pixel:
    it shows thin and faint structures that the mean averages away.
    """

    images: list[Tensor]
    details: list[Tensor]

    @staticmethod
    def of(image: Tensor, levels: int) -> Pyramid:
        """Of an image [N, 1, h, w] at its finest level; computed in float32 for the half types."""
        dtype, image = image.dtype, image if image.dtype == torch.float64 else image.float()
        images = halvings(image, levels - 1 + CONTEXT_STEPS)
        details: list[Tensor] = []
        square = image * image
        for coarser in images[-2 : CONTEXT_STEPS - 1 : -1]:
            square = halve(square)
            details.append((square - coarser * coarser).clamp_min(1e-12).sqrt())
        return Pyramid([i.to(dtype) for i in images], [d.to(dtype) for d in details[::-1]])

    def image(self, level: int) -> Tensor:
        return self.images[level + CONTEXT_STEPS]

    def context(self, level: int) -> Tensor:
        return self.images[level]

    def detail(self, level: int) -> Tensor | None:
        return self.details[level] if level < len(self.details) else None
