"""The bundled synthetic example, run from end to end.

The files in data/demo were made once, from `generate_task(2**32 - 14, 5, 256, "cells")` of generator version 1, a seed
that no `TaskPool` reaches, so that no model has been trained on it: its first three subjects are the support set, the
others the targets, the second cropped to its upper 192 rows. The cells are marked, the layers behind them are not.
Masks hold the class id 255, which viewers show as white.
"""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from icseg.data.images import read_mask
from icseg.files import written_whole
from icseg.inference import resolve_device
from icseg.inputs import SegmentOptions
from icseg.job import SupportFolders, check_folder, segment_files
from icseg.metrics import dice
from icseg.model import PatchICL

EXAMPLE = Path(__file__).parent / "data" / "demo"
SUPPORTS = ("support_1", "support_2", "support_3")
TARGETS = ("target_1", "target_2")


@dataclass(frozen=True)
class DemoTarget:
    """The files written for one target, and the Dice of its mask against the known truth."""

    mask: Path
    overlay: Path
    dice: float


@dataclass(frozen=True)
class DemoReport:
    """command: the command that does the same with the files that were copied to the output folder."""

    targets: list[DemoTarget]
    command: str


def run_demo(
    out: str | Path, *, checkpoint: Path | None = None, device: str | None = None, progress: bool = True
) -> DemoReport:
    """Copy the example into `out`, segment its targets, write masks and overlays there, and score the masks.

    checkpoint: None takes the bundled weights. Raises OSError or ValueError, before anything is written, for a
    device that is not there, unfit weights, or an `out` that cannot be written to.
    """
    out = Path(out)
    folders = images, masks, targets = out / "support_images", out / "support_masks", out / "targets"
    PatchICL.from_pretrained(checkpoint, device=resolve_device(device))
    for folder in (out, *folders):
        check_folder(folder)
    for name in SUPPORTS:
        _copy(f"{name}.png", images / f"{name}.png")
        _copy(f"{name}_mask.png", masks / f"{name}.png")
    for name in TARGETS:
        _copy(f"{name}.png", targets / f"{name}.png")
    segment_files(
        [targets],
        SupportFolders(images, masks),
        out,
        SegmentOptions(),
        checkpoint=checkpoint,
        overlay=True,
        device=device,
        progress=progress,
    )
    command = ["icseg", "segment", targets, "--support-images", images, "--support-masks", masks, "--out", out]
    return DemoReport([_scored(out, name) for name in TARGETS], shlex.join(map(str, [*command, "--overlay"])))


def _copy(name: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        shutil.copyfile(EXAMPLE / name, temporary)


def _scored(out: Path, name: str) -> DemoTarget:
    mask = out / f"{name}_mask.png"
    predicted, truth = (
        torch.from_numpy(read_mask(path).array > 0)[None] for path in (mask, EXAMPLE / f"{name}_truth.png")
    )
    return DemoTarget(mask, out / f"{name}_overlay.png", dice(predicted, truth).item())
