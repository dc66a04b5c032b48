"""What a run measures of itself between two rows of its log: mean losses, speed, memory."""

from __future__ import annotations

import resource
import sys

import torch


class Recent:
    """Losses and speed since the last row of the log."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._values: dict[str, list[float]] = {}
        self._samples = self._skipped = 0
        self._seconds = 0.0

    def add(self, values: dict[str, float], samples: int, seconds: float) -> None:
        """Of one step, which took `seconds`; no values if it was left out."""
        self._samples += samples
        self._seconds += seconds
        self._skipped += not values
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)

    def row(self) -> dict[str, float]:
        """The mean of each value over the steps that had it, targets a second, steps left out; starts anew."""
        row = {name: round(sum(values) / len(values), 6) for name, values in self._values.items()}
        row["samples_per_second"] = round(self._samples / self._seconds, 2)
        row["skipped_steps"] = self._skipped
        self._clear()
        return row


def peak_memory(device: torch.device) -> float:
    """Most memory that this process has held so far, in MiB: allocated on a GPU, or resident for the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
