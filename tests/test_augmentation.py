"""Augmentation: images and masks move together, a task alike or each image apart, and no class is lost."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from icseg.training import TrainingConfig
from icseg.training.augmentation import AugmentationConfig, OperationsConfig, augment
from icseg.training.augmentation.intensity import blur

DOCS = Path(__file__).parent.parent / "docs"
NONE = AugmentationConfig.none()
GEOMETRIC = {"flip": 0.5, "turn": 0.75, "affine": 1.0, "zoom": 0.3, "elastic": 1.0}
INTENSE = {"invert": 0.5, "gamma": 1.0, "contrast": 1.0, "blur": 1.0, "sharpness": 1.0, "noise": 1.0}
OPERATIONS = [*GEOMETRIC, *INTENSE]


def task(**operations: float) -> AugmentationConfig:
    return dataclasses.replace(NONE, task=OperationsConfig(**operations))  # type: ignore[arg-type]


def example(**operations: float) -> AugmentationConfig:
    return dataclasses.replace(NONE, example=OperationsConfig(**operations))  # type: ignore[arg-type]


def box(images: int = 4, shape: tuple[int, int] = (64, 64)) -> Tensor:
    """[images, 1, H, W]: a box off the centre, as long as it is wide twice."""
    mask = torch.zeros(images, 1, *shape)
    mask[..., 16:24, 12:28] = 1
    return mask


def picture(images: int = 4) -> Tensor:
    return torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)).expand(images, -1, -1, -1).contiguous()


def run(x: Tensor, y: Tensor, config: AugmentationConfig, seed: int) -> tuple[Tensor, Tensor]:
    return augment(x, y, config, np.random.default_rng(seed))


def test_nothing_is_the_identity() -> None:
    x, y = run(picture(), box(), NONE, 0)
    assert torch.equal(x, picture())
    assert torch.equal(y, box())


@pytest.mark.parametrize("config", [AugmentationConfig(), AugmentationConfig.published()], ids=["default", "published"])
def test_the_same_generator_gives_the_same(config: AugmentationConfig) -> None:
    first, again, other = (run(picture(), box(), config, seed) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    for seed in range(30):
        x, y = run(picture(), box(), config, seed)
        assert x.shape == y.shape == (4, 1, 64, 64)
        assert x.dtype == y.dtype == torch.float32
        assert 0 <= x.min() < x.max() <= 1
        assert set(y.unique().tolist()) == {0.0, 1.0}
        assert bool((y.flatten(1).amax(1) > 0).all())


def test_the_inputs_stay_as_they_are() -> None:
    x, y = picture(), box()
    for seed in range(10):
        run(x, y, AugmentationConfig.published(), seed)
    assert torch.equal(x, picture())
    assert torch.equal(y, box())


@pytest.mark.parametrize("shape", [(64, 64), (48, 80)])
def test_geometry_moves_images_and_masks_together_and_a_task_alike(shape: tuple[int, int]) -> None:
    config = dataclasses.replace(task(**GEOMETRIC), crop=0.5, crop_foreground=0.0)
    moved = 0
    for seed in range(20):
        x, y = run(box(4, shape), box(4, shape), config, seed)
        assert torch.equal((x >= 0.5).float(), y)
        assert all(torch.equal(y[0], other) for other in y)
        moved += not torch.equal(y, box(4, shape))
    assert moved >= 19


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_of_the_task_is_one_draw_and_of_the_example_one_an_image(operation: str) -> None:
    strength = {operation: 0.5 if operation in ("flip", "turn", "invert") else 1.0}
    x = run(picture(), box(), task(**strength), 2)[0]
    if operation != "noise":  # its strength is shared, but not the noise
        assert all(torch.equal(x[0], other) for other in x)
    for seed in range(2, 8):
        x = run(picture(), box(), example(**strength), seed)[0]
        if not torch.equal(x[0], x[1]):
            return
    pytest.fail("all images were changed alike")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_share_of_changed_images_is_the_probability(operation: str) -> None:
    changed = 0
    for seed in range(50):
        x = run(picture(6), box(6), example(**{operation: 0.25}), seed)[0]
        changed += int((x != picture(6)).flatten(1).any(1).sum())
    expected = 1 - 0.75**2 if operation == "flip" else 0.25  # of either axis
    assert abs(changed / 300 - expected) < 0.1


def test_flips_and_turns_are_the_symmetries_of_the_square() -> None:
    image = picture(1)
    turns = [torch.rot90(image, k, (-2, -1)) for k in range(4)]
    symmetries = [*turns, *(turned.flip(-1) for turned in turns)]

    def seen(config: AugmentationConfig) -> set[int]:
        moved = [run(image, box(1), config, seed)[0] for seed in range(60)]
        return {next(i for i, known in enumerate(symmetries) if torch.equal(known, x)) for x in moved}

    assert seen(task(flip=0.5, turn=0.75)) == set(range(8))
    assert seen(task(turn=0.75)) == {0, 1, 2, 3}
    assert seen(task(turn=1)) == {1, 2, 3}
    assert seen(task(flip=0.5)) == {0, 2, 4, 6}


def centre_and_area(y: Tensor) -> tuple[float, float, float]:
    rows, columns = torch.nonzero(y[0, 0], as_tuple=True)
    return rows.double().mean().item(), columns.double().mean().item(), float(y[0, 0].sum())


def test_the_strengths_bound_the_changes() -> None:
    """Of the box of 8 x 16 pixels, whose centre is (19.5, 19.5), in images of 64."""
    for seed in range(20):
        row, column, area = centre_and_area(run(box(), box(), task(affine=1, rotation=0, scale=0, shear=0), seed)[1])
        assert abs(row - 19.5) <= 0.05 * 64 + 0.5
        assert abs(column - 19.5) <= 0.05 * 64 + 0.5
        assert 7 * 15 <= area <= 9 * 17
        _, _, area = centre_and_area(
            run(box(), box(), task(affine=1, rotation=0, scale=0.5, shear=0, shift=0), seed)[1]
        )
        assert 128 / 2 - 25 <= area <= 128 * 2 + 25
        y = run(box(), box(), task(elastic=1, elastic_shift=0.02), seed)[1]
        assert 0 < float((y != box()).float().sum()) / 4 < 80


def test_zoom_goes_both_ways() -> None:
    areas = [centre_and_area(run(box(), box(), task(zoom=1), seed)[1])[2] / 128 for seed in range(40)]
    assert min(areas) < 0.5
    assert max(areas) > 2
    assert min(areas) > 0.2
    assert max(areas) < 4.5


def test_a_rotation_keeps_shapes_of_images_that_are_not_square() -> None:
    mask = torch.zeros(1, 1, 48, 96)
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(96), indexing="ij")
    distance = ((rows - 23.5) ** 2 + (columns - 47.5) ** 2) ** 0.5
    mask[0, 0] = (distance < 15).float()
    for seed in range(10):
        turned = run(mask, mask, task(affine=1, rotation=90, scale=0, shear=0, shift=0), seed)[1]
        assert int((turned != mask)[0, 0, distance < 24].sum()) < 30


def test_an_image_keeps_its_geometry_where_a_class_would_be_lost() -> None:
    masks = torch.zeros(6, 2, 64, 64)
    masks[:, 0, 20:44, 20:44] = 1
    masks[range(6), 1, [0, 63, 0, 63, 32, 8], [0, 63, 63, 0, 32, 40]] = 1
    config = dataclasses.replace(task(affine=1, elastic=1), crop=1.0, crop_side=0.5)
    kept = 0
    for seed in range(20):
        x, y = run(masks[:, :1], masks, config, seed)
        assert bool((y.flatten(2).amax(2) > 0).all())
        assert torch.equal((x >= 0.5).float(), y[:, :1])
        kept += int((x == masks[:, :1]).flatten(1).all(1).sum())
    assert kept > 60


@pytest.mark.parametrize("foreground", [0.0, 1.0])
def test_crops_about_the_foreground_hold_more_of_it(foreground: float) -> None:
    masks = torch.zeros(3, 1, 64, 64)
    for i, at in enumerate((2, 28, 56)):
        masks[i, :, at : at + 6, at : at + 6] = 1
    config = dataclasses.replace(NONE, crop=1.0, crop_side=0.5, crop_foreground=foreground)
    grown = [run(masks, masks, config, seed)[1].sum((1, 2, 3)) > 36 for seed in range(30)]
    share = torch.stack(grown).float().mean().item()
    assert share > 0.8 if foreground else share < 0.6


def test_an_inversion_is_exact() -> None:
    seen = {float(run(picture(), box(), task(invert=0.5), seed)[0][0, 0, 0, 0]) for seed in range(20)}
    value = picture()[0, 0, 0, 0]
    assert seen == {float(value), float(1 - value)}


def test_a_blur_is_the_gaussians() -> None:
    point = torch.zeros(2, 1, 41, 41)
    point[..., 20, 20] = 1
    blurred = blur(point, torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))
    offsets = torch.arange(-20, 21).double()
    for image, sigma in zip(blurred[:, 0], (1.0, 3.0), strict=True):
        gauss = torch.exp(-0.5 * (offsets / sigma) ** 2)
        expected = torch.outer(gauss, gauss) / gauss.sum() ** 2
        assert image.sum().item() == pytest.approx(1.0, abs=1e-5)
        assert (image - expected).abs().max() < 1e-3


def test_sharpening_undoes_no_flat_ground_and_raises_edges() -> None:
    x = 0.25 + 0.5 * box()
    sharp = run(x, box(), task(sharpness=1.0, sharpness_gain=2.0), 1)[0]
    assert torch.allclose(sharp[..., 40:60, 40:60], x[..., 40:60, 40:60])
    assert sharp.max() > 0.76


def test_outlines_and_complements() -> None:
    y = run(picture(), box(), dataclasses.replace(NONE, outline=1.0), 0)[1]
    expected = torch.zeros(64, 64)
    expected[15:25, 11:29] = 1
    expected[17:23, 13:27] = 0
    assert torch.equal(y[0, 0], expected)
    complement = dataclasses.replace(NONE, complement=1.0)
    assert torch.equal(run(picture(), box(), complement, 0)[1], 1 - box())
    two = box().repeat(1, 2, 1, 1)
    assert torch.equal(run(picture(), two, complement, 0)[1], two)
    full = torch.ones(4, 1, 64, 64)
    assert torch.equal(run(picture(), full, complement, 0)[1], full)
    asked = [
        bool(run(picture(), box(), dataclasses.replace(NONE, complement=0.25), i)[1].mean() > 0.5) for i in range(80)
    ]
    assert 10 <= sum(asked) <= 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blur": 1.5}, r"blur must be a finite number in \[0, 1\], got 1.5"),
        ({"rotation": -1.0}, "rotation must be a finite number of at least 0, got -1.0"),
        ({"zoom_factor": 0.5}, "zoom_factor must be a finite number of at least 1, got 0.5"),
        ({"elastic_cells": 0}, "elastic_cells must be an int of at least 1, got 0"),
        ({"elastic_shift": 0.1}, r"elastic_shift must be at most 0\.3 / elastic_cells = 0\.05, so .*, got 0\.1"),
    ],
)
def test_bad_operations(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OperationsConfig(**fields)  # type: ignore[arg-type]


def test_bad_crops() -> None:
    with pytest.raises(ValueError, match=r"crop_side must lie in \(0, 1\], got 0"):
        AugmentationConfig(crop_side=0)
    with pytest.raises(ValueError, match=r"complement must be a finite number in \[0, 1\], got 2"):
        AugmentationConfig(complement=2)


def test_a_table_changes_single_values_of_the_defaults() -> None:
    config = TrainingConfig.from_dict(
        {"data": {"augmentation": {"crop": 0, "example": {"blur": 0.5}}}}
    ).data.augmentation
    default = AugmentationConfig()
    assert config == dataclasses.replace(default, crop=0.0, example=dataclasses.replace(default.example, blur=0.5))
    assert config.task == default.task


def test_the_documented_table_is_the_published_setting() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (DOCS / "training_data.md").read_text(), re.DOTALL)
    block = next(block for block in blocks if "[data.augmentation.example]" in block)
    assert TrainingConfig.from_dict(tomllib.loads(block)).data.augmentation == AugmentationConfig.published()
