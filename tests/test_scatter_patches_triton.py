"""scatter_patches by its Triton kernels: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from samples import DEVICE
from torch import Tensor

from icseg_kernels import BackendError, gather_patches, numerics, scatter_patches, triton_launch
from icseg_kernels.patches import NO_PATCH, gaussian_weight

pytestmark = pytest.mark.skipif(bool(triton_launch.missing()), reason="Triton cannot run here")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

INT32, INT64 = torch.iinfo(torch.int32), torch.iinfo(torch.int64)
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
    [INT32.min, INT32.max],
]
TABLE = torch.tensor([[0, 1.5, 0.25, 2], [1, math.nan, 1, 1], [0.5, 1, -1, 3], [1e-3, 1, 1, 1]])


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def corners(*shape: int, low: int = -3, high: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(low, high, (*shape, 2), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def run(
    patches: Tensor, coords: Tensor, size: tuple[int, int], backend: str, weight: str | Tensor | None = None
) -> list[Tensor]:
    """mean, coverage and the gradient; the reference's on the CPU."""
    if backend == "reference":
        patches, coords = patches.cpu(), coords.cpu()
    leaf = patches.detach().requires_grad_()
    table = weight.to(leaf.device) if isinstance(weight, Tensor) else weight
    mean, coverage = scatter_patches(leaf, coords, size, weight=table, fill=0.1, backend=backend)
    upstream = randn(*mean.shape, dtype=mean.dtype, seed=7).to(leaf.device)
    return [x.detach().to(DEVICE) for x in (mean, coverage, *torch.autograd.grad(mean, leaf, upstream))]


def assert_equal_to_reference(*call: object, weight: str | Tensor | None = None, tolerance: float = 0) -> None:
    found, expected = (run(*call, backend, weight=weight) for backend in ("triton", "reference"))
    for a, b in zip(found, expected, strict=True):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("weight", [None, TABLE], ids=["uniform", "table"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_has_the_bits_of_the_reference(poisoned, weight, dtype):
    if dtype == torch.float64 and not triton_launch.INTERPRETED:
        pytest.skip("float64 is for the interpreter")
    coords = torch.tensor(HOSTILE, device=DEVICE).expand(2, -1, -1)
    assert_equal_to_reference(randn(2, len(HOSTILE), 3, 4, 4, dtype=dtype), coords, (7, 9), weight=weight)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.float64, 1e-14)])
def test_gaussian_weights(poisoned, dtype, tolerance):
    if dtype == torch.float64 and not triton_launch.INTERPRETED:
        pytest.skip("float64 is for the interpreter")
    for patch_size, high in ((1, 3), (4, 9), (9, 9)):
        coords, patches = corners(1, 4, high=high), randn(1, 4, 2, patch_size, patch_size, dtype=dtype)
        assert_equal_to_reference(patches, coords, (7, 9), weight="gaussian", tolerance=tolerance)


@pytest.mark.parametrize(
    ("channels", "patch_size", "size"), [(1, 1, (3, 3)), (1, 5, (17, 33)), (5, 3, (9, 48)), (2, 16, (18, 7))]
)
def test_sizes_that_are_no_multiple_of_a_tile(poisoned, channels, patch_size, size):
    coords = corners(1, 6, low=-patch_size, high=size[1])
    assert_equal_to_reference(randn(1, 6, channels, patch_size, patch_size), coords, size)


def test_more_patches_than_are_tested_at_once(poisoned):
    patches, coords = randn(1, 300, 1, 2, 2), corners(1, 300, low=20, high=400)  # few on the image, in any chunk
    coords[0, ::60] = corners(5, low=0, high=5)
    found = scatter_patches(patches, coords, (6, 7), backend="triton")
    expected = scatter_patches(patches.cpu(), coords.cpu(), (6, 7), backend="reference")
    assert torch.equal(found.mean.cpu(), expected.mean)
    assert torch.equal(found.coverage.cpu(), expected.coverage)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_coords_of_every_type(dtype):
    coords = torch.tensor([[[0, 0], [5, 8], [7, 2]]], device=DEVICE).to(dtype)
    assert_equal_to_reference(randn(1, 3, 1, 4, 4), coords, (7, 9))


def test_any_strides(poisoned):
    patches, coords = randn(4, 4, 3, 3, 2).permute(4, 3, 2, 1, 0), corners(3, 2).transpose(0, 1)
    for view in (patches, randn(2, 1, 3, 1, 4).expand(2, 3, 3, 4, 4)):
        assert_equal_to_reference(view, coords, (7, 9))
    mean, _ = scatter_patches(leaf := patches.detach().requires_grad_(), coords, (7, 9), backend="triton")
    for upstream in (randn(9, 7, 3, 2).permute(3, 2, 1, 0), torch.ones((), device=DEVICE).expand(2, 3, 7, 9)):
        found, expected = (torch.autograd.grad(mean, leaf, g, retain_graph=True) for g in (upstream, upstream.clone()))
        assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("nothing", [0.0, -1.0, math.nan])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_has_no_weight_never_leaks(nothing, value):
    weight = torch.tensor([[1.0, nothing], [1.0, 1.0]], device=DEVICE)
    patches = torch.ones(1, 2, 1, 2, 2, device=DEVICE)
    patches[0, :, 0, 0, 1] = value
    patches.requires_grad_()
    coords = torch.tensor([[[0, 0], [0, 1]]], device=DEVICE)
    found = scatter_patches(patches, coords, (2, 3), weight=weight, backend="triton")
    assert found.mean.tolist() == [[[[1, 1, -10], [1, 1, 1]]]]
    assert found.coverage.tolist() == [[[[True, True, False], [True, True, True]]]]
    found.mean.backward(torch.tensor([[[[1.0, 1.0, value], [1.0, 2.0, 1.0]]]], device=DEVICE))
    assert patches.grad.tolist() == [[[[[1, 0], [1, 1]]], [[[1, 0], [1, 1]]]]]


def test_what_lies_outside_never_leaks():
    patches = torch.full((1, 3, 1, 2, 2), math.nan, device=DEVICE, requires_grad=True)
    coords = torch.tensor([[[NO_PATCH, NO_PATCH], [5, 0], [0, -2]]], device=DEVICE)
    found = scatter_patches(patches, coords, (5, 5), backend="triton")
    assert (found.mean == -10).all()
    assert not found.coverage.any()
    found.mean.sum().backward()
    assert not patches.grad.any()


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 0, 3, 4, 4), (7, 9)),
        ((0, 5, 3, 4, 4), (7, 9)),
        ((2, 5, 0, 4, 4), (7, 9)),
        ((2, 5, 3, 4, 4), (0, 9)),
        ((2, 5, 3, 4, 4), (7, 0)),
        ((1, 1, 1, 1, 1), (1, 1)),
    ],
)
def test_empty_inputs_and_one_pixel(poisoned, shape, size):
    assert_equal_to_reference(torch.ones(shape, device=DEVICE), torch.zeros(*shape[:2], 2).long().to(DEVICE), size)


def test_offsets_beyond_32_bits():
    distance = 2**31 + 5
    memory = torch.empty(distance + 64, dtype=torch.float16, device=DEVICE)
    patches = memory.as_strided((1, 2, 1, 4, 4), (0, distance, 0, 4, 1))
    patches.copy_(randn(1, 2, 1, 4, 4))
    coords = torch.tensor([[[0, 0], [1, 1]]], device=DEVICE)
    found, expected = (scatter_patches(x, coords, (5, 5), backend="triton").mean for x in (patches, patches.clone()))
    assert torch.equal(found, expected)


def test_what_was_gathered_comes_back():
    source, coords = randn(1, 2, 9, 11), corners(1, 4, high=9)
    found = scatter_patches(gather_patches(source, coords, 4, backend="triton"), coords, (9, 11), backend="triton")
    torch.testing.assert_close(found.mean, torch.where(found.coverage, source, -10.0), rtol=2e-7, atol=0)


@pytest.mark.skipif(not triton_launch.INTERPRETED, reason="float64 is for the interpreter")
@pytest.mark.parametrize("weight", [None, "gaussian"])
def test_gradcheck(weight):
    patches, coords = randn(1, 2, 1, 2, 2, dtype=torch.float64).requires_grad_(), corners(1, 2, low=0, high=2)

    def write(x: Tensor) -> Tensor:
        return scatter_patches(x, coords, (3, 4), weight=weight, backend="triton").mean

    assert torch.autograd.gradcheck(write, patches, nondet_tol=0.0)


def test_the_same_bits_twice():
    patches, coords = randn(2, 9, 3, 5, 5), corners(2, 9)
    assert all(map(torch.equal, *(run(patches, coords, (9, 12), "triton", weight="gaussian") for _ in range(2))))


@pytest.mark.parametrize(("dtype", "form"), [(torch.float32, "table"), (torch.float16, None)])
def test_registered_as_torch_expects(dtype, form):
    patches, coords = randn(2, 3, 2, 4, 4, dtype=dtype), corners(2, 3)
    weight = gaussian_weight(4, device=DEVICE) if form == "table" else None
    ops, fill = torch.ops.icseg, numerics.scalar(-10.0, patches.device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for keep_total in (False, True):
        arguments = (patches, coords, weight, False, fill, 7, 9, keep_total, "triton")
        torch.library.opcheck(ops.scatter_patches.default, arguments, test_utils=tests)
    mean, total, _ = ops.scatter_patches(*arguments)
    expected = ops.scatter_patches(*(x.cpu() if isinstance(x, Tensor) else x for x in arguments[:-1]), "reference")
    assert torch.equal(mean.cpu(), expected[0])
    assert torch.equal(total.cpu(), expected[1])
    arguments = (randn(2, 2, 7, 9, dtype=dtype), total, coords, weight, False, 4, "triton")
    torch.library.opcheck(ops.scatter_patches_backward.default, arguments)


def test_compiles_into_one_graph():
    torch._dynamo.reset()

    def write(patches: Tensor, coords: Tensor) -> Tensor:
        mean, coverage = scatter_patches(patches, coords, (7, 9), weight="gaussian", backend="triton")
        return (mean.square() * coverage).sum()

    compiled = torch.compile(write, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 1):
            patches, coords = randn(1, 3, 2, 4, 4, seed=seed).requires_grad_(), corners(1, 3, seed=seed)
            (expected,) = torch.autograd.grad(write(patches, coords), patches)
            (found,) = torch.autograd.grad(compiled(patches, coords), patches)
            assert torch.equal(found, expected)


def test_what_is_refused():
    patches, coords = randn(1, 2, 1, 3, 3), corners(1, 2)
    with pytest.raises(BackendError, match="it runs on CUDA devices, and patches is on meta"):
        scatter_patches(patches.to("meta"), coords.to("meta"), (4, 4), backend="triton")
    fill = numerics.scalar(0.0, patches.device)
    for bad, where, weight in (
        (patches[..., :2], coords, None),
        (patches, coords[:, :1], None),
        (patches, coords, torch.ones(2, 2, device=DEVICE)),
        (patches, coords, torch.ones(3, 3, device=DEVICE).half()),
    ):
        with pytest.raises(ValueError, match=r"scatter_patches needs (patches|weight)|coords must have shape"):
            torch.ops.icseg.scatter_patches(bad, where, weight, False, fill, 4, 4, False, "triton")
    with pytest.raises(ValueError, match="the gradient of scatter_patches needs total"):
        torch.ops.icseg.scatter_patches_backward(randn(1, 1, 4, 4), randn(1, 1, 4, 3), coords, None, False, 3, "triton")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("weight", [None, TABLE], ids=["uniform", "table"])
def test_bfloat16(weight):
    patches, coords = randn(2, 40, 3, 4, 4, dtype=torch.bfloat16), corners(2, 40, high=40)
    assert_equal_to_reference(patches, coords, (40, 41), weight=weight)


@pytest.mark.gpu
@on_gpu
def test_cuda_graph():
    patches, coords = randn(2, 30, 3, 8, 8).requires_grad_(), corners(2, 30, low=-9, high=44)

    def write() -> tuple[Tensor, Tensor, Tensor]:
        mean, coverage = scatter_patches(patches, coords, (40, 44), weight="gaussian", backend="triton")
        return mean.detach(), coverage, torch.autograd.grad(mean.square().sum(), patches)[0]

    write()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = write()
    coords.copy_(corners(2, 30, low=-9, high=44, seed=8))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, write(), strict=True))
