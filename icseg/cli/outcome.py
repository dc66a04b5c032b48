"""How a command ends: exit codes, and one sentence on the standard error for all but the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
TERMINATED = 143

OUT_OF_MEMORY = "out of memory: a smaller --size, --batch-size or --budget, or for training smaller batches, needs less"


@contextmanager
def exit_codes() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, NotImplementedError, ModuleNotFoundError) as error:
        _fail(str(error), BAD_INPUT, error)
    except FloatingPointError as error:
        _fail(str(error), FAILED, error)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail(OUT_OF_MEMORY, FAILED, error)
    except KeyboardInterrupt:
        typer.echo("icseg: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _fail(message: str, code: int, error: BaseException) -> NoReturn:
    typer.echo(f"icseg: error: {' '.join(message.split())}", err=True)
    raise typer.Exit(code) from error


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, a GPU, or torch's allocator on the CPU (a plain RuntimeError) ran out of memory."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
