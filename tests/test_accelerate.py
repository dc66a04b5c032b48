"""accelerate: other people's models give the same outputs and gradients for less work, and come back as they were."""

from __future__ import annotations

import bisect
import copy
import importlib
import io
import json
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_models import multiverseg, neuralizer, neuroverse3d, tyche, universeg
from reference_models.universeg import CrossConv2d
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import icseg_kernels.nn
from icseg_kernels import accelerate
from icseg_kernels.accelerate.measure import LiveTensors

rewrite = sys.modules["icseg_kernels.accelerate.rewrite"]  # `icseg_kernels.accelerate` is the function

SWITCHES = ("split", "commute_mean", "drop_dead_support", "cache_support")
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


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_the_same(name: str, images: int) -> None:
    model = made(name)
    given = inputs(model, images)
    expected, wanted = gradients(model, given)
    report = accelerate(model)
    assert report.models
    found, got = gradients(model, given)
    assert_close(found, expected)
    for key, gradient in wanted.items():
        if gradient is None:
            assert got[key] is None or not got[key].any()
        else:
            torch.testing.assert_close(got[key], gradient, rtol=1e-9, atol=1e-10, msg=key)
    for _ in range(2):  # the second time from the cache, where there is one
        with torch.no_grad():
            assert_close(model(**given), expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_switch_alone(name: str) -> None:
    model = made(name)
    given = inputs(model)
    expected = model(**given).detach()
    for off in ("", *SWITCHES):
        report = accelerate(model, **{switch: switch != off for switch in SWITCHES})
        assert off not in {change.rewrite for change in report.changes if change.done}
        with torch.no_grad():
            assert_close(model(**given), expected)
        assert_close(model(**given), expected)
        report.undo()


@pytest.mark.parametrize("name", MODELS)
def test_second_derivatives(name: str) -> None:
    model = made(name)
    given = inputs(model, 2, batch=1, size=(4, 4))

    def penalty() -> Tensor:
        key = "target_in" if "target_in" in given else "target_image"
        target = given[key].clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(**given | {key: target}).sum(), target, create_graph=True)
        (grad,) = torch.autograd.grad(slope.square().sum(), next(model.parameters()), allow_unused=True)
        return torch.zeros(()) if grad is None else grad

    expected = penalty()
    accelerate(model)
    torch.testing.assert_close(penalty(), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_state_and_undo(name: str) -> None:
    model, other = made(name), made(name)
    given = inputs(model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**given)
    report = accelerate(model)
    assert model.training
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    other.load_state_dict(model.state_dict())
    model.load_state_dict(state)
    report.undo()
    report.undo()
    assert report.undone
    assert not any("forward" in module.__dict__ for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**given), expected)


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


def parameters(*modules: str) -> set[str]:
    return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


def test_copies_have_the_published_names() -> None:
    """The state_dict keys of the packages' own models."""
    blocks = ("enc_blocks.0", "enc_blocks.1", "dec_blocks.0")
    crossed = [f"{b}.{p}" for b in blocks for p in ("cross.cross_conv", "target.vmapped.conv", "support.vmapped.conv")]
    assert set(universeg.UniverSeg((2, 3)).state_dict()) == parameters(*crossed, "out_conv.conv")
    joined = [f"{block}.meanconv.vmapped.conv" for block in blocks]
    assert set(tyche.TysegXC((2, 3)).state_dict()) == parameters(*crossed, *joined, "out_conv.conv")
    norms = [f"{block}.{side}.vmapped.norml" for block in blocks for side in ("target", "support")]
    assert set(multiverseg.MultiverSegNet((2, 3)).state_dict()) == parameters(*crossed, *norms, "out_conv.conv")
    shortcuts = {f"{b}.{side}_cross_shortcut.vmapped.weight" for b in blocks for side in ("target", "support")}
    residual = multiverseg.MultiverSegNet((3, 4), cross_norm=True, cross_residual=True, conv_residual=True)
    crossed_norms = [f"{block}.cross.norml" for block in blocks]
    named = parameters(*crossed, *crossed_norms, *norms, "out_conv.conv")
    assert set(residual.state_dict()) == named | shortcuts

    def units(*names: str) -> list[str]:
        return [f"{name}.layers.{i}" for name in names for i in (0, 2)]

    sides = units(*(f"{b}.{side}" for b in blocks for side in ("context_conv.module", "target_conv")))
    mixers = [f"{block}.combine_conv_{side}.module" for block in blocks for side in ("target", "context")]
    ends = ["target_embedding", "context_embedding.module", *units("output_block.block.0"), "output_block.block.1"]
    ups = ["upsample_blocks.0.context_conv_layer.module", "upsample_blocks.0.target_conv_layer"]
    pairwise = neuralizer.PairwiseConvAvgModel(2, 1, 1, 4, 2)
    assert set(pairwise.state_dict()) == parameters(*sides, *mixers, *ends, *ups)

    unet, encoder, decoder = "context_unet", "target_encoder", "target_decoder"
    named = parameters(
        f"{unet}.context_embedding.module",
        *units(*(f"{unet}.{block}.context_conv.module" for block in blocks)),
        f"{unet}.enc_blocks.0.combine_conv_context.module",
        f"{unet}.downsample_blocks.0.context_linear_layer.module",
        f"{unet}.upsample_blocks.0.context_conv_layer.module",
        f"{encoder}.target_embedding",
        *units(f"{encoder}.enc_blocks.0.target_conv"),
        f"{encoder}.downsample_blocks.0.target_linear_layer",
        *units(*(f"{decoder}.{block}.target_conv" for block in ("enc_blocks.0", "dec_blocks.0"))),
        *(f"{decoder}.{block}.combine_conv_target.module" for block in ("enc_blocks.0", "dec_blocks.0")),
        f"{decoder}.upsample_blocks.0.target_conv_layer",
        *units(f"{decoder}.output_block.block.0"),
        f"{decoder}.output_block.block.1",
    )
    assert set(neuroverse3d.Neuroverse3D((2, 3), 3).state_dict()) == named


def test_what_is_not_exact_is_not_done() -> None:
    for model, activation in (
        (tyche.TysegXC((4, 4)), "LeakyReLU"),
        (universeg.UniverSeg((4, 4), "ReLU"), "ReLU"),
        (multiverseg.MultiverSegNet((4, 4), cross_relu=False, cross_norm=True), "GroupNorm"),
    ):
        changes = {change.rewrite: change for change in accelerate(model).changes if change.module == ""}
        assert not changes["commute_mean"].done
        assert changes["commute_mean"].reason == f"{activation} of every pair comes before the mean"
        assert not changes["cache_support"].done
        assert changes["cache_support"].reason.startswith(f"{activation} of every pair mixes")
        assert changes["drop_dead_support"].done


def test_report() -> None:
    model = made("universeg")
    given = inputs(model)
    report = accelerate(model.train(), given)
    assert model.training
    assert all(block.training for block in model.modules())
    assert report.models == ("UniverSeg",)
    comparison = report.comparison
    assert comparison is not None
    assert comparison.equal
    assert comparison.max_difference < 1e-12
    assert comparison.again.flops < comparison.after.flops < comparison.before.flops
    assert comparison.after.peak_memory < comparison.before.peak_memory
    assert min(cost.latency for cost in (comparison.before, comparison.after, comparison.again)) > 0
    text = str(report)
    for word in ("UniverSeg", "GFLOPs", "peak MB", "latency ms", "split cross-convolution in 5 modules", "no limit"):
        assert word in text
    assert json.loads(json.dumps(report.as_dict()))["comparison"]["before"]["flops"] == comparison.before.flops
    report.undo()
    assert str(report).endswith("undone")


@pytest.mark.parametrize("form", [tuple, list, dict])
def test_example_inputs(form: Any) -> None:
    model = made("universeg")
    given = inputs(model)
    ordered = {name: given[name] for name in ("target_image", "support_images", "support_labels")}
    report = accelerate(model, ordered if form is dict else form(ordered.values()))
    assert report.comparison is not None
    assert report.comparison.equal


def test_a_difference_undoes_the_rewrite() -> None:
    """A model of known names that computes something else."""

    class UniverSeg(universeg.UniverSeg):
        def forward(self, target_image: Tensor, support_images: Tensor, support_labels: Tensor) -> Tensor:
            return super().forward(target_image, support_images, support_labels) + 1

    model = UniverSeg((4, 4)).double()
    given = inputs(model)
    expected = model(**given)
    report = accelerate(model, given)
    assert report.undone
    assert report.comparison is not None
    assert report.comparison.max_difference == pytest.approx(1)
    assert "above the tolerance" in str(report)
    assert torch.equal(model(**given), expected)
    assert not accelerate(model, given, tolerance=10).undone


def test_an_error_undoes_the_rewrite() -> None:
    model = made("universeg")
    given = inputs(model) | {"support_labels": torch.rand(2, 3, 1, 4, 4)}
    with pytest.raises(RuntimeError):
        accelerate(model, given)
    assert not any("forward" in module.__dict__ for module in model.modules())


# The cache of the first support block.


def test_the_cache_follows_values() -> None:
    """Not identities: edits in place, also behind torch's back, and copies."""
    model, slow = made("universeg").eval(), made("universeg").eval()
    accelerate(model)
    given = inputs(model)
    numbers = given["support_images"].numpy()

    def check(less: bool) -> None:
        nonlocal given
        with torch.no_grad():
            assert_close(model(**given), slow(**given))
        copied = given | {"support_images": given["support_images"].clone()}
        assert (flops(lambda: model(**copied)) < first) is less

    with torch.no_grad():
        first = flops(lambda: model(**given))
        check(True)
        numbers[0, 0, 0, 0, 0] += 1
        check(True)
        for parameter in (model.enc_blocks[0].cross.cross_conv.weight, model.enc_blocks[0].support.vmapped.conv.bias):
            parameter.data.add_(1)
            slow.load_state_dict(model.state_dict())
            check(True)
        given = inputs(model, 4)
        check(True)
        given["target_image"] = given["target_image"] + 1
        check(True)
        given = inputs(model, 3)
        given["support_labels"] = given["support_labels"] * torch.nan
        assert model(**given).isnan().all()


def test_the_cache_is_for_calls_without_gradients() -> None:
    model = made("universeg")
    report = accelerate(model)
    given = inputs(model)
    model(**given)
    plan = report._replaced[0]
    assert not plan._memory
    with torch.inference_mode():
        model(**given)
    assert plan._memory
    expected = made("universeg")(**given)
    found = model(**given)
    assert found.requires_grad
    assert_close(found, expected)
    report.forget()
    assert not plan._memory


def test_the_cache_knows_autocast() -> None:
    model = made("universeg").float().eval()
    accelerate(model)
    given = {name: tensor.float() for name, tensor in inputs(model).items()}
    with torch.no_grad():
        exact = model(**given)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(**given)
            again = model(**given)
        assert torch.equal(model(**given), exact)
    assert rough.dtype == again.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


# Support sets in chunks.


@pytest.mark.parametrize("name", [name for name in MODELS if "neuroverse" not in name])
def test_chunks_give_the_same(name: str) -> None:
    model = made(name)
    given = inputs(model, 5)
    with torch.no_grad():
        expected = model(**given)
        one = 8 * 6 * 2 * 8 * 12 * 8  # bytes of one image
        for limit in (1, 2 * one, 100 * one):
            report = accelerate(model, max_memory=limit)
            assert [c.done for c in report.changes if c.rewrite == "max_memory"] == [True]
            assert_close(model(**given), expected)
            report.undo()


@pytest.mark.parametrize("name", ["universeg", "tyche", "multiverseg", "neuralizer"])
def test_chunks_bound_memory(name: str) -> None:
    """Beside inputs and target features, which do not grow with the support set."""
    width, size = 8, (32, 32)
    kinds: dict[str, Callable[[], nn.Module]] = {
        "universeg": lambda: universeg.UniverSeg((width,) * 4),
        "tyche": lambda: tyche.TysegXC((width,) * 4),
        "multiverseg": lambda: multiverseg.MultiverSegNet((width,) * 4),
        "neuralizer": lambda: neuralizer.PairwiseConvAvgModel(4, 1, 1, width, 2),
    }
    model = kinds[name]().double().eval()

    def peak(images: int) -> int:
        given = inputs(model, images, batch=1, size=size)
        support_set = images * 2 * 32 * 32 * 8
        with torch.no_grad(), LiveTensors() as live:
            model(**given)
        return live.peak - support_set

    report = accelerate(model, cache_support=False)
    one, many = peak(1), peak(24)
    report.undo()
    limit = 3 * 8 * width * 32 * 32 * 8  # three images
    accelerate(model, max_memory=limit)
    assert abs(peak(24) - peak(12)) < 4096
    assert peak(24) < min(one + limit, many)


# Any model with cross convolutions, wrapped models, hooks, copies.


class Own(nn.Module):
    """A model of its own with a cross convolution."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.cross = universeg.CrossConv2d((4, 6), 8, 3, **kwargs)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.cross(x, y)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"padding": 1, "bias": False},
        {"padding": "same", "dilation": 2},
        {"stride": 2, "padding": 1},
        {"padding": 1, "padding_mode": "reflect"},
    ],
)
def test_any_cross_convolution(kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Own(**kwargs).double()
    x, y = torch.rand(2, 3, 4, 9, 8, dtype=torch.float64), torch.rand(2, 5, 6, 9, 8, dtype=torch.float64)
    expected, before = model(x, y), flops(lambda: model(x, y))
    report = accelerate(model, (x, y))
    assert [(c.module, c.rewrite, c.done) for c in report.changes] == [("cross", "split", True)]
    assert_close(model(x, y), expected)
    assert flops(lambda: model(x, y)) / before == pytest.approx((3 * 4 + 5 * 6) / (15 * 10))


def test_groups_are_left_alone() -> None:
    report = accelerate(Own(groups=2))
    assert [(c.done, c.reason) for c in report.changes] == [
        (False, "2 groups of channels, which targets and supports share")
    ]
    assert not report._replaced


def test_blocks_on_their_own() -> None:
    """Somebody else's network of UniverSeg's blocks."""
    torch.manual_seed(0)
    blocks = nn.ModuleList([universeg.CrossBlock((1, 2), 4), universeg.CrossBlock((4, 4), 5)]).double()

    def run() -> tuple[Tensor, Tensor]:
        target, support = torch.ones(2, 1, 1, 6, 6).double(), torch.ones(2, 3, 2, 6, 6).double()
        for block in blocks:
            target, support = block(target, support)
        return target, support

    expected = run()
    accelerate(blocks)
    for a, b in zip(run(), expected, strict=True):
        assert_close(a, b)


def test_inside_another_module() -> None:
    model = nn.ModuleDict({"net": made("universeg"), "other": nn.Linear(2, 2)})
    given = inputs(model["net"])
    expected = model["net"](**given)
    report = accelerate(model)
    assert {c.module for c in report.changes if c.rewrite == "cache_support"} == {"net"}
    assert_close(model["net"](**given), expected)


def test_unknown_models_are_left_alone() -> None:
    class UniverSeg(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    for model in (nn.Linear(2, 2), UniverSeg()):
        report = accelerate(model, torch.rand(3, 2))
        assert not any(change.done for change in report.changes)
        assert not report._replaced
        assert "forward" not in model.__dict__
    assert "forward takes other arguments than target_image" in str(accelerate(UniverSeg()))
    assert "no module of a known class" in str(accelerate(nn.Linear(2, 2)))


def test_twice() -> None:
    model = made("universeg")
    given = inputs(model)
    expected = model(**given)
    first, second = accelerate(model), accelerate(model)
    assert not second._replaced
    assert "replaced already" in str(second)
    assert_close(model(**given), expected)
    second.undo()
    first.undo()
    first = accelerate(model)
    model.forward = lambda **_: torch.zeros(())  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="forward of UniverSeg must be that of accelerate"):
        first.undo()


def test_copies_and_pickles() -> None:
    model = made("universeg").eval()
    given = inputs(model)
    report = accelerate(model)
    with torch.no_grad():
        expected = model(**given)
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        report.undo()
        model.enc_blocks[0].target.vmapped.conv.bias.add_(100)
        for other in (copied, loaded):
            assert other.forward.__self__.module is other
            assert_close(other(**given), expected)


@pytest.mark.parametrize("name", ["universeg", "neuralizer"])
def test_tensors_without_values(name: str) -> None:
    model = made(name)
    given = {key: tensor.to("meta") for key, tensor in inputs(model).items()}
    accelerate(model.to("meta"), max_memory=1)
    with torch.no_grad():
        assert model(**given).shape == (2, 1, 8, 12)


def test_functional_call() -> None:
    model, other = made("universeg"), made("universeg")
    given = inputs(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    accelerate(model)
    state = dict(other.named_parameters())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            model(**given)
            assert_close(torch.func.functional_call(model, state, kwargs=given), other(**given))


def test_multiverseg_without_support() -> None:
    model = made("multiverseg")
    target = inputs(model)["target_image"]
    expected = model(target)
    accelerate(model)
    assert_close(model(target), expected)
    assert_close(model(target[:, None]), expected)


@pytest.mark.parametrize(("dim", "commute_mean"), [(2, True), (2, False), (3, True), (3, False)])
def test_neuralizer(dim: int, commute_mean: bool) -> None:
    torch.manual_seed(0)
    model = neuralizer.PairwiseConvAvgModelBlock(4, dim).double()
    size, images = (5, 6, 4)[:dim], 3
    given = {"context": torch.rand(2, images, 4, *size).double(), "target": torch.rand(2, 4, *size).double()}
    expected = model(**given)
    sum(t.square().sum() for t in expected).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    before = flops(lambda: model(**given))
    report = accelerate(model, given, commute_mean=commute_mean)
    assert report.models == ("Neuralizer",)
    model.zero_grad()
    found = model(**given)
    sum(t.square().sum() for t in found).backward()
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-9, atol=1e-10, msg=name)
    pixel = 2 * 2 * 4 * 4 * torch.Size(size).numel()  # FLOPs of a 1 x 1 convolution of a batch
    saved = 4 * images - (2 + images + (1 if commute_mean else images))
    assert before - flops(lambda: model(**given)) == saved * pixel


def test_neuroverse3d() -> None:
    torch.manual_seed(0)
    model = neuroverse3d.ConvBlock_context_t2c(4, 3).double()
    context, target = torch.rand(2, 3, 4, 4, 5, 6).double(), torch.rand(2, 4, 4, 5, 6).double()
    expected, before = model(context, target), flops(lambda: model(context, target))
    report = accelerate(model, (context, target))
    assert report.models == ("Neuroverse3D",)
    assert_close(model(context, target), expected)
    assert before - flops(lambda: model(context, target)) == 2 * 16 * 2 * 120 * (2 * 3 - (3 + 1))
    report.undo()
    assert torch.equal(model(context, target), expected)


def test_bad_arguments() -> None:
    model = made("universeg")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        accelerate(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="split must be a bool, got int"):
        accelerate(model, split=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_memory must be an integer of at least 1 or None, got 0"):
        accelerate(model, max_memory=0)
    with pytest.raises(ValueError, match="tolerance must be at least 0 or None, got -1"):
        accelerate(model, tolerance=-1)
    assert not any("forward" in module.__dict__ for module in model.modules())


# What else happens to models: copies for several devices, parts replaced, hooks, modules that keep statistics or draw.


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


@pytest.mark.parametrize("max_memory", [None, 1])
@pytest.mark.parametrize("edit", EDITS)
def test_parts_replaced_afterwards(edit: str, max_memory: int | None) -> None:
    model = universeg.UniverSeg((4, 6, 5)).double()
    other = copy.deepcopy(model)
    given = inputs(model)
    report = accelerate(model, max_memory=max_memory)
    for _ in range(2):
        run(model, given)
    for each in (model, other):
        torch.manual_seed(0)
        EDITS[edit](each)
    assert_same(model, other, given)
    report.undo()
    assert_same(model, other, given)


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
    model = neuralizer.PairwiseConvAvgModel(3, 1, 1, 4, 2).double()
    other = copy.deepcopy(model)
    given = inputs(model)
    accelerate(model, max_memory=max_memory)
    for _ in range(2):
        run(model, given)
    for each in (model, other):
        torch.manual_seed(0)
        PAIRWISE_EDITS[edit](each)
    assert_same(model, other, given)


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


# Dtypes, and calls that a model refuses.


@pytest.mark.parametrize("name", ["universeg", "tyche", "multiverseg", "neuralizer", "neuroverse3d"])
def test_dtypes_are_promoted_or_refused_as_before(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model, other = made(name).to(dtype), made(name).to(dtype)
        accelerate(model)
        given = {key: tensor.to(dtype) for key, tensor in inputs(model).items()}
        for key in given:
            for another in (torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool):
                mixed = given | {key: given[key].to(another)}
                for grad in (True, False):
                    found, expected = run(model, mixed, grad=grad), run(other, mixed, grad=grad)
                    assert isinstance(found, Tensor) == isinstance(expected, Tensor), (dtype, key, another)
                    if isinstance(expected, Tensor):
                        assert found.dtype == expected.dtype
                        tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-4, torch.float64: 1e-10}[found.dtype]
                        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_images_of_a_batch_are_not_repeated() -> None:
    """What the model refuses is refused, also where a cached block would not mind."""
    model = made("universeg")
    given = inputs(model)
    accelerate(model)
    for key, size in (("target_image", 1), ("support_images", 1), ("support_labels", 1)):
        with pytest.raises((ValueError, RuntimeError)), torch.no_grad():
            model(**given | {key: given[key][:size]})


def test_contexts_of_a_batch_are_not_repeated() -> None:
    model = made("neuralizer")
    given = inputs(model)
    few = given | {key: given[key][:1] for key in ("context_in", "context_out")}
    other = copy.deepcopy(model)
    accelerate(model)
    assert run(model, few) is run(other, few) is RuntimeError


@pytest.mark.parametrize("name", ["universeg", "neuralizer"])
def test_empty_batches(name: str) -> None:
    model = made(name).eval()
    given = inputs(model, batch=0)
    accelerate(model, max_memory=1)
    with torch.no_grad():
        assert model(**given).shape == (0, 1, 8, 12)


def test_what_is_split_already_is_left_alone() -> None:
    report = accelerate(nn.Sequential(icseg_kernels.nn.CrossConv2d(1, 1, 1)))
    assert [(change.done, change.reason) for change in report.changes] == [(False, "the model splits it already")]


def test_channels_of_a_multiverseg_must_fit() -> None:
    model, other = made("multiverseg"), made("multiverseg")
    given = inputs(model)
    given |= {
        "target_image": given["target_image"][:, :4],
        "support_images": given["support_images"].repeat(1, 1, 2, 1, 1),
    }
    accelerate(model)
    assert run(model, given) is run(other, given) is RuntimeError


# Graphs.


@pytest.mark.parametrize("name", [name for name in MODELS if "neuroverse" not in name])  # whose own forward shuffles
def test_every_model_compiles(name: str) -> None:
    torch.compiler.reset()
    model = made(name)
    given = inputs(model)
    expected = model(**given)
    accelerate(model, max_memory=1)
    with torch.no_grad():
        model(**given)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert_close(compiled(**given), expected)


@pytest.mark.parametrize("name", ["universeg", "tyche", "multiverseg", "neuralizer"])
def test_graphs_hold_nothing_of_the_cache(name: str) -> None:
    """Traced with a cache that is full, and run for another support set."""
    model = made(name).eval()
    given, others = inputs(model), {key: tensor.flip(-1) for key, tensor in inputs(model).items()}
    with torch.no_grad():
        expected = model(**others)
        accelerate(model)
        for _ in range(2):
            model(**given)
        keys = list(given)
        call = lambda *tensors: model(**dict(zip(keys, tensors, strict=True)))  # noqa: E731
        traced = make_fx(call)(*given.values())
        assert_close(traced(*others.values()), expected)
        traced = make_fx(call)(*given.values())  # once more, with what the first has left
        assert_close(traced(*others.values()), expected)
        for strict in (False, True):
            program = torch.export.export(model, (), given, strict=strict)
            assert_close(program.module()(**others), expected)


@pytest.mark.parametrize("name", ["universeg", "neuralizer", "neuroverse3d"])
def test_what_inference_mode_kept_can_be_trained_on(name: str) -> None:
    """With the first layers frozen, later ones save what was kept for their gradients."""
    model, other = made(name), made(name)
    given = inputs(model)
    accelerate(model)
    with torch.inference_mode():
        model(**given)
        expected = other(**given)
    for each in (model, other):
        unet = getattr(each, "context_unet", each)
        for part in (
            (unet.enc_blocks[0].cross, unet.enc_blocks[0].support)
            if name == "universeg"
            else (
                unet.context_embedding,
                unet.enc_blocks[0].context_conv,
            )
        ):
            part.requires_grad_(False)
        each(**given).square().sum().backward()
    for found, wanted in zip(model.parameters(), other.parameters(), strict=True):
        assert (found.grad is None) == (wanted.grad is None)
        if wanted.grad is not None:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-10)
    with torch.no_grad():
        assert_close(model(**given), expected)


def test_the_cache_tells_streams_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = iter("aab")
    monkeypatch.setattr(rewrite, "_surroundings", lambda device: (next(streams),))
    memory, calls = rewrite.Memory(), []
    for _ in range(3):
        memory.recall([torch.ones(2)], lambda: (calls.append(0) or torch.zeros(1),))
    assert len(calls) == 2
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "a stream")
    assert rewrite._surroundings(torch.device("cuda")) == (None, "a stream")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cache_knows_streams() -> None:
    model, other = made("universeg").cuda(), made("universeg").cuda()
    given = {key: tensor.cuda() for key, tensor in inputs(model).items()}
    report = accelerate(model)
    with torch.no_grad():
        expected = other(**given)
        model(**given)
        kept = report._replaced[0]._memory._kept
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = model(**given)
        stream.synchronize()
        assert_close(found, expected)
        assert report._replaced[0]._memory._kept is not kept


# Neuroverse3D, which streams contexts itself.


@pytest.mark.parametrize("images", [2, 3, 5])
def test_mini_contexts(images: int) -> None:
    """In the order that the model shuffles them into; kept only where there is one."""
    model, other = made("neuroverse3d"), made("neuroverse3d")
    given = inputs(model, images)
    report = accelerate(model)
    random.seed(1)
    out, wanted = gradients(other, given)
    random.seed(1)
    found, got = gradients(model, given)
    assert_close(found, out)
    for key, gradient in wanted.items():
        if gradient is not None:
            torch.testing.assert_close(got[key], gradient, rtol=1e-9, atol=1e-10, msg=key)
    first = flops(lambda: model(**given))
    assert (flops(lambda: model(**given)) < first) is (images <= 3)
    (network,) = (rewritten for rewritten in report._replaced if rewritten.module is model)
    assert bool(network._memory) is (images <= 3)
    for _ in range(2):
        state = random.getstate()
        with torch.no_grad():
            assert_close(model(**given), out)
        assert images > 3 or random.getstate() == state


# Comparisons that draw, and that fail.


def test_comparisons_draw_the_same() -> None:
    class Drawing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + random.random() + torch.rand(())

    states = torch.get_rng_state(), random.getstate()
    comparison = accelerate(Drawing(), torch.zeros(3)).comparison
    assert comparison is not None
    assert comparison.max_difference == 0
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("at", [1, 6, 11, "compare", "install"])
def test_an_error_leaves_the_model_as_it_was(
    error: type[BaseException], at: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raised in a call before or after the rewrite, or of the same support set again, or where outputs are compared."""
    model = made("universeg").train()
    model.dec_blocks[0].eval()
    given, calls = inputs(model), 0
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate()

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if at in (calls, "compare", "install"):
            raise error("on purpose")

    if at == "compare":
        monkeypatch.setattr(sys.modules["icseg_kernels.accelerate.measure"], "compare", fail)
        with pytest.raises(error, match="on purpose"):
            accelerate(model, given)
    elif at == "install":  # of the second module
        monkeypatch.setattr(sys.modules["icseg_kernels.accelerate.convolutions"].CrossConvolution, "install", fail)
        with pytest.raises(error, match="on purpose"):
            accelerate(model)
    else:
        handle = model.register_forward_pre_hook(fail)
        with pytest.raises(error, match="on purpose"):
            accelerate(model, given)
        handle.remove()
    assert not any({"forward", "_replicate_for_data_parallel"} & set(m.__dict__) for m in model.modules())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


# The bound of max_memory.


def unscaled(widths: tuple[int, ...]) -> nn.Module:
    model = universeg.UniverSeg(widths)
    model.downsample, model.upsample = nn.Identity(), nn.Identity()
    return model


BOUNDED: dict[str, Callable[[], nn.Module]] = {
    "universeg": lambda: universeg.UniverSeg((8,) * 4),
    "universeg, wide convolutions": lambda: universeg.UniverSeg(((2, 16), (2, 12), (2, 16))),
    "universeg, wide pairs": lambda: universeg.UniverSeg(((16, 2), (16, 2), (16, 2))),
    "universeg, wide below": lambda: universeg.UniverSeg((2, 8, 48)),
    "universeg, narrow below": lambda: universeg.UniverSeg((16, 8, 4)),
    "universeg, as many numbers below": lambda: universeg.UniverSeg((1, 4, 16, 64)),
    "universeg of one scale": lambda: unscaled((2, 2, 64)),
    "universeg with Tanh": lambda: universeg.UniverSeg((8, 8, 8), "Tanh"),
    "tyche": lambda: tyche.TysegXC((8, 16, 8)),
    "multiverseg": lambda: multiverseg.MultiverSegNet((8, 16, 8)),
    "residual multiverseg": lambda: multiverseg.MultiverSegNet(
        (8, (4, 16), 8), cross_norm=True, cross_residual=True, conv_residual=True
    ),
    "neuralizer": lambda: neuralizer.PairwiseConvAvgModel(3, 1, 1, 8, 2),
    "neuralizer in 3D": lambda: neuralizer.PairwiseConvAvgModel(3, 1, 1, 8, 3),
    "neuralizer of many channels": lambda: neuralizer.PairwiseConvAvgModel(2, 6, 6, 4, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache_support", [True, False])
@pytest.mark.parametrize("name", BOUNDED)
def test_the_promised_bound_holds(name: str, cache_support: bool, dtype: torch.dtype) -> None:
    """Beside the inputs, and what a target takes, which is at most what it takes with a single image."""
    torch.manual_seed(0)
    model = BOUNDED[name]().eval().to(dtype)
    size = (16, 16)

    def given(images: int) -> dict[str, Tensor]:
        found = {key: tensor.to(dtype) for key, tensor in inputs(model, images, batch=1, size=size).items()}
        if "channels" in name:
            found = {key: tensor.repeat_interleave(6, dim=-3) for key, tensor in found.items()}
        return found

    def peak(images: int) -> int:
        tensors = given(images)
        support = sum(tensor.nbytes for key, tensor in tensors.items() if "target" not in key and "noise" not in key)
        with torch.no_grad(), LiveTensors() as live:
            for _ in range(2):
                model(**tensors)
        return live.peak - support  # of which a copy is made

    one = peak(1)
    least = least_limit(model, given(1))
    for images in (2, 13):
        for limit in (least, 5 * least):
            report = accelerate(model, max_memory=limit, cache_support=cache_support)
            assert peak(images) <= one + limit, (images, limit // least)
            report.undo()


@pytest.mark.parametrize("name", ["universeg", "neuralizer"])
def test_what_is_kept_counts(name: str) -> None:
    """A support set that fits, but not beside what would be kept of it; one that goes through in chunks."""
    model = made(name).eval()
    report = accelerate(model, max_memory=3 * least_limit(model, inputs(model)))
    (network,) = (rewritten for rewritten in report._replaced if rewritten.module is model)
    with torch.no_grad():
        for images, kept in ((1, True), (7, False), (2, True), (3, False)):
            model(**inputs(model, images))
            assert bool(network._memory) is kept, images


def least_limit(model: nn.Module, given: dict[str, Tensor]) -> int:
    """The least limit that a single image of the model keeps to."""
    report = accelerate(model, max_memory=1)
    (network,) = (rewritten for rewritten in report._replaced if rewritten.module is model)
    support = next(tensor for key, tensor in given.items() if key in ("support_images", "context_in"))
    pair = torch.cat([support, support], dim=2)

    def room(limit: int) -> int:
        network.switches = network.switches._replace(max_memory=limit)
        return network._room(pair, 0)

    limit = bisect.bisect_left(range(2**30), 1, key=room)
    report.undo()
    return limit
