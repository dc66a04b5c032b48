"""What a budget keeps and costs: Dice, GFLOPs and seconds of the bundled model, data set by data set; and of others.

```
python benchmarks/accuracy.py PACK.npz... --out rows.jsonl --limit 12
python benchmarks/accuracy.py PACK.npz... --out rows.jsonl --limit 12 --trained "20 minutes" \
    --checkpoint UniverSeg=universeg/model.safetensors "PatchICL, sparse"=sparse/model.safetensors
```

Packs are scored by the protocol of `icseg evaluate`. Dice is the mean over the targets of a class; GFLOPs, as torch's
counter finds them, and seconds are of the target alone, its support set encoded before as far as the model can: the
mean and the median. Sparse models get every budget, others have none. One row a data set, class and budget is appended
as soon as a class is done; rows that the file has are not made again. Models are compared if they were `--trained`
alike.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import commit, machine, versions
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import icseg
from icseg.checkpoint import bundled_weights
from icseg.evaluation import Case, load_dataset, pack_cases
from icseg.metrics import dice
from icseg.sparse.config import SparseConfig

PATCHES = (48, 96, 192, 384)
TOLERANCES = (0.04, 0.02, 0.01)
BUDGETS = {f"{count} patches": icseg.Budget(patches=count) for count in PATCHES}
BUDGETS |= {f"tolerance {tolerance:g}": icseg.Budget(tolerance=tolerance) for tolerance in TOLERANCES}
BUDGETS["all"] = icseg.Budget(tolerance=0)

IDENTITY = ("model", "trained", "budget", "dataset", "class", "size", "support", "targets", "threads", "machine")


@torch.inference_mode()
def rows_of(
    model: icseg.PatchICL, cases: Iterable[Case], budgets: Mapping[str, icseg.Budget | None]
) -> dict[str, dict[str, float]]:
    """dice, gflops and seconds of each budget over the cases."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in budgets}
    for case in cases:
        target, truth = case.target[None], case.mask[None] > 0.5
        memory = model.encode_support(case.support_images[None], case.support_masks[None])
        for name, budget in budgets.items():
            run = functools.partial(model, target, memory=memory, budget=budget)
            with FlopCounterMode(display=False) as counter:  # and the call that warms up
                mask = run().logits > 0
            start = time.perf_counter()
            run()
            seconds = time.perf_counter() - start
            found[name].append((dice(mask, truth).item(), counter.get_total_flops() / 1e9, seconds))
    rows = {}
    for name, values in found.items():
        scores, gflops, seconds = zip(*values, strict=True)
        rows[name] = {
            "dice": statistics.fmean(scores),
            "gflops": statistics.fmean(gflops),
            "seconds": statistics.median(seconds),
        }
    return rows


def add_pack(
    name: str, model: icseg.PatchICL, trained: str, path: Path, out: Path, *, size: int, support: int, limit: int | None
) -> None:
    """Append the rows of a pack that `out` does not have yet."""
    budgets = BUDGETS if isinstance(model.config, SparseConfig) else {"": None}
    made = {identity(json.loads(line)) for line in out.read_text().splitlines()} if out.exists() else set()
    pack = load_dataset(path, size)
    for class_id, class_name in list(enumerate(pack.class_names))[1:]:
        cases = pack_cases(pack, class_id, support=support, limit=limit)
        if not len(cases):
            continue
        known = {
            "subject": "accuracy",
            "model": name,
            "trained": trained,
            "dataset": pack.name,
            "class": class_name,
            "size": size,
            "support": support,
            "targets": len(cases),
            "threads": torch.get_num_threads(),
            "machine": machine(),
        }
        wanted = {name: budget for name, budget in budgets.items() if identity({**known, "budget": name}) not in made}
        if not wanted:
            continue
        found = rows_of(model, tqdm(cases, f"{pack.name} {class_name}", leave=False), wanted)
        rows = [{**known, "budget": name, **found[name], "versions": versions(), "commit": commit()} for name in wanted]
        with out.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a row is of."""
    return tuple(row.get(name) for name in IDENTITY)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: the mean over classes of each model and budget."""
    lines = ["| model | budget | classes | Dice | GFLOPs | ms |", "|---|---|---|---|---|---|"]
    for name, budget in dict.fromkeys((row["model"], row["budget"]) for row in rows):
        own = [row for row in rows if (row["model"], row["budget"]) == (name, budget)]
        score, gflops, seconds = (statistics.fmean(row[key] for row in own) for key in ("dice", "gflops", "seconds"))
        lines.append(f"| {name} | {budget} | {len(own)} | {score:.3f} | {gflops:.2f} | {1e3 * seconds:.1f} |")
    return "\n".join(lines) + "\n"


def named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"must be NAME=FILE, got {text!r}")
    return name, Path(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", type=Path, nargs="+", metavar="PACK")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    parser.add_argument("--size", type=int, default=256, help="packs are resized to this side")
    parser.add_argument("--support", type=int, default=3, help="pairs a support set")
    parser.add_argument("--limit", type=int, help="targets a class; all if left out")
    parser.add_argument(
        "--checkpoint", nargs="+", metavar="NAME=FILE", type=named, default=[], help="models in place of the bundled"
    )
    parser.add_argument("--trained", default="", help="how those were, in a few words")
    given = parser.parse_args(arguments)
    models = {name: icseg.PatchICL.from_pretrained(path) for name, path in given.checkpoint}
    models = models or {bundled_weights().stem: icseg.PatchICL.from_pretrained()}
    settings = {"size": given.size, "support": given.support, "limit": given.limit}
    for path in tqdm(given.packs, "packs"):
        for name, model in models.items():
            add_pack(name, model, given.trained, path, given.out, **settings)
    print(table([json.loads(line) for line in given.out.read_text().splitlines()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
