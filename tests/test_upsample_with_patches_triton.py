"""upsample_with_patches by its Triton kernel: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from samples import DEVICE
from torch import Tensor

from icseg_kernels import BackendError, triton_launch, upsample_with_patches

pytestmark = pytest.mark.skipif(bool(triton_launch.missing()), reason="Triton cannot run here")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

INT64 = torch.iinfo(torch.int64)
Call = tuple[Tensor, Tensor, Tensor, tuple[int, int]]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def case(
    size: tuple[int, int],
    count: int = 6,
    patch: tuple[int, int] = (8, 8),
    batch: int = 1,
    channels: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Call:
    """Patches that overlap, cross borders, or lie outside."""
    generator = torch.Generator().manual_seed(1)
    coarser = normal(batch, channels, (size[0] + 1) // 2, (size[1] + 1) // 2, dtype=dtype)
    coords = [torch.randint(-patch[i] - 1, size[i] + 2, (batch, count), generator=generator) for i in (0, 1)]
    patches = normal(batch, count, channels, *patch, seed=2, dtype=dtype)
    return coarser, patches, torch.stack(coords, -1).to(DEVICE), size


def by_reference(coarser: Tensor, patches: Tensor, coords: Tensor, size: tuple[int, int]) -> Tensor:
    """On the CPU."""
    found = upsample_with_patches(coarser.cpu(), patches.cpu(), coords.cpu(), size, backend="reference")
    return found.to(DEVICE)


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.is_contiguous()
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float64: 1e-14}[found.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_by_hand():
    coarser = torch.tensor([[[[0.0, 4.0]]]], device=DEVICE)
    patches, coords = torch.full((1, 1, 1, 2, 2), 9.0, device=DEVICE), torch.tensor([[[1, 2]]], device=DEVICE)
    found = upsample_with_patches(coarser, patches, coords, (2, 4), backend="triton")
    assert found.tolist() == [[[[0.0, 1.0, 3.0, 4.0], [0.0, 1.0, 9.0, 9.0]]]]


@pytest.mark.parametrize("patch", [(8, 8), (1, 1), (5, 21)])
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 35), (19, 34)])
def test_equals_the_reference(poisoned, size, patch):
    call = case(size, patch=patch)
    assert_near(upsample_with_patches(*call, backend="triton"), by_reference(*call))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(poisoned, dtype):
    if dtype == torch.float64 and not triton_launch.INTERPRETED:
        pytest.skip("float64 is for the interpreter")
    call = case((7, 12), dtype=dtype, channels=5)
    assert_near(upsample_with_patches(*call, backend="triton"), by_reference(*call))


def test_errors_are_those_of_the_reference_against_float64():
    call = case((20, 17))
    exact = by_reference(*(x.double() for x in call[:2]), *call[2:])
    found, expected = ((x.double() - exact).abs().max() for x in (run(call), by_reference(*call)))
    assert found <= 1.5 * expected + 1e-8


def run(call: Call) -> Tensor:
    return upsample_with_patches(*call, backend="triton")


def test_patches_arrive_bit_for_bit_and_the_last_one_wins():
    coarser, patches, _, size = case((20, 20), count=5, patch=(8, 6), batch=2)
    coords = torch.tensor([[3, 4], [3, 4], [7, 6], [18, -2], [0, 18]], device=DEVICE).expand(2, -1, -1)
    patches[:, 0] = math.nan  # wholly hidden
    patches[:, 1, :, 2, 2] = math.nan
    patches[:, 2, :, 5, 5] = -0.0
    found = upsample_with_patches(coarser, patches, coords, size, backend="triton")
    assert_near(found, by_reference(coarser, patches, coords, size))
    assert torch.equal(found[:, :, 7:15, 6:12].view(torch.int32), patches[:, 2].contiguous().view(torch.int32))


def test_more_patches_than_are_tested_at_once():
    coarser, patches, coords, size = case((9, 12), count=300, patch=(2, 2), channels=1)
    coords += 40
    coords[0, 10::90] = torch.tensor([[3, 2], [3, 3], [0, 0], [8, 11]], device=DEVICE)
    assert_near(
        upsample_with_patches(coarser, patches, coords, size, backend="triton"),
        by_reference(coarser, patches, coords, size),
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_hostile_coords(dtype):
    coarser, patches, _, size = case((9, 7), count=7)
    limits = torch.iinfo(dtype)
    rows = [[0, limits.min], [limits.max, 0], [limits.min, limits.min], [-8, 3], [9, 0], [-7, -7], [8, 6]]
    coords = torch.tensor([rows], dtype=dtype, device=DEVICE)
    found = upsample_with_patches(coarser, patches, coords, size, backend="triton")
    assert_near(found, by_reference(coarser, patches, coords, size))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_neighbourhood(bad):
    coarser, patches, coords, size = case((20, 18), count=3)
    coarser[0, 1, 4, 5] = coarser[0, 0, 0, 0] = bad
    assert_near(
        upsample_with_patches(coarser, patches, coords, size, backend="triton"),
        by_reference(coarser, patches, coords, size),
    )


def test_strided_views(poisoned):
    coarser, patches, coords, size = case((9, 12), batch=2)
    expected = run((coarser, patches, coords, size))
    spread = torch.stack([patches, patches], -1)[..., 0]
    turned = coords.transpose(0, 2).contiguous().transpose(0, 2)
    for view in (coarser.to(memory_format=torch.channels_last), coarser.mT.contiguous().mT):
        assert torch.equal(upsample_with_patches(view, spread, turned, size, backend="triton"), expected)
    same = coarser[:1, :1].expand(2, 2, -1, -1), patches[:, :1].expand(-1, 6, -1, -1, -1), coords[:1].expand(2, -1, -1)
    assert_near(run((*same, size)), by_reference(*same, size))


@pytest.mark.parametrize(("batch", "count"), [(2, 0), (0, 4), (0, 0)])
def test_none_of_something(poisoned, batch, count):
    call = case((5, 6), count=count, batch=batch)
    assert_near(run(call), by_reference(*call))


def test_offsets_beyond_32_bits():
    coarser, patches, coords, size = case((8, 8), channels=1, batch=2)
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided((2, 1, 4, 4), (2**31, 16, 4, 1))
    far.copy_(coarser)
    found, expected = (run((x, patches.half(), coords, size)) for x in (far, far.clone()))
    assert torch.equal(found, expected)


def test_the_same_bits_twice():
    call = case((20, 17))
    assert torch.equal(run(call), run(call))


def test_opcheck():
    coarser, patches, coords, size = case((6, 7), count=3)
    torch.library.opcheck(
        torch.ops.icseg.upsample_with_patches.default,
        (coarser, patches, coords, *size, "triton"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compiles_into_one_graph():
    torch._dynamo.reset()

    def double(coarser: Tensor, patches: Tensor, coords: Tensor) -> Tensor:
        return upsample_with_patches(coarser, patches, coords, (6, 7), backend="triton")

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 1):
            call = case((6, 7), count=3)[:3]
            call[0].add_(seed)
            assert torch.equal(compiled(*call), double(*call))


def test_what_is_refused():
    coarser, patches, coords, size = case((6, 7))
    with pytest.raises(BackendError, match="it runs on CUDA devices, and coarser is on meta"):
        run((coarser.to("meta"), patches.to("meta"), coords.to("meta"), size))
    with pytest.raises(BackendError, match="it has no gradients, and coarser or patches requires one"):
        run((coarser, patches.clone().requires_grad_(), coords, size))
    with torch.no_grad():
        assert not run((coarser, patches.clone().requires_grad_(), coords, size)).requires_grad
    for bad in (
        (coarser, patches.half(), coords),
        (coarser, patches[:, :, :1], coords),
        (coarser, patches, coords[:, 1:]),
    ):
        with pytest.raises(ValueError, match=r"upsample_with_patches needs coarser|coords must have shape"):
            torch.ops.icseg.upsample_with_patches(*bad, *size, "triton")


@pytest.mark.gpu
@on_gpu
def test_bfloat16():
    call = case((79, 131), dtype=torch.bfloat16, batch=2, channels=3)
    assert_near(run(call), by_reference(*call))


@pytest.mark.gpu
@on_gpu
def test_cuda_graph():
    coarser, patches, coords, size = case((40, 44), count=20)
    run((coarser, patches, coords, size))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run((coarser, patches, coords, size))
    coords += 3
    graph.replay()
    assert torch.equal(captured, run((coarser, patches, coords, size)))
