"""The report on rows of benchmarks, from small rows that are made up."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
UNIVERSEG, DENSE = "UniverSeg, factorised", "Dense global attention"
COLD, MEMORY = "PatchICL, sparse", "PatchICL, sparse, support encoded before"
ORIGIN = {"machine": "a processor", "versions": {"python": "3.0", "torch": "2.0"}, "commit": "abc1234"}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.report")


def timed(subject: str, case: str, seconds: dict[str, float], **fields: Any) -> dict[str, Any]:
    row = {"subject": subject, "case": case, "work": "forward", "threads": 2, "seconds": seconds, "rounds": 5}
    counted = {"max_abs_difference": {}, "flops": {}, "bytes": 0, "copy_bandwidth": 0.0}
    return row | counted | ORIGIN | fields


def model(size: int, dense: float, cold: float, memory: float, **fields: Any) -> dict[str, Any]:
    """FLOPs: 1 GFLOP a second for all; the attention takes twice the time of UniverSeg."""
    seconds = {UNIVERSEG: dense, DENSE: 2 * dense, COLD: cold, MEMORY: memory}
    flops = {name: 1e9 * value for name, value in seconds.items()}
    return timed("model", f"{size} px S3", seconds, flops=flops, megabytes=dict.fromkeys(seconds, 10.0), **fields)


def accuracy(name: str, dice: float, class_: str = "a", budget: str = "", **fields: Any) -> dict[str, Any]:
    row = {"subject": "accuracy", "model": name, "budget": budget, "dataset": "d", "class": class_, "size": 256}
    row |= {"trained": ""}
    return row | {"support": 3, "targets": 4, "dice": dice, "gflops": 2.0, "seconds": 0.5} | ORIGIN | fields


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def page(report: Any, tmp_path: Path) -> Callable[[list[dict[str, Any]]], str]:
    """The text of the page of rows, from a file of them."""
    return lambda rows: report.page(report.read_all([written(tmp_path / "rows.jsonl", rows)]))[0]


CROSSING = [model(128, 1.0, 4.0, 2.0), model(256, 2.0, 4.0, 1.0), model(512, 8.0, 2.0, 1.0)]


def everything() -> list[dict[str, Any]]:
    ops = {"torch": 2e-3, "native": 1e-3}
    op = {"flops": dict.fromkeys(ops, 1e8), "bytes": 10**7, "copy_bandwidth": 2e10, "matrix_rate": 2e11}
    pairs = [
        timed("support size", f"256 px S{n}", {UNIVERSEG: 0.4 * n, COLD: 0.03 * n, MEMORY: 0.02}) for n in (1, 8, 64)
    ]
    return [
        *CROSSING,
        *pairs,
        timed("an op", "N64", ops, **op),
        *(accuracy(COLD, dice, class_, budget) for dice, class_, budget in ((0.7, "a", "8"), (0.5, "b", "8"))),
        *(accuracy(COLD, 0.65, class_, "4", gflops=1.0) for class_ in "ab"),
        *(accuracy(DENSE, dice, class_, gflops=40.0, seconds=5.0) for dice, class_ in ((0.8, "a"), (0.6, "b"))),
    ]


def test_the_first_screen_answers_the_questions(page: Callable) -> None:
    text = page(everything())
    cheaper, where, faster, from_size, cost, losses = text.split("\n\n")[1:7]
    assert "in brackets: with its own support set encoded before. No Dice belongs to these times" in cheaper
    assert where == "synthetic lesion, 3 support pairs; a processor, threads 2:"
    assert f"| {UNIVERSEG} | 0.25 (0.5) | 0.5 (2) | 4 (8) |" in faster
    # Of 1/2 at 256 px and 4 at 512 px the ratio is 1 a third of the way, in logarithms.
    assert "from 512 px on (slower at 128, 256 px and" not in from_size
    assert "from 512 px on (slower at 128 and 256 px, interpolated, not measured: 323 px)" in from_size
    assert "from 256 px on (slower at 128 px, interpolated, not measured: 181 px)" in from_size
    assert "at most 0.01 below (or else at its best)" in cost
    assert (
        f"| 256 px, 3 pairs | {DENSE} | 0.700 | {COLD} (4) | 0.650 | 1 of 2 classes | 40 times | 10 times |" in losses
    )


def test_the_pictures_that_a_page_names_exist(report: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report.main([str(written(tmp_path / "rows.jsonl", everything())), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'report.md'}\n"
    names = ["size", "speedup", "support", "accuracy", "roofline", "memory"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*(f"{n}.png" for n in names), "report.md"]
    )
    for name in names:
        assert f"]({name}.png)" in text
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(2**24) or []) > 10


@pytest.mark.parametrize(
    ("dense", "expected"),
    [
        ([2.0, 2.0, 2.0], "from 128 px on, the smallest size measured (where it crosses below is not measured)"),
        ([0.5, 0.5, 0.5], "at no measured size (128, 256 and 512 px)"),
        ([2.0, 2.0, 0.5], "at 128 and 256 px but not at 512 px, the largest size included"),
        (
            [2.0, 0.5, 2.0],
            "from 512 px on (slower at 256 px, faster at 128 px, too, interpolated, not measured: 362 px)",
        ),
    ],
)
def test_crossover(page: Callable, dense: list[float], expected: str) -> None:
    text = page([model(size, time, 1.0, 1.0) for size, time in zip((128, 256, 512), dense, strict=True)])
    assert f"faster than the best dense rival {expected}, the support set encoded before or not." in text


def test_one_size_has_no_crossover_between_sizes(page: Callable) -> None:
    assert "from 256 px on, the smallest size measured, the only one" not in page(CROSSING[:2])
    assert "from 512 px on, the smallest size measured" in page(CROSSING[2:])
    assert "interpolated" not in page(CROSSING[2:])


def test_nothing_is_interpolated_between_different_rivals(page: Callable) -> None:
    reason = "its attention takes 70 GB"
    large = model(512, 8.0, 2.0, 1.0, left_out={DENSE: reason})
    del large["seconds"][DENSE], large["flops"][DENSE]
    text = page([*CROSSING[:2], large])
    assert "from 512 px on (slower at 128 and 256 px)" in text
    assert f"left out: {DENSE} at 512 px ({reason})" in text
    assert f"| left out: {reason} |" in text


def test_what_no_row_answers_is_said(page: Callable) -> None:
    text = page([timed("an op", "N64", {"torch": 2e-3, "native": 1e-3})])
    assert text.count("Not answered") == 3
    assert 'There is no row of the subject "support size".' in text
    assert "![" not in text
    alone = page([timed("model", "128 px S3", {COLD: 1.0})])
    assert "Not answered: no row times PatchICL, sparse and a dense rival" in alone
    assert "Not answered: that takes rows of whole models with a dense rival" in alone
    one = page([timed("model", "128 px S3", {UNIVERSEG: 2.0, COLD: 1.0})])
    assert f"| {UNIVERSEG} | 2 |" in one
    assert "\n\nsynthetic lesion, 3 support pairs; a processor, threads 2:\n\n" in one
    assert "there is no row of a dense rival" in page([accuracy(COLD, 0.5)])
    assert "there is no row of a sparse model with a budget" in page([accuracy(DENSE, 0.5)])
    assert "no class is scored for every model" in page([accuracy(COLD, 0.5), accuracy(DENSE, 0.5, "b")])


def test_budgets_are_compared_with_every_patch(page: Callable) -> None:
    """The cheapest budget of those that lose next to nothing is named, also without a dense rival."""
    rows = [accuracy("sparse", 0.5, budget="9 patches", gflops=1.0)]
    rows += [accuracy("sparse", 0.698, budget="tolerance 0.02", gflops=2.0)]
    rows += [
        accuracy("sparse", 0.71, budget="tolerance 0.01", gflops=4.0),
        accuracy("sparse", 0.7, budget="all", gflops=9.0),
    ]
    rows = [row | {"threads": 1} for row in rows]
    line = "| sparse (all) | 0.700 | sparse (tolerance 0.02) | 0.698 | 1 of 1 class | 4.5 times | 1 times |"
    assert line in page(rows)


def trained(model: str, target: int, dice: float, dataset: str = "d") -> dict[str, Any]:
    row = {"model": model, "dataset": dataset, "class_name": "a", "target": target, "patient": target}
    return row | {"dice": dice}


def test_models_trained_alike_are_compared(report: Any, tmp_path: Path) -> None:
    """Rows of benchmarks/equal_training.py, which name no subject; a constant difference has no interval."""
    found = [trained("sparse", i, 0.5 + i / 10, dataset) for i in range(4) for dataset in "de"]
    found += [{**row, "model": "universeg", "dice": row["dice"] - 0.25} for row in found]
    rows = report.read_all([written(tmp_path / "alike.jsonl", found), written(tmp_path / "rows.jsonl", CROSSING)])
    text = report.page(rows)[0]
    assert (
        "data sets after equal training, the sparse model's Dice is 0.250 more than that of a dense UniverSeg" in text
    )
    assert "| e | +0.250 [+0.250, +0.250] |" in text
    assert "## Dice after equal training" in text
    assert "## Dice after equal training" not in report.page(rows[len(found) :])[0]


def test_models_are_compared_with_those_trained_as_long(page: Callable) -> None:
    rows = [accuracy("sparse", 0.9, budget=budget) for budget in ("8 patches", "all")]
    alike = [accuracy(UNIVERSEG, 0.4), accuracy("sparse", 0.5, budget="8 patches", gflops=1.0)]
    text = page([*rows, *({**row, "trained": "20 minutes"} for row in alike)])
    assert (
        f"pairs, 20 minutes of training each | {UNIVERSEG} | 0.400 | sparse (8 patches) | 0.500 | 0 of 1 class" in text
    )
    assert "256 px, 3 support pairs, after 20 minutes of training each, mean over 1 class" in text


def test_the_latest_row_of_a_case_counts(page: Callable) -> None:
    assert f"| {UNIVERSEG} | 9 (9) |" in page([model(256, 5.0, 1.0, 1.0), model(256, 9.0, 1.0, 1.0)])


def test_machines_are_not_mixed(page: Callable) -> None:
    """Each has its table on the first screen, the one with most sizes first, and its own in the details."""
    other = model(1024, 90.0, 1.0, 1.0, machine="another processor")
    text = page([other, *CROSSING])
    _, _, first, table, second, table_of_another, from_size, *_ = text.split("\n\n")
    lesion = "synthetic lesion, 3 support pairs; "
    assert [first, second] == [f"{lesion}a processor, threads 2:", f"{lesion}another processor, threads 2:"]
    assert "1024 px" not in table
    assert f"| {UNIVERSEG} | 90 (90) |" in table_of_another
    assert "323 px" in from_size
    assert "on a processor, threads 2. By measured" in from_size
    assert "the smallest size measured, the only one" in from_size
    assert "| 1024 px S3 | 2 | 90.00 s" in text


def test_rows_of_changed_code_are_marked(page: Callable) -> None:
    text = page([*CROSSING, timed("an op", "N64", {"torch": 2e-3, "native": 1e-3}, commit="abc1234-dirty")])
    assert "| N64 † |" in text
    assert "abc1234-dirty †" in text
    assert "† measured with changes that were not committed" in text
    assert "†" not in page(CROSSING)


def test_the_machine_is_named(page: Callable) -> None:
    assert "a processor; threads 2; python 3.0, torch 2.0; commits abc1234\n" in page(CROSSING)


def test_tables_alone(report: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ops = {"torch": 3e-3, "native": 1e-3}
    results = written(
        tmp_path / "rows.jsonl",
        [timed("an op", "N64", ops, bytes=10**6, copy_bandwidth=1e9), timed("another", "N8", ops), *CROSSING],
    )
    report.main([str(results), "--tables", "an op"])
    printed = capsys.readouterr().out
    assert printed == (
        "**an op**, forward: medians of interleaved rounds; a processor; python 3.0, torch 2.0\n\n"
        "|  | threads | torch | native | ratio | share of a copy |\n|---|---|---|---|---|---|\n"
        "| N64 | 2 | 3 ms | 1 ms | 3 | 1.00 |\n\n"
    )
    report.main([str(results), "--tables"])
    assert capsys.readouterr().out.count("**") == 6
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "rows.jsonl, line 2: a row must be one JSON object"),
        ("[1]", "rows.jsonl, line 2: a row must be one JSON object"),
        (json.dumps({"subject": "model"} | ORIGIN), "line 2: the row of 'model' lacks 'case'"),
        (json.dumps({"dice": 0.5} | ORIGIN), "line 2: the row of 'no subject' lacks 'subject'"),
        (json.dumps(timed("an op", "N1", {"native": -1.0})), "'seconds of native' must be a positive number, got -1.0"),
        (json.dumps(timed("an op", "N1", {"native": float("nan")})), "must be a positive number, got nan"),
        (json.dumps(timed("an op", "N1", {})), "the row of 'an op' times no rival"),
        (json.dumps(timed("an op", "N1", {"native": 1.0}, threads="2")), "'threads' is of the wrong kind, got '2'"),
        (json.dumps(timed("model", "large", {COLD: 1.0})), "must be like '512 px S3', got 'large'"),
        (json.dumps(accuracy(COLD, 1.5)), "'dice' must lie between 0 and 1, got 1.5"),
        (json.dumps(trained("sparse", 1, 0.5)), "line 2: the row of 'no subject' lacks 'subject'"),
    ],
)
def test_bad_rows_end_in_one_sentence(report: Any, tmp_path: Path, line: str, expected: str) -> None:
    results = written(tmp_path / "rows.jsonl", CROSSING[:1])
    results.write_text(results.read_text() + line + "\n")
    with pytest.raises(SystemExit) as error:
        report.main([str(results), "--out", str(tmp_path / "out")])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_files_that_hold_no_rows(report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "missing.jsonl"
    with pytest.raises(SystemExit, match=r"results must be files of JSON lines, got .*missing.jsonl"):
        report.main([str(missing)])
    other = written(tmp_path / "other.jsonl", [{"name": "a kernel"}])
    with pytest.raises(SystemExit, match=r"results must hold rows with a subject, got none in .*other.jsonl"):
        report.main([str(other)])
    with pytest.raises(SystemExit, match=r"subjects must be of the rows, got 'none'"):
        report.main([str(written(tmp_path / "rows.jsonl", CROSSING)), "--tables", "none"])


def test_all_results_are_read_where_none_is_named(
    report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(importlib.import_module("benchmarks.report_rows"), "RESULTS", tmp_path)
    written(tmp_path / "kernels.jsonl", [{"name": "of another kind"}])
    written(tmp_path / "one.jsonl", CROSSING[:1])
    written(tmp_path / "two.jsonl", CROSSING[1:])
    report.main(["--tables"])
    printed = capsys.readouterr().out
    assert all(f"| {size} px S3 |" in printed for size in (128, 256, 512))


def test_flops_of_one_number_are_those_of_every_rival(page: Callable) -> None:
    text = page([timed("an op", "N64", {"torch": 2e-3, "native": 1e-3}, flops=5e9)])
    assert "| N64 | 2 | 2 ms, 5 GFLOPs | 1 ms, 5 GFLOPs | 2 |" in text


def test_roofline(page: Callable) -> None:
    """100 FLOPs a byte at 2 GB/s: the roof is 200 GFLOP/s of memory, or that of a matrix product below it."""
    fields = {"flops": {"native": 1e9}, "bytes": 10**7, "copy_bandwidth": 2e9}
    without = page([timed("an op", "N64", {"torch": 0.02, "native": 0.01}, **fields)])
    assert "| an op, N64 | forward | 2 | 100 | 100 | 0.50, memory |" in without
    assert "memory is the only roof" in without
    bound = page([timed("an op", "N64", {"torch": 0.02, "native": 0.01}, matrix_rate=1.25e11, **fields)])
    assert "| an op, N64 | forward | 2 | 100 | 100 | 0.80, arithmetic |" in bound


def test_without_matplotlib(report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match=r"pictures need the package matplotlib, .*, got none"):
        report.main([str(written(tmp_path / "rows.jsonl", CROSSING)), "--out", str(tmp_path / "out")])
