"""accelerate: other people's models give the same outputs and gradients for less work, and come back as they were."""

from __future__ import annotations

import copy
import io
import json
import random
import sys
from typing import Any

import pytest
import torch
from accelerated import MODELS, assert_close, flops, gradients, inputs, made, run
from reference_models import multiverseg, neuralizer, neuroverse3d, tyche, universeg
from torch import Tensor, nn

import icseg_kernels.nn
from icseg_kernels import accelerate

SWITCHES = ("split", "commute_mean", "drop_dead_support", "cache_support")


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


# Any model with cross convolutions, wrapped models, copies.


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
