"""The patches of the support set at all levels, in one launch, against the network's own choice; without a GPU,
interpreted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from samples import DEVICE
from torch import Tensor

from icseg.draws import uniform
from icseg.sparse import selection
from icseg.sparse.patches import OUTSIDE, coords_of, grid_size
from icseg_kernels import triton_launch
from icseg_kernels.cascade.pick import pick_support
from icseg_kernels.cascade.write import MOST_CELLS, MOST_PICKS

if triton_launch.missing():
    pytest.skip("; ".join(triton_launch.missing()), allow_module_level=True)

from icseg_kernels.cascade import pick_triton_kernels

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
BFLOAT16 = pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, needs_gpu])
DTYPES = [torch.float16, BFLOAT16]
if triton_launch.INTERPRETED:
    DTYPES.append(torch.float64)

SIZES = [(16, 9), (32, 17), (63, 33), (125, 66)]
COUNTS = [5, 6, 12, 20]


def made(
    sizes: list[tuple[int, int]], images: int = 2, classes: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """Masks of blobs whose borders are soft."""
    generator = torch.Generator().manual_seed(seed)
    masks = []
    for height, width in sizes:
        coarse = torch.rand(images, classes, height // 12 + 2, width // 12 + 2, generator=generator) * 3 - 1.3
        mask = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
        masks.append(mask.clamp(0, 1).to(dtype).to(DEVICE))
    return masks


def cells_of(mask: Tensor) -> int:
    return math.prod(grid_size(*mask.shape[-2:]))


def draws(masks: list[Tensor]) -> list[Tensor]:
    """Those of `support_patches` without a seed."""
    return [uniform(0, 2, cells_of(mask), mask.device).to(mask.dtype) for mask in masks]


def by_modules(masks: list[Tensor], counts: list[int], share: float = 0.6) -> list[Tensor]:
    picks = [selection.support_patches(mask, count, share, None) for mask, count in zip(masks, counts, strict=True)]
    return [coords_of(index, grid_size(*mask.shape[-2:])[1]) for index, mask in zip(picks, masks, strict=True)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.int64
        assert ours.is_contiguous()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("levels", "classes"), [(1, 1), (4, 1), (2, 3)])
def test_is_the_network_s_choice(poisoned, levels, classes):
    masks = made(SIZES[-levels:], classes=classes)
    assert_same(pick_support(masks, COUNTS[-levels:], 0.6, draws(masks)), by_modules(masks, COUNTS[-levels:]))


def test_at_the_sizes_of_the_model(monkeypatch):
    if triton_launch.INTERPRETED:  # fewer programs: each takes long
        options = pick_triton_kernels.options
        monkeypatch.setattr(pick_triton_kernels, "options", lambda *a: options(*a) | {"BLOCK_Y": 128, "BLOCK_X": 512})
    sizes, counts = [(side, side) for side in (32, 64, 128, 256, 512)], [16, 16, 24, 24, 24]
    masks = made(sizes, images=1)
    assert_same(pick_support(masks, counts, 0.6, draws(masks)), by_modules(masks, counts))


def test_six_levels():
    masks = made([(8 * side, 16) for side in range(1, 7)], images=1)
    counts = [1, 3, 4, 5, 6, 7]
    assert_same(pick_support(masks, counts, 0.6, draws(masks)), by_modules(masks, counts))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2])
def test_dtypes(monkeypatch, poisoned, classes, dtype):
    """Of draws that are exact and far apart, so that rounding makes no equals, whose order is not defined."""
    masks = made([(32, 32), (25, 26)], classes=classes, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    order = torch.stack([torch.randperm(16, generator=generator) for _ in range(2)]).to(DEVICE)
    monkeypatch.setattr(selection, "uniform", lambda *_: (order + 0.5) / 16)
    chance = ((order + 0.5) / 16).to(dtype)
    assert_same(pick_support(masks, [9, 7], 0.6, [chance, chance]), by_modules(masks, [9, 7]))


def test_thresholds_are_of_the_dtype():
    mask = torch.full((1, 1, 16, 32), 0.3, dtype=torch.float16, device=DEVICE)
    mask[..., 8:, 8:16] = mask[0, 0, 0, 0].nextafter(mask.new_ones(()))
    assert by_modules([mask], [1], 1.0)[0].tolist() == [[[8, 8]]]
    assert_same(pick_support([mask], [1], 1.0, draws([mask])), by_modules([mask], [1], 1.0))


@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_masks_of_one_value(value, classes):
    masks = [torch.full((1, classes, 40, 35), value, device=DEVICE)]
    assert_same(pick_support(masks, [9], 0.6, draws(masks)), by_modules(masks, [9]))


@pytest.mark.parametrize("classes", [1, 3])
def test_little_foreground(classes):
    """Fewer cells of foreground than its share, one class of several in none of them."""
    masks = [torch.zeros(2, classes, 40, 43, device=DEVICE)]
    masks[0][0, 0, 17, 20] = masks[0][1, classes - 1, 39, 42] = 1
    masks[0][1, classes - 1, 8:16, 16:24] = 1
    assert_same(pick_support(masks, [14], 0.6, draws(masks)), by_modules(masks, [14]))


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("counts", [[0, 1], [2, 28], [29, 30], [31, 70]])
def test_counts(share, counts):
    masks = made([(33, 42), (40, 48)], images=1)
    assert_same(pick_support(masks, counts, share, draws(masks)), by_modules(masks, counts, share))


@pytest.mark.parametrize("classes", [1, 2])
def test_nan_is_no_foreground(classes):
    masks = made([(40, 48)], images=3, classes=classes)
    masks[0][0, 0, 9, 9] = masks[0][1, -1, 39, :] = math.nan
    masks[0][2] = math.nan
    assert_same(pick_support(masks, [13], 0.6, draws(masks)), by_modules(masks, [13]))


def test_of_equal_draws_the_first():
    masks = [torch.zeros(1, 1, 24, 40, device=DEVICE)]
    chance = [torch.full((2, 15), 0.5, device=DEVICE)]
    found = pick_support(masks, [6], 0.5, chance)
    assert torch.equal(found[0], coords_of(torch.arange(6, device=DEVICE).unsqueeze(0), 5))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_hostile_draws():
    """Nothing is read or written that is not there."""
    masks = made([(24, 40)], images=1)
    for value in (math.nan, -math.inf, math.inf, -1.0):
        found = pick_support(masks, [6], 0.5, [torch.full((2, 15), value, device=DEVICE)])[0]
        assert ((found == OUTSIDE) | ((found >= 0) & (found < 40))).all()


@pytest.mark.parametrize("classes", [1, 2])
def test_in_chunks(monkeypatch, poisoned, classes):
    masks = made([(24, 16), (63, 70)], images=1, classes=classes)
    few = {"TILE": 16, "CHUNKS": True, "RANKS": 8, "num_warps": 4}
    monkeypatch.setattr(pick_triton_kernels, "picking", lambda cells: few)
    assert_same(pick_support(masks, [4, 23], 0.6, draws(masks)), by_modules(masks, [4, 23]))


def test_no_images():
    masks = made(SIZES[:2], images=0)
    found = pick_support(masks, COUNTS[:2], 0.6, draws(masks))
    assert [x.shape for x in found] == [(0, 4, 2), (0, 6, 2)]


@pytest.mark.parametrize("classes", [1, 2])
def test_the_same_twice_in_one_launch_each(monkeypatch, classes):
    launches: list[Any] = []
    launch = triton_launch.launch
    monkeypatch.setattr(triton_launch, "launch", lambda *a, **o: (launches.append(a[0]), launch(*a, **o)))
    masks = made(SIZES[:3], classes=classes)
    counters = torch.zeros(6, dtype=torch.int32, device=DEVICE)
    found = [pick_support(masks, COUNTS[:3], 0.6, draws(masks), counters=counters) for _ in range(2)]
    assert len(launches) == 2
    assert not counters.any()
    assert_same(found[0], found[1])


def test_what_it_refuses():
    masks, counts = made(SIZES[:2]), COUNTS[:2]
    chance = draws(masks)
    many = torch.zeros(1, 1, 264, 520, device=DEVICE)
    changes: list[tuple[Any, str]] = [
        ((masks, counts[:1], 0.6, chance), "as many levels"),
        (([], [], 0.6, []), "as many levels, 1 to 6"),
        ((masks, counts, 1.1, chance), "foreground_share must be"),
        ((masks, [5, -1], 0.6, chance), "must be from 0 to"),
        (([many], [MOST_PICKS + 1], 0.6, draws([many])), f"from 0 to {MOST_PICKS}, or all cells"),
        (([torch.zeros(1, 1, 1032, 1024, device=DEVICE)], [4], 0.6, chance[:1]), f"1 to {MOST_CELLS} cells"),
        (([masks[0], masks[1][:1]], counts, 0.6, chance), "masks.1. must be contiguous"),
        (([masks[0], masks[1].mT], counts, 0.6, chance), "masks.1. must be contiguous"),
        (([masks[0], masks[1].double()], counts, 0.6, chance), "masks.1. must be contiguous torch.float32"),
        ((masks, counts, 0.6, [chance[0], chance[1][:1]]), "chance.1. must be contiguous"),
        (([masks[0][0]], counts[:1], 0.6, chance[:1]), "masks must have shape"),
        (([masks[0].long()], counts[:1], 0.6, chance[:1]), "masks is torch.int64"),
    ]
    for wrong, message in changes:
        with pytest.raises(ValueError, match=message):
            pick_support(*wrong)
    with pytest.raises(ValueError, match="counters must be"):
        pick_support(masks, counts, 0.6, chance, counters=torch.zeros(4, device=DEVICE))


def test_kernels_of_the_model_are_known():
    """Of 5 levels up to 512 pixels, and 6 up to 1024."""
    names = [c.name for c in pick_triton_kernels.COMPILATIONS]
    assert len(set(names)) == len(names)
    for dtype, pointer in ((torch.float32, "*fp32"), (torch.float16, "*fp16"), (torch.bfloat16, "*bf16")):
        for levels, side in ((5, 512), (6, 1024)):
            options = pick_triton_kernels.options(dtype, (side // 8) ** 2)
            used = {name: options[name] for name in ("BLOCK_Y", "BLOCK_X", "CHUNKS", "TILE", "RANKS")}
            used |= pick_triton_kernels.constants(dtype)
            known = [c for c in pick_triton_kernels.COMPILATIONS if c.num_warps == options["num_warps"]]
            known = [c for c in known if c.signature.get(f"mask_{levels - 1}") == pointer]
            assert any(used.items() <= c.constants.items() for c in known)


@pytest.mark.gpu
@needs_gpu
def test_in_a_graph():
    masks = made(SIZES, classes=2)
    chance, counters = draws(masks), torch.zeros(8, dtype=torch.int32, device=DEVICE)
    pick_support(masks, COUNTS, 0.6, chance, counters=counters)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = pick_support(masks, COUNTS, 0.6, chance, counters=counters)
    for seed in (0, 1):
        for mask, other in zip(masks, made(SIZES, classes=2, seed=seed), strict=True):
            mask.copy_(other)
        graph.replay()
        assert_same(found, by_modules(masks, COUNTS))
