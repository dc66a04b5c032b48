"""Scores of a target, against values by hand, and their means over support sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_pack import SIZE, Recorder, write_pack, write_varied_pack

from icseg.baselines.floors import copy_support
from icseg.data.synthetic import FAMILIES
from icseg.evaluation import ClassScores, EvaluationProtocol, TargetScores, evaluate, evaluate_synthetic

OWN = EvaluationProtocol(size=None)


def nothing(target: Tensor, support_images: Tensor, support_masks: Tensor) -> Tensor:
    return torch.zeros_like(target) > 0


def bright(target: Tensor, support_images: Tensor, support_masks: Tensor) -> Tensor:
    return target > 0.5


def test_a_perfect_prediction(tmp_path: Path) -> None:
    recorder = Recorder()
    [scores] = evaluate(recorder, write_pack(tmp_path / "toy.npz"), OWN)  # nobody can support the rare class
    assert (scores.dataset, scores.class_name, len(scores.targets)) == ("toy", "square", 9)
    assert recorder.shapes == {(1, 1, SIZE, SIZE), (1, 3, 1, SIZE, SIZE)}
    assert sorted(target for target, _ in recorder.calls) == list(range(9))
    for target, (number, supports) in zip(scores.targets, recorder.calls, strict=True):
        assert (target.number, target.patient, target.supports) == (number, f"p{number // 2}", (tuple(supports),))
        assert (target.dice, target.iou, target.hausdorff95, target.empty, target.copy) == (1, 1, 0, 0, 1)
        # image 0 has a second bright square
        assert target.otsu == pytest.approx(1 if number else 2 * 64 / (2 * 64 + 36))
        assert target.band == target.otsu
        assert target.compared is None


def test_the_default_is_256_pixels(tmp_path: Path) -> None:
    recorder = Recorder()
    evaluate(recorder, write_pack(tmp_path / "toy.npz"), EvaluationProtocol(limit=1))
    assert recorder.shapes == {(1, 1, 256, 256), (1, 3, 1, 256, 256)}


def test_an_empty_prediction_has_defined_scores(tmp_path: Path) -> None:
    [scores] = evaluate(nothing, write_pack(tmp_path / "toy.npz"), OWN)
    assert [scores.mean(name) for name in ("dice", "iou", "empty")] == [0, 0, 1]
    assert scores.mean("hausdorff95") == pytest.approx(2**0.5 * (SIZE - 1))


def test_a_score_is_the_mean_over_support_sets(tmp_path: Path) -> None:
    path = write_varied_pack(tmp_path / "varied.npz")

    def copy(target: Tensor, support_images: Tensor, support_masks: Tensor) -> Tensor:
        return copy_support(support_masks)

    seeds = (0, 1, 2)
    one_by_one = [evaluate(copy, path, EvaluationProtocol(None, seeds=(seed,))) for seed in seeds]
    together = evaluate(copy, path, EvaluationProtocol(None, seeds=seeds))
    assert [scores.class_name for scores in together] == ["box", "bar/strip"]
    for i, scores in enumerate(together):
        alone = [{target.number: target for target in found[i].targets} for found in one_by_one]
        for target in scores.targets:
            draws = [found[target.number] for found in alone]
            assert target.supports == tuple(draw.supports[0] for draw in draws)
            for name in ("dice", "iou", "hausdorff95", "empty", "copy", "otsu", "band"):
                assert getattr(target, name) == pytest.approx(np.mean([getattr(draw, name) for draw in draws]))
            assert target.dice == target.copy


def test_both_models_see_the_same_cases(tmp_path: Path) -> None:
    path = write_varied_pack(tmp_path / "varied.npz")
    first, second = Recorder(), Recorder()
    both = evaluate(first, path, OWN, compare=second)
    assert first.calls == second.calls
    assert all(target.compared == target.dice for scores in both for target in scores.targets)
    alone = evaluate(bright, path, OWN)
    compared = evaluate(Recorder(), path, OWN, compare=bright)
    for one, two in zip(alone, compared, strict=True):
        assert [target.dice for target in one.targets] == [target.compared for target in two.targets]


def test_synthetic_tasks_by_family() -> None:
    recorder = Recorder()
    found = evaluate_synthetic(recorder, 4, EvaluationProtocol(size=64, support=2, seeds=(0, 1), limit=1))
    assert sum(len(scores.targets) for scores in found) == len(recorder.calls) == 4
    names = [scores.class_name for scores in found]
    assert names == sorted(set(names))
    assert set(names) <= set(FAMILIES)
    assert {scores.dataset for scores in found} == {"synthetic"}
    assert all(target.dice == target.copy for scores in found for target in scores.targets)
    assert sorted(target.number for scores in found for target in scores.targets) == [0, 1, 2, 3]


def test_samples_and_the_best_floor() -> None:
    def target(number: int, patient: str | None, dice: float, otsu: float) -> TargetScores:
        return TargetScores(number, patient, (), dice, 0.0, 0.0, 0.0, copy=0.1, otsu=otsu, band=0.2)

    known = ClassScores("a", "x", (target(4, "p", 0.5, 0.25), target(7, "p", 0.75, 0.5)))
    assert known.best_floor == "otsu"
    assert known.sample("dice").values.tolist() == [0.5, 0.75]
    assert known.sample("dice", "otsu").values.tolist() == [0.25, 0.25]
    assert known.sample("dice").clusters.tolist() == ["p", "p"]
    unknown = ClassScores("a", "x", (target(4, None, 0.5, 0.1), target(7, None, 0.75, 0.1)))
    assert unknown.sample("dice").clusters.tolist() == [4, 7]
    assert unknown.best_floor == "band"
