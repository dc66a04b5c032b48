"""What a model returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg.posterior import Entropy
from icseg_kernels import Scatter, scatter_patches


@dataclass
class LevelOutput:
    """What one level of the cascade, at `resolution` (height, width), predicted.

    logits:       [B, C, h, w] the prediction after this level: the coarser one, upsampled, changed where patches lie.
    patch_logits: [B, K, C, p, p] per target patch.
    coords:       [B, K, 2] int, (y, x) of each target patch's top-left corner in the level's pixels; an entry wholly
                  outside the image is no patch.
    written:      the level's own patches written back, where that is not their plain mean.
    """

    resolution: tuple[int, int]
    logits: Tensor
    patch_logits: Tensor
    coords: Tensor
    written: Scatter | None = None
    support_coords: Tensor | None = None
    support_patch_logits: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def _written(self) -> Scatter:
        if self.written is not None:
            return self.written
        return scatter_patches(self.patch_logits, self.coords, self.resolution)

    @property
    def prediction(self) -> Tensor:
        """[B, C, h, w] this level's own patches written back; the fill value where no patch lies."""
        return self._written.mean

    @property
    def coverage(self) -> Tensor:
        """[B, 1, h, w] bool, True where a target patch lies."""
        return self._written.coverage


@dataclass
class SegmentationOutput:
    """The masks of a batch of targets, and how sure they are.

    logits:          [B, C, H, W] at the target's own size; of several draws, of their mean probability.
    levels:          coarse to fine (of the last draw).
    hypotheses:      [B, N, C, H, W] probabilities of each of N draws, if draws were asked for.
    uncovered_error: [B] error |probability - mask| that the model expects where its finest level has no patch, as a
                     share of twice the expected foreground (so that of Dice): no more than this could be mended by
                     more patches. None for models that do not say.
    """

    logits: Tensor
    levels: list[LevelOutput]
    hypotheses: Tensor | None = None
    uncovered_error: Tensor | None = None

    @property
    def probability(self) -> Tensor:
        """[B, C, H, W] foreground probability of each class in [0, 1]."""
        return self.logits.sigmoid()

    @property
    def uncertainty(self) -> Tensor:
        """[B, 1, H, W] float32 in [0, 1]: entropy of background and the C exclusive classes, over its maximum."""
        logits = self.logits.float()
        entropy = Entropy(logits[:, :1].shape, logits.device)
        for channel in logits.split(1, 1):
            entropy.add(channel)
        return entropy.value()

    @property
    def coverage(self) -> Tensor:
        """[B, 1, H, W] bool, True where a patch of the finest level lies."""
        finest = self.levels[-1].coverage
        size = self.logits.shape[-2:]
        if finest.shape[-2:] == size:
            return finest
        return F.interpolate(finest.to(torch.uint8), size=size, mode="nearest-exact").bool()
