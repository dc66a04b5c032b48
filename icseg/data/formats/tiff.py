"""TIFF: one image, or a stack of pages as a volume, grey, RGB or palette, of any bit depth."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from icseg.data.formats.content import Array, Content, Geometry, luma, single_channel, upright

GEOREFERENCE_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)
IMAGEJ_DTYPES = ("uint8", "uint16", "float32")
IMAGEJ_KEYS = ("unit", "spacing", "finterval", "fps")
OME_DTYPES = ("int8", "int16", "int32", "uint8", "uint16", "uint32", "float32", "float64")
OME_KEYS = tuple(f"PhysicalSize{axis}{part}" for axis in "XYZ" for part in ("", "Unit"))
OME_KEYS += ("TimeIncrement", "TimeIncrementUnit")


@dataclass(frozen=True)
class TiffGeometry(Geometry):
    """options: arguments of tifffile that repeat the file's resolution and georeference.
    axes: the letters of the file's axes, as far as ImageJ and OME know them.
    imagej, ome: what the file says as ImageJ or OME metadata (spacing, unit, ...), None if it is of another kind."""

    options: dict[str, Any] = field(default_factory=dict)
    axes: str = "YX"
    imagej: dict[str, Any] | None = None
    ome: dict[str, Any] | None = None
    suffix: str = ".tif"

    def write(self, path: Path, array: Array) -> None:
        options = dict(self.options)
        if self.imagej is not None and array.dtype.name in IMAGEJ_DTYPES:
            options |= {"imagej": True, "metadata": {**self.imagej, "axes": self.axes}}
        elif self.ome is not None and array.dtype.name in OME_DTYPES:
            options |= {"compression": "zlib", "ome": True, "metadata": {**self.ome, "axes": self.axes}}
        else:
            options |= {"compression": "zlib", "ome": False}
        tifffile.imwrite(path, np.ascontiguousarray(array), photometric="minisblack", **options)


def read(path: Path, *, labels: bool) -> Content:
    """Read a TIFF file; `labels` keeps the stored values (palette indices, say) and demands one channel."""
    with _damage_is_an_error(), tifffile.TiffFile(path) as file:
        pixels, axes = _stack(file)
        page = file.series[0].keyframe
        dtype = pixels.dtype
        if page.colormap is not None and not labels:
            pixels, axes = np.moveaxis(page.colormap, 0, -1)[pixels], axes + "S"
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and dtype.kind in "bu" and not labels:
            pixels = np.invert(pixels)
        if "S" in axes:
            pixels, axes = np.moveaxis(pixels, axes.index("S"), -1), axes.replace("S", "")
            pixels = single_channel(pixels) if labels else luma(pixels)
        elif "C" in axes:
            raise ValueError(f"it has {pixels.shape[axes.index('C')]} channels; one channel, or RGB, is needed")
        orientation = page.tags.valueof("Orientation", 1) if pixels.ndim == 2 else 1
        geometry = TiffGeometry(
            _options(page, orientation), _known_axes(axes), _imagej(file), _ome(file, orientation), _suffix(path)
        )
        lossy = page.compression in (tifffile.COMPRESSION.JPEG, tifffile.COMPRESSION.OJPEG)
    return Content(upright(pixels, orientation) if orientation != 1 else pixels, dtype, geometry, lossy)


def _stack(file: tifffile.TiffFile) -> tuple[Array, str]:
    """All pages, and tifffile's letters of the axes, without axes of length 1 other than height and width."""
    series = file.series
    if len({(one.shape, one.axes, one.dtype) for one in series}) != 1:
        raise ValueError(f"it holds {len(series)} images of different shapes; one image or stack is needed")
    pixels, axes = series[0].asarray(), series[0].axes
    if len(series) > 1:
        pixels, axes = np.stack([one.asarray() for one in series]), "I" + axes
    keep = [i for i, (name, n) in enumerate(zip(axes, pixels.shape, strict=True)) if n > 1 or name in "YX"]
    return pixels.reshape([pixels.shape[i] for i in keep]), "".join(axes[i] for i in keep)


def _options(page: Any, orientation: int) -> dict[str, Any]:
    options: dict[str, Any] = {}
    resolution = page.tags.valueof("XResolution"), page.tags.valueof("YResolution")
    if None not in resolution:
        options["resolution"] = resolution[::-1] if orientation >= 5 else resolution
        options["resolutionunit"] = page.tags.valueof("ResolutionUnit", tifffile.RESUNIT.NONE)
    tags = [page.tags[code] for code in GEOREFERENCE_TAGS if code in page.tags]
    if tags:
        options["extratags"] = [(tag.code, tag.dtype, tag.count, tag.value, True) for tag in tags]
    return options


def _known_axes(axes: str) -> str:
    """`axes` with Z for whatever is not time, height or width: a plain series of pages, say."""
    return "".join(name if name in "TYX" else "Z" for name in axes)


def _imagej(file: tifffile.TiffFile) -> dict[str, Any] | None:
    if not file.is_imagej:
        return None
    return {key: value for key, value in (file.imagej_metadata or {}).items() if key in IMAGEJ_KEYS}


def _ome(file: tifffile.TiffFile, orientation: int) -> dict[str, Any] | None:
    """Size of a pixel and time between frames, of the first image that the file describes."""
    if not file.is_ome or file.ome_metadata is None:
        return None
    images = tifffile.xml2dict(file.ome_metadata)["OME"]["Image"]
    pixels = (images[0] if isinstance(images, list) else images)["Pixels"]
    kept = {key: pixels[key] for key in OME_KEYS if key in pixels}
    return {_swapped(key): value for key, value in kept.items()} if orientation >= 5 else kept


def _swapped(key: str) -> str:
    return key.translate(str.maketrans("XY", "YX"))


def _suffix(path: Path) -> str:
    return ".tiff" if path.suffix.lower() == ".tiff" else ".tif"


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _damage_is_an_error() -> Iterator[None]:
    """tifffile logs some damage (a broken chain of pages) and returns what is left; here it is refused."""
    logger = logging.getLogger("tifffile")
    collector = _Collector()
    logger.addHandler(collector)
    try:
        yield
    finally:
        logger.removeHandler(collector)
    if collector.messages:
        raise ValueError(collector.messages[0])
