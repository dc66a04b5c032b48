"""Configuration of the sparse architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from icseg.config import PatchICLConfig, check_int, check_ints, check_numbers


@dataclass(frozen=True)
class SparseConfig(PatchICLConfig):
    """The default model: patches gathered raw at each level, encoded alone, the support set encoded once.

    levels:            longer side of the image at each level, in pixels, coarse to fine; multiples of 8. Those
                       after the first that reaches the image's own size are left out.
    target_patches:    target patches a level (clamped to what exists; the first level is meant to be tiled completely).
    support_patches:   patches a level and support image.
    foreground_share:  share of a support image's patches that is spent on its foreground and boundary.
    dim, depth, heads: width, blocks and attention heads of the transformer.
    stem_channels:     channels of the full-resolution patch features.
    propagation_heads, propagation_key_dim, propagation_value_dim: label propagation, per head.
    residual_bound:    largest change, in logits, that one level can make to the coarser prediction.
    oracle_share:      in training, the share of targets whose patches are picked by the true error.
    selection_power:   exponent on the pooled entropy in the picking weights of a draw.
    """

    architecture: ClassVar[str] = "sparse"

    levels: tuple[int, ...] = (32, 64, 128, 256)
    target_patches: tuple[int, ...] = (16, 48, 96, 160)
    support_patches: tuple[int, ...] = (16, 16, 24, 24)
    foreground_share: float = 0.6
    dim: int = 128
    depth: int = 4
    heads: int = 4
    stem_channels: int = 32
    propagation_heads: int = 4
    propagation_key_dim: int = 16
    propagation_value_dim: int = 12
    residual_bound: float = 8.0
    oracle_share: float = 0.2
    selection_power: float = 1.5

    def __post_init__(self) -> None:
        for name in ("levels", "target_patches", "support_patches"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not values:
                raise ValueError(f"{name} must be a tuple of ints, one a level, got {values!r}")
            for value in values:
                check_int(name, value, 1)
            if len(values) != len(self.levels):
                raise ValueError(f"{name} must have one entry a level ({len(self.levels)}), got {values}")
        if any(side % 8 for side in self.levels) or list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"levels must be increasing multiples of 8, got {self.levels}")
        check_ints(self, 1, "dim", "depth", "heads", "stem_channels", "propagation_heads")
        check_ints(self, 1, "propagation_key_dim", "propagation_value_dim")
        if self.dim % self.heads:
            raise ValueError(f"dim must be divisible by heads = {self.heads}, got {self.dim}")
        check_numbers(self, "foreground_share", "oracle_share", least=0, most=1)
        check_numbers(self, "residual_bound", "selection_power", above=0)
