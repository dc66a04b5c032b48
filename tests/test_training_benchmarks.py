"""The benchmarks of training, on tiny models: speed, and what each choice is worth."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from runs import MODEL, POOLS, tiny
from toy_pack import write_varied_pack

from icseg.training import TrainingConfig, train

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(name)


def toml(model: str) -> str:
    return (
        f"[model]\n{model}\n[data]\ntasks = 2\nsize = 32\nsubjects = 4\nmax_support = 1\nmulti_class = 0\n"
        "validation_tasks = 0\nabsent = 0.0\n[run]\nprecision = 'float32'\n"
    )


TINY = "\n".join(f"{key} = {value}" for key, value in MODEL.items())


def test_the_models_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    script = load(monkeypatch, "training_speed")
    monkeypatch.setattr(script, "CONFIGS", tmp_path)
    (tmp_path / "sparse_small.toml").write_text(toml(TINY))
    (tmp_path / "universeg_small.toml").write_text(
        toml('architecture = "universeg"\nchannels = [4, 4]\nimage_size = 16')
    )
    out = tmp_path / "rows.json"
    arguments = ["--pool", str(tmp_path / "pool"), "--steps", "3", "--only", "sparse,universeg", "--out", str(out)]
    assert script.main(arguments) == 0
    rows = json.loads(out.read_text())["speeds"]
    assert [(row["model"], row["steps"], row["targets_a_step"]) for row in rows] == [
        ("sparse", 3, 6),
        ("universeg", 3, 6),
    ]
    for row in rows:
        assert row["targets_per_second"] == pytest.approx(6 * row["steps_per_second"])
        assert 0 < row["quartiles"][0] <= row["quartiles"][1]
    assert capsys.readouterr().out.count("\n") == 4


def test_every_ablation_changes_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = load(monkeypatch, "ablations")
    configs = {name: script.run_config(name, tmp_path) for name in script.CHANGES}
    base = configs[script.BASE]
    for name, config in configs.items():
        changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(base, f.name)}
        assert changed == set(script.CHANGES[name])
    assert len({script.folder_of(name) for name in configs}) == len(configs)


def test_ablations_are_trained_and_scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = load(monkeypatch, "ablations")
    config = tmp_path / "tiny.toml"
    config.write_text(toml(TINY))
    monkeypatch.setattr(script, "CONFIG", config)
    monkeypatch.setattr(
        script, "SHORT", {"schedule": {"steps": 2, "warmup": 1}, "run": {"validate_steps": 2, "keep_steps": 0}}
    )
    monkeypatch.setattr(script, "CHANGES", {"base": {}, "seed 1": {"run": {"seed": 1}}})
    out = ["--out", str(tmp_path / "runs")]
    with pytest.raises(SystemExit):
        script.main([*out, "--evaluate"])  # nothing is trained
    assert script.main([*out, "--pool", str(tmp_path / "pool")]) == 0
    data = [write_varied_pack(tmp_path / f"{name}.npz") for name in ("dots", "spots")]
    assert script.main([*out, "--evaluate", *map(str, data), "--tasks", "3", "--limit", "2"]) == 0
    rows = json.loads((tmp_path / "runs" / "rows.json").read_text())["dice"]
    assert set(rows) == {"base", "seed 1"}
    lines = (tmp_path / "runs" / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["base", "seed 1"]
    assert isinstance(script.run_config("base", tmp_path), TrainingConfig)


def test_the_curve_of_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = load(monkeypatch, "learning_curve")
    train(tiny(4, run={"keep_steps": 2}), tmp_path / "run", pools=POOLS, show_progress=False)
    pack = write_varied_pack(tmp_path / "dots.npz")
    out = tmp_path / "curve.png"
    assert script.main([str(tmp_path / "run"), str(pack), "--limit", "2", "--out", str(out)]) == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(row["mean"] == pytest.approx(sum(row["dice"].values()) / 2, abs=1e-4) for row in rows)
    assert np.asarray(Image.open(out)).std() > 5
    with pytest.raises(ValueError, match="RUN must hold two checkpoints"):
        script.main([str(tmp_path), str(pack)])
