"""accelerate: other people's models give the same outputs and gradients for less work, and come back as they were."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_models import multiverseg, neuralizer, neuroverse3d, tyche, universeg
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from icseg_kernels import accelerate
from icseg_kernels.accelerate.measure import LiveTensors

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
    if isinstance(model, neuralizer.PairwiseConvAvgModel):
        volume = (*size, 4) if isinstance(model.target_embedding, nn.Conv3d) else size
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


def test_flops_of_the_others() -> None:
    """Two scales of 8 channels; in convolutions of 8 to 8 channels at full size, S = 5 supports."""
    unit = 2 * 9 * 8**2 * 64
    tokens, images = 3, 5
    model: nn.Module = tyche.TysegXC((8, 8)).eval()
    support, targets = torch.rand(2, 1, images, 1, 8, 8), torch.rand(2, 1, tokens, 1, 8, 8)
    head = tokens / 72
    before = flops(lambda: model(*support, *targets)) / unit - head
    accelerate(model)
    after = flops(lambda: model(*support, *targets)) / unit - head
    blocks = ((1.0, 2 / 8, 1), (0.25, 1.0, 1), (1.0, 2.0, 0))  # size, inputs, and whether supports are read
    assert before == pytest.approx(
        sum(size * (images * (2 * x + 1) + tokens * (x + 1) + tokens) for size, x, _ in blocks)
    )
    assert after == pytest.approx(
        sum(size * (x + images * (x + read) + tokens * x + 1 + tokens) for size, x, read in blocks)
    )

    model = multiverseg.MultiverSegNet((8, 8)).eval()
    target = torch.rand(1, 5, 8, 8)
    before = flops(lambda: model(target, *support)) / unit
    accelerate(model)
    assert before - flops(lambda: model(target, *support)) / unit == pytest.approx(images)  # the last support layer


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
    plan = report._replaced[0][1].__self__
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


@pytest.mark.parametrize("name", MODELS)
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


def test_hooks_still_fire() -> None:
    model = made("universeg")
    given = inputs(model)
    expected = model(**given)
    accelerate(model)
    calls = []
    for module in (model.enc_blocks[0], model.enc_blocks[1].cross.cross_conv, model.dec_blocks[-1].support.vmapped):
        handle = module.register_forward_hook(lambda module, *_: calls.append(module))
        assert_close(model(**given), expected)
        assert calls == [module]
        calls.clear()
        handle.remove()


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
            assert other.forward.__self__.model is other
            assert_close(other(**given), expected)


def test_compiles() -> None:
    model = universeg.UniverSeg((2, 3)).double()
    given = inputs(model)
    expected = model(**given)
    accelerate(model, max_memory=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(**given), expected)
    with torch.no_grad():
        assert_close(compiled(**given), expected)


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


def test_flops_of_neuralizer() -> None:
    """Two scales, three blocks; per context and pixel, in 1 x 1 convolutions of a width of 4."""
    model = neuralizer.PairwiseConvAvgModel(2, 1, 1, 4, 2).eval()
    given = {name: t.float() for name, t in inputs(model, 5, batch=1, size=(8, 8)).items()}
    unit, images, mixers = 2 * 4**2 * 64, 5, 2 + 0.25
    before = flops(lambda: model(**given)) / unit
    report = accelerate(model, cache_support=False)
    after = flops(lambda: model(**given)) / unit
    # Two mixers of 2 a context, now one of 1, 2 for the target and 1 for the mean; in the last block only the latter.
    assert before - after == pytest.approx(mixers * (4 * images - (images + 3)) + images + 1)
    report.undo()
    accelerate(model)
    assert flops(lambda: model(**given)) / unit == pytest.approx(after)
    assert after - flops(lambda: model(**given)) / unit == pytest.approx(images * (2 / 4 + 2 * 9))


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
