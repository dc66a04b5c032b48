"""Tyche (Rakic et al. 2024, arXiv 2401.13650) with the module names of its published package."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .universeg import ConvOp, CrossOp, Features, Vmap, both, build, every, walk


class CrossBlockTarget(nn.Module):
    """The mean of the targets is paired with every support; each target then sees the mean of the pairs."""

    def __init__(self, in_channels: tuple[int, int], features: Features, nonlinearity: str | None) -> None:
        super().__init__()
        crossed, convolved = both(features)
        self.cross = CrossOp(in_channels, crossed, nonlinearity)
        self.meanconv = Vmap(ConvOp(in_channels[0] + crossed, convolved))
        self.target = Vmap(ConvOp(crossed, convolved))
        self.support = Vmap(ConvOp(crossed, convolved))

    def forward(self, target: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        mean, support = self.cross(target.mean(dim=1, keepdim=True), support)
        target = self.meanconv(torch.cat([target, mean.expand(-1, target.shape[1], -1, -1, -1)], dim=2))
        return self.target(target), self.support(support)


class TysegXC(nn.Module):
    """A U-Net of such blocks: K candidate masks of K noisy targets."""

    def __init__(self, encoder_blocks: Sequence[Features], cross_relu: bool = True) -> None:
        super().__init__()
        nonlinearity = "LeakyReLU" if cross_relu else None
        build(self, encoder_blocks, (2, 2), lambda inputs, features: CrossBlockTarget(inputs, features, nonlinearity))

    def forward(
        self, support_images: Tensor, support_labels: Tensor, target_image: Tensor, noise_image: Tensor
    ) -> Tensor:
        target = torch.cat([target_image, noise_image], dim=2)
        return every(self.out_conv, walk(self, target, torch.cat([support_images, support_labels], dim=2)))
