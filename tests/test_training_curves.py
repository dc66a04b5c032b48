"""Pictures of training runs."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from icseg.training.curves import COLOURS, save_curves
from icseg.training.log import TRAIN_FILE, VALIDATION_FILE, Table


def write_run(folder: Path, rows: int, levels: int, validations: int = 3) -> Path:
    folder.mkdir(parents=True)
    training, validation = Table(folder / TRAIN_FILE), Table(folder / VALIDATION_FILE)
    for i in range(1, rows + 1):
        terms = {f"target_combined/{level}": math.exp(-i / rows) + level for level in range(levels)}
        speed = {"samples_per_second": 9.0 + i % 2, "peak_memory_mib": 100.0, "gradient_norm": 1.0}
        training.append({"step": 10 * i, "minutes": i / 2, "learning_rate": 1e-3 / i, "total": 1 / i, **terms, **speed})
    for i in range(1, validations + 1):
        dice = {f"dice/{level}": 0.1 * i for level in range(levels)}
        validation.append({"step": 100 * i, "minutes": 5 * i, "dice": 0.2 * i, **dice})
    return folder


def has_colour(path: Path, colour: str) -> bool:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.asarray(Image.open(path).convert("RGB")) == rgb).all(-1).sum() > 500)


@pytest.mark.parametrize("minutes", [False, True])
def test_two_runs_in_one_picture(tmp_path: Path, minutes: bool) -> None:
    runs = [write_run(tmp_path / "a", 120, 3), write_run(tmp_path / "b", 20, 2)]
    save_curves(runs, tmp_path / "curves.png", minutes=minutes)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
    assert [has_colour(tmp_path / "curves.png", colour) for colour in COLOURS[:3]] == [True, True, False]


def panels(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str], dict[str, list[int]]]:
    """The titles of the panels, the names in the legend, and how many points each line of a panel has."""
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self))
    save_curves(runs, runs[0].parent / "curves.svg")
    shown = [axes for axes in figures[0].axes if axes.get_title()]
    legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
    lines = {axes.get_title(): [len(line.get_xdata()) for line in axes.lines] for axes in shown}  # type: ignore[arg-type]
    return [axes.get_title() for axes in shown], legend, lines


def test_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / "x" / "run", 99, 2), write_run(tmp_path / "y" / "run", 100, 1, validations=0)]
    titles, legend, lines = panels(runs, monkeypatch)
    assert titles == [
        "loss",
        "validation Dice",
        "learning rate",
        "targets a second",
        "validation Dice, level 1",
        "validation Dice, level 2",
        "target combined, level 1",
        "target combined, level 2",
    ]
    assert legend == ["x/run", "y/run"]
    assert lines["loss"] == [99, 100, 96]  # the second is long enough for a running mean
    assert lines["validation Dice"] == [3, 0]
    assert lines["target combined, level 2"] == [99, 0]


def test_many_runs_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / f"run-{i}", 5, 1) for i in range(9)]
    _, legend, lines = panels(runs, monkeypatch)
    assert legend == [f"run-{i}" for i in range(9)]
    assert lines["loss"] == [5] * 9


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", 2, 1)
    with pytest.raises(FileNotFoundError, match=r"run must be a folder of icseg train with rows in train\.csv"):
        save_curves([run, tmp_path / "no"], tmp_path / "curves.png")
    with pytest.raises(FileNotFoundError, match="path must lie in an existing folder"):
        save_curves([run], tmp_path / "none" / "curves.png")
    with pytest.raises(ValueError, match="Format 'odd' is not supported"):
        save_curves([run], tmp_path / "curves.odd")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"curves need the package matplotlib, .*, got none"):
        save_curves([run], tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
