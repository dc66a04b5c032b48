"""Configurations of the published code, a dictionary each, as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icseg.losses import LossConfig
from icseg.published.config import (
    AggregationConfig,
    BackboneConfig,
    CascadeConfig,
    ConfidenceConfig,
    FeatureConfig,
    LevelConfig,
    OracleSchedule,
    PublishedConfig,
    SamplerConfig,
)

# The keys of each table of a published configuration; those after "|" have no effect worth having.
_KEYS = {
    "the configuration": """feature_extractor levels oracle_levels_train oracle_levels_valid oracle_scheduling
        sampler aggregator backbone sampling_map loss cascade num_mask_channels | model_version""",
    "feature_extractor": "type layer_idx input_size output_grid_size freeze skip_preprocess | pretrained",
    "levels": """resolution patch_size num_patches num_patches_val num_context_patches num_context_patches_val
        stride context_stride spread_sigma spread_sigma_target spread_sigma_context sampling_temperature
        pad_before pad_after | sampling_method""",
    "oracle_scheduling": "enabled schedule warmup_epochs decay_epochs start_prob end_prob",
    "sampler": """type target_sampling_oracle target_model_sampling context_sampling differentiable | augmentation""",
    "aggregator": """type fill_uncovered min_coverage use_sampling_map sampling_map_mode detach_sampling_map
        sigma_ratio""",
    "backbone": """embed_dim embed_proj_dim num_heads num_layers num_context_layers num_registers dropout
        append_zero_attn decoder_use_skip_connections use_mask_prior use_context_mask mask_fusion_type
        gradient_checkpointing patch_feature_grid_size image_size
        | feature_grid_size compile target_self_attention""",
    "sampling_map": "source temperature learn_temperature",
    "cascade": """detach_between_levels cascade_registers skip_context_decoding
        | additive_fusion sampling_map_blend learned_alpha confidence_blend""",
    "loss": "weights level_weights patch_loss aggreg_loss",
    "loss.weights": "target_patch target_aggreg target_combined context_patch context_aggreg",
    "loss criterion": "type args",
    "loss criterion args": "dice_weight focal_weight smooth alpha gamma",
}

_SCORES = {
    "gt_foreground": "foreground",
    "gt_foreground_entropy_balanced": "foreground_entropy",
    "gt_previous_pred_error": "error",
    "predicted_entropy": "entropy",
    "predicted_foreground_entropy_balanced": "foreground_entropy",
    "sampling_map": "confidence",
}


def config_from_published(published: Mapping[str, Any]) -> PublishedConfig:
    """The configuration that a dictionary of the published code (its `patch_icl` table, resolved) describes.

    What it leaves out has the published code's default; what the published code gets wrong is kept. Keys
    without an effect there are ignored by name. Raises ValueError for an unknown key or a value that is not supported.
    """
    _known("the configuration", published)
    backbone = _table(published, "backbone")
    levels = [_checked_level(level) for level in published.get("levels", ())]
    patch_sizes = sorted({level["patch_size"] for level in levels})
    if len(patch_sizes) != 1:
        raise ValueError(f"levels must be at least one and share one patch_size, got {patch_sizes}")
    _require(published, "num_mask_channels", 1)
    return PublishedConfig(
        image_size=backbone.get("image_size", 224),
        patch_size=patch_sizes[0],
        levels=tuple(_level(level) for level in levels),
        features=_features(_table(published, "feature_extractor"), backbone.get("embed_dim", 1024)),
        backbone=_backbone(backbone),
        sampler=_sampler(_table(published, "sampler")),
        oracle=_oracle(published, len(levels)),
        cascade=_cascade(_table(published, "cascade")),
        confidence=_confidence(_table(published, "sampling_map")),
        aggregation=_aggregation(_table(published, "aggregator")),
    )


def loss_from_published(published: Mapping[str, Any]) -> LossConfig:
    """The losses that a dictionary of the published code describes, with masks reduced as there.

    Raises ValueError for an unknown key, a criterion that is not soft Dice with focal loss, or two that differ.
    """
    loss = _table(published, "loss")
    weights = _table(loss, "weights", "loss.weights")
    patch, whole = (_table(loss, name, "loss criterion") for name in ("patch_loss", "aggreg_loss"))
    if patch != whole:
        raise ValueError(f"patch_loss and aggreg_loss must be the same, got {patch} and {whole}")
    kind, args = whole.get("type", "dice"), dict(whole.get("args") or {})
    if kind not in ("dice", "softdice", "softdiceFocal"):
        raise ValueError(f"patch_loss and aggreg_loss must be dice, softdice or softdiceFocal, got {kind!r}")
    _known("loss criterion args", args)
    level_weights = loss.get("level_weights", "uniform")
    return LossConfig(
        target_patch=weights.get("target_patch", 0.0),
        target_aggregated=weights.get("target_aggreg", 0.0),
        target_combined=weights.get("target_combined", 1.0),
        support_patch=weights.get("context_patch", 0.0),
        support_aggregated=weights.get("context_aggreg", 1.0),
        dice=args.get("dice_weight", 1.0),
        focal=args.get("focal_weight", 1.0) if kind == "softdiceFocal" else 0.0,
        level_weights=level_weights if isinstance(level_weights, str) else tuple(level_weights),
        mask_reduction="hybrid",
        dice_smooth=args.get("smooth", 1e-5),
        focal_alpha=args.get("alpha", 0.25),
        focal_gamma=args.get("gamma", 2.0),
    )


def _features(table: Mapping[str, Any], dim: int) -> FeatureConfig:
    kinds = {"universeg": "universeg", "icl_encoder": "convolutional"}
    kind = table.get("type")
    if kind not in kinds:
        raise ValueError(f"feature_extractor type must be one of {', '.join(kinds)}, got {kind!r}")
    trained_here = kind == "icl_encoder"
    scales = _scales(table.get("layer_idx", "all" if trained_here else 3))
    if dim % len(scales):
        raise ValueError(f"embed_dim must be divisible by the {len(scales)} layers that are read, got {dim}")
    input_size = 128 if trained_here else table.get("input_size", 128)
    grid = table.get("output_grid_size")
    return FeatureConfig(
        extractor=kinds[kind],
        channels=dim // len(scales),
        scales=scales,
        input_size=input_size,
        grid=128 >> scales[-1] if grid is None else grid,
        freeze=table.get("freeze", not trained_here),
        rescale=not trained_here and not table.get("skip_preprocess", True),
        via_grid=grid is not None,
        alignment="published",
    )


def _scales(layers: str | int | list[int]) -> tuple[int, ...]:
    if layers == "all":
        return (0, 1, 2, 3)
    return tuple(sorted(layers)) if isinstance(layers, list | tuple) else (int(layers),)


def _checked_level(level: Mapping[str, Any]) -> Mapping[str, Any]:
    _known("levels", level)
    if missing := [key for key in ("resolution", "patch_size", "num_patches") if key not in level]:
        raise ValueError(f"levels must each have {missing[0]}, got {dict(level)}")
    return level


def _level(table: Mapping[str, Any]) -> LevelConfig:
    patch_size, targets = table["patch_size"], table["num_patches"]
    before = _default(table, "pad_before", patch_size // 4)
    supports = _default(table, "num_context_patches", targets)
    blur = table.get("spread_sigma", 0.0)
    return LevelConfig(
        resolution=table["resolution"],
        target_patches=targets,
        support_patches=supports,
        target_patches_eval=table.get("num_patches_val"),
        support_patches_eval=table.get("num_context_patches_val"),
        stride=_default(table, "stride", 1),
        support_stride=table.get("context_stride"),
        temperature=table.get("sampling_temperature", 0.3),
        pad_before=before,
        pad_after=_default(table, "pad_after", patch_size - before - 1),
        target_blur=_default(table, "spread_sigma_target", blur),
        support_blur=_default(table, "spread_sigma_context", blur),
    )


def _backbone(table: Mapping[str, Any]) -> BackboneConfig:
    return BackboneConfig(
        dim=table.get("embed_proj_dim", 128),
        heads=table.get("num_heads", 8),
        layers=table.get("num_layers", 1),
        context_layers=table.get("num_context_layers", 0),
        registers=table.get("num_registers", 4),
        zero_key=table.get("append_zero_attn", False),
        dropout=table.get("dropout", 0.0),
        checkpointing=table.get("gradient_checkpointing", False),
        patch_grid=table.get("patch_feature_grid_size", 16),
        skips=table.get("decoder_use_skip_connections", True),
        support_mask=table.get("use_context_mask", False),
        mask_prior="logits" if table.get("use_mask_prior", False) else "none",
        fusion=table.get("mask_fusion_type", "additive"),
        positions="published",
    )


def _sampler(table: Mapping[str, Any]) -> SamplerConfig:
    _require(table, "type", "continuous")
    names = {
        "oracle_score": table.get("target_sampling_oracle", "gt_foreground"),
        "model_score": table.get("target_model_sampling", "predicted_entropy"),
        "support_score": table.get("context_sampling", "gt_foreground"),
    }
    if unknown := [v for v in names.values() if v not in _SCORES]:
        raise ValueError(f"sampling modes must be among {', '.join(_SCORES)}, got {unknown[0]!r}")
    differentiable = "published" if table.get("differentiable", False) else "off"
    return SamplerConfig(**{k: _SCORES[v] for k, v in names.items()}, differentiable=differentiable)


def _oracle(published: Mapping[str, Any], levels: int) -> OracleSchedule:
    table = _table(published, "oracle_scheduling")
    _require(table, "schedule", "linear")

    def flags(name: str, default: bool) -> tuple[bool, ...]:
        given = [bool(v) for v in published.get(name, [default])]
        return tuple((given + [False] * levels)[:levels])

    return OracleSchedule(
        train_levels=flags("oracle_levels_train", True),
        eval_levels=flags("oracle_levels_valid", False),
        scheduled=table.get("enabled", False),
        warmup=table.get("warmup_epochs", 10),
        decay=table.get("decay_epochs", 50),
        start=table.get("start_prob", 1.0),
        end=table.get("end_prob", 0.3),
    )


def _cascade(table: Mapping[str, Any]) -> CascadeConfig:
    return CascadeConfig(
        detach=table.get("detach_between_levels", True),
        registers=table.get("cascade_registers", False),
        decode_support=not table.get("skip_context_decoding", False),
    )


def _confidence(table: Mapping[str, Any]) -> ConfidenceConfig:
    return ConfidenceConfig(
        source=table.get("source", "none"),
        temperature=table.get("temperature", 1.0),
        learn_temperature=table.get("learn_temperature", False),
    )


def _aggregation(table: Mapping[str, Any]) -> AggregationConfig:
    weighting = table.get("use_sampling_map", False)
    if weighting:
        _require(table, "sampling_map_mode", "multiply")
        _require(table, "detach_sampling_map", False)
    return AggregationConfig(
        kind=table.get("type", "average"),
        sigma_ratio=table.get("sigma_ratio", 0.125),
        smallest_weight=table.get("min_coverage", 1e-6),
        uncovered_logit=-10.0 if table.get("fill_uncovered", "zero") == "zero" else 0.0,
        confidence_weighting=weighting,
    )


def _known(name: str, table: Mapping[str, Any]) -> None:
    keys = [key for key in _KEYS[name].split() if key != "|"]
    if unknown := sorted(set(table) - set(keys)):
        raise ValueError(f"{name} has no key {', '.join(unknown)}; its keys are {', '.join(keys)}")


def _table(parent: Mapping[str, Any], key: str, name: str | None = None) -> Mapping[str, Any]:
    """The table at `key`, empty if missing, its keys checked."""
    table = parent.get(key) or {}
    if not isinstance(table, Mapping):
        raise ValueError(f"{key} must be a table, got {table!r}")
    _known(name or key, table)
    return table


def _require(table: Mapping[str, Any], key: str, value: Any) -> None:
    given = _default(table, key, value)
    if given != value:
        raise ValueError(f"{key} must be {value!r}, the only kind supported, got {given!r}")


def _default(table: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value at `key`, or `default` where it is missing or None."""
    given = table.get(key)
    return default if given is None else given
