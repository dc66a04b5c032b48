"""Pictures: which targets, and that the outlines are where the masks are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture
from toy_pack import write_varied_pack

from icseg.evaluation import ClassScores, TargetScores, load_dataset, pack_cases
from icseg.evaluation.pictures import GAP, LINE, PREDICTED, SIDE, TRUE, Example, picked, place_of, save_examples, sheet


def ranked(count: int) -> ClassScores:
    """Targets 0, 1, ..., of falling Dice."""
    return ClassScores("a", "x", tuple(TargetScores(i, None, (), 1 - i / 100, 0, 0, 0, 0, 0, 0) for i in range(count)))


@pytest.mark.parametrize(
    ("targets", "count", "ranks"),
    [(9, 3, [1, 5, 9]), (8, 3, [1, 4, 8]), (9, 5, [1, 3, 5, 7, 9]), (2, 3, [1, 2]), (5, 1, [1]), (1, 3, [1])],
)
def test_the_worst_the_best_and_those_between(targets: int, count: int, ranks: list[int]) -> None:
    found = picked(ranked(targets), count)
    assert [rank for rank, _ in found] == ranks
    assert [target.number for _, target in found] == [targets - rank for rank in ranks]


def test_places_in_words() -> None:
    assert [place_of(rank, 9) for rank in (1, 3, 5, 9)] == ["worst of 9", "rank 3 of 9", "median of 9", "best of 9"]
    assert [place_of(rank, 8) for rank in (1, 4, 8)] == ["worst of 8", "median of 8", "best of 8"]
    assert [place_of(rank, 2) for rank in (1, 2)] == ["worst of 2", "best of 2"]


@pytest.fixture
def example(tmp_path: Path) -> Example:
    case = pack_cases(load_dataset(write_varied_pack(tmp_path / "varied.npz"), SIDE), 1)[0]
    prediction = np.zeros((SIDE, SIDE), bool)
    prediction[100:150, 60:90] = True
    return Example("worst of 9: target 4, Dice 0.000", case, prediction)


def coloured(page: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return (page == colour.astype(np.uint8)).all(-1)


def test_outlines_are_where_the_masks_are(example: Example) -> None:
    page = np.array(sheet("a, x", [example, example]))
    assert page.shape[0] == LINE + 2 * (LINE + SIDE + GAP)
    top = 2 * LINE
    tiles = [page[top : top + SIDE, left : left + SIDE] for left in (GAP + i * (SIDE + GAP) for i in range(3))]
    grey = np.rint(example.case.target[0].numpy() * 255).astype(np.uint8)
    assert np.array_equal(tiles[0], grey[..., None].repeat(3, -1))
    truth = example.case.mask[0].numpy() > 0.5
    assert coloured(tiles[1], TRUE).any()
    assert not (coloured(tiles[1], TRUE) & ~truth).any()
    outline = np.zeros_like(truth)
    outline[100:150, 60:90] = True
    outline[101:149, 61:89] = False
    assert np.array_equal(coloured(tiles[2], PREDICTED), outline)
    supports = page[top : top + SIDE, GAP + 3 * (SIDE + GAP) :]
    assert coloured(supports[: SIDE // 2, : SIDE // 2], TRUE).any()
    assert coloured(supports[: SIDE // 2, SIDE // 2 + GAP :], TRUE).any()
    assert coloured(supports[SIDE // 2 : SIDE, : SIDE // 2], TRUE).any()
    assert (page[:LINE] < 100).any()  # the title


def test_images_that_are_not_square_and_names_of_any_script(example: Example, tmp_path: Path) -> None:
    case = example.case
    wide = Example(
        "größte 猫",
        type(case)(case.target[:, :100], case.mask[:, :100], case.support_images, case.support_masks, 0, 0),
        example.prediction[:100],
    )
    save_examples("größte 猫", [wide, example], tmp_path / "x.png")
    with Picture.open(tmp_path / "x.png") as picture:
        assert picture.format == "PNG"
        assert picture.height == LINE + 2 * (LINE + SIDE + GAP)
