"""Commands that segment: `icseg segment`, `icseg encode`, `icseg demo`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from icseg.cli.options import (
    SUPPORT_IMAGES,
    SUPPORT_MASKS,
    Axis,
    Checkpoint,
    ClassIds,
    Device,
    Size,
    Threads,
    Window,
    parse_pixels,
    use_threads,
)
from icseg.cli.outcome import exit_codes

if TYPE_CHECKING:
    from icseg.sparse.budget import Budget


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
    with exit_codes():
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
        use_threads(threads)
        options = SegmentOptions(
            size=_size(size),
            classes=tuple(class_id) if class_id else None,
            axis=axis,
            window=window,
            batch_size=batch_size,
            threshold=threshold,
            seeds=tuple(seed or ()),
            uncertainty=uncertainty,
            budget=parse_budget(budget),
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
    with exit_codes():
        from icseg.inputs import SegmentOptions
        from icseg.job import SupportFolders, encode_files

        use_threads(threads)
        options = SegmentOptions(
            size=_size(size), classes=tuple(class_id) if class_id else None, axis=axis, window=window
        )
        folders = SupportFolders(support_images, support_masks)
        with _orientation_warning_in_a_line():
            support = encode_files(folders, out, options, checkpoint=checkpoint, device=device)
    typer.echo(f"{_count(len(support.pairs), 'example')} encoded into {out}; classes: {_classes(support.holders())}")


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the example and its results.")] = Path("demo-output"),
    checkpoint: Checkpoint = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Segment the bundled synthetic example, and say how well it went."""
    with exit_codes():
        from icseg.demo import run_demo

        use_threads(threads)
        report = run_demo(out, checkpoint=checkpoint, device=device)
    for target in report.targets:
        typer.echo(f"{target.mask}  overlay: {target.overlay}  Dice: {target.dice:.3f}")
    typer.echo(f"The same again: {report.command}")


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


def _size(text: str | None) -> int | EllipsisType | None:
    return ... if text is None else parse_pixels(text)


def parse_budget(text: str | None) -> int | Budget | None:
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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
