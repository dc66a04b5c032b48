"""The model in training, and its optimiser steps."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from icseg.losses import segmentation_loss
from icseg.model import PatchICL
from icseg.training.batches import Batch, repeat_memory, scaled_size
from icseg.training.config import TrainingConfig
from icseg.training.distributed import Processes
from icseg.training.gradients import GradientMean
from icseg.training.optimisation import autocast, make_optimiser, update_average
from icseg.training.state import Progress, load_state, save_state

LARGEST_RUN_OF_SKIPS = 20


@runtime_checkable
class ScheduledNetwork(Protocol):
    """A network that picks patches by the true mask on a schedule in passes through the task pool."""

    def set_oracle_step(self, step: int) -> None:
        """Called before every optimiser step with the number of finished passes through the task pool."""


@runtime_checkable
class ProgressiveNetwork(Protocol):
    """A network that does something else at the start of a training than at its end."""

    def set_training_progress(self, share: float) -> None:
        """Called before every optimiser step with the share of the run that is over, in [0, 1]."""


@runtime_checkable
class TemperedNetwork(Protocol):
    """A network whose final logits are divided by a temperature, which is 1 throughout the training."""

    def set_temperature(self, value: float) -> None:
        """Called at the end of a run with the temperature that fits the validation tasks best."""


class Trainer:
    """A model, the average of its weights, its optimiser, and how far they are; the same in every process.

    parts: the micro-batches of a step that this process does.
    """

    def __init__(self, config: TrainingConfig, processes: Processes) -> None:
        self.config, self.processes, self.device = config, processes, processes.device
        self.parts = processes.share(config.optimiser.accumulate)
        torch.manual_seed(config.run.seed)
        self.model = PatchICL(config.model).to(self.device).train()
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimiser = make_optimiser(self.model, config.optimiser)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.gradients = GradientMean(self.parameters)
        self.progress = Progress()
        self._skipped_in_a_row = 0

    def restore(self, directory: Path) -> None:
        """Go on from the folder's checkpoint."""
        self.progress = load_state(directory, self.config, self.model, self.average, self.optimiser)

    def save(self, directory: Path) -> None:
        """Write a checkpoint to go on from."""
        save_state(directory, self.config, self.progress, self.model, self.average, self.optimiser)

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

    def share_done(self) -> float:
        """The share of the schedule that is over, in [0, 1]."""
        return self.config.schedule.progress(self.progress.step, self.progress.elapsed)

    def is_finished(self) -> bool:
        """Whether there is no step left to do."""
        return self.config.schedule.is_over(self.progress.step, self.progress.elapsed)

    def step(self, batches: Iterator[Batch], tasks: int) -> dict[str, float]:
        """One optimiser step, on as many of `batches` as this process has parts.

        tasks: in the pool. Returns the loss and its terms and the norm of the gradient, means over the micro-batches of
        all processes; nothing if the step was left out because one of them was not finite.
        """
        config, step, share = self.config, self.progress.step, self.share_done()
        for group in self.optimiser.param_groups:
            group["lr"] = config.optimiser.learning_rate * config.schedule.factor(step, share)
        if isinstance(self.model.network, ScheduledNetwork):
            seen = step * config.optimiser.accumulate * config.data.tasks_per_step
            self.model.network.set_oracle_step(seen // tasks)
        if isinstance(self.model.network, ProgressiveNetwork):
            self.model.network.set_training_progress(share)
        self.optimiser.zero_grad(set_to_none=True)
        for _ in self.parts:
            batch = next(batches).to(self.device)
            torch.manual_seed(batch.seed)
            losses = self.loss(batch)
            losses["total"].backward()
            self.gradients.add(losses)
        means = self.gradients.finish(self.processes, config.optimiser.accumulate)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, config.optimiser.clip))
        self.progress.step += 1
        if not math.isfinite(means["total"] + norm):
            self._skip()
            return {}
        self._skipped_in_a_row = 0
        self.optimiser.step()
        update_average(self.average, self.model, config.optimiser.ema, step)
        return {**means, "gradient_norm": norm}

    def _skip(self) -> None:
        self.progress.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > LARGEST_RUN_OF_SKIPS:
            raise FloatingPointError(
                f"loss and gradient must be finite, got {self._skipped_in_a_row} steps running that were not, "
                f"up to step {self.progress.step}; a lower learning rate may help"
            )

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of a micro-batch with its terms, as `segmentation_loss` gives them."""
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
