"""Random changes of a task: of all its images alike, and of each image on its own."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from icseg.training.augmentation.config import AugmentationConfig, OperationsConfig
from icseg.training.augmentation.draws import ParameterDraws
from icseg.training.augmentation.geometry import flip_and_turn, resample
from icseg.training.augmentation.intensity import change_intensities

__all__ = ["AugmentationConfig", "OperationsConfig", "augment"]


def augment(
    images: Tensor, masks: Tensor, config: AugmentationConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """A task's images [N, 1, H, W] and masks [N, C, H, W], float32 in [0, 1], changed; masks in {0, 1}.

    The same `rng` gives the same changes. The tensors may be on any device; numbers are drawn on the CPU.
    """
    levels = [
        (config.task, ParameterDraws(rng, len(images), True)),
        (config.example, ParameterDraws(rng, len(images), False)),
    ]
    both = torch.cat((images, masks), 1)
    for operations, draws in levels:
        both = flip_and_turn(both, operations, draws)
    both = resample(both, config, levels)
    x, y = change_intensities(both[:, :1], levels), _asked_for(both[:, 1:], config, rng)
    return x.contiguous(), y.contiguous()


def _asked_for(y: Tensor, config: AugmentationConfig, rng: np.random.Generator) -> Tensor:
    """The masks, their outlines or their complements."""
    outline, complement = rng.random() < config.outline, rng.random() < config.complement
    if outline:
        y = _unless_lost(y, F.max_pool2d(y, 3, 1, 1) + F.max_pool2d(1 - y, 3, 1, 1) - 1)  # dilated less eroded
    if complement and y.shape[1] == 1:
        y = _unless_lost(y, 1 - y)
    return y


def _unless_lost(y: Tensor, changed: Tensor) -> Tensor:
    """`changed`, or `y` where a mask that marks pixels would mark none."""
    lost = (y.flatten(2).amax(2) > 0) & (changed.flatten(2).amax(2) == 0)
    return y if bool(lost.any()) else changed
