"""The files of an evaluation: scores.json, scores.csv and table.md."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from icseg.evaluation.bootstrap import LEVEL, RESAMPLES, SEED, Interval
from icseg.evaluation.report import Report, Row
from icseg.files import written_whole

LEGEND = (
    "In brackets: 95 % intervals, by whole patients drawn with replacement (images, where patients are not known). "
    "HD95: pixels at the evaluated size, the diagonal of the image where the predicted mask is empty. "
    "Floors, by their Dice: copy, the mean of the support masks; Otsu, his threshold with the better polarity by the "
    "true mask; band, the grey levels that fit the supports best. Over floor: Dice minus that of the best floor."
)
DIFFERENCES = "Dice minus that of the compared model, on the same cases:"


def json_text(report: Report) -> str:
    """Settings, rows with their targets, and means, as JSON."""
    content = {
        "settings": report.settings,
        "intervals": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED, "unit": "patient, or image if not known"},
        "classes": [
            dataclasses.asdict(row) | {"scores": [dataclasses.asdict(target) for target in scores.targets]}
            for row, scores in zip(report.rows, report.scores, strict=True)
        ],
        "means": [dataclasses.asdict(row) for row in report.means],
    }
    return json.dumps(content, indent=1) + "\n"


def csv_text(rows: Sequence[Row]) -> str:
    """One line a row; each interval in three columns: NAME, NAME_low, NAME_high."""
    left_out = {"classes"} | (set() if rows[0].difference else {"compared", "difference"})
    lines = [{name: value for name, value in _flat(row).items() if name not in left_out} for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def markdown(report: Report) -> str:
    """The table, that of the differences if two models were compared, and what the columns mean."""
    rows = [*report.rows, *report.means]
    parts = [_table(_COLUMNS, rows), LEGEND + "\n"]
    if rows[0].difference is not None:
        parts[1:1] = [f"{DIFFERENCES}\n", _table(_COMPARISON, rows)]
    return "\n".join(parts)


def write_json(report: Report, path: str | Path) -> None:
    """Write `json_text`; the file appears whole or not at all."""
    _write(path, json_text(report))


def write_folder(report: Report, folder: Path) -> None:
    """Write scores.json, scores.csv and table.md into an existing folder, each whole or not at all."""
    write_json(report, folder / "scores.json")
    _write(folder / "scores.csv", csv_text(report.rows))
    _write(folder / "table.md", markdown(report))


def _write(path: str | Path, text: str) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _flat(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in vars(row).items():
        if isinstance(value, Interval):
            found |= {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}
        else:
            found[name] = value
    return found


def _above(row: Row) -> str:
    if row.classes > 1:
        return f"{row.above_floors} of {row.classes}"
    return "yes" if row.above_floors else "no"


def _signed(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.mean:+z.3f} {interval.bounds('+z.3f')}"


_Columns = dict[str, Callable[[Row], str]]
_NAMES: _Columns = {"data set": lambda row: row.dataset, "class": lambda row: row.class_name}
_COLUMNS: _Columns = _NAMES | {
    "targets": lambda row: str(row.targets),
    "patients": lambda row: "" if row.patients is None else str(row.patients),
    "Dice": lambda row: str(row.dice),
    "IoU": lambda row: str(row.iou),
    "HD95 (px)": lambda row: f"{row.hausdorff95.mean:.1f} {row.hausdorff95.bounds('.1f')}",
    "copy": lambda row: f"{row.copy:.3f}",
    "Otsu": lambda row: f"{row.otsu:.3f}",
    "band": lambda row: f"{row.band:.3f}",
    "over floor": lambda row: _signed(row.margin),
    "above all floors": _above,
}
_COMPARISON: _Columns = _NAMES | {
    "Dice": lambda row: f"{row.dice.mean:.3f}",
    "compared": lambda row: f"{row.compared:.3f}",
    "difference": lambda row: _signed(row.difference),
}


def _table(columns: _Columns, rows: Sequence[Row]) -> str:
    lines = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
