"""Neuroverse3D (Hu et al. 2025, arXiv 2503.02410) with the module names of its published package."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .neuralizer import PairwiseConvAvgModelOutput, ResidualUnit, Vmap, every


class ConvBlock_target_encoder(nn.Module):
    """Targets on their own."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.target_conv = ResidualUnit(channels, dim, 2)

    def forward(self, target: Tensor, verbose: bool = False) -> Tensor:
        return self.target_conv(target)


class ConvBlock_context_c2t(nn.Module):
    """Contexts on their own."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.context_conv = Vmap(ResidualUnit(channels, dim, 2))

    def forward(self, context: Tensor, verbose: bool = False) -> Tensor:
        return self.context_conv(context)


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


class PairwiseConvAvgModelBlock_c2t(nn.Module):
    """A target that sees the mean of the contexts."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.target_conv = ResidualUnit(channels, dim, 2)
        self.combine_conv_target = Vmap(getattr(nn, f"Conv{dim}d")(2 * channels, channels, 1, padding="same"))

    def forward(self, context_mean: Tensor, target: Tensor, verbose: bool = False) -> Tensor:
        target = self.target_conv(target)
        pairs = torch.cat([context_mean, target[:, None].expand_as(context_mean)], dim=2)
        return F.gelu(target + self.combine_conv_target(pairs).mean(dim=1))


class UnetDownsampleAndCreateShortcutBlock(nn.Module):
    """One of both at half of the size, and what it was; the other is None."""

    def __init__(self, inputs: int, outputs: int, dim: int, side: str) -> None:
        super().__init__()
        self.side, self.linear = side, inputs != outputs
        if self.linear:
            layer: nn.Module = getattr(nn, f"Conv{dim}d")(inputs, outputs, 4, stride=2, padding=1)
        else:
            layer = getattr(nn, f"MaxPool{dim}d")(2)
        name = f"{side}_{'linear' if self.linear else 'pooling'}_layer"
        setattr(self, name, Vmap(layer) if side == "context" else layer)

    def forward(self, context: Any, target: Any) -> tuple[Any, Any, tuple[Any, Any]]:
        layer = getattr(self, f"{self.side}_{'linear' if self.linear else 'pooling'}_layer")
        if self.side == "context":
            return layer(context), target, (context, target)
        return context, layer(target), (context, target)


class UnetUpsampleAndConcatShortcutBlock(nn.Module):
    """One of both at twice the size, joined with what it was there; the other is None."""

    def __init__(self, inputs: int, outputs: int, dim: int, side: str) -> None:
        super().__init__()
        self.side = side
        self.upsampling_layer = nn.Upsample(scale_factor=2, mode="trilinear" if dim == 3 else "bilinear")
        conv = getattr(nn, f"Conv{dim}d")(inputs + outputs, outputs, 1, padding="same")
        setattr(self, f"{side}_conv_layer", Vmap(conv) if side == "context" else conv)

    def forward(self, context: Any, target: Any, shortcut: tuple[Any, Any]) -> tuple[Any, Any]:
        if self.side == "context":
            joined = torch.cat([every(self.upsampling_layer, context), shortcut[0]], dim=2)
            return self.context_conv_layer(joined), target
        return context, self.target_conv_layer(torch.cat([self.upsampling_layer(target), shortcut[1]], dim=1))


class TargetEncoder(nn.Module):
    """Of a target, the features that contexts see."""

    def __init__(self, in_channels: int, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        self.target_embedding = getattr(nn, f"Conv{dim}d")(in_channels, widths[0], 1, padding="same")
        self.enc_blocks = nn.ModuleList(ConvBlock_target_encoder(width, dim) for width in widths[:-1])
        self.downsample_blocks = nn.ModuleList(
            UnetDownsampleAndCreateShortcutBlock(*pair, dim, "target") for pair in itertools.pairwise(widths)
        )

    def forward(self, target_in: Tensor) -> tuple[list[tuple[Any, Tensor]], Tensor]:
        target, shortcuts = self.target_embedding(target_in), []
        for block, downsample in zip(self.enc_blocks, self.downsample_blocks, strict=True):
            _, target, shortcut = downsample(None, block(target))
            shortcuts.append(shortcut)
        return shortcuts, target


class ContextUNet(nn.Module):
    """Of contexts, the features whose means the target sees."""

    def __init__(self, in_channels: int, out_channels: int, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        self.stages, self.context_filled = len(widths), True
        conv, steps = getattr(nn, f"Conv{dim}d"), list(itertools.pairwise(widths))
        self.context_embedding = Vmap(conv(in_channels + out_channels, widths[0], 1, padding="same"))
        self.enc_blocks = nn.ModuleList(ConvBlock_context_t2c(width, dim) for width in widths[:-1])
        self.enc_blocks.append(ConvBlock_context_c2t(widths[-1], dim))
        self.downsample_blocks = nn.ModuleList(
            UnetDownsampleAndCreateShortcutBlock(*step, dim, "context") for step in steps
        )
        self.dec_blocks = nn.ModuleList(ConvBlock_context_c2t(width, dim) for width in widths[-2::-1])
        self.upsample_blocks = nn.ModuleList(
            UnetUpsampleAndConcatShortcutBlock(below, width, dim, "context") for width, below in steps[::-1]
        )

    def forward(self, context_in: Tensor, context_out: Tensor, target_features: list[Tensor]) -> list[Tensor]:
        context = self.context_embedding(torch.cat([context_in, context_out], dim=2))
        shortcuts = []
        for i, downsample in enumerate(self.downsample_blocks):
            context, _, shortcut = downsample(self.enc_blocks[i](context, target_features[i]), None)
            shortcuts.append(shortcut)
        context = self.enc_blocks[-1](context)
        features = [context]
        for upsample, block in zip(self.upsample_blocks, self.dec_blocks, strict=True):
            context = block(upsample(context, None, shortcuts.pop())[0])
            features.append(context)
        return features


class TargetDecoder(nn.Module):
    """The output for a target, which sees the means of contexts."""

    def __init__(self, out_channels: int, widths: Sequence[int], dim: int) -> None:
        super().__init__()
        self.enc_blocks = nn.ModuleList([PairwiseConvAvgModelBlock_c2t(widths[-1], dim)])
        self.dec_blocks = nn.ModuleList(PairwiseConvAvgModelBlock_c2t(width, dim) for width in widths[-2::-1])
        self.upsample_blocks = nn.ModuleList(
            UnetUpsampleAndConcatShortcutBlock(below, width, dim, "target")
            for width, below in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.output_block = PairwiseConvAvgModelOutput(widths[0], out_channels, dim)

    def forward(self, target: Tensor, means: list[Tensor], shortcuts: list[Any]) -> Tensor:
        first, *means = means
        target = self.enc_blocks[0](first, target)
        for upsample, block, mean, shortcut in zip(
            self.upsample_blocks, self.dec_blocks, means, shortcuts[::-1], strict=True
        ):
            target = block(mean, upsample(None, target, shortcut)[1])
        return self.output_block(target)


class Scale(torch.autograd.Function):
    """The identity, with gradients multiplied."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class Neuroverse3D(nn.Module):
    """Contexts in shuffled mini-contexts of l, of which the last is differentiated; as published but for options."""

    def __init__(self, widths: Sequence[int], dim: int, in_channels: int = 1, out_channels: int = 1) -> None:
        super().__init__()
        self.stages = len(widths)
        self.context_unet = ContextUNet(in_channels, out_channels, widths, dim)
        self.target_encoder = TargetEncoder(in_channels, widths, dim)
        self.target_decoder = TargetDecoder(out_channels, widths, dim)

    def forward(self, target_in: Tensor, context_in: Tensor, context_out: Tensor, l: int = 3) -> Tensor:  # noqa: E741
        shortcuts, target = self.target_encoder(target_in)
        seen = [shortcut[1] for shortcut in shortcuts]
        starts = list(range(0, context_in.shape[1], l))
        random.shuffle(starts)
        means: list[Any] = [0.0] * self.stages
        for start in starts:
            last = start == starts[-1]
            part = slice(start, start + l)
            with torch.set_grad_enabled(torch.is_grad_enabled() and last):
                found = self.context_unet(context_in[:, part], context_out[:, part], seen)
                share = found[0].shape[1] / context_in.shape[1]
                news = [feature.mean(dim=1, keepdim=True) for feature in found]
                if last:
                    news = [Scale.apply(new, len(starts)) for new in news]
                means = [mean + new * share for mean, new in zip(means, news, strict=True)]
        return self.target_decoder(target, means, shortcuts)
