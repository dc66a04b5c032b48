"""How a model sees images of any size and aspect ratio, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F
from torch import Tensor

from icseg.data.formats.content import Array
from icseg.resize import resize

SIDES = (32, 4096)  # longer sides that models of any size see; images of other own sizes are brought to the nearer one


@dataclass(frozen=True)
class ScaledFrame:
    """Images [height, width] scaled by one factor, so that the longer side has `size` pixels; None: their own size."""

    height: int
    width: int
    size: int | None

    @classmethod
    def of(cls, pixels: Array, size: int | None) -> Self:
        """The frame of `pixels` [..., height, width]."""
        height, width = pixels.shape[-2:]
        return cls(height, width, size)

    @property
    def scaled(self) -> tuple[int, int]:
        """(height, width) of the scaled image."""
        least, most = SIDES
        longer = max(self.height, self.width)
        scale = (min(max(longer, least), most) if self.size is None else self.size) / longer
        return max(1, round(self.height * scale)), max(1, round(self.width * scale))

    def enter(self, images: Tensor) -> Tensor:
        """[N, height, width] float to [N, 1, *scaled], with anti-aliasing."""
        return resize(images[:, None], self.scaled)

    def enter_masks(self, masks: Tensor) -> Tensor:
        """[N, height, width] in [0, 1] to [N, 1, *scaled]; border pixels hold the share of the mask."""
        return resize(masks[:, None], self.scaled)

    def leave(self, logits: Tensor) -> Tensor:
        """[N, C, *scaled] to [N, C, height, width], bilinearly."""
        return resize(logits, (self.height, self.width))


@dataclass(frozen=True)
class SquareFrame(ScaledFrame):
    """Scaled images in a square of `size` pixels, centred, and continued at the shorter sides by their edge pixels
    (masks by background), for models that take nothing else."""

    size: int

    def enter(self, images: Tensor) -> Tensor:
        """[N, height, width] float to [N, 1, size, size]."""
        return F.pad(super().enter(images), self._margins(), mode="replicate")

    def enter_masks(self, masks: Tensor) -> Tensor:
        """[N, height, width] in [0, 1] to [N, 1, size, size]."""
        return F.pad(super().enter_masks(masks), self._margins())

    def enter_ids(self, ids: Tensor) -> Tensor:
        """[N, height, width] class ids to [N, 1, size, size], each pixel that of the nearest one."""
        return F.pad(F.interpolate(ids[:, None], self.scaled, mode="nearest-exact"), self._margins())

    def leave(self, logits: Tensor) -> Tensor:
        """[N, C, size, size] to [N, C, height, width]: the margins cut off, at the image's own size."""
        left, _, top, _ = self._margins()
        height, width = self.scaled
        return super().leave(logits[..., top : top + height, left : left + width])

    def _margins(self) -> tuple[int, int, int, int]:
        """Left, right, top, bottom."""
        height, width = self.scaled
        left, top = (self.size - width) // 2, (self.size - height) // 2
        return left, self.size - width - left, top, self.size - height - top
