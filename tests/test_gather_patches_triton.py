"""gather_patches by its Triton kernels: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from samples import DEVICE
from torch import Tensor

from icseg_kernels import BackendError, gather_patches, triton_launch
from icseg_kernels.patches import NO_PATCH

pytestmark = pytest.mark.skipif(bool(triton_launch.missing()), reason="Triton cannot run here")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

INT32, INT64 = torch.iinfo(torch.int32), torch.iinfo(torch.int64)
FORMS = [{}, {"out_size": 3}, {"out_size": 4, "alignment": "published"}]
HOSTILE = [
    [0, 0],
    [2, 3],
    [2, 3],
    [-2, -1],
    [6, 7],
    [-4, 0],
    [0, -4],
    [7, 0],
    [0, 9],
    [NO_PATCH, NO_PATCH],
    [INT32.min, INT32.max],
    [INT64.min, 0],
    [INT64.max, INT64.max],
]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def corners(*shape: int, low: int = -4, high: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(low, high, (*shape, 2), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def by_reference(source: Tensor, coords: Tensor, *arguments: object, **options: object) -> Tensor:
    """On the CPU."""
    return gather_patches(source.cpu(), coords.cpu(), *arguments, backend="reference", **options).to(DEVICE)


def gradient(source: Tensor, coords: Tensor, size: object, upstream: Tensor, **options: object) -> Tensor:
    source = source.detach().requires_grad_()
    return torch.autograd.grad(gather_patches(source, coords, size, **options), source, upstream)[0]


def gradient_by_reference(source: Tensor, coords: Tensor, size: object, upstream: Tensor, **options: object) -> Tensor:
    found = gradient(source.cpu(), coords.cpu(), size, upstream.cpu(), backend="reference", **options)
    return found.to(DEVICE)


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return a.dtype == b.dtype and torch.equal(a.view(integers), b.view(integers))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.uint8,
        torch.bool,
        torch.int64,
        torch.uint16,
        torch.float8_e5m2,
    ],
)
@pytest.mark.parametrize("patch_size", [1, 4, 7])
def test_copies_are_exact(poisoned, dtype, patch_size):
    source, coords = (100 * randn(3, 7, 9)).to(dtype), torch.tensor(HOSTILE, device=DEVICE)
    found = gather_patches(source, coords, patch_size, backend="triton")
    assert found.is_contiguous()
    assert same_bits(found, by_reference(source, coords, patch_size))


def test_copies_keep_the_payload_of_nan_and_the_sign_of_zero():
    bits = torch.tensor([[[0x7FC12345, -0x80000000], [0x7F800001, 0x00000001]]], dtype=torch.int32, device=DEVICE)
    found = gather_patches(bits.view(torch.float32), torch.zeros(1, 2, dtype=torch.int32, device=DEVICE), 2)
    assert torch.equal(found.view(torch.int32)[0], bits)


@pytest.mark.parametrize("patch_size", [70, 130])
def test_patches_of_several_blocks(poisoned, patch_size):
    source, coords = randn(3, 90, 40).half(), torch.tensor([[-5, 3]], device=DEVICE)
    found = gather_patches(source, coords, patch_size, backend="triton")
    assert same_bits(found, by_reference(source, coords, patch_size))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.float64, torch.float16])
def test_coords_of_every_type(dtype):
    source, coords = randn(1, 7, 9), torch.tensor([[0, 0], [5, 8], [7, 2]], device=DEVICE)
    for options in FORMS[:2] if dtype in (torch.int64, torch.uint8) else FORMS[1:2]:
        found = gather_patches(source, coords.to(dtype), 4, backend="triton", **options)
        assert torch.equal(found, by_reference(source, coords, 4, **options))


@pytest.mark.parametrize("lead", [(), (2, 3), (2, 1, 2)])
@pytest.mark.parametrize("options", FORMS[:2])
def test_leading_dimensions(lead, options):
    source, coords = randn(*lead, 2, 7, 9), corners(*lead, 2)
    found = gather_patches(source, coords, 4, backend="triton", **options)
    assert torch.equal(found, by_reference(source, coords, 4, **options))
    upstream = randn(*found.shape, seed=3)
    found = gradient(source, coords, 4, upstream, backend="triton", **options)
    torch.testing.assert_close(
        found, gradient_by_reference(source, coords, 4, upstream, **options), rtol=0, atol=2e-6 if options else 0
    )


def views(kind: str) -> Tensor:
    base = randn(2, 2, 3, 8, 9)
    return {
        "transposed": base.transpose(-1, -2),
        "channels last": base.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
        "every second pixel": base[..., ::2, 1::2],
        "expanded image": base[:, :1].expand(2, 2, 3, 8, 9),
        "expanded width": base[..., :1].expand(2, 2, 3, 8, 9),
        "swapped leading": base.transpose(0, 1),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["transposed", "channels last", "every second pixel", "expanded image", "expanded width", "swapped leading"],
)
def test_any_strides(poisoned, kind):
    source, coords = views(kind), corners(2, 2, 3, 2)[..., 0, :]
    assert torch.equal(gather_patches(source, coords, 5, backend="triton"), by_reference(source, coords, 5))
    resampled = gather_patches(source, coords, 5, out_size=2, backend="triton")
    assert torch.equal(resampled, by_reference(source, coords, 5, out_size=2))
    for upstream in (randn(5, 5, 3, 3, 2, 2).permute(4, 5, 3, 2, 1, 0), torch.ones((), device=DEVICE)):
        upstream = upstream.expand(2, 2, 3, 3, 5, 5)
        found = gradient(source, coords, 5, upstream, backend="triton")
        assert torch.equal(found, gradient_by_reference(source, coords, 5, upstream))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_gradients_of_copies_are_equal_bit_for_bit(poisoned, dtype):
    source = randn(1, 5, 9, 35, dtype=dtype)  # several tiles, and more patches than are tested at once
    coords = torch.full((1, 150, 2), NO_PATCH, device=DEVICE)
    coords[0, ::10] = torch.tensor([*HOSTILE, [4, 30], [5, 31]], device=DEVICE)
    upstream = randn(1, 150, 5, 4, 4, dtype=dtype)
    found = gradient(source, coords, 4, upstream, backend="triton")
    assert torch.equal(found, gradient_by_reference(source, coords, 4, upstream))


@pytest.mark.parametrize("alignment", ["pixel", "published"])
@pytest.mark.parametrize(("extent", "n"), [(4, 4), (5.3, 7), ((9, 2.5), 3), (0.5, 2), (3, 1), (1e300, 3), (1e-30, 2)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
def test_resampling_has_the_bits_of_the_reference_and_its_gradient_its_error(poisoned, alignment, extent, n):
    source = randn(2, 7, 9)
    coords = torch.tensor([[1, 2], [-2, 3.25], [5.5, 6.75], [NO_PATCH, 0], [math.nan, 0]], device=DEVICE)
    options = {"out_size": n, "alignment": alignment}
    found = gather_patches(source, coords, extent, backend="triton", **options)
    assert torch.equal(found, by_reference(source, coords, extent, **options))
    upstream = randn(*found.shape, seed=2)
    found = gradient(source, coords, extent, upstream, backend="triton", **options)
    expected = gradient_by_reference(source, coords, extent, upstream, **options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=4e-6)


def test_errors_are_those_of_the_reference_against_float64():
    """Positions that float32 holds exactly, so that the arithmetic on values alone is compared."""
    source, coords = randn(3, 7, 9), torch.tensor([[1, 2], [-2, 3.25], [5.5, 6.75]], device=DEVICE)
    upstream = randn(3, 3, 4, 4, seed=2)
    exact = gradient_by_reference(source.double(), coords, 4, upstream.double(), out_size=4)
    errors = [
        (f(source, coords, 4, upstream, out_size=4).double() - exact).abs().max()
        for f in (lambda *a, **o: gradient(*a, backend="triton", **o), gradient_by_reference)
    ]
    assert errors[0] <= 1.5 * errors[1] + 1e-7


@pytest.mark.parametrize("options", [{}, {"out_size": 3}])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_hostile_coordinates(poisoned, options):
    extremes = torch.tensor([INT64.min, INT64.max, INT32.min, NO_PATCH, -4, -3, 8, 9])
    coords = torch.cat([torch.stack([extremes, extremes * 0], 1), torch.stack([extremes * 0, extremes], 1)]).to(DEVICE)
    source = randn(1, 9, 9)
    upstream = randn(len(coords), 1, *(options.get("out_size", 4),) * 2, seed=4)
    floats = coords.float()
    floats[0, 0], floats[1, 1], floats[2, 0] = math.nan, math.inf, -math.inf
    for where in (coords, floats) if options else (coords, coords.clamp(INT32.min, INT32.max).int()):
        found = gather_patches(source, where, 4, backend="triton", **options)
        assert torch.equal(found, by_reference(source, where, 4, **options))
        found = gradient(source, where, 4, upstream, backend="triton", **options)
        expected = gradient_by_reference(source, where, 4, upstream, **options)
        torch.testing.assert_close(found, expected, rtol=0, atol=4e-6 if options else 0)


def test_extents_below_zero_and_in_memory():
    """As a direct call may have them: the samples descend."""
    source, coords = randn(1, 2, 12, 12), torch.tensor([[[11, 11], [9, 10]]], device=DEVICE)
    for extents in ((-4.0, -7.5), (3.7, 4.0)):
        memory = [torch.tensor(e, dtype=torch.float64, device=DEVICE) for e in extents]
        forward, backward = torch.ops.icseg.gather_patches_bilinear, torch.ops.icseg.gather_patches_bilinear_backward
        found = forward(source, coords, *memory, 3, False, "triton")
        assert torch.equal(
            found, forward(source.cpu(), coords.cpu(), *extents_on_cpu(extents), 3, False, "reference").to(DEVICE)
        )
        upstream = randn(*found.shape, seed=5)
        found = backward(upstream, coords, *memory, False, 12, 12, "triton")
        expected = backward(upstream.cpu(), coords.cpu(), *extents_on_cpu(extents), False, 12, 12, "reference")
        torch.testing.assert_close(found, expected.to(DEVICE), rtol=0, atol=2e-6)


def extents_on_cpu(extents: tuple[float, float]) -> list[Tensor]:
    return [torch.tensor(e, dtype=torch.float64) for e in extents]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_stay_where_they_are(value):
    source = torch.zeros(1, 12, 12, device=DEVICE)
    source[:, 5:9, 5:9] = value
    coords = torch.tensor([[0, 0], [5, 5], [2.5, 3.25], [NO_PATCH, 5]], device=DEVICE)
    found = gather_patches(source, coords, 4, out_size=5, backend="triton")
    torch.testing.assert_close(found, by_reference(source, coords, 4, out_size=5), rtol=0, atol=0, equal_nan=True)
    upstream = torch.ones(4, 1, 3, 3, device=DEVICE)
    upstream[0, 0, 2, 2] = upstream[3] = value
    found = gradient(source, coords, 4, upstream, out_size=3, backend="triton")
    expected = gradient_by_reference(source, coords, 4, upstream, out_size=3)
    assert torch.equal(found.isfinite(), expected.isfinite())
    upstream = torch.full((1, 1, 3, 3), value, device=DEVICE)
    assert not gradient(source, torch.tensor([[12, 0]], device=DEVICE), 3, upstream, backend="triton").any()


@pytest.mark.parametrize("options", FORMS[:2])
@pytest.mark.parametrize(
    ("source", "coords"),
    [
        ((2, 3, 7, 9), (2, 0, 2)),
        ((0, 3, 7, 9), (0, 5, 2)),
        ((2, 0, 7, 9), (2, 5, 2)),
        ((2, 3, 0, 9), (2, 5, 2)),
        ((2, 3, 7, 0), (2, 5, 2)),
        ((1, 1, 1), (1, 2)),
    ],
)
def test_empty_inputs_and_one_pixel(poisoned, source, coords, options):
    source = torch.ones(source, device=DEVICE, requires_grad=True)
    coords = torch.zeros(coords, dtype=torch.int64, device=DEVICE)
    patches = gather_patches(source, coords, 4, backend="triton", **options)
    assert torch.equal(patches, by_reference(source, coords, 4, **options))
    patches.sum().backward()
    expected = gradient_by_reference(source, coords, 4, torch.ones_like(patches), **options)
    torch.testing.assert_close(source.grad, expected)


def test_offsets_beyond_32_bits():
    distance = 2**31 + 5
    memory = torch.empty(distance + 64, dtype=torch.uint8, device=DEVICE)
    source = memory.as_strided((2, 1, 4, 4), (distance, 64, 8, 1))
    image = (100 * randn(2, 1, 4, 4)).to(torch.uint8)
    source.copy_(image)
    coords = torch.tensor([[1, -1]], device=DEVICE).expand(2, 1, 2)
    assert torch.equal(gather_patches(source, coords, 3, backend="triton"), by_reference(image, coords, 3))
    row = torch.ones(1, 1, 1, device=DEVICE).expand(1, 2, 2**33)
    far = torch.tensor([[0, 2**33 - 3]], device=DEVICE)
    assert gather_patches(row, far, 4, backend="triton").sum() == 2 * 3
    assert (gather_patches(row, far, 4, out_size=2, backend="triton") == 1).all()


@pytest.mark.parametrize("options", FORMS)
def test_gradcheck(options):
    source = randn(1, 3, 3, dtype=torch.float64).requires_grad_()
    coords = torch.tensor([[0, 1], [-1, 1]], device=DEVICE)
    options = {**options, "out_size": 2} if options else {}

    def cut(x: Tensor) -> Tensor:
        return gather_patches(x, coords, 2, backend="triton", **options)

    assert torch.autograd.gradcheck(cut, source, nondet_tol=0.0, fast_mode=bool(options))


@pytest.mark.parametrize("options", FORMS)
def test_adjoint_identity_and_the_same_bits_twice(options):
    source, coords = randn(2, 3, 7, 9, dtype=torch.float64), corners(2, 5)
    patches = gather_patches(source, coords, 4, backend="triton", **options)
    upstream = randn(*patches.shape, dtype=torch.float64, seed=5)
    found, again = (gradient(source, coords, 4, upstream, backend="triton", **options) for _ in range(2))
    assert torch.equal(found, again)
    torch.testing.assert_close((patches * upstream).sum(), (source * found).sum(), atol=1e-12, rtol=1e-12)


def test_registered_as_torch_expects():
    source, coords = randn(2, 2, 5, 6), corners(2, 2)
    ops, tests = torch.ops.icseg, ("test_schema", "test_autograd_registration", "test_faketensor")
    extents = torch.tensor(4.0, device=DEVICE), torch.tensor(2.5, device=DEVICE)
    torch.library.opcheck(ops.gather_patches.default, (source, coords, 3, "triton"))
    grad = randn(2, 2, 2, 3, 3)
    torch.library.opcheck(ops.gather_patches_backward.default, (grad, coords, 5, 6, "triton"), test_utils=tests)
    arguments = (source, coords, *extents, 2, False, "triton")
    torch.library.opcheck(ops.gather_patches_bilinear.default, arguments, test_utils=tests)
    arguments = (grad, coords, *extents, True, 5, 6, "triton")
    torch.library.opcheck(ops.gather_patches_bilinear_backward.default, arguments, test_utils=tests)


@pytest.mark.parametrize("options", FORMS[:2])
def test_compiles_into_one_graph(options):
    torch._dynamo.reset()

    def cut(source: Tensor, coords: Tensor) -> Tensor:
        return gather_patches(source, coords, 3, backend="triton", **options).square().sum()

    compiled = torch.compile(cut, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 1):
            source, coords = randn(1, 2, 5, 6, seed=seed).requires_grad_(), corners(1, 2, seed=seed)
            (expected,) = torch.autograd.grad(cut(source, coords), source)
            (found,) = torch.autograd.grad(compiled(source, coords), source)
            assert torch.equal(found, expected)


def test_what_is_refused():
    source, coords = randn(1, 5, 5), torch.tensor([[1, 1]], device=DEVICE)
    with pytest.raises(BackendError, match=r"source must be real, got torch.complex64"):
        gather_patches(source.to(torch.complex64), coords, 3, backend="triton")
    with pytest.raises(BackendError, match="it runs on CUDA devices, and source is on meta"):
        gather_patches(source.to("meta"), coords.to("meta"), 3, backend="triton")
    ops = torch.ops.icseg
    with pytest.raises(ValueError, match=r"coords must have shape \[2, 1, 2\], got \[1, 2\]"):
        ops.gather_patches(randn(2, 1, 5, 5), coords, 3, "triton")
    with pytest.raises(ValueError, match=r"grad must have shape \[..., K, C, p, p\], got \[1, 1, 3, 2\]"):
        ops.gather_patches_backward(randn(1, 1, 3, 2), coords, 5, 5, "triton")
    extent = torch.tensor(3.0, device=DEVICE)
    with pytest.raises(TypeError, match=r"source must be a floating-point tensor, got torch.int16"):
        ops.gather_patches_bilinear(source.short(), coords, extent, extent, 3, False, "triton")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("options", FORMS)
def test_bfloat16(options):
    source, coords = randn(2, 3, 40, 44, dtype=torch.bfloat16), corners(2, 30, low=-9, high=44)
    found = gather_patches(source, coords, 8, backend="triton", **options)
    assert torch.equal(found, by_reference(source, coords, 8, **options))
    upstream = randn(*found.shape, dtype=torch.bfloat16, seed=2)
    found = gradient(source, coords, 8, upstream, backend="triton", **options)
    expected = gradient_by_reference(source, coords, 8, upstream, **options)
    torch.testing.assert_close(found, expected, rtol=8e-3 if options else 0, atol=1e-6 if options else 0)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("options", FORMS)
def test_cuda_graph(options):
    source, coords = randn(2, 3, 40, 44).requires_grad_(), corners(2, 30, low=-9, high=44)

    def run() -> tuple[Tensor, Tensor]:
        patches = gather_patches(source, coords, 8, backend="triton", **options)
        return patches.detach(), torch.autograd.grad(patches.square().sum(), source)[0]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    coords.copy_(corners(2, 30, low=-9, high=44, seed=8))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
