"""What a level leaves to the next, in one launch, against the network's own functions; without a GPU, interpreted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from samples import DEVICE
from test_sparse import make_inputs, make_model
from torch import Tensor

from icseg.sparse import network, selection
from icseg.sparse.budget import LevelPlan
from icseg.sparse.cascade import LevelTask
from icseg.sparse.patches import OUTSIDE, PATCH, coords_of, grid_size
from icseg.sparse.pyramid import CONTEXT_STEPS, Pyramid
from icseg_kernels import triton_launch, use_backend
from icseg_kernels.cascade.write import MOST_CELLS, MOST_PICKS, Written, write_and_pick

if triton_launch.missing():
    pytest.skip("; ".join(triton_launch.missing()), allow_module_level=True)

from icseg_kernels.cascade import write_triton_kernels

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BFLOAT16 = pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, needs_gpu])
DTYPES = [torch.float32, torch.float16, BFLOAT16]
if triton_launch.INTERPRETED:
    DTYPES.append(torch.float64)

Call = tuple[Tensor | None, Tensor, Tensor, Tensor, tuple[int, int], Tensor | None, tuple[int, int] | None, int]

# B, C, K, size, next size, picks.
CASES: dict[str, tuple[int, int, int, tuple[int, int], tuple[int, int], int]] = {
    "whole cells": (2, 1, 4, (16, 24), (32, 48), 11),
    "borders": (1, 2, 5, (11, 35), (22, 69), 9),
    "classes": (1, 3, 4, (17, 9), (33, 18), 7),
    "one cell": (1, 1, 1, (3, 1), (5, 2), 1),
    "more than are ranked at a time": (1, 1, 30, (40, 60), (80, 120), 140),
}


def made(
    batch: int,
    classes: int,
    count: int,
    size: tuple[int, int],
    next_size: tuple[int, int] | None,
    picks: int,
    dtype: torch.dtype = torch.float32,
    first: bool = False,
) -> Call:
    """Patches in cells at random; the last of the first sample is none."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)

    rows, columns = grid_size(*size)
    coarser = normal(batch, classes, (size[0] + 1) // 2, (size[1] + 1) // 2) * 2
    patches, errors = normal(batch, count, classes, 8, 8) * 3, normal(batch, count, classes, 8, 8) - 2
    order = torch.rand(batch, rows * columns, generator=generator).argsort(1)[:, :count]
    if count > 1:
        order[:1, -1] = -1
    coords = coords_of(order, columns).to(DEVICE)
    error = torch.rand(batch, classes, rows, columns, generator=generator).to(dtype).to(DEVICE) / 2
    return None if first else coarser, patches, errors, coords, size, None if first else error, next_size, picks


def case(name: str, dtype: torch.dtype = torch.float32, first: bool = False) -> Call:
    return made(*CASES[name], dtype, first)


def cell_shares(size: tuple[int, int]) -> Tensor | float:
    image = torch.empty(1, 1, *size, device=DEVICE)
    return LevelTask(0, Pyramid([image] * (CONTEXT_STEPS + 1), []), None, 1, LevelPlan((1,)), None, None).cell_shares


def picked(error: Tensor, logits: Tensor, size: tuple[int, int], picks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Corners of the next level's picks, what is uncovered, and the scores [B, cells]."""
    foreground = network.expected_foreground(logits)
    if logits.dtype == torch.float64:
        foreground = logits.sigmoid().mean((2, 3), keepdim=True).clamp_min(network.LEAST_FOREGROUND)
    score = (error * (cell_shares(size) / (2 * foreground))).amax(1).flatten(1)
    index = selection.target_patches(torch.where(score < 0, -1.0, score), picks, 1.5, None)
    covered = selection.on_grid(torch.ones_like(index), index, score.shape[1]) > 0
    return coords_of(index, grid_size(*size)[1]), score.masked_fill(covered, 0).sum(1), score


def by_modules(call: Call) -> Written:
    coarser, patches, errors, coords, size, error, next_size, picks = call
    with use_backend("reference"):
        logits = network._refined(coarser, patches, coords, size)
        following = network._next_error(error, errors, coords, torch.empty(1, 1, *next_size))
    corners, uncovered, _ = picked(following, logits, next_size, picks)
    return Written(logits, following, corners, uncovered, None)


def wide(call: Call) -> Call:
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in call)


def assert_near(found: Written, call: Call) -> None:
    """Twice the modules' errors at most, but for some units in the last place; picks exactly as the scores say."""
    torch.use_deterministic_algorithms(False)  # by `poisoned`
    theirs, right = by_modules(call), by_modules(wide(call))
    dtype = call[1].dtype
    for ours, other, exact in zip(found[:2], theirs[:2], right[:2], strict=True):
        assert ours.shape == exact.shape
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        error, usual = ((x.double() - exact).abs().max() for x in (ours, other))
        assert error <= 2 * usual + 2 * torch.finfo(dtype).eps * exact.abs().max()
    corners, uncovered, _ = picked(found.error, found.map, *call[6:])
    assert torch.equal(found.coords, corners)
    assert found.uncovered.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.uncovered, uncovered.to(found.uncovered.dtype), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_is_what_the_modules_do(poisoned, name, first):
    call = case(name, first=first)
    found = write_and_pick(*call)
    assert_near(found, call)
    expected = by_modules(call)
    assert torch.equal(found.coords, expected.coords)
    torch.testing.assert_close(found.uncovered, expected.uncovered, rtol=1e-4, atol=1e-6)
    assert found.divided is None


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", ["borders", "whole cells"])
def test_dtypes(poisoned, name, first, dtype):
    call = case(name, dtype, first)
    assert_near(write_and_pick(*call), call)


@pytest.mark.parametrize(("size", "classes"), [((64, 40), 1), ((33, 58), 2)])
def test_picks_as_the_network(size, classes):
    """Every level of a forward pass from the patches of the network's, and the errors of our own before."""
    target, images, masks = make_inputs(1, 2, *size, classes=classes)
    with torch.inference_mode():
        out = make_model()(target, images, masks, budget=18)
    coarser = error = uncovered = None
    corners = out.levels[0].coords.to(DEVICE)
    for level, following in zip(out.levels, [*out.levels[1:], None], strict=True):
        patches, errors = (x.to(DEVICE) for x in (level.patch_logits, level.extras["error_logits"]))
        picks = 0 if following is None else following.coords.shape[1]
        next_size = None if following is None else following.resolution
        call = (coarser, patches, errors, corners, level.resolution, error, next_size, picks)
        coarser, error, corners, left, _ = write_and_pick(*call)
        torch.testing.assert_close(coarser, level.logits.to(DEVICE), rtol=1e-5, atol=1e-5)
        if following is None:
            assert error is None
            assert corners is None
            assert left is None
        else:
            assert torch.equal(corners, following.coords.to(DEVICE))
            uncovered = left
    torch.testing.assert_close(uncovered, out.uncovered_error.to(DEVICE), rtol=1e-4, atol=1e-6)


def test_at_the_sizes_of_the_model(monkeypatch):
    options = write_triton_kernels.options
    if triton_launch.INTERPRETED:  # fewer programs: each takes long
        monkeypatch.setattr(write_triton_kernels, "options", lambda *a: options(*a) | {"BLOCK_Y": 64, "BLOCK_X": 128})
    call = made(1, 1, 48, (256, 256), (512, 512), 70)
    found = write_and_pick(*call)
    assert_near(found, call)
    assert torch.equal(found.coords, by_modules(call).coords)


@pytest.mark.parametrize(("name", "tile"), [("classes", 8), ("more than are ranked at a time", 64)])
def test_in_chunks(monkeypatch, poisoned, name, tile):
    call = case(name)
    expected = write_and_pick(*call)
    few = {"TILE": tile, "CHUNKS": True, "RANKS": 64, "num_warps": 4}
    monkeypatch.setattr(write_triton_kernels, "picking", lambda cells: dict(few))
    for spare in (0, 64):
        monkeypatch.setattr(write_triton_kernels, "SPARE", spare)
        for ours, other in zip(write_and_pick(*call), expected, strict=True):
            assert ours is None or torch.allclose(ours, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("spare", [0, 4])
def test_of_equals_the_first(monkeypatch, spare):
    """Inherited errors come in fours, and all of many."""
    monkeypatch.setattr(write_triton_kernels, "SPARE", spare)
    coarser, patches, errors, coords, size, error, next_size, _ = case("whole cells")
    for values, picks in ((error, 10), ((error * 4).round() / 4, 7), (0 * error, 0), (0 * error, 22)):
        call = (coarser, patches, errors, coords, size, values, next_size, picks)
        assert_near(write_and_pick(*call), call)


def test_more_picks_than_cells():
    call = case("whole cells")
    found = write_and_pick(*call[:7], 90)
    expected = by_modules((*call[:7], 24))
    assert torch.equal(found.coords[:, :24], expected.coords)
    assert (found.coords[:, 24:] == OUTSIDE).all()
    assert (found.uncovered == 0).all()


def test_errors_below_zero_are_never_picked():
    coarser, patches, errors, coords, size, error, next_size, _ = case("borders")
    error[:, 0] = -math.inf
    error[:, 1, :, 1:] = -0.1
    found = write_and_pick(coarser, patches, errors, coords, size, error, next_size, 27)
    assert torch.equal(found.coords, picked(found.error, found.map, next_size, 27)[0])
    assert (found.coords == OUTSIDE).any()


def test_infinite_errors_come_first():
    coarser, patches, errors, coords, size, error, next_size, _ = case("borders")
    error[:, 0, 1, 3:] = math.inf
    found = write_and_pick(coarser, patches, errors, coords, size, error, next_size, 9)
    assert torch.equal(found.coords, picked(found.error, found.map, next_size, 9)[0])


@pytest.mark.parametrize("where", ["patches", "errors", "error", "coarser"])
def test_nan_stays_in_its_sample(where):
    """A score that is NaN counts as 0; what is left is NaN where such a cell is."""
    call = case("whole cells")
    clean = write_and_pick(*call)
    spoilt = {"coarser": call[0], "patches": call[1], "errors": call[2], "error": call[5]}[where]
    spoilt[0, 0, ..., 0, 1] = math.nan
    found, expected = write_and_pick(*call), by_modules(call)
    torch.testing.assert_close(found.map, expected.map, equal_nan=True)
    torch.testing.assert_close(found.error, expected.error, equal_nan=True)
    torch.testing.assert_close(found.uncovered, expected.uncovered, equal_nan=True, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.coords, expected.coords)
    for ours, other in zip(found[:4], clean[:4], strict=True):
        assert torch.equal(ours[1], other[1])


def test_logits_of_any_size():
    call = case("whole cells")
    call[1].mul_(1e3)
    call[2].mul_(1e3)
    assert_near(write_and_pick(*call), call)


def test_no_foreground_counts_as_some():
    call = case("whole cells")
    call[0].fill_(-50)
    call[1].fill_(-50)
    found, expected = write_and_pick(*call), by_modules(call)
    torch.testing.assert_close(found.uncovered, expected.uncovered, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("batch", "count"), [(0, 3), (2, 0), (0, 0)])
def test_none_of_something(poisoned, batch, count):
    call = made(batch, 1, count, (9, 21), (18, 42), 4)
    found = write_and_pick(*call)
    assert found.map.shape == (batch, 1, 9, 21)
    assert found.coords.shape == (batch, 4, 2)
    assert_near(found, call) if batch else None


def test_hostile_coords():
    """What is negative or beyond the map is not read or written; an image's own cells stay."""
    coarser, patches, errors, coords, size, error, next_size, picks = case("borders")
    least, most = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    coords[:, 1:] = torch.tensor([[least, 0], [0, most], [most, most], [40, 40]], device=DEVICE)
    rest = [x[:, :1].contiguous() for x in (patches, errors, coords)]
    expected = write_and_pick(coarser, *rest, size, error, next_size, picks)
    found = write_and_pick(coarser, patches, errors, coords, size, error, next_size, picks)
    for ours, other in zip(found[:4], expected[:4], strict=True):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
def test_temperature(poisoned, dtype, last):
    call = case("borders", dtype)
    temperature = torch.tensor(1.7, device=DEVICE)
    if last:
        call = (*call[:6], None, 0)
    found = write_and_pick(*call, temperature=temperature)
    plain = write_and_pick(*call)
    torch.testing.assert_close(found.divided, found.map / temperature.to(dtype), rtol=0, atol=0)
    for ours, other in zip(found[:4], plain[:4], strict=True):
        assert ours is other is None or torch.equal(ours, other)


@pytest.mark.parametrize("name", ["classes", "whole cells"])
def test_the_same_twice_in_one_launch_each(monkeypatch, name):
    launches: list[Any] = []
    launch = triton_launch.launch
    monkeypatch.setattr(triton_launch, "launch", lambda *a, **o: (launches.append(a[0]), launch(*a, **o)))
    call = case(name)
    counters = torch.zeros(call[1].shape[0], dtype=torch.int32, device=DEVICE)
    found = [write_and_pick(*call, counters=counters) for _ in range(2)]
    assert len(launches) == 2
    assert not counters.any()
    for ours, other in zip(found[0][:4], found[1][:4], strict=True):
        assert torch.equal(ours, other)


def test_a_sample_does_not_depend_on_the_others():
    call = made(3, 1, 3, (16, 40), (31, 79), 11)
    found = write_and_pick(*call)
    one = [x[1:2].contiguous() if isinstance(x, Tensor) else x for x in call]
    for ours, other in zip(found[:4], write_and_pick(*one)[:4], strict=True):
        assert torch.equal(ours[1:2], other)


def test_what_it_refuses():
    call = case("whole cells")
    coarser, patches, errors, coords, size, error, next_size, picks = call
    counters = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    changes = [
        (made(1, 1, 1, (516, 512), (1032, 1024), 3), f"at most {MOST_CELLS} cells, got"),
        ((*call[:7], MOST_PICKS + 1), f"picks must be from 0 to {MOST_PICKS}"),
        ((*call[:7], -1), "picks must be"),
        ((*call[:6], (32, 50), picks), "next_size must be twice"),
        ((coarser[..., 1:], *call[1:]), "coarser must be contiguous"),
        ((coarser, patches, errors.mT, *call[3:]), "errors must be"),
        ((coarser, patches, errors, coords.int(), *call[4:]), "coords must be contiguous torch.int64"),
        ((coarser, patches, errors, coords, size, error[..., :1], next_size, picks), "error must be"),
        ((coarser, patches.long(), *call[2:]), "patches is torch.int64"),
        ((coarser, patches[0], *call[2:]), "patches must have shape"),
        ((coarser, patches, errors, coords, (0, 4), *call[5:]), "size must be at least 1 x 1"),
    ]
    for wrong, message in changes:
        with pytest.raises(ValueError, match=message):
            write_and_pick(*wrong)
    with pytest.raises(ValueError, match="counters must be"):
        write_and_pick(*call, counters=counters)
    with pytest.raises(ValueError, match="temperature must be"):
        write_and_pick(*call, temperature=counters)
    assert MOST_CELLS == (1024 // PATCH) ** 2


def test_kernels_of_the_model_are_known():
    """Of levels of 32 to 512 pixels, and of 512 before 1024."""
    names = [c.name for c in write_triton_kernels.COMPILATIONS]
    assert len(set(names)) == len(names)
    compiled = [(c.signature["patches"], c.num_warps, c.constants) for c in write_triton_kernels.COMPILATIONS]
    for dtype, pointer in ((torch.float32, "*fp32"), (torch.float16, "*fp16"), (torch.bfloat16, "*bf16")):
        for side, last in ((32, False), (64, False), (128, False), (256, False), (512, False), (512, True)):
            options = write_triton_kernels.options(dtype, None if last else (side // 4) ** 2)
            used = {name: options[name] for name in ("BLOCK_Y", "BLOCK_X", "CHUNKS", "TILE", "RANKS")}
            used |= {"coarser": None} if side == 32 else {}
            known = [c for kind, warps, c in compiled if (kind, warps) == (pointer, options["num_warps"])]
            assert any(("coarser" in c) == (side == 32) and used.items() <= c.items() for c in known)


@pytest.mark.gpu
@needs_gpu
def test_in_a_graph():
    call = case("more than are ranked at a time")
    counters = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    expected = write_and_pick(*call, counters=counters)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = write_and_pick(*call, counters=counters)
    for _ in range(3):
        graph.replay()
        for ours, other in zip(found[:4], expected[:4], strict=True):
            assert torch.equal(ours, other)
    call[5].zero_()
    graph.replay()
    assert torch.equal(found.coords, by_modules(call).coords)
