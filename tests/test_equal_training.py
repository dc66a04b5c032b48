"""Dice at equal training: the runs, the bootstrap and the tables, on made-up rows and tiny models."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from toy_pack import write_varied_pack

from icseg.config import PatchICLConfig
from icseg.evaluation import EvaluationProtocol, evaluate, evaluate_synthetic, load_dataset, model_predictor
from icseg.model import PatchICL
from icseg.training import TrainingConfig, TrainingResult

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "equal_training.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("equal_training", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """Three tiny models under the names of the real ones, one of them with other data."""
    folder = tmp_path / "configs"
    folder.mkdir()
    for name, channels in (("sparse", 4), ("universeg", 3), ("published", 2)):
        (folder / f"{name}_small.toml").write_text(
            f'[model]\narchitecture = "universeg"\nchannels = [{channels}, {channels}]\nimage_size = 16\n'
            "[data]\ntasks = 2\nsize = 32\nsubjects = 4\nmax_support = 1\nmulti_class = 0\nvalidation_tasks = 0\n"
        )
    return folder


# Runs


def test_the_configurations_share_their_tasks(script: ModuleType) -> None:
    configs = [TrainingConfig.from_file(script.CONFIGS / f"{name}_small.toml") for name in script.MODELS]
    data = {(c.data.tasks, c.data.subjects, c.data.size, c.data.seed, c.data.validation_tasks) for c in configs}
    assert len(data) == 1
    assert [c.model.architecture for c in configs] == list(script.MODELS)


def test_training_and_scoring(
    script: ModuleType, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(script, "CONFIGS", configs)
    monkeypatch.setattr(script, "SIZE", 32)
    monkeypatch.setattr(script, "COUNTED", 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    out = tmp_path / "runs"
    train = ["--minutes", "0.01", "--out", str(out), "--pool", str(tmp_path / "pool"), "--only", "sparse,universeg"]
    assert script.main(train) == 0
    models = {name: (out / name / "model.safetensors") for name in ("sparse", "universeg")}
    before = [path.read_bytes() for path in models.values()]
    assert script.main(train) == 0
    assert before == [path.read_bytes() for path in models.values()]
    with pytest.raises(ValueError, match=r"sparse must hold a run of this configuration, got another"):
        script.main([*train, "--seed", "1"])

    pack = write_varied_pack(tmp_path / "squares.npz")
    evaluation = ["--out", str(out), "--only", "sparse,universeg", "--tasks", "2", "--evaluate", str(pack)]
    assert script.main(evaluation) == 0
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * (2 + 10 + 6)
    assert set(rows[0]) == {"model", "dataset", "class_name", "target", "patient", "dice"}
    assert "| squares | 16 |" in table
    assert "sparse minus universeg" in table
    steps = script.training_record(out / "sparse" / script.MODEL_FILE)["step"]
    assert f"| {steps:,} | {steps * 6:,} |" in table


def test_an_interrupted_run_goes_on(
    script: ModuleType, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def train(config: TrainingConfig, directory: Path, *, resume: bool, show_progress: bool) -> object:
        asked.append(resume)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / script.STATE_FILE).touch()
        return TrainingResult(3, 0.5, False, None, None)

    monkeypatch.setattr(script, "CONFIGS", configs)
    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    command = ["--out", str(tmp_path / "runs"), "--pool", str(tmp_path / "pool")]
    assert [script.main(command), script.main(command)] == [130, 130]
    assert asked == [False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "sparse,dense"], "--only must name models of sparse, universeg, published, got dense"),
        (["--minutes", "0"], "--minutes must be above 0, got 0.0"),
        ([], "--pool must be given to train"),
    ],
)
def test_refusals(script: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        script.main(["--out", "runs", *arguments])
    assert message in capsys.readouterr().err


# Targets


def test_the_targets_are_those_of_evaluate(script: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PatchICL(PatchICLConfig.universeg(channels=(4, 4), image_size=16)).eval()
    pack = load_dataset(write_varied_pack(tmp_path / "squares.npz"), 40)
    rows = list(script.score({"sparse": model}, "squares", script.cases_of(pack, limit=3)))
    expected = evaluate(model_predictor(model), pack, EvaluationProtocol(size=40, limit=3))
    assert [(scores.class_name, len(scores.targets)) for scores in expected] == [("box", 3), ("bar/strip", 3)]
    for scores in expected:
        assert [row.dice for row in rows if row.class_name == scores.class_name] == [t.dice for t in scores.targets]
    assert [row.patient for row in rows] == [row.target // 2 for row in rows]

    rows = list(script.score({"sparse": model}, "synthetic", script.synthetic_cases(4, size=32)))
    for scores in evaluate_synthetic(model_predictor(model), 4, EvaluationProtocol(size=32)):
        assert [row.dice for row in rows if row.class_name == scores.class_name] == [t.dice for t in scores.targets]


# Statistics


def made_up(script: ModuleType, targets: int = 60, effect: float = 0.1, noise: float = 0.02) -> list[object]:
    """Two data sets, the first of two classes a target: ours is better by `effect` in the first, equal in the other."""
    rng = np.random.default_rng(3)
    rows = []
    for (dataset, classes, gain), target in itertools.product((("a", "xy", effect), ("b", "z", 0.0)), range(targets)):
        for class_name in classes:
            base = float(rng.uniform(0.2, 0.8))
            ours = base + gain + float(rng.normal(0, noise))
            rows.append(script.Row("sparse", dataset, class_name, target, target // 4, ours))
            rows.append(script.Row("universeg", dataset, class_name, target, target // 4, base))
    return rows


def test_the_bootstrap_of_made_up_rows(script: ModuleType) -> None:
    rows = made_up(script)
    a, b, mean = script.paired_bootstrap(rows, "sparse", "universeg", resamples=2000)
    assert [d.dataset for d in (a, b, mean)] == ["a", "b", script.MEAN]
    differences = np.array([r.dice - s.dice for r, s in zip(rows[::2], rows[1::2], strict=True) if r.dataset == "a"])
    assert a.mean == pytest.approx(differences.mean())
    per_target = differences.reshape(-1, 2).mean(1)  # the normal approximation
    half_width = 1.96 * per_target.std() / len(per_target) ** 0.5
    assert a.low == pytest.approx(a.mean - half_width, abs=0.1 * half_width)
    assert a.high == pytest.approx(a.mean + half_width, abs=0.1 * half_width)
    assert b.low < 0 < b.high
    assert mean.mean == pytest.approx((a.mean + b.mean) / 2)
    assert mean.high - mean.low < max(a.high - a.low, b.high - b.low)
    assert script.paired_bootstrap(rows, "sparse", "universeg", resamples=2000)[0] == a


def test_what_goes_together_is_drawn_together(script: ModuleType) -> None:
    """Four targets of a patient that are all alike count as one."""
    rows = [
        script.Row(name, "a", "x", target, target // 4, 0.5 + (target // 4 % 3) * 0.1 * (name == "sparse"))
        for name in ("sparse", "universeg")
        for target in range(48)
    ]
    [target] = script.paired_bootstrap(rows, "sparse", "universeg", resamples=2000)
    [patient] = script.paired_bootstrap(rows, "sparse", "universeg", unit="patient", resamples=2000)
    assert patient.mean == pytest.approx(target.mean)
    assert patient.high - patient.low == pytest.approx(2 * (target.high - target.low), rel=0.15)


def test_the_same_targets_are_needed(script: ModuleType) -> None:
    with pytest.raises(ValueError, match="sparse and universeg must be scored on the same targets, got others on b"):
        script.paired_bootstrap(made_up(script)[:-1], "sparse", "universeg", resamples=10)


def test_the_tables(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "RESAMPLES", 100)
    rows = [
        script.Row(model, dataset, "x", target, target, dice)
        for dataset, model, dice in (("a", "sparse", 0.75), ("a", "universeg", 0.5), ("b", "sparse", 0.25),
                                     ("b", "universeg", 0.5))
        for target in range(2)
    ]  # fmt: skip
    costs = [script.Cost("sparse", 1_093_949, 3.7101, 25.004, 1500, 9000)]
    assert script.report(rows, costs) == (
        "| model | parameters | GFLOPs a target, 256 px S3 | minutes | steps | targets seen |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| sparse | 1,093,949 | 3.71 | 25.0 | 1,500 | 9,000 |\n"
        "\nMean Dice.\n\n"
        "| data set | targets | sparse | universeg |\n| --- | --- | --- | --- |\n"
        "| a | 2 | 0.750 | 0.500 |\n| b | 2 | 0.250 | 0.500 |\n| mean of data sets | 4 | 0.500 | 0.500 |\n"
        "\nDifference in mean Dice, with the 95 % interval of a paired bootstrap over targets (100 draws).\n\n"
        "| data set | sparse minus universeg |\n| --- | --- |\n"
        "| a | +0.250 [+0.250, +0.250] |\n| b | -0.250 [-0.250, -0.250] |\n"
        "| mean of data sets | +0.000 [+0.000, +0.000] |\n"
    )
