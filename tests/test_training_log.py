"""The log of a run: tables, event files, weights that are kept; and a process that is killed while it writes."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import POOLS, SIZE, equal, logged, tiny, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import icseg
from icseg.checkpoint import training_record
from icseg.data.synthetic import GENERATOR_VERSION
from icseg.training import TrainingConfig, batches, train
from icseg.training.batches import training_batch
from icseg.training.log import EVENTS_FOLDER, TRAIN_FILE, VALIDATION_FILE, Table

TERMS = ["target_combined/0", "target_combined/1", "covered_bce/0", "covered_bce/1"]


class Killed(BaseException):
    pass


def train_killed_at(step: int, config: TrainingConfig, directory: Path) -> None:
    """Train until the batch of `step` is asked for; the last checkpoint is an older one."""

    def kill(*arguments: object) -> object:
        if arguments[3] == step:
            raise Killed
        return training_batch(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "training_batch", kill)
        with pytest.raises(Killed):
            train(config, directory, pools=POOLS, show_progress=False)


# Tables


def test_what_the_tables_hold(tmp_path: Path) -> None:
    result = train(tiny(6, run={"log_steps": 2}), tmp_path, pools=POOLS, show_progress=False)
    with (tmp_path / TRAIN_FILE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "step",
        "minutes",
        "learning_rate",
        "total",
        *TERMS,
        "gradient_norm",
        "samples_per_second",
        "skipped_steps",
        "peak_memory_mib",
    ]
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert all(float(value) > 0 for row in rows for name, value in row.items() if name != "skipped_steps")
    assert all(float(row["total"]) == pytest.approx(sum(float(row[t]) / 2 for t in TERMS), abs=1e-5) for row in rows)
    assert float(rows[-1]["peak_memory_mib"]) > 50  # torch alone takes more
    validation = Table(tmp_path / VALIDATION_FILE).rows()
    assert [list(row) for row in validation] == [["step", "minutes", "dice", "dice/0", "dice/1"]] * 2
    assert [row["step"] for row in validation] == [4, 6]
    assert validation[-1]["dice"] == result.dice


def test_a_row_is_the_mean_of_its_steps(tmp_path: Path) -> None:
    for name, every in (("each", 1), ("pairs", 2)):
        train(tiny(4, run={"log_steps": every}), tmp_path / name, pools=POOLS, show_progress=False)
    each, pairs = (logged(tmp_path / name)[0] for name in ("each", "pairs"))
    for i, row in enumerate(pairs):
        for name in ("total", *TERMS, "gradient_norm"):
            assert row[name] == pytest.approx((each[2 * i][name] + each[2 * i + 1][name]) / 2, abs=2e-6)


def test_a_table_grows_in_both_directions(tmp_path: Path) -> None:
    table = Table(tmp_path / "table.csv")
    assert table.rows() == []
    table.append({"step": 1, "a": 0.5})
    table.append({"step": 2, "b": -1e-7})
    table.append({"step": 3, "a": float("nan")})
    assert table.path.read_text() == "step,a,b\n1,0.5,\n2,,-1e-07\n3,nan,\n"
    Table(table.path).append({"step": 4, "c": 2})
    assert table.path.read_text().splitlines()[0] == "step,a,b,c"
    assert [list(row) for row in Table(table.path).rows()] == [
        ["step", "a"],
        ["step", "b"],
        ["step", "a"],
        ["step", "c"],
    ]


def test_a_table_goes_back(tmp_path: Path) -> None:
    table = Table(tmp_path / "table.csv")
    table.rewind(3)
    assert not table.path.exists()
    for step in (1, 2, 3):
        table.append({"step": step, "a": step / 2})
    with table.path.open("a") as file:
        file.write("4,2")  # cut short
    assert [row["step"] for row in table.rows()] == [1, 2, 3]
    table.rewind(2)
    assert table.path.read_text() == "step,a\n1,0.5\n2,1.0\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,a\n1,high\n", r"table\.csv must be a table of numbers, got another file"),
        ("step,a\n1,2,3\n", r"table\.csv must be a table of numbers, got another file"),
        ("time,a\n1,2\n", r"table\.csv must have a step in every row, got rows without one"),
    ],
)
def test_files_that_are_no_table(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        Table(tmp_path / "table.csv").rows()


# TensorBoard


def test_event_files_hold_the_tables_once(tmp_path: Path) -> None:
    config = tiny(6, run={"tensorboard": True, "checkpoint_steps": 3})
    train_killed_at(5, config, tmp_path)
    train(config, tmp_path, resume=True, pools=POOLS, show_progress=False)
    events = EventAccumulator(str(tmp_path / EVENTS_FOLDER)).Reload()
    for group, name in (("train", TRAIN_FILE), ("validation", VALIDATION_FILE)):
        rows = Table(tmp_path / name).rows()
        columns = [name for name in rows[0] if name != "step"]
        for column in columns:
            points = events.Scalars(f"{group}/{column}")
            assert [point.step for point in points] == [row["step"] for row in rows]
            assert [point.value for point in points] == pytest.approx([row[column] for row in rows], rel=1e-6)
    assert len(list((tmp_path / EVENTS_FOLDER).iterdir())) == 2


def test_tensorboard_is_asked_for_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"must be false without the package tensorboard, .*, got true"):
        train(tiny(1, run={"tensorboard": True}), tmp_path / "run", pools=POOLS, show_progress=False)
    assert list(tmp_path.iterdir()) == []
    train(tiny(1), tmp_path / "run", pools=POOLS, show_progress=False)
    assert not (tmp_path / "run" / EVENTS_FOLDER).exists()


# Weights


def test_weights_are_kept_on_the_way(tmp_path: Path) -> None:
    config = tiny(5, run={"keep_steps": 2, "licence": "CC-BY-4.0", "seed": 3})
    train(config, tmp_path, pools=POOLS, show_progress=False)
    assert sorted(path.name for path in tmp_path.glob("model*")) == [
        "model-2.safetensors",
        "model-4.safetensors",
        "model.safetensors",
    ]
    target, support = torch.rand(1, 1, SIZE, SIZE), torch.rand(1, 1, 1, SIZE, SIZE)
    outputs = []
    for name, step in (("model-2", 2), ("model-4", 4), ("model", 5)):
        path = tmp_path / f"{name}.safetensors"
        outputs.append(icseg.PatchICL.from_pretrained(path)(target, support, support.round()).logits)
        record = training_record(path)
        assert TrainingConfig.from_dict(record["config"]) == config
        assert (record["step"], record["seed"], record["licence"]) == (step, 3, "CC-BY-4.0")
        assert (record["icseg"], record["generator"]) == (icseg.__version__, GENERATOR_VERSION)
        assert record["minutes"] == record["elapsed"] / 60 > 0
        assert (record["dice"] is None) == (step < 4)
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_kept_weights_are_those_of_a_shorter_look_at_the_same_run(tmp_path: Path) -> None:
    """Keeping changes nothing, and a resumed run keeps the same."""
    config = tiny(6, run={"keep_steps": 4, "checkpoint_steps": 3})
    train_killed_at(5, config, tmp_path / "killed")
    (tmp_path / "killed" / "model-4.safetensors").unlink()
    train(config, tmp_path / "killed", resume=True, pools=POOLS, show_progress=False)
    train(config, tmp_path / "whole", pools=POOLS, show_progress=False)
    train(tiny(6), tmp_path / "without", pools=POOLS, show_progress=False)
    for name in ("model-4.safetensors", "model.safetensors"):
        kept = [icseg.checkpoint.load_checkpoint(tmp_path / run / name)[1] for run in ("killed", "whole")]
        assert equal(*kept)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "without"))


KILLED_WHILE_WRITING = """
import os, pathlib, signal, sys
import safetensors.torch
from runs import POOLS, tiny
from icseg.training import state, train

usual, calls = state.save_file, iter(range(9))

def half(tensors, path, metadata):
    usual(tensors, path, metadata)
    if next(calls) == 1:
        os.truncate(path, pathlib.Path(path).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

state.save_file = half
train(tiny(6, run={"checkpoint_steps": 2}), sys.argv[1], pools=POOLS, show_progress=False)
"""


def test_killed_while_it_writes_a_checkpoint(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    threads = str(torch.get_num_threads())
    path = os.pathsep.join([str(tests.parent), str(tests)])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path / "killed")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads},
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "killed").glob(".partial-*"))) == 1
    assert logged(tmp_path / "killed")[0][-1]["step"] == 4
    config = tiny(6, run={"checkpoint_steps": 2})
    train(config, tmp_path / "killed", resume=True, pools=POOLS, show_progress=False)
    train(config, tmp_path / "whole", pools=POOLS, show_progress=False)
    assert equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == names
