"""Changes of intensity: images [N, 1, H, W] in [0, 1], each with its own parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from icseg.training.augmentation.config import OperationsConfig
from icseg.training.augmentation.draws import ParameterDraws, change

_SHARPENED_SIGMA = 1.0


def change_intensities(x: Tensor, levels: Sequence[tuple[OperationsConfig, ParameterDraws]]) -> Tensor:
    """The images with the changes of every level, still in [0, 1]."""
    exponent = np.zeros(len(x))
    for config, draws in levels:
        x = change(x, draws.happens(config.invert), lambda images: 1 - images)
        exponent = exponent + draws.happens(config.gamma) * draws.uniform(config.gamma_log2)
    x = change(x, exponent != 0, torch.pow, 2**exponent)  # once for all levels: the dearest of these
    for config, draws in levels:
        contrast, brightness = draws.uniform(config.contrast_change), draws.uniform(config.brightness_change)
        x = change(x, draws.happens(config.contrast), _scale, 1 + contrast, brightness - 0.5 * contrast)
        x = change(x, draws.happens(config.blur), blur, draws.up_to(config.blur_sigma))
        x = change(x, draws.happens(config.sharpness), _sharpen, draws.up_to(config.sharpness_gain))
        x = change(x, draws.happens(config.noise), partial(_add_noise, draws.rng), draws.up_to(config.noise_deviation))
    return x


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """[N, 1, H, W] blurred by Gaussians of `sigma` [N, 1, 1, 1] pixels, the border mirrored, or repeated where the
    image is smaller than the Gaussian."""
    radius = max(1, math.ceil(3 * float(sigma.max())))
    offsets = torch.arange(-radius, radius + 1, device=x.device)
    weights = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3)) ** 2)  # [N, 1, 1, 2 * radius + 1]
    weights = weights / weights.sum(-1, keepdim=True)
    padding = "reflect" if radius < min(x.shape[-2:]) else "replicate"
    one_group_an_image = F.pad(x.transpose(0, 1), (radius,) * 4, padding)
    along = F.conv2d(one_group_an_image, weights, groups=len(x))
    return F.conv2d(along, weights.transpose(2, 3), groups=len(x)).transpose(0, 1).contiguous()


def _scale(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    return torch.addcmul(offset, x, gain).clamp_(0, 1)


def _sharpen(x: Tensor, gain: Tensor) -> Tensor:
    return (x + gain * (x - blur(x, torch.full_like(gain, _SHARPENED_SIGMA)))).clamp_(0, 1)


def _add_noise(rng: np.random.Generator, x: Tensor, deviation: Tensor) -> Tensor:
    noise = torch.from_numpy(rng.standard_normal(tuple(x.shape), np.float32)).to(x.device)
    return torch.addcmul(x, noise, deviation).clamp_(0, 1)
