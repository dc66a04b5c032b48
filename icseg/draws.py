"""Random draws of a forward pass, each a function of its seed alone."""

from __future__ import annotations

import torch
from torch import Tensor

from icseg_kernels.philox import gumbel_noise


def derived_seed(seed: int, *path: int) -> int:
    """A seed in [0, 2^63) for one draw among many: `path` says which (purpose, level, slice, ...).

    Mixed by SplitMix64 (Steele et al. 2014), so that nested derivations do not meet as sums would.
    """
    for step in path:
        seed = _mix(seed ^ _mix(step))
    return seed >> 1


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def uniform(seed: int, rows: int, elements: int, device: torch.device) -> Tensor:
    """[rows, elements] uniforms in (0, 1) of the kernels' random-number contract."""
    return torch.exp(-torch.exp(-gumbel_noise(seed, rows, elements, device=device)))
