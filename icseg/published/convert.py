"""Configurations and weights of the published code, as ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from icseg.baselines.universeg import read_weights, renamed
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

if TYPE_CHECKING:
    from icseg.model import PatchICL

# The keys of each table of a published configuration; those after "|" have no effect worth having.
_KEYS = {
    "the configuration": """feature_extractor levels oracle_levels_train oracle_levels_valid oracle_scheduling
        sampler aggregator backbone sampling_map loss cascade num_mask_channels | model_version""",
    "feature_extractor": "type layer_idx input_size output_grid_size freeze skip_preprocess | pretrained",
    "levels": """resolution patch_size num_patches num_patches_val num_context_patches num_context_patches_val
        stride context_stride spread_sigma spread_sigma_target spread_sigma_context sampling_temperature pad_before
        pad_after | sampling_method""",
    "oracle_scheduling": "enabled schedule warmup_epochs decay_epochs start_prob end_prob",
    "sampler": """type target_sampling_oracle target_model_sampling context_sampling differentiable
        | augmentation""",
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
    without an effect there are ignored by name. Raises ValueError for an unknown key or a value that is not
    supported.
    """
    _known("the configuration", published)
    backbone = _table(published, "backbone")
    levels = [dict(level) for level in published.get("levels", ())]
    patch_sizes = {level.get("patch_size") for level in levels}
    if len(patch_sizes) != 1:
        raise ValueError(
            f"levels must be at least one and share one patch_size, got {sorted(map(str, patch_sizes))}"
        )
    _require(published, "num_mask_channels", 1)
    return PublishedConfig(
        image_size=backbone.get("image_size", 224),
        patch_size=patch_sizes.pop(),
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

    Raises ValueError for an unknown key, a criterion that is not soft Dice with focal loss, or two that
    differ.
    """
    loss = _table(published, "loss")
    weights = _table(loss, "weights", "loss.weights")
    patch, whole = (_table(loss, name, "loss criterion") for name in ("patch_loss", "aggreg_loss"))
    if patch != whole:
        raise ValueError(f"patch_loss and aggreg_loss must be the same, got {patch} and {whole}")
    _require(whole, "type", "softdiceFocal")
    args = dict(whole.get("args") or {})
    _known("loss criterion args", args)
    level_weights = loss.get("level_weights", "uniform")
    return LossConfig(
        target_patch=weights.get("target_patch", 0.0),
        target_aggregated=weights.get("target_aggreg", 0.0),
        target_combined=weights.get("target_combined", 1.0),
        support_patch=weights.get("context_patch", 0.0),
        support_aggregated=weights.get("context_aggreg", 1.0),
        dice=args.get("dice_weight", 1.0),
        focal=args.get("focal_weight", 1.0),
        level_weights=level_weights if isinstance(level_weights, str) else tuple(level_weights),
        mask_reduction="hybrid",
        dice_smooth=args.get("smooth", 1e-5),
        focal_alpha=args.get("alpha", 0.25),
        focal_gamma=args.get("gamma", 2.0),
    )


def load_published(
    weights: Mapping[str, Tensor] | str | Path,
    config: Mapping[str, Any],
    *,
    universeg: str | Path | None = None,
) -> PatchICL:
    """The published model with its own weights, in evaluation mode.

    weights:   a state dict of the published code, or a file that holds one, also as its "model_state_dict".
               Read with nothing executed.
    config:    the configuration it was made with (`PublishedConfig.from_published_dict`).
    universeg: a UniverSeg weight file, for state dicts saved without their frozen feature extractor.
    Raises FileNotFoundError, or ValueError for an unknown, missing or misshapen tensor or an invalid
    configuration.
    """
    from icseg.model import PatchICL

    state: Mapping[str, Any] = read_weights(weights) if isinstance(weights, str | Path) else weights
    state = state.get("model_state_dict", state)
    if universeg is not None:
        state = {**{f"feature_extractor.model.{k}": v for k, v in read_weights(universeg).items()}, **state}
    ours = PublishedConfig.from_published_dict(dict(config))
    model = PatchICL(ours)
    try:
        model.network.load_state_dict(state_from_published(state, ours))
    except RuntimeError as error:
        raise ValueError(f"weights must fit the configuration: {error}") from error
    return model.eval()


# (published name, our name, place): tensors with one name of ours are joined along their rows, by place.
_NAMES = tuple(
    (re.compile(pattern), replacement, place)
    for pattern, replacement, place in (
        (r"backbone\.scale_encoder\.freqs", "scale.frequencies", 0),
        (r"backbone\.encoder\.input_proj\.(\w+)", r"encoder.project.\1", 0),
        (r"backbone\.encoder\.levels\.(\d+)\.conv\.(\w+)", r"encoder.stages.\1.conv.\2", 0),
        (r"backbone\.encoder\.levels\.(\d+)\.norm\.gamma_proj\.(\w+)", r"encoder.stages.\1.norm.film.\2", 0),
        (r"backbone\.encoder\.levels\.(\d+)\.norm\.beta_proj\.(\w+)", r"encoder.stages.\1.norm.film.\2", 1),
        (r"backbone\.attention\.register_tokens", "transformer.registers", 0),
        (r"backbone\.attention\.(\w*layers\.\d+)\.context_embed", r"transformer.\1.types", 0),
        (r"backbone\.attention\.(\w*layers\.\d+)\.target_embed", r"transformer.\1.types", 1),
        (r"backbone\.attention\.(\w*layers\.\d+)\.q_proj\.(\w+)", r"transformer.\1.query.\2", 0),
        (r"backbone\.attention\.(\w*layers\.\d+)\.k_proj\.(\w+)", r"transformer.\1.key_value.\2", 0),
        (r"backbone\.attention\.(\w*layers\.\d+)\.v_proj\.(\w+)", r"transformer.\1.key_value.\2", 1),
        (r"backbone\.attention\.(\w*layers\.\d+)\.out_proj\.(\w+)", r"transformer.\1.out.\2", 0),
        (r"backbone\.attention\.(\w*layers\.\d+\.(?:norm\d|mlp\.\d)\.\w+)", r"transformer.\1", 0),
        (r"backbone\.attention\.final_norm\.(\w+)", r"transformer.final_norm.\1", 0),
        (r"backbone\.decoder\.levels\.(\d+)\.up\.(\w+)", r"decoder.stages.\1.up.\2", 0),
        (r"backbone\.decoder\.levels\.(\d+)\.fuse_conv\.(\w+)", r"decoder.stages.\1.conv.\2", 0),
        (
            r"backbone\.decoder\.levels\.(\d+)\.fuse_norm\.gamma_proj\.(\w+)",
            r"decoder.stages.\1.norm.film.\2",
            0,
        ),
        (
            r"backbone\.decoder\.levels\.(\d+)\.fuse_norm\.beta_proj\.(\w+)",
            r"decoder.stages.\1.norm.film.\2",
            1,
        ),
        (r"backbone\.decoder\.seg_head\.(\d\.\w+)", r"decoder.head.\1", 0),
        (r"backbone\.decoder\.sampling_head\.(\d\.\w+)", r"decoder.confidence_head.\1", 0),
        (r"backbone\.mask_encoder\.mask_downscaling\.(\d\.\w+)", r"mask_encoder.layers.\1", 0),
        (r"backbone\.fusion_proj\.(\w+)", r"fusion.project.\1", 0),
        (r"backbone\.mask_gate", "fusion.gates.prior", 0),
        (r"backbone\.context_mask_gate", "fusion.gates.support", 0),
        (r"_log_temperature", "confidence.log_temperature", 0),
        (
            r"feature_extractor\.img_blocks\.(\d)\.block\.(\d\.\w+)",
            r"features.extractor.image_blocks.\1.\2",
            0,
        ),
        (
            r"feature_extractor\.msk_blocks\.(\d)\.block\.(\d\.\w+)",
            r"features.extractor.mask_blocks.\1.\2",
            0,
        ),
        (r"(encoder\.blocks\.\d\.(?:cross|target|support)\.\w+)", r"features.extractor.\1", 0),
    )
)

# Buffers that follow from the configuration, and UniverSeg's decoder, which no feature is read from.
_NOT_LOADED = re.compile(
    r".*samplers\.\d+\._gaussian_kernel|aggregators\.\d+\.gaussian_kernel|decoder\.\d.*|head\..*"
)


def state_from_published(state: Mapping[str, Tensor], config: PublishedConfig) -> dict[str, Tensor]:
    """A state dict of the published code under the names of `PublishedNetwork`. Raises ValueError for unknown
    names.
    """
    prefix = "feature_extractor.model."
    extractor = renamed({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in {**{k: v for k, v in state.items() if not k.startswith(prefix)}, **extractor}.items():
        if _NOT_LOADED.fullmatch(name):
            continue
        ours, place = _our_name(name)
        parts.setdefault(ours, {})[place] = tensor
    joined = {name: _joined(name, [pieces[i] for i in sorted(pieces)]) for name, pieces in parts.items()}
    if config.confidence.source != "entropy":
        joined.pop("confidence.log_temperature", None)
    if config.backbone.registers == 0:
        joined.setdefault("transformer.registers", torch.zeros(0, config.backbone.dim))
    if config.backbone.fusion == "gated":
        joined.setdefault("fusion.gates.support", torch.tensor(0.1))
    unread = re.compile(r"features\.extractor\.(?:encoder\.|image_|mask_)blocks\.(\d)\.")
    deepest = config.features.scales[-1]
    return {k: v for k, v in joined.items() if not ((m := unread.match(k)) and int(m[1]) > deepest)}


def _our_name(name: str) -> tuple[str, int]:
    for pattern, replacement, place in _NAMES:
        if match := pattern.fullmatch(name):
            return match.expand(replacement), place
    raise ValueError(f"weights must be a state dict of the published code, got the key {name}")


def _joined(name: str, pieces: list[Tensor]) -> Tensor:
    if name.endswith(".types"):
        return torch.cat([piece.flatten(0, 1) for piece in pieces])  # each [1, 1, D]
    if name == "transformer.registers":
        return pieces[0].squeeze(0)
    if name == "encoder.project.weight":
        return pieces[0][..., None, None]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


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


def _level(table: dict[str, Any]) -> LevelConfig:
    _known("levels", table)
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
    _require(table, "type", "continuous", default="continuous")
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
    _require(table, "schedule", "linear", default="linear")

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
        _require(table, "sampling_map_mode", "multiply", default="multiply")
        _require(table, "detach_sampling_map", False, default=False)
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


def _require(table: Mapping[str, Any], key: str, value: Any, default: Any = None) -> None:
    given = table.get(key, default)
    if given is not None and given != value:
        raise ValueError(f"{key} must be {value!r}, the only kind supported, got {given!r}")


def _default(table: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value at `key`, or `default` where it is missing or None."""
    given = table.get(key)
    return default if given is None else given
