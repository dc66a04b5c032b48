"""The structures of tasks before rendering: label maps, their backgrounds, and the warp between subjects."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from icseg.data.synthetic.fields import pixel_axis, smooth_curves, smooth_noise
from icseg.data.synthetic.random import Draws
from icseg.data.synthetic.shapes import DESIGN_SIZE, Canvas

# Labels below FIRST_OBJECT are background; object k owns the three labels from object_label(k) on.
FIRST_OBJECT = 16
LABELS = 49
MOST_LAYERS = 7


def object_label(index: int) -> int:
    """The first of the three labels (body, core, rim) that object `index`, below 11, owns."""
    return FIRST_OBJECT + 3 * index


@dataclass
class Scene:
    """Structures of T tasks of one family, and what may be asked for in them.

    canvas:      the objects; background: [T, N, H, H] int64, what lies under them.
    background_shade: [T, N, H, H], or None for none: an offset of the background's intensity.
    lookalikes:  (label, label, probability): the second is rendered like the first.
    candidates:  ([T, LABELS] bool, [T] weight): sets of labels of which one becomes class 1, each with how often.
    deformation: [T] strength of the further warp between subjects.
    """

    canvas: Canvas
    background: Tensor
    candidates: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    background_shade: Tensor | None = None
    lookalikes: list[tuple[int, int, float]] = field(default_factory=list)
    deformation: Tensor = field(default_factory=lambda: torch.zeros(0))

    def alike(self, label: int, other: int, probability: float) -> None:
        """Let `other` be rendered like `label`, so that only place or surroundings tell them apart."""
        self.lookalikes.append((label, other, probability))

    def offer(self, weight: Tensor | float, *labels: int) -> None:
        """Offer a set of labels as class 1 with a weight ([T] or one number; 0 is never)."""
        tasks, device = len(self.background), self.background.device
        table = torch.zeros(tasks, LABELS, dtype=torch.bool, device=device)
        table[:, list(labels)] = True
        self.candidates.append((table, torch.as_tensor(weight, device=device).float().expand(tasks)))


def noise_regions(draws: Draws, subjects: int, count: Tensor, resolution: Tensor, size: int, shared: Tensor) -> Tensor:
    """[T, N, H, H]: which of `count` [T] smooth noises is largest; one map for all subjects where `shared` [T]."""
    everyone = torch.arange(len(draws), device=draws.device)
    best = smooth_noise(draws, subjects, resolution, size)
    labels = torch.zeros(best.shape, dtype=torch.int64, device=draws.device)
    for region in range(1, int(count.max())):  # draws of their own: how many are drawn must not change what follows
        noise = smooth_noise(draws.of(everyone, region), subjects, resolution, size)
        larger = (noise > best) & (region < count).view(-1, 1, 1, 1)
        labels.masked_fill_(larger, region)
        torch.where(larger, noise, best, out=best)
    return torch.where(shared.view(-1, 1, 1, 1), labels[:, :1], labels)


def layer_maps(draws: Draws, subjects: int, count: Tensor, variability: Tensor, size: int) -> Tensor:
    """[T, N, H, H] stacked bands 0 to `count`, bent alike in all subjects, shifted and rippled differently.

    count: int64 [T], at most MOST_LAYERS; variability: [T] how far those of the subjects differ.
    """
    most = MOST_LAYERS
    number = torch.arange(most, device=draws.device)
    depth = draws.uniform(0.15, 0.85, most).masked_fill(number >= count.unsqueeze(1), 9.0).sort(1).values
    amplitude = draws.uniform(3, 25) / DESIGN_SIZE
    variability = variability.view(-1, 1, 1)
    three = torch.full((len(draws),), 3, device=draws.device)
    bend = smooth_curves(draws, 1, three, size) * amplitude.view(-1, 1, 1) * draws.uniform(0.3, 1, subjects, 1)
    own = smooth_curves(draws, subjects, draws.integers(2, 6), size) * amplitude.view(-1, 1, 1) * variability * 0.6
    shift = draws.normal(15 / DESIGN_SIZE, subjects, 1) * variability
    ripple = smooth_curves(draws, subjects * most, draws.integers(3, 12), size).unflatten(1, (subjects, most))
    ripple = ripple * (draws.uniform(0.5, 3) / DESIGN_SIZE).view(-1, 1, 1, 1)
    apart = draws.normal(3 / DESIGN_SIZE, subjects, most) * variability
    boundary = (depth.unsqueeze(1) + apart).unsqueeze(3) + ripple + (bend + own + shift).unsqueeze(2)
    rows = (pixel_axis(size, draws.device) + 0.5).view(-1, 1)
    labels = torch.zeros(len(draws), subjects, size, size, dtype=torch.int64, device=draws.device)
    for layer in range(int(count.max())):
        labels += rows > boundary[:, :, layer, None]
    return labels


def backgrounds(draws: Draws, subjects: int, size: int, shared: float) -> Tensor:
    """[T, N, H, H] plain, patchy or layered; `shared`: the probability of the same patches in all subjects."""
    labels = torch.zeros(len(draws), subjects, size, size, dtype=torch.int64, device=draws.device)
    kind = draws.uniform(0, 1)
    layered = ((kind >= 0.4) & (kind < 0.52)).nonzero().squeeze(1)
    if len(layered):
        some = draws.of(layered, 0)
        variability = torch.ones(len(some), device=draws.device)
        labels[layered] = layer_maps(some, subjects, some.integers(2, 6), variability, size)
    patchy = (kind >= 0.52).nonzero().squeeze(1)
    if len(patchy):
        some = draws.of(patchy, 1)
        count, resolution = some.integers(2, 6), some.integers(2, 10)
        labels[patchy] = noise_regions(some, subjects, count, resolution, size, some.chance(shared))
    return labels


def warp_index(draws: Draws, subjects: int, strength: Tensor, size: int) -> Tensor:
    """[T, N, H * H] pixels that each subject's pixels come from: rotation, scale, shift, smooth displacement.

    strength: [T]. What would lie outside is mirrored at the border.
    """
    strength = strength.view(-1, 1)
    angle = draws.normal(0.12 * strength, subjects)
    stretch = draws.normal(0.1 * strength.unsqueeze(1), 2, subjects).exp()
    distant = draws.chance(0.15).view(-1, 1, 1)  # a task whose subjects were taken from near and far
    stretch = stretch * torch.where(distant, draws.normal(0.4, 1, subjects).sub(0.2).clamp(-0.9, 0.3), 0.0).exp()
    shift = draws.normal(0.05 * strength.unsqueeze(1), 2, subjects)
    axis = pixel_axis(size, draws.device)
    y, x = axis.view(-1, 1), axis.view(1, -1)
    places = []
    for i, (u, v, sign) in enumerate(((y, x, 1.0), (x, y, -1.0))):
        flow = torch.zeros(())
        for amplitude, resolution in ((0.036, 3), (0.016, 6), (0.005, 14)):
            constant = torch.full((len(draws),), resolution, device=draws.device)
            flow = flow + amplitude * smooth_noise(draws, subjects, constant, size)
        along, across, moved = (
            t.unsqueeze(-1).unsqueeze(-1)
            for t in (angle.cos() * stretch[:, i], sign * angle.sin() * stretch[:, i], shift[:, i])
        )
        place = along * u + across * v + moved + strength.view(-1, 1, 1, 1) * flow
        places.append(_reflected(((place + 0.5) * size - 0.5).round().long(), size))
    return (places[0] * size + places[1]).flatten(2)


def _reflected(index: Tensor, size: int) -> Tensor:
    """Indices outside [0, size) mirrored at the border."""
    index = index % (2 * size)
    return torch.minimum(index, 2 * size - 1 - index)
