"""Training: the same seed gives the same weights, interrupted or not; bad configurations are named."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import icseg.training.loop as loop
from icseg.checkpoint import load_checkpoint
from icseg.config import PatchICLConfig
from icseg.data.synthetic import EVALUATION_SEED, TRAINING_SEEDS, validation_seed
from icseg.memory import SupportMemory
from icseg.model import PatchICL
from icseg.output import LevelOutput, SegmentationOutput
from icseg.sparse.network import SparseNetwork
from icseg.training import (
    DataConfig,
    OptimiserConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
    batches,
    calibration,
    train,
)
from icseg.training.augmentation import AugmentationConfig
from icseg.training.batches import Batch, Tasks, batches_ahead, repeat_memory, training_batch, validation_batch
from icseg.training.calibration import fit_temperature
from icseg.training.log import LOG_FILE, read_rows
from icseg.training.optimisation import autocast, make_optimiser, update_average
from icseg.training.state import STATE_FILE, STATE_KEY

CONFIGS = Path(__file__).parent.parent / "configs"
SIZE = 32
MODEL = {
    "levels": [16, 32],
    "target_patches": [4, 6],
    "support_patches": [4, 4],
    "dim": 16,
    "depth": 1,
    "heads": 2,
    "stem_channels": 8,
    "propagation_heads": 2,
    "propagation_key_dim": 4,
    "propagation_value_dim": 4,
}
DATA = {
    "tasks": 5,
    "size": SIZE,
    "subjects": 4,
    "tasks_per_step": 2,
    "targets": 2,
    "max_support": 2,
    "multi_class": 0.0,
}


@dataclass
class Task:
    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]


def make_task(seed: int, subjects: int = 4) -> Task:
    """Bright squares on noise."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((subjects, SIZE, SIZE), np.uint8)
    for mask in masks:
        top, left = rng.integers(0, SIZE - 14, 2)
        mask[top : top + 14, left : left + 14] = 1
    return Task((masks * 140 + rng.integers(0, 90, masks.shape)).astype(np.uint8), masks)


POOLS = ([make_task(i) for i in range(5)], [make_task(100)])


def tiny(steps: int = 6, **sections: dict[str, object]) -> TrainingConfig:
    tables: dict[str, dict[str, object]] = {
        "model": MODEL,
        "data": DATA,
        "schedule": {"steps": steps, "warmup": 2},
        "loss": {"covered_bce": 1.0, "focal": 0},
        "run": {"log_steps": 1, "validate_steps": 4, "precision": "float32"},
    }
    for name, table in sections.items():
        tables[name] = {**tables.get(name, {}), **table}
    return TrainingConfig.from_dict(tables)


def weights(directory: Path) -> dict[str, Tensor]:
    return load_checkpoint(directory / "model.safetensors")[1]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process an interrupt during `step`, as Ctrl-C does."""
    usual = loop.batches_ahead

    def interrupting(pool: Tasks, config: DataConfig, seed: int, first: int) -> Iterator[Batch]:
        for number, batch in enumerate(usual(pool, config, seed, first), first):
            if number == step:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(loop, "batches_ahead", interrupting)


def test_interrupted_and_resumed_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tiny(), tmp_path / "whole", pools=POOLS, show_progress=False)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        part = train(tiny(), tmp_path / "parts", pools=POOLS, show_progress=False)
    assert (part.finished, part.steps, part.model) == (False, 3, None)
    torch.manual_seed(123)  # the resumed run must not depend on it
    resumed = train(tiny(), tmp_path / "parts", resume=True, pools=POOLS, show_progress=False)
    assert resumed.finished
    assert resumed.steps == whole.steps == 6
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert resumed.dice == whole.dice is not None
    timeless = [
        [
            {k: v for k, v in row.items() if k not in ("minutes", "samples_per_second")}
            for row in read_rows(tmp_path / d)
        ]
        for d in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]


def test_resume_from_a_checkpoint_drops_what_came_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(run={"checkpoint_steps": 3})

    class Killed(BaseException):
        pass

    def kill(*arguments: object) -> object:
        if arguments[-1] == 5:
            raise Killed
        return training_batch(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(batches, "training_batch", kill)
        with pytest.raises(Killed):
            train(config, tmp_path / "killed", pools=POOLS, show_progress=False)
    assert [row["step"] for row in read_rows(tmp_path / "killed")] == [1, 2, 3, 4, 4, 5]
    with (tmp_path / "killed" / LOG_FILE).open("a") as file:
        file.write('{"step": 5, "cut sho')
    train(config, tmp_path / "killed", resume=True, pools=POOLS, show_progress=False)
    train(config, tmp_path / "whole", pools=POOLS, show_progress=False)
    assert equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert [row["step"] for row in read_rows(tmp_path / "killed")] == [1, 2, 3, 4, 4, 5, 6, 6, 6]


def test_the_seed_fixes_everything_and_matters(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(hash(name) % 1000)
        train(tiny(2, run={"seed": seed}), tmp_path / name, pools=POOLS, show_progress=False)
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not equal(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_training_leaves_the_global_generator_and_handlers_alone(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(tiny(1), tmp_path, pools=POOLS, show_progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert signal.getsignal(signal.SIGINT) is handler


def test_training_off_the_main_thread(tmp_path: Path) -> None:
    results: list[loop.TrainingResult] = []
    thread = threading.Thread(target=lambda: results.append(train(tiny(1), tmp_path, pools=POOLS, show_progress=False)))
    thread.start()
    thread.join()
    assert results[0].finished


def test_the_trained_model_opens_and_says_how_it_was_made(tmp_path: Path) -> None:
    result = train(tiny(2), tmp_path, pools=POOLS, show_progress=False)
    assert result.model == tmp_path / "model.safetensors"
    model = PatchICL.from_pretrained(result.model)
    out = model(torch.rand(1, 1, SIZE, SIZE), torch.rand(1, 2, 1, SIZE, SIZE), torch.ones(1, 2, 1, SIZE, SIZE))
    assert bool(torch.isfinite(out.logits).all())
    with safe_open(result.model, framework="pt") as file:
        made = json.loads(file.metadata()["training"])
    assert made["step"] == 2
    assert TrainingConfig.from_dict(made["config"]) == tiny(2)


def test_a_finished_run_can_be_resumed_to_no_effect(tmp_path: Path) -> None:
    first = train(tiny(2), tmp_path, pools=POOLS, show_progress=False)
    before, rows = weights(tmp_path), read_rows(tmp_path)
    assert train(tiny(2), tmp_path, resume=True, pools=POOLS, show_progress=False).dice == first.dice
    assert equal(weights(tmp_path), before)
    assert read_rows(tmp_path) == rows


def test_a_run_can_start_from_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(99)
    PatchICL(tiny().model).save_pretrained(tmp_path / "initial.safetensors")
    start = {"initial": str(tmp_path / "initial.safetensors")}
    slow = {"learning_rate": 1e-9, "weight_decay": 0.0}
    train(tiny(1, run=start, optimiser=slow), tmp_path / "run", pools=POOLS, show_progress=False)
    initial, after = load_checkpoint(tmp_path / "initial.safetensors")[1], weights(tmp_path / "run")
    initial["network.temperature"] = after["network.temperature"]  # it is fitted at the end
    assert all(torch.allclose(initial[name], after[name], atol=1e-6) for name in initial)
    with pytest.raises(ValueError, match="initial must be a checkpoint of the configured model"):
        train(tiny(1, run=start, model={"dim": 8}), tmp_path / "other", pools=POOLS, show_progress=False)


def test_the_loss_falls(tmp_path: Path) -> None:
    train(
        tiny(
            40,
            optimiser={"learning_rate": 3e-3},
            data={"augmentation": {"crop": 0.0, "task": {"invert": 0.0}}},
            run={"log_steps": 10},
        ),
        tmp_path,
        pools=POOLS,
        show_progress=False,
    )
    totals = [row["total"] for row in read_rows(tmp_path) if "total" in row]
    assert totals[-1] < 0.9 * totals[0]


def test_the_tasks_are_generated_and_held_out(tmp_path: Path) -> None:
    assert len({TRAINING_SEEDS[-1], validation_seed(0), validation_seed(TRAINING_SEEDS[-1]), EVALUATION_SEED}) == 4
    assert TRAINING_SEEDS[-1] < validation_seed(0) <= validation_seed(TRAINING_SEEDS[-1]) < EVALUATION_SEED
    config = tiny(data={"tasks": 2, "validation_tasks": 1, "size": 64})
    training, validation = loop.open_pools(config, tmp_path)
    assert (len(training), len(validation)) == (2, 1)
    assert training[0].images.shape == (4, 64, 64)
    assert not any(np.array_equal(training[i].images, validation[0].images) for i in range(2))
    assert (tmp_path / "pool" / "training").is_dir()
    assert len(loop.open_pools(tiny(data={"tasks": 2, "size": 64, "validation_tasks": 0}), tmp_path)[1]) == 0


def test_a_step_that_is_not_finite_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, count = loop._Run._loss, iter(range(100))

    def broken(run: loop._Run, batch: Batch) -> dict[str, Tensor]:
        terms = usual(run, batch)
        return {**terms, "total": terms["total"] * (math.nan if next(count) in bad else 1.0)}

    monkeypatch.setattr(loop._Run, "_loss", broken)
    bad = range(1, 2)
    train(tiny(3), tmp_path / "one", pools=POOLS, show_progress=False)
    assert all(bool(torch.isfinite(w).all()) for w in weights(tmp_path / "one").values())
    assert ["total" in row for row in read_rows(tmp_path / "one")] == [True, False, True, False, False]
    bad = range(100)
    with pytest.raises(FloatingPointError, match="loss and gradient must be finite, got 21 steps running"):
        train(tiny(50), tmp_path / "all", pools=POOLS, show_progress=False)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"resume needs a run's state\.safetensors"):
        train(tiny(1), tmp_path / "none", resume=True, pools=POOLS, show_progress=False)
    train(tiny(1), tmp_path, pools=POOLS, show_progress=False)
    with pytest.raises(FileExistsError, match="must not hold a run unless resume is given"):
        train(tiny(1), tmp_path, pools=POOLS, show_progress=False)
    other = tiny(2, optimiser={"clip": 2.0}, run={"log_steps": 3})
    with pytest.raises(
        ValueError, match=r"must keep its configuration, got another \[optimiser\] clip, \[schedule\] steps"
    ):
        train(other, tmp_path, resume=True, pools=POOLS, show_progress=False)
    with pytest.raises(ValueError, match=r"got another \[run\] seed"):
        train(tiny(1, run={"seed": 3}), tmp_path, resume=True, pools=POOLS, show_progress=False)
    (tmp_path / STATE_FILE).write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="must be the state of a training run, got another or a corrupt file"):
        train(tiny(1), tmp_path, resume=True, pools=POOLS, show_progress=False)


@pytest.mark.parametrize(
    ("sections", "resume", "message"),
    [
        ({}, True, r"resume needs a run's state\.safetensors, got .* without one"),
        ({"run": {"initial": "none.safetensors"}}, False, "checkpoint must be an existing .safetensors file"),
        ({"loss": {"support_patch": 1.0}}, False, "must be 0 where support patches are not decoded, got 1.0 and 0.0"),
        ({"loss": {"support_aggregated": 0.5}}, False, "must be 0 where support patches are not decoded"),
        ({"loss": {"level_weights": [1, 1, 1]}}, False, "level_weights must hold 2 numbers, one a level, got 3"),
        ({"data": {"size": 16}, "loss": {"level_weights": [1, 1]}}, False, "must hold 1 numbers, one a level, got 2"),
    ],
)
def test_refusals_come_before_anything_is_written(
    tmp_path: Path, sections: dict[str, dict[str, object]], resume: bool, message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(tiny(1, **sections), tmp_path / "run", resume=resume, show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_the_configured_models_are_refused(tmp_path: Path) -> None:
    PatchICL(tiny(model={"dim": 8}).model).save_pretrained(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="initial must be a checkpoint of the configured model"):
        train(tiny(1, run={"initial": str(tmp_path / "other.safetensors")}), tmp_path / "run", show_progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]
    config = json.dumps({"config": tiny(1).to_dict(), "progress": {}})
    save_file({"model/weight": torch.zeros(1)}, tmp_path / STATE_FILE, {STATE_KEY: config})
    with pytest.raises(ValueError, match="must hold the state of this model, got another"):
        train(tiny(1), tmp_path, resume=True, show_progress=False)


def test_a_file_or_a_pool_of_other_tasks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="directory must be a folder, got the file"):
        train(tiny(1), tmp_path / "file", show_progress=False)
    small = {"tasks": 1, "validation_tasks": 1, "size": 64, "pool": str(tmp_path / "pool")}
    loop.open_pools(tiny(data=small), tmp_path)
    with pytest.raises(ValueError, match="directory must be empty or hold tasks made with"):
        train(tiny(1, data={**small, "seed": 1}), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


def test_a_wall_clock_budget_ends_the_run(tmp_path: Path) -> None:
    config = tiny(10**6, schedule={"steps": 10**6, "max_minutes": 0.5 / 60})
    result = train(config, tmp_path, pools=POOLS, show_progress=False)
    assert result.finished
    assert 0 < result.steps < 10**6
    assert result.minutes >= 0.5 / 60


class Tempered:
    """Gives SparseNetwork a temperature that does nothing but be remembered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: list[float] = []
        record = self.values
        monkeypatch.setattr(SparseNetwork, "set_temperature", lambda self, value: record.append(value), raising=False)


def test_a_trained_network_gets_its_temperature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = Tempered(monkeypatch).values
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        train(tiny(3), tmp_path, pools=POOLS, show_progress=False)
    assert values == []
    path = train(tiny(3), tmp_path, resume=True, pools=POOLS, show_progress=False).model
    assert path is not None
    fitted = fit_temperature(PatchICL.from_pretrained(path), POOLS[1], 2, torch.device("cpu"))
    assert values == [1.0, fitted]
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["training"])["temperature"] == fitted
    rows = read_rows(tmp_path)
    assert [(row["step"], row["temperature"]) for row in rows if "temperature" in row] == [(3, fitted)]
    values.clear()
    train(tiny(3), tmp_path, resume=True, pools=POOLS, show_progress=False)
    assert values == [fitted]
    assert read_rows(tmp_path) == rows


def test_no_temperature_without_validation_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = Tempered(monkeypatch).values
    train(tiny(1), tmp_path, pools=(POOLS[0], []), show_progress=False)
    assert values == []


def test_a_run_starts_at_the_temperature_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PatchICL(tiny().model).save_pretrained(tmp_path / "initial.safetensors")
    values = Tempered(monkeypatch).values
    start = {"initial": str(tmp_path / "initial.safetensors")}
    train(tiny(1, run=start), tmp_path / "run", pools=(POOLS[0], []), show_progress=False)
    assert values == [1.0, 1.0]


class Overconfident(nn.Module):
    """Logits three times those that the masks were drawn with."""

    def encode_support(self, images: Tensor, masks: Tensor) -> None:
        assert images.shape == masks.shape

    def forward(self, target: Tensor, memory: None) -> SegmentationOutput:
        return SegmentationOutput(3 * (8 * target - 4), [])


@pytest.mark.parametrize("most", [2_000_000, 40_000])
def test_the_temperature_undoes_overconfidence(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(calibration, "MOST_PIXELS", most)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 4, 200, 200)).astype(np.uint8)
    masks = (rng.random(images.shape) < 1 / (1 + np.exp(4 - images / 255 * 8))).astype(np.uint8)
    pool = [Task(*task) for task in zip(images, masks, strict=True)]
    fitted = [fit_temperature(Overconfident(), pool, 1, torch.device("cpu")) for _ in range(2)]
    assert fitted[0] == fitted[1] == pytest.approx(3.0, rel=0.05)


def test_the_losses_are_tried_at_every_size_and_number_of_classes(tmp_path: Path) -> None:
    shapes: list[tuple[tuple[int, ...], int]] = []

    def fake(image: Tensor, images: Tensor, masks: Tensor, target_mask: Tensor) -> SegmentationOutput:
        shapes.append((tuple(images.shape), masks.shape[2]))
        return SegmentationOutput(torch.zeros_like(target_mask), [])

    config = tiny(data={"sizes": [64, 48, 64], "multi_class": 0.1, "classes": 3})
    run = loop._Run(config, tmp_path, torch.device("cpu"))
    run.average = fake  # type: ignore[assignment]
    run.check_loss((32, 16))
    wanted = [((1, 1, 1, side, side // 2), classes) for side in (48, 64) for classes in (1, 3)]
    assert shapes == wanted


def test_the_loss_of_a_step_has_the_class_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(data={"multi_class": 1.0})
    run = loop._Run(config, tmp_path, torch.device("cpu"))
    batch = training_batch([make_classes(i, 3) for i in range(2)], config.data, 0, 0)

    class Fake(nn.Module):
        def encode_support(self, images: Tensor, masks: Tensor, seed: int) -> SupportMemory:
            assert masks.shape == (2, images.shape[1], 3, SIZE, SIZE)
            return SupportMemory("f", 2, {"masks": masks})

        def forward(self, target: Tensor, memory: SupportMemory, target_mask: Tensor, seed: int) -> SegmentationOutput:
            assert memory.batch == len(target) == 4
            assert torch.equal(memory.tensors["masks"][0], memory.tensors["masks"][1])
            logits = target_mask * 20 - 10
            coords = torch.zeros(4, 1, 2, dtype=torch.int32)
            level = LevelOutput((SIZE, SIZE), logits, logits[:, None], coords)
            return SegmentationOutput(logits, [level])

    run.model = Fake()  # type: ignore[assignment]
    assert run._loss(batch)["total"].item() == pytest.approx(0.0, abs=1e-3)


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


def make_classes(seed: int, classes: int, size: tuple[int, int] = (SIZE, SIZE)) -> Task:
    """Class c fills the rows 4 (c - 1) to 4 c - 1 of every subject, in brightness 40 c."""
    masks = np.zeros((4, *size), np.uint8)
    for c in range(1, classes + 1):
        masks[:, 4 * c - 4 : 4 * c] = c
    return Task(masks * np.uint8(40) + np.uint8(seed), masks)


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
