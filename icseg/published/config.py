"""Configuration of the published architecture: every knob that its experiments turn, named and checked."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from icseg.config import PatchICLConfig, check_bools, check_choice, check_int, check_ints, check_keys, check_numbers

ORACLE_SCORES = ("foreground", "foreground_entropy", "error")
MODEL_SCORES = ("entropy", "foreground_entropy", "confidence", "uniform")
SUPPORT_SCORES = ("foreground", "foreground_entropy", "uniform")
DIFFERENTIABLE = ("off", "straight_through", "published")
FUSIONS = ("additive", "gated", "concat")
EXTRACTORS = ("universeg", "convolutional", "custom")
ALIGNMENTS = ("published", "pixel")
POSITIONS = ("image", "published")
PRIORS = ("none", "probability", "logits")
CONFIDENCES = ("none", "entropy", "learned")
AGGREGATIONS = ("average", "gaussian")
_SCALES = [chosen for count in range(1, 5) for chosen in itertools.combinations(range(4), count)]


@dataclass(frozen=True)
class LevelConfig:
    """One level of the cascade. Images are seen as squares of `resolution` pixels.

    target_patches, support_patches: how many are picked, per support image for the latter; in evaluation
                                     `*_eval` instead, where given. Clamped to the windows that exist.
    stride, support_stride:          spacing of the candidate windows; None for the support is the target's.
    temperature:                     divides the scores, which lie in [0, 1], before Gumbel noise is added.
    pad_before, pad_after:           zeros around the map, so that windows may stick out of the image.
    target_blur, support_blur:       standard deviation, in pixels, of a Gaussian over the pooled score map; 0 is none.
    """

    resolution: int
    target_patches: int
    support_patches: int
    target_patches_eval: int | None = None
    support_patches_eval: int | None = None
    stride: int = 8
    support_stride: int | None = None
    temperature: float = 0.1
    pad_before: int = 0
    pad_after: int = 0
    target_blur: float = 0.0
    support_blur: float = 0.0

    def __post_init__(self) -> None:
        check_ints(self, 1, "resolution", "target_patches", "support_patches", "stride")
        check_ints(self, 1, "target_patches_eval", "support_patches_eval", "support_stride", optional=True)
        check_ints(self, 0, "pad_before", "pad_after")
        check_numbers(self, "temperature", above=0)
        check_numbers(self, "target_blur", "support_blur", least=0)


@dataclass(frozen=True)
class SamplerConfig:
    """What makes a window worth picking.

    oracle_score:   of the target's true mask m: "foreground" (m), "foreground_entropy" (half m, half its
                    entropy), "error" (|coarser probability - m|, m at the first level).
    model_score:    of the coarser prediction p: "entropy", "foreground_entropy" (half p, half entropy),
                    "confidence" (1 - the confidence map), "uniform". The first level is always uniform.
    support_score:  of a support mask: "foreground", "foreground_entropy" or "uniform".
    differentiable: how gradients reach the score map in training. "off": they do not. "straight_through": the
                    soft weight of a picked patch multiplies its logits by one in the forward pass.
                    "published": it scales the logits by K times the weight, in training alone.
    """

    oracle_score: str = "foreground_entropy"
    model_score: str = "entropy"
    support_score: str = "foreground_entropy"
    differentiable: str = "straight_through"

    def __post_init__(self) -> None:
        check_choice(self, "oracle_score", ORACLE_SCORES)
        check_choice(self, "model_score", MODEL_SCORES)
        check_choice(self, "support_score", SUPPORT_SCORES)
        check_choice(self, "differentiable", DIFFERENTIABLE)


@dataclass(frozen=True)
class OracleSchedule:
    """When targets are picked by their true mask (`oracle_score`) and not by the model's own prediction.

    train_levels, eval_levels: one bool a level, or () for never. In evaluation it is always or never.
    scheduled: False uses the oracle for every sample of such a level; True for a random share of them:
               `start` for `warmup` steps, then changing linearly over `decay` steps to `end`. A step is what
               `PublishedNetwork.set_oracle_step` counts, an epoch in the paper.
    """

    train_levels: tuple[bool, ...] = ()
    eval_levels: tuple[bool, ...] = ()
    scheduled: bool = False
    warmup: int = 1
    decay: int = 5
    start: float = 0.5
    end: float = 0.0

    def __post_init__(self) -> None:
        check_bools(self, "scheduled")
        for name in ("train_levels", "eval_levels"):
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(v, bool) for v in value):
                raise ValueError(f"{name} must be a tuple of bools, got {value!r}")
        check_ints(self, 0, "warmup", "decay")
        check_numbers(self, "start", "end", least=0, most=1)

    def probability(self, step: int) -> float:
        """The share of samples that the oracle picks for at `step`, at a level of `train_levels`."""
        if not self.scheduled:
            return 1.0
        progress = min(1.0, max(0, step - self.warmup) / max(1, self.decay))
        return self.start + progress * (self.end - self.start)


@dataclass(frozen=True)
class CascadeConfig:
    """What a level takes from the coarser one besides its prediction.

    detach:         stop gradients between levels.
    registers:      the coarser level's registers join this level's tokens.
    decode_support: also predict the masks of the support patches, which the support losses need.
    """

    detach: bool = False
    registers: bool = True
    decode_support: bool = False

    def __post_init__(self) -> None:
        check_bools(self, "detach", "registers", "decode_support")


@dataclass(frozen=True)
class FeatureConfig:
    """The dense feature extractor.

    extractor:  "universeg" (the encoder of UniverSeg), "convolutional" (image and mask streams, trained from
                scratch) or "custom" (a module set as `network.features.extractor`).
    channels:   of each scale, or of the whole for "custom".
    scales:     which scales are read, from 0. Not read with "custom".
    input_size: images are encoded at this square size. grid: side of the map that patches are read from.
    freeze:     no gradients, and evaluation mode throughout.
    rescale:    clip each image to its 0.5 and 99.5 percentiles and stretch it to [0, 1] first.
    via_grid:   resize images to `grid` before `input_size`, as published, which throws detail away.
    alignment:  "published" reads a patch from edge to edge, half a pixel off, at points spaced p / (p - 1);
                "pixel" at the centres of the level's own pixels.
    antialias:  average features to the level's resolution first where that is coarser ("pixel" only).
    chunk:      images encoded at once; an extractor in training encodes all, for the sake of its batch statistics.
    """

    extractor: str = "universeg"
    channels: int = 64
    scales: tuple[int, ...] = (0, 1, 2, 3)
    input_size: int = 256
    grid: int = 128
    freeze: bool = True
    rescale: bool = False
    via_grid: bool = False
    alignment: str = "published"
    antialias: bool = False
    chunk: int = 16

    def __post_init__(self) -> None:
        check_choice(self, "extractor", EXTRACTORS)
        check_choice(self, "alignment", ALIGNMENTS)
        check_ints(self, 1, "channels", "input_size", "grid", "chunk")
        check_bools(self, "freeze", "rescale", "via_grid", "antialias")
        if self.scales not in _SCALES:
            raise ValueError(f"scales must be a tuple of ascending ints from 0 to 3, got {self.scales!r}")
        if self.extractor != "custom" and self.input_size % 2 ** self.scales[-1]:
            raise ValueError(f"input_size must be divisible by {2 ** self.scales[-1]}, got {self.input_size}")
        if self.antialias and self.alignment != "pixel":
            raise ValueError(f'antialias must be False with alignment "{self.alignment}", got True')

    @property
    def dim(self) -> int:
        """Channels of the feature map."""
        return self.channels if self.extractor == "custom" else self.channels * len(self.scales)


@dataclass(frozen=True)
class BackboneConfig:
    """Patch encoder, transformer and patch decoder, shared by all levels.

    dim, heads:      width of a token, and attention heads. layers: over all tokens; context_layers: before
                     them, over support tokens and registers alone.
    registers:       learned tokens. zero_key: every query may also attend to a zero key with a zero value.
    dropout:         in attention and MLP. checkpointing: recompute the transformer's layers in the backward pass.
    patch_grid:      features read a patch side, 8 or 16. skips: the decoder also reads the encoder's scales.
    support_mask:    support tokens are fused with their encoded mask. fusion: "additive", "gated" or "concat".
    mask_prior:      target tokens are fused with the coarser prediction, as a "probability" or, as published,
                     as "logits" through an encoder that otherwise sees masks; or "none".
    positions:       "image" rotates by the share of the image's own height and width; "published" by pixels
                     of the height over `PublishedConfig.image_size`, clamped.
    """

    dim: int = 256
    heads: int = 4
    layers: int = 2
    context_layers: int = 1
    registers: int = 1
    zero_key: bool = True
    dropout: float = 0.1
    checkpointing: bool = False
    patch_grid: int = 8
    skips: bool = False
    support_mask: bool = True
    mask_prior: str = "none"
    fusion: str = "concat"
    positions: str = "image"

    def __post_init__(self) -> None:
        check_ints(self, 1, "dim", "heads", "layers")
        check_ints(self, 0, "context_layers", "registers")
        check_bools(self, "zero_key", "checkpointing", "skips", "support_mask")
        check_numbers(self, "dropout", least=0, most=1)
        check_choice(self, "mask_prior", PRIORS)
        check_choice(self, "fusion", FUSIONS)
        check_choice(self, "positions", POSITIONS)
        if self.dim % 8 or self.dim % (2 * self.heads):  # heads of whole pairs of channels, which positions turn
            raise ValueError(f"dim must be divisible by 8 and by 2 * heads = {2 * self.heads}, got {self.dim}")
        if self.patch_grid not in (8, 16):
            raise ValueError(f"patch_grid must be 8 or 16, got {self.patch_grid}")


@dataclass(frozen=True)
class ConfidenceConfig:
    """A confidence map in [0, 1] beside each prediction.

    source:            "none", "entropy" (1 - binary entropy of the logits over a temperature) or "learned" (a
                       decoder head).
    temperature:       of "entropy", to begin with. Read only with source = "entropy".
    learn_temperature: whether it is trained. Read only with source = "entropy".
    """

    source: str = "none"
    temperature: float = 1.0
    learn_temperature: bool = True

    def __post_init__(self) -> None:
        check_choice(self, "source", CONFIDENCES)
        check_numbers(self, "temperature", above=0)
        check_bools(self, "learn_temperature")


@dataclass(frozen=True)
class AggregationConfig:
    """How patches become a map: the weighted mean where they overlap.

    kind:                  "average", or "gaussian" with `sigma_ratio` times the patch size about its centre.
                           `sigma_ratio` is read only with "gaussian".
    smallest_weight:       floor of a Gaussian weight, whose peak is 1, and of a confidence that weighs, so that every
                           pixel of a patch counts as covered. Read only with these two.
    uncovered_logit:       where no patch lies.
    confidence_weighting:  multiply weights by the confidence map.
    """

    kind: str = "average"
    sigma_ratio: float = 0.125
    smallest_weight: float = 1e-6
    uncovered_logit: float = -10.0
    confidence_weighting: bool = False

    def __post_init__(self) -> None:
        check_choice(self, "kind", AGGREGATIONS)
        check_numbers(self, "sigma_ratio", "smallest_weight", above=0)
        check_numbers(self, "uncovered_logit")
        check_bools(self, "confidence_weighting")


def published_levels(image_size: int) -> tuple[LevelConfig, ...]:
    """The levels of the paper's final runs: 24, 64, 128 pixels as far as they are below `image_size`, then that."""
    coarse = [(r, k) for r, k in ((24, 9), (64, 20), (128, 20)) if r < image_size]
    blur = [0.0 if r == 24 else 4.0 for r, _ in coarse] + [4.0]
    return tuple(
        LevelConfig(r, k, k, target_blur=sigma, support_blur=sigma)
        for (r, k), sigma in zip([*coarse, (image_size, 30)], blur, strict=True)
    )


@dataclass(frozen=True)
class PublishedConfig(PatchICLConfig):
    """The published architecture (arXiv 2604.12752).

    `for_image_size` gives the settings of the paper's final runs; `from_published_dict` reads a configuration
    of the published code and leaves its defects in (docs/published.md).

    image_size:         side of the images that the model is made for; others are resized. Read only with
                        backbone.positions = "published": the levels and features have sizes of their own.
    patch_size:         pixels of a patch side, the same at every level.
    touched_mask_value: a level's mask pixel is at least this times the largest mask value that it touches.
    """

    architecture: ClassVar[str] = "published"

    image_size: int = 256
    patch_size: int = 8
    touched_mask_value: float = 1.0
    levels: tuple[LevelConfig, ...] = field(default_factory=lambda: published_levels(256))
    features: FeatureConfig = FeatureConfig()
    backbone: BackboneConfig = BackboneConfig()
    sampler: SamplerConfig = SamplerConfig()
    oracle: OracleSchedule = OracleSchedule()
    cascade: CascadeConfig = CascadeConfig()
    confidence: ConfidenceConfig = ConfidenceConfig()
    aggregation: AggregationConfig = AggregationConfig()

    def __post_init__(self) -> None:
        check_ints(self, 1, "image_size", "patch_size")
        check_numbers(self, "touched_mask_value", least=0, most=1)
        is_tuple = isinstance(self.levels, tuple) and bool(self.levels)
        if not is_tuple or not all(isinstance(level, LevelConfig) for level in self.levels):
            raise ValueError(f"levels must be a tuple of at least one LevelConfig, got {self.levels!r}")
        for name, kind in _SECTIONS.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        self._check_levels()
        if self.confidence.source == "none":
            if self.sampler.model_score == "confidence":
                raise ValueError('model_score must not be "confidence" where confidence.source is "none"')
            if self.aggregation.confidence_weighting:
                raise ValueError('confidence_weighting must be False where confidence.source is "none", got True')

    def _check_levels(self) -> None:
        for level in self.levels:
            if level.resolution + level.pad_before + level.pad_after < self.patch_size:
                raise ValueError(
                    f"resolution with its padding must be at least patch_size = {self.patch_size}, "
                    f"got {level.resolution}"
                )
        for name in ("train_levels", "eval_levels"):
            flags = getattr(self.oracle, name)
            if flags and len(flags) != len(self.levels):
                raise ValueError(f"{name} must hold {len(self.levels)} bools, one a level, or none, got {len(flags)}")

    @classmethod
    def for_image_size(cls, image_size: int = 256, **changes: Any) -> Self:
        """The paper's final runs at `image_size` pixels, with `changes` to fields of this class by name."""
        check_int("image_size", image_size, 8)
        settings: dict[str, Any] = {
            "image_size": image_size,
            "levels": published_levels(image_size),
            "features": FeatureConfig(input_size=image_size, via_grid=True),
        }
        check_keys(cls, changes)
        return cls(**{**settings, **changes})

    @classmethod
    def from_published_dict(cls, published: dict[str, Any]) -> PublishedConfig:
        """The configuration that a dictionary of the published code describes
        (`icseg.published.dictionary`).
        """
        from icseg.published.dictionary import config_from_published

        return config_from_published(published)

    @classmethod
    def _from_fields(cls, values: dict[str, Any]) -> Self:
        check_keys(cls, values)
        made = dict(values)
        for name, kind in _SECTIONS.items():
            if name in made:
                made[name] = _section(kind, made[name], name)
        if "levels" in made:
            made["levels"] = tuple(_section(LevelConfig, level, "levels") for level in made["levels"])
        return cls(**made)


_SECTIONS: dict[str, type] = {
    "features": FeatureConfig,
    "backbone": BackboneConfig,
    "sampler": SamplerConfig,
    "oracle": OracleSchedule,
    "cascade": CascadeConfig,
    "confidence": ConfidenceConfig,
    "aggregation": AggregationConfig,
}


def _section(kind: type, values: Any, name: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{name} must hold tables, got {values!r}")
    check_keys(kind, values)
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
