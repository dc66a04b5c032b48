"""Synthetic in-context segmentation tasks, made from nothing but a seed."""

from icseg.data.synthetic.fresh import FreshTasks
from icseg.data.synthetic.pool import EVALUATION_SEED, TRAINING_SEEDS, TaskPool, pool_task_seed, validation_seed
from icseg.data.synthetic.task import (
    FAMILIES,
    GENERATOR_VERSION,
    MAX_CLASSES,
    SyntheticTask,
    TaskBatch,
    generate_task,
    generate_tasks,
)

__all__ = [
    "EVALUATION_SEED",
    "FAMILIES",
    "FreshTasks",
    "GENERATOR_VERSION",
    "MAX_CLASSES",
    "TRAINING_SEEDS",
    "SyntheticTask",
    "TaskBatch",
    "TaskPool",
    "generate_task",
    "generate_tasks",
    "pool_task_seed",
    "validation_seed",
]
