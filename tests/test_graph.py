"""The forward pass of fixed shapes: static, without a wait for the device, and captured as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import icseg
from icseg import graph
from icseg.output import SegmentationOutput
from icseg.sparse.budget import Budget
from icseg.sparse.static import is_static, static_shapes
from icseg_kernels import use_backend

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def model() -> icseg.PatchICL:
    return icseg.PatchICL.from_pretrained()


def inputs(batch: int = 2, side: int = 96, pairs: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, pairs + 1, 1, side, side, generator=generator)
    masks = torch.zeros(batch, pairs, 1, side, side)
    masks[..., 20:60, 30 : 50 + seed] = 1
    images[:, 1:] = images[:, 1:] * 0.3 + masks * 0.5
    return [images[:, 0], images[:, 1:], masks]


def test_static_shapes_hold_inside_the_block() -> None:
    assert not is_static()
    with static_shapes():
        assert is_static()
        with static_shapes():
            assert is_static()
        assert is_static()
    assert not is_static()


@pytest.mark.parametrize("budget", [None, 60, Budget(tolerance=0.0)], ids=["adaptive", "patches", "all"])
def test_a_static_pass_reads_no_value(budget: Any) -> None:
    """On tensors without values, of which none can be read."""
    model = icseg.PatchICL().eval()
    with FakeTensorMode(), torch.no_grad(), static_shapes():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = torch.empty_strided(tensor.shape, tensor.stride())  # type: ignore[assignment]
        target, images, masks = (
            torch.empty(2, 1, 256, 256),
            torch.empty(2, 3, 1, 256, 256),
            torch.empty(2, 3, 1, 256, 256),
        )
        memory = model.encode_support(images, masks)
        assert model(target, memory=memory, budget=budget).logits.shape == (2, 1, 256, 256)


def test_a_static_pass_with_a_fixed_budget_is_the_same(model: icseg.PatchICL) -> None:
    with torch.no_grad():
        expected = model(*inputs(), budget=50).logits
        with static_shapes():
            assert torch.equal(model(*inputs(), budget=50).logits, expected)


# Captured. Without a GPU in a stand-in for its graphs, which runs the pass again and writes to the same tensors.


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(run: Callable[[], SegmentationOutput]) -> tuple[Callable[[], None], SegmentationOutput]:
        output = run()

        def replay() -> None:
            with static_shapes():
                output.logits.copy_(run().logits)

        return replay, output

    monkeypatch.setattr(graph, "_captured", captured)


def captured(model: icseg.PatchICL, with_memory: bool) -> graph.CapturedForward:
    """As `PatchICL.graph`, on any device."""
    target, images, masks = (torch.zeros_like(x) for x in inputs())
    if not with_memory:
        given = {"target": target, "support_images": images, "support_masks": masks}
        return graph.CapturedForward(model, given, None, {"budget": Budget(patches=40)})
    memory = model.encode_support(*inputs(seed=5)[1:])
    return graph.CapturedForward(model, {"target": target}, memory, {"budget": Budget(patches=40)})


@pytest.mark.usefixtures("replayed")
def test_a_captured_pass_sees_its_inputs(model: icseg.PatchICL) -> None:
    run = captured(model, with_memory=False)
    for seed in (1, 2):
        found = run(*inputs(seed=seed))
        with torch.no_grad():
            assert torch.equal(found.logits, model(*inputs(seed=seed), budget=40).logits)


@pytest.mark.usefixtures("replayed")
def test_a_captured_pass_takes_another_memory(model: icseg.PatchICL) -> None:
    run = captured(model, with_memory=True)
    for seed in (1, 2):
        memory = model.encode_support(*inputs(seed=seed)[1:])
        run.set_memory(memory)
        with torch.no_grad():
            expected = model(inputs()[0], memory=memory, budget=40).logits
        assert torch.equal(run(inputs()[0]).logits, expected)


@pytest.mark.usefixtures("replayed")
def test_inputs_of_other_shapes_are_refused(model: icseg.PatchICL) -> None:
    run, with_memory = captured(model, with_memory=False), captured(model, with_memory=True)
    target, images, masks = inputs()
    with pytest.raises(ValueError, match=r"target must have the captured shape \[2, 1, 96, 96\], got \[1, 1, 96, 96\]"):
        run(target[:1], images, masks)
    with pytest.raises(TypeError, match=r"support_images must be a tensor of shape \[2, 2, 1, 96, 96\], got NoneType"):
        run(target)
    with pytest.raises(TypeError, match=r"support_masks must be floating-point, in \[0, 1\], got torch.bool"):
        run(target, images, masks > 0)
    with pytest.raises(ValueError, match="support_images must be None, since this pass was captured with a memory"):
        with_memory(target, images, masks)
    with pytest.raises(ValueError, match="memory must not be set: this pass was captured with support images"):
        run.set_memory(model.encode_support(images, masks))
    with pytest.raises(ValueError, match=r"memory must have .* captured one, level0.block0 \(2, \d+, 256\)"):
        with_memory.set_memory(model.encode_support(images[:, :1], masks[:, :1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of memory and support must be given, got neither"),
        ({"support": 0}, "support must be an int of at least 1, got 0"),
        ({"support": 3, "size": 64}, r"size must be a pair \(height, width\), got 64"),
        ({"support": 3, "batch": 0}, "batch must be an int of at least 1, got 0"),
        ({"support": 3}, "the model must be on a CUDA device, of which a graph can be captured, got cpu"),
    ],
)
def test_bad_arguments(model: icseg.PatchICL, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.graph(**{"batch": 1, "size": (64, 64)} | arguments)


def test_a_memory_brings_its_own_size(model: icseg.PatchICL) -> None:
    memory = model.encode_support(*inputs()[1:])
    with pytest.raises(ValueError, match="support_size and classes must not be given with a memory"):
        model.graph(2, (64, 64), memory=memory, classes=2)
    with pytest.raises(ValueError, match="support sets must number 1 or 3, one a target, got 2"):
        model.graph(3, (64, 64), memory=memory)


def test_training_and_other_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="the model must be in evaluation mode"):
        icseg.PatchICL().train().graph(1, (64, 64), support=1)
    with pytest.raises(ValueError, match="graph needs the sparse architecture, got universeg"):
        icseg.PatchICL(icseg.PatchICLConfig.universeg(channels=(4, 4), image_size=16)).graph(1, (16, 16), support=1)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("budget", [None, 60], ids=["adaptive", "patches"])
def test_a_graph_gives_the_same_masks(budget: int | None, backend: str) -> None:
    model = icseg.PatchICL.from_pretrained(device="cuda")
    with torch.no_grad(), use_backend(backend):
        cold = model.graph(2, (96, 96), support=2, budget=budget)
        memory = model.encode_support(*(x.cuda() for x in inputs()[1:]))
        warm = model.graph(2, (96, 96), memory=memory, budget=budget)
    for seed in (0, 3):
        given = [x.cuda() for x in inputs(seed=seed)]
        with torch.no_grad(), static_shapes(), use_backend(backend):
            expected = model(*given, budget=budget).logits
            assert (cold(*given).logits - expected).abs().max() < 1e-3
            warm.set_memory(model.encode_support(*given[1:]))
            assert (warm(given[0]).logits - expected).abs().max() < 1e-3


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_compiled_pass_with_little_overhead_gives_the_same_masks(backend: str) -> None:
    model = icseg.PatchICL.from_pretrained(device="cuda")
    compiled = torch.compile(model, mode="reduce-overhead")
    with torch.no_grad(), use_backend(backend):
        memory = model.encode_support(*(x.cuda() for x in inputs()[1:]))
        for seed in (0, 3, 5):
            given = [x.cuda() for x in inputs(seed=seed)]
            with static_shapes():
                cold, warm = model(*given, budget=60).logits, model(given[0], memory=memory, budget=60).logits
            torch.compiler.cudagraph_mark_step_begin()
            assert (compiled(*given, budget=60).logits - cold).abs().max() < 1e-3
            torch.compiler.cudagraph_mark_step_begin()
            assert (compiled(given[0], memory=memory, budget=60).logits - warm).abs().max() < 1e-3
