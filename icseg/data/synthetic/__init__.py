"""Synthetic in-context segmentation tasks, made from nothing but a seed."""

from icseg.data.synthetic.labels import FAMILIES
from icseg.data.synthetic.pool import EVALUATION_SEED, TRAINING_SEEDS, TaskPool, pool_task_seed, validation_seed
from icseg.data.synthetic.task import GENERATOR_VERSION, MAX_CLASSES, SyntheticTask, generate_task

__all__ = [
    "EVALUATION_SEED",
    "FAMILIES",
    "GENERATOR_VERSION",
    "MAX_CLASSES",
    "TRAINING_SEEDS",
    "SyntheticTask",
    "TaskPool",
    "generate_task",
    "pool_task_seed",
    "validation_seed",
]
