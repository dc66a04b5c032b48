"""Whether the shapes of a forward pass may depend on values."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch

_asked_for = contextvars.ContextVar("icseg_static_shapes", default=False)


def is_static() -> bool:
    """Whether they must not: in `static_shapes`, under torch.compile and export, while a CUDA graph is captured."""
    if torch.compiler.is_compiling() or _asked_for.get():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def static_shapes() -> Iterator[None]:
    """Let no shape of a forward pass depend on values inside the block: nothing then waits for the device."""
    token = _asked_for.set(True)
    try:
        yield
    finally:
        _asked_for.reset(token)
