"""Calls nobody watches skip the dispatcher; whoever watches still sees the op, and gets the same result."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from samples import SAMPLES
from torch import Tensor
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from icseg_kernels import backend as backends
from icseg_kernels import gather_patches, gumbel_topk
from icseg_kernels.patches import gather

SOURCE = torch.randn(2, 7, 9, generator=torch.Generator().manual_seed(0))
COORDS = torch.tensor([[0, 1], [-2, 3], [5, 7]])
CUT = gather_patches(SOURCE, COORDS, 3, backend="reference")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for every call of gather_patches that skipped the dispatcher."""
    taken: list[str] = []
    implementation = backends._implementations[gather._gather]

    def spy(*arguments: Any) -> Any:
        taken.append("short")
        return implementation(*arguments)

    monkeypatch.setitem(backends._implementations, gather._gather, spy)
    return taken


def cut(source: Tensor = SOURCE, coords: Tensor = COORDS) -> Tensor:
    return gather_patches(source, coords, 3)


class Watch(TorchDispatchMode):
    """Names of the ops seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Quiet(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Sub(Tensor):
    """A subclass that changes nothing."""


class Logged(Tensor):
    """A wrapper that records the ops it meets."""

    seen: ClassVar[list[str]] = []
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Logged:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        return func(*(a.inner if isinstance(a, cls) else a for a in args), **(kwargs or {}))


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_plain_call_is_short(short: list[str], context: Callable[[], Any]) -> None:
    with context():
        assert torch.equal(cut(), CUT)
        assert torch.equal(cut(torch.nn.Parameter(SOURCE, requires_grad=False)), CUT)
    assert short == ["short", "short"]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_call_that_needs_no_gradient_is_short(short: list[str], context: Callable[[], Any]) -> None:
    with context():
        found = cut(SOURCE.clone().requires_grad_())
    assert torch.equal(found, CUT)
    assert not found.requires_grad
    assert short == ["short"]


def test_a_call_inside_autocast_is_short(short: list[str]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cut(), CUT)
    assert short == ["short"]


@pytest.mark.parametrize("mode", [Watch, Quiet, lambda: FlopCounterMode(display=False), lambda: torch.device("cpu")])
def test_modes_are_asked(short: list[str], mode: Callable[[], Any]) -> None:
    with torch.no_grad(), mode():
        assert torch.equal(cut(), CUT)
    assert short == []


def test_a_dispatch_mode_sees_the_op() -> None:
    for context in (torch.no_grad, torch.enable_grad):
        with context(), Watch() as watch:
            cut()
        assert watch.seen.count("icseg.gather_patches.default") == 1


def test_gradients_are_recorded(short: list[str]) -> None:
    source = SOURCE.clone().requires_grad_()
    found = cut(source)
    assert found.requires_grad
    assert short == []
    assert gather_patches(SOURCE, COORDS, 3).requires_grad is False


def test_flops_are_counted() -> None:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        gather_patches(SOURCE, COORDS, 3, out_size=5)
    assert counter.get_total_flops() > 0


@pytest.mark.parametrize("recording", [torch.no_grad, torch.enable_grad])
def test_forward_mode_is_refused_not_taken_for_zero(short: list[str], recording: Callable[[], Any]) -> None:
    with recording(), forward_ad.dual_level():
        dual = forward_ad.make_dual(SOURCE, torch.ones_like(SOURCE))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"forward-mode|jvp|forward AD"):
            cut(dual)
    assert short == []


def test_function_transforms_are_asked(short: list[str]) -> None:
    found = torch.func.grad(lambda x: cut(x).square().sum())(SOURCE)
    source = SOURCE.clone().requires_grad_()
    cut(source).square().sum().backward()
    assert torch.equal(found, source.grad)
    two = torch.stack([SOURCE, SOURCE * 2])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no batching rule: one call after the other
        assert torch.equal(torch.func.vmap(cut)(two), torch.stack([CUT, CUT * 2]))
        assert torch.equal(torch.func.functionalize(cut)(SOURCE), CUT)
    assert short == []


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_names_the_op(short: list[str], mode: str) -> None:
    with torch.no_grad():
        graph = make_fx(lambda source, coords: cut(source, coords), tracing_mode=mode)(SOURCE, COORDS)
    assert "torch.ops.icseg.gather_patches.default" in graph.code
    assert torch.equal(graph(SOURCE, COORDS), CUT)
    assert short == []


def test_fake_and_meta_tensors_have_shapes_alone(short: list[str]) -> None:
    with FakeTensorMode() as mode:
        assert cut(mode.from_tensor(SOURCE), mode.from_tensor(COORDS)).shape == CUT.shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert cut().shape == CUT.shape
    found = gather_patches(SOURCE.to("meta"), COORDS.to("meta"), 3)
    assert found.is_meta
    assert found.shape == CUT.shape
    assert short == []


def test_export_names_the_op(short: list[str]) -> None:
    class Cut(torch.nn.Module):
        def forward(self, source: Tensor) -> Tensor:
            return cut(source)

    program = torch.export.export(Cut(), (SOURCE,))
    assert "torch.ops.icseg.gather_patches.default" in program.graph_module.code
    assert torch.equal(program.module()(SOURCE), CUT)
    assert short == []


def test_a_trace_names_the_op(short: list[str]) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is deprecated, and Python's numbers are constants of the trace
        traced = torch.jit.trace(cut, (SOURCE, COORDS), check_trace=False)
    assert "icseg::gather_patches" in str(traced.graph)
    assert torch.equal(traced(SOURCE * 2, COORDS), CUT * 2)
    assert short == []


def test_a_profiler_sees_the_op(short: list[str]) -> None:
    with torch.no_grad(), profile() as profiled:
        cut()
    assert "icseg::gather_patches" in {event.name for event in profiled.events()}
    assert short == []


def test_subclasses_are_asked(short: list[str]) -> None:
    with torch.no_grad():
        assert torch.equal(cut(SOURCE.as_subclass(Sub)), CUT)
        assert torch.equal(cut(Logged(SOURCE)), CUT)
    assert "icseg.gather_patches.default" in Logged.seen
    assert short == []


def test_lazy_views_are_resolved(short: list[str]) -> None:
    negative = torch.complex(torch.zeros_like(SOURCE), -SOURCE).conj().imag
    assert negative.is_neg()
    zeros = torch._efficientzerotensor(2, 7, 9)
    with torch.no_grad():
        assert torch.equal(cut(negative), CUT)
        assert torch.equal(cut(zeros), torch.zeros_like(CUT))
    assert short == []


def test_compiled_code_names_the_op(short: list[str]) -> None:
    torch.compiler.reset()
    recorder = EagerAndRecordGraphs()
    with torch.no_grad():
        assert torch.equal(torch.compile(cut, fullgraph=True, backend=recorder)(SOURCE), CUT)
    assert "icseg" in recorder.graphs[0].code
    assert recorder.graphs[0].code.count("gather_patches") > 0


@pytest.mark.parametrize("sample", SAMPLES)
def test_short_and_watched_calls_agree_bit_for_bit(sample: str) -> None:
    """Numbers as they are, and as 0-dim tensors; with and without gradients."""
    run = SAMPLES[sample](False)
    plain = run(gradients=False)
    with Watch():
        watched = run(gradients=False)
    with_gradients = run()
    for a, b, c in zip(plain, watched, with_gradients, strict=False):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_seeds_may_be_numbers_or_tensors() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    for seed in (0, 7, -1, 2**62, -(2**63)):
        with Watch():
            expected = gumbel_topk(logits, 9, seed=torch.tensor(seed))
        for found in (gumbel_topk(logits, 9, seed=seed), gumbel_topk(logits, 9, seed=torch.tensor(seed))):
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b)
