"""Accelerated models to work with: copies for several devices, parts replaced, hooks, statistics, draws."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerated import MODELS, assert_close, assert_same, graph_flops, inputs, made, run
from reference_models import multiverseg, neuralizer, universeg
from reference_models.universeg import CrossConv2d
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)
from torch.nn.utils import parametrizations, prune

from icseg_kernels import accelerate
from icseg_kernels.accelerate import Report


@pytest.mark.parametrize("max_memory", [None, 1])
@pytest.mark.parametrize("name", MODELS)
def test_replicas_of_data_parallel(name: str, max_memory: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have weights of their own, here scaled ones, as if they were on another device."""
    replication = importlib.import_module("torch.nn.parallel.replicate")
    scaled = lambda tensors, devices, detach=False: [[t * 1.5 for t in tensors] for _ in devices]  # noqa: E731
    monkeypatch.setattr(replication, "_broadcast_coalesced_reshape", scaled)
    model, other = made(name), made(name)
    given = inputs(model)
    accelerate(model, max_memory=max_memory)
    with torch.no_grad():
        model(**given)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            (found,), (expected,) = replication.replicate(model, [0]), replication.replicate(other, [0])
            for _ in range(2):
                assert_close(found(**given), expected(**given))
            if grad or max_memory is None:  # chunks cost more, and are for calls without gradients
                assert graph_flops(found, given) < graph_flops(expected, given)
    for each in (model, other):
        (replica,) = replication.replicate(each, [0])
        replica(**given).square().sum().backward()
    for (key, parameter), wanted in zip(model.named_parameters(), other.parameters(), strict=True):
        if wanted.grad is None:
            assert parameter.grad is None, key
        else:
            torch.testing.assert_close(parameter.grad, wanted.grad, rtol=1e-9, atol=1e-9, msg=key)


# Parts replaced.


class Squared(nn.Conv2d):
    """A convolution of another kind."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class Inner(nn.Conv2d):
    """Another one."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight.tanh(), bias)


class InnerCross(CrossConv2d):
    """And one of pairs."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight.tanh(), bias)


class Added(nn.Module):
    """A cross convolution and another of few channels, as low-rank adapters are."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.low = CrossConv2d(base.in_channels // 2, base.out_channels, 1)
        self.low.weight = nn.Parameter(torch.rand(base.out_channels, base.in_channels, 1, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.base(x, y) + self.low(x, y)


class Largest(universeg.CrossOp):
    """With the largest in place of the mean."""

    def forward(self, target: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
        _, pairs = super().forward(target, support)
        return pairs.amax(dim=1, keepdim=True), pairs


class Cubic(nn.UpsamplingBilinear2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 3


def set_class(module: nn.Module, kind: type) -> None:
    module.__class__ = kind


def replace_block(model: Any) -> None:
    model.enc_blocks[1] = type(model.enc_blocks[1])((4, 4), 6, "LeakyReLU").double()


def replace_activation(model: Any) -> None:
    model.enc_blocks[0].support.vmapped.nonlin = nn.Tanh()


def add_activation(model: Any) -> None:
    for block in (model.enc_blocks[0], model.dec_blocks[-1]):
        block.cross.nonlinearity, block.cross.nonlin = "Tanh", nn.Tanh()


def add_overridden_activation(model: Any) -> None:
    for block in (model.enc_blocks[0], model.dec_blocks[-1]):
        block.cross.nonlinearity, block.cross.nonlin = "ReLU", nn.ReLU()
        block.cross.nonlin.forward = lambda x: x.abs()


def wrap_cross_convolution(model: Any) -> None:
    for block in (model.enc_blocks[0], model.dec_blocks[-1]):
        block.cross.cross_conv = Added(block.cross.cross_conv).double()


def replace_weights(model: Any) -> None:
    model.enc_blocks[1].cross.cross_conv.weight = nn.Parameter(
        torch.ones_like(model.enc_blocks[1].cross.cross_conv.weight)
    )


EDITS: dict[str, Callable[[Any], object]] = {
    "head": lambda model: setattr(model, "out_conv", nn.Conv2d(4, 1, 3).double()),
    "weights": replace_weights,
    "block": replace_block,
    "activation": replace_activation,
    "activations of pairs": add_activation,
    "activations of pairs with their own forward": add_overridden_activation,
    "inside of the cross convolution": lambda model: set_class(model.enc_blocks[1].cross.cross_conv, InnerCross),
    "adapters": wrap_cross_convolution,
    "upsampling": lambda model: setattr(model, "upsample", Cubic(scale_factor=2)),
    "downsampling": lambda model: setattr(model, "downsample", nn.AvgPool2d(2)),
    "operation": lambda model: set_class(model.enc_blocks[0].cross, Largest),
    "convolution": lambda model: set_class(model.enc_blocks[0].support.vmapped.conv, Squared),
    "inside of the convolution": lambda model: set_class(model.enc_blocks[0].support.vmapped.conv, Inner),
    "sequence": lambda model: model.enc_blocks[0].support.vmapped.append(nn.Tanh()),
    "forward of a part": lambda model: setattr(model.enc_blocks[0].support, "forward", lambda x: x[:, :, :4]),
    "pruning": lambda model: prune.random_unstructured(model.enc_blocks[0].cross.cross_conv, "weight", 0.5),
    "weight norm": lambda model: parametrizations.weight_norm(model.enc_blocks[0].cross.cross_conv),
    "spectral norm": lambda model: parametrizations.spectral_norm(model.enc_blocks[0].support.vmapped.conv),
    "spectral norm of pairs": lambda model: parametrizations.spectral_norm(model.enc_blocks[1].cross.cross_conv),
    "geometry": lambda model: setattr(model.enc_blocks[0].support.vmapped.conv, "padding_mode", "circular"),
    "parts beside": lambda model: model.enc_blocks[0].add_module("attention", nn.Linear(2, 2)),
}


def assert_followed(
    model: nn.Module, edit: Callable[[Any], object], max_memory: int | None
) -> tuple[nn.Module, Report]:
    """An edit of the accelerated model does what it does to the model itself, which is returned, with the report."""
    other = copy.deepcopy(model)
    given = inputs(model)
    report = accelerate(model, max_memory=max_memory)
    for _ in range(2):
        run(model, given)
    for each in (model, other):
        torch.manual_seed(0)
        edit(each)
    assert_same(model, other, given)
    return other, report


@pytest.mark.parametrize("max_memory", [None, 1])
@pytest.mark.parametrize("edit", EDITS)
def test_parts_replaced_afterwards(edit: str, max_memory: int | None) -> None:
    model = universeg.UniverSeg((4, 6, 5)).double()
    other, report = assert_followed(model, EDITS[edit], max_memory)
    report.undo()
    assert_same(model, other, inputs(model))


def replace_residual(model: Any) -> None:
    model.enc_blocks[0].context_conv.module.layers[1] = nn.Tanh()


PAIRWISE_EDITS: dict[str, Callable[[Any], object]] = {
    "activation": replace_residual,
    "mixer": lambda model: setattr(
        model.enc_blocks[0].combine_conv_context, "module", nn.Conv2d(8, 4, 3, padding=1).double()
    ),
    "mixer of another kind": lambda model: set_class(model.enc_blocks[0].combine_conv_target.module, Squared),
    "downsampling": lambda model: setattr(model.downsample_blocks[0], "context_pooling_layer", nn.AvgPool3d((1, 2, 2))),
    "head": lambda model: setattr(model, "output_block", nn.Tanh()),
    "embedding": lambda model: setattr(model.context_embedding, "module", nn.Conv2d(2, 4, 3, padding=1).double()),
    "geometry": lambda model: setattr(model.enc_blocks[0].context_conv.module.layers[0], "padding_mode", "circular"),
    "forward of a part": lambda model: setattr(
        model.enc_blocks[0], "forward", lambda context, target: (context, target + 1)
    ),
}


@pytest.mark.parametrize("max_memory", [None, 1])
@pytest.mark.parametrize("edit", PAIRWISE_EDITS)
def test_parts_of_neuralizer_replaced_afterwards(edit: str, max_memory: int | None) -> None:
    assert_followed(neuralizer.PairwiseConvAvgModel(3, 1, 1, 4, 2).double(), PAIRWISE_EDITS[edit], max_memory)


@pytest.mark.parametrize("edit", ["operation", "parts beside", "forward of a part"])
def test_models_that_look_alike_are_refused(edit: str) -> None:
    model = universeg.UniverSeg((4, 6, 5)).double()
    EDITS[edit](model)
    other = copy.deepcopy(model)
    report = accelerate(model)
    assert not any(change.done for change in report.changes if change.module == "")
    assert_same(model, other, inputs(model))


def test_residual_blocks_in_a_universeg() -> None:
    """Shortcuts are not MultiverSeg's alone."""
    model, donor = universeg.UniverSeg((4, 6, 5)), made("residual multiverseg")
    model.enc_blocks, model.dec_blocks = donor.enc_blocks, donor.dec_blocks
    model.enc_blocks[0] = multiverseg.CrossBlock((1, 2), 4, None, False, True, True, None)
    other = copy.deepcopy(model.double())
    report = accelerate(model)
    assert "UniverSeg" in report.models
    assert any(change.done for change in report.changes)
    assert_same(model, other, inputs(model))


def test_subclasses_with_the_same_forward() -> None:
    class Mine(universeg.UniverSeg):
        """Another name."""

    class Other(universeg.UniverSeg):
        def forward(self, target_image: Tensor, support_images: Tensor, support_labels: Tensor) -> Tensor:
            return super().forward(target_image, support_images, support_labels) + 1

    assert accelerate(Mine((4, 6))).models == ("UniverSeg",)
    model = Other((4, 6)).double()
    other = copy.deepcopy(model)
    assert accelerate(model).models == ()
    assert_same(model, other, inputs(model))


# Modules that keep statistics or draw.


def batch_norm(features: int) -> nn.Module:
    return nn.BatchNorm2d(features)


def own_statistics(features: int) -> nn.Module:
    return nn.BatchNorm2d(features, track_running_stats=False)


def instance_norm(features: int) -> nn.Module:
    return nn.InstanceNorm2d(features, track_running_stats=True)


def dropout(features: int) -> nn.Module:
    return nn.Dropout2d(0.5)


class Noise(nn.Module):
    """Drawn in training only, by a module that nobody knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x) if self.training else x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("max_memory", [None, 1])
@pytest.mark.parametrize("norm", [batch_norm, own_statistics, instance_norm, dropout, lambda features: Noise()])
@pytest.mark.parametrize("linear", [False, True])
def test_modules_that_keep_statistics_or_draw(
    linear: bool, norm: multiverseg.Norm, max_memory: int | None, training: bool
) -> None:
    """See the same, as often, and draw the same, in the same order."""
    torch.manual_seed(0)
    model = multiverseg.MultiverSegNet((4, 6, 5), norm=norm, cross_relu=not linear).double().train(training)
    other = copy.deepcopy(model)
    given = inputs(model)
    accelerate(model, max_memory=max_memory)
    for grad in (True, False, False):
        states = []
        for each in (model, other):
            states.append((run(each, given, grad=grad), torch.get_rng_state()))
        assert_close(states[0][0], states[1][0])
        assert torch.equal(states[0][1], states[1][1])
    for found, expected in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert_close(found, expected)


def test_the_report_says_that_training_keeps_the_support_path() -> None:
    report = accelerate(multiverseg.MultiverSegNet((4, 6), norm=batch_norm), max_memory=1)
    remarks = {change.rewrite: change.reason for change in report.changes if change.module == "" and change.done}
    assert remarks == dict.fromkeys(
        ("drop_dead_support", "max_memory"), "in evaluation mode, for BatchNorm2d on the support path"
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("max_memory", [None, 1])
@pytest.mark.parametrize("extra", [nn.BatchNorm2d(4), nn.Dropout(0.5)])
@pytest.mark.parametrize("name", ["neuralizer", "neuroverse3d"])
def test_contexts_that_keep_statistics_or_draw(
    name: str, extra: nn.Module, max_memory: int | None, training: bool
) -> None:
    model: Any = made(name).train(training)
    first = (model if name == "neuralizer" else model.context_unet).enc_blocks[0]
    first.context_conv.module.layers.append(copy.deepcopy(extra).double().train(training))
    other = copy.deepcopy(model)
    given = inputs(model)
    accelerate(model, max_memory=max_memory)
    assert_same(model, other, given)
    for found, expected in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert_close(found, expected)
    if isinstance(extra, nn.BatchNorm2d):
        for each in (model, other):
            (each if name == "neuralizer" else each.context_unet).enc_blocks[0].context_conv.module.layers[
                -1
            ].running_var += 1
        assert_same(model, other, given)


# Hooks.


@pytest.mark.parametrize("max_memory", [None, 1])
@pytest.mark.parametrize("name", MODELS)
def test_all_hooks_still_fire(name: str, max_memory: int | None) -> None:
    """As often, and with the same shapes, whichever module they wait for."""
    model, other = made(name), made(name)
    given = inputs(model)
    accelerate(model, max_memory=max_memory)
    names = [key for key, _ in model.named_modules() if key]
    for key in names:
        calls: list[list[Any]] = [[], []]
        outputs: list[Any] = []
        for seen, each in zip(calls, (model, other), strict=True):

            def note(_: nn.Module, args: tuple[Any, ...], out: Any, seen: list[Any] = seen) -> None:
                seen.append((getattr(args[0], "shape", None), out if isinstance(out, Tensor) else 0))

            handle = each.get_submodule(key).register_forward_hook(note)
            outputs.append(run(each, given))
            handle.remove()
        assert_close(*outputs)
        assert len(calls[0]) == len(calls[1]), key
        for (shape, out), (wanted, expected) in zip(*calls, strict=True):
            assert shape == wanted, key
            if isinstance(out, Tensor):
                assert_close(out, expected)


@pytest.mark.parametrize("name", ["universeg", "neuralizer", "neuroverse3d"])
def test_hooks_of_all_modules_still_fire(name: str) -> None:
    model, other = made(name), made(name)
    given = inputs(model)
    accelerate(model)
    registrations = (
        register_module_forward_pre_hook,
        register_module_forward_hook,
        register_module_full_backward_hook,
        register_module_full_backward_pre_hook,
    )
    for register in registrations:
        calls: list[list[str]] = [[], []]
        for seen, each in zip(calls, (model, other), strict=True):
            handle = register(lambda module, *_, seen=seen: seen.append(type(module).__name__))
            out = run(each, given, grad=True)
            out.sum().backward()
            handle.remove()
        assert calls[0] == calls[1]
        assert calls[0]
