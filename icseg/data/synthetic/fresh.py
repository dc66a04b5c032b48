"""Synthetic tasks that are made while they are used, and kept nowhere."""

from __future__ import annotations

from collections import OrderedDict

import torch

from icseg.data.synthetic.pool import SHARD_TASKS, is_fine, pool_task_seed
from icseg.data.synthetic.task import TaskBatch, TaskTensors, check_arguments, generate_tasks

_KEPT = 2  # runs of tasks: a batch may reach from one into the next


class FreshTasks:
    """The tasks that a `TaskPool` of the same arguments would hold, `count` of them, made on `device` when asked for.

    They are made SHARD_TASKS at a time and stay on the device: quick when asked for in order. Arguments: as `TaskPool`.
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
        device: str | torch.device = "cpu",
    ) -> None:
        check_arguments(seed, subjects, size, absent)
        self._count, self._subjects, self._size, self._seed = count, subjects, size, seed
        self._fine_every, self._absent, self._device = fine_every, absent, device
        self._runs: OrderedDict[int, TaskBatch] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> TaskTensors:
        if not -self._count <= index < self._count:
            raise IndexError(f"index must lie in a pool of {self._count} tasks, got {index}")
        run, place = divmod(index % self._count, SHARD_TASKS)
        if run not in self._runs:
            self._runs[run] = self._made(run)
            while len(self._runs) > _KEPT:
                self._runs.popitem(last=False)
        return self._runs[run].tensors(place)

    def _made(self, run: int) -> TaskBatch:
        last = min((run + 1) * SHARD_TASKS, self._count)
        seeds = [pool_task_seed(self._seed, i) for i in range(run * SHARD_TASKS, last)]
        size = self._size * (1 + is_fine(run, self._fine_every))
        return generate_tasks(seeds, self._subjects, size, absent=self._absent, device=self._device)
