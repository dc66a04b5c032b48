"""One synthetic in-context task: several subjects that show the same structure, with its masks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from icseg.data.synthetic.labels import FAMILIES, centred_blobs
from icseg.data.synthetic.render import render
from icseg.data.synthetic.scene import Scene, warp
from icseg.data.synthetic.shapes import DESIGN_SIZE

# Raised whenever the same seed no longer gives the same task.
GENERATOR_VERSION = 2
MAX_CLASSES = 4

MIN_SIZE = 32
_MIN_PIXELS = 60  # of a mask, at the design size
_MEAN_FRACTION = (0.006, 0.5)
_SCENES = 20
_CHOICES = 4


@dataclass(frozen=True)
class SyntheticTask:
    """One task.

    images: [N, H, W] uint8.
    masks:  [N, H, W] uint8 class ids: 0 is background, 1 the structure that the task is about, 2 to at most MAX_CLASSES
            further ones of the same scene. Every class up to the largest is in every image.
    family: a key of FAMILIES.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    family: str


def generate_task(seed: int, subjects: int, size: int = DESIGN_SIZE, family: str | None = None) -> SyntheticTask:
    """The task of `seed`: a pure function of its arguments.

    subjects: images in the task, support and targets alike. size: height and width in pixels, at least 32.
    family:   one of FAMILIES; None draws one. Raises ValueError for an argument out of range.
    """
    check_arguments(seed, subjects, size)
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    rng = np.random.default_rng((seed,))
    # A stream of its own: the images and class 1 do not depend on the further classes.
    further_rng = np.random.default_rng(np.random.SeedSequence((seed,), spawn_key=(1,)))
    names, weights = list(FAMILIES), [weight for _, weight in FAMILIES.values()]
    name = family
    for _ in range(_SCENES):
        name = family or names[rng.choice(len(names), p=weights)]
        scene = FAMILIES[name][0](rng, subjects, size)
        labels, shade = warp(rng, scene.labels, scene.shade, scene.deformation)
        task = _render_valid(rng, further_rng, replace(scene, labels=labels, shade=shade), name)
        if task is not None:
            return task
    scene = centred_blobs(rng, subjects, size)
    images, masks, _visible = render(rng, scene, scene.candidates[0])
    return SyntheticTask(images, masks, str(name))


def check_arguments(seed: int, subjects: int, size: int) -> None:
    """Raise ValueError unless tasks can be made from these."""
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if subjects < 1:
        raise ValueError(f"subjects must be at least 1, got {subjects}")
    if size < MIN_SIZE:
        raise ValueError(f"size must be at least {MIN_SIZE}, got {size}")


def _render_valid(
    rng: np.random.Generator, further_rng: np.random.Generator, scene: Scene, family: str
) -> SyntheticTask | None:
    """The first of a few choices of foreground whose masks satisfy the limits."""
    for _ in range(_CHOICES):
        foreground = scene.candidates[rng.integers(len(scene.candidates))]
        if not _valid(np.isin(scene.labels, foreground)):
            continue
        images, masks, visible = render(rng, scene, foreground)
        if _valid(masks):
            _add_further_classes(further_rng, masks, scene, foreground, visible)
            return SyntheticTask(images, masks, family)
    return None


def _add_further_classes(
    rng: np.random.Generator,
    masks: NDArray[np.uint8],
    scene: Scene,
    foreground: tuple[int, ...],
    visible: NDArray[np.bool_],
) -> None:
    """Write other candidates of the scene into `masks`, in a drawn order: what shares no label and is valid."""
    taken, classes = set(foreground), 1
    for i in rng.permutation(len(scene.candidates)):
        candidate = scene.candidates[i]
        if classes == MAX_CLASSES or not taken.isdisjoint(candidate):
            continue
        mask = np.isin(scene.labels, candidate) & visible
        if _valid(mask):
            classes += 1
            masks[mask] = classes
            taken.update(candidate)


def _valid(masks: NDArray[np.generic]) -> bool:
    fractions = masks.mean((1, 2))
    low, high = _MEAN_FRACTION
    return bool(fractions.min() >= _MIN_PIXELS / DESIGN_SIZE**2 and low < fractions.mean() < high)
