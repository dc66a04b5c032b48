"""UniverSeg (Butoi et al. 2023, arXiv 2304.06131) with the module names of its published package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Features = int | tuple[int, int]


def both(features: Features) -> tuple[int, int]:
    """A pair, of one number twice."""
    return features if isinstance(features, tuple) else (features, features)


class Vmap(nn.Module):
    """A module on every image of [B, S, ...]."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.vmapped = module

    def forward(self, x: Tensor) -> Tensor:
        return every(self.vmapped, x)


class ConvOp(nn.Sequential):
    """conv, then nonlin unless there is none."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int = 3, nonlinearity: str | None = "LeakyReLU") -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2)
        self.nonlinearity = nonlinearity
        if nonlinearity is not None:
            self.nonlin = getattr(nn, nonlinearity)()


class CrossConv2d(nn.Conv2d):
    """A convolution of every concatenated pair: [B, Sx, Cx, H, W], [B, Sy, Cy, H, W] -> [B, Sx, Sy, Co, H, W]."""

    def __init__(self, in_channels: int | tuple[int, int], out_channels: int, kernel_size: int, **kwargs: Any) -> None:
        both = sum(in_channels) if isinstance(in_channels, tuple) else 2 * in_channels
        super().__init__(both, out_channels, kernel_size, **kwargs)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        rows, columns = x.shape[1], y.shape[1]
        left = x[:, :, None].expand(-1, -1, columns, -1, -1, -1)
        right = y[:, None].expand(-1, rows, -1, -1, -1, -1)
        pairs = torch.cat([left, right], dim=3)
        return super().forward(pairs.flatten(0, 2)).unflatten(0, pairs.shape[:3])


class CrossOp(nn.Module):
    """Pairs of one target with every support, and their mean."""

    def __init__(self, in_channels: tuple[int, int], out_channels: int, nonlinearity: str | None) -> None:
        super().__init__()
        self.cross_conv: nn.Module = CrossConv2d(in_channels, out_channels, 3, padding=1)
        self.nonlinearity = nonlinearity
        if nonlinearity is not None:
            self.nonlin = getattr(nn, nonlinearity)()

    def forward(self, target: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        pairs = self.cross_conv(target, support).squeeze(dim=1)
        if self.nonlinearity is not None:
            pairs = every(self.nonlin, pairs)
        return pairs.mean(dim=1, keepdim=True), pairs


class CrossBlock(nn.Module):
    """cross, then a convolution of the target and another of the supports; features: of cross and of those."""

    def __init__(self, in_channels: tuple[int, int], features: Features, nonlinearity: str | None = None) -> None:
        super().__init__()
        crossed, convolved = both(features)
        self.cross = CrossOp(in_channels, crossed, nonlinearity)
        self.target = Vmap(ConvOp(crossed, convolved))
        self.support = Vmap(ConvOp(crossed, convolved))

    def forward(self, target: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        target, support = self.cross(target, support)
        return self.target(target), self.support(support)


class UniverSeg(nn.Module):
    """A U-Net of cross blocks."""

    def __init__(self, encoder_blocks: Sequence[Features], nonlinearity: str | None = None) -> None:
        super().__init__()
        build(self, encoder_blocks, (1, 2), lambda inputs, features: CrossBlock(inputs, features, nonlinearity))

    def forward(self, target_image: Tensor, support_images: Tensor, support_labels: Tensor) -> Tensor:
        target = walk(self, target_image[:, None], torch.cat([support_images, support_labels], dim=2))
        return self.out_conv(target[:, 0])


def every(module: Any, x: Tensor) -> Tensor:
    """`module` on every image of [B, S, ...]."""
    return module(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def build(model: Any, features: Sequence[Features], in_channels: tuple[int, int], block: Any) -> None:
    """The parts that the U-Nets of cross blocks share."""
    model.encoder_blocks = [both(now) for now in features]
    model.downsample, model.upsample = nn.MaxPool2d(2, 2), nn.UpsamplingBilinear2d(scale_factor=2)
    model.enc_blocks, model.dec_blocks = nn.ModuleList(), nn.ModuleList()
    for now in model.encoder_blocks:
        model.enc_blocks.append(block(in_channels, now))
        in_channels = now[1], now[1]
    for now in model.encoder_blocks[-2::-1]:
        joined = in_channels[0] + now[1]
        model.dec_blocks.append(block((joined, joined), now))
        in_channels = now[1], now[1]
    model.out_conv = ConvOp(in_channels[0], 1, 1, None)


def walk(model: Any, target: Tensor, support: Tensor) -> Tensor:
    """The target features after the last block."""
    skips = []
    for i, block in enumerate(model.enc_blocks):
        if i:
            skips.append((target, support))
            target, support = every(model.downsample, target), every(model.downsample, support)
        target, support = block(target, support)
    for block in model.dec_blocks:
        target_skip, support_skip = skips.pop()
        target = torch.cat([every(model.upsample, target), target_skip], dim=2)
        support = torch.cat([every(model.upsample, support), support_skip], dim=2)
        target, support = block(target, support)
    return target
