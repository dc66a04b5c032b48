"""The training loop."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from icseg.checkpoint import save_checkpoint
from icseg.data.folders import list_source
from icseg.data.synthetic import TaskPool, validation_seed
from icseg.losses import segmentation_loss
from icseg.metrics import dice
from icseg.model import PatchICL
from icseg.training.batches import Batch, Tasks, batches_ahead, repeat_memory, scaled_size, validation_batch
from icseg.training.calibration import fit_temperature
from icseg.training.config import TrainingConfig
from icseg.training.log import append_row, read_rows, rewind_log
from icseg.training.mixture import open_mixture
from icseg.training.optimisation import autocast, make_optimiser, update_average
from icseg.training.state import STATE_FILE, Progress, load_state, save_state

MODEL_FILE = "model.safetensors"
LARGEST_RUN_OF_SKIPS = 20


@runtime_checkable
class ScheduledNetwork(Protocol):
    """A network that picks patches by the true mask on a schedule of its own."""

    def set_oracle_step(self, step: int) -> None:
        """Called before every optimiser step with the number of finished passes through the task pool."""


@runtime_checkable
class TemperedNetwork(Protocol):
    """A network whose final logits are divided by a temperature, which is 1 throughout the training."""

    def set_temperature(self, value: float) -> None:
        """Called at the end of a run with the temperature that fits the validation tasks best."""


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    steps:    optimiser steps done, earlier parts of a resumed run included.
    minutes:  time spent, likewise.
    finished: False if it was interrupted; `train(..., resume=True)` then goes on.
    model:    path of the trained model; None if it was interrupted.
    dice:     mean Dice of the last validation; None without validation tasks.
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
    """Train a model on synthetic tasks; the folder `directory` then holds model.safetensors and log.jsonl.

    resume: go on from the folder's last checkpoint. On the same machine, and without `max_minutes`, the
            weights are then bit for bit those of an uninterrupted run.
    pools:  training and validation tasks in place of the generated ones.

    One SIGINT (Ctrl-C) or SIGTERM ends the run after the current step, with a checkpoint. Raises
    FileExistsError if the folder holds a run and `resume` is not given, FileNotFoundError or ValueError if it
    cannot be resumed, or if `initial` or the losses do not fit the model, all before anything is written;
    FloatingPointError if the loss stays non-finite.
    """
    directory, device = Path(directory), torch.device(device)
    if not resume and (directory / STATE_FILE).exists():
        raise FileExistsError(f"directory must not hold a run unless resume is given, got {directory}")
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"directory must be a folder, got the file {directory}")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        run = _Run(config, directory, device)
        if resume:
            run.restore()
        elif config.run.initial:
            run.start_from(config.run.initial)
        run.check_loss(pools[0][0].images.shape[-2:] if pools else (config.data.size, config.data.size))
        training, validation = pools or open_pools(config, directory)
        directory.mkdir(parents=True, exist_ok=True)
        rewind_log(directory, run.progress.step)
        with _stop_request() as stop:
            return run.go(training, validation, stop, show_progress)


def open_pools(config: TrainingConfig, directory: Path) -> tuple[Tasks, Tasks]:
    """Training and validation tasks on disk; those that are missing are read or generated now."""
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
    return TaskPool(folder / "training", data.tasks, data.subjects, data.size, data.seed, workers=workers), validation


class _Run:
    def __init__(self, config: TrainingConfig, directory: Path, device: torch.device) -> None:
        self.config, self.directory, self.device = config, directory, device
        torch.manual_seed(config.run.seed)
        self.model = PatchICL(config.model).to(device)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimiser = make_optimiser(self.model, config.optimiser)
        self.progress = Progress()
        self.dice: float | None = None
        self.temperature: float | None = None
        self.validated_at = -1
        self.skipped_in_a_row = 0

    def restore(self) -> None:
        """Go on from the folder's checkpoint."""
        self.progress = load_state(self.directory, self.config, self.model, self.average, self.optimiser)
        for row in read_rows(self.directory):
            if "dice" in row and row["step"] <= self.progress.step:
                self.dice, self.validated_at = row["dice"], row["step"]
            if "temperature" in row and row["step"] == self.progress.step:
                self.temperature = row["temperature"]

    def start_from(self, checkpoint: str | Path) -> None:
        """Take the weights of `checkpoint`, which must be of the same configuration."""
        initial = PatchICL.from_pretrained(checkpoint)
        if initial.config != self.config.model:
            raise ValueError(f"initial must be a checkpoint of the configured model, got {checkpoint} of another")
        self.model.load_state_dict(initial.state_dict())
        self.average.load_state_dict(initial.state_dict())
        for model in (self.model, self.average):
            if isinstance(model.network, TemperedNetwork):
                model.network.set_temperature(1.0)

    @torch.no_grad()
    def check_loss(self, size: tuple[int, ...]) -> None:
        """Raise ValueError if the configured losses do not fit what the model returns, at images of this size.

        Every size and number of classes of the configuration is tried.
        """
        data = self.config.data
        sizes = {scaled_size(size, side) for side in data.sizes or (max(size),)}
        counts = {1, data.classes} if data.multi_class else {1}
        for shape, classes in itertools.product(sorted(sizes), sorted(counts)):
            image = torch.zeros(1, 1, *shape, device=self.device)
            masks = image.expand(-1, classes, -1, -1)
            output = self.average(image, image[None], masks[None], target_mask=masks)
            segmentation_loss(output, masks, self.config.loss, masks[None])

    def go(self, training: Tasks, validation: Tasks, stop: threading.Event, show: bool) -> TrainingResult:
        run, progress = self.config.run, self.progress
        clock = _Clock(progress.elapsed)
        recent = _Recent()
        self.model.train()
        total, data = self.config.schedule.steps, self.config.data
        batches = batches_ahead(training, data, run.seed, progress.step)
        with (
            contextlib.closing(batches),
            tqdm(total=total, initial=progress.step, unit="step", disable=not show) as bar,
        ):
            while self._share_done() < 1 and not stop.is_set():
                batch = next(batches).to(self.device)
                passes = progress.step * data.tasks_per_step // len(training)
                recent.add(self._step(batch, passes), len(batch.targets))
                progress.elapsed = clock.elapsed()
                bar.update()
                if progress.step % run.log_steps == 0:
                    row = recent.row()
                    self._log(row)
                    bar.set_postfix(loss=row.get("total"), samples_per_second=row["samples_per_second"])
                if progress.step % run.validate_steps == 0:
                    self._validate(validation)
                if self._checkpoint_due(clock):
                    self._save()
                    clock.mark()
        return self._end(validation)

    def _checkpoint_due(self, clock: _Clock) -> bool:
        every, minutes = self.config.run.checkpoint_steps, self.config.run.checkpoint_minutes
        by_steps = every > 0 and self.progress.step % every == 0
        return by_steps or clock.since_mark() > 60 * minutes > 0

    def _share_done(self) -> float:
        return self.config.schedule.progress(self.progress.step, self.progress.elapsed)

    def _step(self, batch: Batch, passes: int) -> dict[str, float]:
        """One optimiser step: the loss and its terms, or nothing if it was left out as not finite.

        passes: through the task pool, finished so far.
        """
        config, step, share = self.config, self.progress.step, self._share_done()
        for group in self.optimiser.param_groups:
            group["lr"] = config.optimiser.learning_rate * config.schedule.factor(step, share)
        if isinstance(self.model.network, ScheduledNetwork):
            self.model.network.set_oracle_step(passes)
        torch.manual_seed(batch.seed)
        terms = self._loss(batch)
        self.optimiser.zero_grad(set_to_none=True)
        terms["total"].backward()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(parameters, config.optimiser.clip)
        self.progress.step += 1
        if not bool(torch.isfinite(terms["total"].detach() + norm)):
            self._skip()
            return {}
        self.skipped_in_a_row = 0
        self.optimiser.step()
        update_average(self.average, self.model, config.optimiser.ema, step)
        return {name: float(value.detach()) for name, value in terms.items()}

    def _skip(self) -> None:
        self.progress.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > LARGEST_RUN_OF_SKIPS:
            raise FloatingPointError(
                f"loss and gradient must be finite, got {self.skipped_in_a_row} steps running that were not, "
                f"up to step {self.progress.step}; a lower learning rate may help"
            )

    def _loss(self, batch: Batch) -> dict[str, Tensor]:
        targets_a_task = len(batch.targets) // len(batch.support_images)
        with autocast(self.config.run.precision, self.device):
            memory = self.model.encode_support(batch.support_images, batch.support_masks, seed=batch.seed)
            memory = repeat_memory(memory, targets_a_task)
            output = self.model(batch.targets, memory=memory, target_mask=batch.target_masks, seed=batch.seed)
        return segmentation_loss(
            output,
            batch.target_masks,
            self.config.loss,
            batch.support_masks.repeat_interleave(targets_a_task, 0),
        )

    def _validate(self, tasks: Tasks) -> None:
        if len(tasks):
            scores = validate(self.average, tasks, self.config.data.max_support, self.device)
            self.dice, self.validated_at = scores["dice"], self.progress.step
            self._log(scores)

    def _set_temperature(self, tasks: Tasks) -> None:
        """Give the trained model the temperature that fits the validation tasks."""
        network = self.average.network
        if not isinstance(network, TemperedNetwork) or not len(tasks):
            return
        if self.temperature is None:
            network.set_temperature(1.0)
            self.temperature = fit_temperature(self.average, tasks, self.config.data.max_support, self.device)
            self._log({"temperature": self.temperature})
        network.set_temperature(self.temperature)

    def _log(self, values: dict[str, Any]) -> None:
        where = {
            "step": self.progress.step,
            "minutes": round(self.progress.elapsed / 60, 2),
            "learning_rate": self.optimiser.param_groups[0]["lr"],
        }
        append_row(self.directory, {**where, **values})

    def _save(self) -> None:
        save_state(self.directory, self.config, self.progress, self.model, self.average, self.optimiser)

    def _end(self, validation: Tasks) -> TrainingResult:
        self._save()
        progress = self.progress
        finished = self._share_done() >= 1
        model = None
        if finished:
            if self.validated_at != progress.step:
                self._validate(validation)
            self._set_temperature(validation)
            model = self.directory / MODEL_FILE
            trained = {
                **vars(progress),
                "device": self.device.type,
                "torch": torch.__version__,
                "dice": self.dice,
                "temperature": self.temperature,
            }
            metadata = {"training": json.dumps({"config": self.config.to_dict(), **trained})}
            save_checkpoint(model, self.config.model, self.average.state_dict(), metadata)
        return TrainingResult(progress.step, progress.elapsed / 60, finished, model, self.dice)


@torch.no_grad()
def validate(model: nn.Module, pool: Tasks, support: int, device: torch.device) -> dict[str, Any]:
    """Mean Dice of `model` (in evaluation mode) over the targets of the tasks in `pool`, class 1 alone.

    Returns {"dice": at the full size, "level_dice": [each level's combined map brought to the full size]}.
    """
    scores: list[Tensor] = []
    for i in range(len(pool)):
        batch = validation_batch(pool[i], support).to(device)
        memory = model.encode_support(batch.support_images, batch.support_masks)  # type: ignore[operator]
        output = model(batch.targets, memory=memory)
        size = batch.targets.shape[-2:]
        maps = [nn.functional.interpolate(level.logits.float(), size, mode="bilinear") for level in output.levels]
        scores.append(torch.stack([dice(m > 0, batch.target_masks > 0).mean() for m in [*maps, output.logits]]))
    *levels, final = torch.stack(scores).mean(0).tolist()
    return {"dice": final, "level_dice": levels}


class _Clock:
    """Seconds spent, those before a resumption included, and seconds since the last mark."""

    def __init__(self, spent: float) -> None:
        self._marked = time.monotonic()
        self._start = self._marked - spent

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def mark(self) -> None:
        self._marked = time.monotonic()

    def since_mark(self) -> float:
        return time.monotonic() - self._marked


class _Recent:
    """Losses and speed since the last row of the log."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, float] = {}
        self.steps = self.samples = 0
        self.since = time.monotonic()

    def add(self, terms: dict[str, float], samples: int) -> None:
        self.samples += samples
        self.steps += bool(terms)
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def row(self) -> dict[str, float]:
        """Mean of each term, and targets a second; starts anew."""
        means = {name: round(value / self.steps, 5) for name, value in self.sums.items()}
        means["samples_per_second"] = round(self.samples / (time.monotonic() - self.since), 2)
        self._clear()
        return means


@contextlib.contextmanager
def _stop_request() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second acts as usual. Main thread only."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    usual: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(number, usual[number])

    for number in usual:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, previous in usual.items():
            signal.signal(number, previous)
