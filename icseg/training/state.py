"""The state of an interrupted run: one safetensors file, written whole, read without running code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from icseg.checkpoint import STATE_KEY
from icseg.files import written_whole
from icseg.training.config import TrainingConfig

STATE_FILE = "state.safetensors"


@dataclass
class Progress:
    """How far a run is.

    step:         optimiser steps done; elapsed: seconds spent; skipped: steps left out as not finite.
    dice:         mean Dice of the last validation, None before the first; validated_at: its step.
    temperature:  of the trained model; None until the run is finished.
    """

    step: int = 0
    elapsed: float = 0.0
    skipped: int = 0
    dice: float | None = None
    validated_at: int = -1
    temperature: float | None = None


def save_state(
    directory: Path,
    config: TrainingConfig,
    progress: Progress,
    model: nn.Module,
    average: nn.Module,
    optimiser: torch.optim.Optimizer,
) -> None:
    """Write weights, their average, the optimiser's moments and the progress.

    No random state is kept: data, augmentation and draws are functions of the seed and the step.
    """
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"average/{name}": tensor for name, tensor in average.state_dict().items()}
    for index, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser/{index}/{name}": torch.as_tensor(value) for name, value in moments.items()}
    metadata = {STATE_KEY: json.dumps({"config": config.to_dict(), "progress": vars(progress)})}
    # clone: safetensors refuses tensors that share storage.
    whole = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with written_whole(directory / STATE_FILE, durable=True) as temporary:
        save_file(whole, temporary, metadata)


def load_state(
    directory: Path,
    config: TrainingConfig,
    model: nn.Module,
    average: nn.Module,
    optimiser: torch.optim.Optimizer,
) -> Progress:
    """Restore what `save_state` wrote.

    Raises FileNotFoundError without a state file; ValueError for a corrupt one, or one of a run with another
    configuration (all but [run], and its seed).
    """
    metadata, tensors = _read(directory / STATE_FILE)
    _check_same_run(metadata["config"], config)
    try:
        _restore(tensors, model, average, optimiser)
        return Progress(**metadata["progress"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{directory / STATE_FILE} must hold the state of this model, got another ({error})"
        ) from error


def _restore(
    tensors: dict[str, Tensor], model: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer
) -> None:
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimiser": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor
    model.load_state_dict(parts["model"])
    average.load_state_dict(parts["average"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts["optimiser"].items():
        index, _, moment = name.partition("/")
        moments.setdefault(int(index), {})[moment] = tensor
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": moments, "param_groups": groups})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"resume needs a run's {STATE_FILE}, got {path.parent} without one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        state = json.loads(metadata[STATE_KEY])
        return {name: state[name] for name in ("config", "progress")}, tensors
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must be the state of a training run, got another or a corrupt file") from error


def _check_same_run(saved: dict[str, Any], config: TrainingConfig) -> None:
    """A key that an older version did not write has its default."""
    try:
        saved = TrainingConfig.from_dict(saved).to_dict()
    except ValueError as error:
        raise ValueError(f"a resumed run must have a configuration of this version of icseg, got {error}") from error
    now = config.to_dict()
    changed = [
        f"[{table}] {key}"
        for table, values in now.items()
        for key in sorted({*values, *saved[table]})
        if (table != "run" or key == "seed") and values.get(key) != saved[table].get(key)
    ]
    if changed:
        raise ValueError(f"a resumed run must keep its configuration, got another {', '.join(changed)}")
