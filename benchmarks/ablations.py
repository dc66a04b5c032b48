"""What each choice of the training is worth: short runs of configs/sparse_small.toml that differ in one thing.

```
python benchmarks/ablations.py --pool DIR --out DIR                       # trains what is not trained yet
python benchmarks/ablations.py --out DIR --evaluate DATASET...            # scores what is trained, and writes rows
```

An interrupted run goes on when the command is repeated. Every run sees the same tasks in the same order (but `seed 1`,
which says how much another seed changes), at 256 pixels and one class at a time. Scores are of held-out synthetic tasks
and of the data sets, none of which is trained on; their intervals are over targets, not over seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import commit, machine, versions

from icseg.evaluation import EvaluationProtocol, Report, evaluate_datasets
from icseg.files import written_whole
from icseg.training import TrainingConfig, train
from icseg.training.reports import MODEL_FILE
from icseg.training.state import STATE_FILE

CONFIG = Path(__file__).parent.parent / "configs" / "sparse_small.toml"
SHORT: dict[str, dict[str, Any]] = {
    "data": {"sizes": [256], "multi_class": 0.0},
    "optimiser": {"ema": 0.99},
    "schedule": {"steps": 300, "warmup": 40},
    "run": {"validate_steps": 300, "keep_steps": 0},
}
BASE = "base"
_PLAIN = {
    "crop": 0.0,
    "task": dict.fromkeys(("flip", "turn", "affine", "elastic", "invert", "gamma", "blur", "sharpness", "noise"), 0.0),
    "example": dict.fromkeys(("affine", "zoom", "elastic", "gamma", "contrast", "blur", "sharpness", "noise"), 0.0),
}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    BASE: {},
    "seed 1": {"run": {"seed": 1}},
    "loss at the finest level alone": {"loss": {"level_weights": [0.0, 0.0, 0.0, 1.0]}},
    "level weights from 0.3 to 1": {"loss": {"level_weights": "progressive"}},
    "no cross-entropy where patches lie": {"loss": {"covered_bce": 0.0}},
    "focal loss added": {"loss": {"focal": 1.0}},
    "no error estimate": {"loss": {"error": 0.0}},
    "no picks by the true error": {"model": {"oracle_share": 0.0, "oracle_share_end": 0.0}},
    "picks by the true error from 0.5 to 0": {"model": {"oracle_share": 0.5, "oracle_share_end": 0.0}},
    "no picks anywhere": {"model": {"uniform_share": 0.0}},
    "no augmentation": {"data": {"augmentation": _PLAIN}},
    "AdamW in place of Muon": {"optimiser": {"method": "adamw"}},
}


def run_config(name: str, pool: Path) -> TrainingConfig:
    """The configuration of one run; `pool`: folder of the tasks."""
    tables = TrainingConfig.from_file(CONFIG).to_dict()
    for changes in (SHORT, CHANGES[name], {"data": {"pool": str(pool.resolve())}}):
        for table, values in changes.items():
            tables[table] |= values
    return TrainingConfig.from_dict(tables)


def folder_of(name: str) -> str:
    return name.replace(" ", "-").replace(".", "_")


def table(reports: dict[str, Report]) -> str:
    """Mean Dice over synthetic families and over the classes of data sets, and the difference from the base."""
    header = "| run | synthetic | difference | data sets | difference |\n" + "|---" * 5 + "|\n"
    means = {name: _means(report) for name, report in reports.items()}
    lines = []
    for name, (synthetic, real) in means.items():
        cells = [name]
        for value, base in zip((synthetic, real), means[BASE], strict=True):
            cells += ["", ""] if value is None else [f"{value:.3f}", "" if name == BASE else f"{value - base:+.3f}"]
        lines.append(f"| {' | '.join(cells)} |\n")
    return header + "".join(lines)


def _means(report: Report) -> tuple[float, float | None]:
    """Mean Dice over synthetic families, and over the classes of data sets, None without any."""
    dice = {True: [], False: []}
    for row in report.rows:
        dice[row.dataset == "synthetic"].append(row.dice.mean)
    return float(np.mean(dice[True])), float(np.mean(dice[False])) if dice[False] else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, one folder each")
    parser.add_argument("--pool", type=Path, help="folder of the task pool; missing tasks are made there")
    parser.add_argument("--only", action="append", choices=list(CHANGES), help="a run; repeatable")
    parser.add_argument("--evaluate", type=Path, nargs="*", metavar="DATASET", help="score, also on these data sets")
    parser.add_argument("--tasks", type=_positive, default=200, help="held-out synthetic tasks that are scored")
    parser.add_argument("--limit", type=int, default=30, help="targets a class of a data set")
    given = parser.parse_args(arguments)
    names = [name for name in CHANGES if name in (given.only or CHANGES)]
    torch.set_num_threads(1)
    if given.evaluate is not None:
        wanted = [name for name in CHANGES if name in names or name == BASE]
        trained = [name for name in wanted if (given.out / folder_of(name) / MODEL_FILE).exists()]
        if BASE not in trained:
            parser.error(f"--out must hold the run {BASE}, got {', '.join(trained) or 'none'}")
        print(evaluate_runs(trained, given.out, given.evaluate, given.tasks, given.limit), end="")
        return 0
    if given.pool is None:
        parser.error("--pool must be given to train")
    for name in names:
        directory = given.out / folder_of(name)
        if not (directory / MODEL_FILE).exists():
            result = train(run_config(name, given.pool), directory, resume=(directory / STATE_FILE).exists())
            if not result.finished:
                print(f"{name}: interrupted; the same command goes on", file=sys.stderr)
                return 130
    return 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1, got {text}")
    return int(text)


def evaluate_runs(names: Sequence[str], out: Path, datasets: Sequence[Path], tasks: int, limit: int) -> str:
    """Score the runs, write rows.json and table.md into `out`; the table."""
    reports = {
        name: evaluate_datasets(
            datasets,
            EvaluationProtocol(limit=limit),
            checkpoint=out / folder_of(name) / MODEL_FILE,
            synthetic_tasks=tasks,
            out=out / folder_of(name) / f"scores-{tasks}-{limit}",
            pictures=0,
            resume=True,
        )
        for name in names
    }
    rows = {
        name: {f"{row.dataset} {row.class_name}": round(row.dice.mean, 5) for row in report.rows}
        for name, report in reports.items()
    }
    about = {"machine": machine(), "versions": versions(), "commit": commit(), "limit": limit, "synthetic_tasks": tasks}
    with written_whole(out / "rows.json") as temporary:
        temporary.write_text(json.dumps({**about, "dice": rows}, indent=1) + "\n", encoding="utf-8")
    text = table(reports)
    with written_whole(out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    sys.exit(main())
