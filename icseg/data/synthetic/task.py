"""Synthetic in-context tasks: subjects that show the same structure, with its masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icseg.data.synthetic.anatomy import CENTRE, chambers, layers, new_scene, organs, regions
from icseg.data.synthetic.appearance import Look
from icseg.data.synthetic.curves import fibres, membranes, network, trees, worms
from icseg.data.synthetic.effects import field_of_view
from icseg.data.synthetic.objects import cells, echoes, lesions
from icseg.data.synthetic.random import Draws
from icseg.data.synthetic.render import render
from icseg.data.synthetic.scene import FIRST_OBJECT, LABELS, Scene, object_label, warp_index
from icseg.data.synthetic.shapes import DESIGN_SIZE, Blob, Objects

# Raised whenever the same seed no longer gives the same task.
GENERATOR_VERSION = 5
MAX_CLASSES = 4

MIN_SIZE = 32
_MIN_PIXELS = 60  # of a mask, at the design size
_MEAN_FRACTION = (0.006, 0.5)
_ATTEMPTS = 12
_LARGEST_BATCH = {"cpu": 2**20, "cuda": 2**26}  # pixels that are worked on together: the caches' or the memory's size


@dataclass(frozen=True)
class Family:
    """A kind of task.

    scene:  draws the structures, from (draws, subjects, size).
    weight: how often it is drawn. faint: probability of a low contrast of the foreground.
    sector: probability that the field of view is an ultrasound probe's. effects: probabilities of single effects.
    """

    scene: Callable[[Draws, int, int], Scene]
    weight: float
    faint: float = 0.2
    sector: float = 0.03
    effects: dict[str, float] = field(default_factory=dict)


_ENDOSCOPY = {"relief": 0.9, "highlights": 0.5, "vignette": 0.4, "outlines": 0.15, "hairs": 0.0}
_TRANSMISSION = {"stain": 0.4}
_SONOGRAPHY = {"ultrasound": 1.0, "fading": 0.4, "hairs": 0.0, "relief": 0.0, "stain": 0.0}

FAMILIES: dict[str, Family] = {
    "regions": Family(regions, 0.08),
    "layers": Family(layers, 0.06),
    "organs": Family(organs, 0.16),
    "chambers": Family(chambers, 0.1),
    "cells": Family(cells, 0.11),
    "stained cells": Family(cells, 0.05, effects=_TRANSMISSION),
    "lesions": Family(lesions, 0.11),
    "polyps": Family(lesions, 0.08, faint=0.7, effects=_ENDOSCOPY),
    "echoes": Family(echoes, 0.09, faint=0.35, sector=0.35, effects=_SONOGRAPHY),
    "trees": Family(trees, 0.06, faint=0.6),
    "worms": Family(worms, 0.03, faint=0.3),
    "fibres": Family(fibres, 0.02, faint=0.3),
    "network": Family(network, 0.02, faint=0.3),
    "membranes": Family(membranes, 0.05, faint=0.3),
}


@dataclass(frozen=True)
class SyntheticTask:
    """One task.

    images: [N, H, W] uint8.
    masks:  [N, H, W] uint8 class ids: 0 is background, 1 the structure that the task is about, 2 to at most MAX_CLASSES
            further ones of the same scene. Every class up to the largest is in every image, but that class 1 may be
            absent from the last one.
    family: a key of FAMILIES.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    family: str


@dataclass(frozen=True)
class TaskTensors:
    """A SyntheticTask whose images and masks [N, H, W] are uint8 tensors."""

    images: Tensor
    masks: Tensor
    family: str


@dataclass
class TaskBatch:
    """T tasks: images and masks uint8 [T, N, H, H] as in SyntheticTask; families: keys of FAMILIES."""

    images: Tensor
    masks: Tensor
    families: list[str]

    def tensors(self, index: int) -> TaskTensors:
        """One task, on its device."""
        return TaskTensors(self.images[index], self.masks[index], self.families[index])

    def __getitem__(self, index: int) -> SyntheticTask:
        images, masks = (t[index].cpu().numpy() for t in (self.images, self.masks))
        return SyntheticTask(images, masks, self.families[index])


def generate_task(
    seed: int, subjects: int, size: int = DESIGN_SIZE, family: str | None = None, absent: float = 0.0
) -> SyntheticTask:
    """The task of one seed; see `generate_tasks`."""
    return generate_tasks([seed], subjects, size, family=family, absent=absent)[0]


def generate_tasks(
    seeds: Sequence[int] | Tensor,
    subjects: int,
    size: int = DESIGN_SIZE,
    *,
    family: str | None = None,
    absent: float = 0.0,
    device: str | torch.device = "cpu",
) -> TaskBatch:
    """The tasks of `seeds`, made on `device`; each depends on its seed and the other arguments alone.

    On another device, or with another number of threads, single pixels may differ by rounding.
    subjects: images a task, support and targets alike. size: height and width in pixels, at least 32.
    family:   one of FAMILIES; None draws one for each task.
    absent:   probability that the last subject lacks class 1, in families of objects.
    Raises ValueError for an argument out of range.
    """
    seeds = torch.as_tensor(seeds, dtype=torch.int64, device=device)
    if seeds.ndim != 1:
        raise ValueError(f"seeds must be a list or a tensor [T], got shape {list(seeds.shape)}")
    check_arguments(int(seeds.min()) if len(seeds) else 0, subjects, size, absent)
    if family is not None and family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    shape = (len(seeds), subjects, size, size)
    images = torch.zeros(shape, dtype=torch.uint8, device=device)
    masks = torch.zeros_like(images)
    names = list(FAMILIES)
    kinds = torch.full((len(seeds),), -1, device=device)
    missing = torch.arange(len(seeds), device=device)
    at_once = max(1, _LARGEST_BATCH.get(images.device.type, 2**22) // (subjects * size * size))
    for attempt in range(_ATTEMPTS + 1):
        draws = Draws(seeds).of(missing, attempt)
        kinds[missing] = _draw_families(draws, family)
        for kind, name in enumerate(names):
            chosen = (kinds[missing] == kind).nonzero().squeeze(1)
            for part in chosen.split(at_once) if len(chosen) else ():
                chain = FAMILIES[name] if attempt < _ATTEMPTS else _PLAIN
                valid, *made = _attempt(draws.of(part, 0), chain, subjects, size, absent)
                done = missing[part[valid]]
                images[done], masks[done] = made
        missing = missing[masks[missing].flatten(1).amax(1) == 0]
        if not len(missing):
            break
    return TaskBatch(images, masks, [names[k] for k in kinds.tolist()])


def check_arguments(seed: int, subjects: int, size: int, absent: float) -> None:
    """Raise ValueError unless tasks can be made from these."""
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    if subjects < 1:
        raise ValueError(f"subjects must be at least 1, got {subjects}")
    if size < MIN_SIZE:
        raise ValueError(f"size must be at least {MIN_SIZE}, got {size}")
    if not 0 <= absent <= 1 or (absent and subjects < 2):
        raise ValueError(f"absent must lie in [0, 1], and be 0 for a single subject, got {absent}")


def _draw_families(draws: Draws, family: str | None) -> Tensor:
    """int64 [T]"""
    names = list(FAMILIES)
    if family is not None:
        return torch.full((len(draws),), names.index(family), device=draws.device)
    weight = torch.tensor([FAMILIES[name].weight for name in names], device=draws.device).cumsum(0)
    return torch.searchsorted(weight / weight[-1], draws.uniform(0, 1)).clamp(max=len(names) - 1)


def _attempt(draws: Draws, family: Family, subjects: int, size: int, absent: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which tasks [T] have a class that satisfies the limits, and the images and masks [valid, N, H, H] of those."""
    scene = family.scene(draws.of(torch.arange(len(draws), device=draws.device), 0), subjects, size)
    index = warp_index(draws, subjects, scene.deformation, size)
    code, background = (t.flatten(2).gather(2, index).view(t.shape) for t in (scene.canvas.code, scene.background))
    shade, under = scene.canvas.shade(code), torch.zeros_like(background, dtype=torch.float32)
    if scene.background_shade is not None:
        under = scene.background_shade.flatten(2).gather(2, index).view(code.shape)
        shade = torch.where(code > 0, shade, under)
    labels = scene.canvas.labels(code, background)
    seen = field_of_view(draws, subjects, size, family.sector)
    area = _areas(torch.where(seen, labels, LABELS))[..., :LABELS]
    classes, valid = _choose_classes(draws, scene, area / size**2)
    valid = valid.nonzero().squeeze(1)
    draws, classes, labels, background, shade, under, seen = (
        draws.of(valid, 1), *(t[valid] for t in (classes, labels, background, shade, under, seen))
    )  # fmt: skip
    foreground = classes == 1
    lacking = draws.chance(absent) & ~foreground[:, :FIRST_OBJECT].any(1)
    gone = foreground.gather(1, labels[:, -1].flatten(1)).view_as(labels[:, -1]) & lacking.view(-1, 1, 1)
    labels[:, -1] = torch.where(gone, background[:, -1], labels[:, -1])
    shade[:, -1] = torch.where(gone, under[:, -1], shade[:, -1])
    area = _areas(labels)[..., :LABELS]
    look = Look.draw(draws, foreground, area.sum(1) > 0, scene.lookalikes, family.faint)
    images = render(draws, labels, shade, area, look, seen, family.effects)
    masks = classes.gather(1, labels.flatten(1)).view_as(labels) * seen
    return valid, images, masks.to(torch.uint8)


def _areas(labels: Tensor) -> Tensor:
    """[T, N, LABELS + 1] pixels of each label of [T, N, H, H]."""
    rows, bins = labels.shape[0] * labels.shape[1], LABELS + 1
    offset = torch.arange(rows, device=labels.device).view(*labels.shape[:2], 1, 1) * bins
    return torch.bincount((labels + offset).flatten(), minlength=rows * bins).view(*labels.shape[:2], bins)


def _choose_classes(draws: Draws, scene: Scene, share: Tensor) -> tuple[Tensor, Tensor]:
    """Class ids int64 [T, LABELS] of the labels (0: none), and which tasks have a class 1; share [T, N, LABELS]."""
    tables = torch.stack([table for table, _ in scene.candidates], 1)  # [T, C, LABELS]
    weight = torch.stack([weight for _, weight in scene.candidates], 1)
    covered = share.float() @ tables.float().mT  # [T, N, C]
    mean = covered.mean(1)
    valid = (weight > 0) & (covered.amin(1) >= _MIN_PIXELS / DESIGN_SIZE**2)
    valid &= (mean > _MEAN_FRACTION[0]) & (mean < _MEAN_FRACTION[1])
    count = tables.shape[1]
    noise = -(-draws.uniform(0, 1, count).log()).log()
    order = torch.where(valid, weight.log() + noise, -torch.inf).argsort(1, descending=True)
    classes = torch.zeros(tables.shape[0], LABELS, dtype=torch.int64, device=draws.device)
    found = torch.zeros_like(classes[:, 0])
    for number in order.unbind(1):
        table = tables.gather(1, number.view(-1, 1, 1).expand(-1, 1, LABELS)).squeeze(1)
        free = valid.gather(1, number.unsqueeze(1)).squeeze(1) & ~((classes > 0) & table).any(1)
        free &= found < MAX_CLASSES
        found = found + free
        classes = torch.where(table & free.unsqueeze(1), found.unsqueeze(1), classes)
    return classes, found > 0


def _centred_blobs(draws: Draws, subjects: int, size: int) -> Scene:
    """One blob near the middle of each subject: the plain task that always satisfies the limits on a mask."""
    scene = new_scene(draws, torch.zeros(len(draws), subjects, size, size, dtype=torch.int64, device=draws.device))
    blob = Blob.draw(draws, torch.full((len(draws), 1), 40.0, device=draws.device), 0.08, 1.4)
    kind = torch.zeros(len(draws), subjects, 1, dtype=torch.int64, device=draws.device)
    place = CENTRE + draws.normal(8.0, subjects, 1, 2)
    scene.canvas.blobs(Objects(place, blob.of(kind).relatives(draws, subjects, 1), object_label(0)))
    scene.offer(1.0, object_label(0))
    scene.deformation = torch.zeros(len(draws), device=draws.device)
    return scene


_PLAIN = Family(_centred_blobs, 0.0, sector=0.0)
