"""From raw patches to features and tokens; no patch sees more than its halo and its coarse surroundings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from icseg.plain import is_plain
from icseg.sparse.patches import PatchInputs
from icseg_kernels import BlockWeights, ConvLayer, selected_attention, small_convolutions, transformer_block

FREQUENCIES = 12


def activation() -> nn.Module:
    return nn.LeakyReLU(0.05, inplace=True)


class SmallConvolutions(nn.Sequential):
    """nn.Sequential whose convolutions, each with the leaky ReLU after it, are `small_convolutions` in inference.

    With gradients, under autocast, and where a module is not torch's own or has hooks, the modules themselves run.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _fusible(x):
            return super().forward(x)
        layers: list[ConvLayer] = []
        absorbed: nn.Module | None = None
        modules = list(self._modules.values())
        for module, follower in zip(modules, [*modules[1:], None], strict=True):
            assert module is not None
            layer = _conv_layer(module, follower)
            if layer is not None:
                layers.append(layer)
                absorbed = follower if layer.negative_slope is not None else None
            elif module is absorbed:
                absorbed = None
            else:
                x = module(small_convolutions(x, layers) if layers else x)
                layers = []
        return small_convolutions(x, layers) if layers else x


def convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x), as `SmallConvolutions` computes it."""
    layer = _conv_layer(conv) if _fusible(x) else None
    return conv(x) if layer is None else small_convolutions(x, [layer])


def _fusible(x: Tensor) -> bool:
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


def _conv_layer(conv: nn.Module, follower: nn.Module | None = None) -> ConvLayer | None:
    """A convolution with the leaky ReLU that follows; None if it is another module, or does what the op does not."""
    if type(conv) is not nn.Conv2d or not is_plain(conv) or conv.groups != 1 or conv.dilation != (1, 1):
        return None
    kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
    if isinstance(padding, str) or any(pair[0] != pair[1] for pair in (kernel, stride, padding)):
        return None
    if kernel[0] > 5 or stride[0] > 2 or padding[0] >= kernel[0]:
        return None
    if conv.padding_mode not in ("zeros", "replicate"):
        return None
    slope = follower.negative_slope if type(follower) is nn.LeakyReLU and is_plain(follower) else None
    return ConvLayer(conv.weight, conv.bias, stride[0], padding[0], conv.padding_mode == "replicate", slope)


def attention(q: Tensor, k: Tensor, v: Tensor, *, index: Tensor | None, scale: float | None = None) -> Tensor:
    """`selected_attention`; under autocast on a CPU in float32: the half types' backward pass is slow there."""
    if q.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return selected_attention(q, k, v, index=index, scale=scale)
    with torch.autocast("cpu", enabled=False):
        return selected_attention(q.float(), k.float(), v.float(), index=index, scale=scale)


class PatchEncoder(nn.Module):
    """Features [B*K, C, 8, 8] and tokens [B, K, D] of picked patches.

    The stem sees the image patch as it is and normalised by its own mean and deviation, and the detail.
    """

    def __init__(self, dim: int, channels: int, levels: int) -> None:
        super().__init__()
        self.stem = SmallConvolutions(
            nn.Conv2d(3, 12, 3), activation(),
            nn.Conv2d(12, 16, 3), activation(),
            nn.Conv2d(16, 24, 3), activation(),
            nn.Conv2d(24, channels, 3), activation(),
        )  # fmt: skip
        self.label_stem = SmallConvolutions(nn.Conv2d(1, 8, 4, 2, 1), activation())
        self.token = SmallConvolutions(
            nn.Conv2d(channels + 8, 48, 4, 2, 1), activation(), nn.Flatten(1), nn.Linear(48 * 16, dim)
        )
        self.context = SmallConvolutions(
            nn.Conv2d(3, 16, 4, 2, 1), activation(),
            nn.Conv2d(16, 32, 4, 2, 1), activation(),
            nn.Flatten(1), nn.Linear(32 * 16, dim),
        )  # fmt: skip
        self.position = nn.Linear(4 * FREQUENCIES, dim)
        self.level_embedding = nn.Parameter(torch.randn(levels, dim) * 0.1)
        self.role_embedding = nn.Parameter(torch.randn(2, dim) * 0.1)
        self.norm = nn.LayerNorm(dim)
        frequency = 2.0 ** (torch.arange(FREQUENCIES) * 0.75) * math.pi / 2
        self.frequency: Tensor
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, inputs: PatchInputs, level: int, *, is_target: bool) -> tuple[Tensor, Tensor]:
        batch, count = inputs.place.shape[:2]
        pixels = inputs.pixels.flatten(0, 1)
        image = pixels[:, :1]
        deviation, mean = torch.std_mean(image, (1, 2, 3), keepdim=True, correction=0)
        pixels = torch.cat([pixels, (image - mean) / (deviation + 0.05)], 1)
        features = self.stem(pixels.contiguous(memory_format=torch.channels_last))
        token = self.token(torch.cat([features, self.label_stem(inputs.label.flatten(0, 1))], 1))
        token = token + self.context(inputs.context.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        token = token.view(batch, count, -1) + self.position(self._waves(inputs.place))
        level = min(level, len(self.level_embedding) - 1)
        token = token + (self.level_embedding[level] + self.role_embedding[int(is_target)])
        return features, self.norm(token)

    def _waves(self, place: Tensor) -> Tensor:
        angle = place.unsqueeze(-1) * self.frequency
        return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


class Block(nn.Module):
    """Pre-norm transformer block whose keys and values may be extended by a memory of other tokens."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        mlp_out = nn.Linear(mlp_ratio * dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), mlp_out)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(mlp_out.weight)

    def forward(self, tokens: Tensor, memory: list[Tensor], index: Tensor | None) -> tuple[Tensor, Tensor]:
        """tokens [B, N, D], memory [B, M, 2D] tensors -> (tokens, their own keys and values [B, N, 2D]).

        index [B, N + all M]: rows of the keys (the memory's, then the tokens' own), -1 for one that is not to be seen.
        """
        weights = self._weights() if _fusible(tokens) else None
        if weights is not None:
            return transformer_block(tokens, memory, weights, heads=self.heads, index=index)
        x = self.norm_attention(tokens)
        own = self.key_value(x)
        keys, values = torch.cat([*(other.to(own.dtype) for other in memory), own], 1).chunk(2, -1)
        query = self._split(self.query(x))
        attended = attention(query, self._split(keys), self._split(values), index=index)
        tokens = tokens + self.out(attended.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm_mlp(tokens)), own

    def _weights(self) -> BlockWeights | None:
        """Those of plain layers; None where one was replaced or changed, as by a quantised or adapted one, or hooked.

        Straight from the dictionaries of modules: attributes of nn.Module take as long as a quarter of the block.
        """
        modules: dict[str, Any] = self._modules
        norm, norm_mlp, mlp = modules["norm_attention"], modules["norm_mlp"], modules["mlp"]
        layers = norm, modules["query"], modules["key_value"], modules["out"], norm_mlp, *mlp._modules.values()
        if [type(layer) for layer in layers] != _PLAIN_LAYERS or not all(map(is_plain, (*layers, mlp))):
            return None
        if layers[6].approximate != "none" or norm.eps != norm_mlp.eps:
            return None
        tensors = [layer._parameters[name] for layer in (*layers[:6], layers[7]) for name in ("weight", "bias")]
        return None if any(t is None for t in tensors) else BlockWeights._make([*tensors, norm.eps])

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


_PLAIN_LAYERS = [nn.LayerNorm, *[nn.Linear] * 3, nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]


def visible(valid: list[Tensor | None], lengths: list[int], batch: int, device: torch.device) -> Tensor | None:
    """The `index` of keys that come in runs of `lengths` tokens, each with its mask [B, n] or None for all."""
    if all(mask is None for mask in valid):
        return None
    whole = [
        torch.ones(batch, n, dtype=torch.bool, device=device) if mask is None else mask.expand(batch, n)
        for mask, n in zip(valid, lengths, strict=True)
    ]
    mask = torch.cat(whole, 1)
    return torch.where(mask, torch.arange(mask.shape[1], device=device), -1)
