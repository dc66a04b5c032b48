"""The families of tasks: which structures a task's subjects show, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from icseg.data.synthetic.fields import smooth_noise
from icseg.data.synthetic.scene import (
    Labels,
    Scene,
    background,
    collect,
    layer_maps,
    noise_regions,
    object_label,
)
from icseg.data.synthetic.shapes import DESIGN_SIZE, TURN, Blob, Canvas, Points, log_uniform, tree, walk

CENTRE = DESIGN_SIZE / 2


def _variability(rng: np.random.Generator) -> float:
    return log_uniform(rng, 0.4, 1.6)


def _anywhere(rng: np.random.Generator) -> Points:
    return rng.uniform(0, DESIGN_SIZE, 2)


def regions(rng: np.random.Generator, subjects: int, size: int) -> Scene:
    """A frame-filling atlas of smooth regions, alike in all subjects."""
    count = int(rng.integers(3, 12))
    labels = noise_regions(rng, subjects, count, int(rng.integers(3, 9)), size, shared=True)
    candidates: list[tuple[int, ...]] = [(i,) for i in range(count)]
    shade = np.zeros(labels.shape, np.float32)
    return Scene(labels, shade, candidates, deformation=1.3 * max(_variability(rng), 0.7))


def layers(rng: np.random.Generator, subjects: int, size: int) -> Scene:
    """Stacked tissue layers, sometimes with deposits on one boundary, lying or upright."""
    count = int(rng.integers(3, 8))
    labels = layer_maps(rng, subjects, count, _variability(rng), size)
    candidates: list[tuple[int, ...]] = [(i,) for i in range(1, count)]
    if rng.random() < 0.5:
        blob = Blob.draw(rng, rng.uniform(5, 18), 0.25, 2.5)
        boundary = int(rng.integers(0, count))
        labels = np.stack([_with_deposits(rng, subject, blob, boundary) for subject in labels])
        candidates += [(object_label(0),)] * 2
    if rng.random() < 0.25:
        labels = np.ascontiguousarray(labels.transpose(0, 2, 1))
    return Scene(labels, np.zeros(labels.shape, np.float32), candidates, deformation=0.35)


def _with_deposits(rng: np.random.Generator, labels: Labels, blob: Blob, boundary: int) -> Labels:
    canvas = Canvas(labels)
    size = labels.shape[0]
    for _ in range(int(rng.integers(1, 5))):
        x = rng.uniform(20, DESIGN_SIZE - 20)
        column = labels[:, int(x * size / DESIGN_SIZE)]
        y = int((column <= boundary).sum()) * DESIGN_SIZE / size + 4
        canvas.polygon(blob.relative(rng) + (x, y), object_label(0))
    return canvas.labels()


@dataclass(frozen=True)
class _Organ:
    blob: Blob
    offset: Points
    core: float
    mirrored: bool
    label: int


def _draw_organs(rng: np.random.Generator, count: int) -> list[_Organ]:
    """Organs about a body's centre, the largest first so that it hides no other."""
    organs = []
    for i in range(count):
        blob = Blob.draw(rng, log_uniform(rng, 7, 60), 0.22, 2.4)
        angle, distance = rng.uniform(0, TURN), rng.uniform(0, 85)
        offset = distance * np.array([np.cos(angle), np.sin(angle)])
        core = rng.uniform(0.4, 0.85) if rng.random() < 0.4 else 0
        organs.append(_Organ(blob, offset, core, rng.random() < 0.25, object_label(1 + i)))
    return sorted(organs, key=lambda organ: -organ.blob.radius)


def organs(rng: np.random.Generator, subjects: int, size: int) -> Scene:
    """Structures at fixed places in a body: known by where they are as much as by how they look."""
    variability = _variability(rng)
    backgrounds = background(rng, subjects, size, shared=0.5)
    body = Blob.draw(rng, rng.uniform(80, 130), 0.08, 1.5) if rng.random() < 0.75 else None
    centre = CENTRE + rng.normal(0, 12, 2)
    anatomy = _draw_organs(rng, int(rng.integers(2, 9)))
    canvases = [Canvas(labels) for labels in backgrounds]
    for canvas in canvases:
        middle = centre + rng.normal(0, 5 * variability, 2)
        scale = float(np.exp(rng.normal(0, 0.08 * variability)))
        turn = rng.normal(0, 0.1 * variability)
        if body is not None:
            canvas.polygon(middle + body.variant(rng, variability, 0.05, scale), object_label(0))
        for organ in anatomy:
            _draw_organ(rng, canvas, organ, middle, scale, turn, variability)
    candidates: list[tuple[int, ...]] = []
    for organ in anatomy:
        parts = [(organ.label,), (organ.label + 1,), (organ.label, organ.label + 1)]
        candidates.append(parts[rng.integers(3)] if organ.core else parts[0])
    return Scene(*collect(canvases), candidates, deformation=0.8 * variability)


def _draw_organ(
    rng: np.random.Generator,
    canvas: Canvas,
    organ: _Organ,
    middle: Points,
    scale: float,
    turn: float,
    variability: float,
) -> None:
    shift = rng.normal(0, 3.5 * variability + 0.04 * organ.blob.radius, 2)
    own_scale = scale * float(np.exp(rng.normal(0, 0.12 * variability)))
    outline = organ.blob.variant(rng, variability, 0.12 * variability, own_scale)
    cos, sin = np.cos(turn), np.sin(turn)
    place = scale * np.array([[cos, -sin], [sin, cos]]) @ organ.offset + shift
    for side in (1, -1) if organ.mirrored else (1,):
        flip = np.array([side, 1])
        canvas.polygon(middle + flip * (place + outline), organ.label)
        if organ.core:
            canvas.polygon(middle + flip * (place + outline * organ.core), organ.label + 1)


@dataclass(frozen=True)
class _CellType:
    blob: Blob
    count: float
    core: float
    rim: bool
    label: int


def _draw_cell_type(rng: np.random.Generator, index: int, cover: float) -> _CellType:
    radius = log_uniform(rng, 4, 48)
    blob = Blob.draw(rng, radius, rng.uniform(0.02, 0.25), rng.uniform(1, 3))
    count = float(np.clip(cover * DESIGN_SIZE**2 / (np.pi * radius**2), 1, 70))
    core = rng.uniform(0.3, 0.75) if rng.random() < 0.4 else 0
    return _CellType(blob, count, core, rng.random() < 0.35, object_label(index))


def cells(rng: np.random.Generator, subjects: int, size: int) -> Scene:
    """Many objects of one to three kinds anywhere, sparse to crowded, sometimes at several magnifications."""
    kinds = int(rng.integers(1, 4))
    cover = rng.uniform(0.04, 0.65 if rng.random() < 0.3 else 0.4) / kinds
    types = [_draw_cell_type(rng, k, cover) for k in range(kinds)]
    spacing = rng.uniform(0.6, 1.1)
    shading = float(rng.choice([0, 0.05, 0.12]))
    magnification = 0.35 if rng.random() < 0.25 else 0.05
    canvases = [Canvas(labels) for labels in background(rng, subjects, size, shared=0.1)]
    for canvas in canvases:
        zoom = float(np.exp(np.clip(rng.normal(0, magnification), -0.6, 0.6)))
        placed = np.zeros((0, 3))
        for kind in types:
            count = max(1, round(kind.count * float(np.exp(rng.normal(0, 0.35))) / max(zoom, 1) ** 2))
            for _ in range(count):
                scale = zoom * float(np.exp(rng.normal(0, 0.18)))
                place = _free_place(rng, placed, kind.blob.radius * scale, spacing, few=kind.count <= 2)
                if place is not None:
                    placed = np.vstack([placed, [*place, kind.blob.radius * scale]])
                    _draw_cell(rng, canvas, kind, place, scale, rng.normal(0, shading))
    candidates: list[tuple[int, ...]] = []
    for kind in types:
        body, core, rim = kind.label, kind.label + 1, kind.label + 2
        candidates += [(body, core, rim)] * 2
        candidates += [(core,), (core,), (body, rim)] if kind.core else []
        candidates += [(rim,)] if kind.rim else []
    return Scene(*collect(canvases), candidates, deformation=0.15)


def _free_place(rng: np.random.Generator, placed: Points, radius: float, spacing: float, few: bool) -> Points | None:
    """A place away from the discs `placed` ([M, 3]: x, y, radius), or None after six tries."""
    for _ in range(6):
        place = rng.normal(CENTRE, 45, 2) if few else _anywhere(rng)
        distance = np.hypot(placed[:, 0] - place[0], placed[:, 1] - place[1])
        if (distance > spacing * (placed[:, 2] + radius)).all():
            return place
    return None


def _draw_cell(
    rng: np.random.Generator, canvas: Canvas, kind: _CellType, place: Points, scale: float, shade: float
) -> None:
    outline = kind.blob.relative(rng, scale)
    if kind.rim:
        canvas.polygon(place + outline, kind.label + 2, shade)
        outline = outline * max(0.5, 1 - 2 / kind.blob.radius)
    canvas.polygon(place + outline, kind.label, shade)
    if kind.core:
        off_centre = rng.normal(0, 0.12 * kind.blob.radius * scale, 2)
        canvas.polygon(place + off_centre + outline * kind.core, kind.label + 1, shade)


def lesion(rng: np.random.Generator, subjects: int, size: int) -> Scene:
    """One or a few focal objects of very different size and place, among other structures."""
    blob = Blob.draw(rng, log_uniform(rng, 9, 85), rng.uniform(0.04, 0.3), 2)
    spread = rng.uniform(15, 80)
    core = rng.uniform(0.3, 0.8) if rng.random() < 0.25 else 0
    size_spread = float(rng.choice([0.15, 0.3, 0.5]))
    most = 3 if rng.random() < 0.2 else 1
    clutter = [Blob.draw(rng, log_uniform(rng, 5, 50), 0.2, 2.5) for _ in range(int(rng.integers(0, 4)))]
    label = object_label(len(clutter))
    canvases = [Canvas(labels) for labels in background(rng, subjects, size, shared=0.1)]
    for canvas in canvases:
        for i, other in enumerate(clutter):
            for _ in range(int(rng.integers(0, 3))):
                canvas.polygon(_anywhere(rng) + other.relative(rng), object_label(i))
        for _ in range(int(rng.integers(1, most + 1))):
            place = np.clip(rng.normal(CENTRE, spread, 2), 15, DESIGN_SIZE - 15)
            outline = blob.relative(rng, float(np.exp(rng.normal(0, size_spread))))
            canvas.polygon(place + outline, label)
            if core:
                canvas.polygon(place + outline * core, label + 1)
    candidates: list[tuple[int, ...]] = [(label, label + 1)] * 2 + ([(label + 1,)] if core else [])
    return Scene(*collect(canvases), candidates, deformation=0.5)


def tubes(rng: np.random.Generator, subjects: int, size: int) -> Scene:
    """Vessel trees, worms, fibres or a network of ridges."""
    draw = (_trees, _worms, _fibres, _network)[rng.integers(4)](rng)
    decoy = Blob.draw(rng, rng.uniform(8, 30), 0.05, 1.2) if rng.random() < 0.4 else None
    canvases = [Canvas(labels) for labels in background(rng, subjects, size, shared=0.1)]
    label = object_label(1)
    for i, canvas in enumerate(canvases):
        origin = rng.normal(CENTRE, 45, 2)
        if decoy is not None:
            canvas.polygon(origin + decoy.relative(rng), object_label(0))
        canvases[i] = draw(rng, canvas, label, origin)
    return Scene(*collect(canvases), [(label,)], deformation=0.3, faint=0.45)


Draw = Callable[[np.random.Generator, Canvas, int, Points], Canvas]


def _trees(rng: np.random.Generator) -> Draw:
    width, curvature = log_uniform(rng, 1.3, 6), rng.uniform(0.012, 0.12)

    def draw(rng: np.random.Generator, canvas: Canvas, label: int, origin: Points) -> Canvas:
        heading = rng.uniform(0, TURN)
        for trunk in range(int(rng.integers(2, 6))):
            out = heading + trunk * 1.7 + rng.normal(0, 0.3)
            length, depth, shade = rng.uniform(35, 90), int(rng.integers(2, 5)), rng.normal(0, 0.05)
            tree(rng, canvas, label, origin, out, width, length, curvature, depth, shade)
        return canvas

    return draw


def _tube_count(rng: np.random.Generator, width: float) -> int:
    return int(np.clip(rng.uniform(0.3, 1.5) * 40 / width, 1, 22))


def _worms(rng: np.random.Generator) -> Draw:
    width, curvature, length = log_uniform(rng, 1.3, 11), rng.uniform(0.02, 0.2), rng.uniform(6, 40)
    count = _tube_count(rng, width)

    def draw(rng: np.random.Generator, canvas: Canvas, label: int, origin: Points) -> Canvas:
        for _ in range(max(1, int(count * rng.uniform(0.6, 1.4)))):
            steps = int(length * rng.uniform(0.6, 1.4)) + 3
            points, _end = walk(rng, steps, 5, curvature, _anywhere(rng), rng.uniform(0, TURN))
            taper = 1 - 0.5 * np.abs(np.linspace(-1, 1, steps)) ** 3
            own_width = width * np.exp(rng.normal(0, 0.15))
            canvas.tube(points, own_width * taper, label, rng.normal(0, 0.05))
        return canvas

    return draw


def _fibres(rng: np.random.Generator) -> Draw:
    width, curvature = log_uniform(rng, 1.3, 11), rng.uniform(0.008, 0.08)
    count = _tube_count(rng, width)

    def draw(rng: np.random.Generator, canvas: Canvas, label: int, origin: Points) -> Canvas:
        for _ in range(count):
            points, _end = walk(rng, 70, 6, curvature, _anywhere(rng), rng.uniform(0, TURN))
            own_width = width * np.exp(rng.normal(0, 0.4))
            canvas.tube(points, np.full(70, own_width), label, rng.normal(0, 0.05))
        return canvas

    return draw


def _network(rng: np.random.Generator) -> Draw:
    resolution = int(rng.integers(4, 12))
    threshold = rng.uniform(0.05, 0.2) * (log_uniform(rng, 1.3, 11) / 4 + 0.3)

    def draw(rng: np.random.Generator, canvas: Canvas, label: int, origin: Points) -> Canvas:
        labels = canvas.labels()
        labels[np.abs(smooth_noise(rng, 1, resolution, len(labels))[0]) < threshold] = label
        return Canvas(labels)

    return draw


def membranes(rng: np.random.Generator, subjects: int, size: int) -> Scene:
    """Cells that fill the frame and touch: their membranes, or small bodies inside them."""
    resolution = int(rng.integers(6, 16))
    thickness = max(1, round(int(rng.choice([1, 2, 5, 7])) * size / DESIGN_SIZE))
    blob = Blob.draw(rng, rng.uniform(3, 9), 0.1, 2) if rng.random() < 0.5 else None
    labels = np.zeros((subjects, size, size), np.uint8)
    shade = np.zeros(labels.shape, np.float32)
    for i in range(subjects):
        cell = smooth_noise(rng, 8, resolution, size).argmax(0)
        edge = np.zeros((size, size), np.uint8)
        edge[:, 1:] |= cell[:, 1:] != cell[:, :-1]
        edge[1:] |= cell[1:] != cell[:-1]
        shade[i] = rng.normal(0, 0.06, 8).astype(np.float32)[cell]
        if blob is not None:
            canvas = Canvas(labels[i])
            for _ in range(int(rng.integers(5, 40))):
                canvas.polygon(_anywhere(rng) + blob.relative(rng), object_label(0))
            labels[i] = canvas.labels()
        labels[i][ndimage.maximum_filter(edge, thickness) > 0] = object_label(1)
    candidates: list[tuple[int, ...]] = [(object_label(1),)] * 2
    candidates += [(object_label(0),)] if blob else []
    return Scene(labels, shade, candidates, deformation=0.2)


def centred_blobs(rng: np.random.Generator, subjects: int, size: int) -> Scene:
    """One blob near the middle of each subject: the plain task that always satisfies the limits on a mask."""
    blob = Blob.draw(rng, 40, 0.08, 1.4)
    canvases = [Canvas(np.zeros((size, size), np.uint8)) for _ in range(subjects)]
    for canvas in canvases:
        canvas.polygon(rng.normal(CENTRE, 8, 2) + blob.relative(rng), object_label(0))
    return Scene(*collect(canvases), [(object_label(0),)], deformation=0)


Family = Callable[[np.random.Generator, int, int], Scene]

# Each family and how often it is drawn.
FAMILIES: dict[str, tuple[Family, float]] = {
    "regions": (regions, 0.12),
    "organs": (organs, 0.24),
    "cells": (cells, 0.18),
    "lesion": (lesion, 0.22),
    "tubes": (tubes, 0.12),
    "membranes": (membranes, 0.06),
    "layers": (layers, 0.06),
}
