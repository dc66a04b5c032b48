"""What goes from one level of the cascade, and from one round of picks, to the next."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from icseg.sparse.budget import LevelPlan
from icseg.sparse.patches import PATCH, grid_size
from icseg.sparse.pyramid import Pyramid
from icseg.sparse.support import LevelMemory


@dataclass
class Cascade:
    """What the levels and rounds so far leave to the next.

    logits:  [B, C, h, w] the combined map; None before the first level.
    error:   [B, C, rows, columns] mean error that is expected in each cell of the coming level.
    uncovered: [B] expected error where the last level has no patch, as a share of twice the expected foreground.
    worthwhile: [B, 1] whether the last level took more than its exploration, or is covered; None before any picked.
    blocks:  for each block the keys and values [B, n, 2D] of all target tokens so far.
    valid:   for each of those the tokens that are patches [B, n], None for all; lengths: their n.
    """

    blocks: list[list[Tensor]]
    valid: list[Tensor | None] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    logits: Tensor | None = None
    error: Tensor | None = None
    uncovered: Tensor | None = None
    worthwhile: Tensor | None = None


@dataclass
class LevelTask:
    """What a level works on."""

    level: int
    pyramid: Pyramid
    support: LevelMemory
    classes: int
    plan: LevelPlan
    seed: int | None
    target_mask: Tensor | None

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.pyramid.image(self.level).shape[-2:]
        return height, width

    @property
    def grid(self) -> tuple[int, int]:
        return grid_size(*self.size)

    @property
    def cells(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @property
    def cell_shares(self) -> Tensor | float:
        """Each cell's share of the image's pixels: [rows, columns], or one number where all are whole."""
        if self.size[0] % PATCH == self.size[1] % PATCH == 0:
            return 1 / self.cells
        device = self.pyramid.images[0].device
        sides = [
            (length - torch.arange(count, device=device) * PATCH).clamp(max=PATCH) / length
            for length, count in zip(self.size, self.grid, strict=True)
        ]
        return sides[0].unsqueeze(1) * sides[1]


@dataclass
class Round:
    """Of K patches: coords [B, K, 2], logits and error [B, K, C, 8, 8], change [B, K] of the probability.

    valid: [B, K], False for entries that are no patch; None: all are.
    """

    coords: Tensor
    logits: Tensor
    error: Tensor
    change: Tensor
    valid: Tensor | None
