"""Small training runs: tasks, a configuration, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icseg.checkpoint import load_checkpoint
from icseg.training import TrainingConfig
from icseg.training.log import TRAIN_FILE, VALIDATION_FILE, Row, Table

SIZE = 32
MODEL = {
    "levels": [16, 32],
    "target_patches": [4, 6],
    "support_patches": [4, 4],
    "dim": 16,
    "depth": 1,
    "heads": 2,
    "stem_channels": 8,
    "propagation_heads": 2,
    "propagation_key_dim": 4,
    "propagation_value_dim": 4,
}
DATA = {
    "tasks": 5,
    "size": SIZE,
    "subjects": 4,
    "tasks_per_step": 2,
    "targets": 2,
    "max_support": 2,
    "multi_class": 0.0,
}


@dataclass
class Task:
    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]


def make_task(seed: int, subjects: int = 4) -> Task:
    """Bright squares on noise."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((subjects, SIZE, SIZE), np.uint8)
    for mask in masks:
        top, left = rng.integers(0, SIZE - 14, 2)
        mask[top : top + 14, left : left + 14] = 1
    return Task((masks * 140 + rng.integers(0, 90, masks.shape)).astype(np.uint8), masks)


POOLS = ([make_task(i) for i in range(5)], [make_task(100)])


def tiny(steps: int = 6, **sections: dict[str, object]) -> TrainingConfig:
    tables: dict[str, dict[str, object]] = {
        "model": MODEL,
        "data": DATA,
        "schedule": {"steps": steps, "warmup": 2},
        "loss": {"covered_bce": 1.0, "focal": 0},
        "run": {"log_steps": 1, "validate_steps": 4, "precision": "float32"},
    }
    for name, table in sections.items():
        tables[name] = {**tables.get(name, {}), **table}
    return TrainingConfig.from_dict(tables)


def accumulated(accumulate: int, steps: int = 5) -> TrainingConfig:
    return tiny(steps, optimiser={"accumulate": accumulate}, data={"multi_class": 0.5})


def weights(directory: Path) -> dict[str, Tensor]:
    return load_checkpoint(directory / "model.safetensors")[1]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(directory: Path) -> tuple[list[Row], list[Row]]:
    """The rows of training and of validation, without those numbers that differ from run to run."""
    passing = ("minutes", "samples_per_second", "peak_memory_mib")
    tables = [Table(directory / name).rows() for name in (TRAIN_FILE, VALIDATION_FILE)]
    training, validation = ([{k: v for k, v in row.items() if k not in passing} for row in rows] for rows in tables)
    return training, validation


def logged_steps(directory: Path) -> tuple[list[float], list[float]]:
    training, validation = logged(directory)
    return [row["step"] for row in training], [row["step"] for row in validation]


def make_classes(seed: int, classes: int, size: tuple[int, int] = (SIZE, SIZE)) -> Task:
    """Class c fills the rows 4 (c - 1) to 4 c - 1 of every subject, in brightness 40 c."""
    masks = np.zeros((4, *size), np.uint8)
    for c in range(1, classes + 1):
        masks[:, 4 * c - 4 : 4 * c] = c
    return Task(masks * np.uint8(40) + np.uint8(seed), masks)
