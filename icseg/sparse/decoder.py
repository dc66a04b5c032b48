"""From a patch's features, token, propagated labels and prior to a bounded change of its logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icseg.sparse.encoder import activation
from icseg.sparse.propagation import CONTEXT_CHANNELS

TOKEN_CHANNELS = 16
PRIOR_CHANNELS = 2


class PatchDecoder(nn.Module):
    """Logit changes [B*K, 1, 8, 8] within +-`bound`."""

    def __init__(self, dim: int, channels: int, propagation_heads: int, levels: int, bound: float) -> None:
        super().__init__()
        self.bound = bound
        self.token = nn.Linear(dim, TOKEN_CHANNELS * 16)
        last = nn.Conv2d(32, 1, 1)
        inputs = channels + TOKEN_CHANNELS + CONTEXT_CHANNELS + propagation_heads + PRIOR_CHANNELS
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, 40, 3, padding=1, padding_mode="replicate"), activation(),
            nn.Conv2d(40, 32, 3, padding=1, padding_mode="replicate"), activation(),
            last,
        )  # fmt: skip
        # The coarsest level starts as label propagation itself, finer ones as a mild correction.
        self.propagation_gain = nn.Parameter(torch.tensor([4.0] + [1.0] * (levels - 1)))
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, features: Tensor, tokens: Tensor, masks: Tensor, context: Tensor, prior: Tensor, level: int
    ) -> Tensor:
        """features [B*K, C, 8, 8], tokens [B, K, D], prior logits [B*K, 1, 8, 8].

        masks, context: what `LabelPropagation` returned.
        """
        token = self.token(tokens).view(-1, TOKEN_CHANNELS, 4, 4)
        token = F.interpolate(token, scale_factor=2.0, mode="bilinear", align_corners=False)
        prior_channels = [prior.clamp(-6, 6) / 3, prior.sigmoid() * 2 - 1]
        change = self.layers(torch.cat([features, token, context, masks, *prior_channels], 1))
        change = change + self.propagation_gain[level] * masks.mean(1, keepdim=True)
        return self.bound * torch.tanh(change / self.bound)
