"""What the adaptive budget costs and keeps: Dice and GFLOPs a target against full coverage, tolerance by tolerance.

```
python benchmarks/adaptive.py --out rows.jsonl --tasks 100 PACK.npz...
```

Packs are scored by the protocol of `icseg evaluate`, at their own size or at `--size`; GFLOPs are of the target alone,
by formula, as if each level were one round (up to 2 % less than torch's FLOP counter finds). `--counted` adds those
that the counter finds under the reference backend, of the target and of its support set. Writes one row a data set,
class and tolerance, and prints their table.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from icseg.evaluation import Case, load_dataset, pack_cases, synthetic_cases
from icseg.files import written_whole
from icseg.metrics import dice
from icseg.model import PatchICL
from icseg.sparse.budget import Budget
from icseg.sparse.cost import target_flops
from icseg.sparse.network import SparseNetwork
from icseg_kernels import use_backend

TOLERANCES = (0.0, 0.01, 0.02, 0.04, 0.08)


@torch.inference_mode()
def rows_of(
    model: PatchICL,
    dataset: str,
    class_name: str,
    cases: Iterable[Case],
    tolerances: Sequence[float],
    *,
    counted: bool = False,
) -> list[dict[str, Any]]:
    """Means over the cases, one row a tolerance."""
    found: dict[float, list[dict[str, float]]] = {tolerance: [] for tolerance in tolerances}
    network = model.network
    if not isinstance(network, SparseNetwork):
        raise ValueError("checkpoint must be of the sparse architecture")
    for case in cases:
        target, support = case.target[None], (case.support_images[None], case.support_masks[None])
        memory = model.encode_support(*support)
        cost = {"support_gflops_counted": _counted(model.encode_support, *support)} if counted else {}
        for tolerance in tolerances:
            run = functools.partial(model, target, memory=memory, budget=Budget(tolerance=tolerance))
            output = run()
            patches = [level.coords.shape[1] for level in output.levels]
            values = {
                "dice": dice(output.logits > 0, case.mask[None] > 0.5).item(),
                "gflops": target_flops(network, memory, patches) / 1e9,
                "patches": float(sum(patches)),
            }
            if counted:
                values |= cost | {"gflops_counted": _counted(run)}
            found[tolerance].append(values)
    return [
        {"dataset": dataset, "class": class_name, "targets": len(values), "tolerance": tolerance}
        | {name: float(np.mean([v[name] for v in values])) for name in values[0]}
        for tolerance, values in found.items()
    ]


def _counted(run: Callable[..., object], *arguments: object) -> float:
    """GFLOPs by torch's counter; the reference backend hides none."""
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        run(*arguments)
    return float(counter.get_total_flops()) / 1e9


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: Dice and GFLOPs at each tolerance, and the means over rows."""
    tolerances = list(dict.fromkeys(row["tolerance"] for row in rows))
    keys = list(dict.fromkeys((row["dataset"], row["class"]) for row in rows))
    by_key = {(row["dataset"], row["class"], row["tolerance"]): row for row in rows}
    lines = ["| data set | class | " + " | ".join("full" if t == 0 else f"{t:g}" for t in tolerances) + " |"]
    lines.append("|---" * (2 + len(tolerances)) + "|")
    for dataset, name in keys:
        cells = [by_key[dataset, name, t] for t in tolerances]
        values = " | ".join(f"{c['dice']:.3f}, {c['gflops']:.2f}" for c in cells)
        lines.append(f"| {dataset} | {name} | {values} |")
    means = [[np.mean([by_key[*key, t][n] for key in keys]) for n in ("dice", "gflops")] for t in tolerances]
    lines.append("| mean | | " + " | ".join(f"{d:.3f}, {g:.2f}" for d, g in means) + " |")
    shares = [(d / means[0][0], g / means[0][1]) for d, g in means]
    lines.append("| share of the first | | " + " | ".join(f"{d:.1%}, {g:.1%}" for d, g in shares) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", type=Path, nargs="*", metavar="PACK")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--checkpoint", type=Path, help="the bundled weights if left out")
    parser.add_argument("--tasks", type=int, default=0, help="held-out synthetic tasks")
    parser.add_argument("--limit", type=int, help="targets a class; all if left out")
    parser.add_argument("--size", type=int, help="resize packs to this side; synthetic tasks are 256 px")
    parser.add_argument("--counted", action="store_true", help="also count FLOPs by torch's counter")
    parser.add_argument("--tolerances", type=float, nargs="+", default=TOLERANCES)
    given = parser.parse_args(arguments)
    model = PatchICL.from_pretrained(given.checkpoint)
    rows: list[dict[str, Any]] = []
    if given.tasks:
        cases = tqdm(synthetic_cases(given.tasks), "synthetic", leave=False)
        rows += rows_of(model, "synthetic", "", cases, given.tolerances, counted=given.counted)
    for path in given.packs:
        pack = load_dataset(path, given.size)
        for class_id, name in list(enumerate(pack.class_names))[1:]:
            bar = tqdm(pack_cases(pack, class_id, limit=given.limit), f"{path.stem} {name}", leave=False)
            found = rows_of(model, pack.name, name, bar, given.tolerances, counted=given.counted)
            rows += [{**row, "size": given.size} for row in found] if given.size else found
    with written_whole(given.out) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
