"""gather_patches against naive loops, F.unfold, F.grid_sample and its own adjoint, on every backend here."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from samples import BACKENDS, needs_native
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from icseg_kernels import BackendError, flops, gather_patches, library, use_backend
from icseg_kernels.patches import NO_PATCH, gather_native

OPTIONS = [{}, {"out_size": 3}, {"out_size": 6, "alignment": "published"}]
FORMS = list(itertools.product(BACKENDS, OPTIONS))
INT64 = torch.iinfo(torch.int64)
INT32 = torch.iinfo(torch.int32)
HOSTILE = [
    [0, 0],
    [2, 3],
    [2, 3],  # twice
    [-2, -1],
    [6, 7],
    [-4, 0],  # wholly outside by one pixel, on each side
    [0, -4],
    [7, 0],
    [0, 9],
    [NO_PATCH, NO_PATCH],
    [INT32.min, INT32.max],
    [INT64.min, 0],
    [INT64.max, INT64.max],
]


def copied_by_loop(source: Tensor, coords: Tensor, patch_size: int) -> Tensor:
    """[C, H, W], [K, 2] -> [K, C, p, p], pixel by pixel."""
    channels, height, width = source.shape
    patches = torch.zeros(len(coords), channels, patch_size, patch_size, dtype=source.dtype)
    for k, (top, left) in enumerate(coords.tolist()):
        for i, j in itertools.product(range(patch_size), repeat=2):
            y, x = top + i, left + j
            if 0 <= y < height and 0 <= x < width:
                patches[k, :, i, j] = source[:, y, x]
    return patches


def sampled_by_loop(source: Tensor, coords: Tensor, positions: Tensor) -> Tensor:
    """[C, H, W], [K, 2], [n] offsets -> [K, C, n, n] bilinear, borders replicated, sample by sample."""
    _, height, width = source.shape
    rows = []
    for (top, left), dy, dx in itertools.product(coords.tolist(), positions.tolist(), positions.tolist()):
        y, x = min(max(top + dy, 0), height - 1), min(max(left + dx, 0), width - 1)
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
        fy, fx = y - y0, x - x0
        upper = source[:, y0, x0] * (1 - fx) + source[:, y0, x1] * fx
        lower = source[:, y1, x0] * (1 - fx) + source[:, y1, x1] * fx
        rows.append(upper * (1 - fy) + lower * fy)
    n = len(positions)
    return torch.stack(rows).unflatten(0, (len(coords), n, n)).permute(0, 3, 1, 2)


def random_image(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def random_coords(*shape: int, low: int = -6, high: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(low, high, (*shape, 2), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.uint8,
        torch.bool,
        torch.int16,
        torch.int64,
    ],
)
@pytest.mark.parametrize("patch_size", [1, 4, 13])
def test_copy_equals_a_loop_over_pixels(backend, dtype, patch_size):
    source, coords = random_image(3, 7, 9, dtype=dtype), torch.tensor(HOSTILE)
    patches = gather_patches(source, coords, patch_size, backend=backend)
    assert patches.dtype == dtype
    assert patches.is_contiguous()
    assert torch.equal(patches, copied_by_loop(source, coords, patch_size))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_source_is_served_by_the_reference(dtype):
    parts = random_image(2, 2, 5, 5, dtype=dtype.to_real())
    source = torch.complex(*parts).requires_grad_()
    patches = gather_patches(source, torch.tensor([[1, 1], [1, 2]]), 3)
    assert torch.equal(patches[0], source[:, 1:4, 1:4])
    (found,) = torch.autograd.grad(patches, source, torch.full_like(patches, 1 + 2j))
    counts = F.pad(torch.tensor([[1, 2, 2, 1]]).expand(3, 4), (1, 0, 1, 1))
    assert torch.equal(found, (counts * (1 + 2j)).to(dtype).expand(2, 5, 5))
    conjugate = gather_patches(source.conj(), torch.tensor([[1, 1]]), 3)
    assert torch.equal(conjugate[0], source.conj()[:, 1:4, 1:4])
    if "native" in BACKENDS:
        with pytest.raises(BackendError, match="source must be real, got"):
            gather_patches(source, torch.tensor([[1, 1]]), 3, backend="native")


def test_lazily_negated_source(backend):
    source = torch.complex(random_image(2, 5, 5), random_image(2, 5, 5, seed=2)).conj().imag
    assert source.is_neg()
    assert torch.equal(gather_patches(source, torch.tensor([[1, 1]]), 3, backend=backend)[0], source[:, 1:4, 1:4])


NARROW = [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("dtype", NARROW)
def test_copy_of_dtypes_that_torch_cannot_index(backend, dtype):
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    image, coords = random_image(3, 7, 9, dtype=bits), torch.tensor(HOSTILE)
    patches = gather_patches(image.view(dtype), coords, 4, backend=backend)
    assert patches.dtype == dtype
    assert torch.equal(patches.view(bits), copied_by_loop(image, coords, 4))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_copied_and_nothing_else(backend, dtype):
    source, coords = random_image(3, 64, 64).to(dtype).requires_grad_(), torch.tensor([[1, 1]])
    patches = gather_patches(source, coords, 16, backend=backend)
    with pytest.raises(TypeError, match=r"the gradient of gather_patches must be .*float.* got torch.float8"):
        patches.float().sum().backward()
    with pytest.raises(TypeError, match=r"source with out_size must be .*float.* got torch.float8"):
        gather_patches(source, coords, 16, out_size=8)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, *NARROW])
def test_the_backward_op_takes_floats_only(backend, dtype):
    grad = torch.zeros(1, 3, 16, 16, dtype=dtype)
    with pytest.raises(TypeError, match=f"must be .*float.* got {dtype}"):
        torch.ops.icseg.gather_patches_backward(grad, torch.zeros(1, 2, dtype=torch.int64), 64, 64, backend)
    if "native" in BACKENDS:
        with pytest.raises(TypeError, match=r"must be a floating-point tensor, got torch.int8"):
            gather_native.gather_backward(grad.to(torch.int8), torch.zeros(1, 2, dtype=torch.int64), 64, 64)


@needs_native
def test_native_ops_never_read_beyond_their_tensors():
    ops, coords = torch.ops.icseg, torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"coords must have shape \[2, 1, 2\], got \[1, 2\]"):
        ops.gather_patches(torch.zeros(2, 1, 5, 5), coords, 3, "native")
    with pytest.raises(ValueError, match=r"coords must have shape \[4, 2\], got \[1, 2\]"):
        ops.gather_patches_backward(torch.zeros(4, 1, 3, 3), coords, 5, 5, "native")
    with pytest.raises(ValueError, match=r"grad must have shape \[..., K, C, p, p\], got \[1, 1, 3, 2\]"):
        ops.gather_patches_backward(torch.zeros(1, 1, 3, 2), coords, 5, 5, "native")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_coords_of_every_integer_type(backend, dtype):
    source, coords = random_image(1, 7, 9), torch.tensor([[0, 0], [5, 8], [7, 2]])
    expected = copied_by_loop(source, coords, 4)
    assert torch.equal(gather_patches(source, coords.to(dtype), 4, backend=backend), expected)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 1, 3)])
def test_leading_dimensions_are_one_call_each_image_its_own(backend, lead):
    source, coords = random_image(*lead, 2, 7, 9), random_coords(*lead, 5)
    patches = gather_patches(source, coords, 4, backend=backend)
    assert patches.shape == (*lead, 5, 2, 4, 4)
    for index in itertools.product(*map(range, lead)):
        assert torch.equal(patches[index], copied_by_loop(source[index], coords[index], 4))


def views(kind: str) -> Tensor:
    base = random_image(2, 3, 4, 18, 20)
    return {
        "transposed": base.transpose(-1, -2),
        "channels last": base.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
        "every second pixel": base[..., ::2, 1::2],
        "a slice of the images": base[:, 1:],
        "expanded image": base[:, :1].expand(2, 3, 4, 18, 20),
        "expanded width": base[..., :1].expand(2, 3, 4, 18, 20),
        "swapped leading": base.transpose(0, 1),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "transposed",
        "channels last",
        "every second pixel",
        "a slice of the images",
        "expanded image",
        "expanded width",
        "swapped leading",
    ],
)
def test_any_strides(backend, kind):
    source = views(kind)
    coords = random_coords(*source.shape[:2], 5, 2)[..., 0, :]  # strided as well
    expected = gather_patches(source.contiguous(), coords.contiguous(), 6, backend="reference")
    assert torch.equal(gather_patches(source, coords, 6, backend=backend), expected)

    shape = (*source.shape[:2], 5, 4, 6, 6)
    grad = random_image(6, 6, 4, 5, *source.shape[:2]).permute(4, 5, 3, 2, 1, 0)
    for upstream in (grad, torch.ones(()).expand(shape)):
        gradients = [
            gradient(source, coords, 6, upstream=upstream, backend=backend),
            gradient(source, coords, 6, upstream=upstream.contiguous(), backend="reference"),
        ]
        assert torch.equal(*gradients)


def gradient(source: Tensor, coords: Tensor, patch_size: int, *, upstream: Tensor, **options) -> Tensor:
    source = source.detach().requires_grad_()
    patches = gather_patches(source, coords, patch_size, **options)
    return torch.autograd.grad(patches, source, upstream)[0]


def test_offsets_beyond_32_bits(backend):
    distance = 2**32 + 5
    memory = torch.empty(distance + 64, dtype=torch.uint8)  # reserved, and touched in two places only
    source = memory.as_strided((2, 1, 4, 4), (distance, 64, 8, 1))
    image = random_image(2, 1, 4, 4, dtype=torch.uint8)
    source.copy_(image)
    coords = torch.tensor([[1, -1]]).expand(2, 1, 2)
    assert torch.equal(
        gather_patches(source, coords, 3, backend=backend),
        gather_patches(image, coords, 3, backend="reference"),
    )


@pytest.mark.parametrize("options", [{}, {"out_size": 4}])
@pytest.mark.parametrize(
    ("source", "coords"),
    [
        ((2, 3, 7, 9), (2, 0, 2)),
        ((0, 3, 7, 9), (0, 5, 2)),
        ((2, 0, 7, 9), (2, 5, 2)),
        ((2, 3, 0, 9), (2, 5, 2)),
        ((2, 3, 7, 0), (2, 5, 2)),
    ],
)
def test_empty_inputs_give_empty_or_zero_patches_and_zero_gradients(backend, source, coords, options):
    source, coords = torch.ones(source, requires_grad=True), torch.zeros(coords, dtype=torch.int64)
    patches = gather_patches(source, coords, 4, backend=backend, **options)
    assert torch.equal(patches, torch.zeros(*coords.shape[:-1], source.shape[1], 4, 4))
    patches.sum().backward()
    assert torch.equal(source.grad, torch.zeros_like(source))


def test_every_element_of_the_output_is_written(backend, monkeypatch):
    """Fresh memory is NaN here, so whatever an implementation forgets to write shows."""
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **options: new_empty(*args, **options).fill_(float("nan")))
    source, coords = random_image(3, 7, 9), torch.tensor(HOSTILE)
    assert not gather_patches(source, coords, 4, backend=backend).isnan().any()
    upstream = torch.ones(len(coords), 3, 4, 4)
    assert not gradient(source, coords, 4, upstream=upstream, backend=backend).isnan().any()


def test_what_lies_outside_a_patch_never_leaks(backend):
    source = torch.full((1, 9, 9), float("nan"))
    source[:, 2:5, 2:5] = 1
    assert torch.equal(gather_patches(source, torch.tensor([[2, 2]]), 3, backend=backend), torch.ones(1, 1, 3, 3))
    outside = torch.tensor([[NO_PATCH, NO_PATCH], [9, 0]])
    assert not gather_patches(source, outside, 3, backend=backend).any()

    upstream = torch.full((2, 1, 3, 3), float("nan"))
    assert not gradient(source, outside, 3, upstream=upstream, backend=backend).any()


def test_regular_grid_is_unfold_and_its_adjoint_is_fold(backend):
    source = random_image(2, 3, 12, 16)
    rows, cols = torch.meshgrid(torch.arange(0, 12, 4), torch.arange(0, 16, 4), indexing="ij")
    coords = torch.stack([rows, cols], -1).flatten(0, 1).expand(2, 12, 2)
    patches = gather_patches(source, coords, 4, backend=backend)
    unfolded = F.unfold(source, 4, stride=4)  # [B, C * 16, 12]
    assert torch.equal(patches, unfolded.unflatten(1, (3, 4, 4)).movedim(-1, 1))

    coords = random_coords(2, 9, low=0, high=1) + torch.tensor([[0, 0], [0, 2], [0, 4]]).repeat(3, 1)
    coords[:, 3:6, 0], coords[:, 6:, 0] = 2, 4
    upstream = random_image(2, 9, 3, 4, 4).round()  # whole numbers: any order of summation is exact
    folded = F.fold(upstream.movedim(1, -1).flatten(1, 3), (8, 8), 4, stride=2)
    assert torch.equal(gradient(source[..., :8, :8], coords, 4, upstream=upstream, backend=backend), folded)


def offsets(extent: float, n: int, alignment: str) -> Tensor:
    if alignment == "pixel":
        return (torch.arange(n) + 0.5) * extent / n - 0.5
    return extent / 2 + torch.linspace(-extent / 2, extent / 2, n) - 0.5


@pytest.mark.parametrize("alignment", ["pixel", "published"])
@pytest.mark.parametrize(("extent", "n"), [(4, 8), (6, 3), (3.5, 5), (5, 1), (4, 4)])
def test_resampling_equals_a_loop_over_samples(backend, alignment, extent, n):
    source, coords = random_image(3, 7, 9), torch.tensor([[0, 0], [2, 3], [-1.25, 0.5], [5.75, -2], [-3, 8]])
    patches = gather_patches(source, coords, extent, out_size=n, backend=backend, alignment=alignment)
    expected = sampled_by_loop(source, coords, offsets(extent, n, alignment))
    torch.testing.assert_close(patches, expected, atol=2e-6, rtol=0)


def test_pixel_alignment_is_the_copy_inside_the_image(backend):
    source, coords = random_image(3, 9, 9), torch.tensor([[0, 0], [2, 4], [5, 5]])
    assert torch.equal(
        gather_patches(source, coords, 4, out_size=4, backend=backend), gather_patches(source, coords, 4)
    )


@pytest.mark.parametrize("n", [1, 2, 4, 16])
def test_a_coordinate_ramp_comes_back_exact(backend, n):
    ramp = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij"))
    coords = torch.tensor([[3, 17], [8, 1], [22.5, 9.25]])
    patches = gather_patches(ramp, coords, 8, out_size=n, backend=backend)
    cell = (torch.arange(n) + 0.5) * 8 / n - 0.5
    assert torch.equal(patches[:, 0], (coords[:, :1] + cell)[:, :, None].expand(3, n, n))
    assert torch.equal(patches[:, 1], (coords[:, 1:] + cell)[:, None, :].expand(3, n, n))


@pytest.mark.parametrize(("level", "grid", "patch_size"), [(24, 32, 8), (24, 128, 8), (64, 32, 8), (32, 32, 8)])
def test_published_alignment_is_grid_sample_from_edge_to_edge(backend, level, grid, patch_size):
    """Patches of a level on a feature grid of another resolution, their extent in whole pixels."""
    features, coords = random_image(2, 5, grid, grid), random_coords(2, 6, low=-2, high=level - 5)
    scale = grid / level
    extent = max(1, int(patch_size * scale))
    patches = gather_patches(features, coords * scale, extent, out_size=8, backend=backend, alignment="published")

    centre = (coords * scale + extent / 2) / grid * 2 - 1
    line = torch.linspace(-extent / grid, extent / grid, 8)
    around = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)
    points = (centre[:, :, None, None] + around).flip(-1)  # [B, K, 8, 8, 2], (x, y)
    expected = F.grid_sample(
        features, points.flatten(1, 2), mode="bilinear", padding_mode="border", align_corners=False
    )
    torch.testing.assert_close(patches, expected.unflatten(2, (6, 8)).movedim(2, 1), atol=2e-5, rtol=0)


def test_patches_wholly_outside_resample_to_zero(backend):
    source = torch.ones(1, 6, 6)
    nowhere = float("nan")
    coords = torch.tensor([[NO_PATCH, 0.0], [6, 0], [0, -4], [nowhere, 0], [0, float("inf")]])
    assert not gather_patches(source, coords, 4, out_size=3, backend=backend).any()
    assert not gather_patches(
        source, torch.tensor([[INT64.min, 0], [INT64.max, 0]]), 4, out_size=3, backend=backend
    ).any()
    assert gather_patches(source, torch.tensor([[5.9, -3.9]]), 4, out_size=3, backend=backend).all()


def test_extent_may_differ_by_axis(backend):
    source, coords = random_image(2, 20, 20), torch.tensor([[3.0, 5.0]])
    patches = gather_patches(source, coords, (8, 4), out_size=4, backend=backend)
    assert torch.equal(patches[0, :, :, 0], source[:, 3:11, 5].unflatten(-1, (4, 2)).mean(-1))
    assert torch.equal(patches[0, :, 0, :], source[:, 3:5, 5:9].mean(-2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_resampling_of_16_bit_types_is_computed_in_float32(backend, dtype):
    source, coords = random_image(2, 3, 7, 9, dtype=dtype), random_coords(2, 5)
    upstream = random_image(2, 5, 3, 3, 3, dtype=dtype)
    patches = gather_patches(source, coords, 4, out_size=3, backend=backend)
    assert torch.equal(patches, gather_patches(source.float(), coords, 4, out_size=3, backend=backend).to(dtype))
    found = gradient(source, coords, 4, upstream=upstream, out_size=3, backend=backend)
    assert torch.equal(
        found, gradient(source.float(), coords, 4, upstream=upstream.float(), out_size=3, backend=backend).to(dtype)
    )


@pytest.mark.parametrize(("backend", "options"), FORMS)
def test_adjoint_identity(backend, options):
    """<gather(x), y> == <x, gather_backward(y)> in float64."""
    source, coords = random_image(2, 3, 7, 9, dtype=torch.float64), random_coords(2, 8)
    patches = gather_patches(source, coords, 4, backend=backend, **options)
    upstream = random_image(*patches.shape, dtype=torch.float64, seed=5)
    found = gradient(source, coords, 4, upstream=upstream, backend=backend, **options)
    torch.testing.assert_close((patches * upstream).sum(), (source * found).sum(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("backend", "options"), FORMS)
def test_gradcheck(backend, options):
    source, coords = (
        random_image(2, 2, 5, 6, dtype=torch.float64).requires_grad_(),
        random_coords(2, 4, high=7),
    )

    def cut(x: Tensor) -> Tensor:
        return gather_patches(x, coords, 3, backend=backend, **options)

    assert torch.autograd.gradcheck(cut, source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_gradients_of_the_backends_are_equal_bit_for_bit(dtype):
    source, coords = random_image(2, 3, 70, 90, dtype=dtype), random_coords(2, 40, low=-8, high=90)
    upstream = random_image(2, 40, 3, 16, 16, dtype=dtype)
    first, *others = (gradient(source, coords, 16, upstream=upstream, backend=name) for name in BACKENDS)
    assert first.dtype == dtype
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize(("backend", "options"), FORMS)
def test_same_bits_with_any_number_of_threads(backend, threads, options):
    source, coords = random_image(2, 3, 150, 140), random_coords(2, 64, low=-8, high=150)
    size = options.get("out_size", 16)
    upstream = random_image(2, 64, 3, size, size)
    found = []
    for count in (1, 2, 1, 2):
        threads(count)
        patches = gather_patches(source, coords, 16, backend=backend, **options)
        found.append((patches, gradient(source, coords, 16, upstream=upstream, backend=backend, **options)))
    for patches, grad in found[1:]:
        assert torch.equal(patches, found[0][0])
        assert torch.equal(grad, found[0][1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"out_size": 12}])
def test_a_gpu_gives_the_same_and_the_same_bits_twice(options):
    source, coords = random_image(2, 3, 150, 140), random_coords(2, 64, low=-8, high=150)
    size = options.get("out_size", 16)
    upstream = random_image(2, 64, 3, size, size)
    expected = gather_patches(source, coords, 16, **options)
    on_gpu = [tensor.cuda() for tensor in (source, coords, upstream)]
    patches = gather_patches(*on_gpu[:2], 16, **options)
    torch.testing.assert_close(patches.cpu(), expected, rtol=0, atol=1e-6 if options else 0)
    first, second = (gradient(*on_gpu[:2], 16, upstream=on_gpu[2], **options) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(
        first.cpu(), gradient(source, coords, 16, upstream=upstream, **options), rtol=1e-5, atol=1e-5
    )


def test_second_derivatives_are_refused():
    source = random_image(1, 5, 5).requires_grad_()
    patches = gather_patches(source, torch.tensor([[1, 1]]), 3)
    (first,) = torch.autograd.grad((patches**2).sum(), source, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(("backend", "options"), FORMS)
def test_compiles_into_one_graph(backend, options):
    torch._dynamo.reset()

    def cut(source: Tensor, coords: Tensor) -> Tensor:
        return gather_patches(source, coords, 4, backend=backend, **options).square().sum()

    compiled = torch.compile(cut, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (0, 1):
            source, coords = (
                random_image(2, 3, 7, 9, seed=seed).requires_grad_(),
                random_coords(2, 5, seed=seed),
            )
            (expected,) = torch.autograd.grad(cut(source, coords), source)
            (found,) = torch.autograd.grad(compiled(source, coords), source)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("alignment", ["pixel", "published"])
def test_new_values_of_patch_size_do_not_recompile(backend, alignment):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    source, coords = random_image(2, 3, 7, 9).requires_grad_(), random_coords(2, 5) * 0.5

    def cut(source: Tensor, patch_size: float) -> Tensor:
        return gather_patches(source, coords, patch_size, out_size=3, backend=backend, alignment=alignment)

    compiled = torch.compile(cut, fullgraph=True, backend=counter)
    for patch_size in (2.5 + 0.37 * i for i in range(10)):
        (expected,) = torch.autograd.grad(cut(source, patch_size).square().sum(), source)
        found = compiled(source, patch_size)
        torch.testing.assert_close(found, cut(source, patch_size), rtol=0, atol=2e-6)
        torch.testing.assert_close(torch.autograd.grad(found.square().sum(), source)[0], expected, rtol=0, atol=2e-5)
    assert counter.frame_count <= 2


def test_new_values_of_integer_sizes_do_not_recompile(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    source, coords = random_image(2, 3, 7, 9), random_coords(2, 5)

    def cut(patch_size: int, out_size: int) -> tuple[Tensor, Tensor]:
        copied = gather_patches(source, coords, patch_size, backend=backend)
        return copied, gather_patches(source, coords, patch_size, out_size=out_size, backend=backend)

    compiled = torch.compile(cut, fullgraph=True, backend=counter)
    for size in range(3, 13):
        copied, resampled = compiled(size, size + 4)
        assert torch.equal(copied, cut(size, size + 4)[0])
        torch.testing.assert_close(resampled, cut(size, size + 4)[1], rtol=0, atol=2e-6)
    assert counter.frame_count <= 2


def test_coords_get_no_gradient(backend):
    source, coords = random_image(1, 5, 5), torch.tensor([[1.0, 1.5]], requires_grad=True)
    assert not gather_patches(source, coords, 3, out_size=3, backend=backend).requires_grad
    patches = gather_patches(source.requires_grad_(), coords, 3, out_size=3, backend=backend)
    patches.sum().backward()
    assert coords.grad is None
    assert source.grad.any()


def test_ops_are_registered_as_torch_expects(backend):
    source, coords = random_image(2, 3, 7, 9), random_coords(2, 5)
    ops = torch.ops.icseg
    torch.library.opcheck(ops.gather_patches.default, (source, coords, 4, backend))
    torch.library.opcheck(ops.gather_patches_backward.default, (random_image(2, 5, 3, 4, 4), coords, 7, 9, backend))
    corners = random_image(2, 5, 2) * 5
    corners[0, 1, 0] = torch.nan
    for where in (coords, corners):
        grid = (where, torch.tensor(4.0), torch.tensor(2.5))
        torch.library.opcheck(ops.gather_patches_bilinear.default, (source, *grid, 6, False, backend))
        arguments = (random_image(2, 5, 3, 6, 6), *grid, True, 7, 9, backend)
        torch.library.opcheck(ops.gather_patches_bilinear_backward.default, arguments)


def test_autocast_changes_nothing(backend):
    source, coords = random_image(1, 7, 9), random_coords(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert gather_patches(source, coords, 4, backend=backend).dtype == torch.float32
        assert gather_patches(source, coords, 4, out_size=3, backend=backend).dtype == torch.float32


def test_functorch_gradient(backend):
    source, coords = random_image(2, 3, 7, 9), random_coords(2, 5)
    found = torch.func.grad(lambda x: gather_patches(x, coords, 4, backend=backend).square().sum())(source)
    patches = gather_patches(source, coords, 4)
    assert torch.equal(found, gradient(source, coords, 4, upstream=2 * patches))


def test_flops():
    source, coords = random_image(2, 3, 7, 9).requires_grad_(), random_coords(2, 5)
    with FlopCounterMode(display=False) as counter:
        gather_patches(source, coords, 4).sum().backward()
    assert counter.get_total_flops() == 2 * 5 * 3 * 4 * 4  # a copy is free; its adjoint adds each pixel once
    with FlopCounterMode(display=False) as counter:
        gather_patches(source, coords, 4, out_size=6).sum().backward()
    assert counter.get_total_flops() == 2 * flops.gather_patches_flops(2, 5, 3, 6, bilinear=True)


def test_backend_is_chosen_and_refused_with_reasons(monkeypatch):
    source, coords = random_image(1, 5, 5), torch.tensor([[1, 1]])
    with pytest.raises(BackendError, match="gather_patches has no cuda backend; it has triton, native, reference"):
        gather_patches(source, coords, 3, backend="cuda")
    with pytest.raises(ValueError, match="backend must be one of"):
        gather_patches(source, coords, 3, backend="fastest")
    monkeypatch.setattr(library, "_reasons", ["it was not built"])
    with pytest.raises(BackendError, match=r"cannot serve gather_patches of \(1, 5, 5\).*: it was not built"):
        gather_patches(source, coords, 3, backend="native")
    with use_backend("native"), pytest.raises(BackendError, match="it was not built"):
        gather_patches(source, coords, 3)
    assert torch.equal(gather_patches(source, coords, 3)[0], source[:, 1:4, 1:4])  # unnamed: the reference serves


IMAGE, CORNERS = torch.zeros(1, 5, 5), torch.zeros(1, 2, dtype=torch.int64)
RESAMPLE = {"out_size": 3}
BAD_COORDS = r"coords must have shape \[..., K, 2\] with the leading dimensions of source = "
NUMBER = "must be a finite number greater than 0, got"


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "source must be a torch.Tensor, got list", ([[1.0]], CORNERS, 3), {}),
        (TypeError, "source must be a dense tensor, got layout", (IMAGE.to_sparse(), CORNERS, 3), {}),
        (ValueError, r"source must have shape \[..., C, H, W\], got \[5, 5\]", (IMAGE[0], CORNERS, 3), {}),
        (TypeError, "source with out_size must be .*float", (IMAGE.byte(), CORNERS, 3), RESAMPLE),
        (TypeError, "coords must be a torch.Tensor, got tuple", (IMAGE, (0, 0), 3), {}),
        (TypeError, "coords must be a dense tensor, got layout", (IMAGE, CORNERS.to_sparse(), 3), {}),
        (
            ValueError,
            BAD_COORDS + r"\[4, 9, 2\], got \[3, 9, 2\]",
            (torch.zeros(4, 1, 5, 5), CORNERS.expand(3, 9, 2), 3),
            {},
        ),
        (ValueError, BAD_COORDS + r"\[0, 2\], got \[2\]", (IMAGE, CORNERS[0], 3), {}),
        (TypeError, "floating-point coords need out_size.*, got torch.float32", (IMAGE, CORNERS.float(), 3), {}),
        (TypeError, "coords must be a tensor of int64, .*, got torch.bool", (IMAGE, CORNERS.bool(), 3), {}),
        (TypeError, "coords must be a tensor of int64, .*, got torch.uint16", (IMAGE, CORNERS.to(torch.uint16), 3), {}),
        (TypeError, "coords .* got torch.uint64", (IMAGE, CORNERS.to(torch.uint64), 3), RESAMPLE),
        (TypeError, "coords .* got torch.complex64", (IMAGE, CORNERS.to(torch.complex64), 3), RESAMPLE),
        (ValueError, "coords must be on cpu, .* got meta", (IMAGE, CORNERS.to("meta"), 3), {}),
        (
            TypeError,
            r"patch_size must be an integer .* \(a fraction or a pair needs out_size\), got 2.5",
            (IMAGE, CORNERS, 2.5),
            {},
        ),
        (TypeError, r"patch_size must be an integer .* got \(2, 2\)", (IMAGE, CORNERS, (2, 2)), {}),
        (TypeError, "patch_size .* got True", (IMAGE, CORNERS, True), {}),
        (TypeError, "patch_size .* got None", (IMAGE, CORNERS, None), {}),
        (ValueError, r"patch_size must be an integer of at least 1 .*, got 0", (IMAGE, CORNERS, 0), {}),
        (ValueError, f"patch_size {NUMBER} -1", (IMAGE, CORNERS, -1), RESAMPLE),
        (ValueError, f"patch_size {NUMBER} inf", (IMAGE, CORNERS, float("inf")), RESAMPLE),
        (ValueError, f"patch_size {NUMBER} nan", (IMAGE, CORNERS, float("nan")), RESAMPLE),
        (TypeError, f"patch_size {NUMBER} '3'", (IMAGE, CORNERS, "3"), RESAMPLE),
        (TypeError, f"patch_size {NUMBER} None", (IMAGE, CORNERS, None), RESAMPLE),
        (TypeError, rf"patch_size\[1\] {NUMBER} True", (IMAGE, CORNERS, (3, True)), RESAMPLE),
        (ValueError, r"a pair \(height, width\), got \(3, 3, 3\)", (IMAGE, CORNERS, (3, 3, 3)), RESAMPLE),
        (ValueError, "out_size must be an integer of at least 1, got 0", (IMAGE, CORNERS, 3), {"out_size": 0}),
        (TypeError, "out_size must be an integer .* got 3.0", (IMAGE, CORNERS, 3), {"out_size": 3.0}),
        (TypeError, "out_size must be an integer .* got True", (IMAGE, CORNERS, 3), {"out_size": True}),
        (ValueError, "alignment must be one of", (IMAGE, CORNERS, 3), {"alignment": "corner"}),
        (ValueError, "needs out_size", (IMAGE, CORNERS, 3), {"alignment": "published"}),
    ],
)
def test_bad_arguments_are_named(error, message, arguments, options):
    with pytest.raises(error, match=message):
        gather_patches(*arguments, **options)


def test_numpy_numbers_are_numbers():
    source, coords = random_image(1, 5, 5), torch.tensor([[1, 1]])
    assert torch.equal(gather_patches(source, coords, np.int64(3)), gather_patches(source, coords, 3))
    found = gather_patches(source, coords, (np.float32(2.5), np.int64(3)), out_size=np.int32(2))
    assert torch.equal(found, gather_patches(source, coords, (2.5, 3), out_size=2))
