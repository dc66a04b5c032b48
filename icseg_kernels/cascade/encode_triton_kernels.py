"""The Triton kernel of encode_patches: one program a patch for its features and token, another for its context.

A convolution is a matrix product of [pixels, k k Ci] by [k k Ci, Co], whose left operand is gathered from a map in
scratch, [pixels, Ci]: the terms of a row of the filter follow each other there, as they do in weights that are
channels_last. Maps that are padded lie in a frame of zeros. What a thread has stored in scratch, all threads of its
program see after a barrier, behind which the loads of the next convolution must stay: launch with num_stages=1, for
which nothing is loaded in advance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from icseg_kernels import triton_launch
from icseg_kernels.cascade.encode import Channels, options
from icseg_kernels.compilation import Compilation


@triton.jit
def _convolve(  # type: ignore[no-untyped-def]
    source, weight, bias, target, out,
    CI: tl.constexpr, ROW: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, SIDE: tl.constexpr,
    CO: tl.constexpr, TARGET_ROW: tl.constexpr, TARGET_CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    SLOPE: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """SIDE x SIDE pixels of CO channels, into a map `target`, and channel by channel into `out`, where they are given.

    ROW, TARGET_ROW: pixels of a row of the maps. TARGET_CHANNELS: those of the target's pixels. WIDTH: CO, padded.
    """
    PIXELS: tl.constexpr = SIDE * SIDE
    TERMS: tl.constexpr = KERNEL * KERNEL * CI
    n = tl.arange(0, WIDTH)
    for start in range(0, PIXELS, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        pixel = tl.minimum(m, PIXELS - 1)
        corner = (pixel // SIDE * ROW + pixel % SIDE) * (STRIDE * CI)
        total = tl.zeros((BLOCK_M, WIDTH), ACC)
        for term in range(0, TERMS, BLOCK_K):
            k = term + tl.arange(0, BLOCK_K)
            offset = k // (KERNEL * CI) * (ROW * CI) + k % (KERNEL * CI)
            there = k < TERMS
            pixels = tl.load(source + corner[:, None] + offset[None, :], mask=there[None, :], other=0).to(OPERAND)
            taps = weight + k[:, None] + (n * TERMS)[None, :]
            taps = tl.load(taps, mask=there[:, None] & (n < CO)[None, :], other=0).to(OPERAND)
            total = tl.dot(pixels, taps, total, input_precision=PRECISION, out_dtype=ACC)
        total += tl.load(bias + n, mask=n < CO, other=0).to(ACC)[None, :]
        total = tl.where(total > 0, total, total * SLOPE).to(source.dtype.element_ty)
        inside = (m < PIXELS)[:, None] & (n < CO)[None, :]
        if target is not None:
            to = (m // SIDE * TARGET_ROW + m % SIDE) * TARGET_CHANNELS
            tl.store(target + to[:, None] + n[None, :], total, mask=inside)
        if out is not None:
            tl.store(out + m[:, None] + (n * PIXELS)[None, :], total, mask=inside)


@triton.jit
def _clear_frame(frame, SIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Zeros in the outermost pixels of a map [SIDE, SIDE, CHANNELS]."""
    for start in range(0, SIDE * SIDE * CHANNELS, BLOCK):
        element = start + tl.arange(0, BLOCK)
        y, x = element // (SIDE * CHANNELS), element // CHANNELS % SIDE
        outermost = (y == 0) | (y == SIDE - 1) | (x == 0) | (x == SIDE - 1)
        zeros = tl.zeros((BLOCK,), frame.dtype.element_ty)
        tl.store(frame + element, zeros, mask=outermost & (element < SIDE * SIDE * CHANNELS))


@triton.jit
def _touches(corner, side, length):  # type: ignore[no-untyped-def]
    """Whether any of `side` pixels from `corner` lies in an image of `length`; what does not gathers zeros."""
    return (corner > -side) & (corner < length)


@triton.jit
def _clamped(pixel, length):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(pixel, 0), length - 1)


@triton.jit
def _places(top, left, i, j, height, width):  # type: ignore[no-untyped-def]
    """Offsets of the pixels (top + i, left + j), borders replicated, and whether their crop touches the image."""
    inside = _touches(top, 16, height) & _touches(left, 16, width)
    return _clamped(top + i, height) * width + _clamped(left + j, width), inside


@triton.jit
def _largest(maps, offset, inside, size, classes, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of `classes` maps of `size` pixels; NaN where one is."""
    largest = tl.full((256,), float("-inf"), ACC)
    for number in range(classes):
        value = tl.load(maps + number * size + offset, mask=inside, other=0).to(ACC)
        largest = tl.where((value > largest) | (value != value), value, largest)
    return largest


@triton.jit
def _interpolated(  # type: ignore[no-untyped-def]
    maps, top, left, y, x, down, right, height, width, side, classes, ACC: tl.constexpr
):
    """The largest of `classes` maps between rows top + y and one more, columns left + x and one more: `down`, `right`
    are the shares of the latter. Zero without classes."""
    inside = _touches(top, side, height) & _touches(left, side, width)
    upper, lower = _clamped(top + y, height) * width, _clamped(top + y + 1, height) * width
    before, after = _clamped(left + x, width), _clamped(left + x + 1, width)
    size = height.to(tl.int64) * width
    largest = tl.full((256,), float("-inf"), ACC)
    for number in range(classes):
        here = maps + number * size
        above = tl.load(here + upper + before, mask=inside, other=0).to(ACC) * (1 - right)
        above += tl.load(here + upper + after, mask=inside, other=0).to(ACC) * right
        below = tl.load(here + lower + before, mask=inside, other=0).to(ACC) * (1 - right)
        below += tl.load(here + lower + after, mask=inside, other=0).to(ACC) * right
        value = above * (1 - down) + below * down
        largest = tl.where((value > largest) | (value != value), value, largest)
    return tl.where(classes > 0, largest, 0.0)


@triton.jit
def _cut_patch(  # type: ignore[no-untyped-def]
    image, detail, label, target, labels, sample, top, left, height, width, label_height, label_width,
    classes, detailed, FROM_LOGITS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Image, detail and normalised image, into a map [16, 16, 3], and labels, into a framed one [18, 18, 1]."""
    pixel = tl.arange(0, 256)
    i, j = pixel // 16, pixel % 16
    kind = image.dtype.element_ty
    start = sample * height * width
    offset, inside = _places(top - 4, left - 4, i, j, height, width)
    # Loads before what waits for them.
    shown = tl.load(image + start + offset, mask=inside, other=0)
    details = tl.load(detail + start + offset, mask=inside & (detailed > 0), other=0)
    label += sample * classes * label_height * label_width
    if FROM_LOGITS:
        seen = _interpolated(
            label, (top >> 1) - 2, (left >> 1) - 2, (i + 1) // 2 - 1, (j + 1) // 2 - 1,
            tl.where(i % 2 == 0, 0.75, 0.25).to(ACC), tl.where(j % 2 == 0, 0.75, 0.25).to(ACC),
            label_height, label_width, 8, classes, ACC,
        )  # fmt: skip
        seen = tl.sigmoid(seen) * 2 - 1
    else:
        seen = _largest(label, offset, inside, height.to(tl.int64) * width, classes, ACC) * 2 - 1
    tl.store(labels + (i + 1) * 18 + j + 1, seen.to(kind))
    shown = shown.to(ACC) * 2 - 1
    mean = tl.sum(shown, 0) / 256
    deviation = tl.sqrt(tl.sum((shown - mean) * (shown - mean), 0) / 256)
    tl.store(target + pixel * 3, shown.to(kind))
    tl.store(target + pixel * 3 + 1, (details.to(ACC) * 2).to(kind))
    tl.store(target + pixel * 3 + 2, ((shown - mean) / (deviation + 0.05)).to(kind))


@triton.jit
def _cut_context(  # type: ignore[no-untyped-def]
    coarse, label, target, sample, top, left, height, width, label_height, label_width, classes,
    FROM_LOGITS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Image, label and ones inside the image, from (top, left) of the coarse image, into a framed map [18, 18, 3]."""
    pixel = tl.arange(0, 256)
    i, j = pixel // 16, pixel % 16
    kind = coarse.dtype.element_ty
    offset, inside = _places(top, left, i, j, height, width)
    shown = tl.load(coarse + sample * height * width + offset, mask=inside, other=0)
    label += sample * classes * label_height * label_width
    if FROM_LOGITS:
        half = tl.full((256,), 0.5, ACC)
        seen = _interpolated(
            label, top * 2, left * 2, i * 2, j * 2, half, half, label_height, label_width, 32, classes, ACC
        )
        seen = tl.sigmoid(seen) * 2 - 1
    else:
        seen = _largest(label, offset, inside, height.to(tl.int64) * width, classes, ACC)
        seen = tl.where(inside, seen * 2 - 1, 0.0)
    y, x = top + i, left + j
    within = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    target += ((i + 1) * 18 + j + 1) * 3
    tl.store(target, (shown.to(ACC) * 2 - 1).to(kind))
    tl.store(target + 1, seen.to(kind))
    tl.store(target + 2, within.to(kind))


@triton.jit(
    do_not_specialize=[
        "height", "width", "coarse_height", "coarse_width", "label_height", "label_width", "label_coarse_height",
        "label_coarse_width", "classes", "detailed", "count", "patches",
    ]
)  # fmt: skip
def encode_kernel(  # type: ignore[no-untyped-def]
    image, detail, coarse, label, label_coarse, coords, features, hidden, scratch,
    stem_1_weight, stem_1_bias, stem_2_weight, stem_2_bias, stem_3_weight, stem_3_bias, stem_4_weight, stem_4_bias,
    label_stem_weight, label_stem_bias, token_weight, token_bias,
    context_1_weight, context_1_bias, context_2_weight, context_2_bias,
    height, width, coarse_height, coarse_width, label_height, label_width, label_coarse_height, label_coarse_width,
    classes, detailed, count, patches,
    SECOND: tl.constexpr, FRAMED: tl.constexpr, LABEL: tl.constexpr, STEM_SLOT: tl.constexpr,
    CONTEXT_MAP: tl.constexpr, CONTEXT_SLOT: tl.constexpr,
    STEM_1: tl.constexpr, STEM_1_WIDTH: tl.constexpr, STEM_1_M: tl.constexpr, STEM_1_K: tl.constexpr,
    STEM_2: tl.constexpr, STEM_2_WIDTH: tl.constexpr, STEM_2_M: tl.constexpr, STEM_2_K: tl.constexpr,
    STEM_3: tl.constexpr, STEM_3_WIDTH: tl.constexpr, STEM_3_M: tl.constexpr, STEM_3_K: tl.constexpr,
    STEM_4: tl.constexpr, STEM_4_WIDTH: tl.constexpr, STEM_4_M: tl.constexpr, STEM_4_K: tl.constexpr,
    LABEL_STEM: tl.constexpr, LABEL_STEM_WIDTH: tl.constexpr, LABEL_STEM_M: tl.constexpr, LABEL_STEM_K: tl.constexpr,
    TOKEN: tl.constexpr, TOKEN_WIDTH: tl.constexpr, TOKEN_M: tl.constexpr, TOKEN_K: tl.constexpr,
    CONTEXT_1: tl.constexpr, CONTEXT_1_WIDTH: tl.constexpr, CONTEXT_1_M: tl.constexpr, CONTEXT_1_K: tl.constexpr,
    CONTEXT_2: tl.constexpr, CONTEXT_2_WIDTH: tl.constexpr, CONTEXT_2_M: tl.constexpr, CONTEXT_2_K: tl.constexpr,
    FROM_LOGITS: tl.constexpr, SLOPE: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """features [patches, STEM_4, 8, 8] and hidden [patches, (TOKEN + CONTEXT_2) 16], on a grid of 2 `patches` programs.

    Those of features and tokens, which take longer, come first. detailed: whether there is a detail.
    """
    CHANNELS: tl.constexpr = STEM_4 + LABEL_STEM
    number = tl.program_id(0) % patches
    sample = (number // count).to(tl.int64)
    top = tl.load(coords + number.to(tl.int64) * 2)
    left = tl.load(coords + number.to(tl.int64) * 2 + 1)
    units = hidden + number.to(tl.int64) * ((TOKEN + CONTEXT_2) * 16)
    if tl.program_id(0) < patches:
        # The maps of the stem go to the beginning of a slot, to its element SECOND, ... and at last to FRAMED.
        first = scratch + number.to(tl.int64) * STEM_SLOT
        second, framed, labels = first + SECOND, first + FRAMED, first + LABEL
        _cut_patch(
            image, detail, label, first, labels, sample, top, left, height, width, label_height, label_width,
            classes, detailed, FROM_LOGITS, ACC,
        )  # fmt: skip
        _clear_frame(labels, 18, 1, 512)
        _clear_frame(framed, 10, CHANNELS, 1024)
        tl.debug_barrier()
        inner = framed + 11 * CHANNELS
        _convolve(
            labels, label_stem_weight, label_stem_bias, inner + STEM_4, None, 1, 18, 4, 2, 8, LABEL_STEM, 10, CHANNELS,
            LABEL_STEM_WIDTH, LABEL_STEM_M, LABEL_STEM_K, SLOPE, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        _convolve(
            first, stem_1_weight, stem_1_bias, second, None, 3, 16, 3, 1, 14, STEM_1, 14, STEM_1,
            STEM_1_WIDTH, STEM_1_M, STEM_1_K, SLOPE, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        _convolve(
            second, stem_2_weight, stem_2_bias, first, None, STEM_1, 14, 3, 1, 12, STEM_2, 12, STEM_2,
            STEM_2_WIDTH, STEM_2_M, STEM_2_K, SLOPE, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        _convolve(
            first, stem_3_weight, stem_3_bias, second, None, STEM_2, 12, 3, 1, 10, STEM_3, 10, STEM_3,
            STEM_3_WIDTH, STEM_3_M, STEM_3_K, SLOPE, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        of_patch = features + number.to(tl.int64) * (STEM_4 * 64)
        _convolve(
            second, stem_4_weight, stem_4_bias, inner, of_patch, STEM_3, 10, 3, 1, 8, STEM_4, 10, CHANNELS,
            STEM_4_WIDTH, STEM_4_M, STEM_4_K, SLOPE, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        _convolve(
            framed, token_weight, token_bias, None, units, CHANNELS, 10, 4, 2, 4, TOKEN, 0, 0,
            TOKEN_WIDTH, TOKEN_M, TOKEN_K, SLOPE, OPERAND, ACC, PRECISION,
        )  # fmt: skip
    else:
        frame = scratch + patches.to(tl.int64) * STEM_SLOT + number.to(tl.int64) * CONTEXT_SLOT
        between = frame + CONTEXT_MAP
        _cut_context(
            coarse, label_coarse, frame, sample, (top >> 2) - 7, (left >> 2) - 7, coarse_height, coarse_width,
            label_coarse_height, label_coarse_width, classes, FROM_LOGITS, ACC,
        )  # fmt: skip
        _clear_frame(frame, 18, 3, 1024)
        _clear_frame(between, 10, CONTEXT_1, 1024)
        tl.debug_barrier()
        _convolve(
            frame, context_1_weight, context_1_bias, between + 11 * CONTEXT_1, None, 3, 18, 4, 2, 8,
            CONTEXT_1, 10, CONTEXT_1, CONTEXT_1_WIDTH, CONTEXT_1_M, CONTEXT_1_K, SLOPE, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()
        _convolve(
            between, context_2_weight, context_2_bias, None, units + TOKEN * 16, CONTEXT_1, 10, 4, 2, 4,
            CONTEXT_2, 0, 0, CONTEXT_2_WIDTH, CONTEXT_2_M, CONTEXT_2_K, SLOPE, OPERAND, ACC, PRECISION,
        )  # fmt: skip


def types(dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    """Of sums and of the operands of products, for tensors of `dtype`."""
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    narrow = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    operand = wide if triton_launch.INTERPRETED else narrow.get(dtype, wide)
    return {"OPERAND": operand, "ACC": wide, "PRECISION": "tf32" if tf32 else "ieee"}


_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_MODEL = Channels(12, 16, 24, 24, 8, 48, 16, 32)


def _compilation(dtype: torch.dtype, tf32: bool, from_logits: bool) -> Compilation:
    given = options(_MODEL, dtype.itemsize, fused=dtype == torch.float32 and not tf32)
    warps, stages = given.pop("num_warps"), given.pop("num_stages")
    given |= types(dtype, tf32) | {"FROM_LOGITS": from_logits, "SLOPE": 0.05}
    names = [name for name in encode_kernel.arg_names if name not in given]
    integers = names[names.index("height") :]
    signature = dict.fromkeys(names, _POINTERS[dtype]) | dict.fromkeys(integers, "i32") | {"coords": "*i64"}
    return Compilation(
        f"cascade encode: {_POINTERS[dtype][1:]}{' tf32' if tf32 else ''} {'target' if from_logits else 'support'}",
        encode_kernel,
        signature,
        given,
        num_warps=warps,
        num_stages=stages,
        tensor_cores=dtype != torch.float32 or tf32,
    )


def _compilations() -> Iterator[Compilation]:
    for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.float16, False), (torch.bfloat16, False)):
        for from_logits in (True, False):
            yield _compilation(dtype, tf32, from_logits)


COMPILATIONS = list(_compilations())
