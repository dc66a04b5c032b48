"""Training tasks of several sources: data sets on disk and the synthetic pool, in fixed shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from icseg.data.folders import Listing, open_data_set
from icseg.data.synthetic import FreshTasks, TaskPool
from icseg.training.batches import Task, Tasks
from icseg.training.config import DataConfig, TrainingConfig

_STREAM = 2**62  # of the draws of sources, apart from those of their tasks


class Shares:
    """Which source each of `tasks` tasks is of, drawn by `weights`, and its number among those of that source.

    The draw of task i is a function of (seed, i): more tasks leave the first ones as they are.
    """

    def __init__(self, weights: Sequence[float], tasks: int, seed: int) -> None:
        ends = np.cumsum(weights) / np.sum(weights)
        draws = np.random.default_rng((seed, _STREAM)).random(tasks)
        self.source = np.minimum(np.searchsorted(ends, draws, side="right"), len(weights) - 1)
        self.number = np.zeros(tasks, np.int64)
        for source in range(len(weights)):
            mine = self.source == source
            self.number[mine] = np.arange(mine.sum())

    def count(self, source: int) -> int:
        """Tasks of one source."""
        return int((self.source == source).sum())


class MixedTasks:
    """Tasks by index, each of the source that `shares` says; sources give a task by its number among theirs."""

    def __init__(self, shares: Shares, sources: Sequence[Callable[[int], Task]]) -> None:
        self._shares, self._sources = shares, sources

    def __len__(self) -> int:
        return len(self._shares.source)

    def __getitem__(self, index: int, /) -> Task:
        return self._sources[self._shares.source[index]](int(self._shares.number[index]))


def open_mixture(data: DataConfig, listings: Sequence[Listing], pool: Path, cache: Path, workers: int) -> Tasks:
    """The data sets of `listings`, read into `cache`, mixed with as many synthetic tasks as their share asks for."""
    images = data.max_support + data.targets
    sources: list[Callable[[int], Task]] = [
        open_data_set(listing, cache, images=images, size=data.size, seed=(data.seed, i)).task
        for i, listing in enumerate(listings)
    ]
    weights = [listing.config.weight for listing in listings]
    if data.synthetic_weight:
        weights.append(data.synthetic_weight)
    shares = Shares(weights, data.tasks, data.seed)
    if data.synthetic_weight:
        count = max(1, shares.count(len(listings)))
        sources.append(synthetic_pool(data, pool, count, workers).__getitem__)
    return MixedTasks(shares, sources)


def fresh_tasks(config: TrainingConfig, parts: Sequence[int], device: str | torch.device) -> FreshTasks:
    """The training tasks of a whole run; this process makes those of the micro-batches `parts` of every step."""
    data, accumulate = config.data, config.optimiser.accumulate
    return FreshTasks(
        config.schedule.steps * accumulate * data.tasks_per_step,
        data.subjects,
        data.size,
        data.seed,
        fine_every=data.fine_every,
        absent=data.absent,
        mine=lambda index: index // data.tasks_per_step % accumulate in parts,
        device=device,
    )


def synthetic_pool(data: DataConfig, folder: Path, count: int, workers: int) -> TaskPool:
    """`count` generated training tasks in `folder`."""
    return TaskPool(
        folder,
        count,
        data.subjects,
        data.size,
        data.seed,
        fine_every=data.fine_every,
        absent=data.absent,
        workers=workers,
    )
