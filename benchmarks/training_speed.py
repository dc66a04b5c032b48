"""Training speed of the models of configs/: targets a second, step by step in turn, on one thread.

```
python benchmarks/training_speed.py --pool DIR                   # prints a table
python benchmarks/training_speed.py --pool DIR --out rows.json   # and writes the rows
```

Each model takes the batches of its own configuration (image sizes, support sizes) out of the same task pool; what is
missing there is made first. A step is a forward and a backward pass and the optimiser's, with the batch at hand.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from harness import commit, machine, versions

from icseg.files import check_file, written_whole
from icseg.training.batches import Tasks, training_batch
from icseg.training.config import TrainingConfig
from icseg.training.distributed import connected
from icseg.training.mixture import synthetic_pool
from icseg.training.optimisation import has_bfloat16
from icseg.training.trainer import Trainer

CONFIGS = Path(__file__).parent.parent / "configs"
MODELS = ("sparse", "universeg", "published")


@dataclass(frozen=True)
class Speed:
    """Of one model over `steps` steps; quartiles: the first and third of a step's seconds."""

    model: str
    parameters: int
    image_sizes: tuple[int, ...]
    targets_a_step: int
    precision: str
    steps: int
    targets_per_second: float
    steps_per_second: float
    quartiles: tuple[float, float]


def measure(names: Sequence[str], pool: Path, steps: int, warm: int = 2) -> list[Speed]:
    """The models take turns, so that a change of the machine's speed meets all of them."""
    configs = {name: TrainingConfig.from_file(CONFIGS / f"{name}_small.toml") for name in names}
    with connected(torch.device("cpu")) as processes:
        trainers = {name: Trainer(config, processes) for name, config in configs.items()}
        tasks: dict[str, Tasks] = {
            name: synthetic_pool(config.data, pool / "training", config.data.tasks, config.run.workers)
            for name, config in configs.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for step in range(warm + steps):
            for name, trainer in trainers.items():
                batch = training_batch(tasks[name], configs[name].data, configs[name].run.seed, step)
                start = time.perf_counter()
                trainer.step(iter([batch]), len(tasks[name]))
                if step >= warm:
                    seconds[name].append(time.perf_counter() - start)
    return [_speed(name, configs[name], trainers[name], seconds[name]) for name in names]


def _speed(name: str, config: TrainingConfig, trainer: Trainer, seconds: Sequence[float]) -> Speed:
    data, precision = config.data, config.run.precision
    bfloat16 = precision == "bfloat16" or (precision == "auto" and has_bfloat16(torch.device("cpu")))
    targets = data.tasks_per_step * data.targets
    low, high = np.percentile(seconds, (25, 75))
    return Speed(
        model=name,
        parameters=sum(p.numel() for p in trainer.parameters),
        image_sizes=tuple(sorted(set(data.sizes or (data.size,)))),
        targets_a_step=targets,
        precision="bfloat16" if bfloat16 else "float32",
        steps=len(seconds),
        targets_per_second=targets * len(seconds) / sum(seconds),
        steps_per_second=len(seconds) / sum(seconds),
        quartiles=(float(low), float(high)),
    )


def table(speeds: Sequence[Speed]) -> str:
    header = "| model | trained parameters | image sizes | targets a step | targets a second | a step, quartiles |\n"
    lines = [
        f"| {s.model} | {s.parameters:,} | {', '.join(map(str, s.image_sizes))} px | {s.targets_a_step} "
        f"| {s.targets_per_second:.2f} | {s.quartiles[0]:.2f} to {s.quartiles[1]:.2f} s |\n"
        for s in speeds
    ]
    return header + "|---" * 6 + "|\n" + "".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pool", type=Path, required=True, help="folder of the task pool; missing tasks are made there"
    )
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each model")
    parser.add_argument("--only", default=",".join(MODELS), help="models, separated by commas")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    given = parser.parse_args(arguments)
    names = given.only.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--only must name models of {', '.join(MODELS)}, got {', '.join(unknown)}")
    if given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")
    if given.out is not None:
        check_file(given.out)
    torch.set_num_threads(1)
    speeds = measure(names, given.pool, given.steps)
    if given.out is not None:
        rows = {"machine": machine(), "versions": versions(), "commit": commit(), "speeds": [asdict(s) for s in speeds]}
        with written_whole(given.out) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(speeds), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
