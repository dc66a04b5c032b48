"""UniverSeg as an architecture of its own: trained, saved and called as the two PatchICLs are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icseg.baselines.universeg import UniverSeg
from icseg.config import PatchICLConfig, check_int
from icseg.memory import SupportMemory
from icseg.output import LevelOutput, SegmentationOutput
from icseg.resize import resize
from icseg_kernels import Scatter


@dataclass(frozen=True)
class DenseConfig(PatchICLConfig):
    """UniverSeg (arXiv 2304.06131), which compares every pixel of the target with those of every support image.

    channels:   of each scale; the published model has four of 64.
    image_size: side of the square that images are resized to, a multiple of 8 and of 2^(scales - 1).
    """

    architecture: ClassVar[str] = "universeg"

    channels: tuple[int, ...] = (32, 32, 32, 32)
    image_size: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.channels, tuple) or len(self.channels) < 2:
            raise ValueError(f"channels must be a tuple of at least two ints, one a scale, got {self.channels!r}")
        for value in self.channels:
            check_int("channels", value, 1)
        check_int("image_size", self.image_size, 8)
        multiple = max(8, 2 ** (len(self.channels) - 1))
        if self.image_size % multiple:
            raise ValueError(f"image_size must be a multiple of {multiple}, got {self.image_size}")


class DenseNetwork(nn.Module):
    """See `icseg.PatchICL`, which holds it. Images of any size are seen as squares; nothing is drawn or picked."""

    multi_class = False
    any_size = False
    weights_identity = ""

    def __init__(self, config: DenseConfig) -> None:
        super().__init__()
        self.config = config
        self.fingerprint = config.fingerprint()
        self.size = (config.image_size, config.image_size)
        self.universeg = UniverSeg(config.channels)

    def encode_support(self, images: Tensor, masks: Tensor, *, seed: int | None = None) -> SupportMemory:
        """images, masks [B, S, 1, H, W] in [0, 1]: the memory holds them at the model's size."""
        tensors = {"images": images, "masks": masks}
        tensors = {name: resize(x.flatten(0, 1), self.size).unflatten(0, x.shape[:2]) for name, x in tensors.items()}
        return SupportMemory(self.fingerprint, images.shape[0], tensors)

    def forward(
        self,
        target: Tensor,
        memory: SupportMemory,
        *,
        target_mask: Tensor | None = None,
        seed: int | None = None,
        noise: Sequence[Tensor] | None = None,
    ) -> SegmentationOutput:
        """As `icseg.PatchICL.forward`, with one level whose only patch is the whole image."""
        batch = target.shape[0]
        support = [memory.tensors[name].expand(batch, -1, -1, -1, -1) for name in ("images", "masks")]
        logits = self.universeg(resize(target, self.size), *support)
        level = LevelOutput(
            resolution=self.size,
            logits=logits,
            patch_logits=logits[:, None],
            coords=torch.zeros(batch, 1, 2, dtype=torch.int64, device=target.device),
            written=Scatter(logits, torch.ones_like(logits, dtype=torch.bool)),
        )
        size = (target.shape[-2], target.shape[-1])
        return SegmentationOutput(F.interpolate(logits, size, mode="bilinear", align_corners=False), [level])
