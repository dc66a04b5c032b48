"""Reading images and masks, 2-D or 3-D, and writing maps back in the input's own format, size and geometry.

| format | read                                                     | a map is written as                             |
|--------|----------------------------------------------------------|-------------------------------------------------|
| PNG    | 1 to 16 bits, grey, palette, RGB; alpha is ignored       | PNG                                             |
| JPEG   | grey or colour; not for masks, which must be exact       | PNG                                             |
| BMP    | grey, palette, RGB                                       | PNG                                             |
| TIFF   | any bit depth, grey, palette, RGB; pages are a volume    | TIFF with resolution, georeference, ImageJ, OME |
| NIfTI  | .nii and .nii.gz, 2-D or 3-D                             | NIfTI with affine, orientation, header          |
| NumPy  | .npy; .npz with one array, or one named `image` / `mask` | .npy; .npz                                      |

Colour becomes grey by luma (ITU-R BT.601). An array [H, W, 3] or [H, W, 4] of uint8 or uint16, in memory or in a
NumPy file, is taken as colour unless it is read to be sliced along an axis. Pixels are taken as a viewer displays them:
where EXIF or TIFF tags turn a picture, its map is written turned, without the tag, so that the two overlay. Masks count
as stored: palette indices are class ids, and a file in 0 and 255 holds one class, 255.

A mask of class ids is written in the dtype of the input where that is an integer type that holds them, else
in the smallest unsigned type that does. A map in [0, 1] is written as float32; in PNG as uint8, 255 for 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from icseg.data.formats import arrays, nifti, raster, tiff
from icseg.data.formats.arrays import ArrayGeometry
from icseg.data.formats.content import Array, Geometry, luma, single_channel
from icseg.files import written_whole

READERS = {
    ".png": raster.read,
    ".jpg": raster.read,
    ".jpeg": raster.read,
    ".bmp": raster.read,
    ".tif": tiff.read,
    ".tiff": tiff.read,
    ".nii": nifti.read,
    ".nii.gz": nifti.read,
    ".npy": arrays.read,
    ".npz": arrays.read,
}


@dataclass(frozen=True)
class Image:
    """Grey values, or the class ids of a mask, of one file or array.

    array:    [H, W] or [A, B, C], real or integer values, in the order of the file or array.
    name:     how messages call it (its path, or its argument).
    dtype:    of the values as stored.
    geometry: how to slice it, and to write maps of its shape.
    """

    array: Array
    name: str
    dtype: np.dtype[Any]
    geometry: Geometry

    def slice_axis(self, axis: int | None) -> int:
        """The axis to slice along: `axis`, or if it is None one of length 1; ValueError if there is none."""
        if self.array.ndim == 2:
            return 0
        if axis is not None:
            return axis
        for flat in (2, 1, 0):
            if len(self.geometry.planes(self.array, flat)) == 1:
                return flat
        colour = "; colour must be uint8 or uint16, or be made grey first" if self.array.shape[-1] in (3, 4) else ""
        raise ValueError(
            f"{self.name} must be 2-D unless an axis (0, 1 or 2) is chosen to go through it slice by slice, "
            f"got shape {list(self.array.shape)} {self.dtype}{colour}"
        )

    def planes(self, axis: int | None) -> Array:
        """The slices [N, H, W] along `axis`, as displayed; N = 1 for a 2-D image."""
        return self.planes_of(self.array, axis)

    def planes_of(self, array: Array, axis: int | None) -> Array:
        """The slices of a map of this image, likewise."""
        return self.geometry.planes(array, self.slice_axis(axis))

    def from_planes(self, planes: Array, axis: int | None) -> Array:
        """Maps [N, H, W] of `planes(axis)`, in the shape and order of `array`."""
        return self.geometry.from_planes(planes, self.slice_axis(axis), self.array.ndim)

    def mask_dtype(self, largest: int) -> np.dtype[Any]:
        """The dtype of a mask with class ids up to `largest`; ValueError if the format cannot hold them."""
        if largest > self.geometry.largest:
            raise ValueError(
                f"class ids of a {self.geometry.suffix} mask (for {self.name}) must be at most "
                f"{self.geometry.largest}, got {largest}"
            )
        if self.dtype.kind in "iu" and largest <= np.iinfo(self.dtype).max:
            return self.dtype.newbyteorder("=")
        return np.min_scalar_type(largest)


def read_image(path: str | Path, axis: int | None = None) -> Image:
    """Read grey values, to be sliced along `axis` if it is given.

    Raises FileNotFoundError, or ValueError for an unreadable, damaged or unfit file.
    """
    return _read(Path(path), axis, labels=False)


def read_mask(path: str | Path, axis: int | None = None) -> Image:
    """Read class ids: integers, 0 for background. Raises as `read_image`, and ValueError for other values."""
    return _read(Path(path), axis, labels=True)


def as_image(value: object, name: str, axis: int | None = None) -> Image:
    """An image of a path, or of an array [H, W], [H, W, 3 or 4] or [A, B, C], which messages call `name`."""
    if isinstance(value, str | Path):
        return read_image(value, axis)
    return _checked(_from_array(value, name), axis, labels=False)


def as_mask(value: object, name: str, axis: int | None = None) -> Image:
    """A mask of a path, or of an array of class ids, which messages call `name`."""
    if isinstance(value, str | Path):
        return read_mask(value, axis)
    return _checked(_from_array(value, name), axis, labels=True)


def write_like(image: Image, path: str | Path, array: Array) -> None:
    """Write class ids or a map in [0, 1], of the shape of `image`, in its format; whole or not at all.

    Raises ValueError if the ending of `path` is not that of the format (`image.geometry.suffix`).
    """
    path = Path(path)
    if suffix_of(path) != image.geometry.suffix:
        raise ValueError(f"path must end in {image.geometry.suffix} for a map of {image.name}, got {path}")
    if array.shape != image.array.shape:
        raise ValueError(
            f"array must have the shape {list(image.array.shape)} of {image.name}, got {list(array.shape)}"
        )
    with written_whole(path) as temporary:
        image.geometry.write(temporary, array)


def suffix_of(path: Path) -> str:
    """The ending, in lower case, of a file of a known format; "" for any other."""
    name = path.name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), "")


def map_suffix(path: Path) -> str:
    """The ending of the maps that are written for the image at `path`."""
    suffix = suffix_of(path)
    return ".png" if suffix in (".jpg", ".jpeg", ".bmp") else suffix


def stem_of(path: Path) -> str:
    """The file's name without the ending of its format (`scan` for `scan.nii.gz`)."""
    return path.name[: len(path.name) - len(suffix_of(path))]


def list_images(folder: Path) -> list[Path]:
    """The files of known formats in `folder`, sorted by name, without hidden ones."""
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; give its folder")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} must be an existing folder")
    return sorted(p for p in folder.iterdir() if p.is_file() and suffix_of(p) and not p.name.startswith("."))


def _read(path: Path, axis: int | None, *, labels: bool) -> Image:
    suffix = suffix_of(path)
    if not suffix:
        raise ValueError(f"{path} must end in one of {', '.join(READERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be an existing file")
    try:
        content = READERS[suffix](path, labels=labels)
    except Exception as error:  # decoders raise whatever damaged bytes lead them to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from error
    if labels and content.lossy:
        raise ValueError(f"{path} must hold exact class ids, got a JPEG, whose compression changes them")
    return _checked(Image(content.array, str(path), content.dtype, content.geometry), axis, labels=labels)


def _from_array(value: object, name: str) -> Image:
    array = np.asarray(value)
    return Image(array, name, array.dtype, ArrayGeometry())


def _checked(image: Image, axis: int | None, *, labels: bool) -> Image:
    array = image.array
    if axis is None and _is_colour(image):
        array = _one_channel(array, image.name) if labels else luma(array)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{image.name} must hold real numbers, got dtype {array.dtype}")
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"{image.name} must be 2-D or 3-D and not empty, got shape {list(array.shape)}")
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
    return replace(image, array=_class_ids(array, image.name) if labels else array)


def _is_colour(image: Image) -> bool:
    """Whether it is an array [H, W, 3 or 4] that cannot be a single slice; the other formats say what is colour."""
    array = image.array
    in_memory = isinstance(image.geometry, ArrayGeometry)
    picture = array.dtype.newbyteorder("=") in (np.uint8, np.uint16)
    return in_memory and picture and array.shape[2:] in ((3,), (4,)) and 1 not in array.shape


def _one_channel(array: Array, name: str) -> Array:
    try:
        return single_channel(array)
    except ValueError as error:
        raise ValueError(f"{name} cannot be a mask: {error}") from error


def _class_ids(array: Array, name: str) -> Array:
    if array.dtype.kind == "f":
        ids = np.nan_to_num(array, nan=0.5, posinf=0.5, neginf=0.5)
        if (fractions := ids != np.rint(ids)).any():
            raise ValueError(f"{name} must hold integer class ids, got {array[fractions][0]:g}")
        array = ids.astype(np.int64)
    if array.min() < 0 or array.max() >= 2**32:
        raise ValueError(f"{name} must hold class ids from 0 to {2**32 - 1}, got {array.min()} to {array.max()}")
    return array
