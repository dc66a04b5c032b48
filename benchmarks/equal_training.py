"""Dice at equal training: each model of configs/ gets the same tasks and the same wall-clock time on one thread.

```
python benchmarks/equal_training.py --minutes 25 --out DIR --pool DIR            # trains what is not trained yet
python benchmarks/equal_training.py --out DIR --evaluate PACK.npz...             # scores what is trained
```

Where the machine is busy otherwise, `--steps` gives each model the steps that it does in that time on an idle core
(`icseg train` for a minute each tells how many), whatever the time they then take.

An interrupted training goes on when the command is repeated. The scores go to DIR/rows.jsonl (one target a line) and
DIR/table.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from icseg.checkpoint import training_record
from icseg.evaluation import Case, Pack, load_dataset, model_predictor, pack_cases, synthetic_cases
from icseg.files import written_whole
from icseg.metrics import dice as dice_of
from icseg.model import PatchICL
from icseg.training import TrainingConfig, train
from icseg.training.reports import MODEL_FILE
from icseg.training.state import STATE_FILE

CONFIGS = Path(__file__).parent.parent / "configs"
MODELS = ("sparse", "universeg", "published")
OURS, DENSE = "sparse", "universeg"
SIZE = 256
SUPPORT = 3
RESAMPLES = 10_000
COUNTED = 20  # tasks that GFLOPs are the mean of: a model may spend more on one target than on another
NEVER = 1_000_000_000  # steps: time alone ends a run, and no validation takes of it
MEAN = "mean of data sets"


@dataclass(frozen=True)
class Row:
    """Dice of one model on one target.

    target: number of the image or task in its data set; patient: the number that it shares with other images of its
    patient, the target's own where patients are not known.
    """

    model: str
    dataset: str
    class_name: str
    target: int
    patient: int
    dice: float


@dataclass(frozen=True)
class Cost:
    """Of one trained model; gflops: of one target with its support set, at the size that is scored, on average."""

    model: str
    parameters: int
    gflops: float
    minutes: float
    steps: int
    targets: int


@dataclass(frozen=True)
class Difference:
    """Mean Dice of `model` minus that of `rival`, with the bounds of its 95 % interval."""

    dataset: str
    model: str
    rival: str
    mean: float
    low: float
    high: float


# Training


def run_config(model: str, minutes: float, pool: Path, seed: int, steps: int = NEVER) -> TrainingConfig:
    """The configuration of `model` for a run that time ends, or `steps` if they are given, on the tasks in `pool`."""
    config = TrainingConfig.from_file(CONFIGS / f"{model}_small.toml")
    minutes = minutes if steps == NEVER else 0.0
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, pool=str(pool.resolve())),
        schedule=dataclasses.replace(config.schedule, steps=steps, max_minutes=minutes),
        run=dataclasses.replace(config.run, seed=seed, validate_steps=NEVER),
    )


def train_model(config: TrainingConfig, directory: Path) -> bool:
    """Train, go on, or do nothing if the run is finished; False if it was interrupted.

    Raises ValueError if the folder holds a run of another configuration.
    """
    if (directory / MODEL_FILE).exists():
        found = TrainingConfig.from_dict(training_record(directory / MODEL_FILE)["config"])
        if dataclasses.replace(found, run=config.run) != config or found.run.seed != config.run.seed:
            raise ValueError(f"{directory} must hold a run of this configuration, got another; give another --out")
        return True
    result = train(config, directory, resume=(directory / STATE_FILE).exists(), show_progress=False)
    dice = "" if result.dice is None else f", validation Dice {result.dice:.3f}"
    print(f"{directory}: {result.steps:,} steps in {result.minutes:.1f} minutes{dice}", flush=True)
    return result.finished


# Evaluation


def cases_of(pack: Pack, limit: int | None = None) -> Iterator[Case]:
    """The targets and support sets that `icseg evaluate` takes."""
    for class_id in range(1, len(pack.class_names)):
        yield from pack_cases(pack, class_id, support=SUPPORT, limit=limit)


def score(models: dict[str, PatchICL], dataset: str, cases: Iterable[Case]) -> Iterator[Row]:
    """Rows of every model on every case."""
    predictors = {name: model_predictor(model) for name, model in models.items()}
    for case in tqdm(cases, dataset, leave=False):
        for name, predict in predictors.items():
            mask = predict(case.target[None], case.support_images[None], case.support_masks[None])
            dice = dice_of(mask, case.mask[None] > 0.5).item()
            yield Row(name, dataset, case.class_name, case.number, case.source, dice)


def cost_of(name: str, model: PatchICL, directory: Path, cases: Sequence[Case]) -> Cost:
    """What `model` costs a target, on average over `cases`, and cost in training."""
    predict = model_predictor(model)
    with FlopCounterMode(display=False) as counter:
        for case in cases:
            predict(case.target[None], case.support_images[None], case.support_masks[None])
    record = training_record(directory / MODEL_FILE)
    data = record["config"]["data"]
    return Cost(
        name,
        parameters=sum(p.numel() for p in model.parameters()),
        gflops=counter.get_total_flops() / len(cases) / 1e9,
        minutes=record["elapsed"] / 60,
        steps=record["step"],
        targets=record["step"] * data["tasks_per_step"] * data["targets"],
    )


# Statistics


def dataset_means(rows: Sequence[Row], model: str) -> dict[str, float]:
    """Mean Dice over the rows of each data set, and, where there are several, their unweighted mean."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.model == model:
            found.setdefault(row.dataset, []).append(row.dice)
    means = {dataset: float(np.mean(values)) for dataset, values in found.items()}
    return means if len(means) < 2 else {**means, MEAN: float(np.mean(list(means.values())))}


def paired_bootstrap(
    rows: Sequence[Row], model: str, rival: str, *, unit: str = "target", resamples: int = RESAMPLES, seed: int = 0
) -> list[Difference]:
    """Mean Dice of `model` minus `rival` a data set, and over data sets that count equally, with 95 % intervals.

    Within each data set whole targets (or, by `unit`, patients) are drawn with replacement, with all of their classes.
    Raises ValueError unless both were scored on the same targets.
    """
    rng = np.random.default_rng(seed)
    differences, drawn = [], []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        sums, counts = _differences([row for row in rows if row.dataset == dataset], model, rival, unit)
        indices = (rng.integers(0, len(sums), len(sums)) for _ in range(resamples))
        drawn.append(np.array([sums[index].sum() / counts[index].sum() for index in indices]))
        differences.append(_difference(dataset, model, rival, sums.sum() / counts.sum(), drawn[-1]))
    if len(drawn) > 1:
        mean = float(np.mean([d.mean for d in differences]))
        differences.append(_difference(MEAN, model, rival, mean, np.mean(drawn, axis=0)))
    return differences


def _differences(
    rows: Sequence[Row], model: str, rival: str, unit: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each unit the sum of its Dice differences, and their number."""
    ours, theirs = ({(row.class_name, row.target): row for row in rows if row.model == name} for name in (model, rival))
    if ours.keys() != theirs.keys():
        raise ValueError(f"{model} and {rival} must be scored on the same targets, got others on {rows[0].dataset}")
    by_unit: dict[int, list[float]] = {}
    for key, row in ours.items():
        by_unit.setdefault(getattr(row, unit), []).append(row.dice - theirs[key].dice)
    return np.array([sum(d) for d in by_unit.values()]), np.array([float(len(d)) for d in by_unit.values()])


def _difference(dataset: str, model: str, rival: str, mean: float, drawn: NDArray[np.float64]) -> Difference:
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Difference(dataset, model, rival, float(mean), float(low), float(high))


# Tables


def report(rows: Sequence[Row], costs: Sequence[Cost], unit: str = "target") -> str:
    """Markdown: what each model costs, its mean Dice a data set, and ours minus each rival."""
    names = list(dict.fromkeys(row.model for row in rows))
    parts = [
        _table(
            ["model", "parameters", f"GFLOPs a target, {SIZE} px S{SUPPORT}", "minutes", "steps", "targets seen"],
            [
                [c.model, f"{c.parameters:,}", f"{c.gflops:.3g}", f"{c.minutes:.1f}", f"{c.steps:,}", f"{c.targets:,}"]
                for c in costs
            ],
        )
    ]
    means = {name: dataset_means(rows, name) for name in names}
    scored = [
        [dataset, str(_targets(rows, dataset)), *(f"{means[name][dataset]:.3f}" for name in names)]
        for dataset in means[names[0]]
    ]
    parts.append("Mean Dice.\n\n" + _table(["data set", "targets", *names], scored))
    rivals = [name for name in names if name != OURS]
    if OURS in names and rivals:
        compared = [paired_bootstrap(rows, OURS, rival, unit=unit) for rival in rivals]
        lines = [
            [same[0].dataset, *(f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" for d in same)]
            for same in zip(*compared, strict=True)
        ]
        title = (
            f"Difference in mean Dice, with the 95 % interval of a paired bootstrap over {unit}s ({RESAMPLES:,} draws)."
        )
        parts.append(f"{title}\n\n" + _table(["data set", *(f"{OURS} minus {rival}" for rival in rivals)], lines))
    return "\n".join(parts)


def _targets(rows: Sequence[Row], dataset: str) -> int:
    """How many Dice values the mean of a data set, or of all, is over."""
    return len({(r.dataset, r.class_name, r.target) for r in rows if dataset in (r.dataset, MEAN)})


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, ["---"] * len(header), *lines])


def evaluate_models(
    names: Sequence[str], out: Path, packs: Sequence[Path], tasks: int, limit: int | None, unit: str
) -> str:
    """Score the models trained in `out`, write rows.jsonl and table.md there; the table."""
    opened = [load_dataset(path, SIZE) for path in packs]  # all are checked before the first is scored
    models = {name: PatchICL.from_pretrained(out / name / MODEL_FILE) for name in names}
    rows = list(score(models, "synthetic", synthetic_cases(tasks, support=SUPPORT, size=SIZE)))
    for pack in opened:
        rows += score(models, pack.name, cases_of(pack, limit))
    with written_whole(out / "rows.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows), encoding="utf-8")
    cases = list(synthetic_cases(COUNTED, support=SUPPORT, size=SIZE))
    table = report(rows, [cost_of(name, model, out / name, cases) for name, model in models.items()], unit)
    with written_whole(out / "table.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, one folder a model")
    parser.add_argument("--pool", type=Path, help="folder of the task pool; missing tasks are made there")
    parser.add_argument("--minutes", type=float, default=25.0, help="training time of each model")
    parser.add_argument("--steps", type=int, nargs="+", help="of each model, in their order, in place of --minutes")
    parser.add_argument("--only", default=",".join(MODELS), help="models, separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="of the training runs")
    parser.add_argument("--evaluate", type=Path, nargs="*", metavar="PACK", help="score, also on these packs")
    parser.add_argument("--tasks", type=int, default=200, help="held-out synthetic tasks that are scored")
    parser.add_argument("--limit", type=int, help="targets a class of a pack; all if left out")
    parser.add_argument("--unit", choices=("target", "patient"), default="target", help="what the bootstrap draws")
    given = parser.parse_args(arguments)
    names = given.only.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--only must name models of {', '.join(MODELS)}, got {', '.join(unknown)}")
    if given.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {given.minutes}")
    steps = given.steps or [NEVER] * len(names)
    if len(steps) != len(names):
        parser.error(f"--steps must be one number a model ({len(names)}), got {len(steps)}")
    torch.set_num_threads(1)
    if given.evaluate is not None:
        print(evaluate_models(names, given.out, given.evaluate, given.tasks, given.limit, given.unit))
        return 0
    if given.pool is None:
        parser.error("--pool must be given to train")
    for name, count in zip(names, steps, strict=True):
        if not train_model(run_config(name, given.minutes, given.pool, given.seed, count), given.out / name):
            print(f"{name}: interrupted; the same command goes on", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
