"""small_convolutions by its Triton kernel, on a CUDA device or in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from samples import DEVICE
from torch import Tensor
from torch._dynamo.testing import EagerAndRecordGraphs

from icseg_kernels import BackendError, ConvLayer, backend, small_convolutions, triton_launch
from icseg_kernels.small_convolutions import triton

pytestmark = pytest.mark.skipif(bool(triton_launch.missing()), reason="Triton kernels cannot run here")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, needs_cuda])]
# Input channels; output channels, kernel, stride, padding, replicate, negative slope of every layer: one to four layers
# of a launch, then five; kernels, strides and paddings of every kind; channels at, below and past 16.
STACKS: dict[str, tuple[int, list[tuple[int, int, int, int, bool, float | None]]]] = {
    "stem": (
        3,
        [(12, 3, 1, 0, False, 0.01), (16, 3, 1, 0, False, 0.01), (24, 2, 1, 0, False, 0.5), (9, 2, 1, 0, False, None)],
    ),
    "down": (20, [(33, 4, 2, 1, False, 0.01)]),
    "head": (5, [(20, 3, 1, 1, True, 0.01), (2, 1, 1, 0, False, None)]),
    "large": (2, [(5, 5, 1, 4, True, -0.5), (17, 5, 2, 2, False, 0.0), (16, 2, 1, 1, False, 2.0)]),
    "points": (1, [(1, 1, 2, 0, False, None)]),
    "five": (2, [(3, 2, 1, 1, i % 2 == 0, 0.3) for i in range(5)]),
}


@pytest.fixture(autouse=True)
def precise():
    """On a CUDA device the reference would round float32 to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stack(name: str, dtype: torch.dtype = torch.float32) -> list[ConvLayer]:
    """Of random weights that keep the size of values; every third has no bias."""
    channels, rows = STACKS[name]
    layers = []
    for i, (outputs, kernel, *rest) in enumerate(rows):
        weight = normal(outputs, channels, kernel, kernel, seed=i) / (channels * kernel**2) ** 0.5
        bias = None if i % 3 == 2 else normal(outputs, seed=10 + i).to(DEVICE, dtype)
        layers.append(ConvLayer(weight.to(DEVICE, dtype), bias, *rest))
        channels = outputs
    return layers


def images(name: str, count: int, height: int = 8, width: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(count, STACKS[name][0], height, width, seed=5).to(DEVICE, dtype)


def by(name: str, x: Tensor, layers: list[ConvLayer]) -> Tensor:
    return small_convolutions(x, layers, backend=name)


def exact(x: Tensor, layers: list[ConvLayer]) -> Tensor:
    wide = [layer._replace(weight=layer.weight.double(), bias=_double(layer.bias)) for layer in layers]
    return by("reference", x.double(), wide)


def _double(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.double()


def assert_as_exact(x: Tensor, layers: list[ConvLayer]) -> None:
    """Errors against float64 no larger than the reference's in the same dtype, but for a few roundings a term."""
    found, oracle = by("triton", x, layers), exact(x, layers)
    assert (found.dtype, found.shape) == (x.dtype, oracle.shape)
    assert found.is_contiguous()
    if oracle.numel() == 0:
        return
    terms = max(layer.weight[0].numel() for layer in layers)
    roundings = 2 * torch.finfo(x.dtype).eps * max(1.0, oracle.abs().max().item())
    if x.dtype == torch.float32:
        roundings *= terms**0.5
    allowed = 1.5 * (by("reference", x, layers).double() - oracle).abs().max().item() + roundings
    assert (found.double() - oracle).abs().max().item() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", STACKS)
def test_is_the_stack_of_convolutions(poisoned, name, dtype):
    """More groups of images than programs in the interpreter, so that slots are used again."""
    assert_as_exact(images(name, 3, dtype=dtype), stack(name, dtype))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_groups_of_several_images(poisoned, monkeypatch, count):
    """Of which the last is not full."""
    monkeypatch.setattr(triton, "_ENOUGH", 1)
    x, layers = images("stem", count, 7, 7), stack("stem")
    assert_as_exact(x, layers)
    together = by("triton", x, layers)
    monkeypatch.undo()
    for i in range(count):
        assert torch.equal(by("triton", x[i : i + 1], layers)[0], together[i])


def test_large_maps_take_several_tiles():
    layers = [layer._replace(padding=1) for layer in stack("head")[:1]]
    assert_as_exact(images("head", 1, 13, 32), layers)


@pytest.mark.skipif(not triton_launch.INTERPRETED, reason="float64 is for the interpreter")
def test_float64():
    x, layers = images("large", 2, dtype=torch.float64), stack("large", torch.float64)
    torch.testing.assert_close(by("triton", x, layers), exact(x, layers), rtol=1e-7, atol=1e-7)


@pytest.mark.gpu
@needs_cuda
def test_tf32_where_torch_allows_it():
    x, layers = images("down", 3), stack("down")
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        torch.testing.assert_close(by("triton", x, layers).double(), exact(x, layers), rtol=0, atol=2e-2)
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_window(bad):
    weights = (normal(20, 3, 3, 3).abs() + 0.1).to(DEVICE, torch.float32), torch.ones(4, 20, 1, 1, device=DEVICE)
    layers = [ConvLayer(weights[0], None, 1, 1, False, -0.5), ConvLayer(weights[1])]
    x = normal(2, 3, 7, 7).abs().to(DEVICE, torch.float32)
    clean = by("triton", x, layers)
    x[1, 2, 3, 3] = bad
    found = by("triton", x, layers)
    expected = math.nan if math.isnan(bad) else math.inf  # the slope is negative
    torch.testing.assert_close(found[1, :, 2:5, 2:5], found.new_full((4, 3, 3), expected), equal_nan=True)
    found[1, :, 2:5, 2:5] = clean[1, :, 2:5, 2:5]
    assert torch.equal(found, clean)


def test_strided_views():
    """Nothing but the images and weights themselves is read."""
    x, layers = images("stem", 2), stack("stem")[:2]
    expected = by("triton", x, layers)
    apart = torch.full((3, 10, 5, 10), math.nan, device=DEVICE)
    view = apart.permute(0, 2, 1, 3)[1:, 1:-1, 1:-1, 2:-1]
    view.copy_(x)
    for other in (view, x.mT.contiguous().mT, x.to(memory_format=torch.channels_last)):
        assert other.stride() != x.stride()
        assert torch.equal(by("triton", other, layers), expected)
    weights = [layer._replace(weight=torch.stack([layer.weight] * 2, dim=-1)[..., 0]) for layer in layers]
    assert torch.equal(by("triton", x, weights), expected)
    same = x[:1, :, :1].expand(2, -1, 8, -1)
    assert torch.equal(by("triton", same, layers), by("triton", same.contiguous(), layers))


@pytest.mark.skipif(DEVICE != "cpu", reason="address space without memory is the CPU's")
def test_offsets_beyond_32_bits():
    """2^33 bytes of address space, of which few pages are touched: images, then channels, far apart."""
    x, layers = images("stem", 2), stack("stem")[:1]
    expected = by("triton", x, layers)
    for strides in ((2**30, 56, 7, 1), (56, 2**29, 7, 1)):
        far = torch.empty(2**31 + 4096).as_strided(x.shape, strides)  # not written: no memory
        far.copy_(x)
        assert torch.equal(by("triton", far, layers), expected)


def test_the_same_bits_twice():
    x, layers = images("head", 3), stack("head")
    assert torch.equal(by("triton", x, layers), by("triton", x, layers))


def test_without_gradients():
    x, layers = images("points", 1), stack("points")
    layers[0].weight.requires_grad_()
    with pytest.raises(BackendError, match="it has no gradients, and x, a weight or a bias requires one"):
        by("triton", x, layers)
    with torch.no_grad():
        assert_as_exact(x, layers)


@pytest.mark.parametrize("name", ["head", "points"])
def test_opcheck(name):
    weights, biases, *rest, slopes = map(list, zip(*stack(name), strict=True))
    slopes = [1.0 if slope is None else slope for slope in slopes]
    torch.library.opcheck(
        torch.ops.icseg.small_convolutions.default,
        (images(name, 3), weights, biases, *rest, slopes, "triton"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compile_is_one_node():
    """Whole graphs; new values do not compile anew, and new numbers of images at most once."""
    torch.compiler.reset()
    recorder = EagerAndRecordGraphs()
    run = lambda x, layers: small_convolutions(x, layers, backend="triton")  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend=recorder)
    layers = stack("head")
    with torch.no_grad():
        for count in (2, 2, 3, 4):
            x = images("head", count)
            assert torch.equal(compiled(count * x, layers), run(count * x, layers))
    assert len(recorder.graphs) <= 2
    for graph in recorder.graphs:
        called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert [name for name in called if "conv" in name] == ["icseg.small_convolutions.default"]


@pytest.mark.gpu
@needs_cuda
def test_cuda_graph():
    x, layers = images("stem", 700), stack("stem")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        by("triton", x, layers)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = by("triton", x, layers)
    x.mul_(-1.5)
    graph.replay()
    assert torch.equal(captured, by("triton", x, layers))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_images(dtype):
    """More than there are slots: what programs leave in one another's caches shows."""
    x, layers = images("stem", 5000, 16, 16, dtype), stack("stem", dtype)
    assert_as_exact(x, layers)


@pytest.mark.parametrize("samples", [1, 64, 2304, 10**6])
@pytest.mark.parametrize("name", STACKS)
def test_plans(name, samples):
    """Slots hold the maps of their images, and tiles are powers of two that matrix products take."""
    channels, rows = STACKS[name]
    size = (channels, 16, 16)
    layers = [triton.Layer(*row[:5]) for row in rows[:4]]
    chosen = triton.plan(size, layers, samples, fused=False)
    elements = []
    for layer in layers:
        size = layer.size(size)
        elements.append(chosen.images * size[1] * size[2] * triton.padded(size[0]))
    for i, needed in enumerate(elements[:-1]):
        assert needed <= (chosen.slot - chosen.second if i % 2 else chosen.second)
    assert chosen.second % 16 == chosen.slot % 16 == 0
    for rows in chosen.rows:
        assert rows & (rows - 1) == 0
        assert 16 <= rows <= 128
    assert chosen.images == 1 or math.ceil(samples / chosen.images) >= 132


@pytest.mark.parametrize(
    ("shape", "row", "reason"),
    [
        ((1, 129, 4, 4), (2, 1, 1, 0, False, None), "got 129 of 4 x 4"),
        ((1, 2, 4, 4), (129, 1, 1, 0, False, None), "got 129 of 4 x 4"),
        ((1, 2, 33, 4), (2, 1, 2, 0, False, None), "got 2 of 33 x 4"),
    ],
)
def test_too_large(shape, row, reason):
    x, weight = torch.zeros(shape, device=DEVICE), torch.zeros(row[0], shape[1], row[1], row[1], device=DEVICE)
    with pytest.raises(BackendError, match=f"the triton backend cannot serve small_convolutions of .*{reason}"):
        by("triton", x, [ConvLayer(weight, None, *row[2:])])


def test_who_serves():
    x, layers = images("points", 1), stack("points")
    sizes = [(1, 8, 7), (1, 4, 4)]
    chosen = backend.select("small_convolutions", None, x, layers, sizes)
    assert (chosen == "triton") == (not triton_launch.INTERPRETED)
    layers = [layer._replace(weight=layer.weight.to("meta"), bias=layer.bias.to("meta")) for layer in layers]
    with pytest.raises(BackendError, match="it runs on CUDA devices, and x is on meta"):
        by("triton", x.to("meta"), layers)


def test_the_operator_called_directly_checks_sizes():
    op = torch.ops.icseg.small_convolutions
    x, weight = torch.zeros(1, 2, 4, 4, device=DEVICE), torch.zeros(3, 2, 3, 3, device=DEVICE)
    rest = ([1], [0], [False], [1.0], "triton")
    for wrong, bias, message in (
        (weight[:, :1], None, r"weight must have shape \[Co, 2, k, k\], got \[3, 1, 3, 3\]"),
        (weight.double(), None, "weights and biases must be torch.float32"),
        (weight, weight[0, 0, 0, :2], r"bias must have shape \[3\], got \[2\]"),
        (torch.zeros(3, 2, 5, 5, device=DEVICE), None, "weight must fit the padded images"),
    ):
        with pytest.raises(ValueError, match=message):
            op(x, [wrong], [bias], *rest)
