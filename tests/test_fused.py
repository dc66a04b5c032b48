"""The cascade in four launches a level: against the modules, when it serves, and how many launches it takes."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from typing import Any

import pytest
import torch
from samples import DEVICE
from test_sparse import SMALL, make_inputs, make_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from icseg.sparse import fused, network
from icseg.sparse.budget import Budget
from icseg.sparse.static import static_shapes
from icseg_kernels import triton_launch, use_backend

pytestmark = pytest.mark.skipif(bool(triton_launch.missing()), reason="needs Triton on a CUDA device or interpreted")
CONFIG = dataclasses.replace(
    SMALL, levels=(8, 16, 32), target_patches=(1, 3, 4), support_patches=(1, 2, 3), exploration=(1, 2, 2), heads=2
)
BUDGET = 8
STAGES = ("encode", "attend", "decode", "write", "pick")


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG).to(DEVICE)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The fused passes that were taken."""
    found: list[str] = []
    for name in ("forward", "encode_support"):
        original = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, n=name, f=original, **k: (found.append(n), f(*a, **k))[1])
    return found


def inputs_of(batch=1, support=2, height=32, width=32, classes=1):
    target, images, masks = make_inputs(batch, support, 8 * height, 8 * width, classes)
    return [x[..., ::8, ::8].contiguous() for x in (target, images, masks)]


def run(model, inputs, backend="triton", **options):
    target, images, masks = (x.to(DEVICE, next(model.parameters()).dtype) for x in inputs)
    with torch.no_grad(), static_shapes(), use_backend(backend):
        return model(target, images, masks, **options)


def assert_equal(found, expected, tolerance):
    """The same patches, and values that differ by rounding."""
    for ours, theirs in zip(found.levels, expected.levels, strict=True):
        assert ours.resolution == theirs.resolution
        assert torch.equal(ours.coords, theirs.coords)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(ours.patch_logits, theirs.patch_logits, rtol=tolerance, atol=tolerance)
        error, expected_error = (level.extras["error_logits"] for level in (ours, theirs))
        torch.testing.assert_close(error, expected_error, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.logits, expected.logits, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.uncovered_error, expected.uncovered_error, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "given",
    [
        {"batch": 2, "classes": 2},
        {"height": 32, "width": 20},
        {"support": 1, "height": 50, "width": 10},
        {"height": 8, "width": 8},
    ],
    ids=["two classes", "portrait", "resized", "one level"],
)
def test_equals_the_modules(model, calls, given):
    inputs = inputs_of(**given)
    found = run(model, inputs, budget=BUDGET)
    assert calls == ["encode_support", "forward"]
    assert_equal(found, run(model, inputs, "reference", budget=BUDGET), 1e-4)
    assert len(calls) == 2


@pytest.mark.skipif(DEVICE != "cpu", reason="kernels serve float64 in Triton's interpreter alone")
def test_equals_the_modules_in_float64(model):
    double = copy.deepcopy(model).double()
    inputs = inputs_of()
    assert_equal(run(double, inputs, budget=BUDGET), run(double, inputs, "reference", budget=BUDGET), 1e-8)


def test_a_support_set_serves_many_targets(model, calls):
    target, images, masks = (x.to(DEVICE) for x in inputs_of(batch=3))
    with torch.no_grad(), use_backend("triton"):
        memory = model.encode_support(images[:1], masks[:1])
        one = model(target[1:2], memory=memory, budget=BUDGET)
        one.levels[0].coords.fill_(8)  # the caller's own
        again = model(target[1:2], memory=memory, budget=BUDGET)
        found = model(target, memory=memory, budget=BUDGET)
    assert calls == ["encode_support", *["forward"] * 3]
    with torch.no_grad(), use_backend("reference"):
        theirs = model.encode_support(images[:1], masks[:1])
        expected = model(target, memory=theirs, budget=BUDGET)
    assert memory.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        torch.testing.assert_close(memory.tensors[name], tensor, rtol=1e-4, atol=1e-4)
    assert_equal(found, expected, 1e-4)
    assert torch.equal(one.logits, found.logits[1:2])
    assert torch.equal(one.logits, again.logits)


def test_weights_that_change_are_seen(model):
    changed = copy.deepcopy(model)
    inputs = inputs_of()
    before = run(changed, inputs, budget=BUDGET)
    with torch.no_grad():
        changed.network.blocks[0].query.weight.mul_(3)
        changed.network.decoder.own.bias.add_(0.5)
    found = run(changed, inputs, budget=BUDGET)
    assert not torch.allclose(found.logits, before.logits, atol=1e-3)
    assert_equal(found, run(changed, inputs, "reference", budget=BUDGET), 1e-4)


@pytest.fixture
def wanted(monkeypatch):
    """Fused wherever that can be, while the ops themselves take what is fastest."""
    monkeypatch.setattr(fused.backend, "named", lambda: "triton")


@pytest.mark.parametrize("options", [{}, {"budget": Budget(tolerance=0.01)}, {"budget": BUDGET, "seed": 3}])
def test_rounds_and_draws_go_through_the_ops(model, calls, wanted, options):
    target, images, masks = (x.to(DEVICE) for x in inputs_of(support=1))
    with torch.no_grad():
        model(target, images, masks, **options)
    assert calls == ["encode_support"]


def test_gradients_modes_and_ragged_sets_go_through_the_modules(model, calls, wanted):
    target, images, masks = (x.to(DEVICE) for x in inputs_of())
    model(target, images, masks, budget=BUDGET)
    with torch.no_grad(), FlopCounterMode(display=False):
        model(target, images, masks, budget=BUDGET)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        model(target, images, masks, budget=BUDGET)
    with torch.no_grad():
        memory = model.encode_support(images, masks, valid=torch.tensor([[True, False]], device=DEVICE))
        model(target, memory=memory, budget=BUDGET)
    assert calls == []


def test_large_support_sets_are_encoded_in_chunks(model, calls, wanted, monkeypatch):
    monkeypatch.setattr(network, "CHUNK", 2)
    _, images, masks = (x.to(DEVICE) for x in inputs_of(support=3))
    with torch.no_grad():
        model.encode_support(images, masks)
        assert calls == []
        model.encode_support(images[:, :2], masks[:, :2])
    assert calls == ["encode_support"]


def test_a_backend_that_is_named_serves(model, calls):
    run(model, inputs_of(), "reference", budget=BUDGET)
    assert calls == []


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced(net):
    net.decoder.token = Doubled(32, 256)


def hooked(net):
    net.propagation.register_forward_hook(lambda *_: None)


def mixed(net):
    net.decoder.own.double()


def sloped(net):
    net.encoder.stem[1].negative_slope = 0.2


@pytest.mark.parametrize("change", [replaced, hooked, mixed, sloped])
def test_only_plain_modules_are_replaced(model, change):
    assert fused.weights_of(model.network) is not None
    changed = copy.deepcopy(model)
    change(changed.network)
    assert fused.weights_of(changed.network) is None


class Operations(TorchDispatchMode):
    """Names of the operations that compute something, beside allocations and views."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function._schema.name.split("::")[1]
        if not (function.is_view or name in ("empty", "new_empty", "empty_like", "_unsafe_view", "detach")):
            self.names.append(name)
        return function(*arguments, **(keywords or {}))


def launches(monkeypatch, action) -> tuple[list[str], list[str]]:
    """Names of the Triton kernels and of torch's operations that `action` launches, on a GPU."""
    kernels: list[str] = []
    original = triton_launch.launch

    def counted(kernel: Any, *arguments: Any, **options: Any) -> None:
        kernels.append(kernel.fn.__name__)
        with _disable_current_modes():  # of what the interpreter does
            original(kernel, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(triton_launch, "launch", counted)
        patch.setattr(fused.backend, "unwatched", lambda tensors: True)
        with Operations() as operations:
            action()
    return kernels, operations.names


def test_launches_of_five_levels(monkeypatch):
    """As of an image of 512 px with the default levels: at most 25 with memory, 40 cold with a memset."""
    levels = (8, 16, 32, 64, 128)
    config = dataclasses.replace(
        CONFIG, levels=levels, target_patches=(1, 2, 2, 2, 2), support_patches=(1, 2, 2, 2, 2), distinct_levels=4
    )
    model = make_model(config).to(DEVICE)
    target, images, masks = (x.to(DEVICE) for x in inputs_of(support=1, height=128, width=128))

    def cold():
        with torch.no_grad(), static_shapes(), use_backend("triton"):
            model(target, images, masks, budget=9)

    with torch.no_grad(), use_backend("triton"):
        memory = model.encode_support(images, masks)

    def warm():
        with torch.no_grad(), static_shapes(), use_backend("triton"):
            model(target, memory=memory, budget=9)

    cold()  # fills caches
    # Stages of the transformer are launches of their own in the interpreter alone.
    kernels, operations = launches(monkeypatch, warm)
    assert operations == []
    assert len(kernels) - extra(kernels, len(levels)) == 1 + 4 * len(levels) <= 25
    kernels, operations = launches(monkeypatch, cold)
    assert operations == ["zeros"]
    assert len(kernels) - extra(kernels, 2 * len(levels)) == 1 + 4 * len(levels) + 3 + 3 * len(levels) == 39


def extra(kernels: list[str], calls: int) -> int:
    """Launches of the transformer beyond one a call."""
    return kernels.count("attend_kernel") - calls


@pytest.mark.parametrize("stage", STAGES)
def test_stages_import_no_triton(stage):
    module = importlib.import_module(f"icseg_kernels.cascade.{stage}")
    assert "triton" not in vars(module)
