"""Synthetic in-context segmentation tasks, made from nothing but a seed."""

from icseg.data.synthetic.labels import FAMILIES
from icseg.data.synthetic.pool import TaskPool, pool_task_seed
from icseg.data.synthetic.task import GENERATOR_VERSION, SyntheticTask, generate_task

__all__ = ["FAMILIES", "GENERATOR_VERSION", "SyntheticTask", "TaskPool", "generate_task", "pool_task_seed"]
