"""The native sample_patches: the reference's draw bit for bit, its gradient within rounding."""

import ctypes
import math
import threading
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from icseg_kernels import BackendError, library, sample_patches
from icseg_kernels.patches import sample_native, sample_reference
from icseg_kernels.patches.windows import Windows, candidate_grid
from icseg_kernels.philox import gumbel_noise

INF = float("inf")
NAN = float("nan")
INT64 = torch.iinfo(torch.int64)
WINDOWS = [  # p, stride, before, after, temperature, blur_sigma
    Windows(1, 1, 0, 0, 1.0, 0.0),
    Windows(4, 1, 0, 0, 0.37, 0.0),
    Windows(2, 3, 0, 2, 1.0, 0.0),
    Windows(8, 8, 1, 1, 0.1, 0.0),
    Windows(5, 1, 2, 3, 1.0, 1.0),
    Windows(7, 2, 6, 6, 0.1, 0.3),
    Windows(13, 5, 0, 4, 2.5, 4.0),
    Windows(16, 3, 0, 0, 1e-30, 30.0),  # a blur wider than the map
    Windows(19, 20, 0, 0, 1e8, 1.0),
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def random_map(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hostile_map(kind: str, *shape: int) -> Tensor:
    """float64; each kind breaks another shortcut."""
    x = random_map(*shape)
    spread = random_map(*shape, seed=2) * 20 - 10
    return {
        "ties": (x * 3).floor(),
        "zeros of both signs": torch.where(x > 0.5, 0.0, -0.0),
        "constant": torch.full(shape, -0.7),
        "not finite": x.masked_fill(spread < -8, NAN).masked_fill(spread > 9, INF).masked_fill(spread.abs() < 1, -INF),
        "nothing finite": torch.where(x > 0.5, NAN, torch.where(x > 0.2, INF, -INF)),
        "one infinity": x.index_put(
            (torch.tensor(0), torch.tensor(0), torch.tensor(3), torch.tensor(5)), torch.tensor(INF)
        ),
        "many magnitudes": spread.mul(3).exp() * torch.where(x > 0.3, 1.0, -1.0),
        "subnormal": x * 1e-42,
        "overflowing range": torch.where(x > 0.5, 3e38, -3e38),
    }[kind].double()


HOSTILE = [
    "ties",
    "zeros of both signs",
    "constant",
    "not finite",
    "nothing finite",
    "one infinity",
    "many magnitudes",
    "subnormal",
    "overflowing range",
]


def reference_logits(weights: Tensor, windows: Windows) -> Tensor:
    temperature = torch.tensor(windows.temperature, dtype=torch.float64)
    return sample_reference.window_logits(weights, windows._replace(temperature=temperature))


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """Equal, NaN where NaN."""
    return torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.nan_to_num(), expected.nan_to_num())


def draw(weights: Tensor, k: int, windows: Windows, backend: str, **source: Any) -> tuple[Tensor, Tensor, Tensor]:
    size, stride, before, after, temperature, sigma = windows
    drawn = sample_patches(
        weights,
        k,
        size,
        stride=stride,
        padding=(before, after),
        temperature=temperature,
        blur_sigma=sigma,
        backend=backend,
        **source,
    )
    return drawn.coords, drawn.scores, drawn.indices


def assert_same_draw(weights: Tensor, k: int, windows: Windows, **source: Any) -> None:
    for actual, expected in zip(
        draw(weights, k, windows, "native", **source), draw(weights, k, windows, "reference", **source), strict=True
    ):
        assert actual.dtype == expected.dtype
        assert actual.is_contiguous()
        assert torch.equal(actual, expected)


def native_logits(weights: Tensor, windows: Windows) -> Tensor:
    """The logits [B, candidates] that the native draw draws from: its scores of all windows without noise."""
    count = candidates(weights, windows)
    _, scores, indices = draw(weights, count, windows, "native", noise=0)
    missing = indices < 0  # NaN and -inf
    logits = scores.new_full((len(weights), count + 1), NAN)
    return logits.scatter_(1, indices.masked_fill(missing, count), scores)[:, :count]


def candidates(weights: Tensor, windows: Windows) -> int:
    rows, columns = candidate_grid(*weights.shape[2:], windows.patch_size, windows.stride, windows[2:4])
    return rows * columns


@pytest.mark.usefixtures("isa", "poisoned")
@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_what_the_reference_draws(windows: Windows, dtype: torch.dtype) -> None:
    for height, width in ((19, 34), (47, 23)):
        weights = random_map(3, 1, height, width, dtype=dtype)
        count = candidates(weights, windows)
        assert same_bits(native_logits(weights, windows), reference_logits(weights, windows))
        noise = gumbel_noise(3, 3, count)
        for k, source in (
            (min(5, count), {"seed": 7}),
            (min(5, count), {"noise": noise}),
            (count, {"noise": noise.double().mul(0.1)}),
            (count, {"seed": -1}),
            (min(300, count), {"noise": 0}),
            (0, {"seed": 2**64 - 1}),
        ):
            assert_same_draw(weights, k, windows, **source)


@pytest.mark.usefixtures("isa", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_maps(kind: str, dtype: torch.dtype) -> None:
    weights = hostile_map(kind, 2, 1, 21, 38).to(dtype)
    for windows in WINDOWS:
        assert same_bits(native_logits(weights, windows), reference_logits(weights, windows)), windows
        assert_same_draw(weights, min(9, candidates(weights, windows)), windows, seed=5)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divisions_round_as_ieee(dtype: torch.dtype) -> None:
    """A window of one pixel rescales every value of a map: by products, which must not show."""
    for scale in (
        torch.rand(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64).mul(40).sub(20).exp().tolist()
    ):
        weights = random_map(1, 1, 64, 64, seed=int(scale * 1000) + 1).mul(scale).to(dtype)
        windows = Windows(1, 1, 0, 0, scale, 0.0)
        assert torch.equal(native_logits(weights, windows), reference_logits(weights, windows))


@pytest.mark.usefixtures("isa")
@given(
    data=st.data(),
    batch=st.integers(0, 3),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    padding=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    stride=st.integers(1, 9),
    sigma=st.sampled_from([0.0, 0.25, 1.0, 2.2, 7.0]),
    temperature=st.sampled_from([1.0, 0.1, 0.37]),
    seed=st.integers(-(2**63), 2**64 - 1),
)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_shape(data, batch, height, width, padding, stride, sigma, temperature, seed) -> None:  # type: ignore[no-untyped-def]
    size = data.draw(st.integers(1, min(height, width) + sum(padding)))
    windows = Windows(size, stride, *padding, temperature, sigma)
    weights = random_map(batch, 1, height, width, seed=seed % 2**63)
    k = data.draw(st.integers(0, candidates(weights, windows)))
    assert_same_draw(weights, k, windows, seed=seed)


@pytest.mark.usefixtures("isa")
def test_strided_expanded_and_offset_maps() -> None:
    base = random_map(4, 1, 50, 60)
    for view in (
        base.transpose(2, 3),
        base[1:, :, 3::2, 1::3],
        base[:1].expand(3, 1, 50, 60),
        base[:, :, :1].expand(4, 1, 30, 60),
        base[:, :, :, :1].expand(4, 1, 50, 30),
        base.permute(2, 1, 0, 3),
    ):
        for windows in WINDOWS[1:3]:
            same = min(3, candidates(view, windows))
            assert torch.equal(
                draw(view, same, windows, "native", seed=1)[1],
                draw(view.contiguous(), same, windows, "native", seed=1)[1],
            )
            assert same_bits(native_logits(view, windows), reference_logits(view, windows))


@pytest.mark.usefixtures("isa")
def test_strided_noise() -> None:
    weights, windows = random_map(3, 1, 20, 20), WINDOWS[1]
    count = candidates(weights, windows)
    noise = gumbel_noise(0, 6, 2 * count)
    for view in (noise[::2, :count], noise[:3, ::2], noise[:1, :count].expand(3, count), noise[:1, :1], noise[:3, :1]):
        assert_same_draw(weights, 7, windows, noise=view)


@pytest.mark.usefixtures("isa")
def test_offsets_beyond_32_bits() -> None:
    distance = 2**31 + 5
    memory = torch.empty(2 * distance + 600, dtype=torch.float16)  # reserved, and touched in two places only
    weights = memory.view(torch.float32).as_strided((2, 1, 12, 20), (distance // 2 + 100, 240, 20, 1))
    assert weights.stride(0) * 4 > 2**32
    image = random_map(2, 1, 12, 20)
    weights.copy_(image)
    for actual, expected in zip(
        draw(weights, 5, WINDOWS[1], "native", seed=1), draw(image, 5, WINDOWS[1], "reference", seed=1), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("windows", [Windows(16, 1, 3, 4, 0.2, 0.0), Windows(9, 2, 0, 0, 1.0, 2.0)])
@pytest.mark.parametrize("shape", [(1, 1, 260, 300), (3, 1, 130, 140)])
def test_threads_change_nothing(windows: Windows, shape: tuple[int, ...], threads: Any) -> None:
    weights = random_map(*shape).masked_fill(random_map(*shape, seed=9) < 0.001, NAN)
    grad = torch.randn(shape[0], candidates(weights, windows), generator=torch.Generator().manual_seed(0))
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        found.append(
            [
                *draw(weights, 300, windows, "native", seed=3),
                native_logits(weights, windows),
                sample_native.window_logits_backward(grad, weights, windows),
            ]
        )
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    threads(2)
    assert_same_draw(weights, 300, windows, seed=3)


@pytest.mark.usefixtures("isa")
def test_one_row_of_many_ties_on_several_threads(threads: Any) -> None:
    """Equal scores by ascending index, whichever thread found them."""
    threads(3)
    weights = (random_map(1, 1, 256, 256) * 2).floor()
    for k in (1, 40, 3000):
        assert_same_draw(weights, k, Windows(1, 1, 0, 0, 1.0, 0.0), noise=0)
    peak = torch.zeros(1, 1, 256, 256)
    peak[0, 0, 100, 17] = 1
    assert_same_draw(peak, 5, Windows(1, 1, 0, 0, 0.001, 0.0), seed=1)  # one window holds all the weight


@pytest.mark.usefixtures("isa", "poisoned")
@pytest.mark.parametrize("windows", WINDOWS[:-2])
@pytest.mark.parametrize("kind", ["random", "ties", "zeros of both signs", "constant", "not finite", "nothing finite"])
def test_gradient_is_that_of_the_reference(windows: Windows, kind: str) -> None:
    shape = (2, 1, 21, 38)
    weights = random_map(*shape, dtype=torch.float64) if kind == "random" else hostile_map(kind, *shape)
    leaf = weights.clone().requires_grad_()
    logits = reference_logits(leaf, windows)
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (expected,) = torch.autograd.grad(logits, leaf, grad)
    actual = sample_native.window_logits_backward(grad, weights, windows)
    # Where all windows are equal, parts of 1e6 times the gradient cancel.
    least = 1e6 if kind in ("constant", "nothing finite", "zeros of both signs", "not finite") else 1.0
    scale = float(grad.abs().sum()) / float(windows.temperature) * least
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14 * scale)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        narrow = sample_native.window_logits_backward(grad.float(), weights.to(dtype), windows)
        assert narrow.dtype == dtype
        wide = sample_native.window_logits_backward(grad.float().double(), weights.to(dtype).double(), windows)
        if kind == "random":
            error = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
            torch.testing.assert_close(narrow.double(), wide, rtol=error, atol=error * float(wide.abs().max()))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("windows", [Windows(4, 1, 0, 0, 1.0, 0.0), Windows(3, 2, 1, 2, 0.5, 1.0)])
def test_gradcheck(windows: Windows) -> None:
    weights = (random_map(2, 1, 8, 9, dtype=torch.float64) + 0.1).requires_grad_()
    noise = gumbel_noise(0, 2, candidates(weights, windows)).double()

    def scores(weights: Tensor) -> tuple[Tensor, Tensor]:
        size, stride, before, after, temperature, sigma = windows
        drawn = sample_patches(
            weights,
            4,
            size,
            stride=stride,
            padding=(before, after),
            temperature=temperature,
            blur_sigma=sigma,
            noise=noise,
            differentiable=True,
            backend="native",
        )
        assert drawn.weights is not None
        return drawn.scores, drawn.weights

    assert torch.autograd.gradcheck(scores, (weights,), nondet_tol=0.0)


@pytest.mark.usefixtures("isa")
def test_opcheck_of_the_gradient() -> None:
    temperature, indices = torch.tensor(0.5, dtype=torch.float64), torch.tensor([[3, 0, -1], [-1, 5, 5]])
    for dtype in DTYPES:
        weights = random_map(2, 1, 12, 14, dtype=dtype)
        grad = torch.ones(2, 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        arguments = (grad, indices, weights, 4, 2, 1, 2, temperature, 1.0, "native")
        torch.library.opcheck(torch.ops.icseg.sample_patches_backward.default, arguments)


@pytest.mark.usefixtures("isa")
def test_several_python_threads_at_once() -> None:
    maps = [random_map(1, 1, 90 + i, 80, seed=i) for i in range(6)]
    expected = [draw(m, 9, WINDOWS[4], "native", seed=2) for m in maps]
    wrong = []

    def work(i: int) -> None:
        for _ in range(10):
            if not all(map(torch.equal, draw(maps[i], 9, WINDOWS[4], "native", seed=2), expected[i])):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(maps))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(
    ("changes", "k", "message"),
    [
        ({"batch": -1}, 0, "sizes must not be negative"),
        ({"before": -3}, 0, "sizes must not be negative"),
        ({"tap_count": -1}, 0, "sizes must not be negative"),
        ({}, -1, "sizes must not be negative"),
        ({"height": 2**31}, 0, "sizes must not multiply beyond"),
        ({"width": INT64.max}, 0, "sizes must not multiply beyond"),
        ({"before": INT64.max, "after": INT64.max}, 0, "sizes must not multiply beyond"),
        (
            {"batch": 2**31 - 1, "height": 2**31 - 1, "width": 2**31 - 1, "stride": 2**30},
            0,
            "sizes must not multiply beyond",
        ),
        ({"height": 2**17, "width": 2**17}, 0, "sizes must not multiply beyond"),
        (  # 2^64 windows
            {"height": 2**31 - 1, "width": 2**31 - 1, "before": 2**31 - 1, "after": 2, "patch": 1},
            1,
            "sizes must not multiply beyond",
        ),
        ({"patch": 0}, 0, "a window must fit the map"),
        ({"patch": 13}, 0, "a window must fit the map"),
        ({"height": 0}, 0, "a window must fit the map"),
        ({"stride": 0}, 0, "a window must fit the map"),
        ({"tap_count": 4}, 0, "a window must fit the map"),
        ({"threads": 0}, 0, "a window must fit the map"),
        ({}, 9 * 9 + 1, "draws must not outnumber the elements"),
    ],
)
def test_the_library_refuses_impossible_sizes(changes: dict[str, int], k: int, message: str) -> None:
    sizes = {
        "batch": 1,
        "height": 12,
        "width": 12,
        "patch": 4,
        "stride": 1,
        "tap_count": 1,
        "temperature": 1.0,
        "threads": 1,
    }
    wrong = sample_native._Settings(**{**sizes, **changes})
    bytes_ = ctypes.c_int64(-7)
    code = sample_native._workspace_bytes(ctypes.addressof(wrong), 4, k, 0, ctypes.addressof(bytes_))
    assert message in library.get().icseg_error(code).decode()
    assert bytes_.value == -7
    output = torch.full((200,), 7.0)
    pointer = output.data_ptr()
    draw_code = sample_native._DRAW[torch.float32](
        ctypes.addressof(wrong), pointer, None, 0, k, 0, 0, pointer, pointer, pointer, pointer, 2**40
    )
    assert draw_code == code
    if k == 0:
        assert sample_native._BACKWARD[torch.float32](ctypes.addressof(wrong), *[pointer] * 4, 2**40) == code
    assert bool((output == 7).all())


@pytest.mark.usefixtures("isa")
def test_the_library_refuses_a_small_workspace() -> None:
    right = sample_native._Settings(
        batch=1, height=12, width=12, patch=4, stride=1, tap_count=1, temperature=1.0, threads=1
    )
    needed = ctypes.c_int64()
    library.check(sample_native._workspace_bytes(ctypes.addressof(right), 4, 0, 0, ctypes.addressof(needed)))
    output = torch.full((200,), 7.0)
    pointer = output.data_ptr()
    code = sample_native._DRAW[torch.float32](
        ctypes.addressof(right), pointer, None, 0, 0, 0, 0, pointer, pointer, pointer, pointer, needed.value - 1
    )
    assert "workspace must be larger" in library.get().icseg_error(code).decode()
    assert bool((output == 7).all())
    assert sample_native._workspace_bytes(ctypes.addressof(right), 2, 0, 0, ctypes.addressof(needed)) != 0


@pytest.mark.usefixtures("isa")
def test_the_ops_refuse_tensors_that_do_not_fit() -> None:
    weights, temperature = random_map(2, 1, 8, 8), torch.tensor(1.0, dtype=torch.float64)
    ops = torch.ops.icseg
    with pytest.raises(ValueError, match=r"noise must have shape \[2, 25\] on the CPU, got \[2, 24\]"):
        ops.sample_patches(weights, 1, 4, 1, 0, 0, temperature, 0.0, None, torch.zeros(2, 24), "native")
    with pytest.raises(ValueError, match=r"grad must have shape \[2, 25\]"):
        sample_native.window_logits_backward(torch.zeros(2, 24), weights, Windows(4, 1, 0, 0, 1.0, 0.0))
    indices = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"grad and indices must have one shape \[B, k\] with B = 2"):
        ops.sample_patches_backward(torch.zeros(2, 4), indices, weights, 4, 1, 0, 0, temperature, 0.0, "native")
    with pytest.raises(ValueError, match=r"needs floating-point \[B, 1, H, W\]"):
        ops.sample_patches(weights[:, 0], 1, 4, 1, 0, 0, temperature, 0.0, None, None, "native")
    with pytest.raises(RuntimeError, match="a window must fit the map"):
        ops.sample_patches(weights, 1, 9, 1, 0, 0, temperature, 0.0, None, None, "native")
    with pytest.raises(BackendError, match="it runs on the CPU, and weights is on meta"):
        sample_patches(torch.empty(1, 1, 8, 8, device="meta"), 1, 4, seed=0, backend="native")


@pytest.mark.usefixtures("isa")
def test_the_frequencies_of_draws() -> None:
    """First draws follow softmax(logits), within 4 sigma."""
    count, windows = 20_000, Windows(2, 2, 0, 0, 0.5, 0.0)
    weights = random_map(1, 1, 6, 6).expand(count, 1, 6, 6)
    probability = native_logits(weights[:1], windows)[0].softmax(0)
    drawn = draw(weights, 1, windows, "native", seed=4)[2][:, 0]
    frequency = torch.bincount(drawn, minlength=9) / count
    assert bool(((frequency - probability).abs() < 4 * (probability * (1 - probability) / count).sqrt()).all())
    assert math.isclose(float(frequency.sum()), 1.0, abs_tol=1e-6)


@pytest.mark.usefixtures("isa")
def test_gradients_where_noise_leaves_no_window() -> None:
    found = []
    for backend in ("native", "reference"):
        weights = random_map(2, 1, 12, 13, dtype=torch.float64).requires_grad_()
        noise = random_map(2, 90, seed=3).masked_fill(random_map(2, 90, seed=4) < 0.97, -INF).requires_grad_()
        drawn = sample_patches(weights, 9, 4, noise=noise, blur_sigma=1.0, differentiable=True, backend=backend)
        assert drawn.weights is not None
        assert int((drawn.indices < 0).sum()) > 0
        loss = (drawn.weights * torch.linspace(0, 1, 9)).sum() + drawn.scores.masked_fill(drawn.indices < 0, 0.0).sum()
        found.append((drawn.weights, *torch.autograd.grad(loss, (weights, noise))))
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
