"""The structures of a task before rendering: label maps, their backgrounds, and the warp between subjects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from icseg.data.synthetic.fields import smooth_noise
from icseg.data.synthetic.shapes import DESIGN_SIZE, Canvas

# Labels below FIRST_OBJECT are background; object k owns the three labels from object_label(k) on.
FIRST_OBJECT = 16
LABELS = 48

Labels = NDArray[np.uint8]
Shade = NDArray[np.float32]


def object_label(index: int) -> int:
    """The first of the three labels (body, core, rim) that object `index` owns."""
    return FIRST_OBJECT + 3 * index


@dataclass
class Scene:
    """Label maps of all subjects, and what may be asked for in them.

    labels:      [N, H, W], below LABELS.
    shade:       [N, H, W] intensity offset of single objects.
    candidates:  sets of labels of which one becomes the foreground.
    deformation: strength of the further warp between subjects.
    faint:       probability that the foreground is rendered with a low contrast.
    """

    labels: Labels
    shade: Shade
    candidates: list[tuple[int, ...]]
    deformation: float
    faint: float = 0.2


def noise_regions(
    rng: np.random.Generator, subjects: int, regions: int, resolution: int, size: int, shared: bool
) -> Labels:
    """Where which of `regions` smooth noises is largest; the same map for every subject if `shared`."""
    maps = 1 if shared else subjects
    best = smooth_noise(rng, maps, resolution, size)
    labels = np.zeros(best.shape, np.uint8)
    for region in range(1, regions):
        field = smooth_noise(rng, maps, resolution, size)
        labels[field > best] = region
        np.maximum(best, field, out=best)
    return np.repeat(labels, subjects, 0) if shared else labels


def layer_maps(rng: np.random.Generator, subjects: int, layers: int, variability: float, size: int) -> Labels:
    """Stacked bands 0 to `layers`, bent alike in all subjects, shifted and rippled differently."""
    scale = size / DESIGN_SIZE
    depth = np.sort(rng.uniform(0.15, 0.85, layers)) * size
    amplitude = rng.uniform(3, 25) * scale
    bend = smooth_noise(rng, 1, 3, size)[0, 0] * amplitude
    ripple = rng.uniform(0.5, 3) * scale
    rows = np.arange(size)[:, None]
    labels = np.zeros((subjects, size, size), np.uint8)
    for subject in labels:
        own = smooth_noise(rng, 1, int(rng.integers(2, 6)), size)[0, 0] * amplitude * variability * 0.6
        curve = bend * rng.uniform(0.3, 1) + own + rng.normal(0, 15 * variability * scale)
        small = smooth_noise(rng, layers, int(rng.integers(3, 12)), size)[:, 0] * ripple
        shift = rng.normal(0, 3 * variability * scale, layers)
        for i in range(layers):
            subject[rows > (depth[i] + shift[i] + curve + small[i])[None]] = i + 1
    return labels


def background(rng: np.random.Generator, subjects: int, size: int, shared: float) -> Labels:
    """Plain, patchy or layered backgrounds; `shared`: the probability of the same patches in all subjects."""
    kind = rng.random()
    if kind < 0.4:
        return np.zeros((subjects, size, size), np.uint8)
    if kind < 0.52:
        return layer_maps(rng, subjects, int(rng.integers(2, 6)), 1, size)
    resolution = int(rng.integers(2, 10))
    regions = int(rng.integers(2, 6))
    return noise_regions(rng, subjects, regions, resolution, size, rng.random() < shared)


def collect(canvases: list[Canvas]) -> tuple[Labels, Shade]:
    """The label maps and shades of all subjects' canvases, [N, H, W] each."""
    return np.stack([c.labels() for c in canvases]), np.stack([c.shade() for c in canvases])


def warp(rng: np.random.Generator, labels: Labels, shade: Shade, strength: float) -> tuple[Labels, Shade]:
    """Deform each subject on its own: rotation, scale, shift and smooth displacement of three finenesses."""
    subjects, size, _ = labels.shape
    angle = rng.normal(0, 0.12 * strength, subjects)
    stretch = np.exp(rng.normal(0, 0.1 * strength, (2, subjects)))
    if rng.random() < 0.12:
        stretch *= np.exp(np.clip(rng.normal(-0.2, 0.35, subjects), -0.8, 0.2))
    shift = rng.normal(0, 0.05 * strength, (2, subjects))
    axis = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    y, x = axis[:, None], axis[None]
    source = []
    for i, (u, v, sine) in enumerate(((y, x, 1), (x, y, -1))):
        flow = (
            0.036 * smooth_noise(rng, subjects, 3, size)
            + 0.016 * smooth_noise(rng, subjects, 6, size)
            + 0.005 * smooth_noise(rng, subjects, 14, size)
        )
        along = (np.cos(angle) * stretch[i]).astype(np.float32)[:, None, None] * u
        across = (sine * np.sin(angle)).astype(np.float32)[:, None, None] * v
        place = along + across + shift[i].astype(np.float32)[:, None, None] + np.float32(strength) * flow
        source.append(_reflected(np.rint((place + 0.5) * (size - 1)).astype(np.int32), size))
    index = np.arange(subjects)[:, None, None], source[0], source[1]
    return labels[index], shade[index]


def _reflected(index: NDArray[np.int32], size: int) -> NDArray[np.int32]:
    """Indices outside [0, size) mirrored at the border."""
    index = index % (2 * size)
    return np.minimum(index, 2 * size - 1 - index)
