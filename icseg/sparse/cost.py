"""What a target costs: floating-point operations by formula, 2 a multiply-add."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from icseg.memory import SupportMemory
from icseg.sparse.budget import shared_out
from icseg.sparse.patches import CONTEXT, CROP, PATCH
from icseg.sparse.propagation import CELL_PIXELS, CELLS

if TYPE_CHECKING:
    from icseg.sparse.network import SparseNetwork


def layer_flops(layers: Iterable[nn.Module], side: int) -> int:
    """Convolutions and linear layers, one after the other, on one square of `side` pixels."""
    total = 0
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            kernel, stride = layer.kernel_size[0], layer.stride[0]
            side = (side + 2 * int(layer.padding[0]) - kernel) // stride + 1
            total += 2 * layer.in_channels * layer.out_channels * (kernel * side) ** 2
        elif isinstance(layer, nn.Linear):
            total += 2 * layer.in_features * layer.out_features
    return total


def patch_flops(network: SparseNetwork, classes: int) -> int:
    """Of one target patch, all but attention."""
    encoder, propagation, decoder = network.encoder, network.propagation, network.decoder
    encoded = layer_flops(encoder.stem, CROP) + layer_flops(encoder.label_stem, CROP)
    encoded += layer_flops(encoder.token, PATCH) + layer_flops(encoder.context, CONTEXT)
    encoded += layer_flops([encoder.position], 1)
    blocks = [layer for block in network.blocks for layer in block.modules()]
    matched = CELLS * layer_flops([propagation.match_cell, propagation.match_out, propagation.out], 1)
    matched += layer_flops([propagation.match_token], 1)
    decoded = layer_flops([decoder.token], 1) + layer_flops(decoder.shared, PATCH)
    decoded += classes * (layer_flops([decoder.own], PATCH) + layer_flops(decoder.layers, PATCH))
    return encoded + layer_flops(blocks, 1) + matched + decoded


def target_flops(network: SparseNetwork, memory: SupportMemory, patches: list[int]) -> int:
    """Of a target with so many patches at each level, in one round each."""
    config = network.config
    values = CELL_PIXELS * memory.classes + config.propagation_value_dim
    per_cells = 2 * config.propagation_heads * (config.propagation_key_dim + values)
    total, earlier = 0, 0
    for level, count in enumerate(patches):
        keys, cells = (memory.tensors[f"level{level}.{name}"] for name in ("block0", "keys"))
        tokens = count + config.registers
        earlier += tokens
        total += count * patch_flops(network, memory.classes)
        total += 4 * config.depth * config.dim * tokens * (keys.shape[1] + earlier)
        total += per_cells * count * CELLS * cells.shape[2]
    return total


def affordable(network: SparseNetwork, memory: SupportMemory, cells: list[int], gflops: float) -> list[int]:
    """The most patches at each level, of so many `cells`, that cost at most `gflops`; all of the first in any case."""
    low, high = cells[0], sum(cells)
    while low < high:
        middle = (low + high + 1) // 2
        shares = shared_out(middle, cells, network.config.target_patches)
        if target_flops(network, memory, shares) <= gflops * 1e9:
            low = middle
        else:
            high = middle - 1
    return shared_out(low, cells, network.config.target_patches)
