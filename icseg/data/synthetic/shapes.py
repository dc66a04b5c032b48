"""Outlines and curves in design coordinates (0 to 256 at any image size), and a canvas that draws them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from icseg.data.synthetic.fields import TURN
from icseg.data.synthetic.random import Draws

DESIGN_SIZE = 256
HARMONICS = 5  # of an outline's radius, from the second on
_ANGLES = 64
_LABELS = 64  # what a pixel's code is divided by: below it the label, above it the object
_LARGEST_CHUNK = 1 << 22


Inside = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(objects int64 [K], x [K, 1, e], y [K, e, 1] from their places) -> bool [K, e, e]."""


@dataclass
class Blob:
    """Kinds of star-shaped structures, [...] each: harmonics of the radius, stretched and turned.

    radius, elongation, angle: [...]; harmonics, phases: [..., HARMONICS].
    """

    radius: Tensor
    harmonics: Tensor
    phases: Tensor
    elongation: Tensor
    angle: Tensor

    @staticmethod
    def draw(draws: Draws, radius: Tensor, irregularity: Tensor | float, max_elongation: Tensor | float) -> Blob:
        """radius [T, M], to which the others broadcast; irregularity: relative deviation of the lowest harmonic."""
        shape = radius.shape[1:]
        order = torch.arange(HARMONICS, device=radius.device)
        count = draws.integers(2, HARMONICS + 1, *shape).unsqueeze(-1)
        deviation = torch.as_tensor(irregularity, device=radius.device).expand(radius.shape).unsqueeze(-1)
        harmonics = draws.normal(deviation, *shape, HARMONICS) / (order + 1.5) ** 0.8 * (order < count)
        stretch = torch.as_tensor(max_elongation, device=radius.device).log()
        return Blob(
            radius,
            harmonics,
            draws.uniform(0, TURN, *shape, HARMONICS),
            (draws.uniform(-0.5, 0.5, *shape) * stretch).exp(),
            draws.uniform(0, TURN, *shape),
        )

    def variant(self, draws: Draws, subjects: int, variability: Tensor, turn: Tensor) -> Blob:
        """The same structures [T, N, M] in each subject, slightly deformed; variability, turn: [T]."""
        shape = (subjects, *self.radius.shape[1:])
        change = variability.view(-1, *[1] * len(shape), 1)
        return Blob(
            self.radius.unsqueeze(1).expand(-1, *shape),
            self.harmonics.unsqueeze(1) + draws.normal(0.03 * change, *shape, HARMONICS),
            self.phases.unsqueeze(1) + draws.normal(0.25 * change, *shape, HARMONICS),
            self.elongation.unsqueeze(1).expand(-1, *shape),
            self.angle.unsqueeze(1) + draws.normal(turn.view(-1, *[1] * len(shape)), *shape),
        )

    def relatives(self, draws: Draws, *shape: int) -> Blob:
        """Other objects of these kinds, in any orientation: kinds [T, ...] that broadcast to [T, *shape]."""
        whole = (len(self.radius), *shape)
        return Blob(
            self.radius.expand(whole),
            self.harmonics.expand(*whole, HARMONICS).abs() * draws.uniform(0.4, 1.5, *shape, HARMONICS),
            draws.uniform(0, TURN, *shape, HARMONICS),
            self.elongation.expand(whole) ** draws.uniform(0.6, 1.4, *shape),
            draws.uniform(0, TURN, *shape),
        )

    def of(self, kind: Tensor) -> Blob:
        """The kinds [T, ...] int64 out of kinds [T, M]."""
        flat = kind.flatten(1)
        pick = flat.unsqueeze(-1).expand(*flat.shape, HARMONICS)
        return Blob(
            self.radius.gather(1, flat).view(kind.shape),
            self.harmonics.gather(1, pick).view(*kind.shape, HARMONICS),
            self.phases.gather(1, pick).view(*kind.shape, HARMONICS),
            self.elongation.gather(1, flat).view(kind.shape),
            self.angle.gather(1, flat).view(kind.shape),
        )

    def scaled(self, factor: Tensor) -> Blob:
        return dataclasses.replace(self, radius=self.radius * factor)

    def mirrored(self) -> Blob:
        """Left and right exchanged."""
        return dataclasses.replace(self, phases=-self.phases, angle=TURN / 2 - self.angle)


@dataclass
class Objects:
    """M blobs a subject: place [T, N, M, 2] (x, y) of their centres, blob [T, N, M].

    label, active, shade: int64, bool and float, [T, N, M] or what broadcasts to it. A label is below 64, a shade an
    offset of the intensity.
    """

    place: Tensor
    blob: Blob
    label: Tensor | int
    active: Tensor | None = None
    shade: Tensor | None = None


class Canvas:
    """Draws objects over label maps [T, N, H, H]; later ones hide earlier ones, whatever the device's order of writes.

    Each call draws [T, N, M] objects in the order of the last dimension, over those of earlier calls.
    """

    def __init__(self, tasks: int, subjects: int, size: int, device: torch.device) -> None:
        self.tasks, self.subjects, self.size, self.device = tasks, subjects, size, device
        self._code = torch.zeros(tasks * subjects * size * size + 1, dtype=torch.int32, device=device)
        self._shades: list[Tensor] = [torch.zeros(tasks, subjects, 1, device=device)]

    @property
    def code(self) -> Tensor:
        """[T, N, H, H] int32: 0 where nothing is drawn."""
        return self._code[:-1].view(self.tasks, self.subjects, self.size, self.size)

    def transpose(self, tasks: Tensor) -> None:
        """Exchange x and y of what is drawn so far where `tasks` [T, 1, 1, 1] is true."""
        self._code[:-1] = torch.where(tasks, self.code.mT, self.code).flatten()

    def blobs(self, *groups: Objects) -> None:
        """Draw objects; of several groups with as many each the first of all groups, then the second, and so on."""
        shape = groups[0].place.shape[:-1]
        empty = torch.zeros(shape, device=self.device)

        def merged(values: list[Tensor]) -> Tensor:
            return torch.stack(values, 3).flatten(2, 3)

        blob = Blob(*(merged([getattr(g.blob, f.name) for g in groups]) for f in dataclasses.fields(Blob)))
        place = merged([g.place for g in groups])
        label = merged([empty.long() + g.label for g in groups])
        active = merged([empty == 0 if g.active is None else g.active.expand(shape) for g in groups])
        shade = merged([empty if g.shade is None else g.shade.expand(shape) for g in groups])
        reach = blob.radius * (1 + blob.harmonics.abs().sum(-1)) * torch.maximum(blob.elongation, 1 / blob.elongation)
        angles = torch.arange(_ANGLES, device=self.device) * (TURN / _ANGLES)
        order = torch.arange(2, 2 + HARMONICS, device=self.device).unsqueeze(1)

        def inside(chosen: Tensor, x: Tensor, y: Tensor) -> Tensor:
            cos, sin = (f(blob.angle.flatten()[chosen]).view(-1, 1, 1) for f in (torch.cos, torch.sin))
            stretch = blob.elongation.flatten()[chosen].view(-1, 1, 1)
            u, v = (cos * x + sin * y) / stretch, (cos * y - sin * x) * stretch
            wave = (order * angles + blob.phases.flatten(0, 2)[chosen].unsqueeze(-1)).cos()
            outline = 1 + (blob.harmonics.flatten(0, 2)[chosen].unsqueeze(-1) * wave).sum(1)  # [K, _ANGLES]
            outline = outline * blob.radius.flatten()[chosen].clamp_min(1.0).unsqueeze(1)
            sector = torch.atan2(v, u) * (_ANGLES / TURN)
            before = sector.floor()
            first = before.long().flatten(1) % _ANGLES
            low, high = (outline.gather(1, i).view_as(u) for i in (first, (first + 1) % _ANGLES))
            return u * u + v * v <= torch.lerp(low, high, sector - before).clamp_min(0) ** 2

        self._stamp(place, reach, inside, label, active, shade)

    def tubes(self, start: Tensor, end: Tensor, width: Tensor, label: int, active: Tensor, shade: Tensor) -> None:
        """Straight pieces with round ends from start to end [T, N, M, 2]; width [T, N, M], at least about a pixel."""
        half = (end - start) / 2
        thick = width.clamp_min(1.3 * DESIGN_SIZE / self.size) / 2

        def inside(chosen: Tensor, x: Tensor, y: Tensor) -> Tensor:
            along = half.flatten(0, 2)[chosen].view(-1, 2, 1, 1)
            length = (along * along).sum(1).clamp_min(1e-6)
            t = ((x * along[:, 0] + y * along[:, 1]) / length).clamp(-1, 1)
            distance = (x - t * along[:, 0]) ** 2 + (y - t * along[:, 1]) ** 2
            return distance <= thick.flatten()[chosen].view(-1, 1, 1) ** 2

        self._stamp(start + half, half.norm(dim=-1) + thick, inside, label, active, shade)

    def _stamp(
        self, place: Tensor, reach: Tensor, inside: Inside, label: Tensor | int, active: Tensor, shade: Tensor
    ) -> None:
        """Write each object's code into the square about its place, as large as its reach."""
        rows, count = self.tasks * self.subjects, place.shape[2]
        first = sum(s.shape[2] for s in self._shades)
        whole = (self.tasks, self.subjects, count)
        self._shades.append(shade.expand(whole))
        number = first + torch.arange(count, device=self.device)
        code = (number * _LABELS + label).expand(whole).flatten().int()
        scale = self.size / DESIGN_SIZE
        side = (2 * reach * scale).ceil() + 2
        wanted = side.isfinite() & active
        place = place.flatten(0, 2) * scale
        near = (place + side.flatten().unsqueeze(1) > 0) & (place - side.flatten().unsqueeze(1) < self.size)
        side = torch.where(wanted.flatten() & near.all(1), side.flatten(), 0)
        row = torch.arange(rows, device=self.device).repeat_interleave(count)
        width = 8
        below = 0
        while below < self.size:
            limit = width if width < self.size else 1 << 30  # the last takes all larger ones, cut off at the border
            chosen = ((side > below) & (side <= limit)).nonzero().squeeze(1)
            extent = min(width, self.size)
            for part in chosen.split(max(1, _LARGEST_CHUNK // extent**2)):
                self._stamp_squares(part, extent, place[part], row[part], code[part], inside, scale)
            below, width = extent, width * 2

    def _stamp_squares(
        self, chosen: Tensor, extent: int, place: Tensor, row: Tensor, code: Tensor, inside: Inside, scale: float
    ) -> None:
        if not len(chosen):
            return
        whole = extent >= self.size
        corner = torch.zeros_like(place) if whole else (place - extent / 2).round()
        steps = torch.arange(extent, device=self.device)
        pixels = corner.long().unsqueeze(-1) + steps  # [K, 2, extent]
        offset = (pixels + 0.5 - place.unsqueeze(-1)) / scale
        hit = inside(chosen, offset[:, 0].unsqueeze(1), offset[:, 1].unsqueeze(2))
        on = (pixels >= 0) & (pixels < self.size)
        hit = hit & on[:, 0].unsqueeze(1) & on[:, 1].unsqueeze(2)
        index = row.view(-1, 1, 1) * self.size**2 + pixels[:, 1].unsqueeze(2) * self.size + pixels[:, 0].unsqueeze(1)
        picked = hit.nonzero(as_tuple=True)
        self._code.scatter_reduce_(0, index[picked], code[picked[0]], "amax")

    def fill(self, where: Tensor, label: int) -> None:
        """Draw over what is so far, where [T, N, H, H] is true."""
        number = sum(s.shape[2] for s in self._shades)
        self._shades.append(torch.zeros(self.tasks, self.subjects, 1, device=self.device))
        self._code[:-1].masked_fill_(where.flatten(), number * _LABELS + label)

    def labels(self, code: Tensor, background: Tensor) -> Tensor:
        """[T, N, H, H] int64 of a map of codes, with `background` where nothing is drawn."""
        return torch.where(code > 0, (code % _LABELS).long(), background)

    def shade(self, code: Tensor) -> Tensor:
        """[T, N, H, H] shade of the objects in a map of codes."""
        table = torch.cat(self._shades, 2)
        return table.gather(2, (code // _LABELS).long().flatten(2)).view(code.shape)


def walk(draws: Draws, shape: tuple[int, ...], steps: int, step: float, curvature: Tensor, heading: Tensor) -> Tensor:
    """Smooth random curves from the origin: [T, *shape, steps + 1, 2].

    curvature [T]: deviation of the turn at each step; heading [T, *shape] at the start.
    """
    lag = torch.arange(steps, device=draws.device)
    lag = lag.unsqueeze(1) - lag
    memory = torch.where(lag >= 0, 0.8 ** lag.clamp_min(0).float(), 0.0)
    turns = draws.normal(curvature.view(-1, *[1] * len(shape), 1), *shape, steps) @ memory.T
    headings = heading.unsqueeze(-1) + turns.cumsum(-1)
    moves = step * torch.stack([headings.cos(), headings.sin()], -1).cumsum(-2)
    return torch.cat([torch.zeros_like(moves[..., :1, :]), moves], -2)
