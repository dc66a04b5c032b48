"""The Dice of a model in training on held-out tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from icseg.metrics import dice
from icseg.training.batches import Tasks, validation_batch


@torch.no_grad()
def validate(model: nn.Module, pool: Tasks, support: int, device: torch.device) -> dict[str, Any]:
    """Mean Dice of `model` (in evaluation mode) over the targets of the tasks in `pool`, class 1 alone.

    Returns {"dice": at the full size, "level_dice": [each level's combined map brought to the full size]}. A level
    counts in the tasks whose images are large enough to have it.
    """
    final: list[float] = []
    levels: list[list[float]] = []
    for i in range(len(pool)):
        batch = validation_batch(pool[i], support).to(device)
        memory = model.encode_support(batch.support_images, batch.support_masks)  # type: ignore[operator]
        output = model(batch.targets, memory=memory)
        size = batch.targets.shape[-2:]
        maps = [nn.functional.interpolate(level.logits.float(), size, mode="bilinear") for level in output.levels]
        scores = torch.stack([dice(m > 0, batch.target_masks > 0).mean() for m in [*maps, output.logits]]).tolist()
        final.append(scores.pop())
        levels += [[] for _ in range(len(scores) - len(levels))]
        for of_level, score in zip(levels, scores, strict=False):
            of_level.append(score)
    return {"dice": _mean(final), "level_dice": [_mean(scores) for scores in levels]}


def _mean(scores: list[float]) -> float:
    return sum(scores) / len(scores)
