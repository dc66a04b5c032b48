"""halvings against torch's pooling and its own reference, on every backend here."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import BACKENDS, needs_native
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch.utils.flop_counter import FlopCounterMode

from icseg_kernels import BackendError, flops, halvings, library
from icseg_kernels.halvings import native, reference

SIZES = [(1, 1), (1, 9), (70, 1), (2, 3), (5, 7), (64, 64), (37, 150), (130, 97)]


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def assert_same(found: tuple[list[Tensor], list[Tensor]], expected: tuple[list[Tensor], list[Tensor]]) -> None:
    """The same bits of the means; torch's square root is not always rounded correctly."""
    assert [len(part) for part in found] == [len(part) for part in expected]
    for a, b in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert a.is_contiguous()
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0, equal_nan=True)
        assert a.is_contiguous()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def test_by_hand(backend):
    x = torch.tensor([[[[0.0, 2.0, 5.0], [4.0, 6.0, 7.0], [1.0, 3.0, 8.0]]]])
    means, deviations = halvings(x, 2, deviations=1, backend=backend)
    assert means[0].tolist() == [[[[3.0, 6.0], [2.0, 8.0]]]]
    assert means[1].tolist() == [[[[4.75]]]]
    expected = torch.tensor([[[[5**0.5, 1.0], [1.0, 1e-6]]]])
    torch.testing.assert_close(deviations[0], expected)


@pytest.mark.parametrize("size", SIZES)
def test_means_are_those_of_the_pixels_that_exist(backend, size):
    x = image(2, 3, *size)
    means, deviations = halvings(x, 4, backend=backend)
    assert deviations == []
    for mean in means:
        x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        torch.testing.assert_close(mean, x)


def test_deviations_are_those_of_the_pixels_of_the_image(backend):
    x = 0.3 + image(2, 1, 64, 96).abs()
    _, deviations = halvings(x, 5, deviations=5, backend=backend)
    for i, found in enumerate(deviations):
        side = 2 ** (i + 1)
        blocks = x.double().unfold(2, side, side).unfold(3, side, side).flatten(4)
        torch.testing.assert_close(found.double(), blocks.std(4, correction=0), rtol=1e-3, atol=1e-5)
    flat = halvings(torch.full((1, 1, 8, 8), 0.5), 3, deviations=3, backend=backend)[1]
    assert all((found == torch.tensor(1e-12).sqrt()).all() for found in flat)


@pytest.mark.parametrize(("count", "deviations"), [(0, 0), (1, 0), (1, 1), (4, 2), (5, 5), (6, 6), (7, 5), (12, 12)])
@pytest.mark.parametrize("size", SIZES)
def test_native(isa, poisoned, size, count, deviations):
    x = image(2, 3, *size)
    found, expected = (halvings(x, count, deviations=deviations, backend=name) for name in ("native", "reference"))
    assert_same(found, expected)


@pytest.mark.parametrize("width", range(1, 70))
def test_every_width(isa, poisoned, width):
    x = image(1, 1, 3, width)
    assert_same(*(halvings(x, 3, deviations=2, backend=name) for name in ("native", "reference")))


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 0, 5, 4), (0, 0, 1, 1)])
def test_no_images(backend, shape):
    means, deviations = halvings(torch.zeros(shape), 2, deviations=1, backend=backend)
    sizes = [(math.ceil(shape[2] / 2**i), math.ceil(shape[3] / 2**i)) for i in (1, 2)]
    assert [tuple(t.shape) for t in means] == [(*shape[:2], *size) for size in sizes]
    assert [tuple(t.shape) for t in deviations] == [(*shape[:2], *sizes[0])]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_pixels(backend, bad):
    x = image(2, 2, 50, 40)
    clean = halvings(x, 7, deviations=6, backend=backend)
    x[1, 0, 21, 38] = bad
    found = halvings(x, 7, deviations=6, backend=backend)
    for i, (mean, without) in enumerate(zip(found[0], clean[0], strict=True)):
        place = (1, 0, 21 >> (i + 1), 38 >> (i + 1))
        assert mean[place].isnan() if math.isnan(bad) else mean[place] == bad
        mean[place] = without[place]
        assert torch.equal(mean, without)
    for i, (deviation, without) in enumerate(zip(found[1], clean[1], strict=True)):
        place = (1, 0, 21 >> (i + 1), 38 >> (i + 1))
        assert deviation[place].isnan()
        deviation[place] = without[place]
        assert torch.equal(deviation, without)


def test_strided_views(backend):
    x = image(3, 2, 21, 34)
    expected = halvings(x, 4, deviations=3, backend=backend)
    apart = torch.full((2, 5, 23, 40), math.nan).transpose(0, 1)[1:-1, :, 1:-1, 3:-3]
    apart.copy_(x)
    mirrored = x.transpose(2, 3).contiguous().transpose(2, 3)
    for view in (apart, mirrored, x.to(memory_format=torch.channels_last), torch.stack([x, x], -1)[..., 0]):
        assert not view.is_contiguous()
        assert_same(halvings(view, 4, deviations=3, backend=backend), expected)
    for view in (x[:1].expand(4, -1, -1, -1), x[..., :1].expand(-1, -1, -1, 5), x[:, :, :1].expand(-1, -1, 6, -1)):
        found = halvings(view, 4, deviations=3, backend=backend)
        assert_same(found, halvings(view.contiguous(), 4, deviations=3, backend=backend))


@needs_native
def test_offsets_beyond_32_bits():
    """2^33 bytes of address space, of which a few pages are touched: two images far apart."""
    x = torch.empty(2**31 + 4096).as_strided((2, 1, 16, 16), (2**31, 256, 16, 1))
    x.copy_(image(2, 1, 16, 16))
    assert_same(halvings(x, 3, deviations=3, backend="native"), halvings(x.clone(), 3, deviations=3, backend="native"))


@pytest.mark.parametrize("shape", [(1, 1, 700, 513), (3, 2, 130, 200)])
def test_threads_change_no_bit(isa, threads, shape):
    x, results = image(*shape), []
    for count in (1, 2, 3):
        threads(count)
        results.append(halvings(x, 8, deviations=7, backend="native"))
    for means, deviations in results[1:]:
        for a, b in zip(means + deviations, results[0][0] + results[0][1], strict=True):
            assert torch.equal(a, b)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 80), st.integers(1, 80)),
    counts=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
@needs_native
def test_random_shapes(shape, counts):
    x = image(*shape)
    found, expected = (
        halvings(x, max(counts), deviations=min(counts), backend=name) for name in ("native", "reference")
    )
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    """The half types are computed in float32, so that the deviations do not cancel."""
    x = 0.8 + 0.02 * image(2, 1, 33, 40)
    x = x.to(dtype)
    wide = x if dtype == torch.float64 else x.float()
    expected = halvings(wide, 6, deviations=4, backend="reference")
    for found, exact in zip(halvings(x, 6, deviations=4), expected, strict=True):
        for a, b in zip(found, exact, strict=True):
            assert a.dtype == dtype
            assert torch.equal(a, b.to(dtype))


def test_gradcheck():
    x = image(2, 1, 5, 6, dtype=torch.float64).requires_grad_()

    def run(x: Tensor) -> tuple[Tensor, ...]:
        means, deviations = halvings(x, 2, deviations=2)
        return *means, *deviations

    assert torch.autograd.gradcheck(run, (x,), nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(run, (x,))


@needs_native
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_the_reference_serves_what_the_library_does_not():
    x = image(1, 1, 8, 8)
    for other, reason in (
        (x.double(), r"it computes in float32, and image is torch\.float64"),
        (x.to("meta"), "it runs on the CPU, and image is on meta"),
        (x.clone().requires_grad_(), "it has no gradients, and image requires one"),
    ):
        assert halvings(other, 2, deviations=1)[0][1].shape == (1, 1, 2, 2)
        with pytest.raises(BackendError, match=f"the native backend cannot serve halvings of .*{reason}"):
            halvings(other, 2, backend="native")
    with torch.no_grad():
        assert not halvings(x.clone().requires_grad_(), 1, backend="native")[0][0].requires_grad
    _, tangent = torch.func.jvp(lambda x: halvings(x, 1)[0][0], (x,), (x,))
    torch.testing.assert_close(tangent, F.avg_pool2d(x, 2))
    mapped = torch.func.vmap(lambda x: halvings(x, 1)[0][0])(torch.stack([x, 2 * x]))
    torch.testing.assert_close(mapped[1], F.avg_pool2d(2 * x, 2))
    with pytest.raises(BackendError, match="no rules for forward-mode differentiation and function transforms"):
        torch.func.jvp(lambda x: halvings(x, 1, backend="native")[0][0], (x,), (x,))


@needs_native
@pytest.mark.parametrize(("count", "deviations"), [(3, 2), (1, 0)])
def test_opcheck(count, deviations):
    torch.library.opcheck(
        torch.ops.icseg.halvings.default,
        (image(2, 1, 9, 6), count, deviations, "native"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@needs_native
def test_compile_is_one_node():
    torch.compiler.reset()
    recorder = EagerAndRecordGraphs()

    def run(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return halvings(x, 3, deviations=2)

    compiled = torch.compile(run, fullgraph=True, backend=recorder)
    for height in (16, 16, 20, 27):
        x = image(2, 1, height, 16)
        assert_same(compiled(x), run(x))
    assert len(recorder.graphs) <= 2
    for graph in recorder.graphs:
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert targets.count("icseg.halvings.default") == 1
        assert not [target for target in targets if "add" in target]


def test_compile_fullgraph_with_gradients():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def run(x: Tensor) -> Tensor:
        means, deviations = halvings(x, 2, deviations=2)
        return sum((t.square().sum() for t in means + deviations), x.new_zeros(()))

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for count in (2, 2, 3):
        x = image(count, 1, 9, 8).requires_grad_()
        torch.testing.assert_close(
            torch.autograd.grad(compiled(x), x), torch.autograd.grad(run(x), x), rtol=1e-5, atol=1e-6
        )
    assert counter.frame_count <= 2


def test_autocast_changes_nothing(backend):
    x = image(2, 1, 9, 8)
    expected = halvings(x, 2, deviations=2, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(halvings(x, 2, deviations=2, backend=backend), expected)
        assert halvings(x.bfloat16(), 1)[0][0].dtype == torch.bfloat16


def test_no_flops(backend):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        halvings(image(1, 1, 8, 8), 2, deviations=1, backend=backend)
    assert counter.get_total_flops() == 0


def test_bytes_are_those_of_the_tensors():
    x = image(2, 3, 9, 14)
    means, deviations = halvings(x, 4, deviations=2)
    assert flops.halvings_bytes(2, 3, 9, 14, 4, 2) == 4 * sum(t.numel() for t in (x, *means, *deviations))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": None}, TypeError, "image must be a torch.Tensor, got NoneType"),
        ({"image": torch.zeros(1, 1, 4, 4).int()}, TypeError, "image must be a floating-point tensor"),
        ({"image": torch.zeros(4, 4)}, ValueError, r"image must have shape \[N, C, h, w\] with h, w > 0, got \[4, 4\]"),
        ({"image": torch.zeros(1, 1, 0, 4)}, ValueError, r"image must have .* got \[1, 1, 0, 4\]"),
        ({"count": -1}, ValueError, "count must be an integer of at least 0, got -1"),
        ({"count": 2.0}, TypeError, "count must be an integer of at least 0, got 2.0"),
        ({"count": True}, TypeError, "count must be an integer of at least 0, got True"),
        ({"deviations": 3}, ValueError, "deviations must be an integer from 0 to 2, got 3"),
        ({"deviations": -1}, ValueError, "deviations must be an integer from 0 to 2, got -1"),
        ({"deviations": None}, TypeError, "deviations must be an integer from 0 to 2, got None"),
        ({"backend": "cuda"}, BackendError, "halvings has no cuda backend"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        halvings(**{"image": torch.zeros(1, 1, 4, 4), "count": 2, **changes})


def test_integers_of_numpy(backend):
    numpy = pytest.importorskip("numpy")
    x = image(1, 1, 9, 9)
    found = halvings(x, numpy.int64(2), deviations=numpy.uint8(1), backend=backend)
    assert_same(found, halvings(x, 2, deviations=1, backend=backend))


@needs_native
def test_operators_called_directly_check_before_raw_pointers():
    op, x = torch.ops.icseg.halvings, torch.zeros(1, 1, 4, 4)
    for bad in (x.double(), x[0]):
        with pytest.raises(ValueError, match=r"image must be float32 \[N, C, h, w\] on the CPU, got"):
            op(bad, 1, 0, "native")
    for counts, message in (((-1, 0), "negative"), ((1, -1), "negative"), ((1, 2), "deviations must not outnumber")):
        with pytest.raises(RuntimeError, match=f"native library: .*{message}"):
            op(x, *counts, "native")


@needs_native
@pytest.mark.parametrize(
    ("sizes", "given", "message"),
    [
        ((-1, 1, 4, 4, 1, 0), 0, "negative"),
        ((1, 1, -(2**63), 4, 1, 0), 0, "negative"),
        ((1, 1, 4, 4, 1, 2), 0, "deviations must not outnumber"),
        ((2**32, 2**32, 4, 4, 1, 0), 0, "63 bits"),
        ((1, 1, 2**31, 2**31, 1, 0), 0, "63 bits"),
        ((0, 1, 2**62, 4, 1, 0), 0, "63 bits"),
        ((1, 1, 4, 4, 2, 2), 15, "workspace"),
        ((1, 1, 4, 4, 5, 5), 4 * (4 + 1 + 1 + 1) - 1, "workspace"),
    ],
)
def test_impossible_sizes_of_the_entry(sizes, given, message):
    with pytest.raises(RuntimeError, match=message):
        library.check(native._halve(None, None, None, *sizes, 0, 0, 0, None, given))


@needs_native
def test_nothing_to_do():
    for sizes in ((0, 1, 4, 4, 2, 1), (1, 0, 4, 4, 2, 1), (1, 1, 0, 4, 2, 2), (1, 1, 4, 4, 0, 0)):
        assert native._halve(None, None, None, *sizes, 0, 0, 0, None, 0) == 0


def test_reference_is_what_the_docstring_says():
    (mean, spread) = reference.halvings(torch.tensor([[[[0.0, 2.0], [4.0, 6.0]]]]), 1, 1)
    assert mean.tolist() == [[[[3.0]]]]
    torch.testing.assert_close(spread, torch.full((1, 1, 1, 1), 5**0.5))
