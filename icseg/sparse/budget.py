"""How much a target may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from icseg.config import check_int


@dataclass(frozen=True)
class Budget:
    """What bounds the patches of a target; exactly one of the three is given.

    patches:   so many in all, the coarsest level's included (which is tiled completely, however few they are).
    gflops:    as many as fit into so many GFLOPs a target (10^9 multiplications and additions), the support set aside.
    tolerance: adaptive, as many as seem worth it: where the expected error that more patches of a level could mend,
               by what those before have mended, is at most this share of twice the expected foreground, they are not
               taken; more than that may stay uncovered. 0 covers everything.
    """

    patches: int | None = None
    gflops: float | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"budget must name one of patches, gflops and tolerance, got {', '.join(given) or 'none'}")
        if self.patches is not None:
            check_int("patches", self.patches, 1)
        for name in ("gflops", "tolerance"):
            value = getattr(self, name)
            if value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def as_budget(value: Any) -> Budget:
    """A Budget as it is, an integer as patches. Raises TypeError for anything else, ValueError below 1."""
    if isinstance(value, Budget):
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"budget must be None, an integer or a Budget, got {value!r}")
    if value < 1:
        raise ValueError(f"budget must be at least 1 patch, got {value}")
    return Budget(patches=int(value))


@dataclass(frozen=True)
class LevelPlan:
    """rounds: patches of each round at a level; tolerance: of an adaptive budget, None: all of them are taken."""

    rounds: tuple[int, ...]
    tolerance: float | None = None


def shared_out(patches: int, cells: list[int], weights: tuple[int, ...]) -> list[int]:
    """`patches` over levels of so many `cells`: all of the first, then by `weights`; what one cannot use goes on."""
    shares = [cells[0]]
    left = max(0, patches - cells[0])
    for level in range(1, len(cells)):
        wanted = round(left * weights[level] / sum(weights[level : len(cells)]))
        shares.append(min(wanted, cells[level]))
        left -= shares[-1]
    return shares
