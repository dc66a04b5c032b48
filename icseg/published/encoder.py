"""Patch tokens: features of a patch to one token, conditioned on the level's resolution and fused with masks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icseg.published.config import BackboneConfig
from icseg_kernels import group_norm_film

GROUPS = 8


class ScaleEncoding(nn.Module):
    """A resolution in pixels to an embedding [D]: sines and cosines of its base-2 logarithm, frequencies learned."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.frequencies = nn.Parameter(torch.exp(torch.arange(half) * (-math.log(10000.0) / half)))

    def forward(self, resolution: int) -> Tensor:
        angles = math.log2(resolution) * self.frequencies
        return torch.cat([angles.sin(), angles.cos()])


class FilmNorm(nn.Module):
    """Group normalisation whose gain and bias are linear in the scale embedding, at first 1 and 0; then GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.film = nn.Linear(dim, 2 * dim)
        nn.init.zeros_(self.film.weight)
        with torch.no_grad():
            self.film.bias.copy_(torch.cat([torch.ones(dim), torch.zeros(dim)]))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """x: [N, D, h, w]; scale: [D]."""
        gain, bias = self.film(scale).chunk(2)
        return group_norm_film(x, GROUPS, gain, bias, activation="gelu")


class EncoderStage(nn.Module):
    """Convolution, then conditioned normalisation and GELU."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, stride=stride, padding=1)
        self.norm = FilmNorm(dim)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.norm(self.conv(x), scale)


class PatchEncoder(nn.Module):
    """Features [N, Din, g, g] of N patches to tokens [N, D] and, by their side, the maps on the way there.

    The first stage keeps the size g (8 or 16), each further one halves it, down to 2; the token is the mean.
    """

    def __init__(self, input_dim: int, config: BackboneConfig) -> None:
        super().__init__()
        self.project = nn.Conv2d(input_dim, config.dim, 1)
        halvings = int(math.log2(config.patch_grid)) - 1
        self.stages = nn.ModuleList(EncoderStage(config.dim, stride) for stride in [1] + [2] * halvings)

    def forward(self, features: Tensor, scale: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        x = self.project(features)
        maps: dict[int, Tensor] = {}
        for stage in self.stages:
            x = stage(x, scale)
            maps[x.shape[-1]] = x
        return x.mean(dim=(2, 3)) + scale, maps


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of [N, C, h, w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        channels_last = x.permute(0, 2, 3, 1)
        normed = F.layer_norm(channels_last, self.weight.shape, self.weight, self.bias, eps=1e-6)
        return normed.permute(0, 3, 1, 2)


class MaskEncoder(nn.Module):
    """Mask patches [N, 1, g, g] to embeddings [N, D], as the prompt encoder of SAM (arXiv 2304.02643) does."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 2, stride=2),
            ChannelNorm(16),
            nn.GELU(),
            nn.Conv2d(16, 32, 2, stride=2),
            ChannelNorm(32),
            nn.GELU(),
            nn.Conv2d(32, dim, 1),
        )

    def forward(self, masks: Tensor) -> Tensor:
        return self.layers(masks).mean(dim=(2, 3))


class AdditiveFusion(nn.Module):
    """Token plus embedded mask. `source` ("support" or "prior") says where the mask comes from."""

    def forward(self, tokens: Tensor, masks: Tensor, source: str) -> Tensor:
        return tokens + masks


class GatedFusion(nn.Module):
    """Token plus embedded mask times a learned gate, one for each source."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ParameterDict({source: nn.Parameter(torch.tensor(0.1)) for source in ("support", "prior")})

    def forward(self, tokens: Tensor, masks: Tensor, source: str) -> Tensor:
        return tokens + self.gates[source].sigmoid() * masks


class ConcatFusion(nn.Module):
    """A linear map of token and embedded mask side by side, the same for both sources."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(2 * dim, dim)

    def forward(self, tokens: Tensor, masks: Tensor, source: str) -> Tensor:
        return self.project(torch.cat([tokens, masks], dim=-1))


def make_fusion(config: BackboneConfig) -> nn.Module:
    """The fusion module that the configuration names."""
    if config.fusion == "concat":
        return ConcatFusion(config.dim)
    return GatedFusion() if config.fusion == "gated" else AdditiveFusion()
