"""The sparse PatchICL: a cascade over levels in which only picked patches are ever encoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icseg.draws import derived_seed, uniform
from icseg.masks import level_mask
from icseg.memory import SupportMemory
from icseg.output import LevelOutput, SegmentationOutput
from icseg.sparse import fused, selection
from icseg.sparse.budget import Budget, LevelPlan, shared_out
from icseg.sparse.cascade import Cascade, LevelTask, Round
from icseg.sparse.config import SparseConfig
from icseg.sparse.cost import affordable
from icseg.sparse.decoder import PatchDecoder
from icseg.sparse.encoder import Block, PatchEncoder, visible
from icseg.sparse.patches import (
    CONTEXT,
    CROP,
    HALO,
    PATCH,
    context_corner,
    coords_of,
    cut,
    grid_size,
    patch_inputs,
)
from icseg.sparse.propagation import LabelPropagation
from icseg.sparse.pyramid import Pyramid, finest_size, level_count, to_size
from icseg.sparse.static import is_static
from icseg.sparse.support import (
    BUDGET_DRAW,
    ORACLE_DRAW,
    ROUND_DRAW,
    TARGET_DRAW,
    LevelMemory,
    SupportEncoder,
    memory_levels,
)
from icseg_kernels import scatter_patches, upsample_with_patches

CHUNK = 16  # support images that go through the patch encoder together
LEAST_FOREGROUND = 0.002  # share of the image that an expected foreground counts at least


class SparseNetwork(nn.Module):
    """Nothing here convolves a whole image, and nothing on the support side sees the target."""

    multi_class = True
    any_size = True
    temperature: Tensor

    def __init__(self, config: SparseConfig) -> None:
        super().__init__()
        self.config = config
        self.training_progress = 0.0
        self.fingerprint = config.fingerprint()
        self.weights_identity = ""
        levels = config.distinct_levels
        self.encoder = PatchEncoder(config.dim, config.stem_channels, levels)
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, config.mlp_ratio) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.propagation = LabelPropagation(
            config.dim,
            config.stem_channels,
            config.propagation_heads,
            config.propagation_key_dim,
            config.propagation_value_dim,
        )
        self.decoder = PatchDecoder(
            config.dim,
            config.stem_channels,
            config.decoder_channels,
            config.propagation_heads,
            levels,
            config.residual_bound,
        )
        self.support_registers = nn.Parameter(torch.randn(1, config.registers, config.dim) * 0.1)
        self.target_registers = nn.Parameter(torch.randn(1, config.registers, config.dim) * 0.1)
        self.register_buffer("temperature", torch.ones(()))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on CPUs

    def set_training_progress(self, share: float) -> None:
        """How much of the training is over, in [0, 1]: sets the share of targets whose patches the true error picks."""
        self.training_progress = share

    def set_temperature(self, value: float) -> None:
        """Divide all final logits by `value`: a calibration on held-out tasks."""
        self.temperature.fill_(value)

    def support_encoder(self, count: int, *, seed: int | None = None) -> SupportEncoder:
        """For a support set of `count` images that come in chunks."""
        return SupportEncoder(self, count, seed)

    def encode_support(
        self, images: Tensor, masks: Tensor, *, valid: Tensor | None = None, seed: int | None = None
    ) -> SupportMemory:
        """images [B, S, 1, H, W], masks [B, S, C, H, W] in [0, 1]; `seed` varies which patches stand for equals."""
        if valid is None and seed is None and images.shape[1] <= CHUNK:
            weights = fused.weights_for_support(self, images, masks)
            if weights is not None:
                return fused.encode_support(self, weights, images, masks)
        encoder = self.support_encoder(images.shape[1], seed=seed)
        for start in range(0, images.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            encoder.add(images[:, part], masks[:, part], None if valid is None else valid[:, part])
        return encoder.finish()

    def forward(
        self,
        target: Tensor,
        memory: SupportMemory,
        *,
        target_mask: Tensor | None = None,
        seed: int | None = None,
        noise: Sequence[Tensor] | None = None,
        budget: Budget | None = None,
    ) -> SegmentationOutput:
        if noise is not None:
            raise NotImplementedError("noise must be None for the sparse architecture, which draws by seed")
        config = self.config
        height, width = target.shape[-2:]
        levels = min(level_count(height, width, config.levels), memory_levels(memory))
        image = to_size(target, finest_size(height, width, config.levels[levels - 1]))
        pyramid = Pyramid.of(image, levels)
        grids = [grid_size(*pyramid.image(level).shape[-2:]) for level in range(levels)]
        plans = self._plans(budget, memory, [rows * columns for rows, columns in grids], seed)
        if target_mask is None and seed is None:
            weights = fused.weights_for_target(self, image, memory, grids, plans)
            if weights is not None:
                return fused.forward(self, weights, pyramid, memory, plans, (height, width))
        state = Cascade([[] for _ in self.blocks])
        outputs = []
        for level, plan in enumerate(plans):
            support = LevelMemory.of(memory, level, config.depth, target.shape[0])
            draw = None if seed is None else derived_seed(seed, TARGET_DRAW, level)
            task = LevelTask(level, pyramid, support, memory.classes, plan, draw, target_mask)
            outputs.append(self._level(task, state))
        logits = to_size(outputs[-1].logits, (height, width)) / self.temperature.to(target.dtype)
        return SegmentationOutput(logits, outputs, uncovered_error=state.uncovered)

    def _plans(
        self, budget: Budget | None, memory: SupportMemory, cells: list[int], seed: int | None
    ) -> list[LevelPlan]:
        """How many patches each level of so many `cells` gets."""
        config = self.config
        if self.training and budget is not None:
            raise ValueError("budget must be None in training, where each level draws from its target_patches")
        if self.training:
            most = config.target_patches[: len(cells)]
            draws = [0 if seed is None else derived_seed(seed, BUDGET_DRAW, level) for level in range(len(most))]
            return [LevelPlan((n - draw % (n // 2 + 1),)) for n, draw in zip(most, draws, strict=True)]
        if budget is None:
            budget = Budget(tolerance=config.tolerance)
        if budget.tolerance == 0:
            return [LevelPlan((count,)) for count in cells]
        if budget.tolerance is not None:
            first = [config.exploration[min(level, len(config.exploration) - 1)] for level in range(len(cells))]
            most = config.target_patches if is_static() else (config.most_patches,) * len(cells)
            repeats = [1 if is_static() else -(-count // config.most_patches) for count in cells]  # until all are taken
            rounds = zip(first, most, repeats, strict=False)
            return [LevelPlan((few, config.trial, *[n] * times), budget.tolerance) for few, n, times in rounds]
        if budget.gflops is not None:
            return [LevelPlan((count,)) for count in affordable(self, memory, cells, budget.gflops)]
        assert budget.patches is not None
        return [LevelPlan((count,)) for count in shared_out(budget.patches, cells, config.target_patches)]

    def _level(self, task: LevelTask, state: Cascade) -> LevelOutput:
        rows, columns = task.grid
        batch = task.pyramid.images[0].shape[0]
        if state.logits is None or state.error is None:
            index = torch.arange(rows * columns, device=task.pyramid.images[0].device).expand(batch, -1)
            rounds = [self._round(task, state, index, None)]
            state.uncovered = torch.zeros(batch, device=index.device)
        else:
            rounds = self._picked_rounds(task, state, state.error, expected_foreground(state.logits))
        coords = torch.cat([r.coords for r in rounds], 1)
        patch_logits = torch.cat([r.logits for r in rounds], 1)
        errors = torch.cat([r.error for r in rounds], 1)
        logits = _refined(state.logits, patch_logits, coords, task.size)
        state.logits = logits.detach()
        if task.level < len(task.pyramid.details):
            state.error = _next_error(state.error, errors.detach(), coords, task.pyramid.image(task.level + 1))
        return LevelOutput(task.size, logits, patch_logits, coords, extras={"error_logits": errors})

    def _picked_rounds(self, task: LevelTask, state: Cascade, error: Tensor, foreground: Tensor) -> list[Round]:
        """The rounds of a level but the first; empty rounds are left out where shapes may depend on values."""
        config, plan = self.config, task.plan
        rounds: list[Round] = []
        # Errors as shares of twice the expected foreground; a cell at the border counts by its pixels in the image.
        share_of_mean = (task.cell_shares / (2 * foreground)).expand_as(error)
        expected = (error * share_of_mean).amax(1).flatten(1)
        worth = self._training_score(task, state, expected) if self.training else expected
        covered = torch.zeros_like(expected, dtype=torch.bool)
        worthwhile = torch.zeros_like(covered[:, :1])
        for number, slots in enumerate(plan.rounds):
            least = plan.tolerance / config.patches_of_tolerance if plan.tolerance is not None and number else 0.0
            left = torch.where(covered | (worth < least), -1.0, worth)
            enough: Tensor | None = None
            if plan.tolerance is not None:
                enough = left.clamp_min(0).sum(1, keepdim=True) > plan.tolerance
                if number == 0 and task.level >= config.distinct_levels and state.worthwhile is not None:
                    enough = enough & state.worthwhile
                if not is_static() and not enough.any():
                    break
            draw = None if task.seed is None else derived_seed(task.seed, ROUND_DRAW, number)
            index = selection.target_patches(left, slots, config.selection_power, draw)
            valid: Tensor | None = None
            if enough is not None:
                index, valid = _kept(index, (index >= 0) & enough)
            if index.shape[1] == 0:
                break
            if number:
                worthwhile = worthwhile | (index >= 0).any(1, keepdim=True)
            picked = self._round(task, state, index, valid)
            rounds.append(picked)
            covered = covered | (selection.on_grid(torch.ones_like(index), index, task.cells) > 0)
            if number + 1 < len(plan.rounds):
                share = share_of_mean.flatten(2)  # [B, C, cells]
                after = picked.error.detach().sigmoid().mean((3, 4)).transpose(1, 2)  # [B, C, K]
                mended = selection.reducible_share(expected, index, (after * selection.at(share, index)).amax(1))
                change = picked.change * selection.at(share.amax(1), index)
                worth = mended * selection.second_look(expected, change, index, task.grid)
        state.uncovered = expected.masked_fill(covered, 0).sum(1)
        state.worthwhile = worthwhile | covered.all(1, keepdim=True)
        return rounds or [_no_patches(task)]

    def _round(self, task: LevelTask, state: Cascade, index: Tensor, valid: Tensor | None) -> Round:
        """Encode and decode the grid cells `index` [B, K]; valid [B, K]: those that are patches, None for all."""
        config, coarser = self.config, state.logits
        coords = coords_of(index, task.grid[1])
        batch, count = index.shape
        if coarser is None:
            crops = task.pyramid.images[0].new_zeros(batch, count, task.classes, CROP, CROP)
            around = torch.zeros_like(crops)
        else:
            crops = cut(coarser, coords // 2 - HALO // 2, CROP // 2, CROP)
            around = cut(coarser, 2 * context_corner(coords), 2 * CONTEXT, CONTEXT)
        label, label_context = (x.amax(2, keepdim=True).sigmoid() * 2 - 1 for x in (crops, around))
        inputs = patch_inputs(task.pyramid, task.level, coords, label, label_context)
        features, tokens = self.encoder(inputs, task.level, is_target=True)
        tokens = self._attend(tokens, task.support, state, valid)
        cells = task.support.visible_cells(config.registers)
        masks, context = self.propagation(features, tokens, task.support.keys, task.support.values, cells)
        prior = crops[..., HALO : HALO + PATCH, HALO : HALO + PATCH].flatten(0, 1)
        decoded = self.decoder(features, tokens, masks, context, prior, task.level)
        logits = prior + decoded.change
        change = (logits.detach().sigmoid() - prior.sigmoid()).abs().mean((2, 3)).amax(1)
        shape = (batch, count)
        error = decoded.error.unflatten(0, shape)
        return Round(coords, logits.unflatten(0, shape), error, change.view(shape), valid)

    def _attend(self, tokens: Tensor, support: LevelMemory, state: Cascade, valid: Tensor | None) -> Tensor:
        """Let a round's tokens see the support set, the target's tokens before them, and each other."""
        registers = self.target_registers.expand(tokens.shape[0], -1, -1)
        count, tokens = tokens.shape[1], torch.cat([registers, tokens], 1)
        if valid is not None:  # a target that takes no patch in this round has no registers in it either
            valid = torch.cat([valid.any(1, keepdim=True).expand(-1, registers.shape[1]), valid], 1)
        lengths = [support.blocks[0].shape[1], *state.lengths, tokens.shape[1]]
        index = visible([support.valid, *state.valid, valid], lengths, tokens.shape[0], tokens.device)
        for block, of_support, earlier in zip(self.blocks, support.blocks, state.blocks, strict=True):
            tokens, own = block(tokens, [of_support, *earlier], index)
            earlier.append(own.detach())
        state.valid.append(valid)
        state.lengths.append(tokens.shape[1])
        return self.norm(tokens[:, -count:])

    @torch.no_grad()
    def _training_score(self, task: LevelTask, state: Cascade, score: Tensor) -> Tensor:
        """In place of the expected error of each cell, the true one for a share of the targets, none for another."""
        if task.target_mask is None or task.seed is None or state.logits is None:
            return score
        config = self.config
        doubled = F.interpolate(state.logits, scale_factor=2.0, mode="bilinear", align_corners=False)
        prior = doubled[..., : task.size[0], : task.size[1]].sigmoid()
        error = (prior - level_mask(task.target_mask.to(prior.dtype), task.size, 0.0)).abs().mean(1, keepdim=True)
        oracle = F.avg_pool2d(error, PATCH, ceil_mode=True).flatten(1)
        chance = uniform(derived_seed(task.seed, ORACLE_DRAW), 1, score.shape[0], score.device).view(-1, 1)
        end = config.oracle_share if config.oracle_share_end is None else config.oracle_share_end
        by_truth = config.oracle_share + self.training_progress * (end - config.oracle_share)
        score = torch.where(chance < by_truth, oracle, score)
        return torch.where(chance > 1 - config.uniform_share, torch.ones_like(score), score)


@torch.no_grad()
def expected_foreground(logits: Tensor) -> Tensor:
    """[B, C, 1, 1]: share of the image, at least LEAST_FOREGROUND."""
    return logits.float().sigmoid().mean((2, 3), keepdim=True).clamp_min(LEAST_FOREGROUND)


def _refined(coarser: Tensor | None, patches: Tensor, coords: Tensor, size: tuple[int, int]) -> Tensor:
    """The coarser map [B, C, h, w] at `size`, with the patches [B, K, C, 8, 8] in place of it where they lie."""
    if coarser is None:
        return scatter_patches(patches, coords, size, fill=0.0).mean
    return upsample_with_patches(coarser, patches, coords, size)


def _next_error(error: Tensor | None, patches: Tensor, coords: Tensor, finer: Tensor) -> Tensor:
    """The error [B, C, rows, columns] expected in the cells of the next level, whose image is `finer`.

    error: of this level's cells, whose four parts inherit it where no patch lies. patches: [B, K, C, 8, 8] logits.
    """
    rows, columns = grid_size(*finer.shape[-2:])
    quarters = F.avg_pool2d(patches.sigmoid().flatten(0, 1), PATCH // 2).unflatten(0, patches.shape[:2])
    written = scatter_patches(quarters, coords // (PATCH // 2), (rows, columns), fill=0.0)
    if error is None:
        return written.mean
    inherited = error.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :rows, :columns]
    return torch.where(written.coverage, written.mean, inherited)


def _kept(index: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor | None]:
    """The picks [B, K] of which `wanted` [B, K] are kept, in front, and which entries are picks; None: all.

    Where shapes may depend on values, K shrinks to the most that a target keeps.
    """
    if is_static():
        return torch.where(wanted, index, -1), wanted
    fewest, most = (int(count) for count in torch.aminmax(wanted.sum(1)))
    index, wanted = index[:, :most], wanted[:, :most]
    return torch.where(wanted, index, -1), None if fewest == most else wanted


def _no_patches(task: LevelTask) -> Round:
    image = task.pyramid.images[0]
    coords = torch.zeros(image.shape[0], 0, 2, dtype=torch.int64, device=image.device)
    patches = image.new_zeros(image.shape[0], 0, task.classes, PATCH, PATCH)
    return Round(coords, patches, patches, patches.flatten(2).sum(2), None)
