"""Rows, means, tables and files of made-up scores."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from icseg.evaluation import ClassScores, Report, TargetScores, markdown, write_folder, write_json
from icseg.evaluation.bootstrap import Interval
from icseg.evaluation.outputs import LEGEND


def scores(
    dataset: str, name: str, level: float, *, floor: float = 0.2, compared: float | None = None, patients: bool = True
) -> ClassScores:
    """Eight targets of four patients, of Dice `level` and a tenth of the patient's number."""
    return ClassScores(
        dataset,
        name,
        tuple(
            TargetScores(
                i,
                f"p{i // 2}" if patients else None,
                ((i + 2, i + 4),),
                dice=level + i // 2 / 10,
                iou=level / 2,
                hausdorff95=10.0 * i,
                empty=0.0,
                copy=floor,
                otsu=0.05,
                band=0.1,
                compared=compared,
            )
            for i in range(8)
        ),
    )


TWO = [scores("a", "x", 0.25), scores("a", "y", 0.0, floor=0.5), scores("b", "z", 0.5, patients=False)]


def test_rows_and_means() -> None:
    report = Report.of({"size": 256}, TWO)
    x, y, z = report.rows
    assert (x.dataset, x.class_name, x.classes, x.targets, x.patients) == ("a", "x", 1, 8, 4)
    assert z.patients is None
    assert x.dice.mean == pytest.approx(0.4)
    assert 0.25 <= x.dice.low < 0.4 < x.dice.high <= 0.55
    assert (x.iou.low, x.iou.high) == pytest.approx((0.125, 0.125))
    assert x.margin.mean == pytest.approx(0.2)
    assert y.margin.mean == pytest.approx(0.15 - 0.5)
    assert (x.above_floors, y.above_floors, z.above_floors) == (1, 0, 1)
    assert (x.compared, x.difference) == (None, None)

    of_a, of_all = report.means
    assert (of_a.dataset, of_a.class_name, of_a.targets, of_a.patients) == ("a", "mean of 2 classes", 16, 4)
    assert of_a.dice.mean == pytest.approx((0.4 + 0.15) / 2)
    assert (of_a.classes, of_a.above_floors) == (2, 1)
    assert (of_all.dataset, of_all.classes, of_all.above_floors, of_all.patients) == ("all data sets", 3, 2, None)
    assert of_all.dice.mean == pytest.approx((0.4 + 0.15 + 0.65) / 3)
    assert of_all.copy == pytest.approx((0.2 + 0.5 + 0.2) / 3)
    # both classes of `a` have the same patients' spread: their mean is as uncertain as each of them
    assert of_a.dice.high - of_a.dice.low == pytest.approx(x.dice.high - x.dice.low)


def test_images_are_drawn_where_patients_are_not_known() -> None:
    known, unknown = (Report.of({}, [scores("a", "x", 0.2, patients=known)]).rows[0] for known in (True, False))
    assert known.dice.mean == unknown.dice.mean
    assert known.dice.high - known.dice.low > 1.2 * (unknown.dice.high - unknown.dice.low)


def test_equal_to_a_floor_is_not_above_it() -> None:
    flat = dataclasses.replace(
        scores("a", "x", 0.0),
        targets=tuple(dataclasses.replace(target, dice=0.5, band=0.5) for target in scores("a", "x", 0.0).targets),
    )
    [row] = Report.of({}, [flat]).rows
    assert row.above_floors == 0
    assert (row.margin.mean, row.margin.low, row.margin.high) == (0, 0, 0)


def test_synthetic_families_are_no_part_of_the_mean_of_data_sets() -> None:
    report = Report.of({}, [*TWO, scores("synthetic", "cells", 0.1), scores("synthetic", "lesion", 0.1)])
    assert [(row.dataset, row.classes) for row in report.means] == [("a", 2), ("synthetic", 2), ("all data sets", 3)]
    assert Report.of({}, TWO[2:]).means == ()
    with pytest.raises(ValueError, match="an evaluation must have a target to score, got none"):
        Report.of({}, [])


def test_differences_are_paired() -> None:
    """The compared model is below by the same on every target: there is no doubt about the difference."""
    pairs = tuple(dataclasses.replace(target, compared=target.dice - 0.125) for target in TWO[0].targets)
    report = Report.of({}, [dataclasses.replace(TWO[0], targets=pairs), scores("b", "z", 0.5, compared=0.5)])
    x, z = report.rows
    assert (x.difference.mean, x.difference.low, x.difference.high) == pytest.approx((0.125,) * 3)
    assert x.compared == pytest.approx(0.275)
    assert z.difference.low < z.difference.mean < z.difference.high
    [mean] = report.means
    assert mean.difference.mean == pytest.approx((0.125 + 0.15) / 2)
    assert mean.difference.high - mean.difference.low < z.difference.high - z.difference.low


def test_the_table() -> None:
    lines = markdown(Report.of({}, TWO)).splitlines()
    assert lines[0] == (
        "| data set | class | targets | patients | Dice | IoU | HD95 (px) | copy | Otsu | band | over floor "
        "| above all floors |"
    )
    assert lines[2].startswith("| a | x | 8 | 4 | 0.400 [0.")
    assert "] | 0.200 | 0.050 | 0.100 | +0.200 [" in lines[2]
    assert lines[2].endswith(" | yes |")
    assert lines[3].endswith(" | no |")
    assert lines[4].startswith("| b | z | 8 |  | 0.650 [")
    assert lines[5].startswith("| a | mean of 2 classes | 16 | 4 | 0.275 [")
    assert lines[6].endswith(" | 2 of 3 |")
    assert lines[7:] == ["", LEGEND]
    assert {line.count("|") for line in lines[:7]} == {13}


def test_the_table_of_a_comparison() -> None:
    report = Report.of({}, [scores("a", "x", 0.25, compared=0.4)])
    lines = markdown(report).splitlines()
    assert lines[4] == "Dice minus that of the compared model, on the same cases:"
    assert lines[6] == "| data set | class | Dice | compared | difference |"
    assert lines[8].startswith("| a | x | 0.400 | 0.400 | +0.000 [-0.")


def test_the_files(tmp_path: Path) -> None:
    report = Report.of({"size": 256, "seeds": (0, 1)}, TWO)
    write_folder(report, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.csv", "scores.json", "table.md"]
    assert (tmp_path / "table.md").read_text() == markdown(report)

    content = json.loads((tmp_path / "scores.json").read_text())
    assert content["settings"] == {"size": 256, "seeds": [0, 1]}
    assert content["intervals"] == {
        "level": 0.95,
        "resamples": 2000,
        "seed": 0,
        "unit": "patient, or image if not known",
    }
    for row, found, target_scores in zip(report.rows, content["classes"], TWO, strict=True):
        per_target = found.pop("scores")
        assert found == json.loads(json.dumps(dataclasses.asdict(row)))
        assert np.mean([target["dice"] for target in per_target]) == pytest.approx(row.dice.mean)
        assert [target["supports"] for target in per_target] == [
            [list(drawn) for drawn in target.supports] for target in target_scores.targets
        ]
    assert content["classes"][0]["class_name"] == "x"
    assert [row["classes"] for row in content["means"]] == [2, 3]

    with (tmp_path / "scores.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["class_name"] for line in lines] == ["x", "y", "z"]
    assert float(lines[0]["dice_low"]) == report.rows[0].dice.low
    assert float(lines[1]["hausdorff95"]) == report.rows[1].hausdorff95.mean
    assert "difference" not in lines[0]
    assert [line["above_floors"] for line in lines] == ["1", "0", "1"]

    write_json(report, tmp_path / "alone.json")
    assert (tmp_path / "alone.json").read_text() == (tmp_path / "scores.json").read_text()


def test_the_csv_of_a_comparison_has_its_interval(tmp_path: Path) -> None:
    write_folder(Report.of({}, [scores("a", "x", 0.25, compared=0.4)]), tmp_path)
    with (tmp_path / "scores.csv").open() as file:
        [line] = csv.DictReader(file)
    assert float(line["difference_low"]) < 0 < float(line["difference_high"])
    assert float(line["compared"]) == pytest.approx(0.4)


def test_a_single_patient_shows_no_interval() -> None:
    one = dataclasses.replace(TWO[0], targets=TWO[0].targets[:2])
    report = Report.of({}, [one])
    assert report.rows[0].dice == Interval(0.25, None, None)
    assert "| 0.250 [-] |" in markdown(report)
