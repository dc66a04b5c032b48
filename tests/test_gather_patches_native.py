"""The native gather_patches against the reference: every instruction set, type, layout and hostile value."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import needs_native
from torch import Tensor

from icseg_kernels import gather_patches, library
from icseg_kernels.patches import NO_PATCH, gather_native

pytestmark = needs_native

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int32, torch.int64, torch.int16]
INT32, INT64 = torch.iinfo(torch.int32), torch.iinfo(torch.int64)
LAYOUTS = ["contiguous", "channels last", "transposed", "every second pixel", "expanded width", "expanded image"]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def corners(*shape: int, low: int, high: int, seed: int = 1) -> Tensor:
    return torch.randint(low, high, (*shape, 2), generator=torch.Generator().manual_seed(seed))


def image(layout: str, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[2, channels, 41, 53]"""
    return {
        "contiguous": lambda: randn(2, channels, 41, 53, dtype=dtype),
        "channels last": lambda: randn(2, 41, 53, channels, dtype=dtype).permute(0, 3, 1, 2),
        "transposed": lambda: randn(2, channels, 53, 41, dtype=dtype).transpose(-1, -2),
        "every second pixel": lambda: randn(2, channels, 82, 106, dtype=dtype)[..., ::2, 1::2],
        "expanded width": lambda: randn(2, channels, 41, 1, dtype=dtype).expand(2, channels, 41, 53),
        "expanded image": lambda: randn(1, channels, 41, 53, dtype=dtype).expand(2, channels, 41, 53),
    }[layout]()


def backward(source: Tensor, coords: Tensor, size: float, upstream: Tensor, **options: object) -> Tensor:
    source = source.detach().requires_grad_()
    return torch.autograd.grad(gather_patches(source, coords, size, **options), source, upstream)[0]


def epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 21])
def test_copies_of_every_width_are_exact(isa, poisoned, dtype, layout, channels):
    source = image(layout, channels).mul(100).to(dtype) if dtype == torch.uint8 else image(layout, channels, dtype)
    for patch_size in (1, 3, 8, 16, 18, 47):
        coords = corners(2, 6, low=-patch_size, high=41)
        found = gather_patches(source, coords, patch_size, backend="native")
        assert torch.equal(found, gather_patches(source, coords, patch_size, backend="reference"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_gradients_of_copies_are_equal_bit_for_bit(isa, poisoned, dtype, layout):
    source = randn(1, 9, 70, 61, dtype=dtype)  # bands of rows and blocks of channels, both more than one
    for patch_size, count in ((1, 300), (3, 300), (8, 40), (16, 40), (18, 20), (47, 5)):
        coords = corners(1, count, low=-patch_size, high=70, seed=patch_size)
        if layout == "expanded":
            upstream = randn(1, 1, 9, 1, 1, dtype=dtype).expand(1, count, 9, patch_size, patch_size)
        else:
            upstream = randn(1, count, 9, patch_size, patch_size, dtype=dtype)
        upstream = upstream.transpose(-1, -2) if layout == "transposed" else upstream
        found, expected = (
            backward(source, coords, patch_size, upstream, backend=name) for name in ("native", "reference")
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("alignment", ["pixel", "published"])
@pytest.mark.parametrize(
    ("layout", "channels", "dtype"),
    [
        *((layout, 3, dtype) for layout in LAYOUTS for dtype in (torch.float32, torch.float64)),
        ("channels last", 21, torch.float32),
        ("contiguous", 3, torch.float16),
        ("contiguous", 3, torch.bfloat16),
    ],
)
def test_resampling_and_its_gradient_are_the_reference_within_rounding(
    isa, poisoned, layout, channels, dtype, alignment
):
    source = image(layout, channels, dtype)
    coords = corners(2, 6, low=-12, high=41) + randn(2, 6, 2)
    for extent, n in ((8, 8), (5.3, 21), ((47, 9.5), 16), (0.5, 3), (30, 70), (3, 1)):
        options = {"out_size": n, "alignment": alignment}
        found, expected = (
            gather_patches(source, coords, extent, backend=name, **options) for name in ("native", "reference")
        )
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=16 * epsilon(dtype))
        upstream = randn(*found.shape, dtype=dtype)
        found, expected = (
            backward(source, coords, extent, upstream, backend=name, **options) for name in ("native", "reference")
        )
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(found, expected, rtol=0, atol=64 * epsilon(dtype) * scale)


def test_coordinates_of_every_type_mean_the_same(isa):
    source, coords = randn(2, 3, 41, 53), corners(2, 9, low=-12, high=41).clamp(min=-9)
    copied, resampled = (gather_patches(source, coords, 8, **o) for o in ({}, {"out_size": 5}))
    for dtype in (*INTEGERS, torch.int8):
        assert torch.equal(gather_patches(source, coords.to(dtype), 8, backend="native"), copied)
    for dtype in (*INTEGERS, *FLOATS):
        assert torch.equal(gather_patches(source, coords.to(dtype), 8, out_size=5, backend="native"), resampled)
    strided = torch.stack([coords, coords], -1)[..., 1]
    assert torch.equal(gather_patches(source, strided.int(), 8, backend="native"), copied)
    assert torch.equal(gather_patches(source, strided.float(), 8, out_size=5, backend="native"), resampled)


@pytest.mark.parametrize("options", [{}, {"out_size": 6}, {"out_size": 3, "alignment": "published"}])
def test_hostile_coordinates(isa, poisoned, options):
    extremes = [-(2**62), INT64.min, INT64.max, INT32.min, INT32.max, NO_PATCH, -4, -3, -1, 0, 8, 9, 10, 11]
    coords = torch.cartesian_prod(torch.tensor(extremes), torch.tensor(extremes))
    source = randn(2, 9, 10)
    upstream = torch.ones(len(coords), 2, *(options.get("out_size", 4),) * 2)
    floats = coords.float()
    floats[::7, 0], floats[3::11, 1], floats[5::13, 0] = math.nan, math.inf, -math.inf
    for where in (coords, coords.clamp(INT32.min, INT32.max).int(), *([floats, floats.double()] if options else [])):
        found, expected = (gather_patches(source, where, 4, backend=b, **options) for b in ("native", "reference"))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
        found, expected = (backward(source, where, 4, upstream, backend=b, **options) for b in ("native", "reference"))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("extent", [1e300, 1e38, 1e-30])
@pytest.mark.parametrize("alignment", ["pixel", "published"])
def test_extents_beyond_the_range_of_sums(isa, poisoned, extent, alignment):
    source, coords = randn(2, 9, 10), torch.tensor([[0.0, 0.0], [3, -5], [-1e20, 3]])
    options = {"out_size": 5, "alignment": alignment}
    found, expected = (gather_patches(source, coords, extent, backend=b, **options) for b in ("native", "reference"))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    upstream = torch.ones_like(found)
    found, expected = (
        backward(source, coords, extent, upstream, backend=b, **options) for b in ("native", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_stay_where_they_are(isa, value):
    source = torch.zeros(1, 20, 20)
    source[:, 5:9, 5:9] = value
    coords = torch.tensor([[0, 0], [5, 5], [9, 9], [2.5, 3.25], [NO_PATCH, 5]])
    for options in ({"out_size": 4}, {"out_size": 7}, {"out_size": 2, "alignment": "published"}):
        found, expected = (gather_patches(source, coords, 4, backend=b, **options) for b in ("native", "reference"))
        assert torch.equal(found.isnan(), expected.isnan())
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_no_pixel_outside_a_patch_is_read(isa, layout):
    """The image lies at the very end of a larger one that is NaN elsewhere."""
    whole = torch.full((1, 18, 40, 40), math.nan)
    whole = whole.contiguous(memory_format=torch.channels_last) if layout == "channels last" else whole
    source = whole[0, :17, 13:, 9:]
    source.copy_(randn(17, 27, 31))
    for size in (1, 3, 8, 16, 18):
        coords = torch.tensor([[0, 0], [27 - size, 31 - size], [-1, 31 - size + 1]])
        for options in ({}, {"out_size": 5}, {"out_size": 16}, {"out_size": 16, "alignment": "published"}):
            assert not gather_patches(source, coords, size, backend="native", **options).isnan().any()


@pytest.mark.parametrize("options", [{}, {"out_size": 3}])
def test_offsets_beyond_32_bits_of_elements(isa, options):
    distance = 2**33 + 3
    memory = torch.empty(distance + 64, dtype=torch.uint8)  # reserved, and touched in two places only
    source = memory[: (distance + 64) // 4 * 4].view(torch.float32).as_strided((2, 4, 4), (distance // 4, 4, 1))
    source.copy_(randn(2, 4, 4))
    coords = torch.tensor([[1, -1], [0, 1]])
    found = gather_patches(source, coords, 3, backend="native", **options)
    assert torch.equal(found, gather_patches(source.clone(), coords, 3, backend="native", **options))


def test_an_image_of_more_than_2_to_the_31_pixels_a_row(isa):
    row = torch.tensor([1.0]).expand(1, 2, 2**33)
    coords = torch.tensor([[0, 2**33 - 3], [-1, 2**32]])
    copied = gather_patches(row, coords, 4, backend="native")
    assert copied.sum() == 2 * 3 + 2 * 4
    for extent in (4, 2**32):
        assert (gather_patches(row, coords, extent, out_size=3, backend="native") == 1).all()


@pytest.mark.parametrize("options", [{}, {"out_size": 20}, {"out_size": 9, "alignment": "published"}])
@pytest.mark.parametrize(("batch", "channels", "count"), [(1, 1, 700), (1, 64, 2), (3, 5, 90)])
def test_threads_change_no_bit(isa, options, batch, channels, count):
    source, coords = randn(batch, channels, 200, 180), corners(batch, count, low=-9, high=200)
    size = options.get("out_size", 16)
    upstream = randn(batch, count, channels, size, size)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                (
                    gather_patches(source, coords, 16, backend="native", **options),
                    backward(source, coords, 16, upstream, backend="native", **options),
                )
            )
    finally:
        torch.set_num_threads(before)
    for patches, gradient in found[1:]:
        assert torch.equal(patches, found[0][0])
        assert torch.equal(gradient, found[0][1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"out_size": 5}, {"out_size": 20, "alignment": "published"}])
def test_adjoint_identity(isa, layout, options):
    """<gather(x), y> == <x, gather_backward(y)> in float64."""
    source, coords = image(layout, 3, torch.float64), corners(2, 40, low=-9, high=45)
    patches = gather_patches(source, coords, 12, backend="native", **options)
    upstream = randn(*patches.shape, dtype=torch.float64, seed=3)
    gradient = backward(source, coords, 12, upstream, backend="native", **options)
    left, right = (patches * upstream).sum(), (source * gradient).sum()
    bound = 8 * epsilon(torch.float64) * float((patches * upstream).abs().sum())
    assert abs(float(left - right)) <= bound


@pytest.mark.parametrize("options", [{}, {"out_size": 2}, {"out_size": 5}, {"out_size": 3, "alignment": "published"}])
def test_gradcheck(isa, options):
    source = randn(2, 2, 5, 6, dtype=torch.float64).requires_grad_()
    coords = corners(2, 4, low=-3, high=6)

    def cut(x: Tensor) -> Tensor:
        return gather_patches(x, coords, 3, backend="native", **options)

    assert torch.autograd.gradcheck(cut, source, nondet_tol=0.0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    small = st.integers(0, 4)
    lead = tuple(data.draw(st.lists(small, max_size=3)))
    channels, height, width = (
        data.draw(st.integers(0, 19)),
        data.draw(st.integers(0, 40)),
        data.draw(st.integers(0, 40)),
    )
    count, patch_size = data.draw(st.integers(0, 7)), data.draw(st.integers(1, 21))
    n = data.draw(st.none() | st.integers(1, 21))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    source = randn(*lead, channels, height, width, dtype=dtype)
    if data.draw(st.booleans()):
        source = source.movedim(-3, -1).contiguous().movedim(-1, -3)
    coords = corners(*lead, count, low=-25, high=45, seed=data.draw(small))
    options = {} if n is None else {"out_size": n, "alignment": data.draw(st.sampled_from(["pixel", "published"]))}
    found, expected = (
        gather_patches(source, coords, patch_size, backend=b, **options) for b in ("native", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=16 * epsilon(dtype) if options else 0)
    upstream = randn(*found.shape, dtype=dtype)
    found, expected = (
        backward(source, coords, patch_size, upstream, backend=b, **options) for b in ("native", "reference")
    )
    bound = 64 * epsilon(dtype) * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=bound if options else 0)


HUGE = 2**62
TOO_LARGE = "sizes must not multiply beyond 63 bits of bytes"


@pytest.mark.parametrize(
    ("sizes", "coords_type", "message"),
    [  # outer, inner, channels, height, width, count, patch
        ((1, 1, 1, -4, 4, 1, 2), 1, "sizes must not be negative"),
        ((1, 1, 1, 4, 4, 1, 0), 1, "patch must be at least 1"),
        ((1, 1, 1, 4, 4, 1, 2), -1, "coords_type must be"),
        ((1, 1, 1, 4, 4, 1, 2), 4, "coords_type must be"),
        ((1, 1, 1, HUGE, HUGE, 1, 2), 0, TOO_LARGE),
        ((1, 1, 0, 4, 4, 1, HUGE), 0, TOO_LARGE),
        ((1, 1, 1, 4, 4, HUGE, 2), 0, TOO_LARGE),
        ((2**32, 2**31, 1, 1, 1, 1, 1), 0, TOO_LARGE),
        ((1, 1, 1, HUGE, 0, 1, HUGE), 0, TOO_LARGE),
        ((HUGE, HUGE, 0, 4, 4, 0, 2), 0, None),  # nothing to do
        ((1, 1, 1, HUGE, 0, 0, 2), 3, None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_sizes_are_refused(sizes, coords_type, message, dtype):
    outer, inner, channels, height, width, count, patch = sizes
    transposed = (outer, inner, count, channels, patch, height, width)
    grid, nothing = (1.0, 1.0, 0), (None, None, None)
    codes = [
        gather_native._BILINEAR[dtype](*nothing, *sizes, *(0,) * 5, coords_type, *grid),
        gather_native._BILINEAR_BACKWARD[dtype](*nothing, *transposed, *(0,) * 6, coords_type, *grid),
    ]
    if coords_type in (-1, 0, 1, 4):
        codes.append(gather_native._gather(*nothing, *sizes, *(0,) * 5, dtype.itemsize, coords_type))
        codes.append(gather_native._BACKWARD[dtype](*nothing, *transposed, *(0,) * 6, coords_type))
    for code in codes:
        if message is None:
            library.check(code)
        else:
            with pytest.raises(RuntimeError, match=message):
                library.check(code)


def test_copies_take_no_fractional_coordinates_and_known_elements_only():
    sizes = (1, 1, 1, 4, 4, 1, 2)
    for arguments, message in (((4, 2), "coords_type must be"), ((3, 0), "element_bytes must be 1, 2, 4 or 8")):
        with pytest.raises(RuntimeError, match=message):
            library.check(gather_native._gather(None, None, None, *sizes, *(0,) * 5, *arguments))


def test_ops_never_read_beyond_their_tensors():
    ops, coords = torch.ops.icseg, torch.zeros(1, 2)
    extent = torch.tensor(3.0)
    with pytest.raises(ValueError, match=r"coords must have shape \[2, 1, 2\], got \[1, 2\]"):
        ops.gather_patches_bilinear(torch.zeros(2, 1, 5, 5), coords, extent, extent, 3, False, "native")
    with pytest.raises(ValueError, match=r"coords must have shape \[4, 2\], got \[1, 2\]"):
        ops.gather_patches_bilinear_backward(torch.zeros(4, 1, 3, 3), coords, extent, extent, False, 5, 5, "native")
    shorts = torch.zeros(1, 5, 5, dtype=torch.int16)
    with pytest.raises(TypeError, match=r"source must be a floating-point tensor, got torch.int16"):
        ops.gather_patches_bilinear(shorts, coords, extent, extent, 3, False, "native")


def test_an_extent_below_zero_reads_no_pixel_outside_the_image(isa):
    source, coords = randn(1, 2, 40, 40), torch.tensor([[[39, 39], [20, 39], [30, 25]]])
    arguments = coords, torch.tensor(-19.0), torch.tensor(-24.0), 16, False  # the samples descend
    found, expected = (torch.ops.icseg.gather_patches_bilinear(source, *arguments, b) for b in ("native", "reference"))
    assert expected.abs().min() > 0
    torch.testing.assert_close(found, expected)
