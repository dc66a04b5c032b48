"""The draw as Triton kernels: the reference's bits for any row, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import DEVICE
from torch import Tensor

from icseg_kernels import BackendError, gumbel_topk, triton_launch
from icseg_kernels.gumbel_topk import triton as gumbel_topk_triton
from icseg_kernels.philox import gumbel_noise

if triton_launch.missing():
    pytest.skip("; ".join(triton_launch.missing()), allow_module_level=True)

INF = float("inf")
NAN = float("nan")
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
interpreted = pytest.mark.skipif(not triton_launch.INTERPRETED, reason="float64 needs the interpreter")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random_logits(batch: int, size: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(batch, size, generator=generator, dtype=torch.float64) * scale).to(dtype).to(DEVICE)


def assert_equal_draws(logits: Tensor, k: int, **options: Any) -> None:
    """Indices, scores and kappa are those of the reference on the CPU, bit for bit; logsumexp within rounding."""
    ours = gumbel_topk(logits, k, backend="triton", **options)
    options = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in options.items()}
    expected = gumbel_topk(logits.cpu(), k, backend="reference", **options)
    assert torch.equal(ours.indices.cpu(), expected.indices)
    for name in ("scores", "kappa"):
        a, b = getattr(ours, name).cpu(), getattr(expected, name)
        assert torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))
    torch.testing.assert_close(ours.logsumexp.cpu(), expected.logsumexp, equal_nan=True)


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, the merging kernel's loops, the ranking kernel and the sort for rows that an interpreter can bear."""
    from icseg_kernels.gumbel_topk import triton_kernels

    monkeypatch.setattr(triton_kernels, "CHUNK", 256)
    monkeypatch.setattr(triton_kernels, "LARGEST_TILE", 256)
    monkeypatch.setattr(triton_kernels, "MERGED_AT_ONCE", 256)
    monkeypatch.setattr(gumbel_topk_triton, "RANKED_AT_ONCE", 70)
    monkeypatch.setattr(gumbel_topk_triton, "_RANKED", 300)


def hostile_logits(kind: str, size: int) -> Tensor:
    logits = random_logits(2, size)
    position = torch.arange(size, device=DEVICE)
    return {
        "normal": logits,
        "cold": logits * 20,
        "equal": torch.zeros_like(logits),
        "few values": logits.round(),  # -0 and 0 among them
        "one huge": torch.where(position == size // 2, 1e4, logits),
        "huge spread": logits * 1e30,
        "few possible": torch.where(position % 9 == 0, 0.5, -INF).expand(2, size),
        "nothing": torch.full_like(logits, -INF),
        "infinite and missing": torch.where(position % 17 == 3, INF, torch.where(position % 5 == 1, NAN, logits)),
        "a ramp": (-position / 100).expand(2, size),
    }[kind]


KINDS = ["normal", "cold", "equal", "few values", "one huge", "huge spread", "few possible", "nothing"]
KINDS += ["infinite and missing", "a ramp"]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
def test_draws_equal_the_reference(kind: str) -> None:
    logits = hostile_logits(kind, 150)
    assert_equal_draws(logits, 40, seed=5)
    assert_equal_draws(logits, 70, noise=0)


@pytest.mark.usefixtures("poisoned", "short_tiles")
@pytest.mark.parametrize("kind", ["normal", "few values", "few possible", "infinite and missing"])
def test_draws_from_chunks_equal_the_reference(kind: str) -> None:
    logits = hostile_logits(kind, 600)[:1]
    for k in (5, 90):  # a row's candidates as a tile, and as several
        assert_equal_draws(logits, k, seed=5)
    assert_equal_draws(logits, 130, noise=0)


@pytest.mark.usefixtures("poisoned", "short_tiles")
def test_a_large_k_is_sorted() -> None:
    assert_equal_draws(hostile_logits("few values", 400)[:1], 350, noise=0)
    assert_equal_draws(hostile_logits("few possible", 400)[:1], 400, seed=1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("batch", "size", "k"), [(2, 0, 0), (0, 5, 2), (1, 1, 1), (3, 5, 0), (1, 257, 257)])
def test_any_size(batch: int, size: int, k: int) -> None:
    assert_equal_draws(random_logits(batch, size), k, seed=k)


@pytest.mark.parametrize("seed", [-1, 2**64 - 1, -(2**63), 2**32 + 5])
def test_any_seed(seed: int) -> None:
    logits = random_logits(1, 30)
    assert_equal_draws(logits, 5, seed=seed)
    as_tensor = torch.tensor(seed - 2**64 if seed >= 2**63 else seed, device=DEVICE)
    assert_equal_draws(logits, 5, seed=as_tensor)


def test_narrow_logits() -> None:
    logits = random_logits(2, 60, torch.float16)
    logits[0, 5], logits[1, ::2], logits[1, 9] = NAN, -INF, INF
    assert_equal_draws(logits, 9, seed=3)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert_equal_draws(logits, 9, noise=gumbel_noise(1, 1, 60, device=DEVICE).to(dtype))


@pytest.mark.gpu
@needs_cuda
def test_bfloat16() -> None:
    logits = random_logits(3, 700, torch.bfloat16)
    logits[0, 5], logits[1, ::2], logits[2, 9] = NAN, -INF, INF
    assert_equal_draws(logits, 40, seed=3)
    assert_equal_draws(logits, 40, noise=gumbel_noise(1, 1, 700, device=DEVICE).bfloat16())


@interpreted
def test_float64() -> None:
    assert_equal_draws(random_logits(1, 80, torch.float64), 9, seed=3)
    assert_equal_draws(random_logits(1, 80, torch.float64).round(), 60, noise=0)


def test_any_strides() -> None:
    base = random_logits(6, 120)
    for logits in (base[::3, 10:90], base.t()[:2, ::2], base[:1].expand(2, 120), base[:2, :1].expand(2, 70)):
        batch, size = logits.shape
        assert_equal_draws(logits, min(3, size), seed=1)
        assert_equal_draws(logits, min(3, size), noise=base.t().contiguous().t()[:batch, :1])


def test_the_same_bits_twice_and_for_any_batch() -> None:
    logits = random_logits(2, 90)
    first, again = (gumbel_topk(logits, 9, seed=4, backend="triton") for _ in range(2))
    alone = gumbel_topk(logits[:1], 9, seed=4, backend="triton")
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[:1], c)


def gradients(logits: Tensor, noise: Tensor, k: int, backend: str) -> list[Tensor]:
    leaf, noise = logits.detach().requires_grad_(), noise.detach().requires_grad_()
    draw = gumbel_topk(leaf, k, noise=noise, backend=backend)
    upstream = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).view_as(x) for x in draw[1:]]
    return list(torch.autograd.grad(draw[1:], (leaf, noise), upstream))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients(dtype: torch.dtype) -> None:
    """Errors at most twice those of the reference in the same dtype."""
    logits, noise = random_logits(3, 1100, dtype)[:, ::2], gumbel_noise(2, 1, 550, device=DEVICE)
    logits[0, 3], logits[0, 4], logits[1] = NAN, -INF, -INF
    for k in (0, 70):
        ours, same = gradients(logits, noise, k, "triton"), gradients(logits, noise, k, "reference")
        exact = gradients(logits.double().cpu(), noise.double().cpu(), k, "reference")
        for a, b, c in zip(ours, same, exact, strict=True):
            assert float((a.cpu() - c).abs().max()) <= 2 * float((b.cpu() - c).abs().max()) + 1e-7


@interpreted
def test_gradcheck() -> None:
    logits = random_logits(2, 5, torch.float64).requires_grad_()
    noise = gumbel_noise(1, 2, 5, device=DEVICE).double().requires_grad_()

    def outputs(logits: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        draw = gumbel_topk(logits, 2, noise=noise, backend="triton")
        return draw.scores, draw.kappa, draw.logsumexp

    assert torch.autograd.gradcheck(outputs, (logits, noise), fast_mode=True, nondet_tol=0.0)


def test_an_index_that_does_not_exist_goes_nowhere() -> None:
    logits = random_logits(1, 9)
    indices = torch.tensor([[-1, 9, 10, -(2**63), 2**63 - 1, 3]], device=DEVICE)
    none, zero = torch.tensor([-1], device=DEVICE), torch.zeros(1, device=DEVICE)
    scores = torch.arange(1.0, 7.0, device=DEVICE).view(1, 6)
    for of_noise in (False, True):
        grad = gumbel_topk_triton.gumbel_topk_backward(logits, indices, none, zero, scores, zero, zero, of_noise)
        assert grad.tolist() == [[0.0] * 3 + [6.0] + [0.0] * 5]


def test_opcheck() -> None:
    ops, logits = torch.ops.icseg, random_logits(1, 9)
    tests = ("test_schema", "test_faketensor")
    seed = torch.tensor(1, device=DEVICE)
    torch.library.opcheck(ops.gumbel_topk.default, (logits, 3, seed, None, "triton"), test_utils=tests)
    indices, scores, logsumexp, kappa, kappa_index = ops.gumbel_topk(logits, 3, seed, None, "triton")
    arguments = (logits, indices, kappa_index, logsumexp, scores, logsumexp, kappa, False, "triton")
    torch.library.opcheck(ops.gumbel_topk_backward.default, arguments, test_utils=tests)


def test_compiles_whole_with_gradients() -> None:
    def draw(logits: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        top = gumbel_topk(logits, 4, seed=seed, backend="triton")
        return top.indices, top.scores, top.kappa, top.logsumexp

    torch.compiler.reset()
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    logits, seed = random_logits(1, 30).requires_grad_(), torch.tensor(1, device=DEVICE)
    found = [call(logits, seed) for call in (draw, compiled)]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    grads = [torch.autograd.grad(sum(x.sum() for x in outputs[1:]), logits)[0] for outputs in found]
    assert torch.equal(*grads)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("size", [1000, 30_000])
def test_cuda_graph_replays_with_a_new_seed(size: int) -> None:
    logits, seed = random_logits(3, size).requires_grad_(), torch.tensor(1, device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        draw = gumbel_topk(logits, 8, seed=seed, backend="triton")
        return *draw, torch.autograd.grad(draw.scores.sum() + draw.logsumexp.sum(), logits)[0]

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
        assert_equal_draws(logits.detach(), 8, seed=seed)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("size", [8192, 16_384, 100_000])
def test_full_tiles_equal_the_reference(size: int) -> None:
    for kind in KINDS:
        logits = hostile_logits(kind, size)
        for k in (64, 256, 600, 5000):
            assert_equal_draws(logits, k, seed=k)
            assert_equal_draws(logits, k, noise=0)


def test_what_it_does_not_serve() -> None:
    with pytest.raises(BackendError, match="it runs on CUDA devices, and logits is on meta"):
        gumbel_topk(torch.empty(2, 3, device="meta"), 1, seed=0, backend="triton")
    if DEVICE == "cuda":
        with pytest.raises(BackendError, match="it computes in float32, float16 and bfloat16, and logits is"):
            gumbel_topk(torch.zeros(2, 3, dtype=torch.float64, device=DEVICE), 1, seed=0, backend="triton")
    assert gumbel_topk_triton.unsupported_count(2**31) == [
        "it draws from at most 2147450880 candidates, got 2147483648"
    ]
