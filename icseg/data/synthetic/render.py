"""From label maps to grey images: intensities, textures, then a chain of random imaging effects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from icseg.data.synthetic.fields import Array, blur, fractal_noise, smooth_noise
from icseg.data.synthetic.scene import FIRST_OBJECT, LABELS, Labels, Scene
from icseg.data.synthetic.shapes import DESIGN_SIZE, TURN, Canvas, walk


@dataclass
class _Picture:
    """What the effects work on.

    image: [N, H, H], mask: [N, H, H] in {0, 1}, labels: [N, H, H], visible: [N, H, H], False outside a field of view.
    scale: pixels per design pixel. grain: factor on all variation within a label, below 1 for low contrast.
    """

    image: Array
    mask: Array
    labels: Labels
    visible: NDArray[np.bool_]
    scale: float
    grain: float


def render(
    rng: np.random.Generator, scene: Scene, foreground: tuple[int, ...]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.bool_]]:
    """Images [N, H, H], 0 to 255, and masks [N, H, H], 0 or 1, of `scene` with `foreground` asked for.

    The third array, [N, H, H], is False where an image shows nothing of the scene; no mask reaches there.
    """
    labels = scene.labels
    mask = np.isin(np.arange(LABELS), foreground)
    decoys = _decoys(rng, labels, foreground)
    faint = rng.random() < scene.faint
    means = _intensities(rng, labels, mask, foreground, decoys, faint)
    offset = (np.arange(len(labels)) * LABELS)[:, None, None]
    grain = 0.2 if faint else 1
    picture = _Picture(
        image=means.ravel()[labels + offset] + np.float32(grain) * scene.shade,
        mask=mask.astype(np.float32)[labels],
        labels=labels,
        visible=np.ones(labels.shape, np.bool_),
        scale=labels.shape[-1] / DESIGN_SIZE,
        grain=grain,
    )
    if rng.random() < 0.2:
        picture.image = blur(picture.image, rng.uniform(1, 5) * picture.scale)
    _add_textures(rng, picture, [*foreground, *decoys])
    for probability, effect in EFFECTS:
        if rng.random() < probability:
            effect(rng, picture)
    return _quantised(rng, picture.image), (picture.mask * picture.visible).astype(np.uint8), picture.visible


def _decoys(rng: np.random.Generator, labels: Labels, foreground: tuple[int, ...]) -> list[int]:
    """Labels of other objects that shall look like the foreground, so that only place or shape tells."""
    if rng.random() > 0.25:
        return []
    owners = {(label - FIRST_OBJECT) // 3 for label in foreground}
    present = np.flatnonzero(np.bincount(labels[0].ravel(), minlength=LABELS))
    others = [int(i) for i in present if i >= FIRST_OBJECT and (i - FIRST_OBJECT) // 3 not in owners]
    return [label for label in others if rng.random() < 0.6]


def _intensities(
    rng: np.random.Generator,
    labels: Labels,
    mask: NDArray[np.bool_],
    foreground: tuple[int, ...],
    decoys: list[int],
    faint: bool,
) -> Array:
    """[N, LABELS] mean intensity of each label in each subject."""
    means = rng.uniform(0, 1, LABELS)
    inside = list(foreground)
    if rng.random() < 0.7:
        means[inside] = means[inside[0]] + rng.normal(0, 0.03, len(inside))
    area = np.bincount(labels.ravel(), minlength=LABELS)
    surrounding = means[int(np.argmax(area * ~mask))]
    if faint or rng.random() < 0.75:
        contrast = (rng.uniform(0.05, 0.15) if faint else rng.uniform(0.12, 0.6)) * rng.choice([-1, 1])
        if not 0 <= surrounding + contrast <= 1:
            contrast = -contrast
        means[inside] += np.clip(surrounding + contrast, 0, 1) - means[inside[0]]
    means[decoys] = means[inside[0]] + rng.normal(0, 0.02, len(decoys))
    spread = 0.01 if faint else float(rng.choice([0.02, 0.05, 0.08]))
    return (means + rng.normal(0, spread, (len(labels), LABELS))).astype(np.float32)


def _add_textures(rng: np.random.Generator, picture: _Picture, alike: list[int]) -> None:
    """Textures from coarse to fine, each with its own strength per label; the labels `alike` share theirs."""
    count, size, _ = picture.image.shape
    textures = [
        fractal_noise(rng, count, int(rng.integers(3, 8)), 3, size),
        fractal_noise(rng, count, int(rng.integers(20, 60)), 2, size),
        smooth_noise(rng, count, int(rng.integers(90, 256)), size),
    ]
    if rng.random() < 0.3:
        textures.append(_stripes(rng, count, size))
    strongest = float(rng.choice([0.03, 0.1, 0.2])) * picture.grain
    for texture in textures:
        strength = rng.uniform(0, strongest, LABELS) * (rng.random(LABELS) < 0.5)
        strength[alike] = strength[alike[0]]
        picture.image += strength.astype(np.float32)[picture.labels] * texture


def _stripes(rng: np.random.Generator, count: int, size: int) -> Array:
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(0.1, 0.9) * DESIGN_SIZE / size
    axis = np.arange(size, dtype=np.float32) * np.float32(frequency)
    phase = np.float32(np.sin(angle)) * axis[:, None] + np.float32(np.cos(angle)) * axis[None]
    return np.sin(phase[None] + 2 * smooth_noise(rng, count, 4, size))


def _halo(rng: np.random.Generator, picture: _Picture) -> None:
    soft = blur(picture.mask, rng.uniform(1, 6) * picture.scale)
    ring = soft * (1 - soft)
    if rng.random() < 0.5:
        ring *= 2 * picture.mask
    picture.image += np.float32(rng.uniform(-0.6, 0.6) * picture.grain) * ring


def _dome(rng: np.random.Generator, picture: _Picture) -> None:
    soft = blur(picture.mask, rng.uniform(4, 14) * picture.scale)
    picture.image += np.float32(rng.uniform(-0.3, 0.3) * picture.grain) * picture.mask * soft


def _outlines(rng: np.random.Generator, picture: _Picture) -> None:
    labels = picture.labels
    edge = np.zeros(labels.shape, np.float32)
    edge[:, :, 1:] = labels[:, :, 1:] != labels[:, :, :-1]
    edge[:, 1:] = np.maximum(edge[:, 1:], labels[:, 1:] != labels[:, :-1])
    strength = np.float32(rng.uniform(-0.5, 0.5) * picture.grain)
    picture.image += strength * blur(edge, rng.uniform(0.6, 1.6) * picture.scale)


def _hairs(rng: np.random.Generator, picture: _Picture) -> None:
    for image in picture.image:
        canvas = Canvas(np.zeros(image.shape, np.uint8))
        for _ in range(int(rng.integers(2, 14))):
            points, _end = walk(rng, 25, 6, 0.08, rng.uniform(0, DESIGN_SIZE, 2), rng.uniform(0, TURN))
            canvas.tube(points, np.full(25, rng.uniform(1, 2.2)), 1)
        image[canvas.labels() > 0] = rng.uniform(-0.1, 0.3)


def _highlights(rng: np.random.Generator, picture: _Picture) -> None:
    count, size, _ = picture.image.shape
    field = smooth_noise(rng, count, int(rng.integers(12, 50)), size)
    picture.image += np.float32(rng.uniform(0.3, 0.8)) * (field > rng.uniform(2.2, 2.8))


def _ultrasound(rng: np.random.Generator, picture: _Picture) -> None:
    """Soft borders, a shadow or an echo behind the object, attenuation with depth and speckle."""
    count, size, _ = picture.image.shape
    image = blur(picture.image, rng.uniform(1, 4) * picture.scale)
    behind = np.maximum.accumulate(picture.mask, 1) * (1 - picture.mask)
    image *= 1 + np.float32(rng.uniform(-0.7, 0.5)) * blur(behind, 4 * picture.scale)
    image *= np.exp(np.float32(rng.uniform(-1, 0.6)) * np.linspace(0, 1, size, dtype=np.float32)[:, None])
    speckle = blur(rng.standard_normal((count, size, size), dtype=np.float32), rng.uniform(0.5, 1.3))
    speckle /= speckle.std()
    picture.image = image * np.exp(np.float32(rng.uniform(0.1, 0.5) * picture.grain) * speckle)


def _optical_blur(rng: np.random.Generator, picture: _Picture) -> None:
    picture.image = blur(picture.image, rng.uniform(0.2, 1.8) * picture.scale)


def _bias_field(rng: np.random.Generator, picture: _Picture) -> None:
    count, size, _ = picture.image.shape
    field = smooth_noise(rng, count, int(rng.integers(2, 4)), size)
    picture.image *= np.exp(np.float32(rng.uniform(0.05, 0.35) * picture.grain) * field)


def _white_noise(rng: np.random.Generator, picture: _Picture) -> None:
    noise = rng.standard_normal(picture.image.shape, dtype=np.float32)
    picture.image += np.float32(rng.uniform(0, 0.09) * picture.grain) * noise


def _correlated_noise(rng: np.random.Generator, picture: _Picture) -> None:
    noise = blur(rng.standard_normal(picture.image.shape, dtype=np.float32), rng.uniform(0.5, 1.2))
    picture.image += np.float32(rng.uniform(0.02, 0.12) * picture.grain) * noise / noise.std()


def _speckle(rng: np.random.Generator, picture: _Picture) -> None:
    noise = blur(rng.standard_normal(picture.image.shape, dtype=np.float32), rng.uniform(0.3, 1.2))
    picture.image *= 1 + np.float32(rng.uniform(0.05, 0.3) * picture.grain) * noise / noise.std()


def _aperture(rng: np.random.Generator, picture: _Picture) -> None:
    """A round field of view; what lies outside is black (rarely grey) and no foreground."""
    size = picture.image.shape[-1]
    radius = rng.uniform(100, 150) * picture.scale
    axis = np.arange(size) - size / 2
    for image, visible in zip(picture.image, picture.visible, strict=True):
        y, x = rng.normal(0, 3 * picture.scale, 2)
        outside = (axis[:, None] - y) ** 2 + (axis[None] - x) ** 2 > radius**2
        image[outside] = image.min() if rng.random() < 0.95 else 0.5
        visible[outside] = False


def _reversal(rng: np.random.Generator, picture: _Picture) -> None:
    """Some subjects have dark and bright exchanged."""
    reversed_ = rng.random(len(picture.image)) < 0.5
    picture.image[reversed_] *= -1


# In the order of imaging: the object, the optics, the detector, the frame.
EFFECTS: tuple[tuple[float, Callable[[np.random.Generator, _Picture], None]], ...] = (
    (0.35, _halo),
    (0.25, _dome),
    (0.35, _outlines),
    (0.12, _hairs),
    (0.15, _highlights),
    (0.12, _ultrasound),
    (0.75, _optical_blur),
    (0.6, _bias_field),
    (0.2, _speckle),
    (0.6, _white_noise),
    (0.2, _correlated_noise),
    (0.18, _aperture),
    (0.04, _reversal),
)


def _quantised(rng: np.random.Generator, image: Array) -> NDArray[np.uint8]:
    """8-bit images: percentiles to the full range, then each subject's own gamma, gain and offset."""
    count = len(image)
    low, high = np.quantile(image.reshape(count, -1)[:, ::7], [0.005, 0.995], axis=1)[..., None, None]
    unit = np.clip((image - low) / (high - low + 1e-4), 0, 1)
    gamma = rng.uniform(0.6, 1.7) * np.exp(rng.normal(0, 0.08, (count, 1, 1)))
    unit = unit.astype(np.float32) ** gamma.astype(np.float32)
    if rng.random() < 0.3:
        gain = rng.uniform(0.6, 1, (count, 1, 1))
        unit = unit * gain + rng.uniform(0, 1, (count, 1, 1)) * (1 - gain)
    return np.rint(unit * 255).astype(np.uint8)
