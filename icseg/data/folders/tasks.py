"""Training tasks of a data set."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from icseg.data.folders.cache import Entry, cached_entries
from icseg.data.folders.config import SourceConfig
from icseg.data.folders.listing import Listing
from icseg.inputs import MOST_CLASSES

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderTask:
    """One task: images uint8 [N, H, W], of different patients; masks uint8 [N, H, W] of class ids.

    1 is the class that the task is about, 2 and up the others that are in all of its images; 0 is background.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]


@dataclass(frozen=True)
class _Slice:
    entry: Entry
    plane: int
    patient: str | None

    def holds(self, class_id: int, least_pixels: int) -> bool:
        return self.entry.pixels[self.plane].get(class_id, 0) >= least_pixels


def open_data_set(
    listing: Listing, directory: Path, *, images: int, size: int, seed: Sequence[int], progress: bool = True
) -> DataSet:
    """Read what is not yet in the cache `directory`, and make the data set's tasks of `images` images [size, size].

    A class that too few patients have is left out, with a note in the log of this module. Raises ValueError if that
    leaves none, for a class that no image has, or that names an unfit file.
    """
    config = listing.config
    known = {item.patient for item in listing.items}
    if None not in known:  # those of a pack are in it
        _check_patients(config.name, images, len(known))
    entries = cached_entries(listing, directory, size, progress=progress)
    slices = [
        _Slice(entry, plane, entry.patients[plane] if entry.patients else item.patient)
        for item, entry in zip(listing.items, entries, strict=True)
        for plane in range(len(entry.pixels))
    ]
    names = dict(listing.class_names)
    for entry in entries:
        names |= entry.class_names
    classes = _chosen(config, slices, names)
    holders = {c: _by_patient(slices, c, config.least_pixels) for c in classes}
    _check_patients(config.name, images, max(map(len, holders.values()), default=0), "of one class ")
    usable = {c: patients for c, patients in holders.items() if len(patients) >= images}
    if len(usable) < len(classes):
        few = ", ".join(f"{names.get(c, c)} ({len(holders[c])})" for c in classes if c not in usable)
        _LOG.warning("data set %s: classes of fewer than %d patients left out: %s", config.name, images, few)
    return DataSet(usable, classes, images, tuple(seed), config.least_pixels)


def _check_patients(name: str, wanted: int, found: int, of_what: str = "") -> None:
    if found < wanted:
        raise ValueError(
            f"data set {name} must have images {of_what}of at least {wanted} patients, for the supports and targets of "
            f"a task, got {found}"
        )


class DataSet:
    """The tasks of a data set: as many as are asked for, each a function of the seed and its number."""

    def __init__(
        self,
        holders: dict[int, list[list[_Slice]]],
        classes: Sequence[int],
        images: int,
        seed: tuple[int, ...],
        least_pixels: int,
    ) -> None:
        self._holders, self._classes, self._images = holders, classes, images
        self._seed, self._least_pixels = seed, least_pixels

    @property
    def classes(self) -> list[int]:
        """Ids of the classes that tasks are about, each as often as the others."""
        return list(self._holders)

    def task(self, number: int) -> FolderTask:
        """A class, and one image that has it of each of some patients."""
        rng = np.random.default_rng((*self._seed, number))
        asked = self.classes[rng.integers(len(self._holders))]
        by_patient = self._holders[asked]
        patients = rng.choice(len(by_patient), self._images, replace=False)
        slices = [by_patient[i][rng.integers(len(by_patient[i]))] for i in patients]
        others = [c for c in self._classes if c != asked and all(s.holds(c, self._least_pixels) for s in slices)]
        new_ids = np.zeros(256, np.uint8)
        new_ids[[asked, *rng.permutation(others).astype(np.int64)]] = np.arange(1, len(others) + 2)
        pixels = np.stack([one.entry.read(one.plane) for one in slices], 1)
        return FolderTask(pixels[0], new_ids[pixels[1]])


def _by_patient(slices: Sequence[_Slice], class_id: int, least_pixels: int) -> list[list[_Slice]]:
    """The slices that hold a class, by patient."""
    found: dict[str | None, list[_Slice]] = {}
    for one in slices:
        if one.holds(class_id, least_pixels):
            found.setdefault(one.patient, []).append(one)
    return list(found.values())


def _chosen(config: SourceConfig, slices: Sequence[_Slice], names: dict[int, str]) -> list[int]:
    """The ids of the classes to ask for: those of the configuration, else all that are there, and named if any is."""
    present = sorted({c for one in slices for c in one.entry.pixels[one.plane]})
    present = [c for c in present if c in names] if names else present
    if not config.classes:
        if len(present) > MOST_CLASSES:
            raise ValueError(
                f"data set {config.name} must hold at most {MOST_CLASSES} classes unless classes are given, "
                f"got {len(present)}; are images and masks swapped?"
            )
        return present
    ids = {name: c for c, name in names.items()}
    wanted = [ids.get(given, -1) if isinstance(given, str) else given for given in config.classes]
    if absent := [str(given) for given, c in zip(config.classes, wanted, strict=True) if c not in present]:
        known = ", ".join(f"{c} ({names[c]})" if c in names else str(c) for c in present)
        raise ValueError(f"classes of data set {config.name} must be of {known}, got {', '.join(absent)}")
    return sorted(set(wanted))
