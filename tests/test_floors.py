"""Floors: the mean support mask, Otsu's threshold and the intensity band."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from icseg.baselines.floors import copy_support, fit_band, intensity_band, otsu, otsu_threshold


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


def band_dice(levels: np.ndarray, truth: np.ndarray, low: int, high: int) -> float:
    band = (levels >= low) & (levels <= high)
    return 2 * (band & truth).sum() / (band.sum() + truth.sum())


@pytest.mark.parametrize("seed", range(5))
def test_the_band_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.random((3, 1, 20, 25)) < 0.3
    grey = np.where(truth, rng.normal(60 + 30 * seed, 20, truth.shape), rng.normal(130, 50, truth.shape))
    grey = grey.clip(0, 255).astype(np.uint8)
    images = torch.from_numpy(grey.astype(np.float32) / 255)
    levels = np.floor(images.numpy() * 64).clip(0, 63).astype(int)
    best = max(band_dice(levels, truth, low, high) for low in range(64) for high in range(low, 64))
    low, high = fit_band(images, torch.from_numpy(truth).float())
    assert 0 <= low <= high < 64
    assert band_dice(levels, truth, low, high) == best


def test_the_ends_of_a_band_are_in_the_middle_of_gaps() -> None:
    level = torch.tensor([4, 20, 24, 40]).repeat(4, 1)
    masks = ((level == 20) | (level == 24)).float()
    assert fit_band((level + 0.5) / 64, masks) == (13, 32)  # of 5 to 20, and of 24 to 39


def test_a_band_is_applied_to_its_own_target() -> None:
    images = torch.full((2, 3, 1, 8, 8), 0.2)
    images[..., 4:] = 0.6
    masks = torch.zeros_like(images)
    masks[0, ..., 4:] = 1  # the bright half in the first, the dark one in the second
    masks[1, ..., :4] = 1
    target = torch.full((2, 1, 6, 9), 0.2)
    target[..., 2:] = 0.6
    found = intensity_band(target, images, masks)
    assert found.dtype == torch.bool
    assert torch.equal(found[0], target[0] == 0.6)
    assert torch.equal(found[1], target[1] == 0.2)
    with pytest.raises(ValueError, match=r"must have one shape \[B, S, 1, H, W\] with S > 0, got \[2, 0, 1, 8, 8\]"):
        intensity_band(target, images[:, :0], masks[:, :0])
    with pytest.raises(ValueError, match=r"got \[2, 3, 1, 8, 8\] and \[2, 2, 1, 8, 8\]"):
        intensity_band(target, images, masks[:, :2])
