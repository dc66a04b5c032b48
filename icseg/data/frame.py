"""The square in which a model sees an image of any size and aspect ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F
from torch import Tensor

from icseg.data.formats.content import Array


@dataclass(frozen=True)
class SquareFrame:
    """Images [height, width] in a square of `size` pixels: scaled by one factor, so that shapes keep their
    proportions, centred, and continued at the shorter sides by their edge pixels (masks by background)."""

    height: int
    width: int
    size: int

    @classmethod
    def of(cls, pixels: Array, size: int) -> Self:
        """The frame of `pixels` [..., height, width]."""
        height, width = pixels.shape[-2:]
        return cls(height, width, size)

    @property
    def scaled(self) -> tuple[int, int]:
        """(height, width) of the image inside the square."""
        scale = self.size / max(self.height, self.width)
        return max(1, round(self.height * scale)), max(1, round(self.width * scale))

    def enter(self, images: Tensor) -> Tensor:
        """[N, height, width] float to [N, 1, size, size]."""
        return F.pad(self._scale(images), self._margins(), mode="replicate")

    def enter_masks(self, masks: Tensor) -> Tensor:
        """[N, height, width] in [0, 1] to [N, 1, size, size]; border pixels hold the share of the mask."""
        return F.pad(self._scale(masks), self._margins())

    def leave(self, logits: Tensor) -> Tensor:
        """[N, 1, size, size] to [N, 1, height, width]: the margins cut off, at the image's own size."""
        left, _, top, _ = self._margins()
        height, width = self.scaled
        inside = logits[..., top : top + height, left : left + width]
        return _resize(inside, (self.height, self.width))

    def _scale(self, images: Tensor) -> Tensor:
        return _resize(images[:, None], self.scaled)

    def _margins(self) -> tuple[int, int, int, int]:
        """Left, right, top, bottom."""
        height, width = self.scaled
        left, top = (self.size - width) // 2, (self.size - height) // 2
        return left, self.size - width - left, top, self.size - height - top


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    if images.shape[-2:] == size:
        return images
    height, width = size
    wider = (height, max(2, width))  # torch (2.13) fills a result of width 1 with its first row
    resized = F.interpolate(images, size=wider, mode="bilinear", align_corners=False, antialias=True)
    return resized if width > 1 else resized.mean(-1, keepdim=True)
