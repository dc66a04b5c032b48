"""Training on synthetic tasks: configuration, data order, loop, checkpoints."""

from icseg.training.config import (
    DataConfig,
    OptimiserConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)
from icseg.training.loop import ScheduledNetwork, TrainingResult, train, train_from_file, validate

__all__ = [
    "DataConfig",
    "OptimiserConfig",
    "RunConfig",
    "ScheduleConfig",
    "ScheduledNetwork",
    "TrainingConfig",
    "TrainingResult",
    "train",
    "train_from_file",
    "validate",
]
