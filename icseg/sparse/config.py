"""Configuration of the sparse architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from icseg.config import PatchICLConfig, check_int, check_ints, check_numbers


@dataclass(frozen=True)
class SparseConfig(PatchICLConfig):
    """The default model: patches gathered raw at each level, encoded alone, the support set encoded once.

    levels:            longer side of the image at each level, in pixels, each twice the one before. An image's finest
                       level is the one nearest to its own size; those after it are left out.
    distinct_levels:   levels with an embedding, gain and bound of their own; finer ones share the last.
    target_patches:    target patches a level in training and where shapes are static, each round (clamped to what
                       exists). The first level is always tiled completely.
    support_patches:   patches a level and support image; fewer where S of them exceed `most_support_patches`.
    most_support_patches: of a whole support set, a level.
    most_patches:      most target patches a level and round that an adaptive budget takes.
    exploration:       patches of the first round at each level of an adaptive budget (the coarsest is tiled, the last
                       entry serves finer levels too; levels from `distinct_levels` on are explored only where the one
                       before took more than its exploration), and
    trial:             of the second. The share of the expected error that a round mends tells whether the next is
                       worth its cost; the last takes all that are.
    tolerance:         adaptive budget: where the expected error that more patches of a level could mend is at most
                       this share of twice the expected foreground (so about that of Dice), they are not taken.
    patches_of_tolerance: nor, from the second round on, is a patch that could mend less than the tolerance over this.
    foreground_share:  share of a support image's patches that is spent on its foreground and boundary.
    dim, depth, heads, mlp_ratio: width, blocks, attention heads and hidden layer of the transformer.
    registers:         tokens without a patch, as many on the support's side as on the target's.
    stem_channels:     channels of the full-resolution patch features.
    propagation_heads, propagation_key_dim, propagation_value_dim: label propagation, per head.
    decoder_channels:  of the part that all classes share, and of a class's own.
    residual_bound:    largest change, in logits, that one level can make to the coarser prediction.
    oracle_share, oracle_share_end: in training, the share of targets whose patches are picked by the true error, at its
                       start and its end; in between it changes linearly. None: it stays.
    uniform_share:     in training, the share of targets whose patches are drawn anywhere, so that no patch is strange.
    selection_power:   exponent on the expected error in the picking weights of a draw.
    """

    architecture: ClassVar[str] = "sparse"

    levels: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    distinct_levels: int = 4
    target_patches: tuple[int, ...] = (16, 24, 32, 48, 48, 48)
    support_patches: tuple[int, ...] = (16, 16, 24, 24, 24, 24)
    most_support_patches: int = 512
    most_patches: int = 1024
    exploration: tuple[int, ...] = (16, 40, 24, 6)
    trial: int = 24
    tolerance: float = 0.02
    patches_of_tolerance: int = 1000
    foreground_share: float = 0.6
    dim: int = 128
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 2
    registers: int = 4
    stem_channels: int = 24
    propagation_heads: int = 2
    propagation_key_dim: int = 16
    propagation_value_dim: int = 12
    decoder_channels: tuple[int, int] = (32, 20)
    residual_bound: float = 8.0
    oracle_share: float = 0.2
    oracle_share_end: float | None = None
    uniform_share: float = 0.15
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
        doubled = all(finer == 2 * coarser for coarser, finer in zip(self.levels, self.levels[1:], strict=False))
        if self.levels[0] % 8 or not doubled:
            raise ValueError(
                f"levels must start with a multiple of 8 and double from one to the next, got {self.levels}"
            )
        check_ints(self, 1, "distinct_levels", "most_support_patches", "most_patches", "trial")
        check_ints(self, 1, "patches_of_tolerance", "dim", "depth", "heads", "mlp_ratio", "stem_channels")
        check_ints(self, 1, "propagation_heads", "propagation_key_dim", "propagation_value_dim")
        check_ints(self, 0, "registers")
        if not isinstance(self.exploration, tuple) or not self.exploration:
            raise ValueError(f"exploration must be a tuple of ints, one a level, got {self.exploration!r}")
        for value in self.exploration:
            check_int("exploration", value, 1)
        if not isinstance(self.decoder_channels, tuple) or len(self.decoder_channels) != 2:
            raise ValueError(f"decoder_channels must be two ints, got {self.decoder_channels!r}")
        for value in self.decoder_channels:
            check_int("decoder_channels", value, 1)
        if self.dim % self.heads:
            raise ValueError(f"dim must be divisible by heads = {self.heads}, got {self.dim}")
        oracle = ["oracle_share"] if self.oracle_share_end is None else ["oracle_share", "oracle_share_end"]
        check_numbers(self, "foreground_share", *oracle, "uniform_share", least=0, most=1)
        for name in oracle:
            if getattr(self, name) + self.uniform_share > 1:
                shares = f"{getattr(self, name)} and {self.uniform_share}"
                raise ValueError(f"{name} and uniform_share must add up to at most 1, got {shares}")
        check_numbers(self, "tolerance", least=0)
        check_numbers(self, "residual_bound", "selection_power", above=0)

    def to_dict(self) -> dict[str, Any]:
        """Without a field that older versions did not know, where it says nothing: their memories stay valid."""
        values = super().to_dict()
        if self.oracle_share_end is None:
            del values["oracle_share_end"]
        return values
