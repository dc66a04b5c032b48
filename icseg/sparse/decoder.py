"""From a patch's features, token, propagated labels and prior to a bounded change of its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icseg.sparse.encoder import SmallConvolutions, activation, convolved
from icseg.sparse.propagation import CONTEXT_CHANNELS

TOKEN_CHANNELS = 16
PRIOR_CHANNELS = 2


@dataclass
class Decoded:
    """change: [B*K, classes, 8, 8] of the logits, within +-`bound`; error: logits of the error that remains."""

    change: Tensor
    error: Tensor


class PatchDecoder(nn.Module):
    """What the classes share is computed once for all of them; a class adds two small convolutions."""

    def __init__(
        self, dim: int, features: int, channels: tuple[int, int], propagation_heads: int, levels: int, bound: float
    ) -> None:
        super().__init__()
        self.bound = bound
        shared, own = channels
        self.token = nn.Linear(dim, TOKEN_CHANNELS * 16)
        self.shared = SmallConvolutions(
            nn.Conv2d(features + TOKEN_CHANNELS + CONTEXT_CHANNELS, shared, 3, padding=1, padding_mode="replicate"),
            activation(),
            nn.Conv2d(shared, own, 1),
        )
        self.own = nn.Conv2d(propagation_heads + PRIOR_CHANNELS, own, 3, padding=1, padding_mode="replicate")
        last = nn.Conv2d(own, 2, 1)
        self.layers = SmallConvolutions(
            activation(), nn.Conv2d(own, own, 3, padding=1, padding_mode="replicate"), activation(), last
        )
        # The coarsest level starts as label propagation itself, finer ones as a mild correction.
        self.propagation_gain = nn.Parameter(torch.tensor([4.0] + [1.0] * (levels - 1)))
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, features: Tensor, tokens: Tensor, masks: Tensor, context: Tensor, prior: Tensor, level: int
    ) -> Decoded:
        """features [B*K, C, 8, 8], tokens [B, K, D], prior logits [B*K, classes, 8, 8].

        masks, context: what `LabelPropagation` returned.
        """
        token = self.token(tokens).view(-1, TOKEN_CHANNELS, 4, 4)
        token = F.interpolate(token, scale_factor=2.0, mode="bilinear", align_corners=False)
        shared = self.shared(torch.cat([features, token, context], 1))
        priors = torch.stack([prior.clamp(-6, 6) / 3, prior.sigmoid() * 2 - 1], 2)
        own = torch.cat([masks.transpose(1, 2), priors], 2)  # [B*K, classes, h + 2, 8, 8]
        classes = own.shape[1]
        own = convolved(self.own, own.flatten(0, 1)).unflatten(0, (-1, classes)) + shared.unsqueeze(1)
        change, error = self.layers(own.flatten(0, 1)).unflatten(0, (-1, classes)).unbind(2)
        gain = self.propagation_gain[min(level, len(self.propagation_gain) - 1)]
        change = change + gain * masks.mean(1)
        return Decoded(self.bound * torch.tanh(change / self.bound), error)
