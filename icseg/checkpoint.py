"""Checkpoints: one safetensors file that carries its configuration. Nothing here can run code from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from icseg.config import PatchICLConfig
from icseg.files import written_whole

CONFIG_KEY = "icseg_config"
STATE_KEY = "icseg_training"  # what `icseg train` goes on from
RECORD_KEY = "training"  # how a model was made


def bundled_weights() -> Path:
    """The path of the checkpoint that ships with the package."""
    return Path(__file__).parent / "weights" / "icseg-sparse-small.safetensors"


def save_checkpoint(
    path: str | Path, config: PatchICLConfig, state: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write `state` and `config` to `path`; `metadata` holds further strings (how it was trained, say)."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with written_whole(path, durable=True) as temporary:
        save_file(tensors, temporary, {**(metadata or {}), CONFIG_KEY: json.dumps(config.to_dict())})


def load_checkpoint(path: str | Path) -> tuple[PatchICLConfig, dict[str, Tensor]]:
    """The configuration and weights (on the CPU) in `path`.

    Raises FileNotFoundError if there is no file, ValueError if it is corrupt or not an icseg checkpoint.
    """
    path = Path(path)
    metadata, state = _read(path)
    if STATE_KEY in metadata:
        raise ValueError(
            f"checkpoint must hold a model, got {path}, the state of a training run; "
            "its model.safetensors is written at the end"
        )
    if CONFIG_KEY not in metadata:
        raise ValueError(f"checkpoint must carry an icseg configuration, got {path} without one")
    try:
        config = PatchICLConfig.from_dict(json.loads(metadata[CONFIG_KEY]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint must carry a valid icseg configuration, got {path} ({error})") from error
    return config, state


def training_record(path: str | Path | None = None) -> dict[str, Any]:
    """How the model in `path` was trained, as `icseg train` wrote it: its whole configuration, seed, steps, and so on.

    path: None takes the bundled weights. Empty for a model without such a record.
    Raises FileNotFoundError if there is no file, ValueError if it is corrupt.
    """
    metadata = _read_metadata(bundled_weights() if path is None else Path(path))
    return json.loads(metadata.get(RECORD_KEY, "{}"))


def save_half_precision(source: str | Path, target: str | Path) -> None:
    """Copy the checkpoint `source` to `target` with float16 weights: half the size, for sharing.

    What it says of itself is kept. `PatchICL.from_pretrained` gives a float32 model of the rounded weights.
    """
    config, state = load_checkpoint(source)
    rounded = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    save_checkpoint(target, config, rounded, _read_metadata(Path(source)))


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file."""
    with _opened(path) as file:
        # keys(): the file is not a mapping.
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_metadata(path: Path) -> dict[str, str]:
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint must be an existing .safetensors file, got {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint must be a readable safetensors file, got {path} ({error})") from error
