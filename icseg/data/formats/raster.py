"""PNG, JPEG and BMP. Pixels are taken as displayed (EXIF orientation applied), and maps are written as PNG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
from PIL import Image

from icseg.data.formats.content import Array, Content, Geometry, luma, single_channel, unit_to_bytes, upright

EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class RasterGeometry(Geometry):
    """dpi: pixels per inch (x, y), where the file gives them."""

    dpi: tuple[float, float] | None = None
    suffix: str = ".png"
    largest: int = 65535

    def write(self, path: Path, array: Array) -> None:
        pixels = unit_to_bytes(array) if array.dtype.kind == "f" else array
        dpi = {} if self.dpi is None else {"dpi": self.dpi}
        Image.fromarray(pixels).save(path, format="PNG", **dpi)


def read(path: Path, *, labels: bool) -> Content:
    """Read a PNG, JPEG or BMP file; `labels` keeps palette indices and demands one channel."""
    with Image.open(path, formats=("PNG", "JPEG", "BMP")) as image:
        image.load()
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        pixels = _pixels(image, path, labels)
        lossy = image.format not in ("PNG", "BMP")
        dpi = image.info.get("dpi")
    dtype = pixels.dtype
    if pixels.ndim == 3:
        pixels = single_channel(pixels) if labels else luma(pixels)
    if dpi is not None and orientation in (5, 6, 7, 8):
        dpi = dpi[::-1]
    return Content(upright(pixels, orientation), dtype, RasterGeometry(dpi), lossy)


def _pixels(image: Image.Image, path: Path, labels: bool) -> Array:
    """[H, W] or [H, W, C], uint8, uint16 or bool."""
    if image.format == "PNG" and _png_bit_depth(path) == 16:
        return imagecodecs.png_decode(path.read_bytes())  # Pillow would cut 16-bit colour to 8 bits
    if image.mode == "P" and not labels:
        image = image.convert("RGB")
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        image = image.convert("RGB")
    return np.asarray(image)


def _png_bit_depth(path: Path) -> int:
    with path.open("rb") as file:
        return file.read(25)[24]
