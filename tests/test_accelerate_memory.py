"""accelerate keeps features of a support set, or streams it: what is kept for whom, and the bound of max_memory."""

from __future__ import annotations

import bisect
import random
import sys
from collections.abc import Callable

import pytest
import torch
from accelerated import MODELS, assert_close, flops, gradients, inputs, made
from reference_models import multiverseg, neuralizer, tyche, universeg
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from icseg_kernels import accelerate
from icseg_kernels.accelerate.measure import LiveTensors

rewrite = sys.modules["icseg_kernels.accelerate.rewrite"]  # `icseg_kernels.accelerate` is the function


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


# Graphs, inference mode and streams.


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
