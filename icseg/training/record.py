"""What a trained model's file says of how it was made."""

from __future__ import annotations

import json

import torch

import icseg
from icseg.checkpoint import RECORD_KEY
from icseg.data.synthetic import GENERATOR_VERSION
from icseg.training.config import TrainingConfig
from icseg.training.distributed import Processes
from icseg.training.state import Progress


def model_metadata(config: TrainingConfig, progress: Progress, processes: Processes) -> dict[str, str]:
    """For `save_checkpoint`; `icseg.checkpoint.training_record` reads it. `license` is where model hubs look for it."""
    record = {
        "config": config.to_dict(),
        "seed": config.run.seed,
        "generator": GENERATOR_VERSION,
        **vars(progress),
        "minutes": progress.elapsed / 60,
        "licence": config.run.licence,
        "icseg": icseg.__version__,
        "torch": torch.__version__,
        "device": processes.device.type,
        "processes": processes.count,
    }
    return {RECORD_KEY: json.dumps(record), "license": config.run.licence}
