"""From files or arrays of any size to masks: `segment`, and `Segmenter` for one target after another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType, SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from icseg.data.frame import ScaledFrame, SquareFrame
from icseg.data.images import Image, as_image, write_like
from icseg.data.normalise import normalise
from icseg.inputs import (
    SQUARE_SIDES,
    EncodedSupport,
    OrientationWarning,
    SegmentOptions,
    SupportPair,
    SupportSet,
    prepare,
)
from icseg.memory import SupportMemory
from icseg.posterior import Entropy, Winner
from icseg.sparse.budget import Budget

MOST_LOGITS = 2**25  # of a model call: large slices, and those of many classes, go in smaller batches


class InContextModel(Protocol):
    """What `segment` needs of a model; `icseg.PatchICL` is one.

    encode_support: images [1, S, 1, size, size] and masks [1, S, C, size, size] in [0, 1] to what the call takes as
    `memory`. The call: targets [B, 1, size, size] to an object with `logits` [B, C, size, size].

    C is 1, with a memory a class, unless the attribute `multi_class` is True. If `any_size` is True, images are not
    brought into squares, supports go to `support_encoder(count)` one by one (`add(images, masks)`, then `finish()`),
    and the call takes `budget`, and `seeds` to average over in place of `seed`.
    """

    def encode_support(self, images: Tensor, masks: Tensor) -> Any: ...

    def __call__(self, target: Tensor, *, memory: Any, seed: int | None = None) -> Any: ...


ORIENTATION = (
    "NIfTI files are used with others: NIfTI slices are taken as a radiologist's viewer shows them (patient's right at "
    "the left, front or head up), other files as they are; both must lie the same way"
)


@dataclass(frozen=True, repr=False)
class SegmentationResult:
    """mask:             class ids, 0 for background, in the shape of the image (its file's own axis order).
    uncertainty:      float32 in [0, 1] in the same shape, if asked for: the entropy of the classes and background,
                      1 where all are equally likely.
    classes:          the class ids that were looked for.
    image:            the input, as read.
    uncovered_errors: for each slice, if the model tells, the error that it expects where no finest patch lies, as a
                      share of twice the expected foreground (about what Dice may lose there)."""

    mask: NDArray[Any]
    uncertainty: NDArray[np.float32] | None
    classes: tuple[int, ...]
    image: Image
    uncovered_errors: tuple[float, ...] | None = None

    @property
    def uncovered_error(self) -> float | None:
        """The largest of `uncovered_errors`."""
        return None if self.uncovered_errors is None else max(self.uncovered_errors)

    def __repr__(self) -> str:
        shape = list(self.mask.shape)
        uncertainty = None if self.uncertainty is None else f"{self.uncertainty.dtype} {shape}"
        return (
            f"SegmentationResult(mask={self.mask.dtype} {shape}, uncertainty={uncertainty}, "
            f"classes={self.classes}, image={self.image.name!r})"
        )

    def save(self, path: str | Path) -> None:
        """Write the mask in the input's format and geometry (PNG for JPEG, .npy for an array)."""
        write_like(self.image, path, self.mask)


class Segmenter:
    """A model with a support set that is encoded once, for any number of targets.

    ```
    segmenter = Segmenter(model, SupportSet(images, masks), SegmentOptions(uncertainty=True))
    result = segmenter(target)
    segmenter.memory.save("task.safetensors")
    ```

    options: as given, with the size and window that are used.
    """

    def __init__(
        self,
        model: InContextModel,
        support: SupportSet | EncodedSupport,
        options: SegmentOptions,
        device: str | torch.device = "cpu",
    ) -> None:
        self.model: Any = model
        self.options = support.settle(options)
        self.device = torch.device(device)
        self.classes = tuple(support.classes)
        _check_model(model, self.options)
        if isinstance(support, EncodedSupport):
            _check_memory(model, support.memory)
            self._memories, self._channels = [support.memory.to(self.device)], list(support.classes.values())
            self._width = support.memory.classes
        else:
            with _evaluating(model):
                self._memories = self._encode_all(support)
            self._width = len(self.classes) // len(self._memories)
            self._channels = list(range(self._width))
            if len(self._memories) == 1 and isinstance(self._memories[0], SupportMemory):
                self._memories[0].notes.update(support.notes(self.options))

    @property
    def memory(self) -> SupportMemory:
        """The encoded support set, to be saved. Raises ValueError if the model makes one a class, or none of ours."""
        if len(self._memories) > 1:
            raise ValueError(f"classes must be one for a memory of this model, got {len(self._memories)}")
        if not isinstance(self._memories[0], SupportMemory):
            raise ValueError(f"model must make an icseg.SupportMemory, got a {type(self._memories[0]).__name__}")
        return self._memories[0]

    def __call__(
        self, target: object, *, name: str = "image", on_slices: Callable[[int], object] | None = None
    ) -> SegmentationResult:
        """Segment a path or array, which messages call `name`; `on_slices(n)` follows n more slices."""
        image = target if isinstance(target, Image) else as_image(target, name, self.options.axis)
        planes, window = prepare(image, self.options)
        dtype = image.mask_dtype(max(self.classes))
        mask = np.zeros(planes.shape, dtype)
        uncertainty = np.zeros(planes.shape, np.float32) if self.options.uncertainty else None
        uncovered: list[float] = []
        ids = np.array([0, *self.classes], dtype)
        frame = self._frame(planes)
        batch = self._batch_size(frame)
        with _evaluating(self.model):
            for start in range(0, len(planes), batch):
                part = slice(start, start + batch)
                found = self._posterior(normalise(planes[part], window), frame)
                mask[part] = ids[found.index.cpu().numpy()]
                if uncertainty is not None and found.entropy is not None:
                    uncertainty[part] = found.entropy.cpu().numpy()
                uncovered += found.uncovered
                if on_slices is not None:
                    on_slices(len(found.index))
        axis = self.options.axis
        return SegmentationResult(
            image.from_planes(mask, axis),
            None if uncertainty is None else image.from_planes(uncertainty, axis),
            self.classes,
            image,
            tuple(uncovered) or None,
        )

    def _frame(self, pixels: NDArray[Any]) -> ScaledFrame:
        kind = ScaledFrame if _is(self.model, "any_size") else SquareFrame
        return kind.of(pixels, self.options.settled_size)

    def _batch_size(self, frame: ScaledFrame) -> int:
        height, width = frame.scaled
        return max(1, min(self.options.batch_size, MOST_LOGITS // (self._width * height * width)))

    def _encode_all(self, support: SupportSet) -> list[Any]:
        """A memory of all classes, in which a support image without a class has an empty mask; or one a class, of the
        support images that hold it."""
        if _is(self.model, "multi_class"):
            return [self._encode(support.pairs, self.classes)]
        return [self._encode(pairs, (i,)) for i, pairs in support.classes.items()]

    def _encode(self, pairs: list[SupportPair], classes: tuple[int, ...]) -> Any:
        if _is(self.model, "any_size"):
            encoder = self.model.support_encoder(len(pairs))
            for pair in pairs:
                encoder.add(*self._support(pair, classes))
            return encoder.finish()
        images, masks = zip(*(self._support(pair, classes) for pair in pairs), strict=True)
        return self.model.encode_support(torch.cat(images, 1), torch.cat(masks, 1))

    def _support(self, pair: SupportPair, classes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The image [1, 1, 1, h, w] and its masks [1, 1, C, h, w]."""
        frame = self._frame(pair.mask)
        image = frame.enter(self._tensor(pair.image[None]))
        masks = [frame.enter_masks(self._tensor(pair.mask[None] == i)) for i in classes]
        return image[None], torch.cat(masks, 1)[None]

    def _posterior(self, slices: NDArray[np.float32], frame: ScaledFrame) -> Posterior:
        """Of slices [N, H, W] in [0, 1]."""
        target = frame.enter(self._tensor(slices))
        winner = Winner(slices.shape, self.options.threshold, self.device)
        entropy = Entropy(slices.shape, self.device) if self.options.uncertainty else None
        uncovered: list[float] = []
        for memory in self._memories:
            maps, errors = self._predict(target, memory)
            for channel in self._channels:
                logits = frame.leave(maps[:, channel : channel + 1].float())[:, 0]
                winner.add(logits)
                if entropy is not None:
                    entropy.add(logits)
            uncovered = [max(pair) for pair in zip(uncovered, errors, strict=True)] if uncovered else errors
        return Posterior(winner.index, None if entropy is None else entropy.value(), uncovered)

    def _predict(self, target: Tensor, memory: Any) -> tuple[Tensor, list[float]]:
        """Logits [N, C, h, w], with seeds of the mean probability over their draws, and errors left uncovered, if told.

        A draw depends on a slice's row in its batch. With seeds each slice therefore goes alone, which gives it the
        result that it has as an image of its own.
        """
        outs = [self._call(part, memory) for part in (target.split(1) if self.options.seeds else [target])]
        errors = [getattr(out, "uncovered_error", None) for out in outs]
        told = [float(value) for error in errors if error is not None for value in error]
        return outs[0].logits if len(outs) == 1 else torch.cat([out.logits for out in outs]), told

    def _call(self, target: Tensor, memory: Any) -> Any:
        seeds = self.options.seeds
        if _is(self.model, "any_size"):
            return self.model(target, memory=memory, budget=self.options.budget, seeds=list(seeds) or None)
        if not seeds:
            return self.model(target, memory=memory)
        draws = [self.model(target, memory=memory, seed=seed).logits.float().sigmoid() for seed in seeds]
        return SimpleNamespace(logits=torch.stack(draws).mean(0).logit(eps=1e-6))

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, torch.float32)


@dataclass(frozen=True)
class Posterior:
    """index:  [N, H, W] the position of each pixel's class, 0 for background.
    entropy:   [N, H, W], if asked for.
    uncovered: of each slice the error that is left, if the model tells."""

    index: Tensor
    entropy: Tensor | None
    uncovered: list[float]


def segment(
    images: object,
    support_images: Sequence[object] | None = None,
    support_masks: Sequence[object] | None = None,
    *,
    memory: SupportMemory | str | Path | None = None,
    model: InContextModel | None = None,
    size: int | EllipsisType | None = ...,
    classes: Sequence[int] | None = None,
    axis: int | None = None,
    window: tuple[float, float] | None = None,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    uncertainty: bool = False,
    threshold: float = 0.5,
    seeds: Sequence[int] | None = None,
    budget: int | Budget | None = None,
    progress: bool = False,
) -> SegmentationResult | list[SegmentationResult]:
    """Segment images from a few annotated ones.

    ```
    result = icseg.segment("cells.png", ["a.png", "b.png"], ["a_mask.png", "b_mask.png"])
    result.mask                         # class ids, in the size of cells.png
    result.save("cells_mask.png")
    ```

    images:         a path, an array [H, W], or with `axis` an array [A, B, C]; or a list of these.
                    Any sizes; PNG, JPEG, TIFF, NIfTI, npy and npz. Colour becomes grey: that of files, and without
                    `axis` that of arrays [H, W, 3] or [H, W, 4] of uint8 or uint16.
    support_images: paths or arrays likewise. A volume, with `axis`, gives its annotated slices.
    support_masks:  for each support image a mask of its size with integer class ids, 0 for background.
    memory:         in place of both, the support set that a model has encoded, or the file that it was saved to
                    (`icseg encode`, or `Segmenter.memory`); for that model only. It brings its classes, size and
                    window, so that others are refused.
    model:          None takes the bundled weights. A given model is moved to `device`, if that is given.
    device:         None takes CUDA where there is one, or the given model as it is.
    Further arguments: see `SegmentOptions`.

    Returns one SegmentationResult, or a list of them for a list. Raises TypeError for an argument of another type
    (True or 8.0 for an integer, a text for a list), and ValueError or FileNotFoundError for anything else that
    cannot be segmented, in one sentence that names the file or argument; all inputs are checked before the first is
    segmented. Warns (OrientationWarning) where NIfTI files, whose slices are turned to anatomical orientation, are
    used with others, which are taken as they are.
    """
    options = SegmentOptions(
        size=size,
        classes=classes,
        axis=axis,
        window=window,
        batch_size=batch_size,
        threshold=threshold,
        seeds=() if seeds is None else seeds,
        uncertainty=uncertainty,
        budget=budget,
    )
    support = _support(support_images, support_masks, memory, options)
    options = support.settle(options)
    several = isinstance(images, list | tuple)
    targets = list(images) if isinstance(images, list | tuple) else [images]
    names = [f"images[{i}]" if several else "images" for i in range(len(targets))]
    slices = check_targets(targets, names, support, options)
    model, place = _placed(model, device)
    segmenter = Segmenter(model, support, options, place)
    with tqdm(total=sum(slices), unit="slice", disable=not progress) as bar:
        results = [segmenter(t, name=n, on_slices=bar.update) for t, n in zip(targets, names, strict=True)]
    return results if several else results[0]


def check_targets(
    targets: Sequence[object], names: Sequence[str], support: SupportSet | EncodedSupport, options: SegmentOptions
) -> list[int]:
    """The number of slices of each target. Raises and warns as `segment`, for its caller's caller."""
    slices, anatomical = [], set(support.anatomical)
    for target, name in zip(targets, names, strict=True):
        image = as_image(target, name, options.axis)
        planes, _ = prepare(image, options)
        image.mask_dtype(max(support.classes))
        slices.append(len(planes))
        anatomical.add(image.geometry.anatomical)
    if len(anatomical) > 1:
        warnings.warn(ORIENTATION, OrientationWarning, stacklevel=3)
    return slices


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name; None takes CUDA where there is one, else the CPU.

    Raises ValueError for a device that is not there.
    """
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


def _is(model: InContextModel, attribute: str) -> bool:
    return bool(getattr(model, attribute, False))


def _support(
    images: Sequence[object] | None,
    masks: Sequence[object] | None,
    memory: SupportMemory | str | Path | None,
    options: SegmentOptions,
) -> SupportSet | EncodedSupport:
    if memory is None:
        if images is None or masks is None:
            raise ValueError("support_images and support_masks, or memory, must be given")
        return SupportSet(images, masks, options)
    if images is not None or masks is not None:
        raise ValueError("memory must not be given together with support_images or support_masks")
    if isinstance(memory, str | Path):
        memory = SupportMemory.load(memory)
    if not isinstance(memory, SupportMemory):
        raise TypeError(f"memory must be an icseg.SupportMemory or its file, got a {type(memory).__name__}")
    return EncodedSupport(memory, options)


def _check_model(model: InContextModel, options: SegmentOptions) -> None:
    """Raise ValueError if the model cannot do what the options ask for."""
    if _is(model, "any_size"):
        return
    least, most = SQUARE_SIDES
    size = options.settled_size
    if size is None or not least <= size <= most:
        given = "the images' own" if size is None else size
        raise ValueError(f"size must be an integer from {least} to {most} for a model of squares, got {given}")
    if options.budget is not None:
        raise ValueError(f"budget must be None for a model of a fixed cost, got {options.budget}")


def _check_memory(model: InContextModel, memory: SupportMemory) -> None:
    """Raise ValueError if `memory` is not of this model."""
    from icseg.model import PatchICL

    if isinstance(model, PatchICL):
        memory.check_model(model.network.fingerprint, model.network.weights_identity)
    if memory.classes > 1 and not _is(model, "multi_class"):
        raise ValueError(f"memory must hold one class for this model, got {memory.classes}")


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


@contextmanager
def _evaluating(model: InContextModel) -> Iterator[None]:
    """Evaluation mode, without gradients; the mode of each module is put back."""
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with torch.no_grad():  # inference tensors could not go on to a model with gradients
            yield
    finally:
        for module, training in modes.items():
            module.training = training
