"""small_convolutions against torch's convolutions in float64, and its own reference, on every backend here."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import BACKENDS, needs_native
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from icseg_kernels import BackendError, ConvLayer, flops, library, small_convolutions
from icseg_kernels.small_convolutions import native

# Input channels; output channels, kernel, stride, padding, replicate, negative slope of every layer: as small encoders
# and heads have them, then rarer kernels, strides and paddings.
STACKS: dict[str, tuple[int, list[tuple[int, int, int, int, bool, float | None]]]] = {
    "stem": (
        3,
        [
            (12, 3, 1, 0, False, 0.01),
            (16, 3, 1, 0, False, 0.01),
            (24, 3, 1, 0, False, 0.01),
            (24, 3, 1, 0, False, None),
        ],
    ),
    "down": (32, [(48, 4, 2, 1, False, 0.01)]),
    "mix": (56, [(32, 3, 1, 1, True, 0.01), (20, 1, 1, 0, False, None)]),
    "inject": (4, [(20, 3, 1, 1, True, 0.01)]),
    "head": (20, [(20, 3, 1, 1, True, 0.01), (2, 1, 1, 0, False, None)]),
    "mask": (1, [(8, 4, 2, 1, False, 0.01)]),
    "register": (3, [(16, 4, 2, 1, False, 0.01), (32, 4, 2, 1, False, 0.01)]),
    "large kernels": (2, [(5, 5, 1, 4, True, -0.5), (33, 5, 2, 2, False, 0.0), (17, 2, 1, 1, False, 2.0)]),
    "strided points": (7, [(128, 1, 2, 0, False, None), (1, 3, 2, 2, True, 0.3)]),
}
SMALL = ("stem", "down", "head", "large kernels")


def stack(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[ConvLayer]:
    channels, rows = STACKS[name]
    return layers_of(channels, rows, dtype, seed)


def layers_of(channels: int, rows: list[Any], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[ConvLayer]:
    """Of random weights that keep the size of values; every third has no bias."""
    generator, layers = torch.Generator().manual_seed(seed), []
    for i, (outputs, kernel, *rest) in enumerate(rows):
        weight = torch.randn(outputs, channels, kernel, kernel, generator=generator, dtype=torch.float64)
        bias = torch.randn(outputs, generator=generator, dtype=torch.float64)
        weight = weight / (channels * kernel**2) ** 0.5
        layers.append(ConvLayer(weight.to(dtype), None if i % 3 == 2 else bias.to(dtype), *rest))
        channels = outputs
    return layers


def images(name: str, count: int, side: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, STACKS[name][0], side, side, generator=generator, dtype=torch.float64).to(dtype)


def plain(x: Tensor, layers: list[ConvLayer]) -> Tensor:
    """What one writes without the op."""
    for layer in layers:
        p = layer.padding
        x = F.pad(x, (p, p, p, p), mode="replicate" if layer.replicate and p else "constant")
        x = F.conv2d(x, layer.weight, layer.bias, stride=layer.stride)
        if layer.negative_slope is not None:
            x = F.leaky_relu(x, layer.negative_slope)
    return x


def exact(x: Tensor, layers: list[ConvLayer]) -> Tensor:
    wide = [layer._replace(weight=layer.weight.double(), bias=_double(layer.bias)) for layer in layers]
    return plain(x.double(), wide)


def _double(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.double()


def assert_near(found: Tensor, x: Tensor, layers: list[ConvLayer]) -> None:
    """Errors of a few roundings a term, which add up like a random walk."""
    oracle = exact(x, layers)
    assert found.shape == oracle.shape
    assert found.is_contiguous()
    eps, terms = torch.finfo(found.dtype).eps, max(layer.weight[0].numel() for layer in layers)
    allowed = 8 * eps * terms**0.5 * len(layers) * max(1.0, oracle.abs().max().item() if oracle.numel() else 0.0)
    torch.testing.assert_close(found.double(), oracle, rtol=0, atol=allowed)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("side", [16, 11])
@pytest.mark.parametrize("name", STACKS)
def test_is_the_stack_of_convolutions(backend, name, side):
    x, layers = images(name, 7, side), stack(name)
    found = small_convolutions(x, layers, backend=backend)
    assert found.dtype == torch.float32
    assert_near(found, x, layers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SMALL)
def test_reference_of_other_dtypes(name, dtype):
    x, layers = images(name, 2, dtype=dtype), stack(name, dtype)
    found = small_convolutions(x, layers)
    assert found.dtype == dtype
    torch.testing.assert_close(found, plain(x, layers))


@pytest.mark.parametrize("count", [0, 1, 7, 65])
@pytest.mark.parametrize("name", STACKS)
def test_native(isa, poisoned, name, count):
    x, layers = images(name, count), stack(name)
    assert_near(small_convolutions(x, layers, backend="native"), x, layers)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 6, 7, 12, 13, 14, 15, 17, 28, 29, 31, 32])
def test_every_width_of_a_row(isa, poisoned, width):
    """Rows are cut into tiles of every size; one and two vectors of channels."""
    for outputs in (3, 20):
        layers = layers_of(3, [(outputs, 3, 1, 1, True, 0.1), (outputs, 3, 1, 1, False, None)])
        x = torch.randn(2, 3, 3, width, generator=torch.Generator().manual_seed(width))
        assert_near(small_convolutions(x, layers, backend="native"), x, layers)
        x = x.transpose(2, 3)
        assert_near(small_convolutions(x, layers, backend="native"), x, layers)


@pytest.mark.parametrize("channels", [1, 4, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 100, 127, 128])
def test_every_number_of_channels(isa, poisoned, channels):
    layers = layers_of(channels, [(channels, 2, 1, 1, False, 0.1), (129 - channels, 1, 1, 0, False, None)])
    x = torch.randn(2, channels, 5, 5, generator=torch.Generator().manual_seed(channels))
    assert_near(small_convolutions(x, layers, backend="native"), x, layers)


@needs_native
def test_the_largest():
    """128 channels of 32 x 32 pixels, padding that makes maps larger in memory, and 16 layers."""
    layers = layers_of(128, [(128, 5, 1, 2, True, 0.1)])
    x = torch.randn(1, 128, 32, 32, generator=torch.Generator().manual_seed(0))
    assert_near(small_convolutions(x, layers, backend="native"), x, layers)
    layers = layers_of(2, [(2, 3, 1, 1, i % 2 == 0, 0.5) for i in range(16)])
    x = torch.randn(3, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    assert_near(small_convolutions(x, layers, backend="native"), x, layers)


def test_by_hand(backend):
    """The sum of 2 x 2 pixels, every second one, with the border's pixels around: of 1 2 / 3 4."""
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    sums = ConvLayer(torch.ones(1, 1, 2, 2), None, 2, 1, True)
    assert small_convolutions(x, [sums], backend=backend).tolist() == [[[[4.0, 8.0], [12.0, 16.0]]]]
    zeros = sums._replace(replicate=False, bias=torch.tensor([-3.0]), negative_slope=0.5)
    assert small_convolutions(x, [zeros], backend=backend).tolist() == [[[[-1.0, -0.5], [0.0, 1.0]]]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_window(backend, bad):
    layers = [ConvLayer(torch.rand(20, 3, 3, 3) + 0.1, None, 1, 1, False, -0.5), ConvLayer(torch.ones(4, 20, 1, 1))]
    x = torch.rand(2, 3, 9, 9)
    clean = small_convolutions(x, layers, backend=backend)
    x[1, 2, 4, 4] = bad
    found = small_convolutions(x, layers, backend=backend)
    expected = math.nan if math.isnan(bad) else math.inf  # the slope is negative
    torch.testing.assert_close(found[1, :, 3:6, 3:6], torch.full((4, 3, 3), expected), equal_nan=True)
    found[1, :, 3:6, 3:6] = clean[1, :, 3:6, 3:6]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("name", SMALL)
def test_strided_views(backend, name):
    x, layers = images(name, 5), stack(name)
    expected = small_convolutions(x, layers, backend=backend)
    apart = torch.full((6, 18, x.shape[1] + 2, 19), math.nan)
    view = apart.permute(0, 2, 1, 3)[1:, 1:-1, 1:-1, 2:-1]
    view.copy_(x)
    mirrored = x.transpose(2, 3).contiguous().transpose(2, 3)
    gapped = torch.stack([x, x], dim=-1)[..., 0]
    for other in (view, mirrored, gapped, x.to(memory_format=torch.channels_last), x.permute(1, 2, 3, 0).contiguous()):
        given = other.permute(3, 0, 1, 2) if other.shape[-1] == 5 else other
        found = small_convolutions(given, layers, backend=backend)
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
        if backend == "native":
            assert torch.equal(found, expected)
    weights = [
        layer._replace(weight=layer.weight.to(memory_format=torch.channels_last), bias=_spread(layer.bias))
        for layer in layers
    ]
    torch.testing.assert_close(small_convolutions(x, weights, backend=backend), expected, rtol=1e-5, atol=2e-5)
    same = x[:1, :, :1].expand(5, -1, 16, -1)
    found = small_convolutions(same, layers, backend=backend)
    torch.testing.assert_close(found, small_convolutions(same.contiguous(), layers, backend=backend))


def _spread(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else torch.stack([bias, bias], dim=1)[:, 0]


@needs_native
def test_offsets_beyond_32_bits():
    """2^33 bytes of address space, of which a few pages are touched: two images far apart."""
    storage = torch.empty(2**31 + 4096)  # not written: no memory
    x = storage.as_strided((2, 3, 16, 16), (2**31, 256, 16, 1))
    x.copy_(images("stem", 2))
    layers = stack("stem")
    assert torch.equal(
        small_convolutions(x, layers, backend="native"), small_convolutions(x.clone(), layers, backend="native")
    )


@pytest.mark.parametrize("name", ["stem", "head", "mask"])
def test_threads_change_no_bit(isa, threads, name):
    x, layers, results = images(name, 65), stack(name), []
    for count in (1, 2, 3):
        threads(count)
        results.append(small_convolutions(x, layers, backend="native"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_native
def test_an_image_is_the_same_alone_and_among_others():
    x, layers = images("stem", 9), stack("stem")
    together = small_convolutions(x, layers, backend="native")
    for i in range(9):
        assert torch.equal(small_convolutions(x[i : i + 1], layers, backend="native")[0], together[i])


@st.composite
def random_stack(draw: Any) -> tuple[Tensor, list[ConvLayer]]:
    channels, height, width = (draw(st.integers(1, most)) for most in (40, 16, 16))
    shape, rows = (draw(st.integers(0, 5)), channels, height, width), []
    for _ in range(draw(st.integers(1, 4))):
        kernel, stride = draw(st.integers(1, 5)), draw(st.integers(1, 2))
        padding = draw(st.integers(0, kernel - 1))
        if min(height, width) + 2 * padding < kernel:
            kernel, padding = 1, 0
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        slope = draw(st.sampled_from([None, 0.01, 0.0, -1.5]))
        rows.append((draw(st.integers(1, 60)), kernel, stride, padding, draw(st.booleans()), slope))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    order = draw(st.permutations(range(4)))
    back = [order.index(d) for d in range(4)]
    return x.permute(order).contiguous().permute(back), layers_of(channels, rows)


@settings(max_examples=80, deadline=None)
@given(case=random_stack())
@needs_native
def test_random_stacks(case):
    x, layers = case
    found = small_convolutions(x, layers, backend="native")
    assert_near(found, x, layers)
    torch.testing.assert_close(found, small_convolutions(x, layers, backend="reference"), rtol=1e-4, atol=1e-4)


def differentiable(layers: list[ConvLayer]) -> list[Tensor]:
    tensors = [t for layer in layers for t in (layer.weight, layer.bias) if t is not None]
    return [t.requires_grad_() for t in tensors]


@pytest.mark.parametrize("name", ["head", "large kernels"])
def test_gradcheck(name):
    rows = [(min(row[0], 3), *row[1:]) for row in STACKS[name][1]]
    layers = layers_of(2, rows, torch.float64)
    x = torch.randn(2, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    tensors = differentiable(layers)

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return small_convolutions(x, layers)

    assert torch.autograd.gradcheck(run, (x, *tensors), nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(run, (x, *tensors))


def test_gradients_are_those_of_the_stack():
    x, layers = images("stem", 3).requires_grad_(), stack("stem")
    wanted = [x, *differentiable(layers)]
    ours, theirs = (torch.autograd.grad(run(x, layers).square().sum(), wanted) for run in (small_convolutions, plain))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


class Names(TorchFunctionMode):
    """Names of the functions called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def is_native(x: Tensor, layers: list[ConvLayer]) -> bool:
    with Names() as names:
        small_convolutions(x, layers)
    return any("small_convolutions" in name for name in names.seen)


@needs_native
def test_the_reference_serves_what_wants_a_gradient():
    x, layers = images("head", 2), stack("head")
    assert is_native(x, layers)
    for tensor in (x, layers[0].weight, layers[1].bias):
        tensor.requires_grad_()
        assert not is_native(x, layers)
        assert small_convolutions(x, layers).requires_grad
        with pytest.raises(BackendError, match="it has no gradients, and x, a weight or a bias requires one"):
            small_convolutions(x, layers, backend="native")
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert is_native(x, layers)
                assert not small_convolutions(x, layers, backend="native").requires_grad
        tensor.requires_grad_(False)


@needs_native
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_the_reference_serves_forward_mode_and_transforms():
    x, layers = images("head", 2), stack("head")
    _, tangent = torch.func.jvp(lambda x: small_convolutions(x, layers), (x,), (x,))
    _, expected = torch.func.jvp(lambda x: plain(x, layers), (x,), (x,))
    torch.testing.assert_close(tangent, expected)
    two = torch.stack([x, 2 * x])
    mapped = torch.func.vmap(lambda x: small_convolutions(x, layers))(two)
    torch.testing.assert_close(mapped[1], small_convolutions(2 * x, layers), rtol=1e-4, atol=1e-4)
    with pytest.raises(BackendError, match="no rules for forward-mode differentiation and function transforms"):
        torch.func.jvp(lambda x: small_convolutions(x, layers, backend="native"), (x,), (x,))


@needs_native
@pytest.mark.parametrize(
    ("shape", "rows", "reason"),
    [
        ((1, 129, 4, 4), [(2, 1, 1, 0, False, None)], "got 129 of 4 x 4"),
        ((1, 2, 4, 4), [(129, 1, 1, 0, False, None), (2, 1, 1, 0, False, None)], "got 129 of 4 x 4"),
        ((1, 2, 33, 4), [(2, 1, 2, 0, False, None)], "got 2 of 33 x 4"),
        ((1, 2, 4, 32), [(2, 2, 1, 1, False, None)], "got 2 of 5 x 33"),
        ((1, 1, 4, 4), [(1, 1, 1, 0, False, None)] * 17, "it takes at most 16 layers, got 17"),
    ],
)
def test_the_reference_serves_what_is_too_large(shape, rows, reason):
    x, layers = torch.randn(shape), layers_of(shape[1], rows)
    assert_near(small_convolutions(x, layers), x, layers)
    with pytest.raises(BackendError, match=f"the native backend cannot serve small_convolutions of .*{reason}"):
        small_convolutions(x, layers, backend="native")


@needs_native
def test_native_refuses_other_dtypes_and_devices():
    x, layers = images("mask", 2, dtype=torch.float64), stack("mask", torch.float64)
    with pytest.raises(BackendError, match=r"it computes in float32, and x is torch\.float64"):
        small_convolutions(x, layers, backend="native")
    layers = [layer._replace(weight=layer.weight.to("meta"), bias=layer.bias.to("meta")) for layer in layers]
    with pytest.raises(BackendError, match="it runs on the CPU, and x is on meta"):
        small_convolutions(x.to("meta"), layers, backend="native")
    assert small_convolutions(x.to("meta"), layers).shape == (2, 8, 8, 8)


@needs_native
@pytest.mark.parametrize("name", SMALL)
def test_opcheck(name):
    weights, biases, *rest, slopes = map(list, zip(*stack(name), strict=True))
    slopes = [1.0 if slope is None else slope for slope in slopes]
    torch.library.opcheck(
        torch.ops.icseg.small_convolutions.default,
        (images(name, 3), weights, biases, *rest, slopes, "native"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@needs_native
def test_compile_is_one_node():
    """Whole graphs; new values do not compile anew, and new numbers of images at most once."""
    torch.compiler.reset()
    recorder = EagerAndRecordGraphs()
    run = lambda x, layers: small_convolutions(x, layers)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend=recorder)
    for context in (torch.no_grad, torch.enable_grad):
        for count, seed in ((3, 0), (3, 1), (4, 0), (5, 0), (6, 2)):
            x, layers = images("stem", count), stack("stem", seed=seed)
            with context():
                assert torch.equal(compiled(x, layers), run(x, layers))
    assert len(recorder.graphs) <= 4
    for graph in recorder.graphs:
        called = [node for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
        assert [str(node.target) for node in called if "small_convolutions" in str(node.target)] == [
            "icseg.small_convolutions.default"
        ]
        assert not [node for node in called if "conv2d" in str(node.target)]


def test_compile_fullgraph_with_gradients():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(small_convolutions, fullgraph=True, backend=counter)
    for count in (2, 2, 3, 4):
        x, layers = images("head", count), stack("head")
        wanted = [x.requires_grad_(), *differentiable(layers)]
        ours, theirs = (
            torch.autograd.grad(run(x, layers).square().sum(), wanted) for run in (compiled, small_convolutions)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


def test_autocast_computes_in_float32(backend):
    x, layers = images("head", 3), stack("head")
    expected = small_convolutions(x, layers, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(small_convolutions(x, layers, backend=backend), expected)
        half = small_convolutions(x.bfloat16(), layers, backend=backend)
    assert half.dtype == torch.float32
    assert torch.equal(half, small_convolutions(x.bfloat16().float(), layers, backend=backend))


def test_autocast_has_gradients():
    x, layers = images("head", 2).bfloat16().requires_grad_(), stack("head")
    weight = layers[0].weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = small_convolutions(x, layers)
    grads = torch.autograd.grad(out.sum(), (x, weight))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("name", STACKS)
def test_flops_are_those_of_the_convolutions(backend, name):
    x, layers = images(name, 3), stack(name)
    with FlopCounterMode(display=False) as theirs:
        plain(x, layers)
    with FlopCounterMode(display=False) as ours, torch.no_grad():
        out = small_convolutions(x, layers, backend=backend)
    rows = [(layer.weight.shape[0], layer.weight.shape[2], layer.stride, layer.padding) for layer in layers]
    assert ours.get_total_flops() == theirs.get_total_flops() == flops.small_convolutions_flops(*x.shape, rows) > 0
    biased = [layer._replace(bias=torch.zeros(len(layer.weight))) for layer in layers]
    tensors = [x, out, *(t for layer in biased for t in layer[:2])]
    assert flops.small_convolutions_bytes(*x.shape, rows) == 4 * sum(t.numel() for t in tensors)


def test_flops_by_hand():
    """Two images of 3 channels to 12 of 14 x 14 pixels, 27 multiply-adds each."""
    assert flops.small_convolutions_flops(2, 3, 16, 16, [(12, 3, 1, 0)]) == 2 * 2 * 27 * 12 * 14**2


GOOD = ConvLayer(torch.zeros(4, 3, 3, 3), torch.zeros(4), 1, 1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"x": torch.zeros(3, 8, 8)},
            ValueError,
            r"x must have shape \[N, C, h, w\] with C, h, w > 0, got \[3, 8, 8\]",
        ),
        ({"x": torch.zeros(2, 3, 0, 8)}, ValueError, r"x must have .* got \[2, 3, 0, 8\]"),
        ({"x": torch.zeros(2, 3, 8, 8).int()}, TypeError, "x must be a floating-point tensor"),
        ({"x": None}, TypeError, "x must be a torch.Tensor, got NoneType"),
        ({"x": torch.zeros(2, 2, 8, 8)}, ValueError, r"weight must have shape \[Co, 2, k, k\] .* got \[4, 3, 3, 3\]"),
        (
            {"x": torch.zeros(2, 3, 8, 8).double()},
            TypeError,
            r"layers\[0\].weight must have the dtype of x, torch.float64",
        ),
        ({"layers": []}, ValueError, "layers must have at least one ConvLayer, got none"),
        ({"layers": GOOD}, TypeError, "layers must be a sequence of ConvLayer, got ConvLayer"),
        ({"layers": iter([GOOD])}, TypeError, "layers must be a sequence of ConvLayer, got list_iterator"),
        ({"layers": [GOOD.weight]}, TypeError, r"layers\[0\] must be a ConvLayer, got Tensor"),
        ({"layers": [tuple(GOOD)]}, TypeError, r"layers\[0\] must be a ConvLayer, got tuple"),
        ({"layers": [GOOD, GOOD]}, ValueError, r"layers\[1\].weight must have shape \[Co, 4, k, k\]"),
        ({"weight": None}, TypeError, r"layers\[0\].weight must be a torch.Tensor, got NoneType"),
        ({"weight": torch.zeros(4, 3, 3)}, ValueError, r"layers\[0\].weight must have shape .* got \[4, 3, 3\]"),
        ({"weight": torch.zeros(4, 3, 3, 2)}, ValueError, r"k from 1 to 5, got \[4, 3, 3, 2\]"),
        ({"weight": torch.zeros(4, 3, 6, 6)}, ValueError, r"k from 1 to 5, got \[4, 3, 6, 6\]"),
        ({"weight": torch.zeros(0, 3, 3, 3)}, ValueError, r"k from 1 to 5, got \[0, 3, 3, 3\]"),
        ({"weight": torch.zeros(4, 3, 3, 3).half()}, TypeError, r"layers\[0\].weight must have the dtype of x"),
        ({"weight": torch.zeros(4, 3, 3, 3, device="meta")}, ValueError, r"weight must be on cpu, .* got meta"),
        ({"bias": torch.zeros(3)}, ValueError, r"layers\[0\].bias must have shape \[4\], got \[3\]"),
        ({"bias": torch.zeros(4).double()}, TypeError, r"layers\[0\].bias must have the dtype of x"),
        ({"bias": 0.0}, TypeError, r"layers\[0\].bias must be a torch.Tensor, got float"),
        ({"stride": 3}, ValueError, r"layers\[0\].stride must be an integer from 1 to 2, got 3"),
        ({"stride": (1, 1)}, TypeError, r"layers\[0\].stride must be an integer from 1 to 2"),
        ({"stride": True}, TypeError, r"layers\[0\].stride must be an integer from 1 to 2, got True"),
        ({"padding": 3}, ValueError, r"layers\[0\].padding must be an integer from 0 to 2, got 3"),
        ({"padding": -1}, ValueError, r"layers\[0\].padding must be an integer from 0 to 2, got -1"),
        ({"replicate": 1}, TypeError, r"layers\[0\].replicate must be True or False, got 1"),
        ({"negative_slope": math.nan}, ValueError, r"layers\[0\].negative_slope must be a finite number, got nan"),
        ({"negative_slope": "0.1"}, TypeError, r"layers\[0\].negative_slope must be a finite number"),
        (
            {"x": torch.zeros(2, 3, 2, 8), "padding": 0},
            ValueError,
            "must fit the padded images of 2 x 8 pixels, got 3 x 3",
        ),
        ({"backend": "cuda"}, BackendError, "small_convolutions has no cuda backend"),
    ],
)
def test_errors(changes, error, message):
    of_layer = {name: value for name, value in changes.items() if name in ConvLayer._fields}
    others = {name: value for name, value in changes.items() if name not in of_layer}
    with pytest.raises(error, match=message):
        small_convolutions(**{"x": torch.zeros(2, 3, 8, 8), "layers": [GOOD._replace(**of_layer)], **others})


def test_integers_of_numpy_and_tuples_of_layers(backend):
    numpy = pytest.importorskip("numpy")
    layer = GOOD._replace(weight=torch.randn(4, 3, 3, 3), stride=numpy.int64(2), padding=numpy.int32(1))
    x = torch.randn(2, 3, 8, 8)
    expected = small_convolutions(x, [layer._replace(stride=2, padding=1)], backend=backend)
    assert torch.equal(small_convolutions(x, (layer,), backend=backend), expected)


@needs_native
def test_operators_called_directly_check_before_raw_pointers():
    op = torch.ops.icseg.small_convolutions
    x, weight, bias = torch.zeros(2, 3, 8, 8), torch.zeros(4, 3, 3, 3), torch.zeros(4)

    def call(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 1) -> Tensor:
        return op(x, [weight], [bias], [stride], [padding], [False], [1.0], "native")

    assert call(x, weight, bias).shape == (2, 4, 8, 8)
    for changed, message in (
        ((x.double(), weight, bias), r"x must be float32 \[N, C, h, w\] on the CPU"),
        ((x[0], weight, bias), r"x must be .* got \[3, 8, 8\]"),
        ((x, weight.double(), bias), "weight must be float32 of 4 dimensions on the CPU"),
        ((x, weight[0], bias), "weight must be float32 of 4 dimensions"),
        ((x, weight[:, :, :2], bias), r"weights must be \[Co, Ci, k, k\]"),
        ((x, weight[:, :2], bias), "weight must have 3 input channels"),
        ((x, weight, bias[:3]), r"bias must have shape \[4\]"),
        ((x, weight, bias, 0), "strides positive"),
    ):
        with pytest.raises(ValueError, match=message):
            call(*changed)
    for changed in (
        (x, weight, bias, 3),
        (x, weight, bias, 1, 3),
        (x[:, :, :0], weight, bias),
        (x, weight, bias, 1, -4),
    ):
        with pytest.raises(RuntimeError, match="native library: layers must be 1 to 16 convolutions"):
            call(*changed)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        op(x, [weight], [bias], [1, 1], [1], [False], [1.0], "native")
    with pytest.raises(RuntimeError, match="layers must be 1 to 16"):
        op(x, [], [], [], [], [], [], "native")


@needs_native
def test_impossible_sizes_of_the_entry():
    layer = native._packed(1).pack(0, 0, 3, 4, 3, 1, 1, 0, 1.0)
    size = ctypes.c_int64()
    for count, height, slots, message in (
        (0, 8, 1, "layers must be 1 to 16"),
        (1, 0, 1, "layers must be 1 to 16"),
        (1, 2**62, 1, "layers must be 1 to 16"),
        (1, 8, 0, "63 bits"),
        (1, 8, 2**62, "63 bits"),
    ):
        code = native._workspace(layer, count, height, 8, slots, ctypes.byref(size))
        with pytest.raises(RuntimeError, match=message):
            library.check(code)
    assert native._workspace(layer, 1, 8, 8, 2, ctypes.byref(size)) == 0

    def entry(count: int, workspace_bytes: int) -> int:
        return native._convolve(None, layer, 1, None, count, 8, 8, 0, 0, 0, 0, 2, None, workspace_bytes)

    for count, given_bytes, message in (
        (-1, size.value, "negative"),
        (2**62, size.value, "63 bits"),
        (0, 7, "workspace"),
    ):
        with pytest.raises(RuntimeError, match=message):
            library.check(entry(count, given_bytes))
    assert entry(0, size.value) == 0
