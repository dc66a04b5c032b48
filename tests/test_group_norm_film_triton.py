"""group_norm_film by its Triton kernels, on a CUDA device or in Triton's interpreter."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from samples import DEVICE
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from icseg_kernels import BackendError, backend, group_norm_film, triton_launch
from icseg_kernels.group_norm_film import triton

pytestmark = pytest.mark.skipif(bool(triton_launch.missing()), reason="Triton kernels cannot run here")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
interpreted = pytest.mark.skipif(not triton_launch.INTERPRETED, reason="float64 is for the interpreter")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, needs_cuda])]
# N, C, spatial, groups: sizes below, at and past a power of two, one pixel, one value
SHAPES = [
    (2, 4, (4, 8), 2),
    (1, 6, (7, 5), 2),
    (3, 4, (), 2),
    (1, 21, (1,), 1),
    (1, 1, (1, 1), 1),
    (1, 2, (2, 3, 17), 1),
]
FILMS = [("channel", "sample"), ("none", "channel"), ("sample", "none"), ("none", "none")]


@pytest.fixture(params=["whole", "cut"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Groups in one tile, and cut into several tiles, some programs of which have more than one."""
    if request.param == "cut":
        monkeypatch.setattr(triton, "MOST_VALUES", 0)
        monkeypatch.setattr(triton, "MOST_PARTS", 4)
        monkeypatch.setattr(triton, "_TILE", 32)
    return request.param


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(
    samples: int, channels: int, spatial: tuple[int, ...], kinds: tuple[str, str], dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    shapes = {"none": None, "channel": (channels,), "sample": (samples, channels)}
    gain, bias = (None if shapes[kind] is None else normal(*shapes[kind], seed=i) for i, kind in enumerate(kinds, 1))
    x = 2 * normal(samples, channels, *spatial) + 1
    x, gain, bias = (None if t is None else t.to(DEVICE, dtype) for t in (x, gain, bias))
    return x, gain, bias


def with_gradients(run: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], double: bool = False) -> list[Tensor]:
    """The output of run(*inputs), and the gradients of a fixed weighted sum of it."""
    leaves = [None if t is None else (t.double() if double else t).detach().requires_grad_() for t in inputs]
    out = run(*leaves)
    weight = normal(*out.shape, seed=9).to(out)
    return [out.detach(), *torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], weight)]


def by(name: str, groups: int, activation: str | None = "gelu") -> Callable[..., Tensor]:
    return lambda x, gain, bias: group_norm_film(x, groups, gain, bias, activation=activation, backend=name)


def assert_as_exact(shape: tuple[int, int, tuple[int, ...], int], kinds: tuple[str, str], activation, dtype) -> None:
    """Errors against float64 no larger than the reference's in the same dtype, but for a few roundings."""
    samples, channels, spatial, groups = shape
    inputs = arguments(samples, channels, spatial, kinds, dtype)
    found = with_gradients(by("triton", groups, activation), inputs)
    theirs = with_gradients(by("reference", groups, activation), inputs)
    exact = with_gradients(by("reference", groups, activation), inputs, double=True)
    assert found[0].is_contiguous()
    for ours, references, oracle in zip(found, theirs, exact, strict=True):
        assert (ours.shape, ours.dtype) == (oracle.shape, references.dtype)
        scale = max(1.0, oracle.abs().max().item())
        allowed = 1.5 * (references.double() - oracle).abs().max().item() + 8 * torch.finfo(dtype).eps * scale
        assert (ours.double() - oracle).abs().max().item() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_as_exact_as_the_reference(cut, poisoned, shape, dtype):
    assert_as_exact(shape, ("channel", "sample"), "gelu", dtype)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("kinds", FILMS)
def test_any_gain_bias_and_activation(cut, kinds, activation):
    assert_as_exact((2, 4, (5,), 2), kinds, activation, torch.float32)


@interpreted
def test_gradcheck(cut, monkeypatch):
    monkeypatch.setattr(triton, "_TILE", 8)
    inputs = [t.requires_grad_() for t in arguments(1, 2, (5,), FILMS[0], torch.float64)]
    assert torch.autograd.gradcheck(by("triton", 1), inputs, nondet_tol=0.0, fast_mode=cut == "cut")


@interpreted
def test_float64_is_the_reference(cut):
    inputs = arguments(2, 6, (7, 5), ("sample", "channel"), torch.float64)
    run = lambda name: lambda x, g, b: group_norm_film(x, 2, g, b, eps=2.0**-17, activation="gelu", backend=name)  # noqa: E731
    for ours, theirs in zip(*(with_gradients(run(name), inputs) for name in ("triton", "reference")), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_groups_larger_than_a_program_holds():
    """Those of the sizes that launches cut: more tiles than parts, and channels of several tiles."""
    x = (normal(1, 2, 16384 + 77) + 3).to(DEVICE, torch.float32)
    assert triton.forward_tile(2, x.shape[2]).parts > 1 < triton.backward_tile(2, x.shape[2]).parts
    gain, bias = normal(2, seed=1).to(x), normal(2, seed=2).to(x)
    found = with_gradients(by("triton", 1, None), (x, gain, bias))
    exact = with_gradients(by("reference", 1, None), (x, gain, bias), double=True)
    for ours, oracle in zip(found, exact, strict=True):
        tolerance = 1e-5 * max(1.0, oracle.abs().max().item())
        torch.testing.assert_close(ours.double(), oracle, rtol=0, atol=tolerance)


@pytest.mark.parametrize("offset", [1e3, 1e6])
def test_large_means_lose_about_as_much_as_torchs(cut, offset):
    x = (normal(2, 2, 11, 13) + offset).to(DEVICE, torch.float32)
    exact = F.group_norm(x.double(), 1)
    ours = (group_norm_film(x, 1, backend="triton").double() - exact).abs().max()
    theirs = max((group_norm_film(x, 1, backend="reference").double() - exact).abs().max(), 1e-6)
    assert ours <= 3 * theirs


def test_constant_groups_are_their_bias(cut):
    x, bias = torch.full((2, 4, 3, 3), 1e4, device=DEVICE), normal(2, 4).to(DEVICE, torch.float32)
    out = group_norm_film(x, 2, torch.full((4,), 1e3, device=DEVICE), bias, backend="triton")
    assert torch.equal(out, bias[:, :, None, None].expand_as(x))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_group(cut, bad):
    x = normal(2, 4, 5, 5).to(DEVICE, torch.float32)
    clean = group_norm_film(x, 2, activation="gelu", backend="triton")
    x[1, 3, 2, 2] = bad
    out = group_norm_film(x, 2, activation="gelu", backend="triton")
    assert out[1, 2:4].isnan().all()
    out[1, 2:4] = clean[1, 2:4]
    assert torch.equal(out, clean)


def test_gelu_of_the_ends():
    """As torch has it: of -inf NaN."""
    values = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 9.0, -9.0, -40.0], device=DEVICE)
    out = group_norm_film(
        torch.zeros(7, 1, 1, device=DEVICE), 1, None, values[:, None], activation="gelu", backend="triton"
    )
    torch.testing.assert_close(out.flatten(), F.gelu(values.double()).float(), equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("samples", "channels", "spatial", "groups"), [(0, 4, (3, 3), 2), (2, 4, (0, 3), 2), (2, 0, (3,), 1)]
)
def test_empty(poisoned, samples, channels, spatial, groups):
    inputs = arguments(samples, channels, spatial, ("channel", "sample"), torch.float32)
    out, *grads = with_gradients(by("triton", groups), inputs)
    assert out.shape == inputs[0].shape
    for grad, leaf in zip(grads, inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_strided_views(cut):
    """Read where they lie: channels last, cropped, transposed, expanded; of any gain and bias."""
    x, gain, bias = arguments(2, 4, (4, 3), ("channel", "sample"), torch.float32)
    expected = with_gradients(by("triton", 2), (x, gain, bias))
    last = x.to(memory_format=torch.channels_last)
    cropped = F.pad(x, (1, 2, 1, 1), value=math.nan)[..., 1:-1, 1:-2]
    columns = x.mT.contiguous().mT
    every = torch.stack([gain, gain], dim=1)[:, 0], torch.stack([bias, bias], dim=1).transpose(1, 2)[..., 0]
    for view, films in ((last, every), (cropped, (gain, bias)), (columns, every)):
        assert view.stride() != x.stride()
        for found, wanted in zip(with_gradients(by("triton", 2), (view, *films)), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
    wide, same = x[:, :1, :, :1].expand(2, 4, 4, 3), bias[:1].expand(2, 4)
    assert torch.equal(by("triton", 2)(wide, gain, same), by("triton", 2)(wide.contiguous(), gain, bias[0]))


def test_strided_gradient(cut):
    x = normal(2, 4, 3, 5).to(DEVICE, torch.float32).requires_grad_()
    slanted = normal(1, 5, 4, 3).to(x).expand(2, 5, 4, 3).permute(0, 2, 3, 1)
    out = group_norm_film(x, 2, activation="gelu", backend="triton")
    (found,) = torch.autograd.grad(out, x, slanted, retain_graph=True)
    (expected,) = torch.autograd.grad(out, x, slanted.contiguous())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE != "cpu", reason="address space without memory is the CPU's")
def test_offsets_beyond_32_bits():
    """2^33 bytes of address space, of which few pages are touched: samples, gains and pixels far apart."""
    storage = torch.empty(2**31 + 64)  # not written: no memory
    gain = storage.as_strided((2, 4), (2**31, 1))
    gain.copy_(torch.arange(8.0).view(2, 4))
    x = normal(2, 4, 3).float()
    assert torch.equal(by("triton", 2)(x, gain, None), by("triton", 2)(x, gain.clone(), None))
    far = torch.empty(2**31 + 64).as_strided((1, 4, 3), (1, 1, 2**30))
    far.copy_(x[:1])
    assert torch.equal(by("triton", 2)(far, None, None), by("triton", 2)(x[:1], None, None))


def test_gain_and_bias_of_other_dtypes():
    x, gain, bias = arguments(2, 4, (3, 3), ("channel", "sample"), torch.float32)
    out = group_norm_film(x, 2, gain.half(), bias.double(), backend="triton")
    torch.testing.assert_close(out, by("reference", 2, None)(x, gain.half(), bias.double()), rtol=1e-5, atol=1e-5)


def test_the_same_bits_twice_and_in_any_company(cut):
    x, gain, bias = arguments(2, 4, (9, 5), ("channel", "sample"), torch.float32)
    first, second = (with_gradients(by("triton", 2), (x, gain, bias)) for _ in range(2))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
    assert torch.equal(by("triton", 2)(x[1:2], gain, bias[1:2]), first[0][1:2])


def test_opcheck(cut):
    x, gain, bias = arguments(2, 4, (3, 3), ("channel", "sample"), torch.float32)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    stats = torch.rand(2, 2, 2, device=DEVICE)
    for *films, activation in ((gain, bias, "gelu"), (None, None, None)):
        options = (*films, activation)
        torch.library.opcheck(
            torch.ops.icseg.group_norm_film.default, (x, 2, *options, 1e-5, "triton"), test_utils=tests
        )
        torch.library.opcheck(
            torch.ops.icseg.group_norm_film_backward.default, (x, x, stats, 2, *options, "triton"), test_utils=tests
        )


def test_compile_fullgraph():
    """Values and gradients; new values do not compile anew, and new sizes at most once."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(by("triton", 2), fullgraph=True, backend=counter)
    for samples, factor in ((3, 1.0), (3, -2.0), (4, 1.0), (5, 0.5)):
        inputs = [factor * t for t in arguments(samples, 4, (3, 3), ("channel", "sample"), torch.float32)]
        expected = with_gradients(by("triton", 2), inputs)
        for ours, theirs in zip(with_gradients(compiled, inputs), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert counter.frame_count <= (1 if samples == 3 else 2)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("length", [64, 20_000])
def test_cuda_graph(length):
    inputs = arguments(2, 8, (length,), ("channel", "sample"), torch.float32)
    run = lambda: with_gradients(by("triton", 4), inputs)  # noqa: E731
    weight = normal(*inputs[0].shape, seed=9).to(inputs[0])

    def capturable() -> tuple[Tensor, ...]:
        leaves = [t.requires_grad_() for t in inputs]
        out = by("triton", 4)(*leaves)
        return out, *torch.autograd.grad(out, leaves, weight)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        capturable()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = capturable()
    with torch.no_grad():
        inputs[0].mul_(-1.5)
    graph.replay()
    for ours, theirs in zip(captured, run(), strict=True):
        assert torch.equal(ours, theirs)


def test_tiles_cover_their_group():
    for each in (1, 2, 3, 8, 12, 100, 5000):
        for length in (1, 2, 49, 64, 3000, 5000, 70_000):
            for tile in (triton.forward_tile(each, length), triton.backward_tile(each, length)):
                for size in tile[:3]:
                    assert size & (size - 1) == 0 < size <= 16384
                assert tile.warps <= 16
                if tile.parts:
                    assert tile.channels * tile.pixels <= triton._TILE
                    assert tile.parts & (tile.parts - 1) == 0
                    assert tile.parts <= triton.MOST_PARTS
                else:
                    assert tile.channels >= each
                    assert tile.pixels >= length
                    assert tile.channels * tile.pixels <= triton.MOST_VALUES


def test_who_serves():
    x = torch.zeros(2, 4, 3, device=DEVICE)
    assert (backend.select("group_norm_film", None, x) == "triton") == (not triton_launch.slower())
    with pytest.raises(BackendError, match="it runs on CUDA devices, and x is on meta"):
        group_norm_film(x.to("meta"), 2, backend="triton")


@pytest.mark.gpu
@needs_cuda
def test_float64_is_refused():
    with pytest.raises(BackendError, match=r"it computes in float32, float16 and bfloat16, and x is torch\.float64"):
        group_norm_film(torch.zeros(2, 4, 3, device=DEVICE).double(), 2, backend="triton")


def test_operators_called_directly_check_sizes():
    x, stats = torch.zeros(2, 8, 3, device=DEVICE), torch.zeros(2, 2, 4, device=DEVICE)
    op, backward = torch.ops.icseg.group_norm_film, torch.ops.icseg.group_norm_film_backward
    with pytest.raises(ValueError, match=r"gain must be on .*, \[C\] or \[N, C\] of x"):
        op(x, 4, x.new_zeros(7), None, None, 1e-5, "triton")
    with pytest.raises(ValueError, match="groups must be at least 1 and divide the 8 channels of x, got 3"):
        op(x, 3, None, None, None, 1e-5, "triton")
    for grad, saved in ((x[:1], stats), (x, stats[:, :1])):
        with pytest.raises(ValueError, match="grad and stats must be those of x"):
            backward(grad, x, saved, 4, None, None, None, "triton")
