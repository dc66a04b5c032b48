"""Labelled images with masks of class ids, and whose they are: arrays, or one .npz file."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from icseg.resize import resize

_ARRAYS = ("images", "masks", "class_names", "patient")


@dataclass(frozen=True)
class Pack:
    """Labelled images: images uint8 [N, H, W], masks uint8 [N, H, W] of class ids, 0 is background.

    class_names: by class id, each once. patient: [N], or None where it is not known; a target's supports are other
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
        images, masks, names = self.images, self.masks, self.class_names
        if images.ndim != 3 or images.shape != masks.shape or {images.dtype, masks.dtype} != {np.dtype(np.uint8)}:
            raise ValueError(
                "pack must hold images and masks of one shape [N, H, W], both uint8, "
                f"got {list(images.shape)} {images.dtype} and {list(masks.shape)} {masks.dtype}"
            )
        if masks.size and masks.max() >= len(names):
            raise ValueError(f"class_names must name class ids up to {masks.max()}, got {len(names)} names")
        if len(set(names[1:])) < len(names[1:]):
            raise ValueError(f"class_names must name each class differently, got {', '.join(names[1:])}")
        if self.patient is not None and self.patient.shape != (len(images),):
            raise ValueError(
                f"patient must have one entry an image, shape [{len(images)}], got {list(self.patient.shape)}"
            )
        sources = self.sources()
        if not any(len(np.unique(sources[self.holders(c)])) > 1 for c in range(1, len(names))):
            raise ValueError("pack must hold some class in images of two patients, got none")

    def sources(self) -> NDArray[np.int64]:
        """[N] what a target must not share with its supports, as a number: the patient, or the image itself."""
        return np.arange(len(self.images)) if self.patient is None else np.unique(self.patient, return_inverse=True)[1]

    def holders(self, class_id: int) -> NDArray[np.int64]:
        """The images that contain the class."""
        return np.flatnonzero(self._shown[:, class_id])

    @functools.cached_property
    def _shown(self) -> NDArray[np.bool_]:
        """[N, 256] the class ids in each image."""
        return np.stack([np.bincount(mask.ravel(), minlength=256) > 0 for mask in self.masks])

    def resized(self, size: int) -> Pack:
        """The pack at [N, size, size], sides squashed: images with anti-aliasing, masks by the nearest pixel.

        Raises ValueError if no class is left that can be scored.
        """
        if self.images.shape[1:] == (size, size):
            return self
        images, masks = (np.empty((len(self.images), size, size), np.uint8) for _ in range(2))
        for i, (image, mask) in enumerate(zip(self.images, self.masks, strict=True)):  # one by one bounds the memory
            grey = resize(torch.from_numpy(image)[None, None].float(), (size, size))[0, 0]
            images[i] = grey.round().clamp(0, 255).numpy()
            masks[i] = F.interpolate(torch.from_numpy(mask)[None, None], (size, size), mode="nearest-exact")[0, 0]
        return dataclasses.replace(self, images=images, masks=masks)

    def digest(self) -> str:
        """SHA-256 of the content, in hexadecimal."""
        found = hashlib.sha256(repr((self.images.shape, self.class_names)).encode())
        found.update(self.images.tobytes())
        found.update(self.masks.tobytes())
        if self.patient is not None:
            found.update(repr(self.patient.tolist()).encode())
        return found.hexdigest()


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
