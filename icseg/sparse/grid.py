"""The levels' images and their grids of 8 x 8 patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg_kernels import gather_patches

PATCH = 8
HALO = 4  # what the stem's four unpadded 3 x 3 convolutions consume
CONTEXT = 16  # side of the context crop, at a quarter of the level's resolution
CONTEXT_SCALE = 4


def level_size(height: int, width: int, longer_side: int) -> tuple[int, int]:
    """(h, w) of an image at a level: the aspect kept to within rounding up to whole patches."""
    scale = longer_side / max(height, width)
    return tuple(max(1, math.ceil(round(side * scale) / PATCH)) * PATCH for side in (height, width))  # type: ignore[return-value]


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, H, W] to `size`: the mean over each pixel's area going down, bilinear going up."""
    if image.shape[-2:] == size:
        return image
    if size[0] <= image.shape[-2] and size[1] <= image.shape[-1]:
        return F.interpolate(image, size=size, mode="area")
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False)


@dataclass
class LevelImage:
    """An image [B, 1, h, w] at one level, with its mask (support) or prior prediction (target), both in [-1, 1]."""

    image: Tensor
    label: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.image.shape[-2] // PATCH, self.image.shape[-1] // PATCH

    def coords(self, index: Tensor) -> Tensor:
        """(y, x) [B, K, 2] of the top-left corners of grid cells `index` [B, K]."""
        columns = self.grid[1]
        return torch.stack([index // columns, index % columns], -1) * PATCH

    def patches(self, coords: Tensor) -> Tensor:
        """[B, K, 2, 16, 16]: image and label with their halo; the border is replicated."""
        source = F.pad(torch.cat([self.image, self.label], 1), (HALO,) * 4, mode="replicate")
        return gather_patches(source, coords, PATCH + 2 * HALO)  # the padding shifts the corner by the halo

    def context(self, coords: Tensor) -> Tensor:
        """[B, K, 3, 16, 16]: image, label and ones (0 outside the image) around each patch, 4 times coarser."""
        coarse = F.avg_pool2d(torch.cat([self.image, self.label], 1), CONTEXT_SCALE)
        source = torch.cat([coarse, torch.ones_like(coarse[:, :1])], 1)
        corner = coords // CONTEXT_SCALE - (CONTEXT - PATCH // CONTEXT_SCALE) // 2
        return gather_patches(source, corner, CONTEXT)

    def position(self, coords: Tensor) -> Tensor:
        """[B, K, 2]: patch centres (y, x) in units of the image's longer side."""
        return (coords + PATCH / 2) / max(self.image.shape[-2:])
