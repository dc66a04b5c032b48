"""From files or arrays of any size to masks: `segment`, and `Segmenter` for many targets one after another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from icseg.data.frame import SquareFrame
from icseg.data.images import Image, as_image, as_mask, write_like
from icseg.data.normalise import check_intensities, check_window, intensity_window, normalise

SIZES = (128, 1024)
MOST_CLASSES = 64  # more distinct values than this are a grey image, not a mask of class ids


class InContextModel(Protocol):
    """What `segment` needs of a model; `icseg.PatchICL` is one.

    encode_support: images and masks [1, S, 1, size, size] in [0, 1] to anything that the call takes as `memory`.
    The call: targets [B, 1, size, size] to an object with `logits` of that shape.
    """

    def encode_support(self, images: Tensor, masks: Tensor) -> Any: ...

    def __call__(self, target: Tensor, *, memory: Any, seed: int | None = None) -> Any: ...


@dataclass(frozen=True)
class SegmentOptions:
    """How targets are segmented; every field is checked.

    size:        pixels of the square that the model sees, 128 to 1024; masks come back in the input's own size.
    classes:     class ids to segment; None takes all that the support masks hold.
    axis:        0, 1 or 2: go through volumes slice by slice along it (NIfTI: sagittal, coronal, axial).
    window:      (low, high) intensities to map to [0, 1]; None takes percentiles of each image or volume.
    batch_size:  slices of a volume that go through the model together.
    threshold:   least probability of a pixel's class; below it, the pixel is background.
    seeds:       average over draws of patches with these seeds; none takes the best patches, without noise.
    uncertainty: also return the entropy of the classes.
    """

    size: int = 256
    classes: tuple[int, ...] | None = None
    axis: int | None = None
    window: tuple[float, float] | None = None
    batch_size: int = 8
    threshold: float = 0.5
    seeds: tuple[int, ...] = ()
    uncertainty: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or not SIZES[0] <= self.size <= SIZES[1]:
            raise ValueError(f"size must be an integer from {SIZES[0]} to {SIZES[1]}, got {self.size}")
        if self.axis not in (None, 0, 1, 2):
            raise ValueError(f"axis must be 0, 1, 2 or None, got {self.axis}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, got {self.threshold}")
        if self.classes is not None and (not self.classes or min(self.classes) < 1):
            raise ValueError(f"classes must be ids of at least 1 (0 is background), got {list(self.classes)}")
        check_window(self.window)


@dataclass(frozen=True)
class SegmentationResult:
    """mask:        class ids, 0 for background, in the shape of the image (its file's own axis order).
    uncertainty: float32 in [0, 1] in the same shape, if asked for: the entropy of the classes and background,
                 1 where all are equally likely.
    classes:     the class ids that were looked for.
    image:       the input, as read."""

    mask: NDArray[Any]
    uncertainty: NDArray[np.float32] | None
    classes: tuple[int, ...]
    image: Image

    def save(self, path: str | Path) -> None:
        """Write the mask in the input's format and geometry (PNG for JPEG, .npy for an array)."""
        write_like(self.image, path, self.mask)


@dataclass(frozen=True)
class SupportPair:
    """image: [H, W] float32 in [0, 1]; mask: [H, W] class ids."""

    image: NDArray[np.float32]
    mask: NDArray[Any]


class SupportSet:
    """Annotated images, checked. `classes`: {class id: the pairs that hold it}, by ascending id."""

    def __init__(
        self, images: Sequence[object], masks: Sequence[object], options: SegmentOptions | None = None
    ) -> None:
        options = options or SegmentOptions()
        if len(images) == 0:
            raise ValueError("support_images must hold at least one image, got none")
        if len(images) != len(masks):
            raise ValueError(
                f"support_masks must hold one mask for each of the {len(images)} support images, got {len(masks)}"
            )
        self.pairs = [
            pair
            for i, (image, mask) in enumerate(zip(images, masks, strict=True))
            for pair in _support_pairs(
                as_image(image, f"support_images[{i}]"), as_mask(mask, f"support_masks[{i}]"), options
            )
        ]
        present = sorted({int(i) for pair in self.pairs for i in np.unique(pair.mask)} - {0})
        self.classes = {i: [pair for pair in self.pairs if (pair.mask == i).any()] for i in _chosen(present, options)}


class Segmenter:
    """A model with a support set that is encoded once, for any number of targets.

    ```
    segmenter = Segmenter(model, SupportSet(images, masks), SegmentOptions(uncertainty=True))
    result = segmenter(target)
    ```
    """

    def __init__(
        self, model: InContextModel, support: SupportSet, options: SegmentOptions, device: str | torch.device = "cpu"
    ) -> None:
        self.model = model
        self.options = options
        self.device = torch.device(device)
        self.classes = tuple(support.classes)
        with _evaluating(model):
            self._memories = [self._encode(pairs, i) for i, pairs in support.classes.items()]

    def __call__(
        self, target: object, *, name: str = "image", on_slices: Callable[[int], object] | None = None
    ) -> SegmentationResult:
        """Segment a path or array, which messages call `name`; `on_slices(n)` is called after every n slices."""
        image = target if isinstance(target, Image) else as_image(target, name)
        planes, window = prepare(image, self.options)
        dtype = image.mask_dtype(max(self.classes))
        mask = np.zeros(planes.shape, dtype)
        uncertainty = np.zeros(planes.shape, np.float32) if self.options.uncertainty else None
        ids = np.array([0, *self.classes], dtype)
        with _evaluating(self.model):
            for start in range(0, len(planes), self.options.batch_size):
                part = slice(start, start + self.options.batch_size)
                logits = self._logits(normalise(planes[part], window))
                mask[part] = ids[_winners(logits, self.options.threshold).cpu().numpy()]
                if uncertainty is not None:
                    uncertainty[part] = _entropy(logits).cpu().numpy()
                if on_slices is not None:
                    on_slices(len(logits))
        axis = self.options.axis
        return SegmentationResult(
            image.from_planes(mask, axis),
            None if uncertainty is None else image.from_planes(uncertainty, axis),
            self.classes,
            image,
        )

    def _encode(self, pairs: list[SupportPair], class_id: int) -> Any:
        images, masks = [], []
        for pair in pairs:
            frame = SquareFrame(*pair.mask.shape, self.options.size)
            images.append(frame.enter(self._tensor(pair.image[None])))
            masks.append(frame.enter_masks(self._tensor(pair.mask[None] == class_id)))
        return self.model.encode_support(torch.stack(images, 1), torch.stack(masks, 1))

    def _logits(self, slices: NDArray[np.float32]) -> Tensor:
        """[N, H, W] in [0, 1] to [N, classes, H, W]."""
        frame = SquareFrame(*slices.shape[1:], self.options.size)
        target = frame.enter(self._tensor(slices))
        return torch.cat([frame.leave(self._class_logits(target, memory)) for memory in self._memories], 1)

    def _class_logits(self, target: Tensor, memory: Any) -> Tensor:
        """[N, 1, size, size]; with seeds, of the mean probability over their draws."""
        if not self.options.seeds:
            return self.model(target, memory=memory).logits.float()
        draws = [self.model(target, memory=memory, seed=seed).logits.float().sigmoid() for seed in self.options.seeds]
        return torch.stack(draws).mean(0).logit(eps=1e-6)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, torch.float32)


def segment(
    images: object,
    support_images: Sequence[object],
    support_masks: Sequence[object],
    *,
    model: InContextModel | None = None,
    size: int = 256,
    classes: Sequence[int] | None = None,
    axis: int | None = None,
    window: tuple[float, float] | None = None,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    uncertainty: bool = False,
    threshold: float = 0.5,
    seeds: Sequence[int] | None = None,
    progress: bool = False,
) -> SegmentationResult | list[SegmentationResult]:
    """Segment images from a few annotated ones.

    ```
    result = icseg.segment("cells.png", ["a.png", "b.png"], ["a_mask.png", "b_mask.png"])
    result.mask                         # class ids, in the size of cells.png
    result.save("cells_mask.png")
    ```

    images:         a path, an array [H, W], or with `axis` an array [A, B, C]; or a list of these, of any sizes.
                    PNG, JPEG, TIFF, NIfTI, npy and npz; colour files become grey.
    support_images: paths or arrays likewise. A volume, with `axis`, gives its annotated slices.
    support_masks:  for each support image a mask of its size with integer class ids, 0 for background.
    model:          None takes the bundled weights. A given model is moved to `device`, if that is given.
    device:         None takes CUDA where there is one, or the given model as it is.
    Further arguments: see `SegmentOptions`.

    Returns one SegmentationResult, or a list of them for a list. Raises ValueError or FileNotFoundError, in one
    sentence that names the file or argument, for anything that cannot be segmented; all inputs are checked
    before the first is segmented.
    """
    options = SegmentOptions(
        size=size,
        classes=None if classes is None else tuple(classes),
        axis=axis,
        window=window,
        batch_size=batch_size,
        threshold=threshold,
        seeds=tuple(seeds or ()),
        uncertainty=uncertainty,
    )
    several = isinstance(images, list | tuple)
    targets = list(images) if isinstance(images, list | tuple) else [images]
    names = [f"images[{i}]" if several else "images" for i in range(len(targets))]
    support = SupportSet(support_images, support_masks, options)
    slices = [check_target(target, name, support, options) for target, name in zip(targets, names, strict=True)]
    model, place = _placed(model, device)
    segmenter = Segmenter(model, support, options, place)
    with tqdm(total=sum(slices), unit="slice", disable=not progress) as bar:
        results = [segmenter(t, name=n, on_slices=bar.update) for t, n in zip(targets, names, strict=True)]
    return results if several else results[0]


def check_target(target: object, name: str, support: SupportSet, options: SegmentOptions) -> int:
    """The number of slices of a target that can be segmented. Raises as `segment` for one that cannot."""
    image = as_image(target, name)
    planes, _ = prepare(image, options)
    image.mask_dtype(max(support.classes))
    return len(planes)


def prepare(image: Image, options: SegmentOptions) -> tuple[NDArray[Any], tuple[float, float]]:
    """The slices [N, H, W] of an image and the intensities that become 0 and 1. Raises ValueError for an unfit one."""
    planes = image.planes(options.axis)
    if options.window is None:
        return planes, intensity_window(image.array, image.name)
    check_intensities(image.array, image.name)
    check_intensities(np.clip(image.array, *options.window), f"{image.name} inside the window {options.window}")
    return planes, options.window


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name; None takes CUDA where there is one, else the CPU. ValueError for one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device!r}") from None
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be one of this machine, which has {_devices()}, got {device}")
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {device}")
    return resolved


def _devices() -> str:
    return ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])


def _placed(model: InContextModel | None, device: str | torch.device | None) -> tuple[InContextModel, torch.device]:
    if model is None:
        from icseg.model import PatchICL

        resolved = resolve_device(device)
        return PatchICL.from_pretrained(device=resolved), resolved
    if not isinstance(model, nn.Module):
        return model, resolve_device("cpu" if device is None else device)
    if device is None:
        return model, next((p.device for p in model.parameters()), torch.device("cpu"))
    resolved = resolve_device(device)
    return model.to(resolved), resolved


def _support_pairs(image: Image, mask: Image, options: SegmentOptions) -> Iterator[SupportPair]:
    """The pair, or for a volume one pair for each slice with a label."""
    slices, window = prepare(image, options)
    labels = mask.planes(options.axis)
    if labels.shape != slices.shape:
        raise ValueError(f"{mask.name} must have the size of {image.name} ({_size(slices)}), got {_size(labels)}")
    for values, ids in zip(slices, labels, strict=True):
        if len(slices) == 1 or ids.any():
            yield SupportPair(normalise(values, window), ids)


def _size(planes: NDArray[Any]) -> str:
    count, height, width = planes.shape
    return f"{height} x {width}" if count == 1 else f"{count} slices of {height} x {width}"


def _chosen(present: list[int], options: SegmentOptions) -> list[int]:
    if not present:
        raise ValueError("support_masks must mark at least one pixel, got only background")
    if options.classes is not None:
        if absent := sorted(set(options.classes) - set(present)):
            raise ValueError(
                f"classes must be ids in the support masks ({', '.join(map(str, present))}), "
                f"got {', '.join(map(str, absent))}"
            )
        return sorted(set(options.classes))
    if len(present) > MOST_CLASSES:
        raise ValueError(
            f"support_masks must hold at most {MOST_CLASSES} class ids unless classes are chosen, got {len(present)}"
        )
    return present


def _winners(logits: Tensor, threshold: float) -> Tensor:
    """[N, C, H, W] to [N, H, W]: 1 + the most likely class where it passes the threshold, else 0."""
    best, index = logits.max(1)
    return torch.where(best > math.log(threshold / (1 - threshold)), index + 1, 0)


def _entropy(logits: Tensor) -> Tensor:
    """[N, C, H, W] to [N, H, W] in [0, 1]: entropy of background and classes over its maximum.

    The classes are taken as independent and exclusive, which makes their posterior the softmax of
    (0, logits); with one class it is the binary entropy.
    """
    log_posterior = torch.cat([torch.zeros_like(logits[:, :1]), logits], 1).log_softmax(1)
    entropy = -(log_posterior.exp() * log_posterior).sum(1) / math.log(log_posterior.shape[1])
    return entropy.clamp(0, 1)


@contextmanager
def _evaluating(model: InContextModel) -> Iterator[None]:
    """Evaluation mode, without gradients; the mode of the model is put back."""
    was_training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if isinstance(model, nn.Module):
            model.train(was_training)
