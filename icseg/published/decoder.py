"""Tokens back to patches of logits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icseg.published.config import BackboneConfig
from icseg.published.encoder import FilmNorm


class DecoderStage(nn.Module):
    """Twice the size, the encoder's map of that size beside it if there are skips, then one convolution."""

    def __init__(self, dim: int, skips: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.conv = nn.Conv2d(2 * dim if skips else dim, dim, 3, padding=1)
        self.norm = FilmNorm(dim)

    def forward(self, x: Tensor, skips: Mapping[int, Tensor], scale: Tensor) -> Tensor:
        x = self.up(x)
        if skips:
            x = torch.cat([x, skips[x.shape[-1]]], dim=1)
        return self.norm(self.conv(x), scale)


class PatchDecoder(nn.Module):
    """Tokens [N, D] to logits [N, 1, p, p] and, if `confidence`, as many values in [0, 1]."""

    def __init__(self, config: BackboneConfig, patch_size: int, confidence: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        doublings = config.patch_grid.bit_length() - 1
        self.stages = nn.ModuleList(DecoderStage(config.dim, config.skips) for _ in range(doublings))
        self.head = _head(config.dim)
        self.confidence_head = _head(config.dim) if confidence else None

    def forward(self, tokens: Tensor, skips: Mapping[int, Tensor], scale: Tensor) -> tuple[Tensor, Tensor | None]:
        """skips: the encoder's maps [N, D, s, s] by size s; empty for a decoder without skips."""
        x = tokens[:, :, None, None]
        for stage in self.stages:
            x = stage(x, skips, scale)
        logits = self._sized(self.head(x))
        if self.confidence_head is None:
            return logits, None
        return logits, self._sized(self.confidence_head(x).sigmoid())

    def _sized(self, patches: Tensor) -> Tensor:
        if patches.shape[-1] == self.patch_size:
            return patches
        return F.interpolate(patches, (self.patch_size, self.patch_size), mode="bilinear", align_corners=False)


def _head(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(dim, dim // 2, 3, padding=1), nn.GELU(), nn.Conv2d(dim // 2, 1, 1))
