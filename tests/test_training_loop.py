"""Training: the same seed gives the same weights, interrupted or not; nothing is written where it is refused."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import POOLS, SIZE, Task, equal, logged, logged_steps, make_classes, tiny, weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import icseg.training.loop as loop
from icseg.checkpoint import load_checkpoint, training_record
from icseg.data.synthetic import EVALUATION_SEED, TRAINING_SEEDS, validation_seed
from icseg.memory import SupportMemory
from icseg.model import PatchICL
from icseg.output import LevelOutput, SegmentationOutput
from icseg.sparse.network import SparseNetwork
from icseg.training import DataConfig, TrainingConfig, batches, calibration, train, validate
from icseg.training.batches import Batch, Tasks, training_batch
from icseg.training.calibration import fit_temperature
from icseg.training.distributed import Processes
from icseg.training.log import TRAIN_FILE
from icseg.training.state import STATE_FILE, STATE_KEY
from icseg.training.trainer import Trainer

ALONE = Processes(0, 1, torch.device("cpu"))


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send this process an interrupt during `step`, as Ctrl-C does."""
    usual = loop.batches_ahead

    def interrupting(pool: Tasks, config: DataConfig, seed: int, first: int, *parts: Any) -> Iterator[Batch]:
        for number, batch in enumerate(usual(pool, config, seed, first, *parts), first):
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
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_resume_from_a_checkpoint_drops_what_came_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(run={"checkpoint_steps": 3})

    class Killed(BaseException):
        pass

    def kill(*arguments: object) -> object:
        if arguments[3] == 5:
            raise Killed
        return training_batch(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(batches, "training_batch", kill)
        with pytest.raises(Killed):
            train(config, tmp_path / "killed", pools=POOLS, show_progress=False)
    assert logged_steps(tmp_path / "killed") == ([1, 2, 3, 4, 5], [4])
    with (tmp_path / "killed" / TRAIN_FILE).open("a") as file:
        file.write("5,0.1,cut sho")
    train(config, tmp_path / "killed", resume=True, pools=POOLS, show_progress=False)
    train(config, tmp_path / "whole", pools=POOLS, show_progress=False)
    assert equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    assert logged_steps(tmp_path / "whole") == ([1, 2, 3, 4, 5, 6], [4, 6])


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
    made = training_record(result.model)
    assert made["step"] == 2
    assert TrainingConfig.from_dict(made["config"]) == tiny(2)


def test_a_finished_run_can_be_resumed_to_no_effect(tmp_path: Path) -> None:
    first = train(tiny(2), tmp_path, pools=POOLS, show_progress=False)
    before, rows = weights(tmp_path), logged(tmp_path)
    assert train(tiny(2), tmp_path, resume=True, pools=POOLS, show_progress=False).dice == first.dice
    assert equal(weights(tmp_path), before)
    assert logged(tmp_path) == rows


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
    totals = [row["total"] for row in logged(tmp_path)[0]]
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
    usual, count = Trainer.loss, iter(range(100))

    def broken(trainer: Trainer, batch: Batch) -> dict[str, Tensor]:
        terms = usual(trainer, batch)
        return {**terms, "total": terms["total"] * (math.nan if next(count) in bad else 1.0)}

    monkeypatch.setattr(Trainer, "loss", broken)
    bad = range(1, 2)
    train(tiny(3), tmp_path / "one", pools=POOLS, show_progress=False)
    assert all(bool(torch.isfinite(w).all()) for w in weights(tmp_path / "one").values())
    rows, _ = logged(tmp_path / "one")
    assert ["total" in row for row in rows] == [True, False, True]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 0]
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


def test_a_state_from_before_a_key_had_its_default(tmp_path: Path) -> None:
    train(tiny(2), tmp_path, pools=POOLS, show_progress=False)
    with safe_open(tmp_path / STATE_FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        state = json.loads(file.metadata()[STATE_KEY])

    def resume() -> loop.TrainingResult:
        save_file(tensors, tmp_path / STATE_FILE, {STATE_KEY: json.dumps(state)})
        return train(tiny(2), tmp_path, resume=True, pools=POOLS, show_progress=False)

    del state["config"]["optimiser"]["accumulate"], state["progress"]["temperature"]
    assert resume().finished
    state["config"]["optimiser"]["momentum"] = 1
    with pytest.raises(ValueError, match=r"must have a configuration of this version of icseg, got \[optimiser\]"):
        resume()


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


def test_a_level_is_scored_where_there_is_one() -> None:
    class Network(nn.Module):
        """Right at the finest level alone, of two or three."""

        def encode_support(self, images: Tensor, masks: Tensor) -> None:
            pass

        def forward(self, target: Tensor, memory: None) -> SegmentationOutput:
            right = (target > 0.5).float() * 2 - 1
            maps = [-right] * (target.shape[-1] // 32) + [right]
            coords = torch.zeros(len(target), 1, 2, dtype=torch.int32)
            return SegmentationOutput(right, [LevelOutput((8, 8), m, m[:, None], coords) for m in maps])

    pool = []
    for side in (32, 64):
        masks = np.zeros((3, side, side), np.uint8)
        masks[:, :9] = 1
        pool.append(Task(masks * np.uint8(255), masks))
    assert validate(Network(), pool, 1, torch.device("cpu")) == {"dice": 1.0, "level_dice": [0.0, 0.5, 1.0]}


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
    assert training_record(path)["temperature"] == fitted
    values.clear()
    train(tiny(3), tmp_path, resume=True, pools=POOLS, show_progress=False)
    assert values == [fitted]


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
    run = Trainer(config, ALONE)
    run.average = fake  # type: ignore[assignment]
    run.check_loss((32, 16))
    wanted = [((1, 1, 1, side, side // 2), classes) for side in (48, 64) for classes in (1, 3)]
    assert shapes == wanted


def test_the_loss_of_a_step_has_the_class_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(data={"multi_class": 1.0})
    run = Trainer(config, ALONE)
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
    assert run.loss(batch)["total"].item() == pytest.approx(0.0, abs=1e-3)


def test_a_first_stage_ends_where_it_is_told(tmp_path: Path) -> None:
    """With the learning rates of the whole schedule, and its weights at that step."""
    whole = train(tiny(8, run={"keep_steps": 3}), tmp_path / "whole", pools=POOLS, show_progress=False)
    start = train(tiny(8, schedule={"stop": 3}), tmp_path / "start", pools=POOLS, show_progress=False)
    assert (whole.steps, start.steps, start.finished) == (8, 3, True)
    kept = load_checkpoint(tmp_path / "whole" / "model-3.safetensors")[1]
    ended = weights(tmp_path / "start")
    kept["network.temperature"] = ended["network.temperature"]  # which is fitted at the end of a run
    assert equal(kept, ended)
    assert logged_steps(tmp_path / "start")[0] == [1, 2, 3]
    with pytest.raises(ValueError, match="stop must be at most steps = 8, got 9"):
        tiny(8, schedule={"stop": 9})
