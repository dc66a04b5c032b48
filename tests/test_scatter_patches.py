"""scatter_patches against naive loops, F.fold and its own adjoint, on every backend here."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import BACKENDS
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from icseg_kernels import BackendError, flops, gather_patches, library, numerics, scatter_patches, use_backend
from icseg_kernels.patches import NO_PATCH, gaussian_weight, reference, scatter_native

native_only = pytest.mark.parametrize("backend", BACKENDS[:-1], indirect=True)
INT32 = torch.iinfo(torch.int32)
INT64 = torch.iinfo(torch.int64)
HOSTILE = [
    [0, 0],
    [2, 3],
    [2, 3],
    [-2, -1],
    [6, 7],
    [-4, 0],
    [0, 9],
    [NO_PATCH, 1],
    [INT64.min, 0],
    [INT64.max, 0],
    [0, INT64.max],
    [INT64.min, INT64.min],
    [INT32.min, 0],
    [0, INT32.max],
]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Serve the calls of every test with each backend."""
    with use_backend(request.param):
        yield request.param


def scattered_by_loop(
    patches: Tensor, coords: Tensor, size: tuple[int, int], weight: Tensor, fill: float
) -> tuple[Tensor, Tensor]:
    """[K, C, p, p], [K, 2] -> mean [C, H, W], coverage [H, W], pixel by pixel in float64."""
    sums, total = (
        torch.zeros(patches.shape[1], *size, dtype=torch.float64),
        torch.zeros(size, dtype=torch.float64),
    )
    for k, (top, left) in enumerate(coords.tolist()):
        for i, j in itertools.product(range(patches.shape[-1]), repeat=2):
            y, x = top + i, left + j
            if 0 <= y < size[0] and 0 <= x < size[1]:
                sums[:, y, x] += weight[i, j].double() * patches[k, :, i, j].double()
                total[y, x] += weight[i, j].double()
    return torch.where(total > 0, sums / total, fill), total > 0


def random_patches(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_coords(*shape: int, low: int = -3, high: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(low, high, (*shape, 2), generator=torch.Generator().manual_seed(seed))


def weights(kind: str, patch_size: int) -> tuple[str | Tensor | None, Tensor]:
    """The argument, and the same as a tensor."""
    if kind == "uniform":
        return None, torch.ones(patch_size, patch_size)
    if kind == "gaussian":
        return "gaussian", gaussian_weight(patch_size)
    table = torch.rand(patch_size, patch_size, generator=torch.Generator().manual_seed(3))
    table[0] = 0
    return table, table


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "tensor"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float64, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)],
)
def test_equals_a_loop_over_pixels(kind, dtype, tolerance):
    patches, coords = random_patches(2, len(HOSTILE), 3, 4, 4, dtype=dtype), torch.tensor(HOSTILE)
    coords = torch.stack([coords, coords.flip(0)])
    weight, table = weights(kind, 4)
    found = scatter_patches(patches, coords, (7, 9), weight=weight, fill=-3.0)
    assert found.mean.dtype == dtype
    assert found.coverage.shape == (2, 1, 7, 9)
    for b in range(2):
        mean, covered = scattered_by_loop(patches[b], coords[b], (7, 9), table, -3.0)
        assert torch.equal(found.coverage[b, 0], covered)
        torch.testing.assert_close(found.mean[b].double(), mean, rtol=tolerance, atol=tolerance)
        assert (found.mean[b][:, ~covered] == -3).all()


def test_worked_example():
    patches = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1, 1).expand(1, 2, 1, 2, 2)
    found = scatter_patches(patches, torch.tensor([[[0, 0], [0, 1]]]), (2, 4))
    assert found.mean.tolist() == [[[[1, 2, 3, -10], [1, 2, 3, -10]]]]
    assert found.coverage.tolist() == [[[[True, True, True, False]] * 2]]


def test_a_patch_given_twice_counts_twice():
    patches = torch.tensor([0.0, 0.0, 3.0]).view(1, 3, 1, 1, 1)
    coords = torch.zeros(1, 3, 2, dtype=torch.int32)
    assert scatter_patches(patches, coords, (1, 1)).mean.item() == 1.0


@pytest.mark.parametrize("weight", [None, "gaussian"])
def test_what_was_gathered_comes_back_where_it_lay(weight):
    source, coords = random_patches(2, 3, 12, 14, dtype=torch.float64), random_coords(2, 6, low=-3, high=13)
    found = scatter_patches(gather_patches(source, coords, 5), coords, (12, 14), weight=weight)
    expected = torch.where(found.coverage, source, -10.0)
    torch.testing.assert_close(found.mean, expected, rtol=1e-14, atol=1e-14)
    assert 0 < found.coverage.float().mean() < 1


def test_one_patch_a_pixel_comes_back_exact():
    source = random_patches(2, 3, 12, 16)
    grid = torch.cartesian_prod(torch.arange(0, 12, 4), torch.arange(0, 16, 4)).expand(2, 12, 2)
    for weight in (None, "gaussian"):
        found = scatter_patches(gather_patches(source, grid, 4), grid, (12, 16), weight=weight)
        assert found.coverage.all()
        torch.testing.assert_close(found.mean, source, rtol=3e-7, atol=0)


def test_a_constant_stays_constant_under_coverage():
    coords = random_coords(3, 20, low=-7, high=30)
    for weight in (None, "gaussian"):
        found = scatter_patches(torch.full((3, 20, 2, 8, 8), 0.7), coords, (32, 24), weight=weight, fill=5.0)
        expected = torch.where(found.coverage, torch.tensor(0.7), 5.0).expand(3, 2, 32, 24)
        torch.testing.assert_close(found.mean, expected, rtol=5e-7, atol=0)


def test_regular_grid_is_fold_over_fold_of_ones():
    patches = random_patches(2, 9, 3, 4, 4, dtype=torch.float64)
    coords = torch.cartesian_prod(torch.tensor([0, 2, 4]), torch.tensor([0, 2, 4])).expand(2, 9, 2)

    def fold(values: Tensor) -> Tensor:
        return F.fold(values.movedim(1, -1).flatten(1, 3), (8, 8), 4, stride=2)

    found = scatter_patches(patches, coords, (8, 8)).mean
    torch.testing.assert_close(found, fold(patches) / fold(torch.ones_like(patches)))


def test_gaussian_weight():
    weight = gaussian_weight(16)
    assert torch.equal(weight, weight.T)
    assert torch.equal(weight, weight.flip(0))
    assert weight.min().item() == pytest.approx(1e-3)
    assert weight[7, 7].item() == pytest.approx(torch.exp(torch.tensor(-2 * 0.5**2 / (2 * 2.0**2))).item())
    assert weight[3, 7].item() == pytest.approx(torch.exp(torch.tensor(-(4.5**2 + 0.5**2) / (2 * 2.0**2))).item())
    assert gaussian_weight(1).item() == 1.0


def test_a_pixel_of_weight_zero_is_not_covered():
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    found = scatter_patches(torch.ones(1, 1, 1, 2, 2), torch.zeros(1, 1, 2, dtype=torch.int64), (2, 2), weight=weight)
    assert found.mean.tolist() == [[[[1, -10], [1, 1]]]]
    assert found.coverage.tolist() == [[[[True, False], [True, True]]]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("nothing", [0.0, -1.0, float("nan")])
def test_what_has_no_weight_never_leaks(nothing, value):
    """Two patches over the same pixels: where the weight is not positive, neither counts nor gets a gradient."""
    weight = torch.tensor([[1.0, nothing], [1.0, 1.0]])
    patches = torch.ones(1, 2, 1, 2, 2)
    patches[0, :, 0, 0, 1] = value
    patches.requires_grad_()
    coords = torch.tensor([[[0, 0], [0, 1]]])  # the second covers pixel (0, 1) of the first
    found = scatter_patches(patches, coords, (2, 3), weight=weight)
    assert found.mean.tolist() == [[[[1, 1, -10], [1, 1, 1]]]]
    assert found.coverage.tolist() == [[[[True, True, False], [True, True, True]]]]
    found.mean.backward(torch.tensor([[[[1.0, 1.0, value], [1.0, 2.0, 1.0]]]]))
    assert patches.grad.tolist() == [[[[[1, 0], [1, 1]]], [[[1, 0], [1, 1]]]]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_weight_is_cast_to_the_dtype_of_the_sums(dtype):
    patches, coords = random_patches(2, 5, 3, 2, 2, dtype=torch.bfloat16), random_coords(2, 5)
    weight = torch.tensor([[1, 0], [1, 1]])
    found = scatter_patches(patches, coords, (7, 9), weight=weight.to(dtype))
    expected = scatter_patches(patches, coords, (7, 9), weight=weight.float())
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.coverage, expected.coverage)


def test_fill_is_rounded_to_the_dtype_of_the_patches():
    coords = torch.full((1, 1, 2), NO_PATCH)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        found = scatter_patches(random_patches(1, 1, 1, 2, 2, dtype=dtype), coords, (2, 2), fill=0.1).mean
        assert torch.equal(found, torch.full((1, 1, 2, 2), 0.1, dtype=dtype))


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 0, 3, 4, 4), (7, 9)),
        ((0, 5, 3, 4, 4), (7, 9)),
        ((2, 5, 0, 4, 4), (7, 9)),
        ((2, 5, 3, 4, 4), (0, 9)),
        ((2, 5, 3, 4, 4), (7, 0)),
    ],
)
def test_empty_inputs_give_empty_or_filled_images_and_zero_gradients(shape, size):
    patches = torch.ones(shape, requires_grad=True)
    found = scatter_patches(patches, torch.zeros(*shape[:2], 2, dtype=torch.int64), size)
    assert torch.equal(found.mean, torch.full((shape[0], shape[2], *size), -10.0))
    covered = torch.zeros(shape[0], 1, *size, dtype=torch.bool)
    covered[..., :4, :4] = shape[1] > 0  # by patches without channels too
    assert torch.equal(found.coverage, covered)
    found.mean.sum().backward()
    assert torch.equal(patches.grad, torch.zeros(shape))


def test_what_lies_outside_never_leaks():
    patches = torch.full((1, 3, 1, 2, 2), float("nan"), requires_grad=True)
    coords = torch.tensor([[[NO_PATCH, NO_PATCH], [5, 0], [0, -2]]])
    found = scatter_patches(patches, coords, (5, 5))
    assert (found.mean == -10).all()
    assert not found.coverage.any()
    found.mean.sum().backward()
    assert not patches.grad.any()


def test_any_strides():
    patches, coords = (
        random_patches(4, 4, 3, 5, 2).permute(4, 3, 2, 1, 0),
        random_coords(5, 2).transpose(0, 1),
    )
    expanded = random_patches(2, 1, 3, 1, 4).expand(2, 5, 3, 4, 4)
    for view in (patches, expanded):
        found = scatter_patches(view, coords, (7, 9), weight="gaussian")
        expected = scatter_patches(view.contiguous(), coords.contiguous(), (7, 9), weight="gaussian")
        assert torch.equal(found.mean, expected.mean)


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "tensor"])
def test_gradcheck(kind):
    patches, coords = (
        random_patches(2, 5, 2, 3, 3, dtype=torch.float64).requires_grad_(),
        random_coords(2, 5, high=6),
    )
    weight, _ = weights(kind, 3)
    assert torch.autograd.gradcheck(
        lambda x: scatter_patches(x, coords, (5, 6), weight=weight).mean, patches, nondet_tol=0.0
    )


def test_adjoint_identity():
    """With fill 0 the op is linear: <scatter(x), y> == <x, scatter_backward(y)> in float64."""
    patches, coords = random_patches(2, 8, 3, 4, 4, dtype=torch.float64).requires_grad_(), random_coords(2, 8)
    mean = scatter_patches(patches, coords, (7, 9), weight="gaussian", fill=0.0).mean
    upstream = random_patches(*mean.shape, dtype=torch.float64, seed=5)
    (found,) = torch.autograd.grad(mean, patches, upstream)
    torch.testing.assert_close((mean * upstream).sum(), (patches * found).sum(), rtol=1e-12, atol=1e-12)


def test_same_bits_with_any_number_of_threads(threads):
    patches, coords = (
        random_patches(2, 64, 3, 16, 16).requires_grad_(),
        random_coords(2, 64, low=-8, high=100),
    )
    found = []
    for count in (1, 2, 1, 2):
        threads(count)
        mean = scatter_patches(patches, coords, (200, 190), weight="gaussian").mean
        found.append((mean, *torch.autograd.grad(mean.square().sum(), patches)))
    for mean, grad in found[1:]:
        assert torch.equal(mean, found[0][0])
        assert torch.equal(grad, found[0][1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_a_gpu_gives_the_same_and_the_same_bits_twice(backend):
    patches, coords = random_patches(2, 64, 3, 16, 16), random_coords(2, 64, low=-8, high=100)
    expected = scatter_patches(patches, coords, (100, 90), weight="gaussian")
    first, second = (scatter_patches(patches.cuda(), coords.cuda(), (100, 90), weight="gaussian") for _ in range(2))
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.coverage.cpu(), expected.coverage)
    torch.testing.assert_close(first.mean.cpu(), expected.mean, rtol=1e-5, atol=1e-5)


def test_compiles_into_one_graph():
    torch._dynamo.reset()

    def write(patches: Tensor, coords: Tensor) -> Tensor:
        mean, coverage = scatter_patches(patches, coords, (7, 9), weight="gaussian")
        return (mean.square() * coverage).sum()

    compiled = torch.compile(write, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 1):
            patches, coords = (
                random_patches(2, 5, 3, 4, 4, seed=seed).requires_grad_(),
                random_coords(2, 5, seed=seed),
            )
            (expected,) = torch.autograd.grad(write(patches, coords), patches)
            (found,) = torch.autograd.grad(compiled(patches, coords), patches)
            assert torch.equal(found, expected)


def test_new_values_of_fill_and_size_do_not_recompile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    patches, coords = random_patches(2, 5, 3, 4, 4).requires_grad_(), random_coords(2, 5)

    def write(patches: Tensor, fill: float, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return scatter_patches(patches, coords, size, weight="gaussian", fill=fill)

    compiled = torch.compile(write, fullgraph=True, backend=counter)
    for i in range(10):
        arguments = (patches, -3.1 + 0.73 * i, (7 + i, 9 + i))
        found, expected = compiled(*arguments), write(*arguments)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        gradients = [torch.autograd.grad(mean.square().sum(), patches)[0] for mean, _ in (found, expected)]
        assert torch.equal(*gradients)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("dtype", "form"), [(torch.float32, "table"), (torch.bfloat16, None), (torch.float16, "gaussian")]
)
def test_ops_are_registered_as_torch_expects(backend, dtype, form):
    patches, coords = random_patches(2, 5, 3, 4, 4, dtype=dtype), random_coords(2, 5)
    weight, gaussian = gaussian_weight(4) if form == "table" else None, form == "gaussian"
    ops, fill = torch.ops.icseg, numerics.scalar(-10.0, patches.device)
    for keep_total in (False, True):
        arguments = (patches, coords, weight, gaussian, fill, 7, 9, keep_total, backend)
        torch.library.opcheck(ops.scatter_patches.default, arguments)
    _, total, _ = ops.scatter_patches(*arguments)
    grad = random_patches(2, 3, 7, 9, dtype=dtype)
    torch.library.opcheck(ops.scatter_patches_backward.default, (grad, total, coords, weight, gaussian, 4, backend))


def test_autocast_changes_nothing():
    patches, coords = random_patches(1, 4, 1, 3, 3), random_coords(1, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scatter_patches(patches, coords, (7, 9), weight="gaussian")
    assert torch.equal(found.mean, scatter_patches(patches, coords, (7, 9), weight="gaussian").mean)


def test_flops():
    patches, coords = random_patches(2, 5, 3, 4, 4).requires_grad_(), random_coords(2, 5)
    with FlopCounterMode(display=False) as counter:
        mean = scatter_patches(patches, coords, (7, 9)).mean
    forward = flops.scatter_patches_flops(2, 5, 3, 4, 7, 9)
    assert counter.get_total_flops() == forward == 2 * 3 * (2 * 5 * 16 + 7 * 9)
    with FlopCounterMode(display=False) as counter:
        mean.sum().backward()
    assert counter.get_total_flops() == 2 * 3 * (5 * 16 + 7 * 9)


COORDS = torch.zeros(1, 2, 2, dtype=torch.int64)


PATCHES = torch.zeros(1, 2, 1, 3, 3)
BAD_PATCHES = r"patches must have shape \[B, K, C, p, p\] with p at least 1, got "


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "patches must be a torch.Tensor, got float", (1.0, COORDS, (4, 4)), {}),
        (TypeError, "patches must be a dense tensor, got layout", (PATCHES.to_sparse(), COORDS, (4, 4)), {}),
        (TypeError, "patches must be .*float.* got torch.uint8", (PATCHES.byte(), COORDS, (4, 4)), {}),
        (TypeError, "patches .* got torch.float8", (PATCHES.to(torch.float8_e5m2), COORDS, (4, 4)), {}),
        (ValueError, BAD_PATCHES + r"\[1, 2, 1, 3, 2\]", (PATCHES[..., :2], COORDS, (4, 4)), {}),
        (ValueError, BAD_PATCHES + r"\[2, 1, 3, 3\]", (PATCHES[0], COORDS, (4, 4)), {}),
        (ValueError, BAD_PATCHES + r"\[1, 2, 1, 0, 0\]", (PATCHES[..., :0, :0], COORDS, (4, 4)), {}),
        (TypeError, "coords must be a torch.Tensor, got list", (PATCHES, [[0, 0]], (4, 4)), {}),
        (
            ValueError,
            r"coords must have shape \[B, K, 2\] = \[1, 2, 2\], got \[1, 3, 2\]",
            (PATCHES, COORDS.new_zeros(1, 3, 2), (4, 4)),
            {},
        ),
        (TypeError, "coords must be an integer tensor, got torch.float32", (PATCHES, COORDS.float(), (4, 4)), {}),
        (TypeError, "coords must be .* got torch.uint16", (PATCHES, COORDS.to(torch.uint16), (4, 4)), {}),
        (ValueError, "coords must be on cpu, .* got meta", (PATCHES, COORDS.to("meta"), (4, 4)), {}),
        (ValueError, r"size\[0\] must be an integer of at least 0, got -1", (PATCHES, COORDS, (-1, 4)), {}),
        (TypeError, r"size\[1\] must be an integer of at least 0, got 4.0", (PATCHES, COORDS, (4, 4.0)), {}),
        (TypeError, r"size\[1\] .* got True", (PATCHES, COORDS, (4, True)), {}),
        (ValueError, "size must be a pair of integers, got 3 of them", (PATCHES, COORDS, (4, 4, 4)), {}),
        (TypeError, "size must be a pair of integers, got 4", (PATCHES, COORDS, 4), {}),
        (TypeError, "size must be a pair of integers, got None", (PATCHES, COORDS, None), {}),
        (TypeError, "fill must be a finite number, got None", (PATCHES, COORDS, (4, 4)), {"fill": None}),
        (ValueError, "fill must be a finite number, got inf", (PATCHES, COORDS, (4, 4)), {"fill": float("inf")}),
        (ValueError, "weight must be None", (PATCHES, COORDS, (4, 4)), {"weight": "uniform"}),
        (TypeError, "weight must be a torch.Tensor, got float", (PATCHES, COORDS, (4, 4)), {"weight": 1.0}),
        (
            TypeError,
            "weight must be real, got torch.complex64",
            (PATCHES, COORDS, (4, 4)),
            {"weight": torch.ones(3, 3, dtype=torch.complex64)},
        ),
        (ValueError, r"p = 3, got \[2, 2\]", (PATCHES, COORDS, (4, 4)), {"weight": torch.ones(2, 2)}),
        (
            ValueError,
            "weight must be on cpu, .* got meta",
            (PATCHES, COORDS, (4, 4)),
            {"weight": torch.ones(3, 3, device="meta")},
        ),
        (BackendError, "scatter_patches has no cuda", (PATCHES, COORDS, (4, 4)), {"backend": "cuda"}),
    ],
)
def test_bad_arguments_are_named(error, message, arguments, options):
    with pytest.raises(error, match=message):
        scatter_patches(*arguments, **options)


def test_numpy_numbers_are_numbers():
    patches, coords = random_patches(1, 2, 1, 3, 3), random_coords(1, 2)
    found = scatter_patches(patches, coords, (np.int64(7), np.int32(9)), fill=np.float32(2.5))
    assert torch.equal(found.mean, scatter_patches(patches, coords, (7, 9), fill=2.5).mean)


@pytest.mark.parametrize("patch_size", [0, 2.0, True, None])
def test_gaussian_weight_of_a_bad_size(patch_size):
    with pytest.raises((TypeError, ValueError), match="patch_size must be an integer of at least 1"):
        gaussian_weight(patch_size)


def agrees_with_the_reference(
    patches: Tensor, coords: Tensor, size: tuple[int, int], weight: str | Tensor | None = None
) -> None:
    """Native mean, coverage and gradient are the reference's up to rounding."""
    upstream = random_patches(patches.shape[0], patches.shape[2], *size, dtype=patches.dtype, seed=7)
    found = []
    for backend in ("native", "reference"):
        leaf = patches.detach().requires_grad_()
        mean, coverage = scatter_patches(leaf, coords, size, weight=weight, fill=2.5, backend=backend)
        with torch.no_grad():
            bare = scatter_patches(leaf, coords, size, weight=weight, fill=2.5, backend=backend)
        assert torch.equal(bare.mean.nan_to_num(), mean.nan_to_num())
        assert torch.equal(bare.coverage, coverage)
        found.append((mean, torch.autograd.grad(mean, leaf, upstream)[0], coverage))
    assert torch.equal(found[0][2], found[1][2])
    tolerance = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-6, torch.float64: 1e-14}[patches.dtype]
    for native, expected in zip(found[0][:2], found[1][:2], strict=True):
        assert native.dtype == expected.dtype == patches.dtype
        assert native.is_contiguous()
        torch.testing.assert_close(native, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@native_only
@pytest.mark.parametrize("kind", ["uniform", "gaussian", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("patch_size", [1, 5, 8, 16, 24])
def test_native_agrees_with_the_reference(isa, poisoned, kind, dtype, patch_size):
    patches = random_patches(2, 9, 2, patch_size, patch_size, dtype=dtype)
    coords = random_coords(2, 9, low=-patch_size - 1, high=160)
    agrees_with_the_reference(patches, coords, (37, 153), weights(kind, patch_size)[0])
    crowded = random_coords(2, 9, low=-3, high=10).to(torch.int32)
    agrees_with_the_reference(patches, crowded, (33, 19), weights(kind, patch_size)[0])


@native_only
def test_native_writes_more_patches_than_it_lists(isa, poisoned):
    """Lists of 512 a band and 128 a tile."""
    for patch_size, size in ((8, (20, 40)), (3, (20, 40)), (8, (16, 4200))):
        for dtype in (torch.int32, torch.int64):
            patches = random_patches(1, 700, 2, patch_size, patch_size)
            coords = random_coords(1, 700, low=-8, high=size[1])
            coords[..., 0] = coords[..., 0].clamp(max=4)
            agrees_with_the_reference(patches, coords.to(dtype), size, "gaussian")


@native_only
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_native_treats_what_is_not_finite_as_the_reference(isa, value):
    patches, coords = random_patches(1, 6, 2, 8, 8), random_coords(1, 6, low=-4, high=12)
    patches[:, 2, 0, 3] = value
    table = torch.rand(8, 8)
    table[3, :4], table[5] = torch.nan, -1.0
    table[3, 5] = 0.0
    for weight in (None, table):
        agrees_with_the_reference(patches, coords, (16, 16), weight)


@native_only
@given(
    st.tuples(*[st.integers(0, n) for n in (3, 9, 3)]),
    st.integers(1, 20),
    st.tuples(st.integers(0, 40), st.integers(0, 300)),
    st.sampled_from(["uniform", "gaussian", "tensor"]),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_native_agrees_at_any_shape(shape, patch_size, size, kind, seed):
    batch, count, channels = shape
    patches = random_patches(batch, count, channels, patch_size, patch_size, seed=seed)
    coords = random_coords(batch, count, low=-patch_size - 1, high=max(size) + 2, seed=seed)
    agrees_with_the_reference(patches, coords, size, weights(kind, patch_size)[0])


VIEWS = {
    "last dimension transposed": lambda x: x.transpose(-1, -2),
    "channels last": lambda x: x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    "every second pixel": lambda x: x.repeat_interleave(2, -1)[..., 1::2],
    "offset rows": lambda x: F.pad(x, (1, 2, 1, 0))[..., 1:, 1:-2],
    "expanded patches": lambda x: x[:, :1].expand_as(x),
    "expanded pixels": lambda x: x[..., :1, :1].expand_as(x),
    "batch and count swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@native_only
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("patch_size", [8, 5])
def test_native_reads_any_strides(isa, view, patch_size):
    patches = view(random_patches(2, 6, 3, patch_size, patch_size))
    coords = random_coords(2, 6, 2, low=-3, high=20)[..., 0]  # strided as well
    for dtype in (torch.float32, torch.bfloat16):
        agrees_with_the_reference(patches.to(dtype), coords, (18, 21), "gaussian")
    leaf = random_patches(2, 6, 3, patch_size, patch_size).requires_grad_()
    for upstream in (random_patches(21, 3, 18, 2).permute(3, 1, 2, 0), torch.ones(()).expand(2, 3, 18, 21)):
        found = [
            torch.autograd.grad(scatter_patches(leaf, coords, (18, 21), backend=name).mean, leaf, upstream)[0]
            for name in ("native", "reference")
        ]
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_coords_of_every_integer_type():
    patches, coords = random_patches(1, 3, 2, 4, 4), torch.tensor([[[0, 0], [5, 8], [7, 2]]])
    expected = scatter_patches(patches, coords, (9, 12)).mean
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(scatter_patches(patches, coords.to(dtype), (9, 12)).mean, expected)


def test_offsets_beyond_32_bits():
    distance = 2**32 + 5
    memory = torch.empty(distance + 64, dtype=torch.bfloat16)  # reserved, and touched in two places only
    patches = memory.as_strided((1, 2, 1, 4, 4), (0, distance, 0, 4, 1))
    patches.copy_(random_patches(1, 2, 1, 4, 4))
    coords = torch.tensor([[[0, 0], [2, 1]]])
    found, expected = (scatter_patches(x, coords, (7, 7)).mean for x in (patches, patches.clone()))
    assert torch.equal(found, expected)
    if "native" in BACKENDS:
        total = torch.ones(2, 1, 4, 4)
        grad = memory.as_strided((2, 1, 4, 4), (distance, 0, 4, 1))
        rest = (total, torch.zeros(2, 1, 2, dtype=torch.int64), None, 4)
        assert torch.equal(scatter_native.scatter_backward(grad, *rest).flatten(), patches.flatten())


def test_functorch_gradient():
    patches, coords = random_patches(2, 5, 3, 4, 4), random_coords(2, 5)

    def loss(x: Tensor) -> Tensor:
        return scatter_patches(x, coords, (7, 9), weight="gaussian").mean.square().sum()

    leaf = patches.clone().requires_grad_()
    assert torch.equal(torch.func.grad(loss)(patches), torch.autograd.grad(loss(leaf), leaf)[0])


def test_the_gaussian_of_inference_mode_serves_training_too():
    patches, coords = random_patches(1, 2, 1, 11, 11), random_coords(1, 2)
    with torch.inference_mode():
        first = scatter_patches(patches, coords, (12, 12), weight="gaussian").mean
    leaf = patches.clone().requires_grad_()
    mean = scatter_patches(leaf, coords, (12, 12), weight="gaussian").mean
    mean.sum().backward()
    assert torch.equal(mean, first)
    table = scatter_patches(patches, coords, (12, 12), weight=gaussian_weight(11)).mean
    assert torch.equal(mean, table)


@native_only
def test_native_ops_never_read_beyond_their_tensors():
    patches, coords, total = torch.zeros(2, 3, 1, 4, 4), torch.zeros(2, 3, 2, dtype=torch.int64), torch.ones(2, 1, 5, 5)
    grad, table = torch.zeros(2, 1, 5, 5), torch.ones(3, 3)
    forward, backward = scatter_native.scatter, scatter_native.scatter_backward
    for call in (
        lambda: forward(patches, coords[:1], None, 0.0, 5, 5, True),
        lambda: forward(patches[..., :3], coords, None, 0.0, 5, 5, True),
        lambda: forward(patches, coords, table, 0.0, 5, 5, True),
        lambda: forward(patches, coords, torch.ones(4, 4).double(), 0.0, 5, 5, True),
        lambda: forward(patches, coords.to("meta"), None, 0.0, 5, 5, True),
        lambda: forward(patches.to("meta"), coords, None, 0.0, 5, 5, True),
    ):
        with pytest.raises(
            ValueError, match=r"needs patches \[B, K, C, p, p\], .*; got patches \[2, 3, 1, 4, [34]\] of"
        ):
            call()
    for call in (
        lambda: backward(grad, total[:1], coords, None, 4),
        lambda: backward(grad, total.double(), coords, None, 4),
        lambda: backward(grad, total, coords[:1], None, 4),
        lambda: backward(grad, total, coords, table, 4),
        lambda: backward(grad, total.to("meta"), coords, None, 4),
        lambda: backward(grad.to("meta"), total, coords, None, 4),
    ):
        with pytest.raises(ValueError, match=r"needs grad \[B, C, H, W\], .*; got grad \[2, 1, 5, 5\] of"):
            call()
    assert scatter_native.unsupported(patches.to("meta")) == ["it runs on the CPU, and patches is on meta"]


@native_only
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, -1, 1, 4, 8, 8), "sizes must not be negative"),
        ((-1, 1, 1, 4, 8, 8), "sizes must not be negative"),
        ((1, 1, 1, 0, 8, 8), "patch must be at least 1"),
        ((2**40, 1, 2**40, 4, 0, 8), "beyond 63 bits"),
        ((1, 1, 1, 2**40, 8, 8), "beyond 63 bits"),
        ((1, 1, 1, 4, 2**62, 8), "beyond 63 bits"),
        ((0, 0, 0, 4, 2**32, 2**32), "beyond 63 bits"),
    ],
)
def test_native_refuses_impossible_sizes(sizes, message):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        forward, backward = scatter_native._scatter[dtype], scatter_native._scatter_backward[dtype]
        for code in (
            forward(*(None,) * 6, 0.0, *sizes, *(0,) * 5, 0),
            backward(*(None,) * 5, *sizes, *(0,) * 4, 0),
        ):
            with pytest.raises(RuntimeError, match=message):
                library.check(code)


@native_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_same_bits_with_any_number_of_threads(threads, dtype):
    patches, coords = random_patches(1, 64, 3, 16, 16, dtype=dtype), random_coords(1, 64, low=-8, high=500)
    found = []
    for count in (1, 2):
        threads(count)
        leaf = patches.clone().requires_grad_()
        mean, coverage = scatter_patches(leaf, coords, (512, 500), weight="gaussian", backend="native")
        found.append((mean, coverage, torch.autograd.grad(mean.square().sum(), leaf)[0]))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_reference_keeps_the_total_only_if_asked():
    patches, coords = random_patches(1, 2, 1, 3, 3), random_coords(1, 2)
    for implementation in (reference, scatter_native)[: len(BACKENDS)]:
        for keep, shape in ((False, (0,)), (True, (1, 1, 5, 5))):
            _, total, coverage = implementation.scatter(patches, coords, None, 0.0, 5, 5, keep)
            assert total.shape == shape
            assert not keep or torch.equal(total > 0, coverage)
