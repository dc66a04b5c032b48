"""What makes a window worth picking, and the draws of one forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from icseg.draws import derived_seed, uniform

_EPSILON = 1e-6


def precise(x: Tensor) -> Tensor:
    """In float32 at least: in 16 bits 1 - 1e-6 is 1."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def binary_entropy(probability: Tensor) -> Tensor:
    """Entropy of a Bernoulli variable in bits, in [0, 1], in float32 or float64.

    Probabilities are clamped to [1e-6, 1 - 1e-6].
    """
    p = precise(probability).clamp(_EPSILON, 1 - _EPSILON)
    return -(p * p.log() + (1 - p) * (1 - p).log()) / math.log(2)


def half_entropy(probability: Tensor) -> Tensor:
    """Half the probability, half its entropy: foreground counts, and its border more. In float32 or float64."""
    p = precise(probability).clamp(_EPSILON, 1 - _EPSILON)
    return 0.5 * p + 0.5 * binary_entropy(p)


def _error(mask: Tensor, coarser: Tensor | None) -> Tensor:
    if coarser is None:
        return mask
    return (precise(coarser).sigmoid() - precise(mask).clamp(_EPSILON, 1 - _EPSILON)).abs()


# Of a target's true mask [B, 1, r, r] and the coarser logits at that resolution, None at the first level.
ORACLE_SCORES: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "foreground": lambda mask, coarser: mask,
    "foreground_entropy": lambda mask, coarser: half_entropy(mask),
    "error": _error,
}

# Of the coarser combined logits and confidence map, both [B, 1, h, w] (the latter None if there is none).
MODEL_SCORES: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "entropy": lambda logits, confidence: binary_entropy(precise(logits).sigmoid()),
    "foreground_entropy": lambda logits, confidence: half_entropy(precise(logits).sigmoid()),
    "confidence": lambda logits, confidence: 1 - _given(confidence),
    "uniform": lambda logits, confidence: torch.ones_like(logits),
}

# Of support masks [N, 1, r, r].
SUPPORT_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "foreground": lambda mask: mask,
    "foreground_entropy": half_entropy,
    "uniform": torch.ones_like,
}


def _given(confidence: Tensor | None) -> Tensor:
    if confidence is None:
        raise ValueError("confidence must be a map, got None")
    return confidence


class Draws:
    """Where the noise of each sampler call of one forward pass comes from.

    Level i draws its target patches in call 2 i and its support patches in call 2 i + 1. `noise` holds
    uniforms in (0, 1), [rows, candidates] for each call; `seed` derives one seed a call. With neither,
    training draws from torch's generator, and evaluation takes the best windows. With `noise`, the oracle's share
    still comes from torch's generator; dropout always does.
    """

    def __init__(self, levels: int, training: bool, seed: int | None, noise: Sequence[Tensor] | None) -> None:
        if seed is not None and noise is not None:
            raise ValueError("seed and noise must not both be given")
        if noise is not None and len(noise) != 2 * levels:
            raise ValueError(f"noise must hold {2 * levels} tensors, two a level, got {len(noise)}")
        self.plain = not training and seed is None and noise is None
        self._levels, self._seed, self._noise = levels, seed, noise

    def source(self, call: int) -> dict[str, Tensor | float | int | None]:
        """The keyword argument of `sample_patches` that brings the noise of `call`."""
        if self._noise is not None:
            u = precise(self._noise[call]).clamp(_EPSILON, 1 - _EPSILON)
            return {"noise": -(-u.log()).log()}
        if self.plain:
            return {"noise": 0.0}
        return {"seed": None if self._seed is None else derived_seed(self._seed, call)}

    def oracle_chance(self, level: int, batch: int, device: torch.device) -> Tensor:
        """[B, 1, 1, 1] uniforms in (0, 1): a sample below the oracle's share is picked for by the oracle."""
        if self._seed is None:
            return torch.rand(batch, 1, 1, 1, device=device)
        return uniform(derived_seed(self._seed, 2 * self._levels + level), batch, 1, device).view(batch, 1, 1, 1)
