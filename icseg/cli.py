"""The `icseg` command.

Exit codes: 0 done; 1 failed on the way (out of memory, training that diverged); 2 bad input, found before anything is
written; 130 interrupted; 143 terminated. All but 0 come with one sentence on the standard error.
"""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

import icseg

if TYPE_CHECKING:
    from icseg.sparse.budget import Budget

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

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
TERMINATED = 143

OUT_OF_MEMORY = "out of memory: a smaller --size, --batch-size or --budget, or for training smaller batches, needs less"

DATASET_HELP = (
    "Files .npz with images and masks (class ids) [N, H, W], both uint8, and class_names; folders of images and masks; "
    "folders in nnU-Net's layout."
)
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; the GPU if there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
SUPPORT_IMAGES = typer.Option(help="Folder of annotated images.")
SUPPORT_MASKS = typer.Option(help="Folder of their masks, named as the images or with _mask added.")
Size = Annotated[
    str | None,
    typer.Option(
        metavar="PIXELS|own",
        help="Pixels of the longer side that images are scaled to, 32 to 4096 (published architecture: of a square, "
        "128 to 1024); own: their own, up to 4096. 256, or that of the memory, if left out.",
    ),
]
ClassIds = Annotated[list[int] | None, typer.Option("--class", help="A class id to segment; repeatable.")]
Axis = Annotated[
    int | None,
    typer.Option(
        help="Slice volumes along axis 0, 1 or 2 (NIfTI: sagittal, coronal, axial, turned as a radiologist's "
        "viewer shows them; other files as they are)."
    ),
]
Window = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="LOW HIGH", help="Intensities that become black and white; percentiles if left out."),
]
Checkpoint = Annotated[Path | None, typer.Option(help="Weights (.safetensors); the bundled ones if left out.")]


def main() -> None:
    """The entry point: a request to terminate ends like an interruption, with no partial file left."""
    # Read when torch is imported: spinning threads make a busy machine several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, _terminate)
    app()


def _terminate(number: int, frame: Any) -> None:
    raise SystemExit(TERMINATED)


@contextmanager
def _exit_codes() -> Iterator[None]:
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


@contextmanager
def _orientation_warning_in_a_line() -> Iterator[None]:
    """Show `icseg.inputs.OrientationWarning` as one line on the standard error, others as ever."""
    from icseg.inputs import OrientationWarning

    usual = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, OrientationWarning):
            typer.echo(f"icseg: warning: {message}", err=True)
        else:
            usual(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.simplefilter("always", OrientationWarning)
        warnings.showwarning = show
        yield


def _fail(message: str, code: int, error: BaseException) -> NoReturn:
    typer.echo(f"icseg: error: {' '.join(message.split())}", err=True)
    raise typer.Exit(code) from error


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, a GPU, or torch's allocator on the CPU (a plain RuntimeError) ran out of memory."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


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
    out: Annotated[Path, typer.Option(help="Folder for the results.")],
    support_images: Annotated[Path | None, SUPPORT_IMAGES] = None,
    support_masks: Annotated[Path | None, SUPPORT_MASKS] = None,
    memory: Annotated[
        Path | None, typer.Option(help="Supports that `icseg encode` wrote, in place of the two folders.")
    ] = None,
    size: Size = None,
    class_id: ClassIds = None,
    axis: Axis = None,
    window: Window = None,
    threshold: Annotated[float, typer.Option(help="Least probability of a class.")] = 0.5,
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="Average over draws with these seeds; repeatable.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="PATCHES|GFLOPsGF|all",
            help="What a slice may cost: 200 patches, 1.5GF (GFLOPs), or all patches; as many as it needs if left out.",
        ),
    ] = None,
    uncertainty: Annotated[
        bool, typer.Option("--uncertainty", help="Also write uncertainty maps, and say where the budget was short.")
    ] = False,
    overlay: Annotated[bool, typer.Option("--overlay", help="Also write pictures of the masks on the images.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what an earlier, equal run has written.")] = False,
    checkpoint: Checkpoint = None,
    batch_size: Annotated[
        int, typer.Option(help="Slices of a volume that go through the model together, without seeds.")
    ] = 8,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Segment images from a folder of annotated ones; masks come back in each input's size and format."""
    with _exit_codes():
        from icseg.inputs import SegmentOptions
        from icseg.job import SupportFolders, segment_files

        if memory is not None and not support_images and not support_masks:
            source: SupportFolders | Path = memory
        elif memory is None and support_images and support_masks:
            source = SupportFolders(support_images, support_masks)
        else:
            given = {"--support-images": support_images, "--support-masks": support_masks, "--memory": memory}
            names = ", ".join(name for name, value in given.items() if value) or "none"
            raise ValueError(f"supports must be --support-images and --support-masks, or --memory, got {names}")
        _use_threads(threads)
        options = SegmentOptions(
            size=_size(size),
            classes=tuple(class_id) if class_id else None,
            axis=axis,
            window=window,
            batch_size=batch_size,
            threshold=threshold,
            seeds=tuple(seed or ()),
            uncertainty=uncertainty,
            budget=_budget(budget),
        )
        with _orientation_warning_in_a_line():
            report = segment_files(
                targets,
                source,
                out,
                options,
                checkpoint=checkpoint,
                overlay=overlay,
                resume=resume,
                device=device,
            )
    if uncertainty and report.uncovered:
        typer.echo(
            f"icseg: {report.uncovered} of {_count(report.slices, 'slice')}: the budget left patches out where about "
            f"{report.tolerance:.2g} of Dice or more may be lost",
            err=True,
        )
    classes = _classes(report.classes)
    kept = f", {len(report.kept)} kept from an earlier run" if report.kept else ""
    typer.echo(f"{_count(len(report.written), 'target')} segmented into {out}{kept}; classes: {classes}")


@app.command()
def encode(
    support_images: Annotated[Path, SUPPORT_IMAGES],
    support_masks: Annotated[Path, SUPPORT_MASKS],
    out: Annotated[Path, typer.Option(help="File for the memory (.safetensors).")],
    size: Size = None,
    class_id: ClassIds = None,
    axis: Axis = None,
    window: Window = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Encode annotated images once, for any number of `icseg segment --memory`."""
    with _exit_codes():
        from icseg.inputs import SegmentOptions
        from icseg.job import SupportFolders, encode_files

        _use_threads(threads)
        options = SegmentOptions(
            size=_size(size), classes=tuple(class_id) if class_id else None, axis=axis, window=window
        )
        folders = SupportFolders(support_images, support_masks)
        with _orientation_warning_in_a_line():
            support = encode_files(folders, out, options, checkpoint=checkpoint, device=device)
    typer.echo(f"{_count(len(support.pairs), 'example')} encoded into {out}; classes: {_classes(support.holders())}")


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
    out: Annotated[
        Path, typer.Option(help="Folder for the weights, the checkpoints and the log (train.csv, validation.csv).")
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the folder's last checkpoint.")] = False,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Train a model on synthetic tasks.

    In several processes, one a GPU: torchrun --nproc-per-node N -m icseg train ...; the configuration's
    [optimiser] accumulate must be a multiple of N.
    """
    with _exit_codes():
        from icseg.inference import resolve_device
        from icseg.training import train_from_file
        from icseg.training.distributed import is_first_process

        _use_threads(threads)
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


@app.command()
def curves(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of `icseg train`.")],
    out: Annotated[Path, typer.Option(help="Picture to write: .png, .pdf or .svg.")],
    minutes: Annotated[bool, typer.Option("--minutes", help="Draw against minutes in place of steps.")] = False,
) -> None:
    """Draw the losses, validation Dice, learning rate and speed of training runs into one picture."""
    with _exit_codes():
        from icseg.training.curves import save_curves

        save_curves(runs, out, minutes=minutes)
    typer.echo(str(out))


@app.command()
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
    with _exit_codes():
        from icseg.evaluation import EvaluationProtocol, evaluate_datasets, markdown
        from icseg.inference import resolve_device

        if seed and seeds:
            raise ValueError("seeds must be given by --seed or by --seeds, got both")
        protocol = EvaluationProtocol(_pixels(size), support, tuple(seed or range(seeds or 1)), limit)
        _use_threads(threads)
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


def _size(text: str | None) -> int | EllipsisType | None:
    return ... if text is None else _pixels(text)


def _pixels(text: str) -> int | None:
    if text == "own":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"size must be an integer or own, got {text}") from None


def _budget(text: str | None) -> int | Budget | None:
    """PATCHES, GFLOPsGF or all."""
    if text is None:
        return None
    from icseg.sparse.budget import Budget

    if text == "all":
        return Budget(tolerance=0.0)
    number = text.removesuffix("GF")
    try:
        patches, gflops = (int(text), None) if number == text else (None, float(number))
    except ValueError:
        raise ValueError(f"budget must be a number of patches, GFLOPs such as 1.5GF, or all, got {text}") from None
    return patches if gflops is None else Budget(gflops=gflops)


def _classes(holders: dict[int, int | None]) -> str:
    return ", ".join(str(i) if n is None else f"{i} (in {_count(n, 'example')})" for i, n in holders.items())


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


if __name__ == "__main__":
    main()
