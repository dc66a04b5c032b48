"""Images at another size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, C, H, W] to `size`, bilinear, with anti-aliasing where it shrinks; computed in float32 for the half types."""
    if images.shape[-2:] == size:
        return images
    height, width = size
    wider = (height, max(2, width))  # torch (2.13) fills a result of width 1 with its first row
    wide = images if images.dtype == torch.float64 else images.float()
    resized = F.interpolate(wide, size=wider, mode="bilinear", align_corners=False, antialias=True)
    return (resized if width > 1 else resized.mean(-1, keepdim=True)).to(images.dtype)
