"""Pools of synthetic tasks on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from icseg.data.synthetic import TaskBatch, TaskPool, generate_task, generate_tasks, pool, pool_task_seed


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Shards of three tasks; the seeds of the tasks that are made."""
    seeds: list[int] = []

    def recording(chosen: list[int], subjects: int, size: int, *, absent: float, device: str) -> TaskBatch:
        seeds.extend(chosen)
        return generate_tasks(chosen, subjects, size, absent=absent, device=device)

    monkeypatch.setattr(pool, "SHARD_TASKS", 3)
    monkeypatch.setattr(pool, "generate_tasks", recording)
    return seeds


def test_pool_holds_the_generated_tasks(tmp_path: Path, made: list[int]) -> None:
    tasks = TaskPool(tmp_path / "new" / "pool", 7, 2, 32, seed=4)
    assert len(tasks) == len(list(tasks)) == 7
    for i in (0, 3, 6, -1):
        wanted = generate_task(pool_task_seed(4, i % 7), 2, 32)
        np.testing.assert_array_equal(tasks[i].images, wanted.images)
        np.testing.assert_array_equal(tasks[i].masks, wanted.masks)
        assert tasks[i].family == tasks.families[i] == wanted.family
    assert tasks[0].images.flags.writeable
    for i in (7, -8):
        with pytest.raises(IndexError, match=f"pool of 7 tasks, got {i}"):
            tasks[i]


def test_some_shards_have_twice_the_size(tmp_path: Path, made: list[int]) -> None:
    tasks = TaskPool(tmp_path, 10, 2, 32, fine_every=2)
    sizes = [task.images.shape[-1] for task in tasks]
    assert sizes == [32] * 3 + [64] * 3 + [32] * 3 + [64]
    assert all(task.masks.shape == task.images.shape for task in tasks)
    np.testing.assert_array_equal(tasks[4].images, generate_task(4, 2, 64).images)
    plain = TaskPool(tmp_path / "plain", 4, 2, 32)
    assert {task.images.shape[-1] for task in plain} == {32}


def test_structures_are_absent_from_targets_alone(tmp_path: Path, made: list[int]) -> None:
    tasks = TaskPool(tmp_path, 12, 3, 32, absent=1.0)
    lacking = 0
    for i, task in enumerate(tasks):
        np.testing.assert_array_equal(task.masks, generate_task(i, 3, 32, absent=1.0).masks)
        assert all((mask == 1).any() for mask in task.masks[:-1])
        lacking += not (task.masks[-1] == 1).any()
    assert lacking > 6


def test_pool_is_reused_shrinks_and_grows(tmp_path: Path, made: list[int]) -> None:
    TaskPool(tmp_path, 4, 2, 32)
    made.clear()
    assert len(TaskPool(tmp_path, 2, 2, 32)) == 2
    assert len(TaskPool(tmp_path, 4, 2, 32)) == 4
    assert made == []
    assert len(TaskPool(tmp_path, 8, 2, 32)) == 8
    assert made == [3, 4, 5, 6, 7]


def test_pool_resumes_after_an_interruption(tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    recording = pool.generate_tasks

    def interrupted(seeds: list[int], *arguments: int, **named: Any) -> TaskBatch:
        if 4 in seeds:
            raise KeyboardInterrupt
        return recording(seeds, *arguments, **named)

    monkeypatch.setattr(pool, "generate_tasks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TaskPool(tmp_path, 6, 2, 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "families-00000.json",
        "images-00000.npy",
        "masks-00000.npy",
        "pool.json",
    ]
    made.clear()
    monkeypatch.setattr(pool, "generate_tasks", recording)
    tasks = TaskPool(tmp_path, 6, 2, 32)
    assert made == [3, 4, 5]
    np.testing.assert_array_equal(tasks[4].images, generate_task(4, 2, 32).images)


def test_pool_shard_without_its_last_file_is_made_again(tmp_path: Path, made: list[int]) -> None:
    TaskPool(tmp_path, 6, 2, 32)
    made.clear()
    (tmp_path / "families-00001.json").unlink()
    TaskPool(tmp_path, 6, 2, 32)
    assert made == [3, 4, 5]


@pytest.mark.parametrize("changed", [{"subjects": 3}, {"size": 48}, {"seed": 1}, {"fine_every": 4}, {"absent": 0.1}])
def test_pool_refuses_tasks_of_other_parameters(tmp_path: Path, made: list[int], changed: dict[str, Any]) -> None:
    TaskPool(tmp_path, 1, 2, 32)
    made.clear()
    arguments = {"count": 1, "subjects": 2, "size": 32, "seed": 0} | changed
    with pytest.raises(ValueError, match="directory must be empty or hold tasks made with"):
        TaskPool(tmp_path, **arguments)
    assert made == []


def test_pool_refuses_another_generator_version(
    tmp_path: Path, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    TaskPool(tmp_path, 1, 2, 32)
    monkeypatch.setattr(pool, "GENERATOR_VERSION", pool.GENERATOR_VERSION + 1)
    with pytest.raises(ValueError, match="directory must be empty or hold tasks made with"):
        TaskPool(tmp_path, 1, 2, 32)


def test_pool_refuses_tasks_whose_parameters_are_lost(tmp_path: Path, made: list[int]) -> None:
    TaskPool(tmp_path, 1, 2, 32)
    (tmp_path / "pool.json").write_text("{")
    with pytest.raises(ValueError, match=r"directory must hold a readable pool\.json"):
        TaskPool(tmp_path, 1, 2, 32)
    (tmp_path / "pool.json").unlink()
    with pytest.raises(ValueError, match=r"directory must hold the pool\.json of its tasks"):
        TaskPool(tmp_path, 1, 2, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "count must be between 1 and 2"),
        ({"workers": -1}, "workers and fine_every must not be negative, got -1 and 0"),
        ({"fine_every": -2}, "workers and fine_every must not be negative, got 0 and -2"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"seed": 2**31}, "seed of a pool must be below 2\\*\\*31, got 2147483648"),
        ({"size": 8}, "size must be at least 32, got 8"),
        ({"absent": 2.0}, r"absent must lie in \[0, 1\], and be 0 for a single subject, got 2.0"),
    ],
)
def test_pool_with_bad_arguments_writes_nothing(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    directory = tmp_path / "pool"
    with pytest.raises(ValueError, match=message):
        TaskPool(directory, **({"count": 1, "subjects": 2, "size": 32} | arguments))
    assert not directory.exists()


def test_pool_workers_make_the_same_tasks(tmp_path: Path) -> None:
    count = pool.SHARD_TASKS + 2
    alone = TaskPool(tmp_path / "alone", count, 1, 32)
    shared = TaskPool(tmp_path / "shared", count, 1, 32, workers=2)
    assert alone.families == shared.families
    for i in range(count):
        np.testing.assert_array_equal(alone[i].images, shared[i].images)
        np.testing.assert_array_equal(alone[i].masks, shared[i].masks)


def test_pools_of_different_seeds_share_no_seed() -> None:
    last_of_first, first_of_second = pool_task_seed(0, 2**32 - 1), pool_task_seed(1, 0)
    assert last_of_first < first_of_second
    assert pool_task_seed(2**31 - 1, 2**32 - 1) < 2**63
