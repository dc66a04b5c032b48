"""The cascade by `icseg_kernels.cascade`: four launches a level, where a GPU takes one fixed round of patches at each.

The same computation as that of the modules, without gradients, noise and adaptive rounds; those go through the ops.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from icseg.draws import uniform
from icseg.memory import SupportMemory
from icseg.output import LevelOutput, SegmentationOutput
from icseg.plain import is_hooked, is_plain
from icseg.sparse.budget import LevelPlan
from icseg.sparse.encoder import PatchEncoder, SmallConvolutions
from icseg.sparse.patches import coords_of, grid_size
from icseg.sparse.pyramid import CONTEXT_STEPS, Pyramid, finest_size, level_count, to_size
from icseg.sparse.static import is_static
from icseg.sparse.support import LevelMemory, patches_per_image
from icseg_kernels import backend, halvings, triton_launch
from icseg_kernels.cascade.attend import MOST_BLOCKS, TokenWeights, attend_patches, most_tokens
from icseg_kernels.cascade.decode import NEGATIVE_SLOPE, DecodeWeights, decode_patches, support_cells
from icseg_kernels.cascade.encode import EncoderWeights, encode_patches
from icseg_kernels.cascade.pick import pick_support
from icseg_kernels.cascade.write import MOST_CELLS, MOST_PICKS, write_and_pick
from icseg_kernels.transformer_block import BlockWeights
from icseg_kernels.transformer_block import triton as transformer_block_triton

if TYPE_CHECKING:
    from icseg.sparse.network import SparseNetwork


class Weights(NamedTuple):
    """Those of a network, as the kernels take them: of its very parameters."""

    encoder: EncoderWeights
    blocks: list[BlockWeights]
    decoder: DecodeWeights


def weights_of(network: SparseNetwork) -> Weights | None:
    """None where a module was replaced, changed or hooked, or parameters have several dtypes."""
    encoder, propagation, decoder = network.encoder, network.propagation, network.decoder
    blocks = [block._weights() for block in network.blocks]  # type: ignore[operator]
    layers: list[nn.Module] = [
        *_layers(encoder.stem), *_layers(encoder.label_stem), *_layers(encoder.token), *_layers(encoder.context),
        encoder.position, encoder.norm, network.norm,
        propagation.match_cell, propagation.match_token, propagation.match_out,
        propagation.value_cell, propagation.value_token, propagation.out,
        decoder.token, *_layers(decoder.shared), decoder.own, *_layers(decoder.layers),
    ]  # fmt: skip
    containers = [encoder, encoder.stem, encoder.label_stem, encoder.token, encoder.context, propagation, decoder]
    containers += [decoder.shared, decoder.layers, *network.blocks]
    kinds = "".join(_KINDS.get(type(layer), "?") for layer in layers)
    slopes = {layer.negative_slope for layer in layers if isinstance(layer, nn.LeakyReLU)}
    if (
        kinds != _PLAIN_KINDS
        or any(map(is_hooked, containers))
        or not all(map(is_plain, layers))
        or slopes != {NEGATIVE_SLOPE}
    ):
        return None
    if None in blocks or len({parameter.dtype for parameter in network.parameters()}) > 1:
        return None
    convolutions = [layer for layer in layers if type(layer) is nn.Conv2d]
    of_encoder, (shared_in, shared_out, own_in, own_mid, own_out) = convolutions[:8], convolutions[8:]
    linear = [propagation.match_cell, propagation.match_token, propagation.match_out]
    linear += [propagation.value_cell, propagation.value_token]
    after = [propagation.out, decoder.token, shared_in, shared_out, own_in, own_mid, own_out]
    return Weights(
        EncoderWeights._make([*_parameters(*of_encoder), NEGATIVE_SLOPE]),
        blocks,
        DecodeWeights._make([*_parameters(*linear), propagation.log_scale, *_parameters(*after)]),
    )


_KINDS = {nn.Conv2d: "c", nn.LeakyReLU: "r", nn.Flatten: "f", nn.Linear: "l", nn.LayerNorm: "n"}
_PLAIN_KINDS = "crcrcrcr" + "cr" + "crfl" + "crcrfl" + "lnn" + "llllll" + "l" + "crc" + "c" + "rcrc"


def _layers(modules: SmallConvolutions) -> list[nn.Module]:
    return [module for module in modules._modules.values() if module is not None]


def _parameters(*layers: nn.Module) -> list[Tensor]:
    """Weight and, where there is one, bias of each."""
    found = [p for layer in layers for p in (layer._parameters["weight"], layer._parameters.get("bias"))]
    return [p for p in found if p is not None]


def _token_weights(network: SparseNetwork, level: int, *, is_target: bool) -> TokenWeights:
    encoder: PatchEncoder = network.encoder
    token, context = _layers(encoder.token)[-1], _layers(encoder.context)[-1]
    registers = network.target_registers if is_target else network.support_registers
    fields = [
        *_parameters(token, context, encoder.position),
        encoder.frequency,
        encoder.level_embedding[min(level, len(encoder.level_embedding) - 1)],
        encoder.role_embedding[int(is_target)],
        *_parameters(encoder.norm),
        registers,
        *_parameters(network.norm),
        encoder.norm.eps,
        network.norm.eps,
    ]
    return TokenWeights._make(fields)


def weights_for_target(
    network: SparseNetwork,
    image: Tensor,
    memory: SupportMemory,
    grids: Sequence[tuple[int, int]],
    plans: Sequence[LevelPlan],
) -> Weights | None:
    """What `forward` takes, for an image whose levels have these grids of patches; None where it does not serve."""
    if any(len(plan.rounds) > 1 for plan in plans) or any(name.endswith(".valid") for name in memory.tensors):
        return None
    cells = [rows * columns for rows, columns in grids]
    counts = _target_counts(cells, plans)
    return _weights_if_served(network, [image, *memory.tensors.values()], cells, counts, max(counts))


def weights_for_support(network: SparseNetwork, images: Tensor, masks: Tensor) -> Weights | None:
    """What `encode_support` takes, for images [B, S, 1, H, W]; None where it does not serve."""
    config, (height, width) = network.config, images.shape[-2:]
    levels = level_count(height, width, config.levels)
    counts = patches_per_image(config, images.shape[1])[:levels]
    rows, columns = grid_size(*finest_size(height, width, config.levels[levels - 1]))
    return _weights_if_served(network, [images, masks], [rows * columns], counts, images.shape[1] * max(counts))


def _target_counts(cells: Sequence[int], plans: Sequence[LevelPlan]) -> list[int]:
    """Patches of each level: all of the first."""
    return [cells[0], *(min(plan.rounds[0], n) for plan, n in zip(plans[1:], cells[1:], strict=True))]


def _weights_if_served(
    network: SparseNetwork, tensors: Sequence[Tensor], cells: Sequence[int], picks: Sequence[int], patches: int
) -> Weights | None:
    """cells, picks: of each level; patches: the most that attend to each other. tensors: beside the weights."""
    image = tensors[0]
    if network.training or torch.is_grad_enabled() or torch.is_autocast_enabled(image.device.type):
        return None
    named = backend.named()
    if named not in (None, "triton") or (named is None and triton_launch.slower()):
        return None
    if transformer_block_triton.missing() or not backend.unwatched(tuple(tensors)):
        return None
    if triton_launch.unsupported_device("image", image) or triton_launch.unsupported_dtype("image", image):
        return None
    parameter, config = next(network.parameters()), network.config
    if any(t.dtype != parameter.dtype or t.device != parameter.device for t in tensors):
        return None
    if config.depth > MOST_BLOCKS or max(cells) > MOST_CELLS or max(picks) > MOST_PICKS:
        return None
    if patches + config.registers > most_tokens(image.device):
        return None
    return weights_of(network)


def forward(
    network: SparseNetwork,
    weights: Weights,
    pyramid: Pyramid,
    memory: SupportMemory,
    plans: Sequence[LevelPlan],
    size: tuple[int, int],
) -> SegmentationOutput:
    """`SparseNetwork.forward` for one round a level, from the pyramid on; `size` is that of the target."""
    config, image = network.config, pyramid.images[-1]
    batch, levels, registers = image.shape[0], len(plans), config.registers
    sizes = [(h, w) for h, w in (pyramid.image(level).shape[-2:] for level in range(levels))]
    cells = [rows * columns for rows, columns in (grid_size(*s) for s in sizes)]
    counts = _target_counts(cells, plans)
    rows = sum(counts) + levels * registers
    cache = image.new_empty(config.depth, batch, rows, 2 * config.dim)
    words = torch.empty(batch, dtype=torch.int64, device=image.device)
    counters = words.view(torch.int32)[:batch]  # zeros after every transformer
    coords = _all_cells(*grid_size(*sizes[0]), batch, image.device)
    if not is_static():
        coords = coords.clone()  # the caller may write to it
    logits: Tensor | None = None
    error: Tensor | None = None
    uncovered = image.new_zeros(batch) if levels == 1 else None
    outputs = []
    start = 0
    for level in range(levels):
        support = LevelMemory.of(memory, level, config.depth, batch)
        features, hidden = encode_patches(
            pyramid.image(level), pyramid.detail(level), pyramid.context(level), logits, logits, coords,
            weights.encoder, from_logits=True,
        )  # fmt: skip
        tokens = attend_patches(
            hidden.view(batch, counts[level], -1), coords, max(sizes[level]),
            _token_weights(network, level, is_target=True), weights.blocks, support.blocks, cache, start, config.heads,
            words=words,
        )  # fmt: skip
        start += registers + counts[level]
        gains = network.decoder.propagation_gain
        patches, errors = decode_patches(
            features, tokens, coords, support.keys, support.values, logits, weights.decoder,
            gain=gains[min(level, len(gains) - 1)], bound=network.decoder.bound,
        )  # fmt: skip
        last = level + 1 == levels
        written = write_and_pick(
            logits, patches, errors, coords, sizes[level], error,
            None if last else sizes[level + 1], 0 if last else counts[level + 1],
            temperature=network.temperature if last else None, counters=None if last else counters,
        )  # fmt: skip
        logits, error = written.map, written.error
        outputs.append(LevelOutput(sizes[level], logits, patches, coords, extras={"error_logits": errors}))
        if not last:
            assert written.coords is not None
            coords, uncovered = written.coords, written.uncovered
    assert written.divided is not None
    return SegmentationOutput(to_size(written.divided, size), outputs, uncovered_error=uncovered)


def encode_support(network: SparseNetwork, weights: Weights, images: Tensor, masks: Tensor) -> SupportMemory:
    """`SparseNetwork.encode_support` of images that all are valid, without a seed; all of them at once."""
    config, (batch, support), (height, width) = network.config, images.shape[:2], images.shape[-2:]
    levels = level_count(height, width, config.levels)
    counts = patches_per_image(config, support)[:levels]
    size = finest_size(height, width, config.levels[levels - 1])
    pyramid = Pyramid.of(to_size(images.flatten(0, 1), size).contiguous(), levels)
    finest = to_size(masks.flatten(0, 1), size).contiguous()
    mask_levels = [*halvings(finest, levels - 1 + CONTEXT_STEPS)[0][::-1], finest]
    sizes = [(h, w) for h, w in (pyramid.image(level).shape[-2:] for level in range(levels))]
    chance = [_chance(rows * columns, images.device, images.dtype) for rows, columns in (grid_size(*s) for s in sizes)]
    corners = pick_support(mask_levels[CONTEXT_STEPS:], counts, config.foreground_share, chance)
    tensors: dict[str, Tensor] = {}
    for level, coords in enumerate(corners):
        mask, patches = mask_levels[level + CONTEXT_STEPS], support * coords.shape[1]
        features, hidden = encode_patches(
            pyramid.image(level), pyramid.detail(level), pyramid.context(level), mask, mask_levels[level], coords,
            weights.encoder, from_logits=False,
        )  # fmt: skip
        cache = images.new_empty(config.depth, batch, config.registers + patches, 2 * config.dim)
        tokens = attend_patches(
            hidden.view(batch, patches, -1), coords.view(batch, patches, 2), max(sizes[level]),
            _token_weights(network, level, is_target=False), weights.blocks, (), cache, 0, config.heads,
        )  # fmt: skip
        tensors |= {f"level{level}.block{i}": rows for i, rows in enumerate(cache)}
        keys, values = support_cells(features, tokens, coords, mask, weights.decoder)
        tensors |= {f"level{level}.keys": keys, f"level{level}.values": values}
    return SupportMemory(network.fingerprint, batch, tensors, masks.shape[2], network.weights_identity)


@functools.lru_cache(maxsize=64)
def _all_cells(rows: int, columns: int, batch: int, device: torch.device) -> Tensor:
    return coords_of(torch.arange(rows * columns, device=device).repeat(batch, 1), columns)


@functools.lru_cache(maxsize=64)
def _chance(cells: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The draws that break ties of support patches, as `selection.support_patches` has them without a seed."""
    return uniform(0, 2, cells, device).to(dtype)
