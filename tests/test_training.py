"""Training: batches, augmentation, optimisation; bad configurations are named."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import DATA, POOLS, SIZE, Task, make_classes, make_task, tiny, weights
from torch import nn

import icseg.training.loop as loop
from icseg.config import PatchICLConfig
from icseg.memory import SupportMemory
from icseg.sparse.network import SparseNetwork
from icseg.training import (
    DataConfig,
    OptimiserConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
    train,
)
from icseg.training.augmentation import AugmentationConfig
from icseg.training.batches import Batch, batches_ahead, repeat_memory, training_batch, validation_batch
from icseg.training.optimisation import autocast, make_optimiser, update_average

CONFIGS = Path(__file__).parent.parent / "configs"


# Schedule


def test_schedule_values() -> None:
    schedule = ScheduleConfig(steps=100, warmup=4, floor=0.1)
    assert [schedule.factor(i, 0.0) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule.factor(50, schedule.progress(50, 0)) == pytest.approx(0.55)
    assert schedule.factor(100, schedule.progress(100, 0)) == pytest.approx(0.1)
    assert ScheduleConfig(warmup=0).factor(0, 0.0) == 1.0


def test_progress_is_the_larger_of_steps_and_time() -> None:
    schedule = ScheduleConfig(steps=100, max_minutes=10)
    assert schedule.progress(50, 0.0) == 0.5
    assert schedule.progress(50, 450.0) == 0.75
    assert schedule.progress(50, 1e6) == 1.0
    assert ScheduleConfig(steps=100).progress(50, 1e6) == 0.5


# Data


def test_batches_depend_on_seed_and_step_alone() -> None:
    config = DataConfig(**DATA)  # type: ignore[arg-type]
    first = [training_batch(POOLS[0], config, 0, step) for step in range(6)]
    again = [training_batch(POOLS[0], config, 0, step) for step in reversed(range(6))][::-1]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.support_images, b.support_images)
        assert torch.equal(a.target_masks, b.target_masks)
        assert a.seed == b.seed
    assert not torch.equal(first[0].targets, training_batch(POOLS[0], config, 1, 0).targets)
    assert {b.support_images.shape[1] for b in first} == {1, 2}
    assert len({b.seed for b in first}) == 6


def test_batches_made_ahead_are_those_of_their_steps() -> None:
    config = DataConfig(**DATA)  # type: ignore[arg-type]
    made = batches_ahead(POOLS[0], config, 0, 3)
    for step in (3, 4, 5):
        ahead, batch = next(made), training_batch(POOLS[0], config, 0, step)
        assert torch.equal(ahead.targets, batch.targets)
        assert torch.equal(ahead.support_masks, batch.support_masks)
        assert ahead.seed == batch.seed
    made.close()
    assert not any(thread.name.startswith("icseg-batches") for thread in threading.enumerate())


def test_a_task_that_cannot_be_read_ends_the_run(tmp_path: Path) -> None:
    class Broken(list[Task]):
        def __getitem__(self, index: object) -> Task:  # type: ignore[override]
            if index == 3:
                raise OSError("task 3 cannot be read")
            return super().__getitem__(index)  # type: ignore[call-overload, no-any-return]

    with pytest.raises(OSError, match="task 3 cannot be read"):
        train(tiny(6), tmp_path, pools=(Broken(POOLS[0]), []), show_progress=False)


def test_a_pass_sees_every_task_once() -> None:
    config = DataConfig(**DATA, augmentation=AugmentationConfig.none())  # type: ignore[arg-type]
    seen = []
    for step in range(5):
        batch = training_batch(POOLS[0], config, 3, step)
        for target in batch.targets[::2, 0]:
            seen += [
                i
                for i, task in enumerate(POOLS[0])
                if any(torch.equal(torch.from_numpy(image / np.float32(255)), target) for image in task.images)
            ]
    assert sorted(seen) == sorted([0, 1, 2, 3, 4] * 2)
    assert sorted(seen[:5]) == [0, 1, 2, 3, 4]


def test_shapes_and_ranges_of_a_batch() -> None:
    config = DataConfig(**{**DATA, "min_support": 2})  # type: ignore[arg-type]
    batch = training_batch(POOLS[0], config, 0, 0)
    assert batch.support_images.shape == batch.support_masks.shape == (2, 2, 1, SIZE, SIZE)
    assert batch.targets.shape == batch.target_masks.shape == (4, 1, SIZE, SIZE)
    assert 0 <= batch.targets.min() < batch.targets.max() <= 1
    assert set(batch.target_masks.unique().tolist()) == {0.0, 1.0}
    held_out = validation_batch(POOLS[1][0], 3)
    assert held_out.support_images.shape == (1, 3, 1, SIZE, SIZE)
    assert held_out.targets.shape == (1, 1, SIZE, SIZE)


PLAIN = {"augmentation": AugmentationConfig.none()}


def classes_of(batch: Batch, config: DataConfig) -> list[list[int]]:
    """Of each task, the class that each channel asks for, by its place, in supports and targets alike."""
    asked = []
    for i, support in enumerate(batch.support_masks):
        masks = [*support, *batch.target_masks[i * config.targets : (i + 1) * config.targets]]
        ids = [[int(mask.any(1).nonzero()[0]) // 4 + 1 for mask in masks_of] for masks_of in masks]
        assert all(other == ids[0] for other in ids)
        assert all(int(mask.sum()) == 4 * SIZE for mask in masks[0])
        asked.append(ids[0])
    return asked


def test_a_step_asks_for_as_many_classes_as_every_task_has() -> None:
    pool = [make_classes(0, 4), make_classes(1, 3)]
    config = DataConfig(**{**DATA, "multi_class": 1.0}, **PLAIN)  # type: ignore[arg-type]
    seen = set()
    for step in range(20):
        asked = classes_of(training_batch(pool, config, 0, step), config)
        assert all(len(ids) == len(set(ids)) == 3 for ids in asked)
        seen |= {tuple(ids) for ids in asked}
    assert {c for ids in seen for c in ids} == {1, 2, 3, 4}
    assert len(seen) > 8
    two = dataclasses.replace(config, classes=2)
    assert training_batch(pool, two, 0, 0).support_masks.shape[2] == 2
    with_one = training_batch([*pool, make_task(2)], dataclasses.replace(config, tasks_per_step=3), 0, 0)
    assert with_one.target_masks.shape == (6, 1, SIZE, SIZE)


@pytest.mark.parametrize(("other", "expected"), [(0.0, {1}), (0.5, {1, 2, 3}), (1.0, {2, 3})])
def test_a_step_of_one_class_may_ask_for_another(other: float, expected: set[int]) -> None:
    config = DataConfig(**{**DATA, "other_class": other}, **PLAIN)  # type: ignore[arg-type]
    batches_ = [training_batch([make_classes(0, 3)] * 2, config, 0, step) for step in range(20)]
    asked = [ids for batch in batches_ for ids in classes_of(batch, config)]
    assert {len(ids) for ids in asked} == {1}
    assert {ids[0] for ids in asked} == expected
    alone = training_batch(POOLS[0], config, 0, 0)
    assert bool(alone.target_masks.flatten(1).any(1).all())


def test_the_share_of_steps_of_several_classes() -> None:
    config = DataConfig(**{**DATA, "multi_class": 0.25})  # type: ignore[arg-type]
    pool = [make_classes(0, 3)] * 2
    counts = [training_batch(pool, config, 0, step).support_masks.shape[2] for step in range(200)]
    assert set(counts) == {1, 3}
    assert 0.15 < counts.count(3) / 200 < 0.35


def test_sizes_are_drawn_for_each_step() -> None:
    config = DataConfig(**{**DATA, "sizes": (48, 64, 64)}, **PLAIN)  # type: ignore[arg-type]
    made = [training_batch(POOLS[0], config, 0, step) for step in range(60)]
    sides = [batch.targets.shape[-1] for batch in made]
    assert set(sides) == {48, 64}
    assert 0.5 < sides.count(64) / 60 < 0.85
    for step, batch in enumerate(made[:8]):
        assert batch.support_images.shape[-2:] == batch.support_masks.shape[-2:] == batch.targets.shape[-2:]
        assert set(batch.target_masks.unique().tolist()) == {0.0, 1.0}
        assert batch.targets[batch.target_masks > 0].mean() > 0.6  # 0.73 as drawn, 0.18 outside
        assert batch.targets[batch.target_masks == 0].mean() < 0.25
        again = training_batch(POOLS[0], config, 0, step)
        assert torch.equal(batch.targets, again.targets)


def test_resizing_keeps_the_shape_of_the_image_and_the_area_of_each_class() -> None:
    config = DataConfig(**{**DATA, "multi_class": 1.0, "sizes": (32,)}, **PLAIN)  # type: ignore[arg-type]
    task = make_classes(0, 2, (32, 64))
    task.images[:] = np.indices((32, 64)).sum(0) % 2 * 255  # a chequerboard: grey when it is averaged
    batch = training_batch([task] * 2, config, 0, 0)
    assert batch.targets.shape[-2:] == (16, 32)
    assert bool((batch.targets[..., 2:-2, 2:-2] - 0.5).abs().max() < 0.02)
    assert batch.target_masks.flatten(2).sum(2).unique().tolist() == [2 * 32]


def test_validation_is_of_class_1() -> None:
    batch = validation_batch(make_classes(0, 3), 3)
    assert batch.target_masks.shape == (1, 1, SIZE, SIZE)
    assert batch.target_masks.sum() == 4 * SIZE
    assert batch.support_masks.shape == (1, 3, 1, SIZE, SIZE)


def test_memory_is_repeated_target_by_target() -> None:
    memory = SupportMemory("f", 2, {"a": torch.tensor([[1.0], [2.0]])})
    assert repeat_memory(memory, 3).tensors["a"].flatten().tolist() == [1, 1, 1, 2, 2, 2]
    assert repeat_memory(memory, 3).batch == 6
    one = SupportMemory("f", 1, {"a": torch.zeros(1, 1)})
    assert repeat_memory(one, 3) is one


# Optimisation


def test_weight_decay_spares_biases_norms_embeddings_and_frozen_parameters() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.conv, self.up = nn.Linear(2, 3), nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(1, 1, 2)
            self.norm, self.embedding = nn.LayerNorm(3), nn.Embedding(4, 3)
            self.bare = nn.Parameter(torch.zeros(2, 2))
            self.frozen = nn.Linear(2, 2).requires_grad_(False)

    net = Net()
    optimiser = make_optimiser(net, OptimiserConfig(weight_decay=0.1))
    names = {id(p): name for name, p in net.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in optimiser.param_groups)
    assert decayed == {"linear.weight", "conv.weight", "up.weight"}
    assert spared == {
        "linear.bias",
        "conv.bias",
        "up.bias",
        "norm.weight",
        "norm.bias",
        "embedding.weight",
        "bare",
    }
    assert [group["weight_decay"] for group in optimiser.param_groups] == [0.1, 0.0]


def test_the_average_forgets_the_first_weights() -> None:
    model, average = nn.BatchNorm1d(1), nn.BatchNorm1d(1)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(5.0)  # type: ignore[union-attr]
    update_average(average, model, 0.99, 0)
    assert average.weight.item() == pytest.approx(1 + 0.9 * 2)
    assert average.running_mean.item() == 5.0  # type: ignore[union-attr]
    update_average(average, model, 0.99, 10**6)
    assert average.weight.item() == pytest.approx(2.8 + 0.01 * 0.2)
    update_average(average, model, 0.0, 0)
    assert average.weight.item() == 3.0


def test_precision() -> None:
    linear, x = nn.Linear(2, 2), torch.ones(1, 2)
    with autocast("float32", torch.device("cpu")):
        assert linear(x).dtype == torch.float32
    with autocast("bfloat16", torch.device("cpu")):
        assert linear(x).dtype == torch.bfloat16


def test_bfloat16_trains(tmp_path: Path) -> None:
    train(tiny(2, run={"precision": "bfloat16"}), tmp_path, pools=POOLS, show_progress=False)
    assert all(w.dtype == torch.float32 and bool(torch.isfinite(w).all()) for w in weights(tmp_path).values())


def test_a_network_with_an_oracle_schedule_is_told_the_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(SparseNetwork, "set_oracle_step", lambda self, step: told.append(step), raising=False)
    config = tiny(6, data={"tasks": 1000})  # what counts is the pool that is given
    train(config, tmp_path, pools=POOLS, show_progress=False)
    assert told == [0, 0, 0, 1, 1, 2]  # two of five tasks a step


# Configuration


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_configurations_are_valid(path: Path) -> None:
    config = TrainingConfig.from_file(path)
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_defaults_and_tables() -> None:
    assert TrainingConfig.from_dict({}) == TrainingConfig()
    config = TrainingConfig.from_dict(
        {"loss": {"level_weights": [1, 2], "focal": 0}, "data": {"synthetic_weight": 1, "sizes": [64, 128, 128]}}
    )
    assert config.data.sizes == (64, 128, 128)
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.loss.level_weights == (1, 2)
    assert isinstance(config.data.synthetic_weight, float)
    assert config.model == PatchICLConfig.sparse()


def test_a_published_model_by_its_image_size() -> None:
    config = TrainingConfig.from_dict({"model": {"architecture": "published", "image_size": 128}})
    assert config.model == PatchICLConfig.published(128)
    part = TrainingConfig.from_dict(
        {"model": {"architecture": "published", "image_size": 128, "features": {"channels": 32}}}
    )
    assert part.model.to_dict()["features"] == {**config.model.to_dict()["features"], "channels": 32}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"optimizer": {}}, "TrainingConfig has no field optimizer; its fields are model, data, optimiser"),
        ({"optimiser": {"lr": 1.0}}, r"\[optimiser\] OptimiserConfig has no field lr"),
        ({"model": {"depht": 3}}, r"\[model\] SparseConfig has no field depht"),
        ({"model": {"architecture": "dense"}}, r"\[model\] architecture must be one of"),
        ({"data": 3}, r"\[data\] must be a table, got 3"),
        ({"data": {"tasks": "many"}}, r"\[data\] tasks must be of type int, got 'many'"),
        ({"data": {"tasks": 2.5}}, r"\[data\] tasks must be of type int, got 2.5"),
        ({"data": {"multi_class": True}}, r"\[data\] multi_class must be of type float, got True"),
        ({"data": {"tasks": [1]}}, r"\[data\] tasks must be of type int, got \[1\]"),
        ({"data": {"seed": -1}}, r"\[data\] seed must lie in \[0, 10000\), apart from .*, got -1"),
        ({"data": {"seed": 10_000}}, r"\[data\] seed must lie in \[0, 10000\), apart from .*, got 10000"),
        ({"data": {"augmentation": 1}}, r"\[data\] augmentation must be a table, got 1"),
        (
            {"data": {"augmentation": {"task": {"blurr": 1}}}},
            r"\[data\] augmentation: task: OperationsConfig has no field blurr",
        ),
        ({"data": {"sources": {}}}, r"\[data\] sources must be an array of tables, got {}"),
        ({"data": {"sources": [1]}}, r"\[data\] sources\[0\] must be a table, got 1"),
        ({"data": {"sources": [{"weight": 2}]}}, r"\[data\] sources\[0\]: .*'path'"),
        ({"data": {"sources": [{"path": "a/x"}, {"path": "b/x"}]}}, "sources must have different names, got x, x"),
        ({"data": {"synthetic_weight": 0}}, "synthetic_weight must be above 0 where there are no sources, got 0"),
        ({"data": {"min_support": 4}}, r"\[data\] max_support must be at least min_support = 4, got 3"),
        (
            {"data": {"targets": 4}},
            r"\[data\] max_support \+ targets must be at most subjects = 6, got 3 \+ 4",
        ),
        ({"data": {"classes": 0}}, r"\[data\] classes must be an int of at least 1, got 0"),
        ({"data": {"multi_class": 1.5}}, r"\[data\] multi_class must be a finite number in \[0, 1\], got 1.5"),
        ({"data": {"other_class": -1}}, r"\[data\] other_class must be a finite number in \[0, 1\], got -1"),
        ({"data": {"sizes": [64, 31]}}, r"\[data\] sizes must be an int of at least 32, got 31"),
        ({"data": {"sizes": [64.0]}}, r"\[data\] sizes must be an int of at least 32, got 64.0"),
        ({"data": {"sizes": 64}}, r"\[data\] sizes must be a list of ints, got 64"),
        ({"optimiser": {"ema": 1.0}}, r"\[optimiser\] ema must lie in \[0, 1\), got 1.0"),
        ({"optimiser": {"learning_rate": 0}}, r"\[optimiser\] learning_rate and clip must be above 0"),
        ({"optimiser": {"accumulate": 0}}, r"\[optimiser\] accumulate must be an int of at least 1, got 0"),
        ({"run": {"keep_steps": -1}}, r"\[run\] keep_steps must be an int of at least 0, got -1"),
        ({"run": {"tensorboard": 1}}, r"\[run\] tensorboard must be of type bool, got 1"),
        ({"schedule": {"steps": 0}}, r"\[schedule\] steps must be an int of at least 1, got 0"),
        (
            {"schedule": {"max_minutes": math.inf}},
            r"\[schedule\] max_minutes must be a finite number of at least 0, got inf",
        ),
        (
            {"run": {"precision": "half"}},
            r"\[run\] precision must be one of auto, float32, bfloat16, got 'half'",
        ),
        ({"loss": {"level_weights": "last"}}, r"\[loss\] level_weights must be one of"),
        ({"loss": {"level_weights": 3}}, r"\[loss\] level_weights must be one of .* or one number a level, got 3"),
        ({"loss": {"level_weights": {"a": 1}}}, r"\[loss\] level_weights must be one of"),
        ({"loss": {"level_weights": ["a", 1]}}, r"\[loss\] level_weights must hold finite numbers .*, got \['a', 1\]"),
        ({"loss": {"level_weights": [[1], 1]}}, r"\[loss\] level_weights must hold finite numbers"),
    ],
)
def test_bad_configurations(table: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig.from_dict(table)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config must be an existing TOML file"):
        TrainingConfig.from_file(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[data\n")
    with pytest.raises(ValueError, match=r"bad\.toml: "):
        TrainingConfig.from_file(tmp_path / "bad.toml")
    (tmp_path / "key.toml").write_text("[run]\nspeed = 3\n")
    with pytest.raises(ValueError, match=r"key\.toml: \[run\] RunConfig has no field speed"):
        loop.train_from_file(tmp_path / "key.toml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 1  # type: ignore[misc]
