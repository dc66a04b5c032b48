"""An image at the resolution of every level."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from icseg.resize import resize
from icseg_kernels import halvings

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
    """[N, C, H, W] to `size`: the mean over whole pixels, as in `halvings`, where it is a divisor, else `resize`."""
    rows, columns = x.shape[-2] / size[0], x.shape[-1] / size[1]
    if rows.is_integer() and columns.is_integer():
        return x if rows == columns == 1 else F.avg_pool2d(x, (int(rows), int(columns)))
    return resize(x, size)


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
        means, deviations = halvings(image, levels - 1 + CONTEXT_STEPS, deviations=levels - 1)
        return Pyramid([*means[::-1], image], deviations[::-1])

    def image(self, level: int) -> Tensor:
        return self.images[level + CONTEXT_STEPS]

    def context(self, level: int) -> Tensor:
        return self.images[level]

    def detail(self, level: int) -> Tensor | None:
        return self.details[level] if level < len(self.details) else None
