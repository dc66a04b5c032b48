"""Training on data sets mixed with synthetic tasks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from runs import MODEL, SIZE, equal, weights
from toy_folders import write_folders, write_pack

from icseg.data.folders import cache
from icseg.training import TrainingConfig, loop, train
from icseg.training.batches import Tasks, training_batch
from icseg.training.mixture import Shares


def training_config(tmp_path: Path, **data: object) -> TrainingConfig:
    sources = [
        {"path": str(tmp_path / "set"), "weight": 2.0, "least_pixels": 10},
        {"path": str(tmp_path / "pack.npz"), "weight": 1.0, "classes": ["lower"]},
    ]
    return TrainingConfig.from_dict(
        {
            "model": MODEL,
            "data": {
                "tasks": 12,
                "size": SIZE,
                "subjects": 4,
                "tasks_per_step": 2,
                "targets": 2,
                "max_support": 2,
                "validation_tasks": 1,
                "sources": sources,
                **data,
            },
            "schedule": {"steps": 5, "warmup": 1},
            "run": {"log_steps": 1, "validate_steps": 5, "precision": "float32"},
        }
    )


def test_a_mixed_run_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folders(tmp_path / "set")
    write_pack(tmp_path / "pack.npz")
    config = training_config(tmp_path, pool=str(tmp_path / "pool"))
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert train(config, tmp_path / "whole", show_progress=False).finished

    class Killed(BaseException):
        pass

    usual = loop.batches_ahead

    def killed(pool: Tasks, *arguments: object) -> object:
        for number, batch in enumerate(usual(pool, *arguments)):  # type: ignore[arg-type]
            if number == 3:
                raise Killed
            yield batch

    often = dataclasses.replace(config.run, checkpoint_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "batches_ahead", killed)
        with pytest.raises(Killed):
            train(dataclasses.replace(config, run=often), tmp_path / "parts", show_progress=False)
    monkeypatch.setattr(cache, "_write", lambda *arguments: pytest.fail("a file was read again"))
    assert train(config, tmp_path / "parts", resume=True, show_progress=False).finished
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_the_pool_holds_the_synthetic_tasks_alone(tmp_path: Path) -> None:
    write_folders(tmp_path / "set")
    write_pack(tmp_path / "pack.npz")
    config = training_config(tmp_path, tasks=9, validation_tasks=0)
    tasks, validation = loop.open_pools(config, tmp_path / "run")
    assert (len(tasks), len(validation)) == (9, 0)
    synthetic = Shares([2.0, 1.0, 1.0], 9, 0).count(2)
    assert 0 < synthetic < 9
    families = json.loads((tmp_path / "run" / "pool" / "training" / "families-00000.json").read_text())
    assert len(families) == synthetic
    batch = training_batch(tasks, config.data, 0, 0)
    assert batch.targets.shape == (4, 1, SIZE, SIZE)
    only_data = training_config(tmp_path, synthetic_weight=0, validation_tasks=0, cache=str(tmp_path / "kept"))
    tasks, _ = loop.open_pools(only_data, tmp_path / "other")
    assert len(tasks) == 12
    assert not (tmp_path / "other").exists()
    assert len(list((tmp_path / "kept").glob("*.npy"))) == 7


def test_a_bad_source_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_folders(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match=r"data set pack\.npz must be an existing folder or file"):
        train(training_config(tmp_path), tmp_path / "run", show_progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
