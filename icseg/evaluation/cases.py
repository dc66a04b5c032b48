"""What is scored: the protocol, and by it the targets with their support sets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from torch import Tensor

from icseg.data.frame import SIDES
from icseg.data.packs import Pack
from icseg.data.synthetic import EVALUATION_SEED, generate_task, pool_task_seed
from icseg.data.tensors import as_tensors

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class EvaluationProtocol:
    """How targets are scored; the defaults are what a score without further words was made with.

    size:    pixels of a side; None is the data set's own (of synthetic tasks 256).
    support: pairs of image and mask a support set.
    seeds:   of the support sets of each target, one set a seed; a target's score is the mean over them.
    limit:   targets a class, at most; drawn by the first seed. None is all.
    """

    size: int | None = 256
    support: int = 3
    seeds: tuple[int, ...] = (0,)
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and not SIDES[0] <= self.size <= SIDES[1]:
            raise ValueError(f"size must be {SIDES[0]} to {SIDES[1]} pixels, or own, got {self.size}")
        check_least(1, support=self.support, limit=self.limit)
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be at least one number from 0, each once, got {list(self.seeds)}")


@dataclass(frozen=True)
class Case:
    """One target with one support set: target, mask [1, H, W]; support_images, support_masks [S, 1, H, W].

    number: of the image or task in its data set; source: what it shares with other images of its patient.
    class_name: what the masks show. supports: the numbers of the support images, () for those of a synthetic task.
    """

    target: Tensor
    mask: Tensor
    support_images: Tensor
    support_masks: Tensor
    number: int
    source: int
    class_name: str = ""
    patient: str | None = None
    supports: tuple[int, ...] = ()


class Cases(Sequence[Case]):
    """Cases that are made when they are asked for; those of one target follow each other."""

    @overload
    def __getitem__(self, index: int) -> Case: ...

    @overload
    def __getitem__(self, index: slice) -> list[Case]: ...

    def __getitem__(self, index: int | slice) -> Case | list[Case]:
        found = range(len(self))[index]
        return self._case(found) if isinstance(found, int) else [self._case(i) for i in found]

    @abstractmethod
    def _case(self, index: int) -> Case: ...

    @abstractmethod
    def of(self, number: int) -> Case:
        """The first case of the target `number`."""


class PackCases(Cases):
    """Those of one class of a pack; see `pack_cases`."""

    def __init__(self, pack: Pack, class_id: int, protocol: EvaluationProtocol) -> None:
        self._pack, self._class_id = pack, class_id
        self._sources = pack.sources()
        self._draws = list(self._drawn(protocol))

    def __len__(self) -> int:
        return len(self._draws)

    def of(self, number: int) -> Case:
        return self[[target for target, _ in self._draws].index(number)]

    def _drawn(self, protocol: EvaluationProtocol) -> Iterator[tuple[int, list[int]]]:
        """(target, supports), once a seed; nothing where all images are of one patient."""
        holders, class_id = self._pack.holders(self._class_id), self._class_id
        sources = self._sources[holders]
        if len(np.unique(sources)) < 2:
            return
        order = np.random.default_rng((protocol.seeds[0], class_id)).permutation(holders)
        for target in order[: protocol.limit].tolist():
            others = holders[sources != self._sources[target]]
            for seed in protocol.seeds:
                drawn = np.random.default_rng((seed, class_id, target)).permutation(others)
                yield target, drawn[: protocol.support].tolist()

    def _case(self, index: int) -> Case:
        pack, (target, supports) = self._pack, self._draws[index]
        chosen = [target, *supports]
        images, masks = as_tensors(pack.images[chosen], pack.masks[chosen], (self._class_id,))
        return Case(
            images[0],
            masks[0],
            images[1:],
            masks[1:],
            number=target,
            source=int(self._sources[target]),
            class_name=pack.class_names[self._class_id],
            patient=None if pack.patient is None else str(pack.patient[target]),
            supports=tuple(supports),
        )


class SyntheticCases(Cases):
    """One of each synthetic task; see `synthetic_cases`."""

    def __init__(self, tasks: int, support: int, size: int) -> None:
        self._tasks, self._support, self._size = tasks, support, size

    def __len__(self) -> int:
        return self._tasks

    def of(self, number: int) -> Case:
        return self[number]

    def _case(self, index: int) -> Case:
        task = generate_task(pool_task_seed(EVALUATION_SEED, index), self._support + 1, self._size)
        images, masks = as_tensors(task.images, task.masks)
        return Case(images[0], masks[0], images[1:], masks[1:], index, index, task.family)


def pack_cases(
    pack: Pack, class_id: int, *, support: int = 3, seeds: Sequence[int] = (0,), limit: int | None = None
) -> PackCases:
    """The targets of a class, each once a seed with a support set.

    A target contains the class. Its supports are `support` images that contain it too, of other patients (other
    images, where patients are not known), drawn by (seed, target); fewer, where fewer exist. A class that one
    patient alone has gives no cases. limit: targets at most, drawn by the first seed.
    """
    return PackCases(pack, class_id, EvaluationProtocol(None, support, tuple(seeds), limit))


def synthetic_cases(tasks: int, *, support: int = 3, size: int = 256) -> SyntheticCases:
    """The first image of each of `tasks` held-out tasks, which no training pool holds, with the others as supports.

    Of class 1 alone; `class_name` is the task's family.
    """
    check_least(1, tasks=tasks, support=support)
    return SyntheticCases(tasks, support, size)


def check_least(least: int, **values: int | None) -> None:
    """Raise ValueError for a value below `least`."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
