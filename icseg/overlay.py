"""A picture of a mask over its image: translucent fill and contour, one colour a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture
from scipy import ndimage

from icseg.data.formats.content import Array
from icseg.data.normalise import normalise
from icseg.files import written_whole
from icseg.inference import SegmentationResult
from icseg.inputs import SegmentOptions, prepare

# Okabe and Ito: told apart under the common forms of colour blindness. Black and white are left out.
PALETTE = np.array(
    [
        [230, 159, 0],
        [86, 180, 233],
        [0, 158, 115],
        [240, 228, 66],
        [0, 114, 178],
        [213, 94, 0],
        [204, 121, 167],
    ],
    np.float32,
)
FILL = 0.35
MONTAGE = 9  # slices of a volume, at most
LONGEST_SIDE = 4096


def draw_overlay(image: NDArray[np.float32], mask: Array, classes: tuple[int, ...]) -> NDArray[np.uint8]:
    """image [H, W] in [0, 1] and mask [H, W] of class ids to RGB [H, W, 3].

    The colours follow the order of `classes`, and start again after seven.
    """
    picture = np.repeat(image[..., None] * np.float32(255), 3, -1)
    width = max(1, round(max(image.shape) / 384))
    for index, class_id in enumerate(classes):
        region = mask == class_id
        if not region.any():
            continue
        colour = PALETTE[index % len(PALETTE)]
        contour = region & ~ndimage.binary_erosion(region, iterations=width)
        picture[region] = (1 - FILL) * picture[region] + FILL * colour
        picture[contour] = colour
    return np.rint(picture).astype(np.uint8)


def montage(pictures: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Pictures [H, W, 3] of one size in rows of equal length, on black."""
    columns = int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    height, width, _ = pictures[0].shape
    sheet = np.zeros((rows * height, columns * width, 3), np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = picture
    return sheet


def overlay(result: SegmentationResult, options: SegmentOptions) -> NDArray[np.uint8]:
    """The picture [H, W, 3] of a result; of a volume up to nine slices, evenly from those with a label."""
    planes, window = prepare(result.image, options)
    masks = result.image.planes_of(result.mask, options.axis)
    labelled = np.flatnonzero(masks.any((1, 2)))
    shown = labelled if len(labelled) else np.arange(len(masks))
    picks = np.unique(shown[np.linspace(0, len(shown) - 1, min(MONTAGE, len(shown))).round().astype(int)])
    return montage([draw_overlay(normalise(planes[i], window), masks[i], result.classes) for i in picks])


def save_overlay(result: SegmentationResult, options: SegmentOptions, path: str | Path) -> None:
    """Write `overlay` as PNG, whole or not at all, at most 4096 pixels long."""
    picture = Picture.fromarray(overlay(result, options))
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    with written_whole(path) as temporary:
        picture.save(temporary, format="PNG")
