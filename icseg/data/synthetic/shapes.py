"""Outlines and curves in design coordinates (0 to 256 at any image size), and a canvas to draw them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

DESIGN_SIZE = 256
TURN = 2 * np.pi

Points = NDArray[np.float64]


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """A draw whose logarithm is uniform between those of `low` and `high`."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


@dataclass(frozen=True)
class Blob:
    """A star-shaped structure: Fourier harmonics of the radius from the second on, stretched and turned."""

    radius: float
    harmonics: NDArray[np.float64]
    phases: NDArray[np.float64]
    elongation: float
    angle: float

    @classmethod
    def draw(cls, rng: np.random.Generator, radius: float, irregularity: float, max_elongation: float) -> Self:
        """A random blob; `irregularity` is the relative deviation of the lowest harmonic."""
        count = int(rng.integers(2, 7))
        return cls(
            radius=radius,
            harmonics=rng.normal(0, irregularity, count) / (np.arange(count) + 1.5) ** 0.8,
            phases=rng.uniform(0, TURN, count),
            elongation=float(np.exp(rng.uniform(-0.5, 0.5) * np.log(max_elongation))),
            angle=rng.uniform(0, TURN),
        )

    def variant(self, rng: np.random.Generator, variability: float, turn: float, scale: float = 1) -> Points:
        """The outline in one subject: the same structure, slightly deformed, about the origin."""
        harmonics = self.harmonics + rng.normal(0, 0.03 * variability, len(self.harmonics))
        phases = self.phases + rng.normal(0, 0.25 * variability, len(self.phases))
        return _outline(self.radius * scale, harmonics, phases, self.elongation, self.angle + rng.normal(0, turn))

    def relative(self, rng: np.random.Generator, scale: float = 1) -> Points:
        """The outline of another object of the same kind, about the origin, in any orientation."""
        count = len(self.harmonics)
        harmonics = np.abs(self.harmonics) * rng.uniform(0.4, 1.5, count)
        elongation = self.elongation ** rng.uniform(0.6, 1.4)
        return _outline(self.radius * scale, harmonics, rng.uniform(0, TURN, count), elongation, rng.uniform(0, TURN))


_THETA = np.linspace(0, TURN, 40, endpoint=False)


def _outline(
    radius: float,
    harmonics: NDArray[np.float64],
    phases: NDArray[np.float64],
    elongation: float,
    angle: float,
) -> Points:
    order = np.arange(2, 2 + len(harmonics))[:, None]
    wave = harmonics[:, None] * np.cos(order * _THETA + phases[:, None])
    reach = max(1.0, radius) * (1 + wave.sum(0))
    x, y = reach * np.cos(_THETA) * elongation, reach * np.sin(_THETA) / elongation
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos * x - sin * y, sin * x + cos * y], 1)


def walk(
    rng: np.random.Generator, steps: int, step: float, curvature: float, start: Points, heading: float
) -> tuple[Points, float]:
    """A smooth random curve from `start` ([2], x and y): its [steps + 1, 2] points and its final heading."""
    turns = rng.normal(0, curvature, steps)
    for i in range(1, steps):
        turns[i] += 0.8 * turns[i - 1]
    headings = heading + np.cumsum(turns)
    moves = step * np.stack([np.cos(headings), np.sin(headings)], 1)
    return start + np.concatenate([np.zeros((1, 2)), np.cumsum(moves, 0)]), float(headings[-1])


class Canvas:
    """Draws labels, and a shade (an intensity offset of the object drawn), over a [size, size] label map."""

    def __init__(self, background: NDArray[np.uint8]) -> None:
        size = background.shape[0]
        self._scale = size / DESIGN_SIZE
        self._labels = Image.fromarray(background)
        self._shade = Image.new("F", (size, size), 0.0)
        self._draw_labels = ImageDraw.Draw(self._labels)
        self._draw_shade = ImageDraw.Draw(self._shade)

    def polygon(self, outline: Points, label: int, shade: float = 0) -> None:
        corners = (outline * self._scale).ravel().tolist()
        self._draw_labels.polygon(corners, fill=label)
        self._draw_shade.polygon(corners, fill=shade)

    def tube(self, points: Points, widths: NDArray[np.float64], label: int, shade: float = 0) -> None:
        """A curve of [P, 2] points whose P - 1 segments have `widths`; round where it is thick."""
        corners = (points * self._scale).tolist()
        for start, end, width in zip(corners, corners[1:], (widths * self._scale).tolist(), strict=False):
            pixels = max(1, round(width))
            segment = [*start, *end]
            self._draw_labels.line(segment, fill=label, width=pixels)
            self._draw_shade.line(segment, fill=shade, width=pixels)
            if pixels > 2:
                (x, y), r = end, width / 2
                self._draw_labels.ellipse([x - r, y - r, x + r, y + r], fill=label)

    def labels(self) -> NDArray[np.uint8]:
        return np.array(self._labels)

    def shade(self) -> NDArray[np.float32]:
        return np.array(self._shade)


def tree(
    rng: np.random.Generator,
    canvas: Canvas,
    label: int,
    start: Points,
    heading: float,
    width: float,
    length: float,
    curvature: float,
    depth: int,
    shade: float,
) -> None:
    """Draw a branching vessel, `depth` bifurcations deep, from `start`."""
    steps = max(3, int(length / 5))
    points, end = walk(rng, steps, 5, curvature, start, heading)
    canvas.tube(points, np.linspace(width, width * 0.75, steps), label, shade)
    if depth <= 0 or width <= 0.9:
        return
    for side in (-1, 1):
        if rng.random() < 0.85:
            branch = end + side * rng.uniform(0.2, 0.7)
            thinner, shorter = width * rng.uniform(0.55, 0.85), length * rng.uniform(0.6, 0.95)
            tree(rng, canvas, label, points[-1], branch, thinner, shorter, curvature, depth - 1, shade)
    if rng.random() < 0.6:
        point = points[rng.integers(1, len(points))]
        branch = heading + rng.choice([-1, 1]) * rng.uniform(0.5, 1.1)
        tree(rng, canvas, label, point, branch, width * 0.5, length * 0.6, curvature, depth - 2, shade)
