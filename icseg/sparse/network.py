"""The sparse PatchICL: a cascade over levels in which only picked patches are ever encoded."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icseg.draws import derived_seed, uniform
from icseg.memory import SupportMemory
from icseg.output import LevelOutput, SegmentationOutput
from icseg.sparse import selection
from icseg.sparse.config import SparseConfig
from icseg.sparse.decoder import PatchDecoder
from icseg.sparse.encoder import Block, PatchEncoder
from icseg.sparse.grid import PATCH, LevelImage, level_size, resize
from icseg.sparse.propagation import LabelPropagation
from icseg_kernels import gather_patches, scatter_patches

SUPPORT_DRAW, TARGET_DRAW, ORACLE_DRAW = range(3)


@dataclass
class LevelMemory:
    """A support set at one level: a key-value memory a block, and the keys and values of label propagation."""

    blocks: list[Tensor]
    keys: Tensor
    values: Tensor


class SparseNetwork(nn.Module):
    """Nothing here convolves a whole image, and nothing on the support side sees the target."""

    def __init__(self, config: SparseConfig) -> None:
        super().__init__()
        self.config = config
        self.fingerprint = config.fingerprint()
        levels = len(config.levels)
        self.encoder = PatchEncoder(config.dim, config.stem_channels, levels)
        self.blocks = nn.ModuleList(Block(config.dim, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.propagation = LabelPropagation(
            config.dim,
            config.stem_channels,
            config.propagation_heads,
            config.propagation_key_dim,
            config.propagation_value_dim,
        )
        self.decoder = PatchDecoder(
            config.dim, config.stem_channels, config.propagation_heads, levels, config.residual_bound
        )

    def encode_support(self, images: Tensor, masks: Tensor, *, seed: int | None = None) -> SupportMemory:
        """images, masks [B, S, 1, H, W] in [0, 1]; `seed` varies which patches stand for equals (in training)."""
        tensors: dict[str, Tensor] = {}
        for level, side in enumerate(self.config.levels):
            draw = None if seed is None else derived_seed(seed, SUPPORT_DRAW, level)
            encoded = self._encode_support_level(images, masks, level, side, draw)
            tensors |= {f"level{level}.block{i}": t for i, t in enumerate(encoded.blocks)}
            tensors |= {f"level{level}.keys": encoded.keys, f"level{level}.values": encoded.values}
        return SupportMemory(self.fingerprint, images.shape[0], tensors)

    def _encode_support_level(
        self, images: Tensor, masks: Tensor, level: int, side: int, seed: int | None
    ) -> LevelMemory:
        size = level_size(images.shape[-2], images.shape[-1], side)
        image, mask = (resize(t.flatten(0, 1), size) for t in (images, masks))
        source = LevelImage(image * 2 - 1, mask * 2 - 1)
        index = selection.support_patches(mask, self.config.support_patches[level], self.config.foreground_share, seed)
        coords = source.coords(index)
        features, tokens = self.encoder(source, coords, level, is_target=False)
        labels = gather_patches(source.label, coords, PATCH).flatten(0, 1)
        tokens = tokens.reshape(images.shape[0], -1, self.config.dim)  # the set as one sequence
        memory = []
        for block in self.blocks:
            tokens, own = block(tokens, [])
            memory.append(own)
        return LevelMemory(memory, *self.propagation.support(features, self.norm(tokens), labels))

    def forward(
        self,
        target: Tensor,
        memory: SupportMemory,
        *,
        target_mask: Tensor | None = None,
        seed: int | None = None,
        noise: Sequence[Tensor] | None = None,
    ) -> SegmentationOutput:
        if noise is not None:
            raise NotImplementedError("noise must be None for the sparse architecture, which draws by seed")
        rng = random.Random(seed)
        combined: Tensor | None = None
        outputs: list[LevelOutput] = []
        cascade: list[list[Tensor]] = [[] for _ in self.blocks]  # target keys and values of the coarser levels
        for level in range(self._levels_of(target)):
            budget = self.config.target_patches[level]
            if self.training and level and seed is not None:
                budget = rng.randint((budget + 1) // 2, budget)
            draw = None if seed is None else derived_seed(seed, TARGET_DRAW, level)
            output, own = self._forward_level(
                target,
                combined,
                self._level_memory(memory, level, target.shape[0]),
                cascade,
                level,
                budget,
                draw,
                target_mask,
            )
            outputs.append(output)
            combined = output.logits.detach()
            for block_memory, keys_values in zip(cascade, own, strict=True):
                block_memory.append(keys_values.detach())
        final = resize(outputs[-1].logits, (target.shape[-2], target.shape[-1]))
        return SegmentationOutput(final, outputs)

    def _forward_level(
        self,
        target: Tensor,
        coarser: Tensor | None,
        memory: LevelMemory,
        cascade: list[list[Tensor]],
        level: int,
        budget: int,
        seed: int | None,
        target_mask: Tensor | None,
    ) -> tuple[LevelOutput, list[Tensor]]:
        size = level_size(target.shape[-2], target.shape[-1], self.config.levels[level])
        image = resize(target, size) * 2 - 1
        prior = torch.zeros_like(image) if coarser is None else F.interpolate(coarser, size, mode="bilinear")
        source = LevelImage(image, prior.sigmoid() * 2 - 1)
        coords = source.coords(self._pick(prior, budget, seed, target_mask))
        features, tokens = self.encoder(source, coords, level, is_target=True)
        own = []
        for block, support, coarser_target in zip(self.blocks, memory.blocks, cascade, strict=True):
            tokens, keys_values = block(tokens, [support, *coarser_target])
            own.append(keys_values)
        tokens = self.norm(tokens)
        masks, context = self.propagation(features, tokens, memory.keys, memory.values)
        prior_patches = gather_patches(prior, coords, PATCH).flatten(0, 1)
        change = self.decoder(features, tokens, masks, context, prior_patches, level)
        patch_logits = (prior_patches + change).unflatten(0, coords.shape[:2])
        written = scatter_patches(patch_logits, coords, size)
        output = LevelOutput(
            resolution=size,
            logits=torch.where(written.coverage, written.mean, prior),
            prediction=written.mean,
            patch_logits=patch_logits,
            coords=coords,
            coverage=written.coverage,
        )
        return output, own

    @torch.no_grad()
    def _pick(self, prior: Tensor, budget: int, seed: int | None, target_mask: Tensor | None) -> Tensor:
        score = selection.entropy_score(prior)
        if self.training and target_mask is not None and seed is not None:
            error = (prior.sigmoid() - resize(target_mask.to(prior.dtype), (prior.shape[-2], prior.shape[-1]))).abs()
            oracle = F.avg_pool2d(error, PATCH).flatten(1)
            chance = uniform(derived_seed(seed, ORACLE_DRAW), 1, prior.shape[0], prior.device)
            score = torch.where(chance.view(-1, 1) < self.config.oracle_share, oracle, score)
        return selection.target_patches(score, budget, self.config.selection_power, seed)

    def _levels_of(self, target: Tensor) -> int:
        """Levels up to the first that reaches the target's own longer side."""
        longer = max(target.shape[-2:])
        return 1 + sum(side < longer for side in self.config.levels[:-1])

    def _level_memory(self, memory: SupportMemory, level: int, batch: int) -> LevelMemory:
        def get(name: str) -> Tensor:
            tensor = memory.tensors[f"level{level}.{name}"]
            return tensor.expand(batch, *tensor.shape[1:])

        return LevelMemory([get(f"block{i}") for i in range(self.config.depth)], get("keys"), get("values"))
