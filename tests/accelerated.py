"""Structural copies of other people's models, their inputs, and what tests of accelerate compare."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from reference_models import multiverseg, neuralizer, neuroverse3d, tyche, universeg
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

MODELS: dict[str, Callable[[], nn.Module]] = {
    "universeg": lambda: universeg.UniverSeg((4, 6, 5)),
    "universeg with activation": lambda: universeg.UniverSeg((4, 6, 5), "ReLU"),
    "universeg with another activation": lambda: universeg.UniverSeg((4, 5), "Tanh"),
    "universeg of one block": lambda: universeg.UniverSeg((4,)),
    "tyche": lambda: tyche.TysegXC((4, 6, 5)),
    "linear tyche": lambda: tyche.TysegXC((4, 6, 5), cross_relu=False),
    "multiverseg": lambda: multiverseg.MultiverSegNet((4, 6, 5)),
    "normalised multiverseg": lambda: multiverseg.MultiverSegNet((4, 6), cross_norm=True),
    "linear multiverseg": lambda: multiverseg.MultiverSegNet((4, 6, 5), cross_relu=False),
    "neuralizer": lambda: neuralizer.PairwiseConvAvgModel(3, 1, 1, 4, 2),
    "neuralizer in 3D": lambda: neuralizer.PairwiseConvAvgModel(2, 1, 1, 4, 3),
    "neuroverse3d": lambda: neuroverse3d.Neuroverse3D((4, 6, 6), 2),
    "neuroverse3d in 3D": lambda: neuroverse3d.Neuroverse3D((4, 6), 3),
    "universeg of several widths": lambda: universeg.UniverSeg(((3, 6), (7, 2), (4, 5))),
    "residual multiverseg": lambda: multiverseg.MultiverSegNet(
        (4, 6, 5), cross_relu=False, cross_residual=True, conv_residual=True
    ),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double()


def inputs(model: nn.Module, images: int = 3, *, batch: int = 2, size: tuple[int, int] = (8, 12)) -> dict[str, Tensor]:
    """Arguments of a model, float64."""
    torch.manual_seed(images)
    if isinstance(model, neuralizer.PairwiseConvAvgModel | neuroverse3d.Neuroverse3D):
        volume = (*size, 4) if any(isinstance(part, nn.Conv3d) for part in model.modules()) else size
        contexts = torch.rand(2, batch, images, 1, *volume, dtype=torch.float64)
        target = torch.rand(batch, 1, *volume, dtype=torch.float64)
        return {"context_in": contexts[0], "context_out": contexts[1], "target_in": target}
    support = torch.rand(batch, images, 1, *size, dtype=torch.float64)
    masks = (torch.rand(batch, images, 1, *size) > 0.5).double()
    found = {"support_images": support, "support_labels": masks}
    if isinstance(model, tyche.TysegXC):
        targets, noise = torch.rand(2, batch, 2, 1, *size, dtype=torch.float64)
        return found | {"target_image": targets, "noise_image": noise}
    channels = 5 if isinstance(model, multiverseg.MultiverSegNet) else 1
    return found | {"target_image": torch.rand(batch, channels, *size, dtype=torch.float64)}


def gradients(model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Outputs, and the gradients of their squares for parameters and inputs."""
    model.zero_grad()
    given = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
    out = model(**given)
    out.square().sum().backward()
    named = [*model.named_parameters(), *given.items()]
    return out.detach(), {name: None if t.grad is None else t.grad.clone() for name, t in named}


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def graph_flops(model: nn.Module, given: dict[str, Tensor]) -> int:
    """In the present gradient mode."""
    with FlopCounterMode(display=False) as counter:
        model(**given)
    return counter.get_total_flops()


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def run(model: nn.Module, given: dict[str, Tensor], *, grad: bool = False) -> Any:
    """What the model returns, or the class of error that it raises."""
    torch.manual_seed(0)
    random.seed(0)
    try:
        with torch.set_grad_enabled(grad):
            return model(**given)
    except Exception as error:
        return type(error)


def assert_same(model: nn.Module, other: nn.Module, given: dict[str, Tensor]) -> None:
    """Outputs with and without gradients, the last of them perhaps from a cache."""
    for grad in (True, False, False):
        found, expected = run(model, given, grad=grad), run(other, given, grad=grad)
        assert isinstance(expected, Tensor)
        assert_close(found, expected)
