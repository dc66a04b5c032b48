"""upsample_with_patches against torch's interpolation and patches written one by one, on every backend here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import BACKENDS, needs_native
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from torch.utils.flop_counter import FlopCounterMode

from icseg_kernels import BackendError, flops, library, upsample_with_patches
from icseg_kernels.patches import upsample_native

INT64 = torch.iinfo(torch.int64)
OUTSIDE = [-65536, -1_000_000_000, INT64.min, INT64.max, INT64.min + 1, 2**31, -(2**31)]
SIZES = [(1, 1), (1, 2), (2, 1), (3, 50), (33, 34), (64, 64), (79, 131)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def case(
    size: tuple[int, int],
    count: int = 9,
    patch: tuple[int, int] = (8, 8),
    batch: int = 2,
    channels: int = 3,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Patches that overlap, cross borders, or lie outside."""
    generator = torch.Generator().manual_seed(1)
    coarser = normal(batch, channels, (size[0] + 1) // 2, (size[1] + 1) // 2, dtype=dtype)
    coords = [torch.randint(-patch[i] - 1, size[i] + 2, (batch, count), generator=generator) for i in (0, 1)]
    return coarser, normal(batch, count, channels, *patch, seed=2, dtype=dtype), torch.stack(coords, -1), size


def doubled(coarser: Tensor, size: tuple[int, int]) -> Tensor:
    found = F.interpolate(coarser, scale_factor=2, mode="bilinear", align_corners=False)
    return found[..., : size[0], : size[1]].clone()


def by_hand(coarser: Tensor, patches: Tensor, coords: Tensor, size: tuple[int, int]) -> Tensor:
    """One patch after the other."""
    out = doubled(coarser, size)
    height, width = patches.shape[3:]
    for b, corners in enumerate(coords.tolist()):
        for k, (y, x) in enumerate(corners):
            top, left, bottom, right = max(y, 0), max(x, 0), min(y + height, size[0]), min(x + width, size[1])
            if top < bottom and left < right:
                out[b, :, top:bottom, left:right] = patches[b, k, :, top - y : bottom - y, left - x : right - x]
    return out


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def test_by_hand(backend):
    coarser = torch.tensor([[[[0.0, 4.0]]]])
    patches = torch.full((1, 1, 1, 2, 2), 9.0)
    coords = torch.tensor([[[1, 2]]])
    found = upsample_with_patches(coarser, patches, coords, (2, 4), backend=backend)
    assert found.tolist() == [[[[0.0, 1.0, 3.0, 4.0], [0.0, 1.0, 9.0, 9.0]]]]
    found = upsample_with_patches(coarser, patches, coords, (1, 3), backend=backend)
    assert found.tolist() == [[[[0.0, 1.0, 3.0]]]]


@pytest.mark.parametrize("patch", [(8, 8), (1, 1), (5, 21), (40, 3)])
@pytest.mark.parametrize("size", SIZES)
def test_is_the_interpolation_with_the_patches_written(backend, size, patch):
    call = case(size, patch=patch)
    assert_near(upsample_with_patches(*call, backend=backend), by_hand(*call))


@pytest.mark.parametrize("size", SIZES)
def test_native(isa, poisoned, size):
    call = case(size)
    found = upsample_with_patches(*call, backend="native")
    assert_near(found, upsample_with_patches(*call, backend="reference"))
    assert_near(found, by_hand(*call))


@pytest.mark.parametrize("width", range(1, 80))
def test_every_width(isa, poisoned, width):
    call = case((3, width), count=1, batch=1, channels=1, patch=(1, width // 3 + 1))
    assert_near(upsample_with_patches(*call, backend="native"), by_hand(*call))


def test_patches_arrive_bit_for_bit_and_the_last_one_wins(backend):
    coarser, patches, coords, size = case((32, 32), count=5, patch=(8, 6))
    coords = torch.tensor([[3, 4], [3, 4], [7, 6], [28, -2], [0, 30]]).expand(2, -1, -1)
    patches[:, 1, :, 2, 2] = math.nan
    patches[:, 2, :, 5, 5] = -0.0
    found = upsample_with_patches(coarser, patches, coords, size, backend=backend)
    assert_near(found, by_hand(coarser, patches, coords, size))
    assert torch.equal(found[:, :, 7:15, 6:12], patches[:, 2])
    patches[:, 0] = math.nan  # wholly hidden
    again = upsample_with_patches(coarser, patches, coords, size, backend=backend)
    torch.testing.assert_close(again, found, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_hostile_coords(backend, dtype):
    coarser, patches, _, size = case((20, 17), count=4, batch=1)
    limits = torch.iinfo(dtype)
    values = [v for v in (*OUTSIDE, limits.min, limits.max) if limits.min <= v <= limits.max]
    expected = doubled(coarser, size)
    for hostile in values:
        coords = torch.tensor([[[hostile, 0], [0, hostile], [hostile, hostile], [-8, 3]]], dtype=dtype)
        assert_near(upsample_with_patches(coarser, patches, coords, size, backend=backend), expected)
    inside = torch.tensor([[[-7, -7], [19, 16], [3, -8], [20, 3]]], dtype=dtype)
    found = upsample_with_patches(coarser, patches, inside, size, backend=backend)
    assert_near(found, by_hand(coarser, patches, inside, size))


@pytest.mark.parametrize(("batch", "count", "channels"), [(2, 0, 3), (0, 4, 3), (0, 0, 1)])
def test_none_of_something(backend, batch, count, channels):
    call = case((9, 12), count=count, batch=batch, channels=channels)
    found = upsample_with_patches(*call, backend=backend)
    assert found.shape == (batch, channels, 9, 12)
    if count == 0:
        assert_near(found, doubled(call[0], call[3]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_neighbourhood(backend, bad):
    coarser, patches, coords, size = case((40, 60), count=3, batch=1)
    clean = upsample_with_patches(coarser, patches, coords, size, backend=backend)
    coarser[0, 1, 9, 20] = bad
    found = upsample_with_patches(coarser, patches, coords, size, backend=backend)
    near = torch.zeros(found.shape, dtype=torch.bool)
    near[0, 1, 17:21, 39:43] = True
    assert torch.equal(found[~near], clean[~near])
    uncovered = by_hand(torch.zeros_like(coarser), torch.ones_like(patches), coords, size) == 0
    wrong = found[near & uncovered]
    assert wrong.numel()
    assert (wrong.isnan() if math.isnan(bad) else wrong == bad).all()


def test_strided_views(backend):
    coarser, patches, coords, size = case((33, 48))
    expected = upsample_with_patches(coarser, patches, coords, size, backend=backend)
    apart = torch.full((3, 4, 19, 30), math.nan).transpose(0, 1)[1:-1, :, 1:-1, 3:-3]
    apart.copy_(coarser)
    spread = torch.stack([patches, patches], -1)[..., 0]
    turned = coords.transpose(0, 2).contiguous().transpose(0, 2)
    for view in (apart, coarser.to(memory_format=torch.channels_last), coarser.mT.contiguous().mT):
        assert not view.is_contiguous()
        assert_near(upsample_with_patches(view, spread, turned, size, backend=backend), expected)
    same = coarser[:1, :1].expand(2, 3, -1, -1), patches[:, :1].expand(-1, 9, -1, -1, -1), coords[:1].expand(2, -1, -1)
    found = upsample_with_patches(*same, size, backend=backend)
    assert_near(found, by_hand(*same, size))


@needs_native
def test_offsets_beyond_32_bits():
    """2^33 bytes of address space, of which a few pages are touched: two maps far apart."""
    coarser, patches, coords, size = case((32, 32), channels=1)
    far = torch.empty(2**31 + 4096).as_strided((2, 1, 16, 16), (2**31, 256, 16, 1))
    far.copy_(coarser)
    found, expected = (upsample_with_patches(x, patches, coords, size, backend="native") for x in (far, coarser))
    assert torch.equal(found, expected)


def test_threads_change_no_bit(isa, threads):
    call, results = case((300, 411), count=60, patch=(33, 17)), []
    for count in (1, 2, 3):
        threads(count)
        results.append(upsample_with_patches(*call, backend="native"))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert_near(results[0], by_hand(*call))


@settings(max_examples=80, deadline=None)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    count=st.integers(0, 6),
    patch=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    batch=st.integers(0, 3),
    channels=st.integers(1, 3),
)
@needs_native
def test_random_shapes(size, count, patch, batch, channels):
    call = case(size, count, patch, batch, channels)
    found = upsample_with_patches(*call, backend="native")
    assert_near(found, by_hand(*call))
    assert_near(found, upsample_with_patches(*call, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    call = case((21, 30), dtype=dtype)
    found = upsample_with_patches(*call)
    assert found.dtype == dtype
    torch.testing.assert_close(found, by_hand(*call))


def test_gradcheck():
    coarser, patches, coords, size = case((5, 6), count=4, patch=(3, 2), channels=1, dtype=torch.float64)

    def run(coarser: Tensor, patches: Tensor) -> Tensor:
        return upsample_with_patches(coarser, patches, coords, size)

    tensors = coarser.requires_grad_(), patches.requires_grad_()
    assert torch.autograd.gradcheck(run, tensors, nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_gradients_are_those_of_what_is_seen():
    coarser, patches, coords, size = case((20, 17), count=7)
    wanted = coarser.requires_grad_(), patches.requires_grad_()
    upstream = normal(2, 3, *size, seed=5)
    ours, theirs = (
        torch.autograd.grad(run(coarser, patches, coords, size), wanted, upstream)
        for run in (upsample_with_patches, by_hand)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@needs_native
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_the_reference_serves_what_the_library_does_not():
    coarser, patches, coords, size = case((20, 17))
    for others, reason in (
        ((coarser.double(), patches.double(), coords), r"it computes in float32, and coarser is torch\.float64"),
        ((coarser.to("meta"), patches.to("meta"), coords.to("meta")), "it runs on the CPU, and coarser is on meta"),
        (
            (coarser, patches.clone().requires_grad_(), coords),
            "it has no gradients, and coarser or patches requires one",
        ),
        (
            (coarser.clone().requires_grad_(), patches, coords),
            "it has no gradients, and coarser or patches requires one",
        ),
    ):
        assert upsample_with_patches(*others, size).shape == (2, 3, *size)
        with pytest.raises(BackendError, match=f"cannot serve upsample_with_patches of .*{reason}"):
            upsample_with_patches(*others, size, backend="native")
    wanting = patches.clone().requires_grad_()
    with torch.no_grad():
        assert not upsample_with_patches(coarser, wanting, coords, size, backend="native").requires_grad

    def run(x: Tensor, **named: Any) -> Tensor:
        return upsample_with_patches(x, torch.zeros_like(patches), coords, size, **named)

    _, tangent = torch.func.jvp(run, (coarser,), (coarser,))
    assert_near(tangent, run(coarser))
    mapped = torch.func.vmap(run)(torch.stack([coarser, 2 * coarser]))
    torch.testing.assert_close(mapped[1], run(2 * coarser))
    both = torch.stack([coords, coords + 1])
    mapped = torch.func.vmap(lambda c: upsample_with_patches(coarser, patches, c, size))(both)
    assert_near(mapped[1].contiguous(), by_hand(coarser, patches, coords + 1, size))
    with pytest.raises(BackendError, match="no rules for forward-mode differentiation and function transforms"):
        torch.func.jvp(lambda x: run(x, backend="native"), (coarser,), (coarser,))


@needs_native
@pytest.mark.parametrize("count", [4, 0])
def test_opcheck(count):
    coarser, patches, coords, size = case((20, 17), count=count)
    torch.library.opcheck(
        torch.ops.icseg.upsample_with_patches.default,
        (coarser, patches, coords, *size, "native"),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@needs_native
def test_compile_is_one_node():
    torch.compiler.reset()
    recorder = EagerAndRecordGraphs()

    def run(coarser: Tensor, patches: Tensor, coords: Tensor) -> Tensor:
        return upsample_with_patches(coarser, patches, coords, (2 * coarser.shape[2], 2 * coarser.shape[3]))

    compiled = torch.compile(run, fullgraph=True, backend=recorder)
    for count in (3, 3, 4, 7):
        call = case((24, 30), count=count)[:3]
        assert torch.equal(compiled(*call), run(*call))
    assert len(recorder.graphs) <= 2
    for graph in recorder.graphs:
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert targets.count("icseg.upsample_with_patches.default") == 1
        assert not [target for target in targets if "interpolate" in target]


def test_compile_fullgraph_with_gradients():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(upsample_with_patches, fullgraph=True, backend=counter)
    for count in (2, 2, 3, 5):
        coarser, patches, coords, size = case((20, 17), count=count)
        wanted = coarser.requires_grad_(), patches.requires_grad_()
        ours, theirs = (
            torch.autograd.grad(run(coarser, patches, coords, size).square().sum(), wanted)
            for run in (compiled, upsample_with_patches)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count <= 2


def test_autocast_changes_nothing(backend):
    call = case((20, 17))
    expected = upsample_with_patches(*call, backend=backend)
    half = case((20, 17), dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(upsample_with_patches(*call, backend=backend), expected)
        assert upsample_with_patches(*half).dtype == torch.bfloat16


def test_no_flops(backend):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        upsample_with_patches(*case((20, 17)), backend=backend)
    assert counter.get_total_flops() == 0


def test_bytes_are_those_of_the_tensors():
    coarser, patches, coords, size = case((21, 16), count=5, patch=(4, 7))
    tensors = coarser, patches, coords, upsample_with_patches(coarser, patches, coords, size)
    assert flops.upsample_with_patches_bytes(2, 5, 3, 28, *size) == sum(t.nbytes for t in tensors)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"coarser": None}, TypeError, "coarser must be a torch.Tensor, got NoneType"),
        ({"coarser": torch.zeros(2, 3, 4)}, ValueError, r"coarser must have shape \[B, C, h, w\] .* got \[2, 3, 4\]"),
        ({"coarser": torch.zeros(2, 3, 0, 4)}, ValueError, r"coarser must have .* C, h, w > 0, got \[2, 3, 0, 4\]"),
        ({"coarser": torch.zeros(2, 0, 4, 4)}, ValueError, r"coarser must have .* got \[2, 0, 4, 4\]"),
        ({"patches": torch.zeros(2, 5, 3, 2, 2).half()}, TypeError, "patches must have the dtype of coarser, torch.fl"),
        (
            {"patches": torch.zeros(2, 5, 4, 2, 2)},
            ValueError,
            r"patches must have shape \[2, K, 3, p, q\] .* 4, 2, 2\]",
        ),
        ({"patches": torch.zeros(1, 5, 3, 2, 2)}, ValueError, r"patches must have shape .* got \[1, 5, 3, 2, 2\]"),
        ({"patches": torch.zeros(2, 5, 3, 0, 2)}, ValueError, r"with p, q > 0, got \[2, 5, 3, 0, 2\]"),
        ({"patches": torch.zeros(2, 5, 3, 2, 2, device="meta")}, ValueError, "patches must be on cpu"),
        ({"coords": torch.zeros(2, 4, 2).long()}, ValueError, r"coords must have shape \[B, K, 2\] = \[2, 5, 2\]"),
        ({"coords": torch.zeros(2, 5, 2)}, TypeError, "coords must be an integer tensor, got torch.float32"),
        ({"size": (6, 8)}, ValueError, r"size must be twice that of coarser, \[4, 4\], or one less, got \[6, 8\]"),
        ({"size": (8, 9)}, ValueError, r"size must be twice that of coarser, \[4, 4\], or one less, got \[8, 9\]"),
        ({"size": (0, 8)}, ValueError, r"size\[0\] must be an integer of at least 1, got 0"),
        ({"size": 8}, TypeError, "size must be a pair of integers, got 8"),
        ({"backend": "cuda"}, BackendError, "upsample_with_patches has no cuda backend"),
    ],
)
def test_errors(changes, error, message):
    arguments = {
        "coarser": torch.zeros(2, 3, 4, 4),
        "patches": torch.zeros(2, 5, 3, 2, 2),
        "coords": torch.zeros(2, 5, 2, dtype=torch.int64),
        "size": (8, 7),
    }
    with pytest.raises(error, match=message):
        upsample_with_patches(**{**arguments, **changes})


@needs_native
def test_operators_called_directly_check_before_raw_pointers():
    op = torch.ops.icseg.upsample_with_patches
    coarser, patches, coords, size = case((20, 17))
    for bad in (
        (coarser.double(), patches, coords),
        (coarser, patches.half(), coords),
        (coarser, patches, coords.float()),
        (coarser[0], patches, coords),
        (coarser, patches[:1], coords),
        (coarser, patches[:, :, :2], coords),
        (coarser, patches, coords[:, 1:]),
    ):
        with pytest.raises(ValueError, match=r"upsample_with_patches needs coarser \[B, C, h, w\] and patches"):
            op(*bad, *size, "native")
    with pytest.raises(RuntimeError, match="height and width must be twice those"):
        op(coarser, patches, coords, 18, 17, "native")
    with pytest.raises(RuntimeError, match="patch must be at least 1"):
        op(coarser, patches[..., :0], coords, *size, "native")


@needs_native
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((-1, 1, 4, 4, 8, 8, 1, 2, 2), "negative"),
        ((1, 1, 4, 4, 8, 8, -(2**63), 2, 2), "negative"),
        ((1, 1, 4, 4, 8, 8, 1, 0, 2), "patch must be at least 1"),
        ((1, 1, 4, 4, 8, 8, 1, 2, -1), "patch must be at least 1"),
        ((1, 1, 4, 4, 9, 8, 1, 2, 2), "twice"),
        ((1, 1, 4, 4, 8, 6, 1, 2, 2), "twice"),
        ((1, 1, 2**61, 4, 2**62, 8, 1, 2, 2), "63 bits"),
        ((2**32, 2**32, 4, 4, 8, 8, 1, 2, 2), "63 bits"),
        ((1, 1, 4, 4, 8, 8, 2**62, 1, 1), "63 bits"),
        ((1, 1, 4, 4, 8, 8, 1, 2**40, 2**40), "63 bits"),
    ],
)
def test_impossible_sizes_of_the_entry(sizes, message):
    with pytest.raises(RuntimeError, match=message):
        library.check(upsample_native._upsample(None, None, None, None, *sizes, 0, 0, 0))


@needs_native
def test_nothing_to_do():
    for sizes in ((0, 1, 4, 4, 8, 8, 1, 2, 2), (1, 0, 4, 4, 8, 8, 1, 2, 2), (1, 1, 0, 4, 0, 8, 1, 2, 2)):
        assert upsample_native._upsample(None, None, None, None, *sizes, 0, 0, 0) == 0
