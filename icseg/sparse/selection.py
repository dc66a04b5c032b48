"""Which patches of support and target are worth encoding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg.draws import uniform
from icseg.sparse.patches import PATCH
from icseg_kernels import gumbel_topk

TOUCHED, FULL = 0.3, 0.7  # shares of a pixel above which a mask touches it, and fills it
NEIGHBOUR_ERROR = 0.5  # error that a change of probability suggests in the cells beside it
SCORE_FLOOR = 0.01  # of the highest score: keeps certain regions pickable in a draw


def support_patches(mask: Tensor, count: int, foreground_share: float, seed: int | None) -> Tensor:
    """Grid indices [N, min(count, cells)] for support masks [N, classes, h, w] in [0, 1].

    A share goes to boundary cells, then foreground, in turn for each class; the rest to background, near the foreground
    first. Equals are broken at random by `seed`; without one by the same fixed draw for every image, so that the order
    of the support set does not matter.
    """
    images, classes = mask.shape[:2]
    lowest, highest = _extremes(mask)
    touched, mixed = (highest > TOUCHED).flatten(2), (lowest < FULL).flatten(2)  # [N, classes, cells]
    near = F.max_pool2d(highest.amax(1, keepdim=True), 3, 1, 1).flatten(1) > TOUCHED
    cells = touched.shape[2]
    if count >= cells:
        return torch.arange(cells, device=mask.device).expand(images, -1)
    shape = (2, cells) if seed is None else (2 * images, cells)
    chance = uniform(0 if seed is None else seed, *shape, mask.device).view(2, -1, cells).to(mask.dtype)
    foreground = round(foreground_share * count)
    wanted = torch.where(touched, 1 + mixed.to(mask.dtype) + 1.5 * chance[0].unsqueeze(1), chance[0].unsqueeze(1))
    if classes > 1:  # in turn: the best of every class first
        turn = wanted.argsort(2, descending=True).argsort(2)
        turn = torch.where(touched, turn, turn + cells).amin(1)
        wanted = -(turn + chance[0]).unsqueeze(1)
    chosen = wanted[:, 0].topk(foreground, 1).indices
    rest = (chance[1] + 0.35 * near).expand(images, -1).scatter(1, chosen, -1.0)
    return torch.cat([chosen, rest.topk(count - foreground, 1).indices], 1)


def _extremes(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value [N, C, rows, columns] in each cell of [N, C, h, w]; faster on CPUs than max_pool2d."""
    height, width = mask.shape[2:]
    if height % PATCH or width % PATCH:
        mask = F.pad(mask, (0, -width % PATCH, 0, -height % PATCH), mode="replicate")
    strips = mask.unflatten(2, (-1, PATCH))
    return strips.amin(3).unflatten(3, (-1, PATCH)).amin(4), strips.amax(3).unflatten(3, (-1, PATCH)).amax(4)


def target_patches(score: Tensor, count: int, power: float, seed: int | None) -> Tensor:
    """Grid indices [B, min(count, cells)] of the highest scores [B, cells], those below 0 never.

    With a seed a draw by score^power. Where too few are left, -1. NaN, of an image with such pixels, counts as 0.
    """
    score = score.nan_to_num()
    count = min(count, score.shape[1])
    if seed is None:
        return gumbel_topk(score.masked_fill(score < 0, -torch.inf), count, noise=0).indices
    floor = SCORE_FLOOR * score.amax(1, keepdim=True).clamp_min(1e-12)
    weight = torch.where(score < 0, -torch.inf, power * (score.clamp_min(0) + floor).log())
    return gumbel_topk(weight, count, seed=seed).indices


def reducible_share(score: Tensor, index: Tensor, after: Tensor) -> Tensor:
    """[B, 1] in [0, 1]: the share of the expected error that the picks `index` [B, K] mended, so that others might.

    score [B, cells]: the error expected before; after [B, K]: in the picks, the error expected now. 0 without picks.
    """
    picked = index >= 0
    before = torch.where(picked, at(score, index), 0).sum(1, keepdim=True)
    left = torch.where(picked, after, 0).sum(1, keepdim=True)
    return torch.where(before > 0, 1 - left / before.clamp_min(1e-12), 0).clamp(0, 1)


def second_look(score: Tensor, change: Tensor, index: Tensor, grid: tuple[int, int]) -> Tensor:
    """`score` [B, cells], raised beside picks `index` [B, K] whose prediction changed, by `change` [B, K]."""
    changed = on_grid(change, index, score.shape[1]).unflatten(1, (1, *grid))
    return torch.maximum(score, NEIGHBOUR_ERROR * F.max_pool2d(changed, 3, 1, 1).flatten(1))


def at(values: Tensor, index: Tensor) -> Tensor:
    """values [B, cells] or [B, C, cells] at the cells `index` [B, K]; what stands for -1 means nothing."""
    index = index.clamp_min(0)
    return values.gather(-1, index if values.ndim == 2 else index.unsqueeze(1).expand(-1, values.shape[1], -1))


def on_grid(values: Tensor, index: Tensor, cells: int) -> Tensor:
    """[B, cells]: values [B, K] at the cells `index` [B, K], 0 elsewhere; -1 is no cell."""
    grid = values.new_zeros(values.shape[0], cells + 1)
    return grid.scatter(1, torch.where(index < 0, cells, index), values)[:, :cells]
