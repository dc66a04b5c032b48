"""The work of `icseg segment` and `icseg encode`: files in, files out; all is checked before the first is written."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import icseg
from icseg.checkpoint import bundled_weights
from icseg.data.images import list_images, map_suffix, stem_of, suffix_of, write_like
from icseg.data.pairs import distinct_files, pair_files
from icseg.files import check_file, sha256_of, written_whole
from icseg.inference import ORIENTATION, Segmenter, check_targets, resolve_device
from icseg.inputs import EncodedSupport, OrientationWarning, SegmentOptions, SupportSet
from icseg.memory import SupportMemory
from icseg.model import PatchICL
from icseg.overlay import save_overlay

RECORD = "icseg.json"
MASK_ENDING = "_mask"  # of masks that are written, and of support masks that may have it
WITHOUT_EFFECT = ("batch_size",)  # options that change a result by no more than rounding


@dataclass(frozen=True)
class Outputs:
    """The files of one target; those not asked for are None."""

    mask: Path
    uncertainty: Path | None
    overlay: Path | None

    def paths(self) -> list[Path]:
        return [path for path in (self.mask, self.uncertainty, self.overlay) if path is not None]


@dataclass(frozen=True)
class SupportFolders:
    """Folders of annotated images and their masks, paired by file name without ending; STEM_mask goes with STEM."""

    images: Path
    masks: Path


@dataclass
class JobReport:
    """What `segment_files` did.

    written, kept: the outputs made now, and those that an earlier run had made.
    classes:       {class id: number of support images or slices that hold it, None if a memory does not say}.
    slices:        of the outputs made now.
    uncovered:     those of them where a limit of patches or GFLOPs left more than `tolerance` of expected error.
    tolerance:     that of the model's adaptive budget; None if it has none.
    """

    written: list[Outputs]
    kept: list[Outputs]
    classes: dict[int, int | None]
    slices: int
    uncovered: int = 0
    tolerance: float | None = None


def segment_files(
    targets: Sequence[Path],
    source: SupportFolders | Path,
    out: Path,
    options: SegmentOptions,
    *,
    checkpoint: Path | None = None,
    overlay: bool = False,
    resume: bool = False,
    device: str | None = None,
    progress: bool = True,
) -> JobReport:
    """Segment files, and all images of folders, into `out`: STEM_mask, STEM_uncertainty and STEM_overlay.

    source: the supports, or the file of a memory that `encode_files` wrote. `resume` keeps outputs that a run with
    the same settings, which are recorded in `out`/icseg.json, made of the same inputs; without it, what is there is
    replaced. Raises ValueError or OSError, in one sentence, before anything is written, if any input is unfit; a file
    appears whole or not at all. Warns as `icseg.inference.check_targets`.
    """
    folders = [source.images, source.masks] if isinstance(source, SupportFolders) else []
    _check_out_is_no_input_folder(out, [*targets, *folders])
    files = find_targets(targets)
    plan = {path: _outputs(path, out, options.uncertainty, overlay) for path in files}
    pairs = pair_supports(source.images, source.masks) if isinstance(source, SupportFolders) else []
    inputs = [*files, *(path for pair in pairs for path in pair)]
    check_folder(out)
    _check_no_input_is_output(inputs, [path for outputs in plan.values() for path in outputs.paths()])

    support: SupportSet | EncodedSupport
    if isinstance(source, SupportFolders):
        support = SupportSet([image for image, _ in pairs], [mask for _, mask in pairs], options)
        content: object = [[stem_of(image), sha256_of(image), sha256_of(mask)] for image, mask in pairs]
    else:
        support, content = EncodedSupport(SupportMemory.load(source), options), sha256_of(source)
    options = support.settle(options)
    weights = checkpoint or bundled_weights()
    record = Record(out / RECORD, _settings(content, weights, options, overlay))
    if resume:
        record.read()
    kept = [path for path in files if record.holds(path, plan[path])]
    remaining = [path for path in files if path not in kept]
    slices = check_targets(remaining, [str(path) for path in remaining], support, options)
    place = resolve_device(device)
    written, earlier = ([plan[path] for path in paths] for paths in (remaining, kept))
    report = JobReport(written, earlier, support.holders(), sum(slices))
    if not remaining:
        return report
    model = PatchICL.from_pretrained(weights, device=place)
    segmenter = Segmenter(model, support, options, place)
    report.tolerance = getattr(model.config, "tolerance", None)

    out.mkdir(parents=True, exist_ok=True)
    record.write()
    with tqdm(total=report.slices, unit="slice", disable=None if progress else True) as bar:
        for path in remaining:
            bar.set_postfix_str(path.name)
            digest = sha256_of(path)
            errors = _write(segmenter, path, plan[path], bar)
            if options.limited and report.tolerance is not None:
                report.uncovered += sum(error > report.tolerance for error in errors)
            record.add(path, digest)
    return report


def encode_files(
    source: SupportFolders,
    out: Path,
    options: SegmentOptions,
    *,
    checkpoint: Path | None = None,
    device: str | None = None,
) -> SupportSet:
    """Encode supports into the file `out` (.safetensors), for `segment_files`; the set that was encoded.

    Raises and warns likewise; the file appears whole or not at all.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"out must end in .safetensors, got {out}")
    check_file(out)
    pairs = pair_supports(source.images, source.masks)
    support = SupportSet([image for image, _ in pairs], [mask for _, mask in pairs], options)
    if len(support.anatomical) > 1:
        warnings.warn(ORIENTATION, OrientationWarning, stacklevel=2)
    place = resolve_device(device)
    weights = checkpoint or bundled_weights()
    if weights.resolve() == out.resolve():
        raise ValueError(f"out must not replace the checkpoint, got {out} as both")
    model = PatchICL.from_pretrained(weights, device=place)
    Segmenter(model, support, options, place).memory.save(out)
    return support


class Record:
    """The settings that the outputs in a folder were made with, and the inputs that are done."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.done: dict[str, str] = {}

    def read(self) -> None:
        """Take over what an earlier run did. Raises ValueError if its settings were others."""
        if not self.path.exists():
            return
        try:
            saved = json.loads(self.path.read_text())
            settings, done = dict(saved["settings"]), dict(saved["done"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} must be the record of an earlier run, got a damaged file") from error
        if settings != self.settings:
            names = sorted(settings.keys() | self.settings.keys())
            other = [key for key in names if settings.get(key) != self.settings.get(key)]
            raise ValueError(
                f"resume needs the settings of the run in {self.path.parent}, got another {', '.join(other)}"
            )
        self.done = done

    def holds(self, path: Path, outputs: Outputs) -> bool:
        """Whether the outputs of the input at `path` are there and were made of its present content."""
        known = self.done.get(stem_of(path))
        return known is not None and all(p.is_file() for p in outputs.paths()) and known == sha256_of(path)

    def add(self, path: Path, digest: str) -> None:
        self.done[stem_of(path)] = digest
        self.write()

    def write(self) -> None:
        with written_whole(self.path) as temporary:
            temporary.write_text(json.dumps({"settings": self.settings, "done": self.done}, indent=1) + "\n")


def check_folder(out: Path) -> None:
    """Raise ValueError unless `out` is a folder that can be written to, or can be made."""
    existing = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"out must be a folder that can be written to, got {out}")


def find_targets(targets: Sequence[Path]) -> list[Path]:
    """The files among `targets` and the images of the folders among them, whose names must differ."""
    files: list[Path] = []
    for target in targets:
        if not target.is_dir():
            files.append(target)
            continue
        images = list_images(target)
        if not images:
            raise ValueError(f"{target} must hold at least one image to segment, got none of a known format")
        files += images
    return distinct_files(files, "targets")


def pair_supports(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """(image, mask) files of the two folders, STEM with STEM or STEM_mask; all must have a partner."""
    return pair_files(images, masks, "support", (MASK_ENDING,))


def _outputs(path: Path, out: Path, uncertainty: bool, overlay: bool) -> Outputs:
    if not suffix_of(path):
        raise ValueError(f"{path} must be of a known format (PNG, JPEG, BMP, TIFF, NIfTI, npy, npz)")
    base, suffix = stem_of(path), map_suffix(path)
    return Outputs(
        out / f"{base}{MASK_ENDING}{suffix}",
        out / f"{base}_uncertainty{suffix}" if uncertainty else None,
        out / f"{base}_overlay.png" if overlay else None,
    )


def _write(segmenter: Segmenter, path: Path, outputs: Outputs, bar: tqdm) -> tuple[float, ...]:
    """Write what was found; the errors left uncovered, slice by slice."""
    result = segmenter(path, on_slices=bar.update)
    write_like(result.image, outputs.mask, result.mask)
    if outputs.uncertainty is not None and result.uncertainty is not None:
        write_like(result.image, outputs.uncertainty, result.uncertainty)
    if outputs.overlay is not None:
        save_overlay(result, segmenter.options, outputs.overlay)
    return result.uncovered_errors or ()


def _check_out_is_no_input_folder(out: Path, inputs: list[Path]) -> None:
    if any(path.is_dir() and path.resolve() == out.resolve() for path in inputs):
        raise ValueError(f"out must not be a folder of targets or supports, got {out}")


def _check_no_input_is_output(inputs: list[Path], outputs: list[Path]) -> None:
    written = {path.resolve() for path in outputs}
    for path in inputs:
        if path.resolve() in written:
            raise ValueError(f"out must not make an output replace an input, got {path} as both")


def _settings(support: object, weights: Path, options: SegmentOptions, overlay: bool) -> dict[str, Any]:
    chosen = {key: value for key, value in asdict(options).items() if key not in WITHOUT_EFFECT}
    settings = {
        "version": icseg.__version__,
        **chosen,
        "overlay": overlay,
        "checkpoint": sha256_of(weights),
        "support": support,
    }
    return json.loads(json.dumps(settings))  # as it reads back: lists for tuples
