"""Weights of the published code, under our names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from icseg.baselines.universeg import read_mapping, read_weights, renamed, tensors_of
from icseg.published.config import PublishedConfig

if TYPE_CHECKING:
    from icseg.model import PatchICL


def load_published(
    weights: Mapping[str, Tensor] | str | Path,
    config: Mapping[str, Any],
    *,
    universeg: str | Path | None = None,
) -> PatchICL:
    """The published model with its own weights, in evaluation mode.

    weights:   a state dict of the published code, or a file that holds one, also as its "model_state_dict",
               and also of a compiled or a distributed model. Read with nothing executed.
    config:    the configuration it was made with (`PublishedConfig.from_published_dict`).
    universeg: a UniverSeg weight file, for state dicts saved without their frozen feature extractor.
    Raises FileNotFoundError, or ValueError for an unknown, missing or misshapen tensor or an invalid configuration.
    """
    from icseg.model import PatchICL

    held: Mapping[str, Any] = read_mapping(weights) if isinstance(weights, str | Path) else weights
    state = {_unwrapped(k): v for k, v in tensors_of(held.get("model_state_dict", held)).items()}
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
_NOT_LOADED = re.compile(r".*samplers\.\d+\._gaussian_kernel|aggregators\.\d+\.gaussian_kernel|decoder\.\d.*|head\..*")


def state_from_published(state: Mapping[str, Tensor], config: PublishedConfig) -> dict[str, Tensor]:
    """A state dict of the published code under the names of `PublishedNetwork`. Raises ValueError for unknown names."""
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
    if config.backbone.fusion == "gated" and config.backbone.mask_prior != "none" and not config.backbone.support_mask:
        joined.setdefault("fusion.gates.support", torch.tensor(0.1))
    unread = re.compile(r"features\.extractor\.(?:encoder\.|image_|mask_)blocks\.(\d)\.")
    deepest = config.features.scales[-1]
    return {k: v for k, v in joined.items() if not ((m := unread.match(k)) and int(m[1]) > deepest)}


def _unwrapped(name: str) -> str:
    """Without what torch.compile and DistributedDataParallel put into a parameter's name."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


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
