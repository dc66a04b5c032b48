"""What a reader returns, and the steps that the formats share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


class Geometry:
    """What a file says beside its pixels, and how maps are written so that they overlay it.

    suffix: ending of the files that are written; largest: the largest class id that they hold.
    anatomical: slices are turned to the orientation of the body, however the file is stored.
    """

    suffix: str
    largest: int = 2**32 - 1
    anatomical: ClassVar[bool] = False

    def planes(self, array: Array, axis: int) -> Array:
        """The slices [N, H, W], as displayed, of an image (N = 1) or of a volume along `axis`; a view."""
        return array[None] if array.ndim == 2 else np.moveaxis(array, axis, 0)

    def from_planes(self, planes: Array, axis: int, ndim: int) -> Array:
        """The inverse of `planes`: an array of `ndim` axes in the file's order."""
        return planes[0] if ndim == 2 else np.moveaxis(planes, 0, axis)

    def write(self, path: Path, array: Array) -> None:
        """Write class ids (integers) or a map in [0, 1] (float), in the file's order, to `path`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Content:
    """One image or volume of a file.

    array:    [H, W] or [A, B, C], grey values or class ids, in the file's order.
    dtype:    of the values as stored (colour, or a scaled volume, is floating point in `array`).
    geometry: how to write a map of the same shape.
    lossy:    the values went through a lossy compression.
    """

    array: Array
    dtype: np.dtype[Any]
    geometry: Geometry
    lossy: bool = False


def luma(channels: Array) -> Array:
    """Grey values of colour pixels: [..., C] to [...]; the alpha channel of C = 2 and 4 is ignored."""
    if channels.shape[-1] <= 2:
        return channels[..., 0]
    return channels[..., :3].astype(np.float32) @ LUMA


def single_channel(channels: Array) -> Array:
    """Class ids of a mask stored as [..., C]: its colour channels must agree."""
    colours = channels[..., : 1 if channels.shape[-1] <= 2 else 3]
    if (colours != colours[..., :1]).any():
        raise ValueError(
            "it is in colour; a mask must have one channel of integer class ids (give each colour an id, 0 for the "
            "background, and save these as a grey image)"
        )
    return colours[..., 0]


def upright(array: Array, orientation: int) -> Array:
    """The pixels [H, W, ...] as displayed, for a value of the EXIF (or TIFF) orientation tag."""
    if orientation in (5, 6, 7, 8):
        array = np.swapaxes(array, 0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def unit_to_bytes(array: Array) -> Array:
    """A map in [0, 1] as uint8, 255 for 1."""
    return np.rint(array * np.float32(255)).astype(np.uint8)
