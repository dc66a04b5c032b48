"""The images of a data set as they are trained on, kept on disk: read, normalised and scaled once.

Each file has two in the cache, under a name made of its path, size and time of change, and of what is done to it:
NAME.npy, uint8 [2, P, size, size], its images and masks of class ids; and NAME.json, written last, which describes
them. Images are treated as at inference (percentiles of each image or volume) and brought into a square as for models
that take nothing else: scaled by one factor, and continued at the shorter sides by their edge pixels, masks by
background. Slices without any class are left out.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from icseg.data.folders.listing import Item, Listing
from icseg.data.formats.content import Array, unit_to_bytes
from icseg.data.frame import SquareFrame
from icseg.data.images import Image, read_image, read_mask
from icseg.data.normalise import intensity_window, normalise
from icseg.data.packs import Pack
from icseg.files import written_whole

CACHE_VERSION = 1
LARGEST_ID = 255


@dataclass(frozen=True)
class Entry:
    """One file of a data set in the cache.

    path:        of the pixels.
    pixels:      for each slice, {class id: number of its pixels}.
    patients:    of each slice. None: the file's.
    class_names: by class id, as far as the file says.
    """

    path: Path
    pixels: list[dict[int, int]]
    patients: list[str] | None = None
    class_names: dict[int, str] = field(default_factory=dict)

    def read(self, plane: int) -> NDArray[np.uint8]:
        """[2, size, size]: image and mask of one slice."""
        return np.array(np.load(self.path, mmap_mode="r", allow_pickle=False)[:, plane])


def cached_entries(listing: Listing, directory: Path, size: int, *, progress: bool = True) -> list[Entry]:
    """The entry of each item, made now where it is missing. Raises ValueError that names a file that is unfit."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{_key(item, listing.config.axis, size)}.npy" for item in listing.items]
    missing = sum(not _is_whole(path) for path in paths)
    with tqdm(
        total=len(paths),
        initial=len(paths) - missing,
        desc=f"reading {listing.config.name}",
        unit="file",
        disable=not progress or not missing,
    ) as bar:
        for item, path in zip(listing.items, paths, strict=True):
            if not _is_whole(path):
                _write(item, listing.config.axis, size, path)
                bar.update()
    return [_read_entry(path) for path in paths]


def _key(item: Item, axis: int | None, size: int) -> str:
    files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in item.files]
    return hashlib.sha256(json.dumps([CACHE_VERSION, size, axis, files]).encode()).hexdigest()[:32]


def _is_whole(path: Path) -> bool:
    return path.is_file() and path.with_suffix(".json").is_file()


def _read_entry(path: Path) -> Entry:
    record = path.with_suffix(".json")
    try:
        saved = json.loads(record.read_text(encoding="utf-8"))
        pixels = [{int(c): int(n) for c, n in counts.items()} for counts in saved["pixels"]]
        names = {int(c): str(name) for c, name in saved["class_names"].items()}
        return Entry(path, pixels, saved["patients"], names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{record} must be as icseg wrote it, got a damaged file; delete it to read it anew"
        ) from error


def _write(item: Item, axis: int | None, size: int, path: Path) -> None:
    pixels, patients, names = _pack(item, size) if item.patient is None else (read_pair(item, axis, size), None, {})
    entry = Entry(path, [_counts(mask) for mask in pixels[1]], patients, names)
    with written_whole(path) as temporary:
        np.save(temporary, pixels, allow_pickle=False)
    record: dict[str, Any] = asdict(entry)
    del record["path"]
    with written_whole(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(record), encoding="utf-8")


def _counts(mask: NDArray[np.uint8]) -> dict[int, int]:
    counts = np.bincount(mask.ravel(), minlength=LARGEST_ID + 1)
    return {int(c): int(counts[c]) for c in np.flatnonzero(counts) if c}


def _pack(item: Item, size: int) -> tuple[NDArray[np.uint8], list[str] | None, dict[int, str]]:
    """A pack's images are uint8 and taken as they are, as `icseg evaluate` does."""
    pack = Pack.load(item.image)
    labelled = np.flatnonzero(pack.masks.any((1, 2)))
    patients = [str(number) for number in pack.sources()[labelled].tolist()]
    images = (image.astype(np.float32) / 255 for image in pack.images[labelled])
    names = dict(list(enumerate(pack.class_names))[1:])
    return _scaled(images, pack.masks[labelled], size), patients, names


def read_pair(item: Item, axis: int | None, size: int) -> NDArray[np.uint8]:
    """[2, P, size, size]: image and mask of the P labelled slices of a file.

    Raises ValueError that names an unfit file.
    """
    image, mask = read_image(item.image, axis), read_mask(item.mask, axis)
    if image.array.ndim == 3 and image.geometry.anatomical != mask.geometry.anatomical:
        raise ValueError(
            f"{mask.name} must be in the format of {image.name}: NIfTI says how its axes lie, other files do not"
        )
    along = _axis(image, axis)
    planes, labels = (one.planes(along) for one in (image, mask))
    if planes.shape != labels.shape:
        raise ValueError(
            f"{mask.name} must have the size of {image.name} {list(planes.shape)}, got {list(labels.shape)}"
        )
    if labels.max() > LARGEST_ID:
        raise ValueError(f"{mask.name} must hold class ids up to {LARGEST_ID} for training, got {labels.max()}")
    labelled = np.flatnonzero(labels.any((1, 2)))
    if not len(labelled):  # perhaps of one grey level, which no window fits
        return np.empty((2, 0, size, size), np.uint8)
    window = intensity_window(image.array, image.name)
    return _scaled((normalise(planes[i], window) for i in labelled), labels[labelled].astype(np.uint8), size)


def _axis(image: Image, axis: int | None) -> int | None:
    """The configured axis; else one of length 1, or axial slices, or pages."""
    if axis is not None or 1 in image.array.shape:
        return axis
    return 2 if image.geometry.anatomical else 0


def _scaled(images: Any, masks: Array, size: int) -> NDArray[np.uint8]:
    """[2, P, size, size] of P images [H, W] in [0, 1] and masks [P, H, W]."""
    frame = SquareFrame.of(masks, size)
    scaled = np.empty((2, len(masks), size, size), np.uint8)
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        scaled[0, i] = unit_to_bytes(frame.enter(torch.from_numpy(image)[None])[0, 0].numpy())
        scaled[1, i] = frame.enter_ids(torch.from_numpy(np.ascontiguousarray(mask))[None])[0, 0].numpy()
    return scaled
