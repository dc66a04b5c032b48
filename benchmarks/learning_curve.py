"""Dice on data sets over the course of a training run, from the checkpoints that it kept (`[run] keep_steps`).

```
python benchmarks/learning_curve.py RUN DATASET... --limit 30 --out curve.png
```

Scores the checkpoints by the protocol of `icseg evaluate`, draws one line a class and their mean against steps, and
writes the values beside the picture (.json). None of this may guide the training: it is read afterwards.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from harness import commit, machine, versions

from icseg.checkpoint import training_record
from icseg.evaluation import EvaluationProtocol, evaluate_datasets
from icseg.files import check_file, written_whole


def kept_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run in the order of their steps. Raises ValueError if there are not two."""
    paths = [path for path in run.glob("model-*.safetensors") if path.stem.removeprefix("model-").isdigit()]
    paths.sort(key=lambda path: int(path.stem.removeprefix("model-")))
    if len(paths) < 2:
        raise ValueError(f"RUN must hold two checkpoints model-STEP.safetensors, got {len(paths)} in {run}")
    return paths


def scores(paths: Sequence[Path], datasets: Sequence[Path], limit: int | None) -> list[dict[str, object]]:
    """One row a checkpoint: its step, minutes, and Dice of every class."""
    rows: list[dict[str, object]] = []
    for path in paths:
        record = training_record(path)
        report = evaluate_datasets(datasets, EvaluationProtocol(limit=limit), checkpoint=path)
        dice = {f"{row.dataset} {row.class_name}": round(row.dice.mean, 5) for row in report.rows}
        mean = round(float(np.mean(list(dice.values()))), 5)
        rows.append({"step": record["step"], "minutes": record["elapsed"] / 60, "dice": dice, "mean": mean})
        print(f"step {record['step']}: mean Dice over {len(dice)} classes {mean:.3f}", flush=True)
    return rows


def draw(rows: Sequence[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row["step"] for row in rows]
    classes: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row["dice"].items():  # type: ignore[attr-defined]
            classes.setdefault(name, []).append(value)
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for i, (name, values) in enumerate(classes.items()):
        axes.plot(steps, values, linewidth=1, linestyle=("-", "--", ":")[i // 10 % 3], label=name)
    axes.plot(steps, [row["mean"] for row in rows], "k", linewidth=2.5, label="mean")
    axes.set(xlabel="step", ylabel="Dice, 256 px, 3 pairs", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix.removeprefix("."))
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a training run")
    parser.add_argument("datasets", type=Path, nargs="+", metavar="DATASET", help="as `icseg evaluate` takes them")
    parser.add_argument("--limit", type=int, help="targets a class; all if left out")
    parser.add_argument("--out", type=Path, default=Path("learning_curve.png"), help="picture (.png, .svg or .pdf)")
    given = parser.parse_args(arguments)
    check_file(given.out)
    torch.set_num_threads(1)
    rows = scores(kept_checkpoints(given.run), given.datasets, given.limit)
    draw(rows, given.out)
    about = {"machine": machine(), "versions": versions(), "commit": commit(), "limit": given.limit}
    with written_whole(given.out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
