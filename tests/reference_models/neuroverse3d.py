"""A block of Neuroverse3D (Hu et al. 2025, arXiv 2503.02410) with the module names of its published package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .neuralizer import ResidualUnit, Vmap


class ConvBlock_context_t2c(nn.Module):
    """Contexts that see the target."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.context_conv = Vmap(ResidualUnit(channels, dim, 2))
        self.combine_conv_context = Vmap(getattr(nn, f"Conv{dim}d")(2 * channels, channels, 1, padding="same"))

    def forward(self, context: Tensor, target: Tensor, verbose: bool = False) -> Tensor:
        context = self.context_conv(context)
        pairs = torch.cat([context, target[:, None].expand_as(context)], dim=2)
        return F.gelu(context + self.combine_conv_context(pairs))
