"""Training on synthetic tasks and data sets: configuration, data order, loop, checkpoints, log."""

from icseg.data.folders import SourceConfig
from icseg.training.augmentation import AugmentationConfig
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
    "AugmentationConfig",
    "DataConfig",
    "OptimiserConfig",
    "RunConfig",
    "ScheduleConfig",
    "ScheduledNetwork",
    "SourceConfig",
    "TrainingConfig",
    "TrainingResult",
    "train",
    "train_from_file",
    "validate",
]
