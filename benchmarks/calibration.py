"""How honest the probabilities are: expected calibration error, raw, with the fitted temperature, and of several draws.

```
python benchmarks/calibration.py --tasks 60 PACK.npz...
```
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from icseg.evaluation import Case, load_dataset, pack_cases, synthetic_cases
from icseg.metrics import dice
from icseg.model import PatchICL

BINS = 15
SEEDS = (0, 1, 2, 3)


class Calibration:
    """Counts, sums of confidence and of truth, in equal bins of the probability."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3, BINS, dtype=torch.float64)
        self.dice: list[float] = []

    def add(self, probability: Tensor, truth: Tensor) -> None:
        """probability and bool truth, [1, 1, H, W] both."""
        p, y = probability.double().flatten(), truth.double().flatten()
        index = (p * BINS).long().clamp(0, BINS - 1)
        for row, values in zip(self.sums, (torch.ones_like(p), p, y), strict=True):
            row.index_add_(0, index, values)
        self.dice.append(dice(probability > 0.5, truth).item())

    def error(self) -> float:
        """Mean |confidence - frequency| over pixels."""
        count, confidence, truth = self.sums
        return ((confidence - truth).abs().sum() / count.sum()).item()


@torch.inference_mode()
def measure(model: PatchICL, cases: Iterable[Case]) -> dict[str, Calibration]:
    temperature = float(model.network.get_buffer("temperature"))
    found = {name: Calibration() for name in ("raw", "temperature", f"mean of {len(SEEDS)} draws")}
    for case in cases:
        truth = case.mask[None] > 0.5
        memory = model.encode_support(case.support_images[None], case.support_masks[None])
        logits = model(case.target[None], memory=memory).logits
        mean = model(case.target[None], memory=memory, seeds=SEEDS).probability
        for calibration, p in zip(
            found.values(), ((logits * temperature).sigmoid(), logits.sigmoid(), mean), strict=True
        ):
            calibration.add(p, truth)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", type=Path, nargs="*", metavar="PACK")
    parser.add_argument("--checkpoint", type=Path, help="the bundled weights if left out")
    parser.add_argument("--tasks", type=int, default=60, help="held-out synthetic tasks")
    parser.add_argument("--limit", type=int, help="targets a class; all if left out")
    given = parser.parse_args(arguments)
    model = PatchICL.from_pretrained(given.checkpoint)
    print(f"temperature {float(model.network.get_buffer('temperature')):.3f}\n")
    print("| data set | class | raw | temperature | draws |\n|---|---|---|---|---|")
    jobs: list[tuple[str, str, Iterable[Case]]] = [("synthetic", "", synthetic_cases(given.tasks))]
    for path in given.packs:
        pack = load_dataset(path)
        for class_id, name in list(enumerate(pack.class_names))[1:]:
            jobs.append((pack.name, name, pack_cases(pack, class_id, limit=given.limit)))
    for dataset, name, cases in jobs:
        found = measure(model, cases).values()
        cells = [f"{c.error():.3f} (Dice {sum(c.dice) / len(c.dice):.3f})" for c in found]
        print(f"| {dataset} | {name} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
