"""Dense features of whole images, and the patches that are read from them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icseg.baselines.universeg import UniverSegEncoder
from icseg.published.config import FeatureConfig
from icseg_kernels import gather_patches


class FeatureExtractor(nn.Module):
    """Images, for support also masks, to feature maps [N, D, grid, grid].

    `extractor` maps images [N, 1, s, s] and masks, the same shape or None, to a list of maps [N, C, h, w]
    whose channels add up to D. With FeatureConfig.extractor = "custom", set the attribute before the first call,
    and before weights are loaded; with `freeze` it is frozen, and put in evaluation mode, as it is set.
    """

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.config = config
        kinds = {
            "universeg": UniverSegFeatures,
            "convolutional": ConvolutionalFeatures,
            "custom": MissingFeatures,
        }
        self.extractor: nn.Module = kinds[config.extractor](config)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "extractor" and self.config.freeze:
            self.extractor.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> FeatureExtractor:
        super().train(mode)
        if self.config.freeze:
            self.extractor.eval()
        return self

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """images, masks: [N, 1, H, W] of any size, in [0, 1]. A frozen extractor ignores autocast."""
        if not self.config.freeze:
            return self._encode_chunks(images, masks)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self._encode_chunks(images, masks)

    def _encode_chunks(self, images: Tensor, masks: Tensor | None) -> Tensor:
        if self.extractor.training:  # batch statistics are those of all images
            return self._encode(images, masks)
        parts = images.split(self.config.chunk)
        mask_parts = [None] * len(parts) if masks is None else masks.split(self.config.chunk)
        return torch.cat([self._encode(*pair) for pair in zip(parts, mask_parts, strict=True)])

    def _encode(self, images: Tensor, masks: Tensor | None) -> Tensor:
        dtype = next((p.dtype for p in self.extractor.parameters()), images.dtype)
        grid, size = self.config.grid, self.config.input_size
        if self.config.via_grid:
            images = _resized(images, grid)
        images = _resized(_rescaled(images) if self.config.rescale else images, size)
        if masks is not None and masks.shape[-2:] != (size, size):
            masks = F.interpolate(masks, (size, size), mode="nearest")
        maps = self.extractor(images.to(dtype), None if masks is None else masks.to(dtype))
        return torch.cat([_regridded(m, grid) for m in maps], dim=1)


class UniverSegFeatures(nn.Module):
    """UniverSeg's contracting half on one image: its own support with its mask, or beside an empty one without."""

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.scales = config.scales
        self.encoder = UniverSegEncoder([config.channels] * (config.scales[-1] + 1))

    def forward(self, images: Tensor, masks: Tensor | None) -> list[Tensor]:
        own = torch.cat([images, images if masks is None else masks], dim=1)[:, None]
        support = torch.zeros_like(own) if masks is None else own
        maps = self.encoder(images, support)
        return [maps[i] for i in self.scales]


class ConvolutionalFeatures(nn.Module):
    """Two streams of convolutions, over the image and over the mask, added at each scale that is read."""

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.scales = config.scales
        inputs = [1, *[config.channels] * self.scales[-1]]
        self.image_blocks = nn.ModuleList(_conv_block(c, config.channels) for c in inputs)
        self.mask_blocks = nn.ModuleList(_conv_block(c, config.channels) for c in inputs)

    def forward(self, images: Tensor, masks: Tensor | None) -> list[Tensor]:
        maps = self._stream(self.image_blocks, images)
        if masks is not None:
            maps = [a + b for a, b in zip(maps, self._stream(self.mask_blocks, masks), strict=True)]
        return [maps[i] for i in self.scales]

    def _stream(self, blocks: nn.ModuleList, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        for block in blocks:
            maps.append(block(F.max_pool2d(maps[-1], 2) if maps else x))
        return maps


class MissingFeatures(nn.Module):
    """Holds the place of a custom extractor."""

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()

    def forward(self, images: Tensor, masks: Tensor | None) -> list[Tensor]:
        raise RuntimeError('network.features.extractor must be set before use with extractor = "custom"')


def read_patches(
    features: Tensor, coords: Tensor, resolution: int, patch_size: int, samples: int, config: FeatureConfig
) -> Tensor:
    """Features [..., D, g, g] of patches at coords [..., K, 2], in pixels of a level, as [..., K, D, n, n].

    n = samples a side. Nothing is averaged, unless `config.antialias`.
    """
    grid = features.shape[-1]
    scale = grid / resolution
    if config.alignment == "published":
        extent = max(1, int(patch_size * scale))  # whole feature pixels, as published
        return gather_patches(features, coords * scale, extent, out_size=samples, alignment="published")
    if config.antialias and resolution < grid:
        features = F.adaptive_avg_pool2d(features.flatten(0, -4), resolution).unflatten(0, features.shape[:-3])
        scale = 1.0
    return gather_patches(features, coords * scale, patch_size * scale, out_size=samples, alignment="pixel")


def _conv_block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.GELU()]
    return nn.Sequential(*layers)


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)


def _regridded(features: Tensor, grid: int) -> Tensor:
    """Averaged where the grid is coarser, interpolated where it is finer."""
    return F.adaptive_avg_pool2d(features, grid) if grid < features.shape[-1] else _resized(features, grid)


def _rescaled(images: Tensor) -> Tensor:
    """Each image clipped to its 0.5 and 99.5 percentiles and stretched to [0, 1]; a constant image becomes 0."""
    flat = images.flatten(1).float()
    low, high = (torch.quantile(flat, q, dim=1, keepdim=True) for q in (0.005, 0.995))
    flat = (torch.minimum(torch.maximum(flat, low), high) - low) / (high - low).clamp_min(1e-8)
    return flat.view_as(images).to(images.dtype)
