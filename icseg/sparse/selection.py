"""Which patches of support and target are worth encoding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg.draws import uniform
from icseg.sparse.grid import PATCH
from icseg_kernels import gumbel_topk

SCORE_FLOOR = 0.003  # keeps certain regions pickable in a draw


def support_patches(mask: Tensor, count: int, foreground_share: float, seed: int | None) -> Tensor:
    """Grid indices [N, min(count, cells)] for support masks [N, 1, h, w] in [0, 1].

    A share goes to boundary cells, then foreground; the rest to background, near the foreground first. Equals are
    broken at random by `seed`; without one by the same fixed draw for every image, so that the order of the support
    set does not matter.
    """
    highest = F.max_pool2d(mask, PATCH)
    lowest = -F.max_pool2d(-mask, PATCH)
    near = F.max_pool2d(highest, 3, 1, 1).flatten(1) > 0.3
    touched, mixed = (highest > 0.3).flatten(1), (lowest < 0.7).flatten(1)
    cells = touched.shape[1]
    if count >= cells:
        return torch.arange(cells, device=mask.device).expand(mask.shape[0], -1)
    shape = (2, cells) if seed is None else (2 * mask.shape[0], cells)
    chance = uniform(0 if seed is None else seed, *shape, mask.device).view(2, -1, cells)
    foreground = round(foreground_share * count)
    first = torch.where(touched, 1 + mixed.to(mask.dtype) + 1.5 * chance[0], chance[0])
    chosen = first.topk(foreground, 1).indices
    second = (chance[1] + 0.35 * near).expand_as(first).scatter(1, chosen, -1.0)
    return torch.cat([chosen, second.topk(count - foreground, 1).indices], 1)


def entropy_score(logits: Tensor) -> Tensor:
    """[B, cells]: mean binary entropy (nats) of each grid cell of [B, 1, h, w] logits, plus a tenth of its maximum."""
    logits = logits.float()
    entropy = F.softplus(logits) - logits * logits.sigmoid()
    return (F.avg_pool2d(entropy, PATCH) + 0.1 * F.max_pool2d(entropy, PATCH)).flatten(1)


def target_patches(score: Tensor, count: int, power: float, seed: int | None) -> Tensor:
    """Grid indices [B, min(count, cells)] of the highest scores [B, cells] >= 0; with a seed, a draw by score^power."""
    cells = score.shape[1]
    if count >= cells:
        return torch.arange(cells, device=score.device).expand(score.shape[0], -1)
    weight = power * (score + SCORE_FLOOR).log()
    return gumbel_topk(weight, count, seed=seed, noise=0 if seed is None else None).indices
