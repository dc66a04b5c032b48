"""Synthetic tasks kept on disk, for training that is faster than their making."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from icseg.data.synthetic.shapes import DESIGN_SIZE
from icseg.data.synthetic.task import GENERATOR_VERSION, SyntheticTask, check_arguments, generate_tasks
from icseg.files import written_whole

SHARD_TASKS = 50
_SEED_STRIDE = 2**32
_MOST_SEEDS = 2**31  # the seeds of tasks are below 2**63
_MOST_TASKS = 2**31  # the seeds of the upper half of each stride are left to examples: no pool holds their tasks

TRAINING_SEEDS = range(10_000)
"""Seeds that a training pool may have. Validation and evaluation use others: held-out tasks stay held out."""
EVALUATION_SEED = 1_000_000


def validation_seed(training_seed: int) -> int:
    """The seed of the validation pool that goes with a training pool, beyond all of TRAINING_SEEDS."""
    return TRAINING_SEEDS.stop + training_seed


def pool_task_seed(pool_seed: int, index: int) -> int:
    """The seed of a pool's task `index`, below 2**31: pools of different seeds share none."""
    return pool_seed * _SEED_STRIDE + index


@dataclass(frozen=True)
class _Shard:
    """Up to SHARD_TASKS consecutive tasks: two arrays [T, N, H, W] and the families, written last."""

    directory: Path
    index: int
    subjects: int
    size: int
    seed: int
    absent: float
    device: str

    def _path(self, part: str, ending: str) -> Path:
        return self.directory / f"{part}-{self.index:05d}.{ending}"

    def families(self) -> list[str]:
        """The families of the tasks it holds; empty where it has not been written to its end."""
        path = self._path("families", "json")
        return json.loads(path.read_text()) if path.is_file() else []

    def write(self, count: int) -> list[str]:
        """Make its first `count` tasks and write them; their families."""
        first = self.index * SHARD_TASKS
        seeds = [pool_task_seed(self.seed, first + i) for i in range(count)]
        with _one_thread():  # the files do not depend on the machine, and workers share it
            tasks = generate_tasks(seeds, self.subjects, self.size, absent=self.absent, device=self.device)
        self._save("images", tasks.images.cpu().numpy())
        self._save("masks", tasks.masks.cpu().numpy())
        with written_whole(self._path("families", "json")) as path:
            path.write_text(json.dumps(tasks.families))
        return tasks.families

    def _save(self, part: str, array: NDArray[np.uint8]) -> None:
        with written_whole(self._path(part, "npy")) as path:
            np.save(path, array, allow_pickle=False)

    def read(self, part: str, position: int) -> NDArray[np.uint8]:
        """A copy of one task's `part`; the rest of the file stays on disk."""
        return np.array(np.load(self._path(part, "npy"), mmap_mode="r", allow_pickle=False)[position])


@contextmanager
def _one_thread() -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


class TaskPool:
    """`count` synthetic tasks in `directory`, made there on first use and only read after that.

    ```
    pool = TaskPool("tasks/train", count=2000, subjects=6, size=256, seed=1)
    pool[0].images                                               # [6, 256, 256] uint8
    ```

    An interrupted pool goes on where it stopped, and a larger `count` adds to the tasks that exist. Pools of
    different `seed` share no task: hold out by seed. Every `fine_every`-th run of SHARD_TASKS tasks has twice the
    `size` (0: none). `absent`: see `generate_tasks`. `workers` processes share the making (0: this process alone); they
    are spawned, so the calling script needs the usual `if __name__ == "__main__"`. `device` makes the tasks.

    Raises ValueError for an argument out of range or a directory of tasks made with other parameters.
    """

    def __init__(
        self,
        directory: str | Path,
        count: int,
        subjects: int,
        size: int = DESIGN_SIZE,
        seed: int = 0,
        *,
        fine_every: int = 0,
        absent: float = 0.0,
        workers: int = 0,
        device: str | torch.device = "cpu",
        progress: bool = True,
    ) -> None:
        if not 1 <= count <= _MOST_TASKS:
            raise ValueError(f"count must be between 1 and 2**31, got {count}")
        if workers < 0 or fine_every < 0:
            raise ValueError(f"workers and fine_every must not be negative, got {workers} and {fine_every}")
        check_arguments(seed, subjects, size, absent)
        if seed >= _MOST_SEEDS:
            raise ValueError(f"seed of a pool must be below 2**31, got {seed}")
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        _check_parameters(
            self.directory / "pool.json",
            {"subjects": subjects, "size": size, "seed": seed, "fine_every": fine_every, "absent": absent},
        )
        self._shards = [
            _Shard(self.directory, i, subjects, size * (1 + is_fine(i, fine_every)), seed, absent, str(device))
            for i in range(-(-count // SHARD_TASKS))
        ]
        self.families = self._complete(count, workers, progress)

    def _complete(self, count: int, workers: int, progress: bool) -> list[str]:
        """Write the shards that are missing or too short; the families of all tasks."""
        families = [shard.families() for shard in self._shards]
        sizes = [min(SHARD_TASKS, count - i * SHARD_TASKS) for i in range(len(self._shards))]
        missing = [i for i, size in enumerate(sizes) if len(families[i]) < size]
        present = count - sum(sizes[i] for i in missing)
        with tqdm(
            total=count,
            initial=present,
            desc="synthetic tasks",
            unit="task",
            disable=not progress or not missing,
        ) as bar:
            for i, made in _written([(self._shards[i], sizes[i]) for i in missing], workers):
                families[missing[i]] = made
                bar.update(len(made))
        return [family for names, size in zip(families, sizes, strict=True) for family in names[:size]]

    def __len__(self) -> int:
        return len(self.families)

    def __getitem__(self, index: int) -> SyntheticTask:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must lie in a pool of {len(self)} tasks, got {index}")
        index %= len(self)
        shard, position = self._shards[index // SHARD_TASKS], index % SHARD_TASKS
        return SyntheticTask(shard.read("images", position), shard.read("masks", position), self.families[index])


def _written(jobs: list[tuple[_Shard, int]], workers: int) -> Iterator[tuple[int, list[str]]]:
    """Write each shard of `jobs` (shard, number of tasks); yields a job's index and families as it ends."""
    if not workers or not jobs:
        yield from ((i, shard.write(count)) for i, (shard, count) in enumerate(jobs))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as executor:
        futures = {executor.submit(shard.write, count): i for i, (shard, count) in enumerate(jobs)}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


def is_fine(shard: int, fine_every: int) -> bool:
    """Whether the tasks of a shard have twice the pool's size."""
    return fine_every > 0 and shard % fine_every == fine_every - 1


def _check_parameters(path: Path, parameters: dict[str, float]) -> None:
    """Record what the pool's tasks are made from, or compare it with what the directory records."""
    wanted = {"generator": GENERATOR_VERSION, "shard_tasks": SHARD_TASKS, **parameters}
    if not path.is_file():
        if any(path.parent.glob("families-*.json")):
            raise ValueError(f"directory must hold the pool.json of its tasks, got {path.parent} without one")
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(wanted))
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"directory must hold a readable pool.json, got {path} ({error})") from error
    if found != wanted:
        raise ValueError(
            f"directory must be empty or hold tasks made with {wanted}, got {path.parent} made with {found}"
        )
