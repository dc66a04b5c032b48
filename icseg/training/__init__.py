"""Training on synthetic tasks: configuration, data order, loop, checkpoints, log."""

from icseg.training.config import (
    DataConfig,
    OptimiserConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)
from icseg.training.loop import TrainingResult, train, train_from_file
from icseg.training.trainer import ScheduledNetwork
from icseg.training.validation import validate

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
