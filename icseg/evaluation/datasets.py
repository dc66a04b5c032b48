"""Data sets to evaluate on, whatever their format."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from icseg.data.folders import SourceConfig, list_source, read_pair
from icseg.data.packs import Pack


def load_dataset(path: str | Path, size: int | None = None, *, patient: str = "", progress: bool = True) -> Pack:
    """The data set at `path`, at `size` pixels a side; None: its own size.

    An .npz pack is squashed to the square. A folder of images and masks, or one in nnU-Net's layout, is read as
    `icseg train` reads it: slices of volumes, normalised, padded to the square. It has no size of its own.
    patient: for a folder, a regular expression whose one group, in a file's name, is its patient; "" takes each file as
    one. Raises OSError or ValueError for what cannot be read or scored.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path, size, patient, progress)
    pack = Pack.load(path)
    try:
        return pack if size is None else pack.resized(size)
    except ValueError as error:
        raise ValueError(f"{path} at {size} px: {error}") from error


def _folder(path: Path, size: int | None, patient: str, progress: bool) -> Pack:
    if size is None:
        raise ValueError(f"size must be a number of pixels for a folder, whose images may differ, got own for {path}")
    listing = list_source(SourceConfig(str(path), patient=patient))
    bar = tqdm(listing.items, f"reading {path.name}", disable=None if progress else True, leave=False)
    pairs = [read_pair(item, None, size) for item in bar]
    images, masks = np.concatenate(pairs, 1)
    patients = np.repeat([str(item.patient) for item in listing.items], [pair.shape[1] for pair in pairs])
    names = {0: "background", **listing.class_names}
    if listing.class_names:
        masks[~np.isin(masks, list(names))] = 0  # what has no name is no class: nnU-Net's `ignore`
    class_names = tuple(names.get(c, str(c)) for c in range(max(int(masks.max()), *names) + 1))
    try:
        return Pack(listing.config.name, images, masks, class_names, patients)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
