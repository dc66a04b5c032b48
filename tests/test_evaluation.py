"""Evaluation: the protocol (who may support whom), the rows, and packs that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from icseg.baselines.floors import copy_support
from icseg.config import PatchICLConfig
from icseg.data.synthetic import EVALUATION_SEED, generate_task, pool_task_seed
from icseg.evaluation import (
    EvaluationRow,
    Pack,
    evaluate,
    evaluate_packs,
    evaluate_synthetic,
    markdown_table,
    model_predictor,
    write_json,
)
from icseg.model import PatchICL

COUNT, SIZE = 12, 24


def write_pack(path: Path, **changes: object) -> Path:
    """12 images whose first pixel is their number; class 1 in the first nine, class 2 in image 0 alone."""
    images = np.zeros((COUNT, SIZE, SIZE), np.uint8)
    masks = np.zeros_like(images)
    masks[:9, 4:12, 4:12] = 1
    masks[0, 14:20, 14:20] = 2
    images[masks > 0] = 200
    images[:, 0, 0] = np.arange(COUNT)
    arrays: dict[str, object] = {
        "images": images,
        "masks": masks,
        "class_names": np.array(["background", "square", "rare"]),
        "patient": np.array([f"p{i // 2}" for i in range(COUNT)]),
    }
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


class Recorder:
    """Predicts the majority of the support masks and remembers which images it was shown."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, list[int]]] = []
        self.shapes: set[tuple[int, ...]] = set()

    def __call__(self, target: Tensor, support_images: Tensor, support_masks: Tensor) -> Tensor:
        number = (support_images[0, :, 0, 0, 0] * 255).round().int().tolist()
        self.calls.append((int((target[0, 0, 0, 0] * 255).round()), number))
        self.shapes |= {tuple(target.shape), tuple(support_images.shape), tuple(support_masks.shape)}
        assert bool((support_masks.flatten(2).sum(2) > 0).all())
        return copy_support(support_masks)


def test_supports_contain_the_class_and_are_other_patients(tmp_path: Path) -> None:
    recorder = Recorder()
    rows = evaluate(recorder, write_pack(tmp_path / "toy.npz"))
    assert sorted(target for target, _ in recorder.calls) == list(range(9))
    for target, supports in recorder.calls:
        assert len(set(supports)) == 3
        assert all(s < 9 and s // 2 != target // 2 for s in supports)
    assert recorder.shapes == {(1, 1, SIZE, SIZE), (1, 3, 1, SIZE, SIZE)}
    assert len(rows) == 1  # nobody can support the rare class
    row = rows[0]
    assert (row.dataset, row.class_name, row.targets) == ("toy", "square", 9)
    assert (row.dice, row.iou, row.hausdorff95, row.copy) == (1.0, 1.0, 0.0, 1.0)
    assert row.otsu == pytest.approx((8 + 2 * 64 / (2 * 64 + 36)) / 9)  # image 0 has a second bright square


def test_without_patients_any_other_image_supports(tmp_path: Path) -> None:
    recorder = Recorder()
    evaluate(recorder, write_pack(tmp_path / "toy.npz", patient=None), support=8)
    for target, supports in recorder.calls:
        assert sorted([target, *supports]) == list(range(9))


def test_draws_depend_on_the_seed_and_not_on_the_limit(tmp_path: Path) -> None:
    path = write_pack(tmp_path / "toy.npz")
    all_of, some, again, other = Recorder(), Recorder(), Recorder(), Recorder()
    evaluate(all_of, path)
    evaluate(some, path, limit=4)
    evaluate(again, path, limit=4)
    evaluate(other, path, limit=4, seed=1)
    assert some.calls == again.calls == all_of.calls[:4]
    assert other.calls != some.calls


def test_fewer_supports_than_asked_are_used(tmp_path: Path) -> None:
    recorder = Recorder()
    evaluate(recorder, write_pack(tmp_path / "toy.npz"), support=100, limit=1)
    assert 7 <= len(recorder.calls[0][1]) <= 8


def test_another_size(tmp_path: Path) -> None:
    recorder = Recorder()
    rows = evaluate(recorder, write_pack(tmp_path / "toy.npz"), size=48, limit=2)
    assert recorder.shapes == {(1, 1, 48, 48), (1, 3, 1, 48, 48)}
    assert rows[0].dice == 1.0


def test_an_empty_prediction_has_defined_scores(tmp_path: Path) -> None:
    rows = evaluate(lambda target, images, masks: torch.zeros_like(target) > 0, write_pack(tmp_path / "toy.npz"))
    assert (rows[0].dice, rows[0].iou) == (0.0, 0.0)
    assert rows[0].hausdorff95 == pytest.approx(2**0.5 * (SIZE - 1))


def test_synthetic_tasks_by_family() -> None:
    recorder = Recorder()
    rows = evaluate_synthetic(recorder, 3, support=2, size=64)
    assert sum(row.targets for row in rows) == len(recorder.calls) == 3
    assert all(row.dataset == "synthetic" and row.dice == row.copy for row in rows)
    assert len({row.class_name for row in rows}) == len(rows)


def test_synthetic_tasks_are_scored_on_class_1() -> None:
    tasks = [generate_task(pool_task_seed(EVALUATION_SEED, i), 3, 64) for i in range(6)]
    assert any(task.masks.max() > 1 for task in tasks)
    by_family = iter(sorted(tasks, key=lambda task: task.family))

    def perfect(target: Tensor, support_images: Tensor, support_masks: Tensor) -> Tensor:
        foreground = torch.from_numpy(next(by_family).masks == 1)
        assert torch.equal(support_masks[0, :, 0] > 0, foreground[1:])
        return foreground[None, :1]

    rows = evaluate_synthetic(perfect, 6, support=2, size=64)
    assert all(row.dice == 1.0 for row in rows)


def test_the_scores_are_those_of_the_checkpoints_weights(tmp_path: Path) -> None:
    config = PatchICLConfig.sparse(
        levels=(16,), target_patches=(4,), support_patches=(4,), dim=8, depth=1, heads=1, stem_channels=8
    )
    torch.manual_seed(0)
    model = PatchICL(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "model.safetensors")
    path = write_pack(tmp_path / "toy.npz")
    rows = evaluate_packs([path, path], checkpoint=tmp_path / "model.safetensors", limit=2, progress=False)
    assert rows[:1] == rows[1:] == evaluate(model_predictor(model), path, limit=2)
    untrained = model_predictor(PatchICL(config).eval())
    assert rows[0].dice != evaluate(untrained, path, limit=2)[0].dice
    assert 0 < rows[0].dice < 1
    with pytest.raises(FileNotFoundError, match=r"pack must be an existing \.npz file"):
        evaluate_packs([path, tmp_path / "none.npz"], checkpoint=tmp_path / "model.safetensors")


def test_table_and_json(tmp_path: Path) -> None:
    rows = [
        EvaluationRow("a", "x", 3, 0.5, 0.4, 2.0, 0.1, 0.2),
        EvaluationRow("b", "y", 1, 1.0, 0.8, 4.0, 0.3, 0.4),
    ]
    lines = markdown_table(rows).splitlines()
    assert lines[0].startswith("| data set | class | targets | Dice |")
    assert lines[2] == "| a | x | 3 | 0.500 | 0.400 | 2.0 | 0.100 | 0.200 |"
    assert lines[-1] == "| mean of rows |  | 4 | 0.750 | 0.600 | 3.0 | 0.200 | 0.300 |"
    assert all(line.count("|") == 9 for line in lines)
    assert len(markdown_table(rows[:1]).splitlines()) == 3
    write_json(rows, tmp_path / "rows.json")
    assert [EvaluationRow(**row) for row in json.loads((tmp_path / "rows.json").read_text())] == rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": None}, "pack must hold masks, got .* without"),
        ({"images": np.zeros((COUNT, SIZE, SIZE), np.float32)}, r"both uint8, got \[12, 24, 24\] float32"),
        (
            {"images": np.zeros((3, SIZE, SIZE), np.uint8)},
            r"of one shape \[N, H, W\].*got \[3, 24, 24\] uint8",
        ),
        ({"class_names": np.array(["background"])}, "class_names must name class ids up to 2, got 1 names"),
        ({"patient": np.array([{}] * COUNT, dtype=object)}, r"pack must be a readable \.npz file"),
        ({"patient": np.array(["a", "b"])}, r"patient must have one entry an image, shape \[12\], got \[2\]"),
        ({"class_names": np.array("background")}, r"class_names must be a list of strings, got <U10 \[\]"),
        ({"class_names": np.array([["background"] * 3])}, r"class_names must be a list of strings, got <U10 \[1, 3\]"),
        ({"class_names": np.arange(3)}, r"class_names must be a list of strings, got int64 \[3\]"),
        ({"patient": np.zeros(COUNT)}, "pack must hold some class in images of two patients, got none"),
        ({"patient": np.full(COUNT, np.nan)}, "pack must hold some class in images of two patients, got none"),
        ({"masks": np.zeros((COUNT, SIZE, SIZE), np.uint8)}, "pack must hold some class in images of two patients"),
    ],
)
def test_bad_packs(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pack.load(write_pack(tmp_path / "bad.npz", **changes))
    with pytest.raises(ValueError, match=r"bad\.npz"):
        Pack.load(tmp_path / "bad.npz")


def test_files_that_are_no_packs(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("not a zip file")
    with pytest.raises(ValueError, match=r"pack must be a readable \.npz file"):
        Pack.load(tmp_path / "text.npz")
    whole = write_pack(tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"pack must be a readable \.npz file"):
        Pack.load(tmp_path / "cut.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(ValueError, match=r"pack must be a readable \.npz file"):
        Pack.load(tmp_path / "array.npz")


@pytest.mark.parametrize("name", ["support", "size", "limit"])
def test_bad_arguments(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        evaluate(Recorder(), write_pack(tmp_path / "toy.npz"), **{name: 0})  # type: ignore[arg-type]


def test_bad_seeds_and_nothing_to_score(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        evaluate(Recorder(), write_pack(tmp_path / "toy.npz"), seed=-1)
    with pytest.raises(ValueError, match="tasks must be at least 1, got 0"):
        evaluate_synthetic(Recorder(), 0)
    with pytest.raises(ValueError, match="paths must name a pack where synthetic_tasks is 0, got none"):
        evaluate_packs([])
