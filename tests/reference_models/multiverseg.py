"""MultiverSeg (Wong et al. 2024, arXiv 2412.15058) with the module names of its published package."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import universeg
from .universeg import Features, Vmap, both, build, every, walk

Norm = Callable[[int], nn.Module]


def layer(features: int) -> nn.Module:
    """The norm of the published checkpoints."""
    return nn.GroupNorm(1, features)


def shortcut(inputs: int, outputs: int) -> nn.Module:
    """Past a convolution."""
    return Vmap(nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False))


class FastCrossConv2d(nn.Conv2d):
    """A cross convolution of one target, by parts."""

    def __init__(self, in_channels: tuple[int, int], out_channels: int) -> None:
        super().__init__(sum(in_channels), out_channels, 3, padding=1)
        self.in_channels_x, self.in_channels_y = in_channels

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        of_x, of_y = self.weight.split([self.in_channels_x, self.in_channels_y], dim=1)
        pairs = every(lambda v: F.conv2d(v, of_y, padding=1), y)
        return (pairs + F.conv2d(x[:, 0], of_x, self.bias, padding=1)[:, None])[:, None]


class ConvOp(universeg.ConvOp):
    """conv, nonlin, norml."""

    def __init__(self, inputs: int, outputs: int, norm: Norm | None) -> None:
        super().__init__(inputs, outputs)
        if norm is not None:
            self.norml = norm(outputs)


class CrossOp(universeg.CrossOp):
    """Pairs, normalised if wanted, and their mean."""

    def __init__(self, in_channels: tuple[int, int], out_channels: int, nonlinearity: str | None, norm: bool) -> None:
        super().__init__(in_channels, out_channels, nonlinearity)
        self.cross_conv = FastCrossConv2d(in_channels, out_channels)
        self.norm = "layer" if norm else None
        if norm:
            self.norml = layer(out_channels)

    def forward(self, target: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        mean, pairs = super().forward(target, support)
        if self.norm is not None:
            pairs = every(self.norml, pairs)
            mean = pairs.mean(dim=1, keepdim=True)
        return mean, pairs


class CrossBlock(nn.Module):
    """cross, then convolutions, each beside shortcuts if wanted."""

    def __init__(
        self,
        in_channels: tuple[int, int],
        features: Features,
        nonlinearity: str | None,
        cross_norm: bool,
        cross_residual: bool,
        conv_residual: bool,
        norm: Norm | None,
    ) -> None:
        super().__init__()
        crossed, convolved = both(features)
        self.cross = CrossOp(in_channels, crossed, nonlinearity, cross_norm)
        self.target, self.support = (Vmap(ConvOp(crossed, convolved, norm)) for _ in range(2))
        self.cross_residual, self.conv_residual = cross_residual, conv_residual
        if cross_residual:
            self.target_cross_shortcut = shortcut(in_channels[0], crossed)
            self.support_cross_shortcut = shortcut(in_channels[1], crossed)
        if conv_residual:
            self.target_conv_shortcut = shortcut(crossed, convolved)
            self.support_conv_shortcut = shortcut(crossed, convolved)

    def forward(self, target: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        mean, pairs = self.cross(target, support)
        if self.cross_residual:
            mean, pairs = mean + self.target_cross_shortcut(target), pairs + self.support_cross_shortcut(support)
        target, support = self.target(mean), self.support(pairs)
        if self.conv_residual:
            target, support = target + self.target_conv_shortcut(mean), support + self.support_conv_shortcut(pairs)
        return target, support


class MultiverSegNet(nn.Module):
    """UniverSeg's U-Net with normalisation, and prompts beside the target; as published but for the widths."""

    def __init__(
        self,
        encoder_blocks: Sequence[Features],
        *,
        cross_relu: bool = True,
        cross_norm: bool = False,
        cross_residual: bool = False,
        conv_residual: bool = False,
        norm: Norm | None = layer,
        in_channels: tuple[int, int] = (5, 2),
    ) -> None:
        super().__init__()
        options = "LeakyReLU" if cross_relu else None, cross_norm, cross_residual, conv_residual, norm
        build(self, encoder_blocks, in_channels, lambda inputs, features: CrossBlock(inputs, features, *options))

    def forward(
        self, target_image: Tensor, support_images: Tensor | None = None, support_labels: Tensor | None = None
    ) -> Tensor:
        target = target_image[:, None] if target_image.ndim == 4 else target_image
        if support_images is None or support_labels is None:
            support_images = support_labels = torch.full_like(target[:, :, :1], 0.5)
        target = walk(self, target, torch.cat([support_images, support_labels], dim=2))
        return self.out_conv(target[:, 0])
