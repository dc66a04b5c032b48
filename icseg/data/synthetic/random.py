"""Random numbers as a pure function of a task's seed and the place of the draw in the code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


_Words = TypeVar("_Words", int, Tensor)


def _mixed(x: _Words) -> _Words:
    """A bijection of 32-bit words, numbers or int64 tensors: every bit of the result depends on every bit of x.

    Both factors lie below 2^31: no product leaves int64.
    """
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & _WORD
    x = ((x ^ (x >> 12)) * 0x297A2D39) & _WORD
    return x ^ (x >> 15)


class Draws:
    """Draws for a batch of tasks, one leading dimension T.

    The n-th draw of a task depends on its seed and on n alone: not on the other tasks of the batch, and on the device
    only by the rounding of logarithms and cosines.
    """

    def __init__(self, seeds: Tensor, path: int = 0) -> None:
        """seeds: int64 [T] of at least 0; path: sets apart the draws of different parts of the code."""
        self.seeds, self.path, self._count = seeds, path, 0

    @property
    def device(self) -> torch.device:
        return self.seeds.device

    def __len__(self) -> int:
        return len(self.seeds)

    def of(self, tasks: Tensor, part: int) -> Draws:
        """New draws for some of the tasks, int64 [t], in `part` (0 to 29) of the code."""
        return Draws(self.seeds[tasks], (self.path * 31 + part + 1) % 2**31)

    def _words(self, shape: Sequence[int]) -> Tensor:
        self._count += 1
        # Seeds and streams are small numbers: each is mixed before they meet, or near ones would cancel out.
        stream = _mixed((self.path * _GOLDEN + self._count) & _WORD)
        first = _mixed(_mixed(_mixed((self.seeds & _WORD) ^ _GOLDEN) ^ (self.seeds >> 32)) ^ stream)
        second = _mixed((first + self.seeds + stream) & _WORD)
        element = torch.arange(math.prod(shape), device=self.device)
        words = _mixed((element + first.unsqueeze(1)) & _WORD)
        return _mixed(words ^ second.unsqueeze(1)).view(len(self), *shape)

    def uniform(self, low: float | Tensor, high: float | Tensor, *shape: int) -> Tensor:
        """[T, *shape] float32 in (low, high), which broadcast to it."""
        unit = ((self._words(shape) >> 9).float() + 0.5) * 2.0**-23
        return low + (high - low) * unit

    def log_uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """[T, *shape] whose logarithm is uniform."""
        return self.uniform(math.log(low), math.log(high), *shape).exp()

    def normal(self, deviation: float | Tensor, *shape: int) -> Tensor:
        """[T, *shape] normal float32 (Box and Muller 1958) of mean 0; `deviation` broadcasts to it."""
        length = (-2 * self.uniform(0.0, 1.0, *shape).log()).sqrt()
        return deviation * length * (self.uniform(0.0, 2 * math.pi, *shape)).cos()

    def white(self, *shape: int) -> Tensor:
        """[T, *shape] uniform noise of mean 0 and deviation 1 in 256 steps: for large fields, four values a word."""
        count = math.prod(shape)
        words = self._words((-(-count // 4),)) - 2**31
        values = words.to(torch.int32).view(torch.uint8)[:, :count].view(len(self), *shape)
        return (values.float() - 127.5) * (math.sqrt(12) / 256)

    def integers(self, low: int, high: int | Tensor, *shape: int) -> Tensor:
        """[T, *shape] int64 in [low, high); high broadcasts to it."""
        spread = high - low
        return low + (self.uniform(0.0, 1.0, *shape) * spread).long().clamp(max=spread - 1)

    def chance(self, probability: float | Tensor, *shape: int) -> Tensor:
        """[T, *shape] bool."""
        return self.uniform(0.0, 1.0, *shape) < probability

    def choice(self, values: Sequence[float], *shape: int) -> Tensor:
        """[T, *shape] of the values' dtype, each of `values` as often."""
        return torch.tensor(values, device=self.device)[self.integers(0, len(values), *shape)]
