"""Training losses: soft Dice, focal and cross-entropy terms, at every level of the cascade."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg.masks import level_mask
from icseg_kernels import gather_patches, scatter_patches

if TYPE_CHECKING:
    from icseg.output import LevelOutput, SegmentationOutput

LEVEL_WEIGHTINGS = ("uniform", "progressive")
MASK_REDUCTIONS = {"area": 0.0, "hybrid": 1.0}  # what a touched pixel counts at least
TERMS = (
    "target_patch",
    "target_aggregated",
    "target_combined",
    "support_patch",
    "support_aggregated",
    "covered_bce",
    "error",
)


@dataclass(frozen=True)
class LossConfig:
    """Which predictions of each level are supervised, and by what.

    target_patch:       weight of the loss on each target patch's own logits.
    target_aggregated:  weight of the loss on a level's own patches written back, where they lie.
    target_combined:    weight of the loss on a level's combined map.
    support_patch:      weight of the loss on each support patch's logits, for models that decode them.
    support_aggregated: the same for the support patches written back.
    covered_bce:        weight of the cross-entropy of a level's combined map where its target patches lie.
    error:              weight of the cross-entropy of a level's estimate of its own error, for models that make one.
    dice, focal:        the parts of each of the first five: soft Dice and focal loss, class by class.
    level_weights:      "uniform", "progressive" (0.3 at the coarsest level to 1 at the finest), or one number
                        a level.
    mask_reduction:     how the mask is brought to a level's resolution: "area" (mean) or "hybrid" (any
                        touched pixel counts in full, as published).
    dice_smooth, focal_alpha, focal_gamma, logit_clamp: the published constants (arXiv 2604.12752).
    """

    target_patch: float = 0.0
    target_aggregated: float = 0.0
    target_combined: float = 1.0
    support_patch: float = 0.0
    support_aggregated: float = 0.0
    covered_bce: float = 0.0
    error: float = 0.0
    dice: float = 1.0
    focal: float = 1.0
    level_weights: str | tuple[float, ...] = "uniform"
    mask_reduction: str = "area"
    dice_smooth: float = 1e-5
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    logit_clamp: float = 10.0

    def __post_init__(self) -> None:
        for name in (*TERMS, "dice", "focal", "focal_gamma"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        if not 0 <= self.focal_alpha <= 1:
            raise ValueError(f"focal_alpha must lie in [0, 1], got {self.focal_alpha}")
        if self.dice_smooth <= 0 or self.logit_clamp <= 0:
            raise ValueError(
                f"dice_smooth and logit_clamp must be above 0, got {self.dice_smooth} and {self.logit_clamp}"
            )
        if self.mask_reduction not in MASK_REDUCTIONS:
            raise ValueError(f"mask_reduction must be one of {', '.join(MASK_REDUCTIONS)}, got {self.mask_reduction!r}")
        self._check_level_weights()

    def _check_level_weights(self) -> None:
        weights = self.level_weights
        if not isinstance(weights, tuple):
            if weights not in LEVEL_WEIGHTINGS:
                raise ValueError(
                    f"level_weights must be one of {', '.join(LEVEL_WEIGHTINGS)} or one number a level, got {weights!r}"
                )
        elif not all(_is_weight(w) for w in weights) or not any(weights):
            raise ValueError(
                f"level_weights must hold finite numbers of at least 0 and one above 0, got {list(weights)}"
            )

    def weights_of(self, levels: int) -> list[float]:
        """One weight a level, coarse to fine, that sum to 1. Raises ValueError if a list does not fit."""
        weights = self.level_weights
        if weights == "uniform" or (levels == 1 and isinstance(weights, str)):
            raw = [1.0] * levels
        elif weights == "progressive":
            raw = [0.3 + 0.7 * i / (levels - 1) for i in range(levels)]
        else:
            raw = [float(w) for w in weights]
        if len(raw) != levels:
            raise ValueError(f"level_weights must hold {levels} numbers, one a level, got {len(raw)}")
        return [w / sum(raw) for w in raw]


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def soft_dice_loss(logits: Tensor, target: Tensor, *, weight: Tensor | None = None, smooth: float = 1e-5) -> Tensor:
    """1 - soft Dice of each sample, then the mean: a scalar.

    logits, target: [B, ...], target in [0, 1]; weight: the same shape, 0 leaves a pixel out.
    """
    probability = logits.sigmoid()
    if weight is not None:
        probability, target = probability * weight, target * weight
    overlap = (probability * target).flatten(1).sum(1)
    total = probability.flatten(1).sum(1) + target.flatten(1).sum(1)
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()


def focal_loss(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Focal loss (Lin et al. 2017) for soft targets: the mean over pixels of each sample, then over samples.

    logits, target: [B, ...], target in [0, 1]; weight: the same shape, 0 leaves a pixel out.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    agreement = probability * target + (1 - probability) * (1 - target)
    balance = alpha * target + (1 - alpha) * (1 - target)
    return _mean_per_sample(balance * (1 - agreement) ** gamma * cross_entropy, weight)


def segmentation_loss(
    output: SegmentationOutput, target_mask: Tensor, config: LossConfig, support_masks: Tensor | None = None
) -> dict[str, Tensor]:
    """The loss of a model's output, with its terms.

    target_mask:   [B, C, H, W] in [0, 1]; support_masks: [B, S, C, h, w], read only by the support terms.
    Returns {"total": the weighted sum, "<term>/<level>": each term before its weights}. Every level with a weight is
    compared at its own resolution, in float32, inside autocast too; each class of a sample counts like a sample. Raises
    ValueError if a support or error term has no such prediction, or a list of level weights another length than the
    output.
    """
    batch, classes = output.logits.shape[:2]
    if target_mask.ndim != 4 or target_mask.shape[:2] != (batch, classes):
        raise ValueError(f"target_mask must have shape [{batch}, {classes}, H, W], got {list(target_mask.shape)}")
    terms: dict[str, Tensor] = {}
    total = output.logits.new_zeros((), dtype=torch.float32)
    weights = config.weights_of(len(output.levels))
    with torch.autocast(target_mask.device.type, enabled=False):
        for i, (level, level_weight) in enumerate(zip(output.levels, weights, strict=True)):
            if level_weight == 0:
                continue
            for name, value in level_losses(level, target_mask.float(), config, support_masks).items():
                terms[f"{name}/{i}"] = value
                total = total + level_weight * getattr(config, name) * value
    return {"total": total, **terms}


def level_losses(
    level: LevelOutput, target_mask: Tensor, config: LossConfig, support_masks: Tensor | None = None
) -> dict[str, Tensor]:
    """{term: scalar} of one level, for every term of `config` with a weight above 0."""
    mask = level_mask(target_mask, level.resolution, MASK_REDUCTIONS[config.mask_reduction])
    coverage = level.coverage.to(mask.dtype)
    losses: dict[str, Tensor] = {}
    if config.target_combined:
        losses["target_combined"] = _dice_and_focal(level.logits, mask, config)
    if config.covered_bce:
        logits = _clamped(level.logits, config)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
        losses["covered_bce"] = _mean_per_sample(*_samples(cross_entropy, coverage))
    if config.target_aggregated:
        losses["target_aggregated"] = _dice_and_focal(level.prediction, mask, config, coverage)
    if config.target_patch:
        losses["target_patch"] = _patch_loss(level.patch_logits, mask, level.coords, config)
    if config.support_patch or config.support_aggregated:
        losses |= _support_losses(level, support_masks, config)
    if config.error:
        losses["error"] = _error_loss(level, target_mask, config)
    return losses


def _error_loss(level: LevelOutput, target_mask: Tensor, config: LossConfig) -> Tensor:
    """Cross-entropy of `error_logits` with the expected error of the combined map, over the patches in the image.

    The error is taken at twice the level's resolution where the mask is that fine: what the level cannot show counts.
    """
    if "error_logits" not in level.extras:
        raise ValueError(f"error must be 0 where a level has no error_logits, got {config.error}")
    logits = level.extras["error_logits"].float()  # [B, K, C, p, p]
    height, width = level.resolution
    doubled = target_mask.shape[-2] >= 2 * height and target_mask.shape[-1] >= 2 * width
    fine = (2 * height, 2 * width) if doubled else level.resolution
    probability = F.interpolate(level.logits.detach().float(), fine, mode="bilinear").sigmoid()
    mask = level_mask(target_mask, fine, 0.0)
    error = level_mask(probability * (1 - mask) + (1 - probability) * mask, level.resolution, 0.0)
    patch_size = logits.shape[-1]
    inside = gather_patches(torch.ones_like(error), level.coords, patch_size)
    target = gather_patches(error, level.coords, patch_size)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (cross_entropy * inside).sum() / inside.sum().clamp_min(1.0)


def _support_losses(level: LevelOutput, support_masks: Tensor | None, config: LossConfig) -> dict[str, Tensor]:
    if level.support_patch_logits is None or level.support_coords is None or support_masks is None:
        raise ValueError(
            "support_patch and support_aggregated must be 0 where support patches are not decoded, "
            f"got {config.support_patch} and {config.support_aggregated}"
        )
    losses: dict[str, Tensor] = {}
    patches = level.support_patch_logits.flatten(0, 1).float()  # [B * S, K, C, p, p]
    coords = level.support_coords.flatten(0, 1)
    mask = level_mask(support_masks.flatten(0, 1).float(), level.resolution, MASK_REDUCTIONS[config.mask_reduction])
    if config.support_patch:
        losses["support_patch"] = _patch_loss(patches, mask, coords, config)
    if config.support_aggregated:
        written = scatter_patches(patches, coords, level.resolution)
        losses["support_aggregated"] = _dice_and_focal(written.mean, mask, config, written.coverage.to(mask.dtype))
    return losses


def _patch_loss(patch_logits: Tensor, mask: Tensor, coords: Tensor, config: LossConfig) -> Tensor:
    """patch_logits [B, K, C, p, p] at `coords` [B, K, 2] against the same patches of `mask` [B, C, h, w].

    Dice is taken over all patches of a sample's class together: a patch without foreground has none of its own.
    """
    patch_size = patch_logits.shape[-1]
    inside = gather_patches(torch.ones_like(mask), coords, patch_size)
    patches = patch_logits, gather_patches(mask, coords, patch_size), inside
    logits, mask, inside = (t.transpose(1, 2) for t in patches)
    return _dice_and_focal(logits, mask, config, inside)


def _dice_and_focal(logits: Tensor, mask: Tensor, config: LossConfig, weight: Tensor | None = None) -> Tensor:
    """logits, mask: [B, C, ...]; weight: broadcasts to them."""
    logits, weight = _samples(_clamped(logits, config), weight)
    mask = mask.flatten(0, 1)
    loss = logits.new_zeros(())
    if config.dice:
        loss = loss + config.dice * soft_dice_loss(logits, mask, weight=weight, smooth=config.dice_smooth)
    if config.focal:
        alpha, gamma = config.focal_alpha, config.focal_gamma
        loss = loss + config.focal * focal_loss(logits, mask, weight=weight, alpha=alpha, gamma=gamma)
    return loss


def _samples(values: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Each class of a sample as a sample: [B, C, ...] to [B * C, ...], and the weight, which broadcasts, too."""
    return values.flatten(0, 1), None if weight is None else weight.expand_as(values).flatten(0, 1)


def _clamped(logits: Tensor, config: LossConfig) -> Tensor:
    return logits.float().clamp(-config.logit_clamp, config.logit_clamp)


def _mean_per_sample(values: Tensor, weight: Tensor | None) -> Tensor:
    """The mean over pixels (weighted; 0 where no pixel counts), then over samples."""
    if weight is None:
        return values.mean()
    values, weight = (values * weight).flatten(1), weight.flatten(1)
    return (values.sum(1) / weight.sum(1).clamp_min(1.0)).mean()
