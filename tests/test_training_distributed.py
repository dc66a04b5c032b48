"""Several processes give the weights of one; micro-batches, and the devices of processes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import DATA, MODEL, POOLS, Task, accumulated, equal, logged, logged_steps, tiny, weights
from torch import nn

from icseg.training import DataConfig, loop, train
from icseg.training.batches import batches_ahead, training_batch
from icseg.training.distributed import Processes, connected
from icseg.training.gradients import GradientMean

ALONE = Processes(0, 1, torch.device("cpu"))
TESTS = Path(__file__).parent


def toml(table: dict[str, Any]) -> str:
    return "".join(f"{key} = {value}\n" for key, value in table.items())


COMMAND_CONFIG = f"""
[model]
{toml(MODEL)}
[data]
{toml({**DATA, "tasks": 2, "validation_tasks": 1})}
[optimiser]
accumulate = 2
[schedule]
steps = 2
[run]
log_steps = 1
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all the runs of distributed_runs.py; `half` was begun by one process."""
    out, threads = tmp_path_factory.mktemp("runs"), torch.get_num_threads()
    torch.set_num_threads(1)  # the rounding within a micro-batch depends on it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "stop_request", lambda: StopsAfter(2))
        train(accumulated(2), out / "half", pools=POOLS, show_progress=False)
    (out / "run.toml").write_text(COMMAND_CONFIG)
    (out / "output.txt").write_text(torchrun(TESTS / "distributed_runs.py", out))
    for accumulate in (2, 4):
        train(accumulated(accumulate), out / f"one-{accumulate}", pools=POOLS, show_progress=False)
    train(accumulated(2), out / "stopped", resume=True, pools=POOLS, show_progress=False)
    torch.set_num_threads(threads)
    return out


def torchrun(script: Path, argument: Path) -> str:
    """What the script prints in two processes of one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(script), str(argument)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class StopsAfter:
    """In place of the event of `stop_request`."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __enter__(self) -> StopsAfter:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def results(runs: Path, name: str) -> tuple[object, object]:
    first, second = (json.loads((runs / f"results-{rank}.json").read_text())[name] for rank in (0, 1))
    return first, second


@pytest.mark.parametrize("accumulate", [2, 4])
def test_two_processes_give_the_weights_of_one(runs: Path, accumulate: int) -> None:
    """Bit for bit: gradients are summed in float64, and rounded to float32 once."""
    assert results(runs, str(accumulate))[0][:3] == results(runs, str(accumulate))[1][:3] == [5, True, True]  # type: ignore[index]
    assert equal(weights(runs / str(accumulate)), weights(runs / f"one-{accumulate}"))
    assert logged(runs / str(accumulate)) == logged(runs / f"one-{accumulate}")
    assert not equal(weights(runs / "2"), weights(runs / "4"))


def test_a_run_goes_on_with_another_number_of_processes(runs: Path) -> None:
    assert results(runs, "resumed")[0][:3] == [5, True, True]  # type: ignore[index]
    for resumed in ("half", "stopped"):  # from one process to two, and from two to one
        assert equal(weights(runs / resumed), weights(runs / "one-2"))
        assert logged(runs / resumed) == logged(runs / "one-2")


def test_all_processes_stop_when_one_is_asked_to(runs: Path) -> None:
    first, second = results(runs, "stopped")
    assert first[:3] == second[:3] == [3, False, False]  # type: ignore[index]


def test_all_processes_end_with_the_budget(runs: Path) -> None:
    first, second = results(runs, "budget")
    assert first == second  # the minutes too: they are agreed
    assert first[1:3] == [True, True]  # type: ignore[index]


def test_one_micro_batch_that_is_not_finite_leaves_out_the_step_everywhere(runs: Path) -> None:
    rows, _ = logged(runs / "broken")
    assert [row["skipped_steps"] for row in rows] == [0, 1, 0]
    assert ["total" in row for row in rows] == [True, False, True]
    assert all(bool(torch.isfinite(weight).all()) for weight in weights(runs / "broken").values())
    assert results(runs, "broken")[0][0] == results(runs, "broken")[1][0] == 3  # type: ignore[index]


def test_micro_batches_must_be_shared_out_evenly(runs: Path) -> None:
    message = "[optimiser] accumulate must be a multiple of the number of processes, 2, got 3"
    assert results(runs, "odd") == (message, message)
    assert not (runs / "odd").exists()


def test_the_command_speaks_once_and_makes_its_tasks_once(runs: Path) -> None:
    lines = (runs / "output.txt").read_text().splitlines()
    assert [line.split(" in ")[0] for line in lines] == ["2 steps", str(runs / "command" / "model.safetensors")]
    assert logged_steps(runs / "command") == ([1, 2], [2])
    assert (runs / "command" / "pool" / "training" / "pool.json").is_file()


# Micro-batches


def test_micro_batches_share_the_sizes_of_their_step() -> None:
    config = DataConfig(**{**DATA, "tasks_per_step": 1, "sizes": (32, 48)})  # type: ignore[arg-type]
    for step in range(8):
        parts = [training_batch(POOLS[0], config, 0, step, part, 4) for part in range(4)]
        assert len({(part.support_images.shape, part.targets.shape) for part in parts}) == 1
        assert len({part.seed for part in parts}) == 4


def test_the_micro_batches_of_a_step_go_on_through_the_pool() -> None:
    asked: list[int] = []

    class Watched(list[Task]):
        def __getitem__(self, index: int) -> Task:  # type: ignore[override]
            asked.append(index)
            return super().__getitem__(index)

    config = DataConfig(**{**DATA, "tasks_per_step": 1})  # type: ignore[arg-type]
    for step, part in itertools.product(range(2), range(5)):
        training_batch(Watched(POOLS[0]), config, 0, step, part, 5)
    assert sorted(asked[:5]) == sorted(asked[5:]) == [0, 1, 2, 3, 4]


def test_the_first_micro_batch_is_that_of_a_step_without_others() -> None:
    config = DataConfig(**DATA)  # type: ignore[arg-type]
    assert training_batch(POOLS[0], config, 0, 0, 0, 4).seed == training_batch(POOLS[0], config, 0, 0).seed


def test_a_process_makes_its_own_micro_batches_ahead() -> None:
    config = DataConfig(**DATA)  # type: ignore[arg-type]
    made = batches_ahead(POOLS[0], config, 0, 3, range(1, 4, 2), 4)
    for step, part in ((3, 1), (3, 3), (4, 1)):
        assert next(made).seed == training_batch(POOLS[0], config, 0, step, part, 4).seed
    made.close()


# Gradients


def test_the_mean_of_gradients_and_losses() -> None:
    model = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in ("both", "one", "none")})
    gradients = GradientMean(list(model.parameters()))
    for _ in range(2):  # the second time shows that it starts anew
        (3 * model["both"].weight.sum() + 4 * model["one"].weight.sum()).backward()
        gradients.add({"total": torch.tensor(1.0), "error/0": torch.tensor(5.0), "error/1": torch.tensor(2.0)})
        model["both"].weight.sum().backward()
        gradients.add({"total": torch.tensor(2.0), "error/0": torch.tensor(6.0)})
        losses = gradients.finish(ALONE, 2)
        assert model["both"].weight.grad == 2.0
        assert model["one"].weight.grad == 2.0
        assert model["none"].weight.grad is None
        assert losses == {"total": 1.5, "error/0": 5.5, "error/1": 2.0}
        model.zero_grad()


def test_gradients_keep_the_layout_of_their_parameters() -> None:
    convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    gradients = GradientMean(list(convolution.parameters()))
    convolution(torch.rand(1, 3, 8, 8)).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in convolution.parameters() if parameter.grad is not None]
    gradients.add({"total": torch.tensor(0.0)})
    gradients.finish(ALONE, 1)
    for parameter, wanted in zip(convolution.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, wanted)
        assert parameter.grad.stride() == parameter.stride()


def test_accumulation_is_a_larger_batch(tmp_path: Path, threads: Callable[[int], None]) -> None:
    """One step of two equal micro-batches is a step of one of them."""
    threads(1)
    one = {"data": {"tasks": 1, "tasks_per_step": 1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("icseg.training.batches.training_batch", lambda *a: training_batch(*a[:4]))
        for accumulate in (1, 2):
            config = tiny(2, **one, optimiser={"accumulate": accumulate})
            train(config, tmp_path / str(accumulate), pools=POOLS, show_progress=False)
    assert equal(weights(tmp_path / "1"), weights(tmp_path / "2"))


# Processes


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda:0", 2, "device must be cpu or cuda where torchrun starts several processes, got cuda:0"),
        ("cuda", 1, "torchrun must start at most one process a GPU, got LOCAL_RANK 1 with 1 GPUs"),
    ],
)
def test_devices_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, message: str) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=message), connected(torch.device(device)):
        pass


def test_a_process_alone_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with connected(torch.device("cpu")) as processes:
        assert (processes.first, processes.count, list(processes.share(3))) == (True, 1, [0, 1, 2])
        assert processes.largest(2.0, 1.0) == [2.0, 1.0]
    assert not torch.distributed.is_initialized()
