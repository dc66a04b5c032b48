"""The `icseg` command.

Exit codes: 0 done; 1 failed on the way (out of memory, training that diverged); 2 bad input, found before anything is
written; 130 interrupted; 143 terminated. All but 0 come with one sentence on the standard error.
"""

from __future__ import annotations

import json
import os
import signal
from typing import Annotated, Any

import typer

import icseg
from icseg.cli.outcome import OUT_OF_MEMORY, TERMINATED
from icseg.cli.research import curves, evaluate, train
from icseg.cli.segmenting import demo, encode, segment

__all__ = ["OUT_OF_MEMORY", "app", "main"]

app = typer.Typer(
    name="icseg",
    help="Segment images from a few annotated examples, with no training for the new task.",
    epilog="Exit codes: 0 done, 1 failed on the way (out of memory, diverged training), 2 bad input, 130 interrupted, "
    "143 terminated.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The entry point: a request to terminate ends like an interruption, with no partial file left."""
    # Read when torch is imported: spinning threads make a busy machine several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(number: int, frame: Any) -> None:
    raise SystemExit(TERMINATED)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"icseg {icseg.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, devices, threads, and each op's backends with the reason where one is missing."""
    from icseg.doctor import examine, format_report

    report = examine()
    typer.echo(json.dumps(report, indent=2) if as_json else format_report(report))


for _command in (segment, encode, demo, doctor, train, curves, evaluate):
    app.command()(_command)
