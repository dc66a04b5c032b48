"""The temperature that makes a trained model's probabilities agree with its validation tasks."""

from __future__ import annotations

import math

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from icseg.training.batches import Tasks, validation_batch

MOST_PIXELS = 2_000_000
_LOG_BOUNDS = (-2.0, 2.0)


def fit_temperature(model: nn.Module, pool: Tasks, support: int, device: torch.device) -> float:
    """The T that minimises the mean cross-entropy of sigmoid(logits / T) on class 1 of the tasks, log T in [-2, 2].

    model: in evaluation mode, its own temperature 1. At most MOST_PIXELS pixels are compared, the same for each call.
    """
    logits, masks = _pixels(model, pool, support, device)

    def cross_entropy(log_temperature: float) -> float:
        return binary_cross_entropy_with_logits(logits * math.exp(-log_temperature), masks).item()

    return math.exp(minimize_scalar(cross_entropy, bounds=_LOG_BOUNDS, method="bounded").x)


@torch.no_grad()
def _pixels(model: nn.Module, pool: Tasks, support: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """[P] logits and mask values of the targets, as many of each task, drawn where there are too many."""
    generator = torch.Generator().manual_seed(0)
    share = MOST_PIXELS // len(pool)
    logits, masks = [], []
    for i in range(len(pool)):
        batch = validation_batch(pool[i], support).to(device)
        memory = model.encode_support(batch.support_images, batch.support_masks)  # type: ignore[operator]
        predicted = model(batch.targets, memory=memory).logits.flatten().cpu().double()
        chosen = torch.randperm(len(predicted), generator=generator)[:share]
        logits.append(predicted[chosen])
        masks.append(batch.target_masks.flatten().cpu().double()[chosen])
    return torch.cat(logits), torch.cat(masks)
