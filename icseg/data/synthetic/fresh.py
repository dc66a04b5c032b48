"""Synthetic tasks that are made while they are used, and kept nowhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from icseg.data.synthetic.pool import SHARD_TASKS, is_fine, pool_task_seed
from icseg.data.synthetic.task import TaskTensors, check_arguments, generate_tasks


class FreshTasks:
    """The tasks that a `TaskPool` of the same arguments would hold, `count` of them, made on `device` when asked for.

    They are made SHARD_TASKS at a time and stay on the device, the last two such runs: quick when asked for in order.
    mine: which numbers this process will ask for, so that several processes make none twice. Other arguments: as
    `TaskPool`.
    """

    def __init__(
        self,
        count: int,
        subjects: int,
        size: int,
        seed: int,
        *,
        fine_every: int = 0,
        absent: float = 0.0,
        mine: Callable[[int], bool] = lambda index: True,
        device: str | torch.device = "cpu",
    ) -> None:
        check_arguments(seed, subjects, size, absent)
        self._count, self._subjects, self._size, self._seed = count, subjects, size, seed
        self._fine_every, self._absent, self._device = fine_every, absent, device
        self._mine = mine
        self._before: dict[int, TaskTensors] = {}
        self._made: dict[int, TaskTensors] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> TaskTensors:
        if not -self._count <= index < self._count:
            raise IndexError(f"index must lie in a pool of {self._count} tasks, got {index}")
        index %= self._count
        if index not in self._before and index not in self._made:
            self._before, self._made = self._made, self._tasks_from(index)
        return self._made[index] if index in self._made else self._before[index]

    def _tasks_from(self, index: int) -> dict[int, TaskTensors]:
        coming = (i for i in range(index, self._count) if i == index or self._mine(i))
        numbers = list(itertools.islice(coming, SHARD_TASKS))
        made: dict[int, TaskTensors] = {}
        for fine in (False, True):  # one call makes tasks of one size
            some = [i for i in numbers if is_fine(i // SHARD_TASKS, self._fine_every) == fine]
            if not some:
                continue
            seeds = [pool_task_seed(self._seed, i) for i in some]
            size = self._size * (1 + fine)
            batch = generate_tasks(seeds, self._subjects, size, absent=self._absent, device=self._device)
            made |= {number: batch.tensors(place) for place, number in enumerate(some)}
        return made
