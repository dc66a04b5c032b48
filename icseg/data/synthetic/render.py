"""From scenes to 8-bit images."""

from __future__ import annotations

import torch
from torch import Tensor

from icseg.data.synthetic.appearance import Look, mean_intensities, textures
from icseg.data.synthetic.effects import Picture, apply_effects
from icseg.data.synthetic.random import Draws


def render(
    draws: Draws, labels: Tensor, shade: Tensor, area: Tensor, look: Look, seen: Tensor, effects: dict[str, float]
) -> Tensor:
    """uint8 images [T, N, H, H] of label maps int64 [T, N, H, H].

    shade: [T, N, H, H] offsets of the intensity; area: [T, N, LABELS] pixels; seen: [T, N, H, H] bool, the field of
    view; effects: the probability of single effects.
    """
    means = mean_intensities(draws, look, area)
    image = means.gather(2, labels.flatten(2)).view(shade.shape) + look.grain.view(-1, 1, 1, 1) * shade
    image += textures(draws, look, labels)
    mask = look.foreground.float().gather(1, labels.flatten(1)).view(shade.shape)
    image = apply_effects(draws, Picture(image, mask, labels, look.grain), effects)
    dark = image.amin((2, 3), keepdim=True)
    outside = torch.where(draws.chance(0.95).view(-1, 1, 1, 1), dark, torch.full_like(dark, 0.5))
    return _quantised(draws, torch.where(seen, image, outside))


def _quantised(draws: Draws, image: Tensor) -> Tensor:
    """Percentiles to the full range, then each subject's own gamma, gain and offset."""
    subjects, size = image.shape[1], image.shape[-1]
    step = max(1, size // 64)
    sample = image[..., step // 2 :: step, step // 2 :: step].flatten(2).sort(2).values
    count = sample.shape[2]
    low, high = (sample[..., round(share * (count - 1)), None, None] for share in (0.005, 0.995))
    unit = ((image - low) / (high - low + 1e-4)).clamp(0, 1)
    gamma = draws.uniform(0.6, 1.7, 1, 1, 1) * draws.normal(0.08, subjects, 1, 1).exp()
    unit = unit**gamma
    dull = draws.chance(0.3).view(-1, 1, 1, 1)
    gain = torch.where(dull, draws.uniform(0.6, 1, subjects, 1, 1), 1.0)
    unit = unit * gain + draws.uniform(0, 1, subjects, 1, 1) * (1 - gain)
    return (unit * 255).round().to(torch.uint8)
