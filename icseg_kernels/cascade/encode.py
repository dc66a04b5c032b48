"""Picked patches, from raw pixels to the inputs of their token's linear layers, in one launch of a Triton kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from icseg_kernels import triton_launch
from icseg_kernels.small_convolutions.triton import padded

CROP = 16  # pixels of a crop's side: of a patch with its halo, of its context, and of its label
PATCH = 8  # of what four convolutions of 3 x 3 leave of it, and one of 4 x 4 with stride 2
TOKEN = 4  # of what another one leaves
MOST_CHANNELS = 128  # of a map
_FRAME, _PATCH_FRAME = CROP + 2, PATCH + 2  # sides with the zeros that the convolutions of 4 x 4 see around a map


class EncoderWeights(NamedTuple):
    """Convolutions [Co, Ci, k, k] with their biases [Co], each followed by a leaky ReLU of `negative_slope`.

    stem_1 to stem_4: 3 x 3, unpadded: [C1, 3, 3, 3], ... [Cf, C3, 3, 3].
    label_stem, token, context_1, context_2: 4 x 4, stride 2, padding 1: [Cl, 1, 4, 4], [Ct, Cf + Cl, 4, 4],
    [C, 3, 4, 4], [Cc, C, 4, 4].

    Weights that are not channels_last, as those of a SparseNetwork are, are copied at every call.
    """

    stem_1_weight: Tensor
    stem_1_bias: Tensor
    stem_2_weight: Tensor
    stem_2_bias: Tensor
    stem_3_weight: Tensor
    stem_3_bias: Tensor
    stem_4_weight: Tensor
    stem_4_bias: Tensor
    label_stem_weight: Tensor
    label_stem_bias: Tensor
    token_weight: Tensor
    token_bias: Tensor
    context_1_weight: Tensor
    context_1_bias: Tensor
    context_2_weight: Tensor
    context_2_bias: Tensor
    negative_slope: float = 0.05

    @property
    def channels(self) -> Channels:
        return Channels(*(weight.shape[0] for weight in self[:16:2]))


class Channels(NamedTuple):
    """Outputs of every convolution."""

    stem_1: int
    stem_2: int
    stem_3: int
    stem_4: int
    label_stem: int
    token: int
    context_1: int
    context_2: int


def encode_patches(
    image: Tensor,
    detail: Tensor | None,
    coarse: Tensor,
    label: Tensor | None,
    label_coarse: Tensor | None,
    coords: Tensor,
    weights: EncoderWeights,
    *,
    from_logits: bool,
) -> tuple[Tensor, Tensor]:
    """Features [N K, Cf, 8, 8] of K patches an image, and the hidden units [N K, F] of their tokens, F = 16 (Ct + Cc).

    image:        [N, 1, h, w] in [0, 1], float32, float16 or bfloat16.
    detail:       [N, 1, h, w], or None for zeros.
    coarse:       [N, 1, ., .]: the image four times coarser, of which the context is cut.
    label:        [N, C, ., .], the masks in [0, 1] at the size of the image, and
    label_coarse: [N, C, ., .], those at the size of `coarse`; or with `from_logits` both are the logits at half the
                  size of the image, or None for labels of zero.
    coords:       [N, K, 2] int64, (y, x) of the patches' top-left corners in the image. A patch far outside is one of
                  constant inputs.

    Borders are replicated. In a row of hidden units, those of the token come before those of the context, channel by
    channel. Without gradients. Raises ValueError for tensors of other shapes, dtypes or devices, TypeError for one
    whose dtype or device no kernel serves.
    """
    _check(image, detail, coarse, label, label_coarse, coords, weights, from_logits)
    from icseg_kernels.cascade import encode_triton_kernels as kernels

    samples, count = coords.shape[:2]
    channels = weights.channels
    tf32 = image.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    constants = options(channels, image.dtype.itemsize, fused=image.dtype.itemsize >= 4 and not tf32)
    patches = samples * count
    features = image.new_empty(patches, channels.stem_4, PATCH, PATCH)
    hidden = image.new_empty(patches, TOKEN * TOKEN * (channels.token + channels.context_2))
    scratch = image.new_empty(patches * (constants["STEM_SLOT"] + constants["CONTEXT_SLOT"]))
    nothing = image  # a pointer that is not followed
    labels = [nothing if x is None else x.contiguous() for x in (label, label_coarse)]
    convolutions = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in weights[:16]]
    triton_launch.launch(
        kernels.encode_kernel,
        (2 * patches,),
        image.device,
        image.contiguous(),
        nothing if detail is None else detail.contiguous(),
        coarse.contiguous(),
        *labels,
        coords.contiguous(),
        features,
        hidden,
        scratch,
        *convolutions,
        *image.shape[-2:],
        *coarse.shape[-2:],
        *labels[0].shape[-2:],
        *labels[1].shape[-2:],
        0 if label is None else label.shape[1],
        int(detail is not None),
        count,
        patches,
        **constants,
        **kernels.types(image.dtype, tf32),
        FROM_LOGITS=from_logits,
        SLOPE=weights.negative_slope,
    )
    return features, hidden


def options(channels: Channels, itemsize: int, *, fused: bool) -> dict[str, Any]:
    """Sizes and launch options of the kernel, for elements of `itemsize` bytes.

    fused: products are of fused multiply-adds, not on tensor cores.
    """
    pixels = [(CROP - 2 * i) ** 2 for i in range(1, 5)]
    maps = [count * outputs for count, outputs in zip(pixels, channels[:4], strict=True)]
    first = _aligned(max(3 * CROP**2, maps[1]))
    second = _aligned(max(maps[0], maps[2]))
    framed = _aligned(_PATCH_FRAME**2 * (channels.stem_4 + channels.label_stem))
    context = _aligned(3 * _FRAME**2)
    found: dict[str, Any] = {
        "SECOND": first,
        "FRAMED": first + second,
        "LABEL": first + second + framed,
        "STEM_SLOT": first + second + framed + _aligned(_FRAME**2),
        "CONTEXT_MAP": context,
        "CONTEXT_SLOT": context + _aligned(_PATCH_FRAME**2 * channels.context_1),
    }
    small, tiny = PATCH * PATCH, TOKEN * TOKEN
    inputs = (3, *channels[:3], 1, channels.stem_4 + channels.label_stem, 3, channels.context_1)
    sizes = (*pixels, small, tiny, small, tiny)
    for i, (name, outputs) in enumerate(channels._asdict().items()):
        terms = inputs[i] * (9 if i < 4 else 16)
        rows, block = _blocks(sizes[i], terms, padded(outputs), itemsize, fused)
        name = name.upper()
        found |= {name: outputs, f"{name}_WIDTH": padded(outputs), f"{name}_M": rows, f"{name}_K": block}
    return found | {"num_warps": 8, "num_stages": 1}


def _blocks(pixels: int, terms: int, width: int, itemsize: int, fused: bool) -> tuple[int, int]:
    """Pixels and products at a time: few steps, as each waits for what it loads, of a tile that registers hold."""
    rows = min(max(16, triton_launch.power_of_two(pixels)), 128 if fused else 256)
    tile = 4096 if fused else 32768 // itemsize
    most = min(tile // rows, tile // width)
    return rows, max(16, min(most, triton_launch.power_of_two(terms)))


def _aligned(elements: int) -> int:
    return -(-elements // 16) * 16


def _check(
    image: Tensor,
    detail: Tensor | None,
    coarse: Tensor,
    label: Tensor | None,
    label_coarse: Tensor | None,
    coords: Tensor,
    weights: EncoderWeights,
    from_logits: bool,
) -> None:
    """The last check before raw pointers: the kernel reads as much memory as the shapes promise."""
    reasons = triton_launch.missing() + triton_launch.unsupported_device("image", image)
    if reasons := reasons + triton_launch.unsupported_dtype("image", image):
        raise TypeError(f"encode_patches cannot serve: {'; '.join(reasons)}")
    if image.ndim != 4 or image.shape[1] != 1 or 0 in image.shape[2:]:
        raise ValueError(f"image must have shape [N, 1, h, w] with h, w > 0, got {list(image.shape)}")
    samples = image.shape[0]
    if detail is not None:
        _guard("detail", detail, image.shape, image)
    _guard("coarse", coarse, (samples, 1, *coarse.shape[2:]), image)
    if (label is None) != (label_coarse is None) or (label is None and not from_logits):
        raise ValueError("label and label_coarse must both be given, or with from_logits both be None")
    if label is not None and label_coarse is not None:
        classes = label.shape[1] if label.ndim == 4 else 0
        sizes = (label, label_coarse) if from_logits else (image, coarse)
        _guard("label", label, (samples, max(classes, 1), *sizes[0].shape[2:]), image)
        _guard("label_coarse", label_coarse, (samples, max(classes, 1), *sizes[1].shape[2:]), image)
    if coords.ndim != 3 or coords.shape[0] != samples or coords.shape[2] != 2 or coords.dtype != torch.int64:
        raise ValueError(f"coords must be int64 [{samples}, K, 2], got {coords.dtype} {list(coords.shape)}")
    if coords.device != image.device:
        raise ValueError(f"coords must be on {image.device}, got {coords.device}")
    channels = weights.channels
    for name, outputs in channels._asdict().items():
        if not 0 < outputs <= MOST_CHANNELS:
            raise ValueError(f"{name} must have 1 to {MOST_CHANNELS} channels, got {outputs}")
    inputs = (3, *channels[:3], 1, channels.stem_4 + channels.label_stem, 3, channels.context_1)
    tensors: tuple[Tensor, ...] = weights[:16]
    for i, outputs in enumerate(channels):
        side = 3 if i < 4 else 4
        _guard(weights._fields[2 * i], tensors[2 * i], (outputs, inputs[i], side, side), image)
        _guard(weights._fields[2 * i + 1], tensors[2 * i + 1], (outputs,), image)


def _guard(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tensor.shape != shape or tensor.dtype != like.dtype or tensor.device != like.device or 0 in shape[1:]:
        raise ValueError(
            f"{name} must be {like.dtype} {list(shape)} of at least one pixel on {like.device}, got {tensor.dtype} "
            f"{list(tensor.shape)} on {tensor.device}"
        )
