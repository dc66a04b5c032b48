"""NumPy files (.npy; .npz with one array, or one named `image` or `mask`). Nothing in them is unpickled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from icseg.data.formats.content import Array, Content, Geometry


@dataclass(frozen=True)
class ArrayGeometry(Geometry):
    suffix: str = ".npy"

    def write(self, path: Path, array: Array) -> None:
        """An .npz file holds the array under the name `mask` (class ids) or `uncertainty` (float)."""
        with path.open("wb") as file:
            if self.suffix == ".npz":
                if array.dtype.kind == "f":
                    np.savez_compressed(file, uncertainty=array)
                else:
                    np.savez_compressed(file, mask=array)
            else:
                np.save(file, array, allow_pickle=False)


def read(path: Path, *, labels: bool) -> Content:
    loaded = np.load(path, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return Content(loaded, loaded.dtype, ArrayGeometry(".npy"))
    with loaded:
        array = loaded[_name(loaded.files, "mask" if labels else "image")]
    return Content(array, array.dtype, ArrayGeometry(".npz"))


def _name(names: list[str], wanted: str) -> str:
    if len(names) == 1:
        return names[0]
    if wanted not in names:
        raise ValueError(f"it must hold one array, or one named {wanted}; it holds {', '.join(names) or 'none'}")
    return wanted
