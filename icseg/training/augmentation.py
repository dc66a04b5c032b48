"""Random changes of a task's images: one geometric change a task, intensities partly per image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from icseg.data.tensors import as_tensors
from icseg.training.config import DataConfig


def augment(
    images: NDArray[np.uint8],
    masks: NDArray[np.uint8],
    config: DataConfig,
    rng: np.random.Generator,
    classes: Sequence[int] = (1,),
) -> tuple[Tensor, Tensor]:
    """Images [N, 1, H, W] and the masks of `classes` [N, C, H, W] in [0, 1].

    One geometric change a task, intensities partly per image.
    """
    x, y = as_tensors(images, masks, classes)
    x, y = _crop(x, y, config.crop, rng)
    if config.flip_rotate:
        x, y = _flip_rotate(x, y, rng)
    return _intensity(x, config, rng).contiguous(), y.contiguous()


def _crop(x: Tensor, y: Tensor, smallest: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A random box, brought back to the full size; left out where some image would lose a class."""
    height, width = x.shape[-2:]
    scale = rng.uniform(smallest, 1.0)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    inside = y[..., top : top + h, left : left + w]
    lost = (y.flatten(2).sum(2) > 0) & (inside.flatten(2).sum(2) == 0)
    if (h, w) == (height, width) or bool(lost.any()):
        return x, y
    x = F.interpolate(x[..., top : top + h, left : left + w], (height, width), mode="bilinear", align_corners=False)
    y = F.interpolate(inside, (height, width), mode="bilinear", align_corners=False)
    return x, (y >= 0.5).float()


def _flip_rotate(x: Tensor, y: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One of the symmetries of the square; of the rectangle where the images are not square."""
    square = x.shape[-2] == x.shape[-1]
    turns = int(rng.integers(4)) if square else 2 * int(rng.integers(2))
    flipped = bool(rng.integers(2))
    x, y = (torch.rot90(t.flip(-1) if flipped else t, turns, (-2, -1)) for t in (x, y))
    return x, y


def _intensity(x: Tensor, config: DataConfig, rng: np.random.Generator) -> Tensor:
    def per_image(limit: float) -> Tensor:
        return torch.from_numpy(rng.uniform(-limit, limit, (len(x), 1, 1, 1)).astype(np.float32))

    if rng.random() < config.invert:
        x = 1 - x
    gamma = 2 ** (float(rng.uniform(-config.gamma, config.gamma)) + per_image(config.gamma / 4))
    x = x**gamma
    return (x + (x - 0.5) * per_image(config.contrast) + per_image(config.contrast)).clamp(0, 1)
