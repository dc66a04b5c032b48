"""The training loop."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from icseg.data.folders import list_source
from icseg.data.synthetic import TaskPool, validation_seed
from icseg.training.batches import Tasks, batches_ahead
from icseg.training.config import TrainingConfig
from icseg.training.distributed import Processes, connected
from icseg.training.interruption import stop_request
from icseg.training.log import check_tensorboard
from icseg.training.mixture import fresh_tasks, open_mixture, synthetic_pool
from icseg.training.reports import MODEL_FILE, Reporter
from icseg.training.state import STATE_FILE
from icseg.training.trainer import Trainer


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    steps:    optimiser steps done, earlier parts of a resumed run included.
    minutes:  time spent, likewise.
    finished: False if it was interrupted; `train(..., resume=True)` then goes on.
    model:    path of the trained model; None if it was interrupted.
    dice:     mean Dice of the last validation; None without validation tasks, and in all but the first of several
              processes.
    """

    steps: int
    minutes: float
    finished: bool
    model: Path | None
    dice: float | None


def train_from_file(
    config_path: str | Path,
    directory: str | Path,
    *,
    resume: bool = False,
    device: str | torch.device = "cpu",
) -> TrainingResult:
    """Train by a TOML file; see `train`."""
    return train(TrainingConfig.from_file(config_path), directory, resume=resume, device=device)


def train(
    config: TrainingConfig,
    directory: str | Path,
    *,
    resume: bool = False,
    device: str | torch.device = "cpu",
    pools: tuple[Tasks, Tasks] | None = None,
    show_progress: bool = True,
) -> TrainingResult:
    """Train a model on synthetic tasks; the folder `directory` then holds model.safetensors, train.csv, validation.csv.

    resume: go on from the folder's last checkpoint. On the same machine, and without `max_minutes`, the
            weights are then bit for bit those of an uninterrupted run.
    device: in a process that torchrun started, "cuda" is the GPU of its LOCAL_RANK.
    pools:  training and validation tasks in place of the generated ones.

    Processes that torchrun started share out the micro-batches of a step (`[optimiser] accumulate`) and end with the
    weights that one process would have (but for the running statistics of batch normalisation, which are those of the
    first one's micro-batches). Only the first writes, validates and shows progress.

    One SIGINT (Ctrl-C) or SIGTERM, to any process, ends the run after the current step, with a checkpoint. Raises
    FileExistsError if the folder holds a run and `resume` is not given, FileNotFoundError or ValueError if it
    cannot be resumed, or if `initial`, the losses or the number of processes do not fit, ModuleNotFoundError if the
    package for `tensorboard` is missing, all before anything is written; FloatingPointError if the loss stays
    non-finite.
    """
    directory, device = Path(directory), torch.device(device)
    if not resume and (directory / STATE_FILE).exists():
        raise FileExistsError(f"directory must not hold a run unless resume is given, got {directory}")
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"directory must be a folder, got the file {directory}")
    if pools and config.data.fresh:
        raise ValueError("fresh must be false where pools are given, got true")
    if config.run.tensorboard:
        check_tensorboard()
    with connected(device) as processes, torch.random.fork_rng([processes.device] if device.type == "cuda" else []):
        trainer = Trainer(config, processes)
        if resume:
            trainer.restore(directory)
        elif config.run.initial:
            trainer.start_from(config.run.initial)
        trainer.check_loss(pools[0][0].images.shape[-2:] if pools else (config.data.size, config.data.size))
        training, validation = pools or _opened_in_turn(config, directory, processes)
        with stop_request() as stop:
            return _go(trainer, directory, training, validation, stop, show_progress)


def _opened_in_turn(config: TrainingConfig, directory: Path, processes: Processes) -> tuple[Tasks, Tasks]:
    """`open_pools`, first in the first process, which makes what is missing."""
    processes.wait()  # until all have found nothing wrong
    pools = open_pools(config, directory, processes) if processes.first else None
    processes.wait()
    return pools or open_pools(config, directory, processes)


def open_pools(config: TrainingConfig, directory: Path, processes: Processes | None = None) -> tuple[Tasks, Tasks]:
    """Training and validation tasks on disk, of which what is missing is read or generated now.

    processes: for which, and on whose device, fresh training tasks will be made; None is this one, on the CPU.
    """
    data, workers = config.data, config.run.workers
    folder = Path(data.pool) if data.pool else directory / "pool"
    listings = [list_source(source) for source in data.sources]
    validation: Tasks = []
    if data.validation_tasks:  # first: a folder of other tasks is then refused before the long part
        seed = validation_seed(data.seed)
        validation = TaskPool(folder / "validation", data.validation_tasks, data.subjects, data.size, seed)
    if listings:
        cache = Path(data.cache) if data.cache else directory / "cache"
        return open_mixture(data, listings, folder / "training", cache, workers), validation
    if data.fresh:
        processes = processes or Processes(0, 1, torch.device("cpu"))
        return fresh_tasks(config, processes.share(config.optimiser.accumulate), processes.device), validation
    return synthetic_pool(data, folder / "training", data.tasks, workers), validation


def _go(
    trainer: Trainer, directory: Path, training: Tasks, validation: Tasks, stop: threading.Event, show: bool
) -> TrainingResult:
    config, processes, progress = trainer.config, trainer.processes, trainer.progress
    with contextlib.ExitStack() as stack:
        reporter = Reporter(trainer, directory, validation, show) if processes.first else None
        if reporter is not None:
            stack.callback(reporter.close)
        batches = batches_ahead(
            training, config.data, config.run.seed, progress.step, trainer.parts, config.optimiser.accumulate
        )
        stack.callback(batches.close)
        tasks_a_pass = config.data.tasks if config.data.fresh else len(training)
        start = time.monotonic() - progress.elapsed
        stopping = _agree(trainer, start, stop)
        while not trainer.is_finished() and not stopping:
            began = time.monotonic()
            values = trainer.step(batches, tasks_a_pass)
            seconds = time.monotonic() - began
            stopping = _agree(trainer, start, stop)
            if reporter is not None:
                reporter.after_step(values, seconds)
        finished = trainer.is_finished()
        if reporter is not None:
            reporter.end(finished)
    processes.wait()  # the files are there when any process returns
    model = directory / MODEL_FILE if finished else None
    return TrainingResult(progress.step, progress.elapsed / 60, finished, model, progress.dice)


def _agree(trainer: Trainer, start: float, stop: threading.Event) -> bool:
    """Give all processes the same time spent, by which they go on or end; whether one of them was asked to stop."""
    trainer.progress.elapsed, asked = trainer.processes.largest(time.monotonic() - start, float(stop.is_set()))
    return asked > 0
