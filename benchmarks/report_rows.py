"""Rows of results for the report: read and checked, arranged by size, and compared."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

SIZES, SUPPORT, ACCURACY, TRAINED_ALIKE = "model", "support size", "accuracy", "equal training"
COLD, WITH_MEMORY = "PatchICL, sparse", "PatchICL, sparse, support encoded before"
OURS = (COLD, WITH_MEMORY)
EVERYTHING = "all"  # the budget that takes every patch
DENSE = ("UniverSeg, factorised", "Dense global attention")

Row = dict[str, Any]
Place = tuple[int, int, str, str]  # size in pixels, support pairs, machine and threads, how models were trained
Quantity = Callable[[Row, str], float | None]
NO_OPS = SIZES, SUPPORT, ACCURACY, TRAINED_ALIKE
PARTS = "whole-image work"  # of what, beside the whole of it, its row says: no rivals
VARIANTS = ("native", "accelerated")  # rivals whose names start so are ours too

# The fields of a row and their kinds; OLDER: of those that came later.
NUMBER = (int, float)
Kinds = dict[str, type | tuple[type, ...]]
ORIGIN: Kinds = {"subject": str, "machine": str, "versions": dict, "commit": str}
OLDER: Row = {"bytes": 0, "copy_bandwidth": 0.0, "matrix_rate": 0.0, "megabytes": {}, "left_out": {}}
TIMED: Kinds = ORIGIN | {
    "case": str,
    "work": str,
    "threads": int,
    "seconds": dict,
    "flops": (dict, *NUMBER),
    "bytes": NUMBER,
    "copy_bandwidth": NUMBER,
    "matrix_rate": NUMBER,
    "megabytes": dict,
    "left_out": dict,
}
SCORED: Kinds = ORIGIN | {
    "model": str,
    "trained": str,
    "budget": str,
    "dataset": str,
    "class": str,
    "size": int,
    "support": int,
    "targets": int,
    "dice": NUMBER,
    "gflops": NUMBER,
    "seconds": NUMBER,
}


# Of benchmarks/equal_training.py, whose rows name no subject: Dice of one model on one target.
OF_TRAINING: Kinds = {"model": str, "dataset": str, "class_name": str, "target": int, "patient": int, "dice": NUMBER}


class BadRowsError(ValueError):
    """Rows that cannot be read, in one sentence."""


def read(path: Path) -> list[Row]:
    """The rows of a file; none if none of its lines is a row of results."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRowsError(f"results must be files of JSON lines, got {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadRowsError(f"{place}: a row must be one JSON object, got {line[:40]!r}") from error
            if not isinstance(row, dict):
                raise BadRowsError(f"{place}: a row must be one JSON object, got {line[:40]!r}")
            rows.append((place, row))
    if rows and all(row.keys() == OF_TRAINING.keys() for _, row in rows):
        rows = [(place, {"subject": TRAINED_ALIKE, **row}) for place, row in rows]
    if not any("subject" in row for _, row in rows):
        return []
    return [_checked(row, place) for place, row in rows]


def read_all(paths: Sequence[Path]) -> list[Row]:
    """Of all files; files of other rows are passed over unless they are named."""
    rows = []
    for path in paths or sorted(RESULTS.glob("*.jsonl")):
        found = read(path)
        if paths and not found:
            raise BadRowsError(f"results must hold rows with a subject, got none in {path}")
        rows += found
    if not rows:
        raise BadRowsError(f"results must hold rows with a subject, got none in {RESULTS}")
    return rows


def _checked(row: Row, place: str) -> Row:
    """With the fields that older rows lack."""
    kinds = {ACCURACY: SCORED, TRAINED_ALIKE: OF_TRAINING}.get(row.get("subject", ""), TIMED)
    row = OLDER | row if kinds is TIMED else row
    for name, kind in kinds.items():
        if name not in row:
            raise BadRowsError(f"{place}: the row of {row.get('subject', 'no subject')!r} lacks {name!r}")
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise BadRowsError(f"{place}: {name!r} is of the wrong kind, got {row[name]!r}")
    if kinds is not TIMED:
        if not 0 <= row["dice"] <= 1:
            raise BadRowsError(f"{place}: 'dice' must lie between 0 and 1, got {row['dice']}")
        if kinds is SCORED:
            _check_numbers({"gflops": row["gflops"], "seconds": row["seconds"]}, place)
        return row
    if not isinstance(row["flops"], dict):  # the same of every rival
        row["flops"] = dict.fromkeys(row["seconds"], row["flops"])
    if not row["seconds"] and not row["left_out"]:
        raise BadRowsError(f"{place}: the row of {row['subject']!r} times no rival")
    _check_numbers({f"seconds of {name}": value for name, value in row["seconds"].items()}, place)
    for field in ("flops", "megabytes"):
        _check_numbers({f"{field} of {name}": value for name, value in row[field].items()}, place, zero=True)
    if row["subject"] in (SIZES, SUPPORT):
        place_of(row, place)
    return row


def _check_numbers(values: dict[str, Any], place: str, *, zero: bool = False) -> None:
    """Positive and finite, or zero where that is allowed."""
    for name, value in values.items():
        number = isinstance(value, NUMBER) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf or (value == 0 and not zero):
            raise BadRowsError(f"{place}: {name!r} must be a {'' if zero else 'positive '}number, got {value!r}")


def place_of(row: Row, place: str = "") -> tuple[int, int, str]:
    """Size, support pairs and data of a case of whole models, as in "512 px S3 isic2016_mini_512"."""
    found = re.fullmatch(r"(\d+) px S(\d+)(?: (.+))?", row["case"])
    if not found:
        raise BadRowsError(f"{place}: a case of {row['subject']!r} must be like '512 px S3', got {row['case']!r}")
    return int(found[1]), int(found[2]), found[3] or "synthetic lesion"


def is_dirty(row: Row) -> bool:
    return bool(row["commit"].endswith("dirty"))


@dataclass(frozen=True)
class Series:
    """The latest rows of whole models on one machine and one task, by size, or by number of support pairs.

    fixed: what does not vary, in words.
    """

    machine: str
    threads: int
    fixed: str
    rows: dict[int, Row]

    @property
    def place(self) -> str:
        """Where it was measured, in words."""
        return f"{self.machine}, threads {self.threads}"

    def values(self, of: Quantity, name: str) -> dict[int, float]:
        """Of a rival, where measured."""
        found = {x: of(row, name) for x, row in self.rows.items()}
        return {x: value for x, value in found.items() if value is not None}

    def best(self, of: Quantity) -> dict[int, tuple[float, str]]:
        """The least of the dense rivals."""
        values = {
            x: [(value, name) for name in DENSE if (value := of(row, name)) is not None] for x, row in self.rows.items()
        }
        return {x: min(found) for x, found in values.items() if found}

    def ratios(self, of: Quantity, ours: str) -> dict[int, float]:
        """Of the best dense rival to ours."""
        mine = self.values(of, ours)
        return {x: value / mine[x] for x, (value, _) in self.best(of).items() if x in mine}

    @property
    def names(self) -> list[str]:
        """The rivals, in the order of the rows; ours last."""
        found = dict.fromkeys(name for row in self.rows.values() for name in [*row["seconds"], *row["left_out"]])
        return [*(name for name in found if name not in OURS), *(name for name in OURS if name in found)]


def seconds(row: Row, name: str) -> float | None:
    return row["seconds"].get(name)


def gflops(row: Row, name: str) -> float | None:
    return row["flops"].get(name, 0) / 1e9 or None


def megabytes(row: Row, name: str) -> float | None:
    return row["megabytes"].get(name) or None


def series(rows: Iterable[Row], subject: str) -> list[Series]:
    """Those of a subject, the most telling one first: with most dense rivals at most places, then the latest."""
    found: dict[tuple[str, int, str], dict[int, Row]] = {}
    for row in rows:
        if row["subject"] == subject:
            size, support, data = place_of(row)
            fixed, x = (f"{support} support pairs", size) if subject == SIZES else (f"{size} px", support)
            key = row["machine"], row["threads"], f"{data}, {fixed}"
            before = found.pop(key, {})  # so that the latest stands last
            found[key] = before | {x: row}
    latest_first = [Series(*key, dict(sorted(of.items()))) for key, of in reversed(found.items())]

    def telling(one: Series) -> int:
        return sum(name in row["seconds"] for row in one.rows.values() for name in DENSE if COLD in row["seconds"])

    return sorted(latest_first, key=telling, reverse=True)


def speedup(row: Row) -> float | None:
    """The best rival's time over ours, which stands last; None without a rival, and for whole models."""
    if row["subject"] in (*NO_OPS, PARTS):
        return None
    *others, ours = row["seconds"] or [""]
    found = [row["seconds"][name] for name in others if not name.startswith(VARIANTS)]
    return min(found) / row["seconds"][ours] if found else None


@dataclass(frozen=True)
class Crossover:
    """From which measured size on ours is the cheaper one.

    first:        the smallest such that it is at every larger one too; None: not at the largest one.
    slower:       the sizes where it is not.
    interpolated: where the ratio is 1 on a line, in logarithms, from the largest size below `first` to it; None if
                  none is measured below, or not against the same rivals.
    """

    first: int | None
    cheaper: tuple[int, ...]
    slower: tuple[int, ...]
    interpolated: float | None = None


def crossover(one: Series, ours: str, of: Quantity = seconds) -> Crossover | None:
    """None without a size at which both are measured."""
    ratios = one.ratios(of, ours)
    if not ratios:
        return None
    cheaper = tuple(x for x in ratios if ratios[x] > 1)
    slower = tuple(x for x in ratios if ratios[x] <= 1)
    below = max(slower, default=None)
    first = min((x for x in cheaper if below is None or x > below), default=None)
    if first is None or below is None or _dense(one, below, of) != _dense(one, first, of):
        return Crossover(first, cheaper, slower)
    low, high = math.log(ratios[below]), math.log(ratios[first])
    share = -low / (high - low)
    return Crossover(first, cheaper, slower, below ** (1 - share) * first**share)


def _dense(one: Series, x: int, of: Quantity) -> set[str]:
    return {name for name in DENSE if of(one.rows[x], name) is not None}


def quotient(row: Row, of: Quantity, rival: str, ours: str) -> float | None:
    above, below = of(row, rival), of(row, ours)
    return above / below if above and below else None


@dataclass(frozen=True)
class Scored:
    """A model with a budget at one size and support size: means over classes, the same ones for all."""

    model: str
    budget: str
    dice: float
    gflops: float
    seconds: float
    of_class: dict[tuple[str, str], float]
    dirty: bool

    @property
    def ours(self) -> bool:
        return "sparse" in self.model.lower()

    @property
    def dense(self) -> bool:
        return not self.ours and any(word in self.model.lower() for word in ("universeg", "dense"))

    @property
    def everything(self) -> bool:
        return self.budget == EVERYTHING

    @property
    def amount(self) -> str:
        """The number in the budget, "" if there is none."""
        found = re.search(r"\d[\d.]*", self.budget)
        return found[0] if found else ""

    @property
    def kind(self) -> str:
        """The model and what its budget bounds: those that differ in the amount alone lie on one line."""
        return ", ".join(filter(None, [self.model, self.budget.replace(self.amount, "").strip()]))

    @property
    def classes(self) -> str:
        """How many, in words."""
        return "1 class" if len(self.of_class) == 1 else f"{len(self.of_class)} classes"

    @property
    def name(self) -> str:
        return f"{self.model} ({self.budget})" if self.budget else self.model


def scored(rows: Iterable[Row]) -> dict[Place, list[Scored]]:
    """By what makes them comparable, over the classes that all models there are scored on."""
    latest: dict[Place, dict[tuple[str, str], dict[tuple[str, str], Row]]] = {}
    for row in rows:
        if row["subject"] == ACCURACY:
            machine = row["machine"] + (f", threads {row['threads']}" if "threads" in row else "")
            models = latest.setdefault((row["size"], row["support"], machine, row["trained"]), {})
            models.setdefault((row["model"], row["budget"]), {})[row["dataset"], row["class"]] = row
    found = {}
    for place, models in sorted(latest.items()):
        shared = sorted(set.intersection(*(set(classes) for classes in models.values())))
        of_models = {name: {c: classes[c] for c in shared} for name, classes in models.items() if shared}
        found[place] = [
            Scored(
                model,
                budget,
                dice=statistics.fmean(row["dice"] for row in classes.values()),
                gflops=statistics.fmean(row["gflops"] for row in classes.values()),
                seconds=statistics.fmean(row["seconds"] for row in classes.values()),
                of_class={c: row["dice"] for c, row in classes.items()},
                dirty=any(map(is_dirty, classes.values())),
            )
            for (model, budget), classes in of_models.items()
        ]
    return found


@dataclass(frozen=True)
class Point:
    """An op in the roofline: FLOPs a byte of the least traffic, and FLOP/s."""

    row: Row
    intensity: float
    rate: float

    @property
    def roof(self) -> float:
        """FLOP/s that memory and arithmetic allow; infinite if neither was measured."""
        memory = self.row["copy_bandwidth"] * self.intensity or math.inf
        return min(memory, self.row["matrix_rate"] or math.inf)


def roofline_points(rows: Iterable[Row]) -> list[Point]:
    """Of ours, the latest row a case, where FLOPs and bytes were counted."""
    latest = {}
    for row in rows:
        if row["subject"] not in NO_OPS and row["bytes"] and row["seconds"]:
            ours = list(row["seconds"])[-1]
            if work := row["flops"].get(ours):
                key = tuple(row[field] for field in ("subject", "case", "work", "threads", "machine"))
                latest[key] = Point(row, work / row["bytes"], work / row["seconds"][ours])
    return list(latest.values())
