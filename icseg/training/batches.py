"""Training batches: a pure function of (configuration, seed, step, place in the step).

So a resumed run, and one of several processes, sees the same.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icseg.data.tensors import as_tensors
from icseg.masks import level_mask
from icseg.memory import SupportMemory
from icseg.resize import resize
from icseg.training.augmentation import augment
from icseg.training.config import DataConfig


class Task(Protocol):
    """Images of one task: images uint8 [N, H, W], masks uint8 [N, H, W] of class ids from 1 up, 0 is background.

    Arrays, or tensors on any device: augmentation then works there.
    """

    @property
    def images(self) -> NDArray[np.uint8] | Tensor: ...
    @property
    def masks(self) -> NDArray[np.uint8] | Tensor: ...


class Tasks(Protocol):
    """Tasks by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Task: ...


@dataclass
class Batch:
    """T tasks with S supports and Q targets each, C classes asked for; float32, images and masks in [0, 1].

    support_images: [T, S, 1, H, W]; support_masks: [T, S, C, H, W].
    targets:        [T * Q, 1, H, W]; target_masks: [T * Q, C, H, W], task by task.
    seed:           for the model's draws.
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


def training_batch(pool: Tasks, config: DataConfig, seed: int, step: int, part: int = 0, accumulate: int = 1) -> Batch:
    """Micro-batch `part` of the `accumulate` that make up one step, all of one support size and image size.

    Each pass through the pool takes the tasks in a new order.
    """
    rng = np.random.default_rng((seed, step))
    support = config.min_support + int((config.max_support + 1 - config.min_support) * rng.random() ** 2)  # few: often
    size = int(rng.choice(config.sizes)) if config.sizes else None
    if part:  # a stream of its own; the first goes on with that of the step
        rng = np.random.default_rng((seed, step, part))
    place = step * accumulate + part
    numbers = range(place * config.tasks_per_step, (place + 1) * config.tasks_per_step)
    order = functools.partial(_order, len(pool), seed)
    tasks = [pool[i if config.fresh else int(order(i // len(pool))[i % len(pool)])] for i in numbers]
    images, masks = [], []
    for task, classes in zip(tasks, _classes_asked_for(tasks, config, rng), strict=True):
        chosen = _chosen(task, classes, support, config.targets, rng)
        x, y = as_tensors(task.images[chosen], task.masks[chosen], classes)
        x, y = augment(x, y, config.augmentation, rng.spawn(1)[0])  # so that it changes no other draw
        x, y = (x, y) if size is None else _resized(x, y, size)
        images.append(x)
        masks.append(y)
    return _split(torch.stack(images), torch.stack(masks), support, int(rng.integers(2**62)))


def _chosen(
    task: Task, classes: Sequence[int], support: int, targets: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Images of a task, the supports first: those show all of the classes, a target may lack one."""
    order = rng.permutation(len(task.images))
    masks = torch.as_tensor(task.masks)
    shows = torch.stack([(masks == c).flatten(1).any(1) for c in classes]).all(0).cpu().numpy()[order]
    supports = order[shows][:support]
    if len(supports) < support:
        raise ValueError(f"a task must show each of its classes in at least {support} images, got {shows.sum()}")
    return np.concatenate([supports, order[~np.isin(order, supports)][:targets]])


def _classes_asked_for(tasks: Sequence[Task], config: DataConfig, rng: np.random.Generator) -> list[list[int]]:
    """The class ids that each task of a step asks for, as many for each."""
    present = [max(1, int(task.masks.max())) for task in tasks]
    count = min(config.classes, *present) if rng.random() < config.multi_class else 1
    if count > 1:
        return [(1 + rng.permutation(classes)[:count]).tolist() for classes in present]
    further = [rng.random() < config.other_class for _ in present]
    return [[int(rng.integers(2, n + 1)) if other and n > 1 else 1] for n, other in zip(present, further, strict=True)]


def batches_ahead(
    pool: Tasks, config: DataConfig, seed: int, step: int, parts: Sequence[int] = (0,), accumulate: int = 1
) -> Generator[Batch, None, None]:
    """The micro-batches `parts` of every step from `step` on, of `accumulate` each.

    A thread makes the next one while the caller works on this one.
    """
    with ThreadPoolExecutor(1, "icseg-batches") as executor:
        coming: Future[Batch] | None = None
        for number, part in ((number, part) for number in itertools.count(step) for part in parts):
            following = executor.submit(training_batch, pool, config, seed, number, part, accumulate)
            if coming is not None:
                yield coming.result()
            coming = following


def validation_batch(task: Task, support: int) -> Batch:
    """Class 1 of a task: its first `support` subjects as supports, all others as targets, as they are."""
    images, masks = as_tensors(task.images, task.masks)
    return _split(images[None], masks[None], support, seed=0)


def repeat_memory(memory: SupportMemory, times: int) -> SupportMemory:
    """The memory for `times` targets of each support set, which lie next to each other in the batch."""
    if times == 1 or memory.batch == 1:
        return memory
    tensors = {name: tensor.repeat_interleave(times, 0) for name, tensor in memory.tensors.items()}
    return dataclasses.replace(memory, batch=memory.batch * times, tensors=tensors)


def scaled_size(size: Sequence[int], longer_side: int) -> tuple[int, int]:
    """(height, width) of images of `size` with another longer side."""
    height, width = (max(1, round(side * longer_side / max(size))) for side in size)
    return height, width


def _resized(x: Tensor, y: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Images and masks with `size` as their longer side; a mask holds a pixel that it fills by half."""
    shape = scaled_size(x.shape[-2:], size)
    if shape == x.shape[-2:]:
        return x, y
    return resize(x, shape), (level_mask(y, shape, 0.0) >= 0.5).float()


def _split(images: Tensor, masks: Tensor, support: int, seed: int) -> Batch:
    """images: [T, S + Q, 1, H, W]; masks: [T, S + Q, C, H, W]."""
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
