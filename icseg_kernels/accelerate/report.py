"""What `accelerate` did, in words and as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icseg_kernels.accelerate.rewrite import Rewritten

REWRITES = {
    "split": "split cross-convolution",
    "commute_mean": "mean commuted with linear maps",
    "drop_dead_support": "dead support path removed",
    "cache_support": "first support block cached",
    "max_memory": "support streamed in chunks",
}


@dataclass(frozen=True)
class Change:
    """One rewrite of one module.

    module: its name in the model, "" for the model itself; model: the kind recognised, or "".
    rewrite: the switch of `accelerate` that it belongs to; done: whether it was made; reason: why not, or a remark.
    """

    module: str
    model: str
    rewrite: str
    done: bool
    reason: str = ""


@dataclass(frozen=True)
class Cost:
    """Of one call: FLOPs that torch counts, bytes of tensors alive at its peak, median seconds."""

    flops: int
    peak_memory: int
    latency: float


@dataclass(frozen=True)
class Comparison:
    """One model on the same inputs before, after, and after with the support set seen before.

    max_difference: largest absolute difference of outputs; scale: the larger of 1 and the largest output;
    equal: whether max_difference is at most tolerance * scale.
    """

    max_difference: float
    scale: float
    tolerance: float
    equal: bool
    before: Cost
    after: Cost
    again: Cost


@dataclass
class Report:
    """models: kinds recognised; changes: one for each module and rewrite; comparison: None without example inputs."""

    models: tuple[str, ...]
    changes: tuple[Change, ...]
    _replaced: list[Rewritten] = field(repr=False)
    comparison: Comparison | None = None
    undone: bool = False

    def undo(self) -> None:
        """Take every rewrite back; a second time does nothing.

        Raises RuntimeError if a forward has been replaced since, and changes nothing then.
        """
        if self.undone:
            return
        for rewritten in self._replaced:
            own = rewritten.module.__dict__.get("forward")
            if own is not None and getattr(own, "__self__", None) is not rewritten:
                kind = type(rewritten.module).__name__
                raise RuntimeError(f"forward of {kind} must be that of accelerate, got another one")
        self.forget()
        for rewritten in self._replaced:
            rewritten.remove()
        self._replaced.clear()
        self.undone = True

    def forget(self) -> None:
        """Free what is kept of support sets."""
        for rewritten in self._replaced:
            rewritten.forget()

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "models": list(self.models),
            "changes": [asdict(change) for change in self.changes],
            "comparison": None if self.comparison is None else asdict(self.comparison),
            "undone": self.undone,
        }

    def __str__(self) -> str:
        lines = [f"recognised: {', '.join(self.models) or 'no model'}"]
        groups: dict[tuple[str, str, bool, str], int] = {}
        for c in sorted(self.changes, key=lambda change: list(REWRITES).index(change.rewrite)):
            key = (c.model, c.rewrite, c.done, c.reason)
            groups[key] = groups.get(key, 0) + 1
        for (_, rewrite, done, reason), count in groups.items():
            times = f" in {count} modules" if count > 1 else ""
            lines.append(f"  {'yes' if done else 'no '}  {REWRITES[rewrite]}{times}{reason and f': {reason}'}")
        if not self.changes:
            lines.append("  nothing to rewrite: no module of a known class and structure")
        if self.comparison is not None:
            lines += _table(self.comparison)
        if self.comparison is not None and not self.comparison.equal:
            lines.append("the difference is above the tolerance: every rewrite was undone")
        elif self.undone:
            lines.append("undone")
        return "\n".join(lines)


def _table(comparison: Comparison) -> list[str]:
    """Rows of before, after, and after with a known support set; ratios to before."""
    c = comparison
    rows = [f"{'':<14}{'before':>12}{'after':>12}{'ratio':>8}{'same support':>14}{'ratio':>8}"]
    for name, attribute, unit in (
        ("GFLOPs", "flops", 1e9),
        ("peak MB", "peak_memory", 1e6),
        ("latency ms", "latency", 1e-3),
    ):
        before, after, again = (getattr(cost, attribute) for cost in (c.before, c.after, c.again))
        ratios = [f"{value / before:>8.3f}" if before else f"{'-':>8}" for value in (after, again)]
        rows.append(f"{name:<14}{before / unit:>12.3f}{after / unit:>12.3f}{ratios[0]}{again / unit:>14.3f}{ratios[1]}")
    rows.append(
        f"largest difference {c.max_difference:.2e} of outputs up to {c.scale:.2e}, tolerance {c.tolerance:.0e}"
    )
    return rows
