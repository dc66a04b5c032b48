"""UniverSeg (Butoi et al. 2023, arXiv 2304.06131), factorised: the same outputs for about half of the work.

A cross convolution is linear and has no activation, so the convolution of a (target, support) pair is the sum
of two convolutions, the new target is the mean of the pairs, and the last block's support side, which nothing
reads, collapses to its mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from icseg_kernels import cross_conv2d_and_mean, cross_conv2d_mean

# The published state dict's names, and ours.
_PUBLISHED_NAMES = (
    (r"^enc_blocks\.", "encoder.blocks."),
    (r"^dec_blocks\.", "decoder."),
    (r"^out_conv\.conv\.", "head."),
    (r"\.cross\.cross_conv\.", ".cross."),
    (r"\.(target|support)\.vmapped\.conv\.", r".\1."),
)


class CrossBlock(nn.Module):
    """One step in which a target and its support set exchange features (section 3.2, equation 2).

    factorised: False concatenates and convolves every pair, as published.
    """

    def __init__(self, target_channels: int, support_channels: int, channels: int, *, factorised: bool = True) -> None:
        super().__init__()
        self.factorised = factorised
        self.cross = nn.Conv2d(target_channels + support_channels, channels, 3, padding=1)
        self.target = nn.Conv2d(channels, channels, 3, padding=1)
        self.support = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, target: Tensor, support: Tensor, *, keep_support: bool = True) -> tuple[Tensor, Tensor]:
        """target: [B, Ct, H, W], support: [B, S, Cs, H, W] -> [B, C, H, W] and [B, S, C, H, W].

        keep_support=False says that the new support will not be read; it may come back as it was given.
        """
        if self.factorised and not keep_support:
            mean = cross_conv2d_mean(target[:, None], support, self.cross.weight, self.cross.bias)
            return F.leaky_relu(self.target(mean.squeeze(1)), inplace=True), support
        pairs, mean = self._pairs_and_mean(target, support)
        new = F.leaky_relu(self.support(pairs.flatten(0, 1)), inplace=True).unflatten(0, pairs.shape[:2])
        return F.leaky_relu(self.target(mean), inplace=True), new

    def _pairs_and_mean(self, target: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        if self.factorised:
            pairs, mean = cross_conv2d_and_mean(target[:, None], support, self.cross.weight, self.cross.bias)
            return pairs.squeeze(1), mean.squeeze(1)
        copies = target[:, None].expand(-1, support.shape[1], -1, -1, -1)
        pairs = self.cross(torch.cat([copies, support], dim=2).flatten(0, 1)).unflatten(0, support.shape[:2])
        return pairs, pairs.mean(dim=1)


class UniverSegEncoder(nn.Module):
    """The contracting half: one cross block a scale, max-pooling between them."""

    def __init__(self, channels: Sequence[int], *, factorised: bool = True) -> None:
        super().__init__()
        inputs = [(1, 2), *((c, c) for c in channels[:-1])]
        self.blocks = nn.ModuleList(
            CrossBlock(*pair, c, factorised=factorised) for pair, c in zip(inputs, channels, strict=True)
        )

    def forward(self, target: Tensor, support: Tensor) -> list[Tensor]:
        """The target features of every scale, [B, C, H / 2^i, W / 2^i] each.

        target: [B, 1, H, W]; support: [B, S, 2, H, W], images beside masks.
        """
        features: list[Tensor] = []
        for block in self.blocks:
            if features:
                target, support = downsampled(target, support)
            target, support = block(target, support, keep_support=len(features) + 1 < len(self.blocks))
            features.append(target)
        return features


class UniverSeg(nn.Module):
    """A U-Net of cross blocks: a target image and S labelled images in, the target's logits out.

    channels:   features of each scale; the published model has four of 64.
    factorised: False computes every pair as published, for comparison; outputs agree to rounding.

    ```
    model = UniverSeg.from_file("universeg_v1_nf64_ss64_STA.pt").eval()
    logits = model(target, support_images, support_masks)      # [B, 1, H, W]
    ```
    """

    def __init__(self, channels: Sequence[int] = (64, 64, 64, 64), *, factorised: bool = True) -> None:
        super().__init__()
        if len(channels) < 2 or any(not isinstance(c, int) or c < 1 for c in channels):
            raise ValueError(f"channels must hold at least two positive ints, one a scale, got {channels!r}")
        self.factorised = factorised
        self.encoder = UniverSegEncoder(channels, factorised=factorised)
        self.decoder = nn.ModuleList()
        for coarse, skip in zip(channels[:0:-1], channels[-2::-1], strict=True):
            self.decoder.append(CrossBlock(coarse + skip, coarse + skip, skip, factorised=factorised))
        self.head = nn.Conv2d(channels[0], 1, 1)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_normal_(parameter, nonlinearity="leaky_relu")

    def forward(self, target: Tensor, support_images: Tensor, support_masks: Tensor) -> Tensor:
        """Logits [B, 1, H, W].

        target: [B, 1, H, W]; support_images, support_masks: [B, S, 1, H, W], S >= 1; all floating point in
        [0, 1]. H and W must be multiples of 2^(scales - 1), 8 for the published model. Raises ValueError.
        """
        self._check(target, support_images, support_masks)
        support = torch.cat([support_images, support_masks.to(support_images.dtype)], dim=2)
        skips: list[tuple[Tensor, Tensor]] = []
        for block in self.encoder.blocks:
            if skips:
                target, support = downsampled(*skips[-1])
            skips.append(block(target, support))
        target, support = skips.pop()
        for block in self.decoder:
            skip, support_skip = skips.pop()
            if self.factorised and not skips:  # this block reads a mean, which commutes with upsampling
                support, support_skip = (s.mean(dim=1, keepdim=True) for s in (support, support_skip))
            target = torch.cat([upsampled(target), skip], dim=1)
            support = torch.cat([upsampled(support), support_skip], dim=2)
            target, support = block(target, support, keep_support=bool(skips))
        return self.head(target)

    def _check(self, target: Tensor, images: Tensor, masks: Tensor) -> None:
        if target.ndim != 4 or target.shape[1] != 1:
            raise ValueError(f"target must have shape [B, 1, H, W], got {list(target.shape)}")
        batch, _, height, width = target.shape
        multiple = 2 ** len(self.decoder)
        if height % multiple or width % multiple:
            raise ValueError(f"target must have height and width divisible by {multiple}, got {height} x {width}")
        fits = images.ndim == 5 and images.shape[0] == batch and images.shape[1] > 0
        if not fits or images.shape[2:] != (1, height, width):
            raise ValueError(
                f"support_images must have shape [B, S, 1, H, W] with B, H, W = {batch}, {height}, {width} "
                f"and S of at least 1, got {list(images.shape)}"
            )
        if masks.shape != images.shape:
            raise ValueError(
                f"support_masks must have the shape of support_images {list(images.shape)}, got {list(masks.shape)}"
            )

    @classmethod
    def from_file(cls, path: str | Path, *, factorised: bool = True) -> Self:
        """The model of a published weight file (.pt, or .safetensors with the same names), in evaluation mode.

        The number of scales and their channels are read off the file. Nothing in it is executed. Raises
        FileNotFoundError, or ValueError for a file that is not a UniverSeg state dict.
        """
        return cls.from_state_dict(read_weights(path), factorised=factorised)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], *, factorised: bool = True) -> Self:
        """The model of a state dict with the published names. Raises ValueError if any is missing or unknown."""
        ours = renamed(state)
        if len(ours) != len(state) or "encoder.blocks.1.cross.bias" not in ours:
            raise ValueError(f"weights must be a UniverSeg state dict, got the keys {', '.join(list(state)[:3])}, ...")
        depth = sum(re.fullmatch(r"encoder\.blocks\.\d+\.cross\.bias", name) is not None for name in ours)
        biases = [ours.get(f"encoder.blocks.{i}.cross.bias") for i in range(depth)]
        model = cls([0 if b is None or b.ndim != 1 else len(b) for b in biases], factorised=factorised)
        try:
            model.load_state_dict(ours)
        except RuntimeError as error:
            raise ValueError(f"weights must be a UniverSeg state dict: {error}") from error
        return model.eval()


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A UniverSeg state dict under this module's names."""
    ours = {}
    for name, tensor in state.items():
        for pattern, replacement in _PUBLISHED_NAMES:
            name = re.sub(pattern, replacement, name)
        ours[name] = tensor
    return ours


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pt or .safetensors file, on the CPU. Nothing in the file is executed.

    Raises FileNotFoundError, or ValueError for a file that is neither or holds anything else.
    """
    return tensors_of(read_mapping(path))


def read_mapping(path: str | Path) -> Mapping[str, Any]:
    """What a .pt or .safetensors file holds, tensors on the CPU. Nothing in the file is executed.

    Raises FileNotFoundError, or ValueError for a file that is neither or does not hold a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be an existing weight file, got {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # unreadable bytes raise anything; torch's own words advise to load them unsafely
        raise ValueError(
            f"path must be a safetensors file or a torch file of tensors and plain values, got {path}"
        ) from None
    if not isinstance(state, Mapping):
        raise ValueError(f"path must hold a state dict, got {path} with a {type(state).__name__}")
    return state


def tensors_of(state: object) -> dict[str, Tensor]:
    """A state dict as a dict. Raises ValueError unless it maps names to tensors."""
    if not isinstance(state, Mapping):
        raise ValueError(f"weights must be a state dict, got a {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"weights must map names to tensors, got {type(value).__name__} at {name!r}")
    return dict(state)


def downsampled(target: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """Both at half of the size, by the maximum of each 2 x 2 square."""
    pooled = F.max_pool2d(support.flatten(0, 1), 2)
    return F.max_pool2d(target, 2), pooled.unflatten(0, support.shape[:2])


def upsampled(features: Tensor) -> Tensor:
    """[..., C, H, W] at twice the size, bilinear, corners aligned."""
    flat = features.flatten(0, -4)
    larger = F.interpolate(flat, scale_factor=2, mode="bilinear", align_corners=True)
    return larger.unflatten(0, features.shape[:-3])
