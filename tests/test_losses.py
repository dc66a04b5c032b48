"""Losses: constants by hand, every level really supervised, every weight with a gradient."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icseg.losses import LossConfig, focal_loss, segmentation_loss, soft_dice_loss
from icseg.masks import level_mask
from icseg.output import LevelOutput, SegmentationOutput
from icseg_kernels import Scatter

SIZES = (8, 16, 32)
TERMS = (
    "target_patch",
    "target_aggregated",
    "target_combined",
    "support_patch",
    "support_aggregated",
    "covered_bce",
)
ALONE = dict.fromkeys((*TERMS, "error"), 0.0)


class ToyCascade(nn.Module):
    """One free map a level; the coarser one is detached, so a level is taught by its own terms alone."""

    def __init__(self, sizes: tuple[int, ...], batch: int = 2, support: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.sizes = sizes
        self.patches = nn.ParameterList(torch.randn(batch, 2, 1, 4, 4, generator=generator) for _ in sizes)
        self.support = nn.ParameterList(torch.randn(batch, support, 2, 1, 4, 4, generator=generator) for _ in sizes)

    def forward(self) -> SegmentationOutput:
        levels: list[LevelOutput] = []
        combined: Tensor | None = None
        for size, patches, support in zip(self.sizes, self.patches, self.support, strict=True):
            batch = len(patches)
            coords = torch.tensor([[0, 0], [4, 0]], dtype=torch.int32).expand(batch, 2, 2)
            written = F.pad(patches.flatten(1, 2).reshape(batch, 1, 8, 4), (0, size - 4, 0, size - 8), value=-10.0)
            coverage = torch.zeros(batch, 1, size, size, dtype=torch.bool)
            coverage[..., :8, :4] = True
            coarser = torch.zeros(batch, 1, size, size) if combined is None else F.interpolate(combined, size).detach()
            combined = coarser + torch.where(coverage, written, 0.0)
            support_coords = coords[:, None].expand(batch, support.shape[1], 2, 2)
            levels.append(
                LevelOutput(
                    (size, size), combined, patches, coords, Scatter(written, coverage), support_coords, support
                )
            )
        return SegmentationOutput(levels[-1].logits, levels)


@pytest.fixture
def masks() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    target = (torch.rand(2, 1, 32, 32, generator=generator) > 0.6).float()
    return target, (torch.rand(2, 3, 1, 32, 32, generator=generator) > 0.6).float()


def test_soft_dice_of_a_known_case() -> None:
    logits = torch.tensor([[0.0, 0.0], [100.0, -100.0]])
    target = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    first = 1 - (2 * 0.5 + 1e-5) / (1 + 1 + 1e-5)
    assert soft_dice_loss(logits, target).item() == pytest.approx((first + 0.0) / 2, abs=1e-6)


def test_focal_of_a_known_case() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]])
    target = torch.tensor([[1.0, 0.0]])
    expected = (0.25 * 0.5**2 * math.log(2) + 0.75 * 0.75**2 * math.log(4)) / 2
    assert focal_loss(logits, target).item() == pytest.approx(expected, rel=1e-5)


def test_pixels_of_weight_zero_do_not_count() -> None:
    logits, target = torch.tensor([[1.0, -2.0, 50.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    weight = torch.tensor([[1.0, 1.0, 0.0]])
    for loss in (soft_dice_loss, focal_loss):
        assert loss(logits, target, weight=weight).item() == pytest.approx(loss(logits[:, :2], target[:, :2]).item())
    nothing = torch.zeros_like(weight)
    assert focal_loss(logits, target, weight=nothing).item() == 0.0


def test_area_reduction_keeps_the_mean_and_hybrid_keeps_thin_structures() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 5, :] = 1
    assert torch.equal(level_mask(mask, (4, 4), 0.0)[0, 0, 1], torch.full((4,), 0.25))
    assert torch.equal(level_mask(mask, (4, 4), 1.0)[0, 0, 1], torch.ones(4))
    assert level_mask(mask, (5, 7), 0.0).mean().item() == pytest.approx(mask.mean().item(), abs=0.05)


@pytest.mark.parametrize("weights", ["uniform", "progressive", (1.0, 0.5, 2.0)])
@pytest.mark.parametrize("term", TERMS)
def test_every_term_reaches_every_level(
    term: str, weights: str | tuple[float, ...], masks: tuple[Tensor, Tensor]
) -> None:
    model = ToyCascade(SIZES)
    config = LossConfig(**{**ALONE, term: 1.0}, level_weights=weights)
    losses = segmentation_loss(model(), masks[0], config, masks[1])
    assert set(losses) == {"total", *(f"{term}/{i}" for i in range(3))}
    losses["total"].backward()
    taught = model.support if term.startswith("support") else model.patches
    untaught = model.patches if term.startswith("support") else model.support
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in taught)
    assert all(p.grad is None for p in untaught)


@pytest.mark.parametrize("level", range(3))
def test_a_levels_term_teaches_that_level_alone(level: int, masks: tuple[Tensor, Tensor]) -> None:
    model = ToyCascade(SIZES)
    segmentation_loss(model(), masks[0], LossConfig())[f"target_combined/{level}"].backward()
    assert [p.grad is not None for p in model.patches] == [i == level for i in range(3)]


@pytest.mark.parametrize("weights", ["uniform", "progressive", (2.0,)])
def test_a_model_of_one_level_trains(weights: str | tuple[float, ...]) -> None:
    model = ToyCascade((8,))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.3)
    config = LossConfig(level_weights=weights)
    target = torch.zeros(2, 1, 32, 32)
    target[..., :16, :8] = 1  # the left half of the upper patch
    for _ in range(30):
        loss = segmentation_loss(model(), target, config)["total"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    level = model().levels[0]
    truth = level_mask(target, (8, 8), 0.0) > 0.5
    assert torch.equal((level.logits > 0)[level.coverage], truth[level.coverage])


def test_level_weights() -> None:
    assert LossConfig().weights_of(4) == [0.25] * 4
    progressive = LossConfig(level_weights="progressive").weights_of(3)
    assert progressive == pytest.approx([0.3 / 1.95, 0.65 / 1.95, 1 / 1.95])
    assert LossConfig(level_weights="progressive").weights_of(1) == [1.0]
    assert LossConfig(level_weights=(0.0, 3.0)).weights_of(2) == [0.0, 1.0]


def test_the_total_is_the_weighted_sum_and_levels_of_weight_zero_are_left_out(
    masks: tuple[Tensor, Tensor],
) -> None:
    config = LossConfig(target_combined=2.0, covered_bce=0.5, level_weights=(1.0, 0.0, 3.0))
    losses = segmentation_loss(ToyCascade(SIZES)(), masks[0], config)
    assert set(losses) == {
        "total",
        "target_combined/0",
        "covered_bce/0",
        "target_combined/2",
        "covered_bce/2",
    }
    by_hand = sum(
        share * (2 * losses[f"target_combined/{i}"] + 0.5 * losses[f"covered_bce/{i}"])
        for i, share in ((0, 0.25), (2, 0.75))
    )
    assert losses["total"].item() == pytest.approx(float(torch.as_tensor(by_hand).detach()), rel=1e-6)


def test_masks_keep_their_scale_where_a_level_is_rounded_up() -> None:
    mask = torch.zeros(1, 1, 64, 37)
    mask[..., 33:] = 1
    found = level_mask(mask, (16, 10), 0.0)
    assert found[0, 0, 0].tolist() == [0] * 8 + [0.75, 1]


def test_covered_cross_entropy_ignores_what_no_patch_covers(masks: tuple[Tensor, Tensor]) -> None:
    output = ToyCascade(SIZES)()
    config = LossConfig(**{**ALONE, "covered_bce": 1.0})
    before = segmentation_loss(output, masks[0], config)["total"]
    for level in output.levels:
        level.logits = torch.where(level.coverage, level.logits, 7.0)
    assert segmentation_loss(output, masks[0], config)["total"].item() == before.item()


def of_classes(outputs: list[SegmentationOutput]) -> SegmentationOutput:
    """One output whose classes are those of several outputs of one class."""
    levels = []
    for parts in zip(*(output.levels for output in outputs), strict=True):
        first = parts[0]
        made = {name: torch.cat([getattr(p, name) for p in parts], 1) for name in ("logits", "prediction")}
        patches = torch.cat([p.patch_logits for p in parts], 2)
        support = torch.cat([p.support_patch_logits for p in parts], 3)
        levels.append(
            LevelOutput(
                first.resolution, made["logits"], patches, first.coords, Scatter(made["prediction"], first.coverage),
                support_coords=first.support_coords, support_patch_logits=support,
            )
        )  # fmt: skip
    return SegmentationOutput(levels[-1].logits, levels)


@pytest.mark.parametrize("term", TERMS)
def test_each_class_of_a_sample_counts_like_a_sample(term: str) -> None:
    generator = torch.Generator().manual_seed(2)
    targets = (torch.rand(2, 3, 32, 32, generator=generator) > 0.6).float()
    supports = (torch.rand(2, 3, 3, 32, 32, generator=generator) > 0.6).float()
    outputs = []
    for _ in range(3):
        model = ToyCascade(SIZES)
        with torch.no_grad():
            for p in (*model.patches, *model.support):
                p.normal_(generator=generator)
        outputs.append(model())
    config = LossConfig(**{**ALONE, term: 1.0})
    together = segmentation_loss(of_classes(outputs), targets, config, supports)
    alone = [
        segmentation_loss(output, targets[:, c : c + 1], config, supports[:, :, c : c + 1])
        for c, output in enumerate(outputs)
    ]
    for name, value in together.items():
        assert value.item() == pytest.approx(sum(losses[name].item() for losses in alone) / 3, rel=1e-5)


def error_level(logits: Tensor, error_logits: Tensor, coords: Tensor) -> SegmentationOutput:
    """One level whose combined map and error estimate are free, at [B, C, h, w]."""
    size = logits.shape[-2], logits.shape[-1]
    level = LevelOutput(size, logits, error_logits, coords, extras={"error_logits": error_logits})
    return SegmentationOutput(logits, [level])


def test_the_error_of_a_known_case() -> None:
    logits = torch.zeros(1, 2, 2, 2)
    logits[:, 1] = math.log(3.0)  # probability 3/4 of the second class, whatever the upsampling
    mask = torch.zeros(1, 2, 4, 4)
    mask[:, 1, 0, 0] = 1  # a quarter of the first pixel
    coords = torch.tensor([[[0, 0], [1, 1], [2, 0]]])  # the last lies outside
    estimate = torch.zeros(1, 3, 2, 1, 1)
    estimate[:, 0, 1], estimate[:, 2] = 1.0, 50.0
    config = LossConfig(**{**ALONE, "error": 1.0})
    error = (3 * 0.75 + 0.25) / 4
    of_first = math.log1p(math.exp(1.0)) - error
    expected = (3 * math.log(2) + of_first) / 4  # an estimate of one half costs log 2
    losses = segmentation_loss(error_level(logits, estimate, coords), mask, config)
    assert losses["error/0"].item() == pytest.approx(expected, rel=1e-6)
    assert losses["total"].item() == losses["error/0"].item()


def test_the_error_is_taken_at_the_levels_own_resolution_where_the_mask_is_no_finer() -> None:
    mask = torch.zeros(1, 1, 3, 3)
    mask[..., 1, 1] = 1
    confident = torch.where(mask > 0, 40.0, -40.0)
    config = LossConfig(**{**ALONE, "error": 1.0})
    coords = torch.zeros(1, 1, 2, dtype=torch.int32)
    estimate = torch.full((1, 1, 1, 3, 3), -30.0)
    loss = segmentation_loss(error_level(confident, estimate, coords), mask, config)["total"]
    assert loss.item() == pytest.approx(0.0, abs=1e-6)


def test_the_error_teaches_its_estimate_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 2, 8, 8, generator=generator).requires_grad_()
    estimate = torch.randn(2, 3, 2, 4, 4, generator=generator).requires_grad_()
    mask = (torch.rand(2, 2, 16, 16, generator=generator) > 0.5).float()
    coords = torch.tensor([[0, 0], [6, 6], [8, 8]]).expand(2, 3, 2)
    config = LossConfig(**{**ALONE, "error": 2.0})
    losses = segmentation_loss(error_level(logits, estimate, coords), mask, config)
    assert losses["total"].item() == pytest.approx(2 * losses["error/0"].item())
    losses["total"].backward()
    assert logits.grad is None
    assert estimate.grad is not None
    counted = estimate.grad != 0
    assert bool(counted[:, 0].all())
    assert torch.equal(counted[0, 1, 0].nonzero(), torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]))
    assert not bool(counted[:, 2].any())


def test_patches_that_all_lie_outside_make_no_error() -> None:
    estimate = torch.ones(1, 1, 1, 2, 2)
    output = error_level(torch.zeros(1, 1, 4, 4), estimate, torch.full((1, 1, 2), 4))
    assert segmentation_loss(output, torch.zeros(1, 1, 8, 8), LossConfig(**{**ALONE, "error": 1.0}))["total"] == 0


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_empty_and_full_masks_and_huge_logits_are_finite(value: float, dtype: torch.dtype) -> None:
    model = ToyCascade(SIZES)
    with torch.no_grad():
        for p in (*model.patches, *model.support):
            p.mul_(1e4)
    output = model()
    for level in output.levels:
        level.logits, level.patch_logits = level.logits.to(dtype), level.patch_logits.to(dtype)
    config = LossConfig(**dict.fromkeys(TERMS, 1.0), mask_reduction="hybrid")
    losses = segmentation_loss(output, torch.full((2, 1, 32, 32), value), config, torch.full((2, 3, 1, 32, 32), value))
    assert all(v.dtype == torch.float32 and bool(torch.isfinite(v)) for v in losses.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_compared_in_float32_inside_autocast_too(
    dtype: torch.dtype, masks: tuple[Tensor, Tensor]
) -> None:
    def output(precision: torch.dtype) -> SegmentationOutput:
        made = ToyCascade(SIZES)()
        for level in made.levels:
            for name in ("logits", "patch_logits", "support_patch_logits"):
                setattr(level, name, getattr(level, name).to(dtype).to(precision))
            level.written = Scatter(level.prediction.to(dtype).to(precision), level.coverage)
        return made

    config = LossConfig(**dict.fromkeys(TERMS, 1.0))
    expected = segmentation_loss(output(torch.float32), masks[0], config, masks[1])
    with torch.autocast("cpu", torch.bfloat16):
        losses = segmentation_loss(output(dtype), masks[0], config, masks[1])
    assert losses.keys() == expected.keys()
    assert all(losses[name].dtype == torch.float32 for name in losses)
    assert all(torch.equal(losses[name], expected[name]) for name in losses)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dice": -1.0}, "dice must be a finite number of at least 0, got -1.0"),
        ({"covered_bce": math.nan}, "covered_bce must be a finite number"),
        ({"focal_alpha": 1.5}, r"focal_alpha must lie in \[0, 1\], got 1.5"),
        ({"logit_clamp": 0.0}, "dice_smooth and logit_clamp must be above 0"),
        ({"mask_reduction": "max"}, "mask_reduction must be one of area, hybrid, got 'max'"),
        (
            {"level_weights": "last"},
            "level_weights must be one of uniform, progressive or one number a level",
        ),
        ({"level_weights": (0.0, 0.0)}, "level_weights must hold finite numbers of at least 0 and one above 0"),
        ({"level_weights": ()}, "level_weights must hold finite numbers of at least 0 and one above 0"),
        ({"level_weights": (1.0, math.nan)}, r"level_weights must hold finite numbers .*, got \[1.0, nan\]"),
        ({"level_weights": ("1", "2")}, r"level_weights must hold finite numbers .*, got \['1', '2'\]"),
        ({"level_weights": (True, 1.0)}, "level_weights must hold finite numbers"),
        ({"level_weights": None}, "level_weights must be one of uniform, progressive or one number a level, got None"),
        ({"level_weights": [1.0]}, r"level_weights must be one of .* got \[1.0\]"),
    ],
)
def test_bad_configurations(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig(**fields)  # type: ignore[arg-type]


def test_bad_calls(masks: tuple[Tensor, Tensor]) -> None:
    output = ToyCascade(SIZES)()
    with pytest.raises(ValueError, match=r"level_weights must hold 3 numbers, one a level, got 2"):
        segmentation_loss(output, masks[0], LossConfig(level_weights=(1.0, 1.0)))
    with pytest.raises(ValueError, match=r"target_mask must have shape \[2, 1, H, W\], got \[2, 32, 32\]"):
        segmentation_loss(output, masks[0][:, 0], LossConfig())
    with pytest.raises(ValueError, match=r"target_mask must have shape \[2, 1, H, W\], got \[2, 3, 32, 32\]"):
        segmentation_loss(output, masks[0].expand(-1, 3, -1, -1), LossConfig())
    output.levels[0].support_patch_logits = None
    with pytest.raises(ValueError, match="must be 0 where support patches are not decoded"):
        segmentation_loss(output, masks[0], LossConfig(support_patch=1.0), masks[1])
    with pytest.raises(ValueError, match=r"error must be 0 where a level has no error_logits, got 0\.5"):
        segmentation_loss(output, masks[0], LossConfig(error=0.5))
