"""Dice of a model on labelled images and held-out synthetic tasks, beside floors that need no model."""

from __future__ import annotations

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from icseg.baselines.floors import copy_support, otsu
from icseg.data.synthetic import EVALUATION_SEED, generate_task, pool_task_seed
from icseg.data.tensors import as_tensors
from icseg.files import written_whole
from icseg.metrics import dice, hausdorff95, iou
from icseg.model import PatchICL
from icseg.resize import resize

Predictor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(target [B, 1, H, W], support images and masks [B, S, 1, H, W], all in [0, 1]) -> bool [B, 1, H, W]."""

LEGEND = "copy: Dice of the mean of the support masks; Otsu: Dice of Otsu's threshold with the better polarity."
_ARRAYS = ("images", "masks", "class_names", "patient")


@dataclass(frozen=True)
class EvaluationRow:
    """Means over the targets that contain a class.

    dataset, class_name: which; targets: how many. dice, iou: of the thresholded mask; hausdorff95: in pixels.
    copy: Dice of the mean support mask; otsu: Dice of Otsu's threshold with the better polarity.
    """

    dataset: str
    class_name: str
    targets: int
    dice: float
    iou: float
    hausdorff95: float
    copy: float
    otsu: float


@dataclass(frozen=True)
class Pack:
    """Labelled images: images uint8 [N, H, W], masks uint8 [N, H, W] of class ids, 0 is background.

    class_names: by class id. patient: [N], or None where it is not known; a target's supports are other
    patients'. Raises ValueError for arrays that do not fit together, or that leave nothing to score: some class
    must be in images of two patients (two images, where patients are not known).
    """

    name: str
    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    class_names: tuple[str, ...]
    patient: NDArray[np.generic] | None

    @classmethod
    def load(cls, path: str | Path) -> Pack:
        """Read an .npz with `images`, `masks`, `class_names` and, if known, `patient`.

        Raises FileNotFoundError, or ValueError for a file that is not such a pack. Pickled content is
        refused.
        """
        path = Path(path)
        arrays = _read_arrays(path)
        missing = [name for name in _ARRAYS[:3] if name not in arrays]
        if missing:
            raise ValueError(f"pack must hold {', '.join(missing)}, got {path} without")
        names = arrays["class_names"]
        if names.ndim != 1 or names.dtype.kind != "U":
            raise ValueError(f"class_names must be a list of strings, got {names.dtype} {list(names.shape)} in {path}")
        try:
            return cls(path.stem, arrays["images"], arrays["masks"], tuple(names.tolist()), arrays.get("patient"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def __post_init__(self) -> None:
        images, masks = self.images, self.masks
        if images.ndim != 3 or images.shape != masks.shape or {images.dtype, masks.dtype} != {np.dtype(np.uint8)}:
            raise ValueError(
                "pack must hold images and masks of one shape [N, H, W], both uint8, "
                f"got {list(images.shape)} {images.dtype} and {list(masks.shape)} {masks.dtype}"
            )
        if masks.size and masks.max() >= len(self.class_names):
            raise ValueError(f"class_names must name class ids up to {masks.max()}, got {len(self.class_names)} names")
        if self.patient is not None and self.patient.shape != (len(images),):
            raise ValueError(
                f"patient must have one entry an image, shape [{len(images)}], got {list(self.patient.shape)}"
            )
        sources = self.sources()
        if not any(len(np.unique(sources[self.holders(c)])) > 1 for c in range(1, len(self.class_names))):
            raise ValueError("pack must hold some class in images of two patients, got none")

    def sources(self) -> NDArray[np.int64]:
        """[N] what a target must not share with its supports, as a number: the patient, or the image itself."""
        return np.arange(len(self.images)) if self.patient is None else np.unique(self.patient, return_inverse=True)[1]

    def holders(self, class_id: int) -> NDArray[np.int64]:
        """The images that contain the class."""
        return np.flatnonzero((self.masks == class_id).any((1, 2)))


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"pack must be an existing .npz file, got {path}")
    try:
        with zipfile.ZipFile(path):  # np.load would also take a lone array
            pass
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in _ARRAYS if name in file}
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError) as error:
        raise ValueError(f"pack must be a readable .npz file, got {path} ({error})") from error


@dataclass(frozen=True)
class Case:
    """One target with its support set: target, mask [1, H, W]; support_images, support_masks [S, 1, H, W].

    number: of the image or task in its data set; source: what it shares with other images of its patient.
    """

    target: Tensor
    mask: Tensor
    support_images: Tensor
    support_masks: Tensor
    number: int
    source: int


def model_predictor(model: PatchICL) -> Predictor:
    """Masks of `model` at probability one half, on the model's device."""
    device = next(model.parameters()).device

    @torch.inference_mode()
    def predict(target: Tensor, support_images: Tensor, support_masks: Tensor) -> Tensor:
        output = model(target.to(device), support_images.to(device), support_masks.to(device))
        return (output.logits > 0).cpu()

    return predict


def evaluate(
    predict: Predictor,
    pack: str | Path | Pack,
    *,
    support: int = 3,
    seed: int = 0,
    size: int | None = None,
    limit: int | None = None,
    progress: bool = False,
) -> list[EvaluationRow]:
    """Score `predict` on each foreground class of a pack, one row a class.

    Each target that contains the class is segmented from `support` images that contain it, of other patients
    (other images, where patients are not known), drawn by (seed, target); from fewer, where fewer exist. A class
    that no target has a support image for is left out.
    size: pixels of a side, None is the pack's own. limit: targets a class, drawn by the seed; None is all.
    """
    _check_range(1, support=support, size=size, limit=limit)
    _check_range(0, seed=seed)
    pack = pack if isinstance(pack, Pack) else Pack.load(pack)
    rows = []
    for class_id, class_name in list(enumerate(pack.class_names))[1:]:
        count, cases = pack_cases(pack, class_id, support=support, seed=seed, size=size, limit=limit)
        if count:
            bar = tqdm(cases, f"{pack.name} {class_name}", count, leave=False, disable=not progress)
            rows.append(_score(predict, bar, pack.name, class_name))
    return rows


def pack_cases(
    pack: Pack, class_id: int, *, support: int = 3, seed: int = 0, size: int | None = None, limit: int | None = None
) -> tuple[int, Iterator[Case]]:
    """How many targets of a class `evaluate` scores with these arguments, and the targets with their support sets."""
    draws = _draws(pack, class_id, support, seed)[:limit]
    return len(draws), (_case(pack, class_id, target, supports, size) for target, supports in draws)


def synthetic_cases(tasks: int, *, support: int = 3, size: int = 256) -> Iterator[tuple[str, Case]]:
    """The family and the one target, with its support set, of each of the tasks that `evaluate_synthetic` scores."""
    for i in range(tasks):
        task = generate_task(pool_task_seed(EVALUATION_SEED, i), support + 1, size)
        images, masks = as_tensors(task.images, task.masks)
        yield task.family, Case(images[0], masks[0], images[1:], masks[1:], i, i)


def evaluate_synthetic(
    predict: Predictor, tasks: int = 100, *, support: int = 3, size: int = 256, progress: bool = False
) -> list[EvaluationRow]:
    """Score `predict` on class 1 of synthetic tasks that no pool holds: one target a task, one row a family."""
    _check_range(1, tasks=tasks, support=support)
    by_family: dict[str, list[Case]] = {}
    cases = synthetic_cases(tasks, support=support, size=size)
    for family, case in tqdm(cases, "synthetic tasks", tasks, leave=False, disable=not progress):
        by_family.setdefault(family, []).append(case)
    return [_score(predict, cases, "synthetic", family) for family, cases in sorted(by_family.items())]


def evaluate_packs(
    paths: Sequence[str | Path],
    *,
    checkpoint: str | Path | None = None,
    support: int = 3,
    seed: int = 0,
    size: int | None = None,
    limit: int | None = None,
    synthetic_tasks: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> list[EvaluationRow]:
    """Score a checkpoint (None: the bundled one) on packs and on `synthetic_tasks` held-out tasks.

    The other arguments are those of `evaluate`. Raises ValueError if there is nothing to score, FileNotFoundError or
    ValueError for a bad pack or checkpoint.
    """
    _check_range(0, synthetic_tasks=synthetic_tasks)
    if not paths and not synthetic_tasks:
        raise ValueError("paths must name a pack where synthetic_tasks is 0, got none")
    packs = [Pack.load(path) for path in paths]  # all are checked before the first is scored
    predict = model_predictor(PatchICL.from_pretrained(checkpoint, device=device))
    rows = [
        row
        for pack in packs
        for row in evaluate(predict, pack, support=support, seed=seed, size=size, limit=limit, progress=progress)
    ]
    if synthetic_tasks:
        rows += evaluate_synthetic(predict, synthetic_tasks, support=support, size=size or 256, progress=progress)
    return rows


def markdown_table(rows: Sequence[EvaluationRow]) -> str:
    """The rows as a Markdown table, with a last line of means over the rows."""
    header = "| data set | class | targets | Dice | IoU | HD95 (px) | copy | Otsu |\n" + "|---" * 8 + "|\n"
    lines = [
        f"| {row.dataset} | {row.class_name} | {row.targets} | {row.dice:.3f} | {row.iou:.3f} "
        f"| {row.hausdorff95:.1f} | {row.copy:.3f} | {row.otsu:.3f} |\n"
        for row in [*rows, *_mean_row(rows)]
    ]
    return header + "".join(lines)


def write_json(rows: Sequence[EvaluationRow], path: str | Path) -> None:
    """Write the rows as a JSON list of objects; the file appears whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def _mean_row(rows: Sequence[EvaluationRow]) -> list[EvaluationRow]:
    if len(rows) < 2:
        return []
    means = {name: float(np.mean([getattr(row, name) for row in rows])) for name in
             ("dice", "iou", "hausdorff95", "copy", "otsu")}  # fmt: skip
    return [EvaluationRow("mean of rows", "", sum(row.targets for row in rows), **means)]


def _draws(pack: Pack, class_id: int, support: int, seed: int) -> list[tuple[int, NDArray[np.int64]]]:
    """Targets that contain the class, in an order drawn by `seed`, each with its support images."""
    holders, sources = pack.holders(class_id), pack.sources()
    draws = []
    for target in np.random.default_rng((seed, class_id)).permutation(holders):
        others = holders[sources[holders] != sources[target]]
        if len(others):
            chosen = np.random.default_rng((seed, class_id, target)).permutation(others)[:support]
            draws.append((int(target), chosen))
    return draws


def _case(pack: Pack, class_id: int, target: int, supports: NDArray[np.int64], size: int | None) -> Case:
    index = np.concatenate([[target], supports])
    images, masks = as_tensors(pack.images[index], pack.masks[index], (class_id,))
    if size is not None and images.shape[-2:] != (size, size):
        images = resize(images, (size, size))
        masks = F.interpolate(masks, (size, size), mode="nearest-exact")
    return Case(images[0], masks[0], images[1:], masks[1:], target, int(pack.sources()[target]))


def _score(predict: Predictor, cases: Iterable[Case], dataset: str, class_name: str) -> EvaluationRow:
    scores = np.array(list(_scores(predict, cases)))
    return EvaluationRow(dataset, class_name, len(scores), *(float(v) for v in scores.mean(0)))


def _scores(predict: Predictor, cases: Iterable[Case]) -> Iterator[tuple[float, ...]]:
    """Dice, IoU, HD95 of the prediction, Dice of both floors."""
    for case in cases:
        target, truth = case.target[None], case.mask[None] > 0.5
        support_masks = case.support_masks[None]
        mask = predict(target, case.support_images[None], support_masks)
        yield (
            dice(mask, truth).item(),
            iou(mask, truth).item(),
            hausdorff95(mask[0, 0].numpy(), truth[0, 0].numpy()),
            dice(copy_support(support_masks), truth).item(),
            dice(otsu(target, truth), truth).item(),
        )


def _check_range(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
