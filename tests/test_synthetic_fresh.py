"""Synthetic tasks that are made while they are used."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import POOLS, equal, tiny, weights
from test_training_loop import stop_at

from icseg.data.synthetic import FreshTasks, TaskPool, fresh
from icseg.training import loop, train
from icseg.training.batches import batches_ahead
from icseg.training.distributed import Processes

DATA = {"fresh": True, "size": 32, "validation_tasks": 0, "absent": 0.5}


def test_they_are_those_of_a_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fresh, __import__("icseg.data.synthetic.pool", fromlist=["SHARD_TASKS"])):
        monkeypatch.setattr(module, "SHARD_TASKS", 3)
    pool = TaskPool(tmp_path, 8, 3, 32, seed=5, fine_every=2, absent=0.5, progress=False)
    tasks = FreshTasks(8, 3, 32, 5, fine_every=2, absent=0.5)
    assert len(tasks) == len(pool) == 8
    for i in [*range(8), 0, -1]:
        assert np.array_equal(tasks[i].images, pool[i].images)
        assert np.array_equal(tasks[i].masks, pool[i].masks)
        assert tasks[i].family == pool[i].family
    assert tasks[3].images.shape == (3, 64, 64)
    with pytest.raises(IndexError, match="index must lie in a pool of 8 tasks, got 8"):
        tasks[8]


def test_each_run_of_tasks_is_made_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    usual = fresh.generate_tasks

    def counting(seeds: list[int], *arguments: int, **others: object) -> object:
        made.append(len(seeds))
        return usual(seeds, *arguments, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(fresh, "generate_tasks", counting)
    monkeypatch.setattr(fresh, "SHARD_TASKS", 3)
    tasks = FreshTasks(8, 2, 32, 0)
    for i in range(8):
        assert tasks[i].images.dtype == torch.uint8
    assert made == [3, 3, 2]


def test_a_run_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(4, data=DATA)
    train(config, tmp_path / "whole", show_progress=False)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        assert not train(config, tmp_path / "parts", show_progress=False).finished
    train(config, tmp_path / "parts", resume=True, show_progress=False)
    assert not (tmp_path / "whole" / "pool").exists()
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_each_process_makes_its_own_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    usual = fresh.generate_tasks

    def counting(seeds: list[int], *arguments: int, **others: object) -> object:
        made.extend(seeds)
        return usual(seeds, *arguments, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(fresh, "generate_tasks", counting)
    monkeypatch.setattr(fresh, "SHARD_TASKS", 3)
    config = tiny(5, data=DATA, optimiser={"accumulate": 2})
    alone = loop.open_pools(config, Path())[0]
    seen = []
    for rank in range(2):
        made.clear()
        tasks = loop.open_pools(config, Path(), Processes(rank, 2, torch.device("cpu")))[0]
        for batch in itertools.islice(batches_ahead(tasks, config.data, 0, 0, range(rank, 2, 2), 2), 5):
            assert batch.targets.shape[-1] == 32
        assert len(made) == len(set(made)) <= 5 * 2 + 3  # its micro-batches of two tasks, and some ahead
        seen.append(set(made))
        mine = next(i for i in range(20) if i // 2 % 2 == rank)
        assert torch.equal(tasks[mine].images, alone[mine].images)
    assert not seen[0] & seen[1]


def test_fresh_tasks_are_not_given_pools(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fresh must be false where pools are given"):
        train(tiny(4, data=DATA), tmp_path / "run", pools=POOLS, show_progress=False)
    assert not (tmp_path / "run").exists()


def test_fresh_tasks_are_not_mixed() -> None:
    with pytest.raises(ValueError, match="fresh must be false where tasks are mixed with those of data sources"):
        tiny(data={**DATA, "sources": [{"path": "somewhere"}]})
