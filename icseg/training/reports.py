"""What the first process of a run writes and shows: log, validations, weights, checkpoints."""

from __future__ import annotations

import time
from pathlib import Path

from tqdm import tqdm

from icseg.checkpoint import save_checkpoint
from icseg.files import remove_partial_files
from icseg.training.batches import Tasks
from icseg.training.calibration import fit_temperature
from icseg.training.log import Log
from icseg.training.measures import Recent, peak_memory
from icseg.training.record import model_metadata
from icseg.training.trainer import TemperedNetwork, Trainer
from icseg.training.validation import validate

MODEL_FILE = "model.safetensors"


class Reporter:
    """Opens the log in `directory`; `close` it at the end."""

    def __init__(self, trainer: Trainer, directory: Path, validation: Tasks, show_progress: bool) -> None:
        self.trainer, self.directory, self.validation = trainer, directory, validation
        config, progress = trainer.config, trainer.progress
        directory.mkdir(parents=True, exist_ok=True)
        remove_partial_files(directory)
        self._log = Log(directory, progress.step, progress.validated_at, config.run.tensorboard)
        self._recent = Recent()
        data, self._saved = config.data, time.monotonic()
        self._samples = config.optimiser.accumulate * data.tasks_per_step * data.targets
        total = config.schedule.stop or config.schedule.steps
        self._bar = tqdm(total=total, initial=progress.step, unit="step", disable=not show_progress)

    def close(self) -> None:
        self._bar.close()
        self._log.close()

    def after_step(self, values: dict[str, float], seconds: float) -> None:
        """Write and show what is due after a step of `seconds` with `values`, as `Trainer.step` returns them."""
        run, step = self.trainer.config.run, self.trainer.progress.step
        self._recent.add(values, self._samples, seconds)
        self._bar.update()
        if step % run.log_steps == 0:
            self._log_training()
        if step % run.validate_steps == 0:
            self._validate()
        if run.keep_steps and step % run.keep_steps == 0:
            self._write_model(f"model-{step}.safetensors")
        if self._checkpoint_due():
            self._save()

    def end(self, finished: bool) -> None:
        """Write the checkpoint to go on from, and the trained model of a run that is finished."""
        self._save()
        if not finished:
            return
        if self.trainer.progress.validated_at != self.trainer.progress.step:
            self._validate()
        self._set_temperature()
        self._save()
        self._write_model(MODEL_FILE)

    def _where(self) -> dict[str, float]:
        progress = self.trainer.progress
        return {"step": progress.step, "minutes": round(progress.elapsed / 60, 4)}

    def _log_training(self) -> None:
        rate = self.trainer.optimiser.param_groups[0]["lr"]
        row = {
            **self._where(),
            "learning_rate": rate,
            **self._recent.row(),
            "peak_memory_mib": round(peak_memory(self.trainer.device), 1),
        }
        self._log.training(row)
        self._bar.set_postfix(loss=row.get("total"), samples_per_second=row["samples_per_second"])

    def _validate(self) -> None:
        trainer = self.trainer
        if not len(self.validation):
            return
        scores = validate(trainer.average, self.validation, trainer.config.data.max_support, trainer.device)
        trainer.progress.dice, trainer.progress.validated_at = scores["dice"], trainer.progress.step
        levels = {f"dice/{level}": score for level, score in enumerate(scores["level_dice"])}
        self._log.validation({**self._where(), "dice": scores["dice"], **levels})

    def _set_temperature(self) -> None:
        """Give the trained model the temperature that fits the validation tasks."""
        trainer, network = self.trainer, self.trainer.average.network
        if not isinstance(network, TemperedNetwork) or not len(self.validation):
            return
        if trainer.progress.temperature is None:
            network.set_temperature(1.0)
            support = trainer.config.data.max_support
            trainer.progress.temperature = fit_temperature(trainer.average, self.validation, support, trainer.device)
        network.set_temperature(trainer.progress.temperature)

    def _checkpoint_due(self) -> bool:
        every, minutes = self.trainer.config.run.checkpoint_steps, self.trainer.config.run.checkpoint_minutes
        by_steps = every > 0 and self.trainer.progress.step % every == 0
        return by_steps or time.monotonic() - self._saved > 60 * minutes > 0

    def _save(self) -> None:
        self.trainer.save(self.directory)
        self._saved = time.monotonic()

    def _write_model(self, name: str) -> None:
        trainer = self.trainer
        metadata = model_metadata(trainer.config, trainer.progress, trainer.processes)
        save_checkpoint(self.directory / name, trainer.config.model, trainer.average.state_dict(), metadata)
