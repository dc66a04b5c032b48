"""What an evaluation found: a row a class with intervals, and the means over classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from icseg.evaluation.bootstrap import Interval, interval_of_mean
from icseg.evaluation.cases import SYNTHETIC
from icseg.evaluation.scoring import ClassScores


@dataclass(frozen=True)
class Row:
    """Means over the targets of a class, or over several classes that count equally.

    classes, targets: how many. patients: whose targets they are; None where not known, or for several data sets.
    dice, iou, hausdorff95 (pixels), margin (Dice minus that of each class's best floor), difference (Dice minus that of
    the compared model): with 95 % intervals. empty: share of predicted masks that are empty. copy, otsu, band: Dice of
    the floors. above_floors: in how many of the classes Dice is above that of every floor.
    """

    dataset: str
    class_name: str
    classes: int
    targets: int
    patients: int | None
    dice: Interval
    iou: Interval
    hausdorff95: Interval
    empty: float
    copy: float
    otsu: float
    band: float
    margin: Interval
    above_floors: int
    compared: float | None = None
    difference: Interval | None = None


@dataclass(frozen=True)
class Report:
    """All of an evaluation.

    settings: the protocol, the models and the version, as plain data. scores: target by target; rows: one a class, in
    the same order. means: over the classes of each data set that has several, and, of several labelled data sets, over
    all of their classes (synthetic families are not among those).
    """

    settings: dict[str, Any]
    scores: tuple[ClassScores, ...]
    rows: tuple[Row, ...]
    means: tuple[Row, ...]

    @classmethod
    def of(cls, settings: dict[str, Any], scores: Sequence[ClassScores]) -> Report:
        """Raises ValueError where there is nothing to report."""
        if not scores:
            raise ValueError("an evaluation must have a target to score, got none")
        by_dataset: dict[str, list[ClassScores]] = {}
        for one in scores:
            by_dataset.setdefault(one.dataset, []).append(one)
        means = [_row(name, _classes(len(group)), [group]) for name, group in by_dataset.items() if len(group) > 1]
        labelled = [group for name, group in by_dataset.items() if name != SYNTHETIC]
        if len(labelled) > 1:
            means.append(_row("all data sets", _classes(sum(map(len, labelled))), labelled))
        rows = tuple(_row(one.dataset, one.class_name, [[one]]) for one in scores)
        return cls(settings, tuple(scores), rows, tuple(means))


def _classes(count: int) -> str:
    return f"mean of {count} classes"


def _row(dataset: str, class_name: str, groups: Sequence[Sequence[ClassScores]]) -> Row:
    """groups: the classes of each data set."""
    classes = [one for group in groups for one in group]
    compared = all(target.compared is not None for one in classes for target in one.targets)
    patients = {target.patient for one in classes for target in one.targets}

    def interval(name: str, minus: str | None = None) -> Interval:
        return interval_of_mean([[one.sample(name, minus) for one in group] for group in groups])

    def mean(name: str) -> float:
        return float(np.mean([one.mean(name) for one in classes]))

    return Row(
        dataset,
        class_name,
        classes=len(classes),
        targets=sum(len(one.targets) for one in classes),
        patients=len(patients) if len(groups) == 1 and None not in patients else None,
        dice=interval("dice"),
        iou=interval("iou"),
        hausdorff95=interval("hausdorff95"),
        empty=mean("empty"),
        copy=mean("copy"),
        otsu=mean("otsu"),
        band=mean("band"),
        margin=interval_of_mean([[one.sample("dice", one.best_floor) for one in group] for group in groups]),
        above_floors=sum(one.mean("dice") > one.mean(one.best_floor) for one in classes),
        compared=mean("compared") if compared else None,
        difference=interval("dice", "compared") if compared else None,
    )
