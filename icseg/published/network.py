"""The published PatchICL (arXiv 2604.12752), coarse to fine over dense features of whole images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icseg.masks import level_mask
from icseg.memory import SupportMemory
from icseg.output import LevelOutput, SegmentationOutput
from icseg.published.config import PublishedConfig
from icseg.published.decoder import PatchDecoder
from icseg.published.encoder import MaskEncoder, PatchEncoder, ScaleEncoding, make_fusion
from icseg.published.features import FeatureExtractor, read_patches
from icseg.published.level import Aggregation, ConfidenceMap, Level
from icseg.published.sampling import MODEL_SCORES, ORACLE_SCORES, SUPPORT_SCORES, Draws
from icseg.published.transformer import PatchTransformer
from icseg_kernels import PatchSample, Scatter, gather_patches


@dataclass
class SupportTokens:
    """A support set at one level, before any target is known.

    coords: [B, S, K, 2]; tokens: [B, S * K, D] and registers: [B, R, D] after the context layers; skips: the
    patch encoder's maps [B, S * K, D, s, s] by size s, kept only where support patches are decoded with them.
    """

    coords: Tensor
    tokens: Tensor
    registers: Tensor
    skips: dict[int, Tensor] = field(default_factory=dict)

    def to_tensors(self, level: int) -> dict[str, Tensor]:
        names = {"coords": self.coords, "tokens": self.tokens, "registers": self.registers}
        names |= {f"skip{size}": skip for size, skip in self.skips.items()}
        return {f"level{level}.{name}": tensor for name, tensor in names.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], level: int, batch: int) -> SupportTokens:
        prefix = f"level{level}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        own = {k: v.expand(batch, *v.shape[1:]) for k, v in own.items()}
        skips = {int(k.removeprefix("skip")): v for k, v in own.items() if k.startswith("skip")}
        return cls(own["coords"], own["tokens"], own["registers"], skips)


@dataclass
class Coarser:
    """What a level takes from the one before: combined logits, confidence map and registers."""

    logits: Tensor
    confidence: Tensor | None
    registers: Tensor | None

    def detached(self) -> Coarser:
        confidence, registers = (None if t is None else t.detach() for t in (self.confidence, self.registers))
        return Coarser(self.logits.detach(), confidence, registers)


class PublishedNetwork(nn.Module):
    """See `icseg.PatchICL`, which holds it. Parameters are shared by all levels."""

    multi_class = False
    any_size = False
    weights_identity = ""
    oracle_share: Tensor

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        backbone = config.backbone
        self.config = config
        self.fingerprint = config.fingerprint()
        self.levels = [Level(level, config) for level in config.levels]
        self.features = FeatureExtractor(config.features)
        self.scale = ScaleEncoding(backbone.dim)
        self.encoder = PatchEncoder(config.features.dim, backbone)
        self.transformer = PatchTransformer(backbone)
        self.decoder = PatchDecoder(backbone, config.patch_size, confidence=config.confidence.source == "learned")
        self.aggregation = Aggregation(config.aggregation, config.patch_size)
        if backbone.support_mask or backbone.mask_prior != "none":
            self.mask_encoder = MaskEncoder(backbone.dim)
            self.fusion = make_fusion(backbone)
        if config.confidence.source == "entropy":
            self.confidence = ConfidenceMap(config.confidence.temperature, config.confidence.learn_temperature)
        self.register_buffer("oracle_share", torch.tensor(config.oracle.probability(0)), persistent=False)

    def set_oracle_step(self, step: int) -> None:
        """Tell the oracle schedule how many of its steps (epochs in the paper) of training have been done."""
        self.oracle_share.fill_(self.config.oracle.probability(step))

    def encode_support(self, images: Tensor, masks: Tensor, *, seed: int | None = None) -> SupportMemory:
        """images, masks: [B, S, 1, H, W]. Without a seed, in evaluation mode, the best patches are encoded too.

        With one, or in training, a forward draws and encodes its own from the features, by its own seed or noise.
        """
        features = self.features(images.flatten(0, 1), masks.flatten(0, 1)).unflatten(0, images.shape[:2])
        tensors = {"features": features, "masks": masks}
        if not self.training and seed is None:
            best = Draws(len(self.levels), False, None, None)
            for i in range(len(self.levels)):
                tensors |= self._encode_support_level(i, features, masks, images.shape[0], best).to_tensors(i)
        return SupportMemory(self.fingerprint, images.shape[0], tensors)

    def forward(
        self,
        target: Tensor,
        memory: SupportMemory,
        *,
        target_mask: Tensor | None = None,
        seed: int | None = None,
        noise: Sequence[Tensor] | None = None,
    ) -> SegmentationOutput:
        """As `icseg.PatchICL.forward`; noise has one tensor for each level's target, then support, sampler call.

        Each is [rows, candidates]: of the B targets, or of the B * S support images. The share of a scheduled oracle
        follows `seed`, and with `noise` torch's generator, which dropout always follows.
        Raises ValueError if a level's oracle is on and `target_mask` is missing, or for a noise of another shape.
        """
        draws = Draws(len(self.levels), self.training, seed, noise)
        mask = None if target_mask is None else target_mask.to(target.dtype)
        features = self.features(target)
        coarser: Coarser | None = None
        outputs: list[LevelOutput] = []
        for i in range(len(self.levels)):
            support = self._support(memory, i, target.shape[0], draws)
            support_height = memory.tensors["masks"].shape[-2]
            picked = self._pick_target(i, coarser, target, mask, draws)
            output, coarser = self._forward_level(i, target, features, picked, support, support_height, coarser)
            outputs.append(output)
            if self.config.cascade.detach:
                coarser = coarser.detached()
        logits = _resized(outputs[-1].logits, (target.shape[-2], target.shape[-1]))
        return SegmentationOutput(logits, outputs)

    def _support(self, memory: SupportMemory, level: int, batch: int, draws: Draws) -> SupportTokens:
        if draws.plain and f"level{level}.tokens" in memory.tensors:
            return SupportTokens.from_tensors(memory.tensors, level, batch)
        return self._encode_support_level(level, memory.tensors["features"], memory.tensors["masks"], batch, draws)

    def _encode_support_level(
        self, index: int, features: Tensor, masks: Tensor, batch: int, draws: Draws
    ) -> SupportTokens:
        """features: [M, S, D, g, g], masks: [M, S, 1, H, W], for B = `batch` targets; M is B, or 1 for all."""
        level, backbone = self.levels[index], self.config.backbone
        images = masks.shape[1]
        level_masks = level_mask(
            masks.flatten(0, 1), (level.resolution, level.resolution), self.config.touched_mask_value
        )
        score = SUPPORT_SCORES[self.config.sampler.support_score](level_masks).repeat(batch // masks.shape[0], 1, 1, 1)
        sample = level.sample_support(score, draws.source(2 * index + 1), self.training)
        coords = sample.coords.unflatten(0, (batch, images))  # [B, S, K, 2]
        patches = _read_per_image(features.flatten(0, 1), coords, lambda f, c: self._read(f, c, level))
        tokens, maps = self.encoder(patches.flatten(0, 2), self.scale(level.resolution))
        if backbone.support_mask:
            own = _read_per_image(level_masks, coords, self._read_mask)
            tokens = self.fusion(tokens, self.mask_encoder(own.flatten(0, 2)), "support")
        tokens = tokens.unflatten(0, (batch, -1))
        positions = level.positions(coords, masks.shape[-2]).flatten(1, 2)
        tokens, registers = self.transformer.context(tokens, positions)
        decoded = self.config.cascade.decode_support and backbone.skips
        skips = {size: m.unflatten(0, (batch, -1)) for size, m in maps.items()} if decoded else {}
        return SupportTokens(coords, tokens, registers, skips)

    def _pick_target(
        self, index: int, coarser: Coarser | None, target: Tensor, mask: Tensor | None, draws: Draws
    ) -> PatchSample:
        differentiable = self.training and self.config.sampler.differentiable != "off"
        score = self._target_score(index, coarser, target, mask, draws)
        return self.levels[index].sample_target(score, draws.source(2 * index), self.training, differentiable)

    def _target_score(
        self, index: int, coarser: Coarser | None, target: Tensor, mask: Tensor | None, draws: Draws
    ) -> Tensor:
        sampler, oracle = self.config.sampler, self.config.oracle
        size = (self.levels[index].resolution,) * 2
        if coarser is None:
            model = target.new_ones(target.shape[0], 1, *size)
        else:
            model = _resized(MODEL_SCORES[sampler.model_score](coarser.logits, coarser.confidence), size)
        flags = oracle.train_levels if self.training else oracle.eval_levels
        if not flags or not flags[index]:
            return model
        if mask is None:
            raise ValueError(f"target_mask must be given where level {index} picks patches by it, got None")
        own = level_mask(mask, size, self.config.touched_mask_value)
        logits = None if coarser is None else _resized(coarser.logits.detach(), size)
        score = ORACLE_SCORES[sampler.oracle_score](own, logits)
        if not (self.training and oracle.scheduled):
            return score
        return torch.where(draws.oracle_chance(index, len(target), target.device) < self.oracle_share, score, model)

    def _forward_level(
        self,
        index: int,
        target: Tensor,
        features: Tensor,
        picked: PatchSample,
        support: SupportTokens,
        support_height: int,
        coarser: Coarser | None,
    ) -> tuple[LevelOutput, Coarser]:
        level, cascade = self.levels[index], self.config.cascade
        r, scale = level.resolution, self.scale(level.resolution)
        tokens, maps = self.encoder(self._read(features, picked.coords, level).flatten(0, 1), scale)
        if coarser is not None and self.config.backbone.mask_prior != "none":
            prior = self._prior_patches(coarser.logits, picked.coords, r)
            tokens = self.fusion(tokens, self.mask_encoder(prior.flatten(0, 1)), "prior")
        support_tokens, registers, tokens = self.transformer(
            support.tokens,
            level.positions(support.coords, support_height).flatten(1, 2),
            support.registers,
            coarser.registers if coarser is not None and cascade.registers else None,
            tokens.unflatten(0, picked.coords.shape[:2]),
            level.positions(picked.coords, target.shape[-2]),
            keep_support=cascade.decode_support,
        )
        patches, confidence = self._decode(tokens, maps, scale)
        weighted = patches * self._selection_factor(picked, patches.dtype)
        prediction, covered, confidence = self.aggregation(weighted, picked.coords, r, confidence)
        combined = prediction
        if coarser is not None:
            combined = _resized(coarser.logits, (r, r)) + prediction.masked_fill(~covered, 0.0)
            if confidence is not None and coarser.confidence is not None:
                confidence = torch.where(covered, confidence, _resized(coarser.confidence, (r, r)))
        output = LevelOutput((r, r), combined, patches, picked.coords, Scatter(prediction, covered), support.coords)
        output.extras["registers"] = registers
        if confidence is not None:
            output.extras["confidence"] = confidence
        if support_tokens is not None:
            self._decode_support(output, support_tokens, support, scale)
        return output, Coarser(combined, confidence, registers)

    def _read(self, features: Tensor, coords: Tensor, level: Level) -> Tensor:
        samples = self.config.backbone.patch_grid
        return read_patches(features, coords, level.resolution, self.config.patch_size, samples, self.config.features)

    def _read_mask(self, masks: Tensor, coords: Tensor) -> Tensor:
        """Mask patches [..., K, 1, g, g] of masks [..., 1, r, r], sampled as features are."""
        samples, alignment = self.config.backbone.patch_grid, self.config.features.alignment
        return gather_patches(masks, coords, self.config.patch_size, out_size=samples, alignment=alignment)

    def _prior_patches(self, logits: Tensor, coords: Tensor, resolution: int) -> Tensor:
        prior = _resized(logits, (resolution, resolution))
        return self._read_mask(prior.sigmoid() if self.config.backbone.mask_prior == "probability" else prior, coords)

    def _selection_factor(self, picked: PatchSample, dtype: torch.dtype) -> Tensor | float:
        """What a patch's logits are multiplied by, so that the choice of patches gets gradients."""
        if picked.weights is None:
            return 1.0
        soft = (picked.weights * picked.weights.shape[1])[:, :, None, None, None]
        return (soft if self.config.sampler.differentiable == "published" else 1 + soft - soft.detach()).to(dtype)

    def _decode(self, tokens: Tensor, maps: dict[int, Tensor], scale: Tensor) -> tuple[Tensor, Tensor | None]:
        """tokens [B, N, D] and the encoder's maps [B * N, D, s, s] to logits and confidence [B, N, 1, p, p]."""
        skips = maps if self.config.backbone.skips else {}
        logits, confidence = self.decoder(tokens.flatten(0, 1), skips, scale)
        if self.config.confidence.source == "entropy":
            confidence = self.confidence(logits)
        shape = tokens.shape[:2]
        return logits.unflatten(0, shape), None if confidence is None else confidence.unflatten(0, shape)

    def _decode_support(self, output: LevelOutput, tokens: Tensor, support: SupportTokens, scale: Tensor) -> None:
        maps = {size: skip.flatten(0, 1) for size, skip in support.skips.items()}
        shape = support.coords.shape[:3]
        logits = self._decode(tokens, maps, scale)[0].unflatten(1, shape[1:])  # [B, S, K, 1, p, p]
        written, _, _ = self.aggregation(logits.flatten(0, 1), support.coords.flatten(0, 1), output.resolution[0])
        output.support_patch_logits = logits
        output.extras["support_prediction"] = written.unflatten(0, shape[:2])


def _read_per_image(source: Tensor, coords: Tensor, read: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """read(source [N, C, h, w], [N, K', 2]) for coords [B, S, K, 2], as [B, S, K, ...]; N is B * S, or S for all B."""
    batch, images, count, _ = coords.shape
    repeats = batch * images // source.shape[0]
    grouped = coords.unflatten(0, (repeats, -1)).permute(1, 2, 0, 3, 4)  # [B / repeats, S, repeats, K, 2]
    patches = read(source, grouped.reshape(source.shape[0], repeats * count, 2))
    patches = patches.reshape(batch // repeats, images, repeats, count, *patches.shape[2:])
    return patches.movedim(2, 0).flatten(0, 1)


def _resized(map_: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(map_, size, mode="bilinear", align_corners=False)
