"""The `icseg` command. Bad input ends it with one sentence and exit code 2, before anything is written."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import icseg

app = typer.Typer(
    name="icseg",
    help="Segment images from a few annotated examples, with no training for the new task.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

BAD_INPUT = 2
INTERRUPTED = 130
TERMINATED = 143

PACK_HELP = "Files .npz with images [N, H, W], masks of class ids [N, H, W], and class_names."
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the GPU if there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights (.safetensors); the bundled ones if left out.")]


def main() -> None:
    """The entry point: a request to terminate ends like an interruption, with no partial file left."""
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(number: int, frame: Any) -> None:
    raise SystemExit(TERMINATED)


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, NotImplementedError) as error:
        typer.echo(f"icseg: error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(BAD_INPUT) from error
    except KeyboardInterrupt:
        typer.echo("icseg: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None


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


@app.command()
def segment(
    targets: Annotated[list[Path], typer.Argument(metavar="TARGET", help="Images, volumes, or folders of them.")],
    support_images: Annotated[Path, typer.Option(help="Folder of annotated images.")],
    support_masks: Annotated[Path, typer.Option(help="Folder of their masks, with the same names.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    size: Annotated[int, typer.Option(help="Pixels of the square the model sees, 128 to 1024.")] = 256,
    class_id: Annotated[list[int] | None, typer.Option("--class", help="A class id to segment; repeatable.")] = None,
    axis: Annotated[
        int | None,
        typer.Option(help="Slice volumes along axis 0, 1 or 2 (NIfTI: sagittal, coronal, axial)."),
    ] = None,
    window: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="LOW HIGH", help="Intensities that become black and white; percentiles if left out."),
    ] = None,
    threshold: Annotated[float, typer.Option(help="Least probability of a class.")] = 0.5,
    seed: Annotated[list[int] | None, typer.Option(help="Average over draws with these seeds; repeatable.")] = None,
    uncertainty: Annotated[bool, typer.Option("--uncertainty", help="Also write uncertainty maps.")] = False,
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write pictures of the masks on the images.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an earlier, equal run has written.")] = False,
    checkpoint: Checkpoint = None,
    batch_size: Annotated[int, typer.Option(help="Slices that go through the model together.")] = 8,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Segment images from a folder of annotated ones; masks come back in each input's size and format."""
    with _exit_codes():
        from icseg.inputs import SegmentOptions
        from icseg.job import segment_files

        _use_threads(threads)
        options = SegmentOptions(
            size=size,
            classes=tuple(class_id) if class_id else None,
            axis=axis,
            window=window,
            batch_size=batch_size,
            threshold=threshold,
            seeds=tuple(seed or ()),
            uncertainty=uncertainty,
        )
        report = segment_files(
            targets,
            support_images,
            support_masks,
            out,
            options,
            checkpoint=checkpoint,
            overlay=overlay,
            resume=resume,
            device=device,
        )
    classes = ", ".join(f"{i} (in {_count(n, 'example')})" for i, n in report.classes.items())
    kept = f", {len(report.kept)} kept from an earlier run" if report.kept else ""
    typer.echo(f"{_count(len(report.written), 'target')} segmented into {out}{kept}; classes: {classes}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the example and its results.")] = Path("demo-output"),
    checkpoint: Checkpoint = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Segment the bundled synthetic example, and say how well it went."""
    with _exit_codes():
        from icseg.demo import run_demo

        _use_threads(threads)
        report = run_demo(out, checkpoint=checkpoint, device=device)
    for target in report.targets:
        typer.echo(f"{target.mask}  overlay: {target.overlay}  Dice: {target.dice:.3f}")
    typer.echo(f"The same again: {report.command}")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print versions, devices, threads, and each op's backends with the reason where one is missing."""
    from icseg.doctor import examine, format_report

    report = examine()
    typer.echo(json.dumps(report, indent=2) if as_json else format_report(report))


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="TOML file with the model, the tasks and the schedule.")],
    out: Annotated[Path, typer.Option(help="Folder for the weights, the checkpoints and the log.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last checkpoint.")] = False,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Train a model on synthetic tasks."""
    with _exit_codes():
        from icseg.inference import resolve_device
        from icseg.training import train_from_file

        _use_threads(threads)
        result = train_from_file(config, out, resume=resume, device=resolve_device(device))
    dice = "" if result.dice is None else f", validation Dice {result.dice:.3f}"
    typer.echo(f"{result.steps} steps in {result.minutes:.1f} minutes{dice}")
    if not result.finished:
        typer.echo("icseg: interrupted; --resume goes on", err=True)
        raise typer.Exit(INTERRUPTED)
    typer.echo(str(result.model))


@app.command()
def evaluate(
    packs: Annotated[list[Path], typer.Argument(metavar="PACK", help=PACK_HELP)],
    checkpoint: Checkpoint = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the scores.")] = None,
    support: Annotated[int, typer.Option(min=1, help="Support pairs a target.")] = 3,
    size: Annotated[int | None, typer.Option(min=32, help="Pixels of a side; the pack's own if left out.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Targets a class, at most.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the support sets.")] = 0,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Score a model on labelled packs, beside two floors that need no model."""
    with _exit_codes():
        from icseg.evaluation import evaluate_packs, markdown_table, write_json
        from icseg.inference import resolve_device

        _use_threads(threads)
        rows = evaluate_packs(
            packs,
            checkpoint=checkpoint,
            support=support,
            seed=seed,
            size=size,
            limit=limit,
            device=resolve_device(device),
        )
        if out is not None:
            write_json(rows, out)
    typer.echo(markdown_table(rows), nl=False)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


if __name__ == "__main__":
    main()
