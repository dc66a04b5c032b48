"""What `segment` works on, checked: its options, the support set or its memory, and the slices of an image."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from icseg.data.frame import SIDES
from icseg.data.images import Image, as_image, as_mask
from icseg.data.normalise import check_intensities, check_window, intensity_window, normalise
from icseg.memory import SupportMemory
from icseg.sparse.budget import Budget, as_budget

SQUARE_SIDES = (128, 1024)  # for models that take squares only
DEFAULT_SIZE = 256
NOTES = ("classes", "size", "window", "anatomical")  # of a memory, each as JSON
MOST_CLASSES = 64  # more distinct values than this are a grey image, not a mask of class ids


class OrientationWarning(UserWarning):
    """Images that are turned to anatomical orientation (NIfTI) are used with others, which are not."""


@dataclass(frozen=True)
class SegmentOptions:
    """How targets are segmented; every field is checked.

    size:        pixels of the longer side that images, supports too, are scaled to, 32 to 4096, or 128 to 1024 for
                 models that take squares only; None leaves images at their own size, at most 4096; left out: that of
                 the memory, if one is given, else 256. Masks have the input's own size.
    classes:     ids to segment, of at least 1; None takes all that the support masks hold.
    axis:        0, 1 or 2: go through volumes slice by slice along it (NIfTI: sagittal, coronal, axial).
    window:      (low, high) intensities to map to [0, 1]; None takes percentiles of each image or volume.
    batch_size:  slices of a volume that go through the model together, without seeds, fewer if they are large or of
                 many classes; it changes time and memory.
    threshold:   least probability of a pixel's class; below it, the pixel is background.
    seeds:       average over draws of patches with these seeds, 0 to 2^63 - 1, the same draws for every slice;
                 none takes the best patches, without noise.
    uncertainty: also return the entropy of the classes.
    budget:      what a slice may cost: patches, or an `icseg.Budget`; None goes on until little is left to mend. For
                 models that take any size.

    Raises TypeError for a value of another type (True is no integer), ValueError for one out of range.
    """

    size: int | EllipsisType | None = ...
    classes: Sequence[int] | None = None
    axis: int | None = None
    window: tuple[float, float] | None = None
    batch_size: int = 8
    threshold: float = 0.5
    seeds: Sequence[int] = ()
    uncertainty: bool = False
    budget: int | Budget | None = None

    def __post_init__(self) -> None:
        if self.size is not None and not isinstance(self.size, EllipsisType):
            self._set("size", _integer("size", self.size))
            least, most = SIDES
            if not least <= self.size <= most:
                raise ValueError(
                    f"size must be an integer from {least} to {most}, or None for the images' own, got {self.size}"
                )
        if self.axis is not None:
            self._set("axis", _integer("axis", self.axis))
        if self.axis not in (None, 0, 1, 2):
            raise ValueError(f"axis must be 0, 1, 2 or None, got {self.axis}")
        self._set("batch_size", _integer("batch_size", self.batch_size))
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        self._set("threshold", _number("threshold", self.threshold))
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, got {self.threshold}")
        if self.classes is not None:
            self._set("classes", _integers("classes", self.classes))
            if not self.classes or min(self.classes) < 1:
                raise ValueError(f"classes must be ids of at least 1 (0 is background), got {list(self.classes)}")
        self._set("seeds", _integers("seeds", self.seeds))
        if any(not 0 <= seed < 2**63 for seed in self.seeds):
            raise ValueError(f"seeds must lie in [0, 2^63), got {list(self.seeds)}")
        if self.window is not None:
            self._set("window", tuple(_number("window", end) for end in _items("window", self.window)))
        check_window(self.window)
        if not isinstance(self.uncertainty, bool):
            raise TypeError(f"uncertainty must be True or False, got {self.uncertainty!r}")
        if self.budget is not None:
            self._set("budget", as_budget(self.budget))

    @property
    def settled_size(self) -> int | None:
        """Pixels of the longer side, None for the images' own."""
        return DEFAULT_SIZE if isinstance(self.size, EllipsisType) else self.size

    @property
    def limited(self) -> bool:
        """Whether a slice may run out of patches or GFLOPs."""
        return self.budget is not None and as_budget(self.budget).tolerance is None

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):  # NumPy's integers are Integral
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(value)


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _integers(name: str, values: object) -> tuple[int, ...]:
    return tuple(_integer(f"{name}[{i}]", value) for i, value in enumerate(_items(name, values)))


def _items(name: str, values: object) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of numbers, got {values!r}")
    return list(values)


@dataclass(frozen=True)
class SupportPair:
    """image: [H, W] float32 in [0, 1]; mask: [H, W] class ids."""

    image: NDArray[np.float32]
    mask: NDArray[Any]


class SupportSet:
    """Annotated images, checked.

    classes:    {class id: the pairs that hold it}, by ascending id.
    anatomical: whether images and masks are turned to anatomical orientation; both values where they differ.
    """

    def __init__(
        self, images: Sequence[object], masks: Sequence[object], options: SegmentOptions | None = None
    ) -> None:
        options = options or SegmentOptions()
        for name, value in (("support_images", images), ("support_masks", masks)):
            if isinstance(value, str | Path):
                raise TypeError(f"{name} must be a list of paths or arrays, got the single path {value}")
        if len(images) == 0:
            raise ValueError("support_images must hold at least one image, got none")
        if len(images) != len(masks):
            raise ValueError(
                f"support_masks must hold one mask for each of {len(images)} support images, got {len(masks)}"
            )
        self.pairs: list[SupportPair] = []
        self.anatomical: set[bool] = set()
        for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
            values = as_image(image, f"support_images[{i}]", options.axis)
            labels = as_mask(mask, f"support_masks[{i}]", options.axis)
            _check_ids(labels, options)
            self.pairs += _support_pairs(values, labels, options)
            self.anatomical |= {values.geometry.anatomical, labels.geometry.anatomical}
        present = sorted({int(i) for pair in self.pairs for i in np.unique(pair.mask)} - {0})
        self.classes = {i: [pair for pair in self.pairs if (pair.mask == i).any()] for i in _chosen(present, options)}

    def settle(self, options: SegmentOptions) -> SegmentOptions:
        """`options` with the size that is taken where none is given."""
        return replace(options, size=options.settled_size)

    def holders(self) -> dict[int, int | None]:
        """{class id: number of support images or slices that hold it}."""
        return {i: len(pairs) for i, pairs in self.classes.items()}

    def notes(self, options: SegmentOptions) -> dict[str, str]:
        """What a memory of this set says of itself, for `EncodedSupport`."""
        values = (self.holders(), options.settled_size, options.window, sorted(self.anatomical))
        return {name: json.dumps(value) for name, value in zip(NOTES, values, strict=True)}


class EncodedSupport:
    """A support set that a model has encoded, with what its notes say.

    A memory without notes, made with `model.encode_support`, holds the classes 1 to C, and its size, window and
    orientation are those of its user.

    classes:    {class id that was chosen: its channel in the memory}, by ascending id.
    anatomical: as for SupportSet; empty if unknown.
    """

    def __init__(self, memory: SupportMemory, options: SegmentOptions | None = None) -> None:
        options = options or SegmentOptions()
        if memory.batch != 1:
            raise ValueError(f"memory must hold one support set, got {memory.batch}")
        self.memory = memory
        try:
            notes = {name: json.loads(memory.notes[name]) for name in NOTES if name in memory.notes}
            self._holders = _noted_classes(notes.get("classes"), memory.classes)
            self._noted = SegmentOptions(size=notes.get("size", ...), window=notes.get("window"))
            self._window_is_noted = "window" in notes
            self.anatomical = {bool(value) for value in notes.get("anatomical", [])}
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"memory must carry notes as icseg writes them, got {memory.notes}") from error
        present = sorted(self._holders)
        self.classes = {i: list(self._holders).index(i) for i in _chosen(present, options, "the memory")}

    def settle(self, options: SegmentOptions) -> SegmentOptions:
        """`options` with the size and window of the memory. Raises ValueError if others are given."""
        size = options.settled_size if isinstance(self._noted.size, EllipsisType) else self._noted.size
        if not isinstance(options.size, EllipsisType) and options.size != size:
            given, own = ("the images' own" if value is None else value for value in (options.size, size))
            raise ValueError(f"size must be that of the memory ({own}), got {given}")
        window = self._noted.window
        if self._window_is_noted and options.window not in (None, window):
            own = "percentiles" if window is None else "{:g} to {:g}".format(*window)
            raise ValueError("window must be that of the memory ({}), got {:g} to {:g}".format(own, *options.window))
        return replace(options, size=size, window=window or options.window)

    def holders(self) -> dict[int, int | None]:
        """{class id: number of support images or slices that hold it, None if unknown}."""
        return {i: self._holders[i] for i in self.classes}


def prepare(image: Image, options: SegmentOptions) -> tuple[NDArray[Any], tuple[float, float]]:
    """The slices [N, H, W] of an image and the intensities that become 0 and 1.

    Raises ValueError for a volume without an axis, and for values that are constant, not finite or all
    outside the window.
    """
    planes = image.planes(options.axis)
    if options.window is None:
        return planes, intensity_window(image.array, image.name)
    least, most = check_intensities(image.array, image.name)
    low, high = options.window
    if most <= low or least >= high:
        raise ValueError(
            f"window must overlap the values of {image.name} ({least:g} to {most:g}), got {low:g} to {high:g}"
        )
    return planes, options.window


def _support_pairs(image: Image, mask: Image, options: SegmentOptions) -> Iterator[SupportPair]:
    """The pair, or for a volume one pair for each slice with a label."""
    slices, window = prepare(image, options)
    labels = mask.planes(options.axis)
    if labels.shape != slices.shape:
        raise ValueError(f"{mask.name} must have the size of {image.name} ({_size(slices)}), got {_size(labels)}")
    for values, ids in zip(slices, labels, strict=True):
        if len(slices) == 1 or ids.any():
            yield SupportPair(normalise(values, window), ids)


def _check_ids(mask: Image, options: SegmentOptions) -> None:
    if options.classes is None and (count := len(np.setdiff1d(mask.array, 0))) > MOST_CLASSES:
        raise ValueError(
            f"{mask.name} must hold at most {MOST_CLASSES} class ids unless classes are given, got {count}; "
            "are images and masks swapped?"
        )


def _size(planes: NDArray[Any]) -> str:
    count, height, width = planes.shape
    return f"{height} x {width}" if count == 1 else f"{count} slices of {height} x {width}"


def _noted_classes(noted: dict[str, int] | None, count: int) -> dict[int, int | None]:
    if noted is None:
        return dict.fromkeys(range(1, count + 1))
    if len(noted) != count:
        raise ValueError(f"classes must number {count}, got {len(noted)}")
    return {int(i): int(holders) for i, holders in noted.items()}


def _chosen(present: list[int], options: SegmentOptions, place: str = "the support masks") -> list[int]:
    if not present:
        raise ValueError("support_masks must mark at least one pixel, got only background")
    if options.classes is not None:
        if absent := sorted(set(options.classes) - set(present)):
            raise ValueError(
                f"classes must be ids in {place} ({', '.join(map(str, present))}), got {', '.join(map(str, absent))}"
            )
        return sorted(set(options.classes))
    if len(present) > MOST_CLASSES:
        raise ValueError(
            f"support_masks must hold at most {MOST_CLASSES} ids unless classes are given, got {len(present)}"
        )
    return present
