"""Scores of a model on each target, beside those of floors that need no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from icseg.baselines.floors import copy_support, intensity_band, otsu
from icseg.data.packs import Pack
from icseg.data.synthetic import GENERATOR_VERSION
from icseg.evaluation.bootstrap import Sample
from icseg.evaluation.cases import SYNTHETIC, Case, Cases, EvaluationProtocol, PackCases, synthetic_cases
from icseg.evaluation.datasets import load_dataset
from icseg.metrics import dice, hausdorff95, iou

if TYPE_CHECKING:
    from icseg.model import PatchICL

Predictor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(target [B, 1, H, W], support images and masks [B, S, 1, H, W], all in [0, 1]) -> bool [B, 1, H, W]."""

FLOORS = ("copy", "otsu", "band")
METRICS = ("dice", "iou", "hausdorff95", "empty", *FLOORS, "compared")


@dataclass(frozen=True)
class TargetScores:
    """Of one target, each the mean over its support sets.

    number: of the image or task in its data set; patient: None where it is not known; supports: the numbers of the
    images of each support set. dice, iou: of the thresholded mask; hausdorff95: in pixels; empty: share of the support
    sets for which the predicted mask is empty. copy, otsu, band: Dice of the floors. compared: Dice of the model that
    is compared; None without one.
    """

    number: int
    patient: str | None
    supports: tuple[tuple[int, ...], ...]
    dice: float
    iou: float
    hausdorff95: float
    empty: float
    copy: float
    otsu: float
    band: float
    compared: float | None = None


@dataclass(frozen=True)
class ClassScores:
    """Of one class of a data set, target by target."""

    dataset: str
    class_name: str
    targets: tuple[TargetScores, ...]

    def sample(self, name: str, minus: str | None = None) -> Sample:
        """The scores `name`, less the scores `minus`, with the patients (or images) that they are of."""
        values = np.array([getattr(target, name) for target in self.targets])
        if minus is not None:
            values = values - [getattr(target, minus) for target in self.targets]
        labels = [target.number if target.patient is None else target.patient for target in self.targets]
        return Sample(values, np.array(labels))

    def mean(self, name: str) -> float:
        return float(self.sample(name).values.mean())

    @property
    def best_floor(self) -> str:
        """The floor with the highest mean Dice."""
        return max(FLOORS, key=self.mean)


@dataclass(frozen=True)
class Unit:
    """What is scored in one go: a class of a data set, or all synthetic tasks.

    content: changes with anything that the scores depend on beside protocol and model.
    """

    dataset: str
    name: str
    cases: Cases
    content: str


def pack_units(pack: Pack, protocol: EvaluationProtocol) -> list[Unit]:
    """The classes of a pack (at the protocol's size) that have a target."""
    digest = pack.digest()
    by_class = {name: PackCases(pack, i, protocol) for i, name in enumerate(pack.class_names) if i > 0}
    return [Unit(pack.name, name, cases, digest) for name, cases in by_class.items() if len(cases)]


def synthetic_unit(tasks: int, protocol: EvaluationProtocol) -> Unit:
    """One target and one support set a task, whatever the protocol's seeds and limit."""
    cases = synthetic_cases(tasks, support=protocol.support, size=protocol.size or 256)
    return Unit(SYNTHETIC, "tasks", cases, f"{tasks} tasks of generator version {GENERATOR_VERSION}")


def model_predictor(model: PatchICL) -> Predictor:
    """Masks of `model` at probability one half, on the model's device."""
    device = next(model.parameters()).device

    @torch.inference_mode()
    def predict(target: Tensor, support_images: Tensor, support_masks: Tensor) -> Tensor:
        output = model(target.to(device), support_images.to(device), support_masks.to(device))
        return (output.logits > 0).cpu()

    return predict


def predicted_mask(predict: Predictor, case: Case) -> Tensor:
    """bool [1, 1, H, W]."""
    return predict(case.target[None], case.support_images[None], case.support_masks[None])


def score_unit(
    predict: Predictor, unit: Unit, *, compare: Predictor | None = None, progress: bool = False
) -> list[ClassScores]:
    """Scores of all cases; those of synthetic tasks by family, in alphabetical order."""
    found: dict[str, dict[int, list[TargetScores]]] = {}
    total = 0.0
    with tqdm(unit.cases, f"{unit.dataset} / {unit.name}", leave=False, disable=None if progress else True) as bar:
        for done, case in enumerate(bar, 1):
            scores = _score(predict, compare, case)
            found.setdefault(case.class_name, {}).setdefault(case.number, []).append(scores)
            total += scores.dice
            bar.set_postfix(Dice=f"{total / done:.3f}")
    return [
        ClassScores(unit.dataset, name, tuple(_mean_over_draws(draws) for draws in by_target.values()))
        for name, by_target in sorted(found.items())
    ]


def evaluate(
    predict: Predictor,
    dataset: str | Path | Pack,
    protocol: EvaluationProtocol | None = None,
    *,
    compare: Predictor | None = None,
    progress: bool = False,
) -> list[ClassScores]:
    """Score `predict` on each foreground class of a data set, by the default protocol if none is given.

    compare: a second predictor that is scored on the same cases. A class that no target has a support image for is
    left out; see `pack_cases` for who supports whom.
    """
    protocol = protocol or EvaluationProtocol()
    if not isinstance(dataset, Pack):
        pack = load_dataset(dataset, protocol.size)
    else:
        pack = dataset if protocol.size is None else dataset.resized(protocol.size)
    units = pack_units(pack, protocol)
    return [scores for unit in units for scores in score_unit(predict, unit, compare=compare, progress=progress)]


def evaluate_synthetic(
    predict: Predictor, tasks: int = 100, protocol: EvaluationProtocol | None = None, *, progress: bool = False
) -> list[ClassScores]:
    """Score `predict` on class 1 of synthetic tasks that no pool holds: one target a task; by family."""
    return score_unit(predict, synthetic_unit(tasks, protocol or EvaluationProtocol()), progress=progress)


def _score(predict: Predictor, compare: Predictor | None, case: Case) -> TargetScores:
    target, truth = case.target[None], case.mask[None] > 0.5
    supports = case.support_images[None], case.support_masks[None]
    mask = predicted_mask(predict, case)
    floors = {
        "copy": copy_support(supports[1]),
        "otsu": otsu(target, truth),
        "band": intensity_band(target, *supports),
    }
    return TargetScores(
        case.number,
        case.patient,
        (case.supports,),
        dice=dice(mask, truth).item(),
        iou=iou(mask, truth).item(),
        hausdorff95=hausdorff95(mask[0, 0].numpy(), truth[0, 0].numpy()),
        empty=float(not mask.any()),
        **{name: dice(floors[name], truth).item() for name in FLOORS},
        compared=None if compare is None else dice(predicted_mask(compare, case), truth).item(),
    )


def _mean_over_draws(draws: list[TargetScores]) -> TargetScores:
    means: dict[str, Any] = {
        name: float(np.mean([getattr(draw, name) for draw in draws]))
        for name in METRICS
        if getattr(draws[0], name) is not None
    }
    return dataclasses.replace(draws[0], supports=tuple(s for draw in draws for s in draw.supports), **means)
