"""The support set: encoded image by image, then as one set."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from icseg.draws import derived_seed
from icseg.memory import SupportMemory
from icseg.sparse import selection
from icseg.sparse.encoder import visible
from icseg.sparse.patches import CONTEXT, CROP, HALO, PATCH, context_corner, coords_of, cut, grid_size, patch_inputs
from icseg.sparse.propagation import CELLS
from icseg.sparse.pyramid import CONTEXT_STEPS, Pyramid, finest_size, level_count, to_size
from icseg_kernels import halvings

if TYPE_CHECKING:
    from icseg.sparse.config import SparseConfig
    from icseg.sparse.network import SparseNetwork

SUPPORT_DRAW, TARGET_DRAW, ORACLE_DRAW, BUDGET_DRAW, ROUND_DRAW = range(5)


@dataclass
class _LevelPatches:
    """The patches of one level so far, one entry a chunk: [B, K, ...]."""

    features: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)
    valid: list[Tensor | None] = field(default_factory=list)


class SupportEncoder:
    """Takes the images of a support set in chunks of any sizes and keeps only their picked patches.

    ```
    encoder = model.support_encoder(count=len(pairs))
    for image, mask in pairs:                                    # [1, 1, 1, H, W], [1, 1, C, H, W]
        encoder.add(image, mask)
    memory = encoder.finish()
    ```
    """

    def __init__(self, network: SparseNetwork, count: int, seed: int | None) -> None:
        config = network.config
        self.network, self.count, self.seed = network, count, seed
        self.chunks = self.images = 0
        self.patches_per_image = patches_per_image(config, count)
        self.levels: list[_LevelPatches] = []

    def add(self, images: Tensor, masks: Tensor, valid: Tensor | None = None) -> None:
        """images [B, s, 1, H, W] and masks [B, s, C, H, W] in [0, 1]; valid [B, s] bool, False leaves an image out.

        Raises TypeError or ValueError for others, or where they do not fit those before or are more than `count`.
        """
        config = self.network.config
        check_support(images, masks, valid)
        self.images += images.shape[1]
        if self.images > self.count:
            raise ValueError(f"support images must number {self.count} at most, got {self.images}")
        first = self.levels[0].masks[0] if self.levels else None
        if first is not None and (first.shape[0], first.shape[2]) != (masks.shape[0], masks.shape[2]):
            raise ValueError(
                f"support_masks must have B = {first.shape[0]} and C = {first.shape[2]} like those before, "
                f"got {list(masks.shape)}"
            )
        masks = masks.to(images.dtype)
        height, width = images.shape[-2:]
        count = level_count(height, width, config.levels)
        size = finest_size(height, width, config.levels[count - 1])
        pyramid = Pyramid.of(to_size(images.flatten(0, 1), size), count)
        finest = to_size(masks.flatten(0, 1), size)
        mask_levels = [*halvings(finest, count - 1 + CONTEXT_STEPS)[0][::-1], finest]
        self.levels += [_LevelPatches() for _ in range(count - len(self.levels))]
        for level in range(count):
            self._add_level(level, pyramid, mask_levels, images.shape[:2], valid)
        self.chunks += 1

    def _add_level(
        self, level: int, pyramid: Pyramid, masks: list[Tensor], sets: torch.Size, valid: Tensor | None
    ) -> None:
        network, mask = self.network, masks[level + CONTEXT_STEPS]
        seed = None if self.seed is None else derived_seed(self.seed, SUPPORT_DRAW, level, self.chunks)
        index = selection.support_patches(mask, self.patches_per_image[level], network.config.foreground_share, seed)
        coords = coords_of(index, grid_size(*mask.shape[-2:])[1])
        crops = cut(mask, coords - HALO, CROP)
        label = crops.amax(2, keepdim=True) * 2 - 1
        context = cut(masks[level].amax(1, keepdim=True) * 2 - 1, context_corner(coords), CONTEXT)
        inputs = patch_inputs(pyramid, level, coords, label, context)
        features, tokens = network.encoder(inputs, level, is_target=False)
        per_set = (sets[0], -1)
        into = self.levels[level]
        into.features.append(features.view(*per_set, *features.shape[1:]))
        into.tokens.append(tokens.view(*per_set, tokens.shape[-1]))
        core = crops[..., HALO : HALO + PATCH, HALO : HALO + PATCH]
        into.masks.append((core * 2 - 1).reshape(*per_set, *core.shape[2:]))
        into.valid.append(None if valid is None else valid.repeat_interleave(index.shape[1], 1))

    def finish(self) -> SupportMemory:
        """Let the patches of all images attend to each other. Raises ValueError if no image was added."""
        if not self.levels:
            raise ValueError("support set must hold at least one image, got none")
        tensors: dict[str, Tensor] = {}
        for level, patches in enumerate(self.levels):
            tensors |= {f"level{level}.{name}": t for name, t in self._finish_level(level, patches).items()}
        first = self.levels[0].masks[0]
        return SupportMemory(
            self.network.fingerprint, first.shape[0], tensors, first.shape[2], self.network.weights_identity
        )

    def _finish_level(self, level: int, patches: _LevelPatches) -> dict[str, Tensor]:
        network = self.network
        tokens = torch.cat(patches.tokens, 1)
        batch, count = tokens.shape[:2]
        registers = network.support_registers.expand(batch, -1, -1)
        valid = [None, *patches.valid]
        index = visible(valid, [registers.shape[1], *(t.shape[1] for t in patches.tokens)], batch, tokens.device)
        tokens = torch.cat([registers, tokens], 1)
        encoded: dict[str, Tensor] = {}
        for i, block in enumerate(network.blocks):
            tokens, encoded[f"block{i}"] = block(tokens, [], index)
        tokens = network.norm(tokens[:, -count:])
        features, masks = (torch.cat(parts, 1).flatten(0, 1) for parts in (patches.features, patches.masks))
        encoded["keys"], encoded["values"] = network.propagation.support(features, tokens, masks)
        if index is not None:
            encoded["valid"] = index >= 0
        return encoded


def patches_per_image(config: SparseConfig, count: int) -> list[int]:
    """Of each level, for a support set of `count` images."""
    share = max(2, config.most_support_patches // count)
    return [min(patches, share) for patches in config.support_patches]


def check_support(images: Tensor, masks: Tensor, valid: Tensor | None = None) -> None:
    """Raise TypeError or ValueError unless these are images [B, S, 1, H, W], their masks and a mask of the valid."""
    if images.ndim != 5 or images.shape[2] != 1:
        raise ValueError(f"support_images must have shape [B, S, 1, H, W], got {list(images.shape)}")
    if images.shape[1] == 0:
        raise ValueError("support_images must hold at least one image, got S = 0")
    if masks.ndim != 5 or masks.shape[2] == 0 or masks.select(2, 0).shape != images.select(2, 0).shape:
        shape = [*images.shape[:2], "C", *images.shape[3:]]
        raise ValueError(
            f"support_masks must have the shape of support_images with C classes, [{', '.join(map(str, shape))}], "
            f"got {list(masks.shape)}"
        )
    if not images.is_floating_point():
        raise TypeError(f"support_images must be floating-point, in [0, 1], got {images.dtype}")
    if valid is not None and (valid.shape != images.shape[:2] or valid.dtype != torch.bool):
        raise ValueError(
            f"valid must be bool of shape [B, S] = {list(images.shape[:2])}, got {valid.dtype} {list(valid.shape)}"
        )


@dataclass
class LevelMemory:
    """A support set at one level.

    blocks: keys and values [B, M, 2D] of each block; keys, values: of label propagation [B, h, cells, ...].
    valid:  [B, M] bool of the tokens, the registers' first; None if all are.
    """

    blocks: list[Tensor]
    keys: Tensor
    values: Tensor
    valid: Tensor | None

    @staticmethod
    def of(memory: SupportMemory, level: int, depth: int, batch: int) -> LevelMemory:
        """That of `level` for a batch of targets."""

        def get(name: str) -> Tensor:
            tensor = memory.tensors[f"level{level}.{name}"]
            return tensor.expand(batch, *tensor.shape[1:])

        valid = get("valid") if f"level{level}.valid" in memory.tensors else None
        return LevelMemory([get(f"block{i}") for i in range(depth)], get("keys"), get("values"), valid)

    def visible_cells(self, registers: int) -> Tensor | None:
        """The `index` of label propagation: the cells of valid patches."""
        if self.valid is None:
            return None
        cells = self.valid[:, registers:].repeat_interleave(CELLS, 1)
        return torch.where(cells, torch.arange(cells.shape[1], device=cells.device), -1)


def memory_levels(memory: SupportMemory) -> int:
    """How many levels a support set was encoded at: up to those of its largest image."""
    return sum(name.endswith(".keys") for name in memory.tensors)
