"""From files or arrays of any size to masks: `segment`, and `Segmenter` for one target after another."""

from __future__ import annotations

import warnings
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
from icseg.data.images import Image, as_image, write_like
from icseg.data.normalise import normalise
from icseg.inputs import OrientationWarning, SegmentOptions, SupportPair, SupportSet, prepare
from icseg.posterior import Entropy, Winner


class InContextModel(Protocol):
    """What `segment` needs of a model; `icseg.PatchICL` is one.

    encode_support: images and masks [1, S, 1, size, size] in [0, 1] to what the call takes as `memory`.
    The call: targets [B, 1, size, size] to an object with `logits` of that shape.
    """

    def encode_support(self, images: Tensor, masks: Tensor) -> Any: ...

    def __call__(self, target: Tensor, *, memory: Any, seed: int | None = None) -> Any: ...


ORIENTATION = (
    "NIfTI files are used with others: NIfTI slices are taken as a radiologist's viewer shows them (patient's right at "
    "the left, front or head up), other files as they are; both must lie the same way"
)


@dataclass(frozen=True, repr=False)
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
    ```
    """

    def __init__(
        self,
        model: InContextModel,
        support: SupportSet,
        options: SegmentOptions,
        device: str | torch.device = "cpu",
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
        """Segment a path or array, which messages call `name`; `on_slices(n)` follows n more slices."""
        image = target if isinstance(target, Image) else as_image(target, name, self.options.axis)
        planes, window = prepare(image, self.options)
        dtype = image.mask_dtype(max(self.classes))
        mask = np.zeros(planes.shape, dtype)
        uncertainty = np.zeros(planes.shape, np.float32) if self.options.uncertainty else None
        ids = np.array([0, *self.classes], dtype)
        with _evaluating(self.model):
            for start in range(0, len(planes), self.options.batch_size):
                part = slice(start, start + self.options.batch_size)
                index, entropy = self._posterior(normalise(planes[part], window))
                mask[part] = ids[index.cpu().numpy()]
                if uncertainty is not None and entropy is not None:
                    uncertainty[part] = entropy.cpu().numpy()
                if on_slices is not None:
                    on_slices(len(index))
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
            frame = SquareFrame.of(pair.mask, self.options.size)
            images.append(frame.enter(self._tensor(pair.image[None])))
            masks.append(frame.enter_masks(self._tensor(pair.mask[None] == class_id)))
        return self.model.encode_support(torch.stack(images, 1), torch.stack(masks, 1))

    def _posterior(self, slices: NDArray[np.float32]) -> tuple[Tensor, Tensor | None]:
        """[N, H, W] in [0, 1] to the position of each pixel's class, 0 for background, and its uncertainty."""
        frame = SquareFrame.of(slices, self.options.size)
        target = frame.enter(self._tensor(slices))
        winner = Winner(slices.shape, self.options.threshold, self.device)
        entropy = Entropy(slices.shape, self.device) if self.options.uncertainty else None
        for memory in self._memories:
            logits = frame.leave(self._class_logits(target, memory))[:, 0]
            winner.add(logits)
            if entropy is not None:
                entropy.add(logits)
        return winner.index, None if entropy is None else entropy.value()

    def _class_logits(self, target: Tensor, memory: Any) -> Tensor:
        """[N, 1, size, size]; with seeds, of the mean probability over their draws.

        A draw depends on a slice's row in its batch. With seeds each slice therefore goes alone, which gives it the
        result that it has as an image of its own.
        """
        if not self.options.seeds:
            return self.model(target, memory=memory).logits.float()
        return torch.cat([self._mean_draw(one, memory) for one in target.split(1)])

    def _mean_draw(self, target: Tensor, memory: Any) -> Tensor:
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

    images:         a path, an array [H, W], or with `axis` an array [A, B, C]; or a list of these.
                    Any sizes; PNG, JPEG, TIFF, NIfTI, npy and npz. Colour becomes grey: that of files, and without
                    `axis` that of arrays [H, W, 3] or [H, W, 4] of uint8 or uint16.
    support_images: paths or arrays likewise. A volume, with `axis`, gives its annotated slices.
    support_masks:  for each support image a mask of its size with integer class ids, 0 for background.
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
    )
    several = isinstance(images, list | tuple)
    targets = list(images) if isinstance(images, list | tuple) else [images]
    names = [f"images[{i}]" if several else "images" for i in range(len(targets))]
    support = SupportSet(support_images, support_masks, options)
    slices = check_targets(targets, names, support, options)
    model, place = _placed(model, device)
    segmenter = Segmenter(model, support, options, place)
    with tqdm(total=sum(slices), unit="slice", disable=not progress) as bar:
        results = [segmenter(t, name=n, on_slices=bar.update) for t, n in zip(targets, names, strict=True)]
    return results if several else results[0]


def check_targets(
    targets: Sequence[object], names: Sequence[str], support: SupportSet, options: SegmentOptions
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
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
