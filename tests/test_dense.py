"""UniverSeg as an architecture: the same calls, files and training as the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from icseg.baselines.dense import DenseConfig, DenseNetwork
from icseg.config import PatchICLConfig
from icseg.memory import SupportMemory
from icseg.model import PatchICL
from icseg.training import TrainingConfig, train

TINY = {"architecture": "universeg", "channels": [4, 4], "image_size": 16}


def tiny() -> PatchICL:
    torch.manual_seed(0)
    return PatchICL(PatchICLConfig.universeg(channels=(4, 4), image_size=16)).eval()


def inputs(batch: int = 2, support: int = 3, size: tuple[int, int] = (16, 16)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    target = torch.rand(batch, 1, *size, generator=generator)
    images = torch.rand(batch, support, 1, *size, generator=generator)
    return target, images, (images > 0.6).float()


def test_it_is_universeg() -> None:
    model, (target, images, masks) = tiny(), inputs()
    assert isinstance(model.network, DenseNetwork)
    assert torch.equal(model(target, images, masks).logits, model.network.universeg(target, images, masks))


@pytest.mark.parametrize("size", [(40, 24), (16, 16), (9, 12)])
def test_any_size_is_seen_as_a_square(size: tuple[int, int]) -> None:
    model, (target, images, masks) = tiny(), inputs(size=size)
    out = model(target, images, masks)
    assert out.logits.shape == target.shape
    assert len(out.levels) == 1
    level = out.levels[0]
    assert level.resolution == (16, 16)
    assert level.logits.shape == (2, 1, 16, 16)
    assert level.patch_logits.shape == (2, 1, 1, 16, 16)
    assert level.coords.tolist() == [[[0, 0]]] * 2
    assert bool(level.coverage.all())
    assert torch.equal(out.logits, F.interpolate(level.logits, size, mode="bilinear", align_corners=False))


def test_support_images_may_have_another_size() -> None:
    model, (target, _, _), (_, images, masks) = tiny(), inputs(), inputs(size=(32, 20))
    assert model(target, images, masks).logits.shape == target.shape


def test_a_memory_gives_the_same_logits() -> None:
    model, (target, images, masks) = tiny(), inputs(size=(20, 20))
    memory = model.encode_support(images, masks)
    assert torch.equal(model(target, memory=memory).logits, model(target, images, masks).logits)
    shared = model.encode_support(images[:1], masks[:1])
    torch.testing.assert_close(model(target, memory=shared).logits[:1], model(target[:1], memory=shared).logits)
    with pytest.raises(ValueError, match="memory must come from a model with configuration"):
        model(target, memory=SupportMemory("other", memory.batch, memory.tensors))


def test_more_than_one_class_is_refused() -> None:
    model, (_, images, masks) = tiny(), inputs()
    with pytest.raises(ValueError, match="support_masks must have one class for this architecture, got C = 2"):
        model.encode_support(images, masks.repeat(1, 1, 2, 1, 1))


def test_configuration_round_trip() -> None:
    config = PatchICLConfig.universeg(channels=(8, 4, 4), image_size=64)
    assert config == DenseConfig((8, 4, 4), 64)
    assert PatchICLConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert PatchICLConfig.from_dict(TINY) == tiny().config
    assert config.fingerprint() != PatchICLConfig.universeg(channels=(8, 4, 4)).fingerprint()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": (4,)}, r"channels must be a tuple of at least two ints, one a scale, got \(4,\)"),
        ({"channels": (4, 0)}, "channels must be an int of at least 1, got 0"),
        ({"image_size": 20}, "image_size must be a multiple of 8, got 20"),
        ({"image_size": 0}, "image_size must be an int of at least 8, got 0"),
        ({"channels": (4,) * 5, "image_size": 24}, "image_size must be a multiple of 16, got 24"),
    ],
)
def test_bad_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchICLConfig.universeg(**fields)


def test_training_and_the_file_that_it_writes(tmp_path: Path) -> None:
    config = TrainingConfig.from_dict(
        {
            "model": TINY,
            "data": {
                "tasks": 2,
                "size": 32,
                "subjects": 4,
                "targets": 2,
                "max_support": 2,
                "validation_tasks": 1,
                "multi_class": 0,
            },
            "schedule": {"steps": 3, "warmup": 1},
            "loss": {"covered_bce": 1.0},
            "run": {"precision": "float32"},
        }
    )
    result = train(config, tmp_path, show_progress=False)
    assert result.finished
    assert result.steps == 3
    assert result.dice is not None
    assert np.isfinite(result.dice)
    assert result.model is not None
    model = PatchICL.from_pretrained(result.model)
    assert model.config == config.model
    assert not torch.equal(model.network.universeg.head.weight, tiny().network.universeg.head.weight)
