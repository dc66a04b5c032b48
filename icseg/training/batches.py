"""Training batches: a pure function of (configuration, seed, step), so that a resumed run sees the same."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from icseg.data.tensors import as_tensors
from icseg.memory import SupportMemory
from icseg.training.config import DataConfig


class Task(Protocol):
    """Images of one task: images uint8 [N, H, W], masks uint8 [N, H, W] of class ids, 0 is background."""

    @property
    def images(self) -> NDArray[np.uint8]: ...
    @property
    def masks(self) -> NDArray[np.uint8]: ...


class Tasks(Protocol):
    """Tasks by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Task: ...


@dataclass
class Batch:
    """T tasks with S supports and Q targets each; float32, images and masks in [0, 1].

    support_images, support_masks: [T, S, 1, H, W]; targets, target_masks: [T * Q, 1, H, W], task by task.
    seed: for the model's draws in this step.
    """

    support_images: Tensor
    support_masks: Tensor
    targets: Tensor
    target_masks: Tensor
    seed: int

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.support_images.to(device),
            self.support_masks.to(device),
            self.targets.to(device),
            self.target_masks.to(device),
            self.seed,
        )


def training_batch(pool: Tasks, config: DataConfig, seed: int, step: int) -> Batch:
    """The batch of one step. Each pass through the pool takes the tasks in a new order."""
    rng = np.random.default_rng((seed, step))
    support = int(rng.integers(config.min_support, config.max_support + 1))
    images, masks = [], []
    for i in range(step * config.tasks_per_step, (step + 1) * config.tasks_per_step):
        task = pool[int(_order(len(pool), seed, i // len(pool))[i % len(pool)])]
        chosen = rng.permutation(len(task.images))[: support + config.targets]
        augmented = augment(task.images[chosen], task.masks[chosen], config, rng)
        images.append(augmented[0])
        masks.append(augmented[1])
    return _split(torch.stack(images), torch.stack(masks), support, int(rng.integers(2**62)))


def batches_ahead(pool: Tasks, config: DataConfig, seed: int, step: int) -> Generator[Batch, None, None]:
    """The training batches from `step` on; a thread makes the next one while the caller works on this one."""
    with ThreadPoolExecutor(1, "icseg-batches") as executor:
        coming = executor.submit(training_batch, pool, config, seed, step)
        for following in itertools.count(step + 1):
            batch = coming.result()
            coming = executor.submit(training_batch, pool, config, seed, following)
            yield batch


def validation_batch(task: Task, support: int) -> Batch:
    """Class 1 of a task: its first `support` subjects as supports, all others as targets, as they are."""
    images, masks = as_tensors(task.images, task.masks)
    return _split(images[None], masks[None], support, seed=0)


def repeat_memory(memory: SupportMemory, times: int) -> SupportMemory:
    """The memory for `times` targets of each support set, which lie next to each other in the batch."""
    if times == 1 or memory.batch == 1:
        return memory
    tensors = {name: tensor.repeat_interleave(times, 0) for name, tensor in memory.tensors.items()}
    return SupportMemory(memory.fingerprint, memory.batch * times, tensors)


def augment(
    images: NDArray[np.uint8], masks: NDArray[np.uint8], config: DataConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Images and masks [N, 1, H, W] in [0, 1]: one geometric change a task, intensities partly per image."""
    x, y = as_tensors(images, masks)
    x, y = _crop(x, y, config.crop, rng)
    if config.flip_rotate:
        x, y = _flip_rotate(x, y, rng)
    return _intensity(x, config, rng).contiguous(), y.contiguous()


def _crop(x: Tensor, y: Tensor, smallest: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A random box, brought back to the full size; left out where some image would lose its foreground."""
    height, width = x.shape[-2:]
    scale = rng.uniform(smallest, 1.0)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    inside = y[..., top : top + h, left : left + w]
    lost = (y.flatten(1).sum(1) > 0) & (inside.flatten(1).sum(1) == 0)
    if (h, w) == (height, width) or bool(lost.any()):
        return x, y
    x = F.interpolate(x[..., top : top + h, left : left + w], (height, width), mode="bilinear", align_corners=False)
    y = F.interpolate(inside, (height, width), mode="bilinear", align_corners=False)
    return x, (y >= 0.5).float()


def _flip_rotate(x: Tensor, y: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """One of the symmetries of the square; of the rectangle where the images are not square."""
    square = x.shape[-2] == x.shape[-1]
    turns = int(rng.integers(4)) if square else 2 * int(rng.integers(2))
    flipped = bool(rng.integers(2))
    x, y = (torch.rot90(t.flip(-1) if flipped else t, turns, (-2, -1)) for t in (x, y))
    return x, y


def _intensity(x: Tensor, config: DataConfig, rng: np.random.Generator) -> Tensor:
    def per_image(limit: float) -> Tensor:
        return torch.from_numpy(rng.uniform(-limit, limit, (len(x), 1, 1, 1)).astype(np.float32))

    if rng.random() < config.invert:
        x = 1 - x
    gamma = 2 ** (float(rng.uniform(-config.gamma, config.gamma)) + per_image(config.gamma / 4))
    x = x**gamma
    return (x + (x - 0.5) * per_image(config.contrast) + per_image(config.contrast)).clamp(0, 1)


def _split(images: Tensor, masks: Tensor, support: int, seed: int) -> Batch:
    """images, masks: [T, S + Q, 1, H, W]."""
    return Batch(
        images[:, :support],
        masks[:, :support],
        images[:, support:].flatten(0, 1),
        masks[:, support:].flatten(0, 1),
        seed,
    )


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    # 2^63 keeps these streams apart from those of the steps.
    return np.random.default_rng((seed, epoch, 2**63)).permutation(count)
