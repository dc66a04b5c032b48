"""Bilinear samples of gather_patches as Triton kernels.

Positions have the bits of `coords.sample_positions`, and samples those of the reference, if nothing is contracted. In
the adjoint a program owns a tile of an image; for each pixel it finds the few samples of a patch that touch it.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from icseg_kernels.arithmetic_triton_kernels import divide
from icseg_kernels.compilation import Compilation
from icseg_kernels.patches.gather_triton_kernels import (
    PATCHES,
    POINTERS,
    SIZES,
    STRIDES,
    accumulation,
    alignment,
    block_of_patch,
    double,
    patch_blocks,
    tile_blocks,
    tile_of_image,
    valid,
    volume,
)


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
    inside = (length > 0) & (position == position)
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
    """The first and the last sample of a patch that touch each pixel, int32: none is missing, few are too many."""
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
    least = tl.minimum(tl.maximum(tl.ceil(tl.where(known, least, 0.0)), 0.0), end + 1.0).to(tl.int32)
    most = tl.minimum(tl.maximum(tl.floor(tl.where(known, most, end)), -1.0), end).to(tl.int32)
    _, touches = weight_of_sample(least, pixel, corner, extent, out_size, length, EDGE_TO_EDGE, DTYPE)
    least = tl.where(touches, least, least + 1)
    _, touches = weight_of_sample(most, pixel, corner, extent, out_size, length, EDGE_TO_EDGE, DTYPE)
    return least, tl.where(touches, most, most - 1)


@triton.jit(do_not_specialize=["extent_y", "extent_x", "inner", "channels", "height", "columns", "count", "samples"])
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
            along_y = tl.max(tl.where(y < height, i1 - i0 + 1, 0), 0)
            along_x = tl.max(tl.where(x < width, j1 - j0 + 1, 0), 0)
            for row in range(along_y):
                i = i0 + row
                of_row, i_touches = weight_of_sample(
                    i, y, corner_y, extent_y, samples, height, EDGE_TO_EDGE, ACCUMULATE
                )
                i_valid = i_touches & (i <= i1)
                for column in range(along_x):
                    j = j0 + column
                    of_column, j_touches = weight_of_sample(
                        j, x, corner_x, extent_x, samples, width, EDGE_TO_EDGE, ACCUMULATE
                    )
                    inside = valid(c < channels, i_valid, j_touches & (j <= j1))
                    offsets = volume(c * stride_c, i.to(tl.int64) * stride_y, j.to(tl.int64) * stride_x)
                    values = tl.load(grad + k.to(tl.int64) * stride_k + offsets, mask=inside, other=0)
                    weight = (of_row[:, None] * of_column[None, :])[None, :, :]
                    total += tl.where(inside, weight * values.to(ACCUMULATE), 0.0)
            waiting = tl.where(waiting == k, count, waiting)
            k = tl.min(waiting, 0)
    size = height.to(tl.int64) * width
    images += image.to(tl.int64) * channels * size
    written = valid(c < channels, y < height, x < width)
    tl.store(images + volume(c * size, y * width, x), total.to(images.dtype.element_ty), mask=written)


def adjoint_blocks(channels: int) -> dict[str, int]:
    """Of the adjoint, whose weights take registers: more warps to a tile."""
    return tile_blocks(channels) | {"num_warps": 8}


def _forward() -> list[Compilation]:
    found = []
    for dtype, pointer in POINTERS.items():
        for channels, side in PATCHES:
            edge_to_edge = in_memory = side == 8
            extent = "*fp64" if in_memory else "i64"
            pointers = {"source": pointer, "coords": "*fp32" if edge_to_edge else "*i32", "patches": pointer}
            constants = {"stride_x": 1, "ALIGN": alignment(side)} | patch_blocks(channels, side)
            num_warps = constants.pop("num_warps")
            found.append(
                Compilation(
                    f"gather_patches: bilinear {pointer[1:]} C{channels} n{side}",
                    bilinear_kernel,
                    pointers | {"extent_y": extent, "extent_x": extent} | dict.fromkeys(SIZES + STRIDES, "i32"),
                    constants
                    | {"EXTENT_IN_MEMORY": in_memory, "EDGE_TO_EDGE": edge_to_edge, "ACCUMULATE": accumulation(dtype)},
                    unaligned=("extent_y", "extent_x"),
                    aligned=STRIDES,
                    num_warps=num_warps,
                    enable_fp_fusion=False,
                )
            )
    return found


def _backward() -> list[Compilation]:
    found = []
    strides = (*STRIDES, "stride_k")
    for dtype, pointer in POINTERS.items():
        for channels, side in PATCHES:
            edge_to_edge = side == 8
            pointers = {"grad": pointer, "coords": "*fp32" if edge_to_edge else "*i32", "images": pointer}
            pointers |= {"extent_y": "*fp64", "extent_x": "*fp64"}
            constants: dict[str, Any] = {"stride_x": 1, "ALIGN": 16, "EXTENT_IN_MEMORY": True}
            constants |= {"EDGE_TO_EDGE": edge_to_edge, "ACCUMULATE": accumulation(dtype)} | adjoint_blocks(channels)
            num_warps = constants.pop("num_warps")
            integers = ("inner", "channels", "height", "columns", "count", "samples", *strides)
            found.append(
                Compilation(
                    f"gather_patches: bilinear backward {pointer[1:]} C{channels}",
                    bilinear_backward_kernel,
                    pointers | dict.fromkeys(integers, "i32"),
                    constants,
                    unaligned=("extent_y", "extent_x"),
                    aligned=strides,
                    num_warps=num_warps,
                    enable_fp_fusion=False,
                )
            )
    return found


COMPILATIONS = _forward() + _backward()
