"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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


def use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def parse_pixels(text: str) -> int | None:
    if text == "own":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"size must be an integer or own, got {text}") from None
