"""Floors: the mean support mask and Otsu's threshold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from icseg.baselines.floors import copy_support, otsu, otsu_threshold


def otsu_by_search(grey: np.ndarray) -> float:
    """The middle of the best thresholds, by trying all of them."""
    scores = []
    for t in range(256):
        below, above = grey[grey <= t], grey[grey > t]
        scores.append(len(below) * len(above) * (below.mean() - above.mean()) ** 2 if len(below) and len(above) else 0)
    best = np.flatnonzero(np.isclose(scores, max(scores), rtol=1e-12, atol=0))
    return float(best.mean())


def test_copy_is_the_majority_of_the_support_masks() -> None:
    masks = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 0, 0]]).float().reshape(1, 3, 1, 2, 2)
    assert copy_support(masks).tolist() == [[[[True, True], [False, False]]]]
    assert copy_support(masks[:, :2]).sum() == 3  # half of the masks is enough
    with pytest.raises(
        ValueError, match=r"support_masks must have shape \[B, S, 1, H, W\] with S > 0, got \[1, 0, 1, 2, 2\]"
    ):
        copy_support(masks[:, :0])


@pytest.mark.parametrize("seed", range(5))
def test_otsu_against_a_search(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grey = np.concatenate([rng.normal(70, 15, 300), rng.normal(150 + 10 * seed, 25, 200)]).clip(0, 255).astype(np.uint8)
    image = torch.from_numpy(grey.astype(np.float32) / 255).reshape(1, 1, 20, 25)
    assert otsu_threshold(image).item() * 255 == pytest.approx(otsu_by_search(grey), abs=1e-3)


def test_otsu_takes_images_apart_and_survives_a_constant_one() -> None:
    two = torch.zeros(2, 1, 4, 4)
    two[0, ..., :2] = 1.0
    two[1] = 0.3
    thresholds = otsu_threshold(two)
    assert 0 < thresholds[0] < 1
    assert thresholds[1].item() == pytest.approx(0.3, abs=1 / 255)


def test_otsu_takes_the_better_polarity() -> None:
    image = torch.full((2, 1, 8, 8), 0.8)
    image[..., :3] = 0.2
    truth = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    truth[0, ..., :3] = True
    truth[1, ..., 3:] = True
    assert torch.equal(otsu(image, truth), truth)
    with pytest.raises(ValueError, match="target_mask must have the shape of target"):
        otsu(image, truth[:1])
