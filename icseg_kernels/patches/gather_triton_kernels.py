"""gather_patches as Triton kernels, and what the kernels of the other patch ops share with them.

A copy is made of integers of the size of an element. Its program owns a block of channels, rows and columns of one
patch. In the adjoints a program owns a tile of an image and adds what lies on it in the order of K, so that nothing is
added by two programs. Positions have the bits of `coords.sample_positions` if nothing is contracted.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from icseg_kernels.compilation import Compilation

CHUNK = 128  # patches that are tested against a tile at once


@triton.jit
def divide(a, b):  # type: ignore[no-untyped-def]
    """a / b, rounded to nearest, of floats of one dtype."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.math.div_rn(a, b)


@triton.jit
def double(value, IN_MEMORY: tl.constexpr):  # type: ignore[no-untyped-def]
    """A float64: a number in memory, or the integer of the same bits."""
    if IN_MEMORY:
        return tl.load(value).to(tl.float64)
    else:
        return value.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def clamped_corner(pointer, patch, length):  # type: ignore[no-untyped-def]
    """int64, clamped before any sum, which could overflow: at -patch or at length a patch is wholly outside."""
    corner = tl.load(pointer).to(tl.int64)
    return tl.minimum(tl.maximum(corner, -patch.to(tl.int64)), length.to(tl.int64))


@triton.jit
def patches_on_tile(  # type: ignore[no-untyped-def]
    coords, start, count, height, width, top, left, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, CHUNK: tl.constexpr
):
    """[CHUNK]: the numbers, from `start`, of patches of height x width that lie on a tile; `count` for the others."""
    k = start + tl.arange(0, CHUNK)
    y = tl.load(coords + k.to(tl.int64) * 2, mask=k < count, other=0).to(tl.int64)
    x = tl.load(coords + k.to(tl.int64) * 2 + 1, mask=k < count, other=0).to(tl.int64)
    hit = (y > top - height) & (y < top + BLOCK_Y) & (x > left - width) & (x < left + BLOCK_X)
    return tl.where(hit & (k < count), k, count)


@triton.jit
def block_of_patch(  # type: ignore[no-untyped-def]
    channels, patch, BLOCK_C: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr
):
    """number of the patch, channels, rows, columns (int64) of a program of a flat grid."""
    program = tl.program_id(0)
    blocks_c, blocks_y, blocks_x = tl.cdiv(channels, BLOCK_C), tl.cdiv(patch, BLOCK_Y), tl.cdiv(patch, BLOCK_X)
    x = (program % blocks_x) * BLOCK_X + tl.arange(0, BLOCK_X)
    program = program // blocks_x
    y = (program % blocks_y) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    program = program // blocks_y
    c = (program % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    return program // blocks_c, c.to(tl.int64), y.to(tl.int64), x.to(tl.int64)


@triton.jit
def tile_of_image(  # type: ignore[no-untyped-def]
    channels, height, width, BLOCK_C: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr
):
    """number of the image, first channel, top, left (int64) of a program of a flat grid."""
    program = tl.program_id(0)
    blocks_c = tl.maximum(tl.cdiv(channels, BLOCK_C), 1)
    blocks_y, blocks_x = tl.cdiv(height, BLOCK_Y), tl.cdiv(width, BLOCK_X)
    left = (program % blocks_x).to(tl.int64) * BLOCK_X
    program = (program // blocks_x).to(tl.int32)
    top = (program % blocks_y).to(tl.int64) * BLOCK_Y
    program = (program // blocks_y).to(tl.int32)
    return program // blocks_c, (program % blocks_c).to(tl.int64) * BLOCK_C, top, left


@triton.jit
def volume(c, y, x):  # type: ignore[no-untyped-def]
    """[C], [Y], [X] -> [C, Y, X], the sums: offsets of a block from those along its axes."""
    return c[:, None, None] + (y[:, None] + x[None, :])[None, :, :]


@triton.jit
def valid(c, y, x):  # type: ignore[no-untyped-def]
    """[C], [Y], [X] -> [C, Y, X], where all hold."""
    return c[:, None, None] & (y[:, None] & x[None, :])[None, :, :]


@triton.jit(do_not_specialize=["inner", "channels", "height", "width", "count", "units"])
def copy_kernel(  # type: ignore[no-untyped-def]
    source,
    coords,
    patches,
    inner,
    channels,
    height,
    width,
    count,
    units,
    stride_outer,
    stride_inner,
    stride_c,
    stride_y,
    stride_x,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """source [outer, inner, C, H, W] -> patches [outer, inner, K, C, p, p], p = units * ALIGN."""
    patch = units * ALIGN
    number, c, i, j = block_of_patch(channels, patch, BLOCK_C, BLOCK_Y, BLOCK_X)
    image, side = number // count, patch.to(tl.int64)
    corner = coords + number.to(tl.int64) * 2
    y = clamped_corner(corner, patch, height) + i
    x = clamped_corner(corner + 1, patch, width) + j
    source += (image // inner).to(tl.int64) * stride_outer + (image % inner).to(tl.int64) * stride_inner
    inside = valid(c < channels, (i < patch) & (y >= 0) & (y < height), (j < patch) & (x >= 0) & (x < width))
    values = tl.load(source + volume(c * stride_c, y * stride_y, x * stride_x), mask=inside, other=0)
    patches += number.to(tl.int64) * channels * side * side
    written = valid(c < channels, i < patch, j < patch)
    tl.store(patches + volume(c * side * side, i * side, j), values, mask=written)


@triton.jit(do_not_specialize=["inner", "channels", "height", "columns", "count", "patch"])
def copy_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    coords,
    images,
    inner,
    channels,
    height,
    columns,
    count,
    patch,
    stride_outer,
    stride_inner,
    stride_k,
    stride_c,
    stride_y,
    stride_x,
    ACCUMULATE: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """grad [outer, inner, K, C, p, p] added up into images [outer, inner, C, H, W], in the order of K;
    W = columns * ALIGN."""
    width = columns * ALIGN
    image, first, top, left = tile_of_image(channels, height, width, BLOCK_C, BLOCK_Y, BLOCK_X)
    c, y, x = first + tl.arange(0, BLOCK_C), top + tl.arange(0, BLOCK_Y), left + tl.arange(0, BLOCK_X)
    coords += image.to(tl.int64) * count * 2
    grad += (image // inner).to(tl.int64) * stride_outer + (image % inner).to(tl.int64) * stride_inner
    total = tl.zeros((BLOCK_C, BLOCK_Y, BLOCK_X), ACCUMULATE)
    for start in range(0, count, CHUNK):
        waiting = patches_on_tile(coords, start, count, patch, patch, top, left, BLOCK_Y, BLOCK_X, CHUNK)
        k = tl.min(waiting, 0)
        while k < count:
            corner = coords + k.to(tl.int64) * 2
            i, j = y - tl.load(corner).to(tl.int64), x - tl.load(corner + 1).to(tl.int64)
            inside = valid(c < channels, (i >= 0) & (i < patch), (j >= 0) & (j < patch))
            offsets = volume(c * stride_c, i * stride_y, j * stride_x)
            total += tl.load(grad + k.to(tl.int64) * stride_k + offsets, mask=inside, other=0).to(ACCUMULATE)
            waiting = tl.where(waiting == k, count, waiting)
            k = tl.min(waiting, 0)
    size = height.to(tl.int64) * width
    images += image.to(tl.int64) * channels * size
    written = valid(c < channels, y < height, x < width)
    tl.store(images + volume(c * size, y * width, x), total.to(images.dtype.element_ty), mask=written)


@triton.jit
def corner_of_samples(pointer, extent, length, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Corners in DTYPE from a tensor of pointers; NaN where a patch of `extent` (float64) lies wholly outside."""
    corner = tl.load(pointer)
    if corner.dtype == tl.bfloat16:
        corner = corner.to(tl.float32)
    corner = corner.to(tl.float64)
    inside = (corner > 0.0 - extent) & (corner < length.to(tl.float64))
    return tl.where(inside, corner, float("nan")).to(DTYPE)


@triton.jit
def sample_position(number, corner, extent, out_size, EDGE_TO_EDGE: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the samples `number` lie along an axis, in pixels: DTYPE; corner in DTYPE, extent float64."""
    i, along = number.to(DTYPE), extent.to(DTYPE)
    if EDGE_TO_EDGE:
        steps = tl.maximum(out_size - 1, 1)
        line = divide(2 * i - steps.to(DTYPE), (2 * steps).to(DTYPE))
        return corner + (line * along + (extent * 0.5 - 0.5).to(DTYPE))
    else:
        return corner + (divide((i + 0.5) * along, out_size.to(DTYPE)) - 0.5)


@triton.jit
def neighbours(position, length, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """low, high (int64), the fraction of high, and whether there are any: of positions along an axis, clamped to it."""
    inside = (position == position) & (length > 0)
    last = tl.maximum(length - 1, 0).to(tl.int64)
    position = tl.where(inside, position, 0.0)
    position = tl.minimum(tl.maximum(position, 0.0), last.to(DTYPE))
    low = tl.minimum(position.to(tl.int64), last)
    return low, tl.minimum(low + 1, last), position - low.to(DTYPE), inside


@triton.jit(do_not_specialize=["extent_y", "extent_x", "inner", "channels", "height", "width", "count", "units"])
def bilinear_kernel(  # type: ignore[no-untyped-def]
    source,
    coords,
    patches,
    extent_y,
    extent_x,
    inner,
    channels,
    height,
    width,
    count,
    units,
    stride_outer,
    stride_inner,
    stride_c,
    stride_y,
    stride_x,
    EXTENT_IN_MEMORY: tl.constexpr,
    EDGE_TO_EDGE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """source [outer, inner, C, H, W] -> patches [outer, inner, K, C, n, n], n = units * ALIGN."""
    samples = units * ALIGN
    number, c, i, j = block_of_patch(channels, samples, BLOCK_C, BLOCK_Y, BLOCK_X)
    image, side = number // count, samples.to(tl.int64)
    corner = coords + number.to(tl.int64) * 2
    extent_y, extent_x = double(extent_y, EXTENT_IN_MEMORY), double(extent_x, EXTENT_IN_MEMORY)
    top = corner_of_samples(corner, extent_y, height, ACCUMULATE)
    left = corner_of_samples(corner + 1, extent_x, width, ACCUMULATE)
    y = sample_position(i, top, extent_y, samples, EDGE_TO_EDGE, ACCUMULATE)
    x = sample_position(j, left, extent_x, samples, EDGE_TO_EDGE, ACCUMULATE)
    upper, lower, down, y_inside = neighbours(y, height, ACCUMULATE)
    before, after, right, x_inside = neighbours(x, width, ACCUMULATE)
    source += (image // inner).to(tl.int64) * stride_outer + (image % inner).to(tl.int64) * stride_inner
    inside = valid(c < channels, (i < samples) & y_inside, (j < samples) & x_inside)
    total = tl.zeros((BLOCK_C, BLOCK_Y, BLOCK_X), ACCUMULATE)
    for row in tl.static_range(2):
        rows, of_row = upper, 1.0 - down
        if row == 1:
            rows, of_row = lower, down
        for column in tl.static_range(2):
            columns, of_column = before, 1.0 - right
            if column == 1:
                columns, of_column = after, right
            weight = (of_row[:, None] * of_column[None, :])[None, :, :]
            offsets = volume(c * stride_c, rows * stride_y, columns * stride_x)
            total += weight * tl.load(source + offsets, mask=inside, other=0).to(ACCUMULATE)
    total = tl.where(inside, total, 0.0)
    patches += number.to(tl.int64) * channels * side * side
    written = valid(c < channels, i < samples, j < samples)
    tl.store(patches + volume(c * side * side, i * side, j), total.to(patches.dtype.element_ty), mask=written)


@triton.jit
def pixels_of_samples(corner, extent, out_size, length, EDGE_TO_EDGE: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first and the last pixel (int64) along an axis that a patch's samples touch; none where corner is NaN."""
    first = sample_position(corner * 0, corner, extent, out_size, EDGE_TO_EDGE, DTYPE)
    last = sample_position(corner * 0 + (out_size - 1).to(DTYPE), corner, extent, out_size, EDGE_TO_EDGE, DTYPE)
    end = tl.maximum(length - 1, 0).to(tl.int64)
    known = (first == first) & (last == last)  # not where an extent is infinite in DTYPE
    least = tl.minimum(tl.maximum(tl.where(known, tl.minimum(first, last), 0.0), 0.0), end.to(DTYPE)).to(tl.int64)
    most = tl.minimum(tl.maximum(tl.where(known, tl.maximum(first, last), 0.0), 0.0), end.to(DTYPE)).to(tl.int64)
    outside = corner != corner
    return tl.where(outside, length, least), tl.where(outside, -1, tl.where(known, most + 1, length))


@triton.jit
def weight_of_sample(number, pixel, corner, extent, out_size, length, EDGE_TO_EDGE: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The share of each pixel in the sample `number`, and whether it is one of the sample's neighbours."""
    position = sample_position(number, corner, extent, out_size, EDGE_TO_EDGE, DTYPE)
    low, high, fraction, inside = neighbours(position, length, DTYPE)
    weight = tl.where(low == pixel, 1.0 - fraction, 0.0) + tl.where(high == pixel, fraction, 0.0)
    return weight, inside & ((low == pixel) | (high == pixel))


@triton.jit
def samples_of_pixels(pixel, corner, extent, out_size, length, EDGE_TO_EDGE: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first and the last sample of a patch that touch each pixel, int64: none is missing, few are too many."""
    first = sample_position(corner * 0, corner, extent, out_size, EDGE_TO_EDGE, DTYPE)
    steps = out_size
    if EDGE_TO_EDGE:
        steps = tl.maximum(out_size - 1, 1)
    step = divide(extent.to(DTYPE), steps.to(DTYPE))
    # Beyond the borders lie samples that are clamped to them.
    infinity = float("inf")
    below = tl.where(pixel > 0, (pixel - 1).to(DTYPE), -infinity)
    above = tl.where(pixel < length - 1, (pixel + 1).to(DTYPE), infinity)
    one, other = divide(below - first, step), divide(above - first, step)
    slack = 1e-3 + divide((tl.abs(corner) + 2 * tl.abs(extent.to(DTYPE)) + 1.0) * 2e-6, tl.abs(step))  # of rounding
    least, most = tl.minimum(one, other) - slack, tl.maximum(one, other) + slack
    known = (one == one) & (other == other) & (least == least) & (most == most)
    end = (out_size - 1).to(DTYPE)
    least = tl.minimum(tl.maximum(tl.ceil(tl.where(known, least, 0.0)), 0.0), end + 1.0).to(tl.int64)
    most = tl.minimum(tl.maximum(tl.floor(tl.where(known, most, end)), -1.0), end).to(tl.int64)
    _, touches = weight_of_sample(least, pixel, corner, extent, out_size, length, EDGE_TO_EDGE, DTYPE)
    least = tl.where(touches, least, least + 1)
    _, touches = weight_of_sample(most, pixel, corner, extent, out_size, length, EDGE_TO_EDGE, DTYPE)
    return least, tl.where(touches, most, most - 1)


@triton.jit(
    do_not_specialize=["extent_y", "extent_x", "inner", "channels", "height", "columns", "count", "samples"]
)
def bilinear_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    coords,
    images,
    extent_y,
    extent_x,
    inner,
    channels,
    height,
    columns,
    count,
    samples,
    stride_outer,
    stride_inner,
    stride_k,
    stride_c,
    stride_y,
    stride_x,
    EXTENT_IN_MEMORY: tl.constexpr,
    EDGE_TO_EDGE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """grad [outer, inner, K, C, n, n], weighted, added up into images [outer, inner, C, H, W], in the order of K;
    W = columns * ALIGN."""
    width = columns * ALIGN
    image, first, top, left = tile_of_image(channels, height, width, BLOCK_C, BLOCK_Y, BLOCK_X)
    c, y, x = first + tl.arange(0, BLOCK_C), top + tl.arange(0, BLOCK_Y), left + tl.arange(0, BLOCK_X)
    coords += image.to(tl.int64) * count * 2
    grad += (image // inner).to(tl.int64) * stride_outer + (image % inner).to(tl.int64) * stride_inner
    extent_y, extent_x = double(extent_y, EXTENT_IN_MEMORY), double(extent_x, EXTENT_IN_MEMORY)
    total = tl.zeros((BLOCK_C, BLOCK_Y, BLOCK_X), ACCUMULATE)
    for start in range(0, count, CHUNK):
        number = start + tl.arange(0, CHUNK)
        corners = coords + tl.minimum(number, count - 1).to(tl.int64) * 2
        corner = corner_of_samples(corners, extent_y, height, ACCUMULATE)
        least, most = pixels_of_samples(corner, extent_y, samples, height, EDGE_TO_EDGE, ACCUMULATE)
        hit = (number < count) & (least < top + BLOCK_Y) & (most >= top)
        corner = corner_of_samples(corners + 1, extent_x, width, ACCUMULATE)
        least, most = pixels_of_samples(corner, extent_x, samples, width, EDGE_TO_EDGE, ACCUMULATE)
        waiting = tl.where(hit & (least < left + BLOCK_X) & (most >= left), number, count)
        k = tl.min(waiting, 0)
        while k < count:
            here = coords + k.to(tl.int64) * 2
            corner_y = corner_of_samples(here, extent_y, height, ACCUMULATE)
            corner_x = corner_of_samples(here + 1, extent_x, width, ACCUMULATE)
            i0, i1 = samples_of_pixels(y, corner_y, extent_y, samples, height, EDGE_TO_EDGE, ACCUMULATE)
            j0, j1 = samples_of_pixels(x, corner_x, extent_x, samples, width, EDGE_TO_EDGE, ACCUMULATE)
            along_y = tl.max(tl.where(y < height, i1 - i0 + 1, 0), 0).to(tl.int32)
            along_x = tl.max(tl.where(x < width, j1 - j0 + 1, 0), 0).to(tl.int32)
            for row in range(0, along_y):
                i = i0 + row
                of_row, touches = weight_of_sample(
                    i, y, corner_y, extent_y, samples, height, EDGE_TO_EDGE, ACCUMULATE
                )
                i_valid = touches & (i <= i1)
                for column in range(0, along_x):
                    j = j0 + column
                    of_column, touches = weight_of_sample(
                        j, x, corner_x, extent_x, samples, width, EDGE_TO_EDGE, ACCUMULATE
                    )
                    inside = valid(c < channels, i_valid, touches & (j <= j1))
                    offsets = volume(c * stride_c, i * stride_y, j * stride_x)
                    values = tl.load(grad + k.to(tl.int64) * stride_k + offsets, mask=inside, other=0)
                    weight = (of_row[:, None] * of_column[None, :])[None, :, :]
                    total += tl.where(inside, weight * values.to(ACCUMULATE), 0.0)
            waiting = tl.where(waiting == k, count, waiting)
            k = tl.min(waiting, 0)
    size = height.to(tl.int64) * width
    images += image.to(tl.int64) * channels * size
    written = valid(c < channels, y < height, x < width)
    tl.store(images + volume(c * size, y * width, x), total.to(images.dtype.element_ty), mask=written)


def alignment(size: int) -> int:
    """The largest power of two, at most 16, that divides `size`: known to a kernel, it makes wide accesses."""
    return min(size & -size, 16) or 16


def accumulation(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of the dtype of sums."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def patch_blocks(channels: int, side: int) -> dict[str, int]:
    """Of a kernel whose program owns a block of one patch [channels, side, side]."""
    x = min(triton.next_power_of_2(side), 64)
    y = min(triton.next_power_of_2(side), 1024 // x)
    c = min(triton.next_power_of_2(max(channels, 1)), 1024 // (x * y))
    return {"BLOCK_C": c, "BLOCK_Y": y, "BLOCK_X": x, "num_warps": max(1, c * y * x // 256)}


def patch_programs(patches: int, channels: int, side: int, blocks: dict[str, int]) -> int:
    """How many programs own blocks of `patches` patches."""
    y, x = (triton.cdiv(side, blocks[axis]) for axis in ("BLOCK_Y", "BLOCK_X"))
    return patches * triton.cdiv(channels, blocks["BLOCK_C"]) * y * x


def tile_blocks(channels: int) -> dict[str, int]:
    """Of a kernel whose program owns a tile of images [channels, H, W]."""
    c = min(triton.next_power_of_2(max(channels, 1)), 4)
    return {"BLOCK_C": c, "BLOCK_Y": min(16, 32 // c), "BLOCK_X": 32, "CHUNK": CHUNK, "num_warps": 4}


def tile_programs(images: int, channels: int, height: int, width: int, blocks: dict[str, int]) -> int:
    """How many programs own tiles of `images` images; also of those without channels."""
    y, x = triton.cdiv(height, blocks["BLOCK_Y"]), triton.cdiv(width, blocks["BLOCK_X"])
    return images * max(triton.cdiv(channels, blocks["BLOCK_C"]), 1) * y * x


POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
_SIZES = ("inner", "channels", "height", "width", "count", "units")
_TRANSPOSED = ("inner", "channels", "height", "columns", "count")
_STRIDES = ("stride_outer", "stride_inner", "stride_c", "stride_y")
_PATCH_SIZES = ((3, 16), (64, 8))  # channels, side


def _signature(pointers: dict[str, str], integers: tuple[str, ...]) -> dict[str, str]:
    return pointers | dict.fromkeys(integers, "i32")


def _copies() -> list[Compilation]:
    found = []
    for itemsize, kind in ((1, "i8"), (2, "i16"), (4, "i32")):
        for channels, side in _PATCH_SIZES:
            constants = {"stride_x": 1, "ALIGN": alignment(side)} | patch_blocks(channels, side)
            found.append(
                Compilation(
                    f"gather_patches: copy {8 * itemsize} bit C{channels} p{side}",
                    copy_kernel,
                    _signature({"source": f"*{kind}", "coords": "*i32", "patches": f"*{kind}"}, _SIZES + _STRIDES),
                    constants,
                    aligned=_STRIDES,
                    num_warps=constants.pop("num_warps"),
                )
            )
    return found


def _resampled() -> list[Compilation]:
    found = []
    for dtype, pointer in POINTERS.items():
        for channels, side in _PATCH_SIZES:
            edge_to_edge, in_memory = side == 8, side == 8
            extent = "*fp64" if in_memory else "i64"
            constants = {"stride_x": 1, "ALIGN": alignment(side)} | patch_blocks(channels, side)
            options = {"EXTENT_IN_MEMORY": in_memory, "EDGE_TO_EDGE": edge_to_edge, "ACCUMULATE": accumulation(dtype)}
            pointers = {"source": pointer, "coords": "*fp32" if edge_to_edge else "*i32", "patches": pointer}
            found.append(
                Compilation(
                    f"gather_patches: bilinear {pointer[1:]} C{channels} n{side}",
                    bilinear_kernel,
                    _signature(pointers | {"extent_y": extent, "extent_x": extent}, _SIZES + _STRIDES),
                    constants | options,
                    unaligned=("extent_y", "extent_x"),
                    aligned=_STRIDES,
                    num_warps=constants.pop("num_warps"),
                    enable_fp_fusion=False,
                )
            )
    return found


def _adjoints() -> list[Compilation]:
    found = []
    strides = (*_STRIDES, "stride_k")
    for dtype, pointer in POINTERS.items():
        for channels, side in _PATCH_SIZES:
            blocks = tile_blocks(channels)
            num_warps = blocks.pop("num_warps")
            constants = {"stride_x": 1, "ALIGN": 16, "ACCUMULATE": accumulation(dtype)} | blocks
            common = {"aligned": strides, "num_warps": num_warps, "enable_fp_fusion": False}
            pointers = {"grad": pointer, "coords": "*i32", "images": pointer}
            found.append(
                Compilation(
                    f"gather_patches: copy backward {pointer[1:]} C{channels}",
                    copy_backward_kernel,
                    _signature(pointers, (*_TRANSPOSED, "patch", *strides)),
                    constants,
                    **common,
                )
            )
            edge_to_edge = side == 8
            pointers |= {"coords": "*fp32" if edge_to_edge else "*i32", "extent_y": "*fp64", "extent_x": "*fp64"}
            found.append(
                Compilation(
                    f"gather_patches: bilinear backward {pointer[1:]} C{channels}",
                    bilinear_backward_kernel,
                    _signature(pointers, (*_TRANSPOSED, "samples", *strides)),
                    constants | {"EXTENT_IN_MEMORY": True, "EDGE_TO_EDGE": edge_to_edge},
                    unaligned=("extent_y", "extent_x"),
                    **common,
                )
            )
    return found


COMPILATIONS = _copies() + _resampled() + _adjoints()
