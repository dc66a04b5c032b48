"""accelerate takes the FLOPs that its formulas say, at 1 to 64 support images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerated import flops, inputs
from reference_models import multiverseg, neuralizer, neuroverse3d, tyche, universeg
from reference_models.universeg import CrossConv2d
from torch import nn

from icseg_kernels import accelerate


@pytest.mark.parametrize("images", [1, 3, 8, 16, 64])
def test_flops_of_universeg(images: int) -> None:
    """In convolutions of 64 to 64 channels at full size, with the last layer of one pixel and one channel."""
    model = universeg.UniverSeg((64, 64, 64, 64)).eval()
    target, support, masks = torch.rand(1, 1, 8, 8), torch.rand(1, images, 1, 8, 8), torch.rand(1, images, 1, 8, 8)
    unit, head = 2 * 9 * 64**2 * 64, 1 / 576

    def count() -> float:
        return flops(lambda: model(target, support, masks)) / unit - head

    assert count() == pytest.approx(8.59375 * images + 2.640625)
    report = accelerate(model, cache_support=False)
    assert count() == pytest.approx(2.625 * images + 7.609375)
    report.undo()
    accelerate(model)
    count()
    assert count() == pytest.approx(1.59375 * images + 8.609375)


def crossed_flops(model: nn.Module, images: int, targets: int, stage: str) -> float:
    """Of two scales of 8 channels, in convolutions of 8 to 8 channels at full size."""
    candidates, pairs = isinstance(model, tyche.TysegXC), isinstance(model.enc_blocks[0].cross.cross_conv, CrossConv2d)
    linear = model.enc_blocks[0].cross.nonlinearity is None
    channels = {universeg.UniverSeg: (1, 2), tyche.TysegXC: (2, 2), multiverseg.MultiverSegNet: (5, 2)}[type(model)]
    total = targets / 72  # the last layer, of one pixel and one channel
    for place, (size, x, y) in enumerate(((1, channels[0] / 8, channels[1] / 8), (0.25, 1, 1), (1, 2, 2))):
        first, last = place == 0, place == 2
        mixed = images * (x + y) if stage == "before" and pairs else x + images * y
        supports: float = images
        if stage != "before" and last:
            mixed, supports = (x + y if linear else mixed), 0
        if stage == "again" and linear and first:
            mixed, supports = x, 1  # what a pair adds to what is kept
        joined = targets * (x + 1) if stage == "before" else targets * x + 1
        total += size * (mixed + supports + targets + (joined if candidates else 0))
    return total


@pytest.mark.parametrize("images", [1, 3, 8, 16, 64])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("name", ["universeg", "tyche", "multiverseg"])
def test_flops_of_cross_networks(name: str, linear: bool, images: int) -> None:
    models: dict[str, Callable[[], nn.Module]] = {
        "universeg": lambda: universeg.UniverSeg((8, 8), None if linear else "ReLU"),
        "tyche": lambda: tyche.TysegXC((8, 8), cross_relu=not linear),
        "multiverseg": lambda: multiverseg.MultiverSegNet((8, 8), cross_relu=not linear),
    }
    model = models[name]().eval()
    given = {key: tensor.float() for key, tensor in inputs(model, images, batch=1, size=(8, 8)).items()}
    targets, unit = 2 if name == "tyche" else 1, 2 * 9 * 8**2 * 64
    expected = {stage: crossed_flops(model, images, targets, stage) for stage in ("before", "after", "again")}
    assert flops(lambda: model(**given)) / unit == pytest.approx(expected["before"])
    report = accelerate(model, cache_support=False)
    assert flops(lambda: model(**given)) / unit == pytest.approx(expected["after"])
    report.undo()
    accelerate(model)
    flops(lambda: model(**given))
    assert flops(lambda: model(**given)) / unit == pytest.approx(expected["again"])


@pytest.mark.parametrize("images", [1, 3, 8, 16, 64])
@pytest.mark.parametrize("name", ["neuralizer", "neuroverse3d"])
def test_flops_of_pairwise_networks(name: str, images: int) -> None:
    """Two scales of 4 channels, in convolutions of 1 x 1 at full size; a residual unit takes 18 of them."""
    whole = name == "neuralizer"
    model = neuralizer.PairwiseConvAvgModel(2, 1, 1, 4, 2) if whole else neuroverse3d.Neuroverse3D((4, 4), 2)
    model.eval()
    given: dict[str, Any] = {k: t.float() for k, t in inputs(model, images, batch=1, size=(8, 8)).items()}
    given |= {} if whole else {"l": images}
    unit, first = 2 * 4**2 * 64, 18 + 2 / 4
    common = first * images + (18 + 1 / 4) + 0.25 * 18 * images + (2 + 18) * images + (2 + 18) + (18 + 1 / 4)
    if whole:
        before, after = common + 0.25 * 18 + 2.25 * 4 * images, common + 0.25 * 18 + 1.25 * (images + 3) + 2
    else:
        decoder = 0.25 * (18 + 2) + 2
        before, after = common + decoder + 2 * images, common + decoder + images + 1
    assert flops(lambda: model(**given)) / unit == pytest.approx(before)
    report = accelerate(model, cache_support=False)
    assert flops(lambda: model(**given)) / unit == pytest.approx(after)
    report.undo()
    accelerate(model)
    assert flops(lambda: model(**given)) / unit == pytest.approx(after)
    assert flops(lambda: model(**given)) / unit == pytest.approx(after - first * images)
