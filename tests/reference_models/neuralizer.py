"""Blocks of Neuralizer (Czolbe and Dalca 2023, arXiv 2305.02644) with the module names of its published package."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .universeg import every


class Vmap(nn.Module):
    """A module on every image of [B, L, ...]."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return every(self.module, x)


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


class UnetDownsampleAndCreateShortcutBlock(nn.Module):
    """Both at half of the size, and what they were."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        pool = getattr(nn, f"MaxPool{dim}d")
        self.context_pooling_layer, self.target_pooling_layer = Vmap(pool(2)), pool(2)

    def forward(self, context: Tensor, target: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        return self.context_pooling_layer(context), self.target_pooling_layer(target), (context, target)


class UnetUpsampleAndConcatShortcutBlock(nn.Module):
    """Both at twice the size, joined with what they were there."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.upsampling_layer = nn.Upsample(scale_factor=2, mode="trilinear" if dim == 3 else "bilinear")
        conv = getattr(nn, f"Conv{dim}d")
        self.context_conv_layer = Vmap(conv(2 * channels, channels, 1, padding="same"))
        self.target_conv_layer = conv(2 * channels, channels, 1, padding="same")

    def forward(self, context: Tensor, target: Tensor, shortcut: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        context = torch.cat([every(self.upsampling_layer, context), shortcut[0]], dim=2)
        target = torch.cat([self.upsampling_layer(target), shortcut[1]], dim=1)
        return self.context_conv_layer(context), self.target_conv_layer(target)


class PairwiseConvAvgModelOutput(nn.Module):
    """A residual unit and a 1 x 1 convolution."""

    def __init__(self, channels: int, outputs: int, dim: int) -> None:
        super().__init__()
        head = getattr(nn, f"Conv{dim}d")(channels, outputs, 1, padding="same")
        self.block = nn.Sequential(ResidualUnit(channels, dim, 2), head)

    def forward(self, input: Tensor) -> Tensor:
        return self.block(input)


class PairwiseConvAvgModel(nn.Module):
    """A U-Net of such blocks, of one width."""

    def __init__(self, stages: int, in_channels: int, out_channels: int, channels: int, dim: int) -> None:
        super().__init__()
        conv = getattr(nn, f"Conv{dim}d")
        self.stages, self.context_filled = stages, True
        self.target_embedding = conv(in_channels, channels, 1, padding="same")
        self.context_embedding = Vmap(conv(in_channels + out_channels, channels, 1, padding="same"))
        self.enc_blocks = nn.ModuleList(PairwiseConvAvgModelBlock(channels, dim) for _ in range(stages))
        self.downsample_blocks = nn.ModuleList(UnetDownsampleAndCreateShortcutBlock(dim) for _ in range(stages - 1))
        self.dec_blocks = nn.ModuleList(PairwiseConvAvgModelBlock(channels, dim) for _ in range(stages - 1))
        self.upsample_blocks = nn.ModuleList(
            UnetUpsampleAndConcatShortcutBlock(channels, dim) for _ in range(stages - 1)
        )
        self.output_block = PairwiseConvAvgModelOutput(channels, out_channels, dim)

    def forward(self, context_in: Tensor, context_out: Tensor, target_in: Tensor) -> Tensor:
        context = self.context_embedding(torch.cat([context_in, context_out], dim=2))
        target = self.target_embedding(target_in)
        shortcuts = []
        for i, block in enumerate(self.enc_blocks):
            if i:
                context, target, shortcut = self.downsample_blocks[i - 1](context, target)
                shortcuts.append(shortcut)
            context, target = block(context, target)
        for upsample, block in zip(self.upsample_blocks, self.dec_blocks, strict=True):
            context, target = upsample(context, target, shortcuts.pop())
            context, target = block(context, target)
        return self.output_block(target)
