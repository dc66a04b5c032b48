"""Metrics against values by hand, and the defined values for empty masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from icseg.metrics import dice, hausdorff95, iou, soft_dice

EMPTY, FULL = torch.zeros(1, 1, 8, 8, dtype=torch.bool), torch.ones(1, 1, 8, 8, dtype=torch.bool)


def square(top: int, left: int, side: int, size: int = 32) -> Tensor:
    mask = torch.zeros(1, 1, size, size, dtype=torch.bool)
    mask[..., top : top + side, left : left + side] = True
    return mask


def test_overlap_of_two_squares() -> None:
    a, b = square(0, 0, 4), square(0, 2, 4)
    assert dice(a, b).tolist() == [pytest.approx(2 * 8 / 32)]
    assert iou(a, b).tolist() == [pytest.approx(8 / 24)]
    assert soft_dice(a.float(), b).tolist() == [pytest.approx(0.5)]


def test_soft_dice_is_dice_of_probabilities() -> None:
    assert soft_dice(torch.full((1, 4), 0.5), torch.tensor([[1, 1, 0, 0]])).item() == pytest.approx(2 * 1 / (2 + 2))


def test_samples_of_a_batch_are_kept_apart() -> None:
    a, b = torch.cat([square(0, 0, 4), square(0, 0, 4)]), torch.cat([square(0, 0, 4), square(8, 8, 4)])
    assert dice(a, b).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("metric", [dice, iou, soft_dice])
def test_empty_masks(metric: object) -> None:
    assert callable(metric)
    assert metric(EMPTY, EMPTY).item() == 1.0
    assert metric(EMPTY, FULL).item() == metric(FULL, EMPTY).item() == 0.0
    assert math.isnan(metric(EMPTY, EMPTY, empty="nan").item())
    assert metric(EMPTY, FULL, empty="nan").item() == 0.0


def test_hausdorff_of_a_shifted_square() -> None:
    a, b = square(4, 4, 8)[0, 0].numpy(), square(4, 9, 8)[0, 0].numpy()
    assert hausdorff95(a, b) == 5.0
    assert hausdorff95(a, b, spacing=(1.0, 0.5)) == 2.5
    assert hausdorff95(a, a) == 0.0


def test_hausdorff95_forgives_a_few_far_pixels() -> None:
    a = square(2, 2, 20)[0, 0].numpy()
    b = a.copy()
    b[31, 31] = True
    assert hausdorff95(a, b) == 0.0


def test_hausdorff_is_symmetric_and_takes_volumes() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 6, 12, 12)) > 0.7
    assert hausdorff95(a, b) == hausdorff95(b, a) > 0
    assert hausdorff95(a, b, spacing=2.0) == pytest.approx(2 * hausdorff95(a, b))


def test_hausdorff_of_empty_masks() -> None:
    empty, one = np.zeros((4, 5), bool), np.eye(4, 5, dtype=bool)
    assert hausdorff95(empty, empty) == 0.0
    assert hausdorff95(one, empty) == hausdorff95(empty, one) == 5.0  # 3 by 4 pixels between the corners
    assert hausdorff95(one, empty, spacing=2.0) == 10.0
    assert math.isnan(hausdorff95(empty, empty, empty="nan"))
    assert math.isnan(hausdorff95(one, empty, empty="nan"))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"prediction must be a bool tensor, got torch.float32"):
        dice(torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"target must have the shape of prediction \[1, 1, 8, 8\], got \[1, 1, 32, 32\]"
    ):
        iou(EMPTY, square(0, 0, 2))
    with pytest.raises(ValueError, match="empty must be one of defined, nan, got 'zero'"):
        dice(EMPTY, EMPTY, empty="zero")
    with pytest.raises(ValueError, match="empty must be one of defined, nan, got 'zero'"):
        hausdorff95(np.ones((3, 3)), np.ones((3, 3)), empty="zero")
    with pytest.raises(ValueError, match="target must have the shape of prediction"):
        soft_dice(EMPTY.float(), square(0, 0, 2))
    with pytest.raises(ValueError, match="target must have the shape of prediction"):
        hausdorff95(np.zeros((3, 3)), np.zeros((3, 4)))
