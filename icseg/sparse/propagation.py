"""Label propagation: target cells look up the masks of support cells that look alike."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icseg.sparse.encoder import attention

CELL = 2  # side of a cell, in pixels: 16 cells a patch
CELL_PIXELS = CELL * CELL
CELLS = 16
HIDDEN = 64
CONTEXT_CHANNELS = 16


class LabelPropagation(nn.Module):
    """Attention from 2 x 2 px target cells to support cells, with the support masks of all classes among the values.

    Keys and queries are L2-normalised functions of a cell's features and its patch's token, the temperature is learned.
    They know nothing of the classes: one look-up serves all.
    """

    def __init__(self, dim: int, channels: int, heads: int, key_dim: int, value_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.match_cell, self.match_token = (
            nn.Linear(CELL_PIXELS * channels, HIDDEN),
            nn.Linear(dim, HIDDEN, bias=False),
        )
        self.match_out = nn.Linear(HIDDEN, heads * key_dim)
        self.value_cell = nn.Linear(CELL_PIXELS * channels, heads * value_dim)
        self.value_token = nn.Linear(dim, heads * value_dim, bias=False)
        self.log_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(12.0)))
        self.out = nn.Linear(heads * value_dim, CONTEXT_CHANNELS * CELL_PIXELS)

    def support(self, features: Tensor, tokens: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, h, K*16, D] and values [B, h, K*16, 4 classes + value_dim] of support cells.

        features [B*K, C, 8, 8], tokens [B, K, D], masks [B*K, classes, 8, 8] in [-1, 1].
        """
        labels = cells(masks)
        labels = labels.reshape(tokens.shape[0], 1, -1, labels.shape[-1]).expand(-1, self.heads, -1, -1)
        per_patch = self.value_token(tokens).flatten(0, 1).unsqueeze(1)
        features = cells(features).contiguous()  # for two linear layers
        learned = self._heads(self.value_cell(features) + per_patch, tokens.shape[0])
        return self._match(features, tokens), torch.cat([labels, learned], -1)

    def forward(
        self, features: Tensor, tokens: Tensor, keys: Tensor, values: Tensor, index: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the target's patches looked up: (masks [B*K, h, classes, 8, 8] in [-1, 1], context [B*K, 16, 8, 8])."""
        query = self._match(cells(features), tokens) * self.log_scale.exp()
        keys, values = keys.to(query.dtype), values.to(query.dtype)  # a memory made at another precision serves too
        found = attention(query, keys, values, scale=1.0, index=index)
        found = found.unflatten(2, (tokens.shape[1], CELLS)).permute(0, 2, 3, 1, 4).flatten(0, 1)  # [B*K, 16, h, Dv]
        value_dim = self.value_cell.out_features // self.heads
        labels, learned = found.split([found.shape[-1] - value_dim, value_dim], -1)
        masks = pixels(labels.flatten(2)).unflatten(1, (self.heads, -1))
        return masks, pixels(self.out(learned.flatten(2)))

    def _match(self, features: Tensor, tokens: Tensor) -> Tensor:
        per_patch = self.match_token(tokens).flatten(0, 1).unsqueeze(1)
        hidden = F.gelu(self.match_cell(features) + per_patch)
        return F.normalize(self._heads(self.match_out(hidden), tokens.shape[0]), dim=-1)

    def _heads(self, x: Tensor, batch: int) -> Tensor:
        return x.view(batch, -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)


def cells(x: Tensor) -> Tensor:
    """[N, C, 8, 8] -> [N, 16, 4C]."""
    return F.pixel_unshuffle(x, CELL).flatten(2).transpose(1, 2)


def pixels(x: Tensor) -> Tensor:
    """[N, 16, 4C] -> [N, C, 8, 8], the inverse of `cells`."""
    return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (4, 4)), CELL)
