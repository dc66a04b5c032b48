"""What a model returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class LevelOutput:
    """What one level of the cascade, at `resolution` (height, width), predicted.

    logits:       [B, 1, h, w] the prediction after this level: the coarser one, upsampled, changed where patches lie.
    prediction:   [B, 1, h, w] this level's own patches written back; the fill value where no patch lies.
    patch_logits: [B, K, 1, p, p] per target patch.
    coords:       [B, K, 2] int, (y, x) of each target patch's top-left corner in the level's pixels.
    coverage:     [B, 1, h, w] bool, True where a target patch lies.
    """

    resolution: tuple[int, int]
    logits: Tensor
    prediction: Tensor
    patch_logits: Tensor
    coords: Tensor
    coverage: Tensor
    support_coords: Tensor | None = None
    support_patch_logits: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class SegmentationOutput:
    """logits: [B, 1, H, W] at the target's own size; levels: coarse to fine."""

    logits: Tensor
    levels: list[LevelOutput]

    @property
    def probability(self) -> Tensor:
        """[B, 1, H, W] foreground probability in [0, 1]."""
        return self.logits.sigmoid()
