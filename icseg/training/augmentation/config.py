"""Which random changes a task's images and masks undergo, how often and how strongly."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Self

from icseg.config import check_int, check_numbers

_ELASTIC_LIMIT = 0.3  # of the distance between control points: beyond a third, the warp could fold


@dataclass(frozen=True)
class OperationsConfig:
    """Changes, each with a probability (0 is off) and, where it has one, the largest strength, drawn uniformly.

    flip:      of a mirrored image, for each of the two axes. turn: of 1 to 3 quarter turns (images that are not square
               take a half turn only).
    affine:    rotation in degrees, scale as |log2|, shear, shift as a share of the longer side.
    zoom:      a larger change of scale, up to zoom_factor in either direction.
    elastic:   a smooth warp by up to elastic_shift of the longer side, drawn at elastic_cells + 1 points a side.
    invert:    1 - intensity. gamma: gamma_log2 is |log2| of the exponent.
    contrast:  contrast_change is the relative change about mid-grey, brightness_change the shift.
    blur:      blur_sigma, in pixels, of a Gaussian. sharpness: sharpness_gain, of what a Gaussian of one pixel removes.
    noise:     noise_deviation, of Gaussian noise, which is another in each image.

    What a geometric change brings in from outside is the image, and its mask, mirrored at the border.
    """

    flip: float = 0.0
    turn: float = 0.0
    affine: float = 0.0
    rotation: float = 15.0
    scale: float = 0.2
    shear: float = 0.1
    shift: float = 0.05
    zoom: float = 0.0
    zoom_factor: float = 2.0
    elastic: float = 0.0
    elastic_shift: float = 0.02
    elastic_cells: int = 6
    invert: float = 0.0
    gamma: float = 0.0
    gamma_log2: float = 0.6
    contrast: float = 0.0
    contrast_change: float = 0.1
    brightness_change: float = 0.1
    blur: float = 0.0
    blur_sigma: float = 1.5
    sharpness: float = 0.0
    sharpness_gain: float = 1.0
    noise: float = 0.0
    noise_deviation: float = 0.05

    def __post_init__(self) -> None:
        check_numbers(self, *_PROBABILITIES, least=0, most=1)
        strengths = [f.name for f in fields(self) if f.name not in (*_PROBABILITIES, "elastic_cells", "zoom_factor")]
        check_numbers(self, *strengths, least=0)
        check_numbers(self, "zoom_factor", least=1)
        check_int("elastic_cells", self.elastic_cells, 1)
        if self.elastic_shift > _ELASTIC_LIMIT / self.elastic_cells:
            raise ValueError(
                f"elastic_shift must be at most {_ELASTIC_LIMIT:g} / elastic_cells = "
                f"{_ELASTIC_LIMIT / self.elastic_cells:.3g}, so that nothing folds, got {self.elastic_shift}"
            )


_PROBABILITIES = (
    "flip", "turn", "affine", "zoom", "elastic", "invert", "gamma", "contrast", "blur", "sharpness", "noise",
)  # fmt: skip

_TASK = OperationsConfig(
    flip=0.5, turn=0.75, affine=0.3, elastic=0.15, invert=0.5, gamma=1.0, blur=0.05, sharpness=0.05, noise=0.05
)
_EXAMPLE = OperationsConfig(
    affine=0.2, rotation=10.0, scale=0.1, shear=0.05, shift=0.03, zoom=0.05, elastic=0.1, elastic_shift=0.01,
    gamma=1.0, gamma_log2=0.15, contrast=1.0, blur=0.1, blur_sigma=1.0, sharpness=0.05, sharpness_gain=0.5,
    noise=0.1, noise_deviation=0.03,
)  # fmt: skip


@dataclass(frozen=True)
class AugmentationConfig:
    """Changes of the whole task, of each of its images, and of what is asked for.

    task:       one draw for all images of a task. example: a draw for each image, milder.
    crop:       probability that a task's images are cropped, all by one share of their sides, at least crop_side, and
                brought back to their size. crop_foreground: share of these crops that lie about a random pixel of a
                class of each image; the others are one box for all.
    outline:    probability that a task asks for the outlines of its classes, two pixels wide.
    complement: probability that a task of one class asks for all but it.

    The defaults suit synthetic tasks, which differ much as they are. An image keeps its geometry, but for flips and
    turns, where a change would take the last pixel of a class.
    """

    task: OperationsConfig = _TASK
    example: OperationsConfig = _EXAMPLE
    crop: float = 0.8
    crop_side: float = 0.6
    crop_foreground: float = 0.3
    outline: float = 0.0
    complement: float = 0.0

    def __post_init__(self) -> None:
        check_numbers(self, "crop", "crop_foreground", "outline", "complement", least=0, most=1)
        if not 0 < self.crop_side <= 1 or not math.isfinite(self.crop_side):
            raise ValueError(f"crop_side must lie in (0, 1], got {self.crop_side}")

    @classmethod
    def none(cls) -> Self:
        """Nothing is changed."""
        return cls(OperationsConfig(), OperationsConfig(), crop=0.0)

    @classmethod
    def published(cls) -> Self:
        """The operations of PatchICL (arXiv 2604.12752): those of UniverSeg at both levels, and crops about the
        foreground. Their Sobel filter acts on the label: `outline`. Probabilities and strengths are ours."""
        return cls(
            task=OperationsConfig(
                flip=0.5, affine=0.5, rotation=15.0, scale=0.3, shear=0.0, shift=0.1, elastic=0.25, invert=0.5,
                contrast=0.5, contrast_change=0.2, brightness_change=0.1, blur=0.5, blur_sigma=1.1,
                sharpness=0.5, sharpness_gain=4.0, noise=0.5, noise_deviation=0.06,
            ),
            example=OperationsConfig(
                affine=0.5, rotation=10.0, scale=0.15, shear=0.0, shift=0.05, elastic=0.25, elastic_shift=0.01,
                contrast=0.25, contrast_change=0.1, brightness_change=0.1, blur=0.25, blur_sigma=1.1,
                sharpness=0.25, sharpness_gain=4.0, noise=0.25, noise_deviation=0.06,
            ),
            crop=0.5,
            crop_foreground=1.0,
            outline=0.5,
            complement=0.5,
        )  # fmt: skip
