"""sample_patches as Triton kernels: the reference's bits, and its gradients, for any map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import DEVICE
from torch import Tensor

from icseg_kernels import BackendError, sample_patches, triton_launch
from icseg_kernels.numerics import scalar
from icseg_kernels.patches import sample_reference, sample_triton
from icseg_kernels.patches.windows import Windows, candidate_grid
from icseg_kernels.philox import gumbel_noise

if triton_launch.missing():
    pytest.skip("; ".join(triton_launch.missing()), allow_module_level=True)

INF = float("inf")
NAN = float("nan")
interpreted = pytest.mark.skipif(not triton_launch.INTERPRETED, reason="float64 needs the interpreter")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PLAIN = Windows(4, 1, 0, 0, 1.0, 0.0)
BLURRED = Windows(5, 2, 1, 3, 0.1, 1.0)
WINDOWS = [
    PLAIN,
    BLURRED,
    Windows(1, 3, 0, 0, 0.37, 0.0),
    Windows(3, 1, 5, 4, 1.0, 0.3),  # windows wholly in the padding
    Windows(8, 3, 1, 0, 1.0, 2.0),  # a blur wider than the map
]


def random_map(batch: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 1, height, width, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def hostile_map(kind: str, batch: int, height: int, width: int) -> Tensor:
    map_ = random_map(batch, height, width)
    strange = torch.where(map_ < 0.1, INF, torch.where(map_ < 0.2, -INF, torch.where(map_ < 0.3, NAN, map_ - 0.6)))
    return {
        "random": map_,
        "ties": (4 * map_).floor() - 1,
        "constant": torch.full_like(map_, 0.7),
        "not finite": strange,
        "negative": torch.where(map_ < 0.05, INF, -1 - map_),
        "hardly finite": torch.where(map_ < 0.8, NAN, map_ + 1),
        "nothing finite": torch.full_like(map_, NAN),
    }[kind]


def candidates(weights: Tensor, windows: Windows) -> int:
    size, stride, before, after, _, _ = windows
    rows, columns = candidate_grid(weights.shape[2], weights.shape[3], size, stride, (before, after))
    return rows * columns


def assert_equal_draws(weights: Tensor, windows: Windows, k: int, seed: Any = 3, noise: Tensor | None = None) -> None:
    """What the reference draws on the CPU, bit for bit."""
    seed = None if noise is not None else seed
    ours = sample_triton.sample_patches(weights, k, windows, seed, noise)
    settings = windows._replace(temperature=float(windows.temperature))
    seed, noise = (x.cpu() if isinstance(x, Tensor) else x for x in (seed, noise))
    expected = sample_reference.sample_patches(weights.cpu(), k, settings, seed, noise)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.fixture(params=["one launch", "a launch for each step"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve maps as small ones, then as large ones."""
    if request.param != "one launch":
        monkeypatch.setattr(sample_triton, "_SMALL", 0)


@pytest.fixture
def narrow_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are narrower than the map."""
    from icseg_kernels.patches import sample_triton_kernels

    monkeypatch.setattr(sample_triton_kernels, "block", lambda columns, small: (4, 8))


@pytest.mark.usefixtures("launches", "poisoned")
@pytest.mark.parametrize("windows", WINDOWS)
def test_draws_equal_the_reference(windows: Windows) -> None:
    weights = random_map(1, 13, 18)
    assert_equal_draws(weights, windows, min(9, candidates(weights, windows)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["ties", "constant", "not finite", "negative", "hardly finite", "nothing finite"])
def test_logits_of_hostile_maps_equal_the_reference(kind: str) -> None:
    weights = hostile_map(kind, 1, 9, 14)
    for windows in (WINDOWS[0], WINDOWS[3]):
        actual = sample_triton.window_logits(weights, windows).cpu()
        assert torch.equal(actual, sample_reference.window_logits(weights.cpu(), windows))


@pytest.mark.usefixtures("launches", "narrow_blocks", "poisoned")
def test_maps_wider_and_higher_than_a_block() -> None:
    weights = hostile_map("not finite", 1, 6, 13)
    assert_equal_draws(weights, BLURRED, 5)
    assert_equal_gradients(weights, BLURRED)


@pytest.mark.usefixtures("launches")
def test_strided_and_narrow_maps() -> None:
    base = random_map(4, 20, 30, torch.float16)
    assert_equal_draws(base.transpose(2, 3)[1:3, :, ::3, 1::2], PLAIN, 5)
    assert_equal_draws(base[:1, :, :1].expand(2, 1, 9, 30), PLAIN, 5)


@interpreted
@pytest.mark.usefixtures("launches")
def test_float64() -> None:
    assert_equal_draws(random_map(1, 9, 12, torch.float64), BLURRED, 5)


@pytest.mark.usefixtures("launches")
def test_given_seeds_noise_and_temperatures() -> None:
    weights = random_map(1, 9, 12)
    count = candidates(weights, PLAIN)
    assert_equal_draws(weights, PLAIN, 5, seed=torch.tensor(-7, device=DEVICE))
    assert_equal_draws(weights, PLAIN, 5, seed=None)
    noise = gumbel_noise(1, 1, count, device=DEVICE).masked_fill(torch.arange(count, device=DEVICE) > 3, -INF)
    assert_equal_draws(weights, PLAIN, 6, noise=noise)
    assert_equal_draws(weights, PLAIN._replace(temperature=scalar(0.3, weights.device)), 5)


@pytest.mark.usefixtures("launches", "poisoned")
@pytest.mark.parametrize(("batch", "k"), [(0, 3), (2, 0)])
def test_no_samples_and_no_draws(batch: int, k: int) -> None:
    drawn = sample_patches(random_map(batch, 6, 7), k, 3, seed=1, backend="triton")
    assert drawn.coords.shape == (batch, k, 2)


def gradient(weights: Tensor, windows: Windows, indices: Tensor, grad: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        return sample_triton.sample_patches_backward(grad, indices, weights, windows)
    leaf = weights.detach().requires_grad_()
    logits = sample_reference.window_logits(leaf, windows).gather(1, indices.clamp(min=0))
    return torch.autograd.grad(logits, leaf, grad.masked_fill(indices < 0, 0.0))[0]


def assert_equal_gradients(weights: Tensor, windows: Windows) -> None:
    """Errors at most four times those of the reference in the same dtype, and rounding of the parts that cancel."""
    batch, k = weights.shape[0], 5
    generator = torch.Generator().manual_seed(2)
    order = torch.rand(batch, candidates(weights, windows), generator=generator).argsort(1)
    indices, grad = order[:, :k].contiguous(), torch.randn(batch, k, generator=generator)
    indices[:, 1] = -1
    grad = grad.double() if weights.dtype == torch.float64 else grad
    ours = gradient(weights, windows, indices.to(DEVICE), grad.to(DEVICE), "triton").cpu()
    assert ours.dtype == weights.dtype
    same = gradient(weights.cpu(), windows, indices, grad, "reference")
    exact = gradient(weights.double().cpu(), windows, indices, grad.double(), "reference")
    maxima = sample_reference.window_logits(weights.double().cpu(), windows._replace(blur_sigma=0.0, temperature=1.0))
    parts = float(grad.abs().sum()) / float(windows.temperature) * (1e6 if float(maxima.max()) < 0.5 else 1.0)
    rounding = torch.finfo(weights.dtype).eps * parts
    assert float((ours - exact).abs().max()) <= 4 * float((same - exact).abs().max()) + 4 * rounding


@pytest.mark.usefixtures("launches", "poisoned")
@pytest.mark.parametrize("windows", WINDOWS[1:4])
def test_gradients(windows: Windows) -> None:
    assert_equal_gradients(random_map(1, 9, 14), windows)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["ties", "constant", "not finite", "negative", "hardly finite", "nothing finite"])
def test_gradients_of_hostile_maps(kind: str) -> None:
    dtype = torch.float64 if triton_launch.INTERPRETED else torch.float32
    assert_equal_gradients(hostile_map(kind, 1, 9, 14).to(dtype), WINDOWS[3])


def test_gradients_of_narrow_and_strided_maps() -> None:
    assert_equal_gradients(random_map(2, 20, 18, torch.float16).transpose(2, 3)[1:, :, ::2], BLURRED)


@interpreted
@pytest.mark.parametrize("windows", [PLAIN._replace(stride=2), Windows(3, 2, 1, 2, 0.5, 1.0)])
def test_gradcheck(windows: Windows) -> None:
    weights = (random_map(1, 6, 7, torch.float64) + 0.1).requires_grad_()
    noise = gumbel_noise(0, 1, candidates(weights, windows)).double().requires_grad_()
    size, stride, before, after, temperature, sigma = windows
    options: dict[str, Any] = {"stride": stride, "padding": (before, after), "blur_sigma": sigma}

    def outputs(weights: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        drawn = sample_patches(
            weights, 2, size, temperature=temperature, noise=noise, differentiable=True, backend="triton", **options
        )
        assert drawn.weights is not None
        return drawn.weights, drawn.scores

    assert torch.autograd.gradcheck(outputs, (weights, noise), fast_mode=True, nondet_tol=0.0)


def test_an_index_that_does_not_exist_has_no_gradient() -> None:
    weights, count = random_map(1, 8, 9), candidates(random_map(1, 8, 9), PLAIN)
    indices = torch.tensor([[-1, count, count + 1, -(2**63), 2**63 - 1]], device=DEVICE)
    grad = sample_triton.sample_patches_backward(torch.ones(1, 5, device=DEVICE), indices, weights, PLAIN)
    assert torch.equal(grad, torch.zeros_like(weights))


def test_the_same_bits_twice() -> None:
    weights = random_map(1, 9, 12).requires_grad_()
    found = []
    for _ in range(2):
        drawn = sample_patches(weights, 4, 3, blur_sigma=0.5, seed=1, differentiable=True, backend="triton")
        assert drawn.weights is not None
        loss = (drawn.weights * torch.arange(4.0, device=DEVICE)).sum()
        found.append((*drawn, *torch.autograd.grad(loss, weights)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_opcheck() -> None:
    weights, half = random_map(1, 7, 8), torch.tensor(0.5, dtype=torch.float64, device=DEVICE)
    tests = ("test_schema", "test_faketensor")
    ops, seed = torch.ops.icseg, torch.tensor(1, device=DEVICE)
    torch.library.opcheck(
        ops.sample_patches.default, (weights, 2, 4, 2, 1, 2, half, 0.0, seed, None, "triton"), test_utils=tests
    )
    grad, indices = torch.ones(1, 2, device=DEVICE), torch.tensor([[3, -1]], device=DEVICE)
    arguments = (grad, indices, weights, 4, 2, 1, 2, half, 0.0, "triton")
    torch.library.opcheck(ops.sample_patches_backward.default, arguments, test_utils=tests)


def test_compiles_whole_with_gradients() -> None:
    def draw(weights: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        drawn = sample_patches(weights, 3, 4, stride=2, seed=seed, differentiable=True, backend="triton")
        assert drawn.weights is not None
        return drawn.coords, drawn.scores, drawn.weights

    torch.compiler.reset()
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    weights, seed = random_map(1, 9, 12).requires_grad_(), torch.tensor(1, device=DEVICE)
    found = [call(weights, seed) for call in (draw, compiled)]
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*(torch.autograd.grad(outputs[2][:, 0].sum(), weights) for outputs in found))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("side", [40, 300])
def test_cuda_graph_replays_with_a_new_seed(side: int) -> None:
    weights, seed = random_map(2, side, side).requires_grad_(), torch.tensor(1, device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        drawn = sample_patches(weights, 8, 16, blur_sigma=2.0, seed=seed, differentiable=True, backend="triton")
        assert drawn.weights is not None
        return *drawn, torch.autograd.grad(drawn.weights[:, 0].sum(), weights)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (1, 2):
        seed.fill_(value)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(64, 48), (256, 256), (300, 1000)])
def test_usual_maps(size: tuple[int, int], dtype: torch.dtype) -> None:
    weights = random_map(2, *size, dtype)
    for windows in (Windows(16, 1, 0, 0, 0.1, 0.0), Windows(8, 2, 3, 4, 0.3, 4.0)):
        for k in (64, 600):
            assert_equal_draws(weights, windows, k)
        assert_equal_gradients(weights, windows)


def test_what_it_does_not_serve() -> None:
    with pytest.raises(BackendError, match="it runs on CUDA devices, and weights is on meta"):
        sample_patches(torch.empty(1, 1, 8, 8, device="meta"), 1, 4, seed=0, backend="triton")
    assert sample_triton.unsupported(random_map(1, 2, 2), 2**31)[-1].startswith("it draws from at most 2147450880")
