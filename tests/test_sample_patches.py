"""Drawing patches from an importance map, against a naive chain of the same steps."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from samples import BACKENDS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from icseg_kernels import gumbel_topk, sample_patches, use_backend
from icseg_kernels.patches import NO_PATCH
from icseg_kernels.patches.windows import candidate_grid
from icseg_kernels.philox import gumbel_noise

INF = float("inf")
NAN = float("nan")
SETTINGS = [
    {"patch_size": 4},
    {"patch_size": 1, "stride": 3},
    {"patch_size": 8, "stride": 8, "temperature": 0.1},
    {"patch_size": 8, "stride": 6, "padding": (1, 1), "blur_sigma": 1.0, "temperature": 0.1},
    {"patch_size": 5, "stride": 2, "padding": (1, 3), "blur_sigma": 4.0},
    {"patch_size": 7, "padding": (6, 6), "blur_sigma": 0.3},
    {"patch_size": 16, "stride": 5, "padding": (0, 4)},
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Serve the test's calls with this backend."""
    with use_backend(request.param):
        yield request.param


def random_map(batch: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 1, height, width, generator=generator, dtype=torch.float64).to(dtype)


def naive_logits(
    weights: Tensor,
    patch_size: int,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    temperature: float = 1.0,
    blur_sigma: float = 0.0,
) -> Tensor:
    """[B, rows, columns], window by window in float64 (differentiable)."""
    before, after = padding
    padded = F.pad(weights.double(), (before, after, before, after))
    rows, columns = (size - patch_size + 1 for size in padded.shape[2:])
    maxima = [
        padded[:, 0, y : y + patch_size, x : x + patch_size].amax((1, 2)) for y in range(rows) for x in range(columns)
    ]
    pooled = torch.stack(maxima, 1).view(-1, 1, rows, columns)
    low, high = pooled.amin((1, 2, 3), keepdim=True), pooled.amax((1, 2, 3), keepdim=True)
    scaled = (pooled - low) / (high - low + 1e-6)
    if blur_sigma:
        size = int(4 * blur_sigma + 1) | 1
        axis = torch.arange(size, dtype=torch.float64) - size // 2
        kernel = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * blur_sigma**2))
        scaled = F.conv2d(scaled, (kernel / kernel.sum()).view(1, 1, size, size), padding=size // 2)
    return scaled[:, 0, ::stride, ::stride] / temperature


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("size", [(16, 16), (19, 34), (31, 17)])
@pytest.mark.parametrize("differentiable", [False, True])
def test_equals_the_naive_chain(settings: dict, size: tuple[int, int], differentiable: bool) -> None:
    weights = random_map(3, *size, dtype=torch.float64)
    logits = naive_logits(weights, **settings)
    before = settings.get("padding", (0, 0))[0]
    k = min(5, logits[0].numel())
    drawn = sample_patches(weights, k, seed=3, differentiable=differentiable, **settings)
    expected = gumbel_topk(logits.flatten(1), k, seed=3)
    assert torch.equal(drawn.indices, expected.indices)
    torch.testing.assert_close(drawn.scores, expected.scores)
    row, column = drawn.indices // logits.shape[2], drawn.indices % logits.shape[2]
    corner = torch.stack([row, column], -1) * settings.get("stride", 1) - before
    assert torch.equal(drawn.coords, corner.int())
    assert drawn.coords.dtype == torch.int32
    grid = candidate_grid(*size, settings["patch_size"], settings.get("stride", 1), settings.get("padding", (0, 0)))
    assert grid == tuple(logits.shape[1:])


@pytest.mark.usefixtures("backend")
def test_every_window_is_drawn_once_when_k_is_all() -> None:
    drawn = sample_patches(random_map(2, 12, 20), 15, 4, stride=4, seed=0)
    corners = {(y, x) for y in range(0, 12, 4) for x in range(0, 20, 4)}
    for row in drawn.coords.tolist():
        assert {tuple(corner) for corner in row} == corners


@pytest.mark.usefixtures("backend")
def test_best_windows_hold_the_peaks() -> None:
    weights = torch.zeros(1, 1, 32, 48)
    weights[0, 0, 17, 40], weights[0, 0, 3, 9] = 1.0, 0.5
    drawn = sample_patches(weights, 2, 8, stride=8, noise=0)
    assert drawn.coords.tolist() == [[[16, 40], [0, 8]]]
    torch.testing.assert_close(drawn.scores, torch.tensor([[1.0, 0.5]]), rtol=2e-6, atol=0)


@pytest.mark.usefixtures("backend")
def test_padding_gives_negative_corners() -> None:
    weights = torch.zeros(1, 1, 8, 8)
    weights[0, 0, 0, 0] = 1.0
    drawn = sample_patches(weights, 1, 4, stride=4, padding=(3, 3), noise=0)
    assert drawn.coords.tolist() == [[[-3, -3]]]


@pytest.mark.usefixtures("backend")
def test_constant_map_is_uniform() -> None:
    count = 20_000
    for value in (0.0, 0.7, 1e8):
        weights = torch.full((1, 1, 6, 6), value).expand(count, 1, 6, 6)
        drawn = sample_patches(weights, 1, 2, stride=2, temperature=0.01, seed=0)
        frequency = torch.bincount(drawn.indices[:, 0], minlength=9) / count
        assert float((frequency - 1 / 9).abs().max()) < 4 * math.sqrt(1 / 9 * 8 / 9 / count)


@pytest.mark.usefixtures("backend")
def test_temperature_sharpens() -> None:
    weights = random_map(1, 16, 16).expand(2000, 1, 16, 16)
    best = sample_patches(weights[:1], 1, 4, stride=4, noise=0).indices[0, 0]
    share = [
        float((sample_patches(weights, 1, 4, stride=4, temperature=t, seed=0).indices == best).float().mean())
        for t in (10.0, 1.0, 0.01)
    ]
    assert share[0] < share[1] < share[2]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_maps_compute_in_float32(dtype: torch.dtype) -> None:
    weights = random_map(2, 16, 24, dtype)
    options = {"stride": 2, "blur_sigma": 1.5, "temperature": 0.1, "seed": 4}
    narrow, wide = sample_patches(weights, 6, 4, **options), sample_patches(weights.float(), 6, 4, **options)
    assert torch.equal(narrow.scores, wide.scores)
    assert torch.equal(narrow.coords, wide.coords)


@pytest.mark.usefixtures("backend")
def test_nan_counts_as_lowest_and_infinity_as_highest() -> None:
    weights = random_map(2, 12, 12) + 0.5
    strange, tame = weights.clone(), weights.clone()
    strange[0, 0, :4, :4], strange[1, 0, 5, 5], strange[1, 0, 6, 6] = NAN, INF, -INF
    tame[0, 0, :4, :4] = strange[0].nan_to_num(nan=INF).min()
    finite = strange[1][strange[1].isfinite()]
    tame[1, 0, 5, 5], tame[1, 0, 6, 6] = finite.max(), finite.min()
    assert torch.equal(
        sample_patches(strange, 9, 4, stride=4, noise=0).scores,
        sample_patches(tame, 9, 4, stride=4, noise=0).scores,
    )
    nothing = sample_patches(torch.full((1, 1, 8, 8), NAN), 4, 4, stride=4, noise=0)
    assert nothing.indices.tolist() == [[0, 1, 2, 3]]


@pytest.mark.usefixtures("backend")
def test_windows_that_noise_forbids_are_no_patch() -> None:
    noise = torch.tensor([[0.0, -INF, -INF, NAN]])
    drawn = sample_patches(random_map(1, 8, 8), 3, 4, stride=4, noise=noise, differentiable=True)
    assert drawn.indices.tolist() == [[0, -1, -1]]
    assert drawn.coords.tolist() == [[[0, 0], [NO_PATCH] * 2, [NO_PATCH] * 2]]
    assert drawn.weights.tolist() == [[1.0, 0.0, 0.0]]
    none = sample_patches(random_map(1, 8, 8), 2, 4, stride=4, noise=-INF, differentiable=True)
    assert none.weights.tolist() == [[0.0, 0.0]]


@pytest.mark.usefixtures("backend")
def test_k_zero_and_empty_batch() -> None:
    for differentiable in (False, True):
        none = sample_patches(random_map(2, 8, 8), 0, 4, seed=0, differentiable=differentiable)
        assert none.coords.shape == (2, 0, 2)
        empty = sample_patches(random_map(0, 8, 8), 3, 4, blur_sigma=1.0, seed=0, differentiable=differentiable)
        assert empty.coords.shape == (0, 3, 2)


@pytest.mark.usefixtures("backend")
def test_strided_map() -> None:
    weights = random_map(3, 40, 30).permute(0, 1, 3, 2)[:, :, ::2, 1:]
    assert not weights.is_contiguous()
    strided = sample_patches(weights, 4, 4, stride=2, seed=1)
    assert torch.equal(strided.coords, sample_patches(weights.contiguous(), 4, 4, stride=2, seed=1).coords)


@pytest.mark.usefixtures("backend")
def test_same_seed_same_draw() -> None:
    weights = torch.zeros(4, 1, 32, 32)
    first = sample_patches(weights, 3, 8, seed=5)
    assert torch.equal(first.coords, sample_patches(weights, 3, 8, seed=torch.tensor(5)).coords)
    assert torch.equal(first.coords, sample_patches(weights, 3, 8, noise=gumbel_noise(5, 4, 25 * 25)).coords)
    assert not torch.equal(first.coords, sample_patches(weights, 3, 8, seed=6).coords)
    assert not torch.equal(first.coords[0], first.coords[1])


@pytest.mark.usefixtures("backend")
def test_weights_are_the_renormalised_softmax_over_all_windows() -> None:
    weights, noise = random_map(2, 16, 16, torch.float64), gumbel_noise(2, 2, 49)
    settings = {"patch_size": 4, "stride": 2, "temperature": 0.2, "blur_sigma": 1.0}
    drawn = sample_patches(weights, 5, noise=noise, differentiable=True, **settings)
    everywhere = (naive_logits(weights, **settings).flatten(1) + noise).softmax(1).gather(1, drawn.indices)
    torch.testing.assert_close(drawn.weights, everywhere / everywhere.sum(1, keepdim=True))
    torch.testing.assert_close(drawn.weights.sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.usefixtures("backend")
def test_only_a_differentiable_draw_has_gradients() -> None:
    weights = random_map(1, 8, 8).requires_grad_()
    plain = sample_patches(weights, 2, 4, seed=0)
    assert plain.weights is None
    assert not plain.scores.requires_grad


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "settings",
    [
        {"patch_size": 4},
        {"patch_size": 3, "stride": 2, "padding": (1, 2)},
        {"patch_size": 4, "stride": 3, "padding": (1, 1), "blur_sigma": 1.0, "temperature": 0.1},
    ],
)
def test_gradients(settings: dict) -> None:
    weights = (random_map(2, 9, 11, torch.float64) + 0.1).requires_grad_()
    grid = candidate_grid(9, 11, settings["patch_size"], settings.get("stride", 1), settings.get("padding", (0, 0)))
    noise = gumbel_noise(0, 2, grid[0] * grid[1]).double().requires_grad_()
    k = 4

    def outputs(weights: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        drawn = sample_patches(weights, k, noise=noise, differentiable=True, **settings)
        assert drawn.weights is not None
        return drawn.weights, drawn.scores

    assert torch.autograd.gradcheck(outputs, (weights, noise))
    share = torch.linspace(0, 1, k, dtype=torch.float64)
    (ours,) = torch.autograd.grad((outputs(weights, noise)[0] * share).sum(), weights)
    everywhere = (naive_logits(weights, **settings).flatten(1) + noise).softmax(1)
    indices = sample_patches(weights, k, noise=noise, **settings).indices
    selected = everywhere.gather(1, indices)
    (naive,) = torch.autograd.grad(((selected / selected.sum(1, keepdim=True)) * share).sum(), weights)
    torch.testing.assert_close(ours, naive)
    assert float(ours.abs().sum()) > 0


@pytest.mark.parametrize("differentiable", [False, True])
def test_compiles_whole(differentiable: bool) -> None:
    def draw(weights: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        drawn = sample_patches(
            weights, 4, 8, stride=4, padding=(1, 2), blur_sigma=1.5, seed=seed, differentiable=differentiable
        )
        return drawn.coords, drawn.weights if drawn.weights is not None else drawn.scores

    weights = random_map(2, 20, 33).requires_grad_(differentiable)
    torch.compiler.reset()
    # The differentiable chain is plain PyTorch, whose code generation takes long and is not ours to test.
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager" if differentiable else "inductor")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (torch.tensor(1), torch.tensor(2)):
            expected, actual = draw(weights, seed), compiled(weights, seed)
            torch.testing.assert_close(actual, expected)
    if differentiable:
        grads = [torch.autograd.grad(out[1][:, 0].sum(), weights)[0] for out in (expected, actual)]
        torch.testing.assert_close(*grads)


def test_opcheck(backend: str) -> None:
    op, half = torch.ops.icseg.sample_patches.default, torch.tensor(0.5, dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        weights = random_map(2, 12, 14, dtype)
        torch.library.opcheck(op, (weights, 3, 4, 2, 1, 2, half, 1.0, torch.tensor(1), None, backend))
        torch.library.opcheck(op, (weights, 3, 4, 2, 0, 0, half, 0.0, None, None, backend))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("differentiable", [False, True])
def test_autocast_changes_nothing(differentiable: bool) -> None:
    weights = random_map(2, 24, 24)
    options = {
        "stride": 2,
        "blur_sigma": 2.0,
        "temperature": 0.1,
        "seed": 0,
        "differentiable": differentiable,
    }
    plain = sample_patches(weights, 5, 8, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = sample_patches(weights, 5, 8, **options)
    assert torch.equal(plain.scores, mixed.scores)
    assert torch.equal(plain.coords, mixed.coords)


@pytest.mark.usefixtures("backend")
def test_flops_of_the_blur_fall_with_the_stride() -> None:
    """By hand: 13 x 13 windows, 5 taps; stride 3 keeps 5 x 5, after a first pass that makes 5 rows of 13."""

    def count(**options: float) -> int:
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            sample_patches(torch.zeros(2, 1, 16, 16), 3, 4, seed=0, **options)
        return counter.get_total_flops()

    assert count(blur_sigma=1.0) - count() == 2 * (2 * 5) * (13 * 13 + 13 * 13)
    assert count(blur_sigma=1.0, stride=3) - count(stride=3) == 2 * (2 * 5) * (5 * 13 + 5 * 5)


@pytest.mark.usefixtures("backend")
def test_a_narrow_blur_is_none() -> None:
    weights = random_map(2, 16, 16)
    expected = sample_patches(weights, 5, 4, seed=0)
    for sigma in (1e-200, 0.1, 0.24):
        assert torch.equal(sample_patches(weights, 5, 4, seed=0, blur_sigma=sigma).scores, expected.scores)


@pytest.mark.usefixtures("backend")
def test_the_least_temperature_gives_finite_logits() -> None:
    drawn = sample_patches(random_map(2, 16, 16), 5, 4, temperature=1e-30, noise=0)
    assert bool(drawn.scores.isfinite().all())


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("differentiable", [False, True])
def test_compile_serves_new_temperatures_noises_and_counts(differentiable: bool) -> None:
    """Three graphs: for the first value of each, for new numbers, and for new counts."""

    def draw(weights: Tensor, k: int, temperature: float, noise: float) -> Tensor:
        drawn = sample_patches(
            weights, k, 4, stride=2, temperature=temperature, noise=noise, differentiable=differentiable
        )
        return drawn.scores

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(draw, fullgraph=True, backend=counter)
    weights = random_map(2, 16, 16).requires_grad_(differentiable)
    for i in range(10):
        torch.testing.assert_close(compiled(weights, 3, 0.1 + i, 0.5), draw(weights, 3, 0.1 + i, 0.5))
    assert counter.frame_count <= 2
    for i in range(10):
        torch.testing.assert_close(compiled(weights, 3 + i, 0.1 + i, 0.5 + i), draw(weights, 3 + i, 0.1 + i, 0.5 + i))
    assert counter.frame_count <= 4


@pytest.mark.parametrize(
    ("weights", "k", "patch_size", "options", "error", "message"),
    [
        (torch.zeros(1, 1, 8, 8), 5, 4, {"stride": 4}, ValueError, r"k must lie in \[0, 4\], .* got 5"),
        (torch.zeros(1, 1, 8, 8), -1, 4, {}, ValueError, "k must be an integer of at least 0, got -1"),
        (
            torch.zeros(1, 1, 8, 8),
            1,
            9,
            {},
            ValueError,
            "patch_size must fit the padded map of 8 x 8 pixels, got 9",
        ),
        (
            torch.zeros(1, 1, 8, 8),
            1,
            0,
            {},
            ValueError,
            "patch_size must be an integer of at least 1, got 0",
        ),
        (torch.zeros(1, 1, 8, 8), 1, 4, {"stride": 0}, ValueError, "stride must be an integer of at least 1, got 0"),
        (
            torch.zeros(1, 1, 8, 8),
            1,
            4,
            {"temperature": 0.0},
            ValueError,
            "temperature must be a finite number of at least 1e-30, got 0",
        ),
        (
            torch.zeros(1, 1, 8, 8),
            1,
            4,
            {"temperature": NAN},
            ValueError,
            "temperature must be a finite number of at least 1e-30, got n",
        ),
        (
            torch.zeros(1, 1, 8, 8),
            1,
            4,
            {"blur_sigma": -1.0},
            ValueError,
            "blur_sigma must be a finite number of at least 0, got -1",
        ),
        (torch.zeros(1, 1, 8, 8), 1, 4, {"blur_sigma": INF}, ValueError, "blur_sigma must be a finite number .*inf"),
        (
            torch.zeros(1, 1, 8, 8),
            1,
            4,
            {"padding": (-1, 0)},
            ValueError,
            r"padding\[0\] must be an integer of at least 0, got -1",
        ),
        (
            torch.zeros(1, 2, 8, 8),
            1,
            4,
            {},
            ValueError,
            r"shape \[B, 1, H, W\] with H, W > 0, got \[1, 2, 8, 8\]",
        ),
        (torch.zeros(1, 1, 0, 8), 1, 4, {}, ValueError, r"got \[1, 1, 0, 8\]"),
        (
            torch.zeros(1, 1, 8, 8).int(),
            1,
            4,
            {},
            TypeError,
            "weights must be a floating-point tensor .*, got torch.int32",
        ),
        (
            torch.zeros(1, 1, 8, 8),
            1,
            4,
            {"seed": 1, "noise": 0},
            ValueError,
            "seed and noise must not both be given",
        ),
        (
            torch.zeros(1, 1, 8, 8),
            1,
            4,
            {"noise": torch.zeros(1, 7)},
            ValueError,
            r"shape \[1, 25\], got \[1, 7\]",
        ),
        (
            torch.zeros(1, 1, 8, 8),
            1,
            4,
            {"backend": "cuda"},
            NotImplementedError,
            "cuda backend cannot serve",
        ),
    ],
)
def test_errors(weights: Tensor, k: int, patch_size: int, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample_patches(weights, k, patch_size, **options)
