"""From label maps to grey levels: mean intensities and textures of each label."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from icseg.data.synthetic.fields import banded_noise
from icseg.data.synthetic.random import Draws
from icseg.data.synthetic.scene import FIRST_OBJECT, LABELS

# Bands of spatial frequency of the textures, in cycles an image, and whether their waves have a direction.
_TEXTURES = ((2.0, 9.0, False), (8.0, 40.0, False), (30.0, 120.0, False), (6.0, 70.0, True))


@dataclass
class Look:
    """How the foreground of T tasks stands out.

    foreground: [T, LABELS] bool. alike: [T, LABELS] bool, what is rendered like the foreground's first label.
    first: int64 [T], that label. faint: [T] bool, its contrast is low. by_texture: [T] bool, its mean is that of its
    surroundings.
    """

    foreground: Tensor
    alike: Tensor
    first: Tensor
    faint: Tensor
    by_texture: Tensor

    @property
    def grain(self) -> Tensor:
        """[T] factor on all variation within a label."""
        return torch.where(self.faint, 0.2, 1.0)

    @staticmethod
    def draw(
        draws: Draws, foreground: Tensor, present: Tensor, lookalikes: list[tuple[int, int, float]], faint: float
    ) -> Look:
        """foreground, present [T, LABELS]: asked for, and seen at all; faint: probability of a low contrast."""
        owner = (torch.arange(LABELS, device=draws.device) - FIRST_OBJECT).div(3, rounding_mode="floor")
        owned = torch.stack([foreground[:, owner == o].any(1) for o in range(int(owner.max()) + 1)], 1)
        others = present & (owner >= 0) & ~owned[:, owner.clamp_min(0)]
        alike = others & draws.chance(0.6, LABELS) & draws.chance(0.25).unsqueeze(1)
        for label, other, probability in lookalikes:
            alike[:, other] |= foreground[:, label] & ~foreground[:, other] & draws.chance(probability)
        first = foreground.int().argmax(1)
        alike = alike & ~foreground
        is_faint = draws.chance(faint)
        return Look(foreground, alike, first, is_faint, draws.chance(0.1) & ~is_faint)


def mean_intensities(draws: Draws, look: Look, area: Tensor) -> Tensor:
    """[T, N, LABELS] of each label in each subject; area: [T, N, LABELS] pixels."""
    subjects = area.shape[1]
    means = draws.uniform(0, 1, LABELS)
    quiet = draws.choice([0.12, 0.4, 1.0]).unsqueeze(1)
    ground = (torch.arange(LABELS, device=draws.device) < FIRST_OBJECT) & (look.first >= FIRST_OBJECT).unsqueeze(1)
    means = torch.where(ground, means[:, :1] + quiet * (means - means[:, :1]), means)
    first = look.first.unsqueeze(1)
    similar = means.gather(1, first) + draws.normal(0.03, LABELS)
    means = torch.where(look.foreground & draws.chance(0.7).unsqueeze(1), similar, means)
    around = (area.sum(1) * ~look.foreground).argmax(1, keepdim=True)
    surrounding = means.gather(1, around).squeeze(1)
    strength = torch.where(look.faint, draws.uniform(0.05, 0.15), draws.uniform(0.12, 0.6))
    strength = torch.where(look.by_texture, draws.uniform(0, 0.03), strength)
    contrast = strength * draws.choice([-1, 1])
    contrast = torch.where(((surrounding + contrast) < 0) | ((surrounding + contrast) > 1), -contrast, contrast)
    fixed = look.faint | look.by_texture | draws.chance(0.75)
    shift = (surrounding + contrast).clamp(0, 1) - means.gather(1, first).squeeze(1)
    means = means + (look.foreground & fixed.unsqueeze(1)) * shift.unsqueeze(1)
    means = torch.where(look.alike, means.gather(1, first) + draws.normal(0.02, LABELS), means)
    spread = torch.where(look.faint, 0.01, draws.choice([0.02, 0.05, 0.08]))
    return means.unsqueeze(1) + draws.normal(spread.view(-1, 1, 1), subjects, LABELS)


def textures(draws: Draws, look: Look, labels: Tensor) -> Tensor:
    """[T, N, H, H] sum of a few noises, each with its own frequency, direction, and strength for each label."""
    subjects, size = labels.shape[1:3]
    strongest = draws.choice([0.03, 0.1, 0.2]) * look.grain
    telling = draws.integers(0, len(_TEXTURES))
    total = torch.zeros(labels.shape, device=draws.device)
    for number, (low, high, directed) in enumerate(_TEXTURES):
        frequency = draws.log_uniform(low, high).clamp(max=0.45 * size)
        octaves = draws.uniform(0.2, 0.9)
        angle = draws.uniform(0, math.pi)
        alignment = draws.log_uniform(1, 20) if directed else torch.zeros(len(draws), device=draws.device)
        share = 0.3 if directed else 0.5
        strength = draws.uniform(0, 1, LABELS) * strongest.unsqueeze(1) * draws.chance(share, LABELS)
        tells = (look.by_texture & (telling == number)).unsqueeze(1)
        plain = look.foreground ^ draws.chance(0.5).unsqueeze(1)  # either the foreground has it or all the others
        strength = torch.where(tells, draws.uniform(0.1, 0.3, 1) * plain, strength)
        own = strength.gather(1, look.first.unsqueeze(1))
        strength = torch.where(look.alike | (look.foreground & look.by_texture.unsqueeze(1)), own, strength)
        used = (strength > 0).any(1).nonzero().squeeze(1)
        if not len(used):
            continue
        parameters = (t[used] for t in (frequency, octaves, angle, alignment))
        noise = banded_noise(draws.of(used, number), subjects, size, *parameters)
        weight = strength[used].gather(1, labels[used].flatten(1)).view_as(noise)
        total.index_add_(0, used, weight * noise)
    return total
