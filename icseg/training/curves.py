"""A picture of one or several training runs: losses, validation Dice, learning rate and speed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from icseg.files import check_file, written_whole
from icseg.training.log import TRAIN_FILE, VALIDATION_FILE, Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito: told apart under the common forms of colour blindness; then dashed.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
COLUMNS = 4
OVERVIEW = ("total", "dice", "learning_rate", "samples_per_second")  # the first row
SMOOTHED_FROM = 100
_NOT_DRAWN = {"step", "minutes", "peak_memory_mib", "skipped_steps", "gradient_norm"}


@dataclass(frozen=True)
class _Run:
    name: str
    training: list[Row]
    validation: list[Row]


def save_curves(runs: Sequence[str | Path], path: str | Path, *, minutes: bool = False) -> None:
    """Draw the logs of the folders `runs` into one picture, in the format of the ending of `path` (.png, .pdf, .svg).

    A panel each for the loss and its terms, the validation Dice and that of each level, the learning rate and the
    targets a second, against steps or `minutes`. From SMOOTHED_FROM rows on, a line is the running mean over a
    twentieth of them, drawn over the rows themselves in a lighter shade.

    Raises FileNotFoundError or ValueError for a run without a log, ModuleNotFoundError without matplotlib.
    """
    check_file(path)
    read = [_read(Path(run), name) for run, name in zip(runs, _names([Path(run) for run in runs]), strict=True)]
    figure = _draw(read, "minutes" if minutes else "step")
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110)


def _names(folders: list[Path]) -> list[str]:
    """The folders' own names, with as many parents as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=1)):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(folder) for folder in folders]


def _read(folder: Path, name: str) -> _Run:
    training = Table(folder / TRAIN_FILE).rows()
    if not training:
        raise FileNotFoundError(f"run must be a folder of icseg train with rows in {TRAIN_FILE}, got {folder}")
    return _Run(name, training, Table(folder / VALIDATION_FILE).rows())


def _draw(runs: list[_Run], across: str) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError(
            "curves need the package matplotlib, which pip install 'icseg[train]' brings, got none"
        ) from error
    dice = _columns([row for run in runs for row in run.validation])
    losses = _columns([row for run in runs for row in run.training])
    panels = list(dict.fromkeys([*(name for name in OVERVIEW if name in {*losses, *dice}), *dice, *losses]))
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 2.8 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for panel, name in zip(axes, panels, strict=False):
        for index, run in enumerate(runs):
            rows_of = run.validation if name in dice else run.training
            points = np.array([(row[across], row[name]) for row in rows_of if name in row]).reshape(-1, 2)
            _line(panel, points, run.name, index)
        panel.set_title(_title(name), fontsize=10)
        panel.set_xlabel(across, fontsize=8)
        panel.tick_params(labelsize=8)
        panel.ticklabel_format(axis="y", scilimits=(-2, 5))
        panel.grid(alpha=0.3)
        if name in dice:
            panel.set_ylim(0, 1)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=min(len(runs), 5), fontsize=9)
    return figure


def _columns(rows: list[Row]) -> list[str]:
    return sorted({name for row in rows for name in row} - _NOT_DRAWN)


def _line(panel: Axes, points: NDArray[np.float64], label: str, index: int) -> None:
    """points: [N, 2]; index: of the run, which gives the colour."""
    x, y = points.T
    colour, style = COLOURS[index % len(COLOURS)], "-" if index < len(COLOURS) else "--"
    if len(points) >= SMOOTHED_FROM:
        panel.plot(x, y, color=colour, alpha=0.2, linewidth=0.8)
        window = len(points) // 20
        y = np.convolve(y, np.ones(window) / window, "valid")
        x = x[window // 2 :][: len(y)]
    marker = "o" if len(points) == 1 else None
    panel.plot(x, y, color=colour, linestyle=style, linewidth=1.5, marker=marker, label=label)


def _title(name: str) -> str:
    """What a column holds: `target_combined/2` is the term at level 3, coarse to fine."""
    special = {"total": "loss", "dice": "validation Dice", "samples_per_second": "targets a second"}
    term, _, level = name.partition("/")
    title = special.get(term, term.replace("_", " "))
    return f"{title}, level {int(level) + 1}" if level else title
