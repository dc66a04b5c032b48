"""Commands that train and score: `icseg train`, `icseg curves`, `icseg evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from icseg.cli.options import Checkpoint, Device, Threads, parse_pixels, use_threads
from icseg.cli.outcome import INTERRUPTED, exit_codes

DATASET_HELP = (
    "Files .npz with images and masks (class ids) [N, H, W], both uint8, and class_names; folders of images and masks; "
    "folders in nnU-Net's layout."
)


def train(
    config: Annotated[Path, typer.Option(help="TOML file with the model, the tasks and the schedule.")],
    out: Annotated[
        Path, typer.Option(help="Folder for the weights, the checkpoints and the log (train.csv, validation.csv).")
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last checkpoint.")] = False,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Train a model on synthetic tasks, data sets on disk, or both.

    In several processes, one a GPU: torchrun --nproc-per-node N -m icseg train ...; the configuration's
    [optimiser] accumulate must be a multiple of N.
    """
    with exit_codes():
        from icseg.inference import resolve_device
        from icseg.training import train_from_file
        from icseg.training.distributed import is_first_process

        use_threads(threads)
        result = train_from_file(config, out, resume=resume, device=resolve_device(device))
    if is_first_process():
        dice = "" if result.dice is None else f", validation Dice {result.dice:.3f}"
        typer.echo(f"{result.steps} steps in {result.minutes:.1f} minutes{dice}")
        if result.finished:
            typer.echo(str(result.model))
        else:
            typer.echo(f"icseg: interrupted; --resume goes on in {out}", err=True)
    if not result.finished:
        raise typer.Exit(INTERRUPTED)


def curves(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of `icseg train`.")],
    out: Annotated[Path, typer.Option(help="Picture to write: .png, .pdf or .svg.")],
    minutes: Annotated[bool, typer.Option("--minutes", help="Draw against minutes in place of steps.")] = False,
) -> None:
    """Draw the losses, validation Dice, learning rate and speed of training runs into one picture."""
    with exit_codes():
        from icseg.training.curves import save_curves

        save_curves(runs, out, minutes=minutes)
    typer.echo(str(out))


def evaluate(
    datasets: Annotated[list[Path] | None, typer.Argument(metavar="DATASET", help=DATASET_HELP)] = None,
    synthetic: Annotated[
        int, typer.Option(min=0, metavar="N", help="Score on N synthetic tasks that training never holds, too.")
    ] = 0,
    checkpoint: Checkpoint = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="CHECKPOINT", help="Weights of a second model, scored on the same cases.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for scores, table and pictures; or a .json file for the scores.")
    ] = None,
    support: Annotated[int, typer.Option(min=1, help="Support pairs a target.")] = 3,
    size: Annotated[
        str, typer.Option(metavar="PIXELS|own", help="Pixels of a side, 32 to 4096; own: the data set's own.")
    ] = "256",
    limit: Annotated[int | None, typer.Option(min=1, help="Targets a class, at most.")] = None,
    patient: Annotated[
        str,
        typer.Option(metavar="REGEX", help="What its one group matches in a file's name is the patient; of folders."),
    ] = "",
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="Draws the support sets; repeatable: a set a seed. 0 if left out.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, metavar="N", help="In place of --seed: seeds 0 to N - 1.")] = None,
    pictures: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Targets a class to draw, worst to best; 3 with a folder as --out."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an earlier, equal run has scored.")] = False,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Score a model on labelled data sets or synthetic tasks, beside floors that need no model."""
    with exit_codes():
        from icseg.evaluation import EvaluationProtocol, evaluate_datasets, markdown
        from icseg.inference import resolve_device

        if seed and seeds:
            raise ValueError("seeds must be given by --seed or by --seeds, got both")
        protocol = EvaluationProtocol(parse_pixels(size), support, tuple(seed or range(seeds or 1)), limit)
        use_threads(threads)
        report = evaluate_datasets(
            datasets or [],
            protocol,
            checkpoint=checkpoint,
            compare=compare,
            synthetic_tasks=synthetic,
            patient=patient,
            out=out,
            pictures=pictures,
            resume=resume,
            device=resolve_device(device),
        )
    typer.echo(markdown(report), nl=False)
