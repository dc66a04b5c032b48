"""Imaging effects: what optics, tissue and detector do to a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from icseg.data.synthetic.fields import TURN, blur, edges, pixel_axis, smooth_noise
from icseg.data.synthetic.random import Draws
from icseg.data.synthetic.shapes import DESIGN_SIZE, Canvas, walk


@dataclass
class Picture:
    """What the effects work on, t tasks: image, mask (of class 1, 0 or 1) and labels [t, N, H, H]; grain [t].

    grain: factor on all variation within a label, below 1 for a low contrast.
    """

    image: Tensor
    mask: Tensor
    labels: Tensor
    grain: Tensor

    @property
    def subjects(self) -> int:
        return self.image.shape[1]

    @property
    def size(self) -> int:
        return self.image.shape[-1]

    @property
    def scale(self) -> float:
        """Pixels a design pixel."""
        return self.size / DESIGN_SIZE

    def of(self, tasks: Tensor) -> Picture:
        return Picture(self.image[tasks], self.mask[tasks], self.labels[tasks], self.grain[tasks])

    def amount(self, draws: Draws, low: float, high: float) -> Tensor:
        """[t, 1, 1, 1] in (low, high), scaled with the grain."""
        return (draws.uniform(low, high) * self.grain).view(-1, 1, 1, 1)

    def sigma(self, draws: Draws, low: float, high: float) -> Tensor:
        """[t] pixels, for (low, high) in design pixels."""
        return draws.uniform(low, high) * self.scale


Effect = Callable[[Draws, Picture], Tensor]
"""The new image."""


def apply_effects(draws: Draws, picture: Picture, probabilities: dict[str, float]) -> Tensor:
    """The image after all of EFFECTS, each with its probability, or that of its name in `probabilities`."""
    for number, (name, (probability, effect)) in enumerate(EFFECTS.items()):
        chosen = draws.chance(probabilities.get(name, probability)).nonzero().squeeze(1)
        if len(chosen):
            picture.image[chosen] = effect(draws.of(chosen, number), picture.of(chosen))
    return picture.image


def _per_task(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)


def _softness(draws: Draws, picture: Picture) -> Tensor:
    return blur(picture.image, picture.sigma(draws, 1, 5))


def _halo(draws: Draws, picture: Picture) -> Tensor:
    soft = blur(picture.mask, picture.sigma(draws, 1, 6))
    ring = soft * (1 - soft)
    inside = _per_task(draws.chance(0.5))
    ring = torch.where(inside, 2 * ring * picture.mask, ring)
    return picture.image + picture.amount(draws, -0.6, 0.6) * ring


def _dome(draws: Draws, picture: Picture) -> Tensor:
    soft = blur(picture.mask, picture.sigma(draws, 4, 14))
    return picture.image + picture.amount(draws, -0.3, 0.3) * picture.mask * soft


def _relief(draws: Draws, picture: Picture) -> Tensor:
    """A lit surface: the structure bulges out of a folded ground, its sides lit from one direction."""
    height = blur(picture.mask, picture.sigma(draws, 3, 14)) * _per_task(draws.uniform(3, 10))
    folds = smooth_noise(draws, picture.subjects, draws.integers(3, 10), picture.size)
    height = height + folds * _per_task(draws.uniform(0, 6))
    light = draws.uniform(0, TURN, picture.subjects).unsqueeze(-1).unsqueeze(-1)
    slope_y, slope_x = torch.gradient(height, dim=(2, 3))
    slope = (slope_x * light.cos() + slope_y * light.sin()) / picture.scale
    return picture.image + _per_task(draws.uniform(0.1, 0.4)) * slope


def _outlines(draws: Draws, picture: Picture) -> Tensor:
    strength = picture.amount(draws, -0.5, 0.5)
    return picture.image + strength * blur(edges(picture.labels), picture.sigma(draws, 0.6, 1.6))


def _hairs(draws: Draws, picture: Picture) -> Tensor:
    count, pieces = 14, 25
    shape = (picture.subjects, count)
    canvas = Canvas(len(draws), picture.subjects, picture.size, draws.device)
    start = draws.uniform(0, DESIGN_SIZE, *shape, 1, 2)
    bend = torch.full((len(draws),), 0.08, device=draws.device)
    points = start + walk(draws, shape, pieces, 6, bend, draws.uniform(0, TURN, *shape))
    active = torch.arange(count, device=draws.device) < draws.integers(2, count + 1, picture.subjects, 1)
    width, shade = draws.uniform(1, 2.2, *shape), draws.uniform(-0.1, 0.3, picture.subjects, 1).expand(-1, *shape)
    spread = [t.unsqueeze(3).expand(-1, *shape, pieces).flatten(2) for t in (width, active, shade)]
    canvas.tubes(points[..., :-1, :].flatten(2, 3), points[..., 1:, :].flatten(2, 3), spread[0], 1, *spread[1:])
    return torch.where(canvas.code > 0, canvas.shade(canvas.code), picture.image)


def _highlights(draws: Draws, picture: Picture) -> Tensor:
    field = smooth_noise(draws, picture.subjects, draws.integers(12, 50), picture.size, most=50)
    return picture.image + _per_task(draws.uniform(0.3, 0.8)) * (field > _per_task(draws.uniform(2.2, 2.8)))


def _ultrasound(draws: Draws, picture: Picture) -> Tensor:
    """Soft borders, a shadow or an echo behind the object, attenuation with depth, and speckle."""
    image = blur(picture.image, picture.sigma(draws, 0.5, 4))
    behind = picture.mask.cummax(2).values * (1 - picture.mask)
    image = image * (
        1 + _per_task(draws.uniform(-0.7, 0.5)) * blur(behind, torch.full_like(picture.grain, 4 * picture.scale))
    )
    depth = torch.linspace(0, 1, picture.size, device=draws.device).view(-1, 1)
    image = image * torch.exp(_per_task(draws.uniform(-1, 0.6)) * depth)
    noise = draws.white(picture.subjects, picture.size, picture.size)
    lateral, axial = picture.sigma(draws, 0.5, 2.5), picture.sigma(draws, 0.4, 1.0)
    speckle = blur(blur(noise, torch.minimum(lateral, axial)), 0.6 * torch.maximum(lateral, axial))
    speckle = speckle / (speckle.std((1, 2, 3), keepdim=True) + 1e-6)
    return image * torch.exp(_per_task(draws.uniform(0.15, 0.6) * picture.grain.clamp_min(0.5)) * speckle)


def _fading(draws: Draws, picture: Picture) -> Tensor:
    """Parts of the image lose their contrast: borders and whole parts of structures are missing."""
    field = smooth_noise(draws, picture.subjects, draws.integers(2, 9), picture.size)
    lost = torch.sigmoid(4 * (field - _per_task(draws.uniform(0.3, 1.2))))
    return torch.lerp(picture.image, blur(picture.image, picture.sigma(draws, 8, 30)), lost)


def _stain(draws: Draws, picture: Picture) -> Tensor:
    """Transmitted light: absorption instead of intensity, uneven from place to place and darker where it is dense."""
    field = smooth_noise(draws, picture.subjects, draws.integers(3, 12), picture.size)
    uneven = 1 + _per_task(draws.uniform(0, 0.35)) * field
    low = picture.image.amin((2, 3), keepdim=True)
    return torch.exp(-_per_task(draws.uniform(1, 3)) * (picture.image - low) * uneven.clamp_min(0.1))


def _optical_blur(draws: Draws, picture: Picture) -> Tensor:
    return blur(picture.image, picture.sigma(draws, 0.2, 1.8))


def _bias_field(draws: Draws, picture: Picture) -> Tensor:
    field = smooth_noise(draws, picture.subjects, draws.integers(2, 4), picture.size)
    return picture.image * torch.exp(picture.amount(draws, 0.05, 0.35) * field)


def _vignette(draws: Draws, picture: Picture) -> Tensor:
    axis = pixel_axis(picture.size, draws.device)
    x, y = (c.unsqueeze(-1).unsqueeze(-1) for c in draws.normal(0.12, picture.subjects, 2).unbind(2))
    distance = (axis.view(-1, 1) - y) ** 2 + (axis.view(1, -1) - x) ** 2
    return picture.image * torch.exp(-picture.amount(draws, 0.5, 3) * distance)


def _speckle(draws: Draws, picture: Picture) -> Tensor:
    return picture.image * (1 + picture.amount(draws, 0.05, 0.3) * _smoothed_white(draws, picture))


def _white_noise(draws: Draws, picture: Picture) -> Tensor:
    noise = draws.white(picture.subjects, picture.size, picture.size)
    return picture.image + picture.amount(draws, 0, 0.09) * noise


def _correlated_noise(draws: Draws, picture: Picture) -> Tensor:
    return picture.image + picture.amount(draws, 0.02, 0.12) * _smoothed_white(draws, picture)


def _smoothed_white(draws: Draws, picture: Picture) -> Tensor:
    noise = blur(draws.white(picture.subjects, picture.size, picture.size), draws.uniform(0.3, 1.2))
    return noise / noise.std((1, 2, 3), keepdim=True)


def _reversal(draws: Draws, picture: Picture) -> Tensor:
    """Some subjects have dark and bright exchanged."""
    return torch.where(draws.chance(0.5, picture.subjects, 1, 1), -picture.image, picture.image)


# In the order of imaging: the object, the optics, the detector. A family may have probabilities of its own.
EFFECTS: dict[str, tuple[float, Effect]] = {
    "softness": (0.2, _softness),
    "halo": (0.35, _halo),
    "dome": (0.25, _dome),
    "relief": (0.06, _relief),
    "outlines": (0.35, _outlines),
    "stain": (0.12, _stain),
    "hairs": (0.08, _hairs),
    "highlights": (0.12, _highlights),
    "ultrasound": (0.1, _ultrasound),
    "fading": (0.15, _fading),
    "optical blur": (0.75, _optical_blur),
    "bias field": (0.5, _bias_field),
    "vignette": (0.12, _vignette),
    "speckle": (0.2, _speckle),
    "white noise": (0.6, _white_noise),
    "correlated noise": (0.2, _correlated_noise),
    "reversal": (0.04, _reversal),
}


def field_of_view(draws: Draws, subjects: int, size: int, sector: float) -> Tensor:
    """[T, N, H, H] bool, what the camera or probe sees: all, a disc, a rectangle, or (`sector`: how often) a sector."""
    axis = (pixel_axis(size, draws.device) + 0.5) * DESIGN_SIZE
    y, x = axis.view(-1, 1), axis.view(1, -1)
    kind = draws.uniform(0, 1).view(-1, 1, 1, 1)
    shift = draws.normal(3.0, 2, subjects, 1, 1)
    radius, sides = draws.uniform(100, 150, 1, 1, 1), draws.uniform(90, 128, 2, 1, 1, 1)
    across, down = x - DESIGN_SIZE / 2 - shift[:, 0], y - DESIGN_SIZE / 2 - shift[:, 1]
    disc = across**2 + down**2 < radius**2
    box = (across.abs() < sides[:, 0]) & (down.abs() < sides[:, 1])
    above = draws.uniform(5, 120, 1, 1, 1)
    reach = draws.uniform(190, 255, 1, 1, 1)
    height = y + above + shift[:, 1]
    distance = (height**2 + across**2).sqrt()
    fan = (
        (across.abs() < height * draws.uniform(0.45, 1.1, 1, 1, 1))
        & (distance > above + 4)
        & (distance < above + reach)
    )
    seen = torch.ones_like(disc)
    for chosen, (low, high) in (
        (fan, (0.0, sector)),
        (disc, (sector, sector + 0.15)),
        (box, (sector + 0.15, sector + 0.2)),
    ):
        seen = torch.where((kind >= low) & (kind < high), chosen, seen)
    return seen
