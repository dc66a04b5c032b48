"""What each of two processes under torchrun does for test_training_distributed.py: runs into the folder it is given."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from runs import POOLS, accumulated, tiny
from torch import Tensor

import icseg.training.loop as loop
from icseg import cli
from icseg.training import TrainingConfig, train
from icseg.training.batches import Batch
from icseg.training.distributed import connected
from icseg.training.trainer import Trainer

RANK = int(os.environ["RANK"])
usual_loss, usual_batches = Trainer.loss, loop.batches_ahead


def run(config: TrainingConfig, directory: Path, **options: Any) -> list[Any]:
    result = train(config, directory, pools=POOLS, show_progress=False, **options)
    return [result.steps, result.finished, result.model is not None, result.minutes]


def broken(trainer: Trainer, batch: Batch) -> dict[str, Tensor]:
    """Not finite in the last micro-batch of step 1 alone."""
    terms = usual_loss(trainer, batch)
    return {**terms, "total": terms["total"] * (math.nan if RANK == 1 and trainer.progress.step == 1 else 1)}


def interrupting(*arguments: Any) -> Iterator[Batch]:
    """The last process alone is asked to stop, in step 2."""
    for step, batch in enumerate(usual_batches(*arguments)):
        if RANK == 1 and step == 2:
            signal.raise_signal(signal.SIGTERM)
        yield batch


def main(out: Path) -> None:
    results: dict[str, Any] = {}
    for accumulate in (2, 4):
        results[str(accumulate)] = run(accumulated(accumulate), out / str(accumulate))
    try:
        run(accumulated(3), out / "odd")
    except ValueError as error:
        results["odd"] = str(error)
    results["resumed"] = run(accumulated(2), out / "half", resume=True)
    Trainer.loss = broken  # type: ignore[method-assign]
    results["broken"] = run(accumulated(2, steps=3), out / "broken")
    Trainer.loss = usual_loss  # type: ignore[method-assign]
    loop.batches_ahead = interrupting  # type: ignore[assignment]
    results["stopped"] = run(accumulated(2), out / "stopped")
    loop.batches_ahead = usual_batches
    budget = tiny(10**6, optimiser={"accumulate": 2}, schedule={"steps": 10**6, "max_minutes": 0.3 / 60})
    results["budget"] = run(budget, out / "budget")
    (out / f"results-{RANK}.json").write_text(json.dumps(results))
    command = ["train", "--config", str(out / "run.toml"), "--out", str(out / "command"), "--device", "cpu"]
    cli.app(command, standalone_mode=False)


if __name__ == "__main__":
    with connected(torch.device("cpu")):  # one group for all runs, which use it as they find it
        main(Path(sys.argv[1]))
