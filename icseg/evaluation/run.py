"""The work of `icseg evaluate`: data sets and checkpoints in, a report and its files out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import icseg
from icseg.checkpoint import bundled_weights
from icseg.data.packs import Pack
from icseg.evaluation.cases import SYNTHETIC, EvaluationProtocol, check_least
from icseg.evaluation.datasets import load_dataset
from icseg.evaluation.outputs import write_folder, write_json
from icseg.evaluation.parts import Parts, file_name
from icseg.evaluation.pictures import Example, picked, place_of, save_examples
from icseg.evaluation.report import Report
from icseg.evaluation.scoring import (
    ClassScores,
    Predictor,
    Unit,
    model_predictor,
    pack_units,
    predicted_mask,
    score_unit,
    synthetic_unit,
)
from icseg.files import check_file, sha256_of
from icseg.job import check_folder
from icseg.metrics import dice
from icseg.model import PatchICL

PICTURES, PICTURED = "pictures", 3


def evaluate_datasets(
    paths: Sequence[str | Path],
    protocol: EvaluationProtocol | None = None,
    *,
    checkpoint: str | Path | None = None,
    compare: str | Path | None = None,
    synthetic_tasks: int = 0,
    patient: str = "",
    out: str | Path | None = None,
    pictures: int | None = None,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Report:
    """Score a checkpoint (None: the bundled one) on data sets and on `synthetic_tasks` held-out tasks.

    compare: a second checkpoint that is scored on the same cases. patient: see `load_dataset`.
    out: a file .json for the scores, or a folder for scores.json, scores.csv, table.md and pictures/, which also keeps
    the scores of each class as soon as they are there; `resume` then takes those of an earlier evaluation with the same
    settings. pictures: targets a class that are drawn; 3 if `out` is a folder and nothing else is asked for.

    Raises ValueError or OSError, before anything is scored or written, for bad data sets, checkpoints or outputs, or
    where there is nothing to score.
    """
    protocol = protocol or EvaluationProtocol()
    check_least(0, synthetic_tasks=synthetic_tasks, pictures=pictures)
    if not paths and not synthetic_tasks:
        raise ValueError("evaluate needs a data set or synthetic tasks to score on, got neither")
    if patient and not any(Path(path).is_dir() for path in paths):
        raise ValueError(f"patient must be empty where no data set is a folder, packs name theirs, got {patient!r}")
    out = None if out is None else Path(out)
    folder = _checked_folder(out, bool(pictures), resume)
    packs = [load_dataset(path, protocol.size, patient=patient, progress=progress) for path in paths]
    _check_names([*(pack.name for pack in packs), *([SYNTHETIC] if synthetic_tasks else [])])
    settings = _settings(protocol, checkpoint, compare)
    parts = None if folder is None else Parts(folder, settings)
    if parts is not None and resume:
        parts.check()
    predict = model_predictor(PatchICL.from_pretrained(checkpoint, device=device))
    rival = None if compare is None else model_predictor(PatchICL.from_pretrained(compare, device=device))

    if parts is not None:
        parts.folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            parts.clear()
    scores: list[ClassScores] = []
    for unit in _units(packs, synthetic_tasks, protocol):
        found = parts.read(unit) if parts is not None else None
        if found is None:
            found = score_unit(predict, unit, compare=rival, progress=progress)
            if parts is not None:
                parts.write(unit, found)
        scores += found
        if folder is not None:
            _draw(predict, unit, found, PICTURED if pictures is None else pictures, folder / PICTURES)
    data = [{"name": pack.name, "sha256": pack.digest()} for pack in packs]
    report = Report.of({**settings, "data_sets": data, "synthetic_tasks": synthetic_tasks}, scores)
    if folder is not None:
        write_folder(report, folder)
    elif out is not None:
        write_json(report, out)
    return report


def _units(packs: Sequence[Pack], synthetic_tasks: int, protocol: EvaluationProtocol) -> list[Unit]:
    units = [unit for pack in packs for unit in pack_units(pack, protocol)]
    return units + ([synthetic_unit(synthetic_tasks, protocol)] if synthetic_tasks else [])


def _checked_folder(out: Path | None, pictures: bool, resume: bool) -> Path | None:
    """`out` if it is a folder, None if it is a file or nothing."""
    if out is not None and out.suffix != ".json":
        check_folder(out)
        return out
    if pictures or resume:
        raise ValueError(f"{'resume needs' if resume else 'pictures need'} a folder as out, got {out or 'none'}")
    if out is not None:
        check_file(out)
    return None


def _check_names(names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"data sets must have different names, got {twice} twice")


def _settings(
    protocol: EvaluationProtocol, checkpoint: str | Path | None, compare: str | Path | None
) -> dict[str, Any]:
    return {
        "icseg": icseg.__version__,
        **dataclasses.asdict(protocol),
        "checkpoint": _identity(checkpoint or bundled_weights()),
        "compare": None if compare is None else _identity(compare),
    }


def _identity(checkpoint: str | Path) -> dict[str, str]:
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint must be an existing .safetensors file, got {path}")
    return {"name": path.name, "sha256": sha256_of(path)}


def _draw(predict: Predictor, unit: Unit, scores: Sequence[ClassScores], count: int, folder: Path) -> None:
    """Draw `count` targets of each class, with their first support set."""
    if not count:
        return
    for one in scores:
        examples = []
        for rank, target in picked(one, count):
            case = unit.cases.of(target.number)
            mask = predicted_mask(predict, case)
            found = dice(mask, case.mask[None] > 0.5).item()
            whose = "" if target.patient is None else f", patient {target.patient}"
            caption = f"{place_of(rank, len(one.targets))}: target {target.number}{whose}, Dice {found:.3f}"
            examples.append(Example(caption, case, mask[0, 0].numpy()))
        path = folder / one.dataset / f"{file_name(one.class_name)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_examples(f"{one.dataset}, {one.class_name}", examples, path)
