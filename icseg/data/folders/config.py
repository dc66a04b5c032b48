"""One data set on disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from icseg.config import check_choice, check_ints, check_numbers

FORMATS = ("folders", "nnunet", "npz")


@dataclass(frozen=True)
class SourceConfig:
    """A data set that tasks are drawn from.

    path:         its folder, or the file of a pack.
    format:       "folders": two folders of images and masks, of equal names, or with _mask or _seg added to the mask's;
                  "nnunet": dataset.json, imagesTr and labelsTr; "npz": a pack as `icseg evaluate` takes it; "" finds
                  out.
    weight:       its share of the tasks, beside the other sources and the synthetic pool.
    name:         what messages call it; "" is the last part of the path.
    classes:      ids or names of the classes to ask for; none takes all.
    images, masks: names of the two folders of "folders".
    patient:      regular expression with one group, searched for in the name of an image without ending; what the
                  group matches is its patient. "" takes each file as a patient, or those that a pack names.
    axis:         0, 1 or 2: slices of volumes along it; left out, axial slices (2) of NIfTI, pages (0) of others.
    least_pixels: of a class, at the size of training, in an image that is drawn for it.
    """

    path: str
    format: str = ""
    weight: float = 1.0
    name: str = ""
    classes: tuple[int | str, ...] = ()
    images: str = "images"
    masks: str = "masks"
    patient: str = ""
    axis: int | None = None
    least_pixels: int = 30

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path must name a folder or a file, got ''")
        if not self.name:
            object.__setattr__(self, "name", Path(self.path).name or self.path)
        check_choice(self, "format", ("", *FORMATS))
        check_numbers(self, "weight", above=0)
        check_ints(self, 1, "least_pixels")
        if self.axis not in (None, 0, 1, 2) or isinstance(self.axis, bool):
            raise ValueError(f"axis must be 0, 1 or 2, got {self.axis!r}")
        if not isinstance(self.classes, tuple) or not all(type(c) in (int, str) for c in self.classes):
            raise ValueError(f"classes must be a list of ids or names, got {self.classes!r}")
        _check_pattern(self.patient)


def _check_pattern(pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"patient must be a regular expression, got {pattern!r} ({error})") from error
    if pattern and groups != 1:
        raise ValueError(f"patient must be a regular expression with one group, got {pattern!r} with {groups}")
