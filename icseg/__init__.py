"""In-context image segmentation: a few annotated examples in, masks out, with no training for the new task."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from icseg.config import PatchICLConfig
    from icseg.inference import segment
    from icseg.memory import SupportMemory
    from icseg.model import PatchICL
    from icseg.published.convert import load_published
    from icseg.sparse.budget import Budget

try:
    __version__ = version("icseg")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0+unknown"

_HOMES = {
    "Budget": "icseg.sparse.budget",
    "PatchICL": "icseg.model",
    "PatchICLConfig": "icseg.config",
    "SupportMemory": "icseg.memory",
    "load_published": "icseg.published.convert",
    "segment": "icseg.inference",
}

__all__ = ["Budget", "PatchICL", "PatchICLConfig", "SupportMemory", "__version__", "load_published", "segment"]


def __getattr__(name: str) -> Any:
    """Import on first use: `icseg --help` should not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'icseg' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
