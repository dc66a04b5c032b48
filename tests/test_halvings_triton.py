"""halvings by its Triton kernel: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from samples import DEVICE
from torch import Tensor

from icseg_kernels import BackendError, halvings, triton_launch

pytestmark = pytest.mark.skipif(bool(triton_launch.missing()), reason="Triton cannot run here")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

Found = tuple[list[Tensor], list[Tensor]]


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype).to(DEVICE)


def by_reference(x: Tensor, count: int, deviations: int) -> Found:
    """On the CPU."""
    means, spreads = halvings(x.cpu(), count, deviations=deviations, backend="reference")
    return [mean.to(DEVICE) for mean in means], [spread.to(DEVICE) for spread in spreads]


def assert_same(found: Found, expected: Found) -> None:
    """The same bits of the means; torch's square root is not always rounded correctly."""
    assert [len(part) for part in found] == [len(part) for part in expected]
    for a, b in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert a.is_contiguous()
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=max(1e-6, torch.finfo(a.dtype).eps), atol=0, equal_nan=True)
        assert a.is_contiguous()


@pytest.mark.parametrize(
    ("count", "deviations"), [(0, 0), (1, 0), (1, 1), (4, 2), (5, 5), (6, 6), (8, 6), (7, 1), (13, 13)]
)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (70, 1), (5, 7), (64, 64), (37, 50)])
def test_equals_the_reference(poisoned, size, count, deviations):
    x = image(1, 2, *size)
    assert_same(halvings(x, count, deviations=deviations, backend="triton"), by_reference(x, count, deviations))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(poisoned, dtype):
    """Sums stay in float32 from launch to launch, so that means are rounded once and deviations do not cancel."""
    if dtype == torch.float64 and not triton_launch.INTERPRETED:
        pytest.skip("float64 is for the interpreter")
    x = (0.8 + 0.02 * image(2, 1, 33, 40)).to(dtype)
    for count, deviations in ((8, 7), (8, 0), (3, 2)):
        assert_same(halvings(x, count, deviations=deviations, backend="triton"), by_reference(x, count, deviations))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_pixels(bad):
    x = image(2, 2, 50, 40)
    x[1, 0, 21, 38] = bad
    assert_same(halvings(x, 7, deviations=6, backend="triton"), by_reference(x, 7, 6))


def test_strided_views(poisoned):
    x = image(2, 2, 21, 34)
    for view in (x.transpose(2, 3), x.to(memory_format=torch.channels_last), x[..., 1::2], x[:1].expand(3, -1, -1, -1)):
        assert_same(halvings(view, 4, deviations=3, backend="triton"), by_reference(view, 4, 3))
    for view in (x[..., :1].expand(-1, -1, -1, 5), x[:, :, :1].expand(-1, -1, 6, -1)):
        assert_same(halvings(view, 7, deviations=3, backend="triton"), by_reference(view, 7, 3))


@pytest.mark.parametrize("shape", [(0, 2, 5, 4), (2, 0, 5, 4), (0, 0, 1, 1)])
def test_no_images(shape):
    assert_same(halvings(image(*shape), 7, deviations=1, backend="triton"), by_reference(image(*shape), 7, 1))


def test_offsets_beyond_32_bits():
    x = torch.empty(2**31 + 256, dtype=torch.float16, device=DEVICE).as_strided((2, 1, 16, 16), (2**31, 256, 16, 1))
    x.copy_(image(2, 1, 16, 16))
    found, expected = (halvings(view, 3, deviations=3, backend="triton") for view in (x, x.clone()))
    assert_same(found, expected)


def test_the_same_bits_twice():
    first, second = (halvings(image(1, 2, 70, 37), 7, deviations=7, backend="triton") for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("count", "deviations"), [(3, 2), (7, 7)])
def test_opcheck(count, deviations):
    torch.library.opcheck(
        torch.ops.icseg.halvings.default,
        (image(2, 1, 9, 6), count, deviations, "triton"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_compiles_into_one_graph():
    torch._dynamo.reset()

    def run(x: Tensor) -> Found:
        return halvings(x, 3, deviations=2, backend="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in (1.0, 2.0):
            x = image(2, 1, 16, 11) + number
            assert_same(compiled(x), run(x))


def test_what_is_refused():
    x = image(1, 1, 8, 8)
    for other, reason in (
        (x.to("meta"), "it runs on CUDA devices, and image is on meta"),
        (x.clone().requires_grad_(), "it has no gradients, and image requires one"),
    ):
        assert halvings(other, 1)[0][0].shape == (1, 1, 4, 4)
        with pytest.raises(BackendError, match=f"the triton backend cannot serve halvings of .*{reason}"):
            halvings(other, 2, backend="triton")
    with torch.no_grad():
        assert not halvings(x.clone().requires_grad_(), 1, backend="triton")[0][0].requires_grad
    for bad, counts in ((x[0], (1, 0)), (x, (1, 2)), (x, (1, -1))):
        with pytest.raises(ValueError, match=r"image must be \[N, C, h, w\] and deviations from 0 to count"):
            torch.ops.icseg.halvings(bad, *counts, "triton")


@pytest.mark.gpu
@on_gpu
def test_bfloat16():
    x = image(2, 3, 130, 97, dtype=torch.bfloat16)
    assert_same(halvings(x, 8, deviations=7, backend="triton"), by_reference(x, 8, 7))


@pytest.mark.gpu
@on_gpu
def test_cuda_graph():
    x = image(2, 1, 200, 131)
    halvings(x, 8, deviations=7, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = halvings(x, 8, deviations=7, backend="triton")
    x += 1
    graph.replay()
    assert_same(captured, halvings(x, 8, deviations=7, backend="triton"))
