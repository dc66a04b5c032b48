"""Blocks of Neuralizer (Czolbe and Dalca 2023, arXiv 2305.02644) with the module names of its published package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .universeg import Vmap


class ResidualUnit(nn.Module):
    """Convolutions beside an identity."""

    def __init__(self, channels: int, dim: int, conv_layers: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(conv_layers):
            layers += [getattr(nn, f"Conv{dim}d")(channels, channels, 3, padding="same"), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input + self.layers(input))


class PairwiseConvAvgModelBlock(nn.Module):
    """A step in which a target and its contexts exchange features."""

    def __init__(self, channels: int, dim: int, conv_layers: int = 2) -> None:
        super().__init__()
        self.context_conv = Vmap(ResidualUnit(channels, dim, conv_layers))
        self.target_conv = ResidualUnit(channels, dim, conv_layers)
        conv = getattr(nn, f"Conv{dim}d")
        self.combine_conv_target = Vmap(conv(2 * channels, channels, 1, padding="same"))
        self.combine_conv_context = Vmap(conv(2 * channels, channels, 1, padding="same"))

    def forward(self, context: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        context, target = self.context_conv(context), self.target_conv(target)
        pairs = torch.cat([context, target[:, None].expand_as(context)], dim=2)
        update = self.combine_conv_target(pairs).mean(dim=1)
        return F.gelu(context + self.combine_conv_context(pairs)), F.gelu(target + update)
