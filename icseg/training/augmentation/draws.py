"""Random parameters of a task's images: one for all of them, or one for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class ParameterDraws:
    """Parameters [images], all equal where they are `shared`."""

    rng: np.random.Generator
    images: int
    shared: bool

    @property
    def count(self) -> int:
        """Independent draws of each parameter."""
        return 1 if self.shared else self.images

    def happens(self, probability: float) -> NDArray[np.bool_]:
        """For which images an operation of this probability is carried out."""
        return self.spread(self.rng.random(self.count) < probability)

    def uniform(self, limit: float) -> NDArray[np.float64]:
        """Uniform in [-limit, limit]."""
        return self.spread(self.rng.uniform(-limit, limit, self.count))

    def up_to(self, limit: float) -> NDArray[np.float64]:
        """Uniform in [0, limit]."""
        return self.spread(self.rng.uniform(0, limit, self.count))

    def spread(self, values: NDArray) -> NDArray:
        """[count, ...] to [images, ...]."""
        return np.broadcast_to(values, (self.images, *values.shape[1:]))


def change(x: Tensor, chosen: NDArray[np.bool_], operation: Callable[..., Tensor], *parameters: NDArray) -> Tensor:
    """x [N, ...] with its chosen images replaced by operation(images, *parameters), [n, 1, 1, 1] float32 each."""
    if not chosen.any():
        return x
    columns = [torch.tensor(p[chosen], dtype=torch.float32, device=x.device).view(-1, 1, 1, 1) for p in parameters]
    if chosen.all():
        return operation(x, *columns)
    index = torch.tensor(np.flatnonzero(chosen), device=x.device)
    return x.index_copy(0, index, operation(x[index], *columns))
