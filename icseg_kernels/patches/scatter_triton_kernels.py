"""scatter_patches as Triton kernels.

A program owns a tile of an image, adds the patches that lie on it in the order of K, and writes its mean, coverage and
total weight once; nothing is added by two programs. The gradient is a gather.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from icseg_kernels.arithmetic_triton_kernels import divide
from icseg_kernels.compilation import Compilation
from icseg_kernels.patches.gather_triton_kernels import (
    POINTERS,
    accumulation,
    alignment,
    block_of_patch,
    clamped_corner,
    double,
    patch_blocks,
    patches_on_tile,
    tile_blocks,
    tile_of_image,
    valid,
    volume,
)


@triton.jit
def shares(table, i, j, inside, patch, WEIGHT: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """[Y, X]: the weights of rows i and columns j of a patch, from the table or as `gaussian_weight`; 0 outside."""
    if WEIGHT == "table":
        return tl.load(table + (i.to(tl.int64) * patch)[:, None] + j[None, :], mask=inside, other=0)
    else:
        centre, spread = (patch - 1).to(DTYPE) * 0.5, patch.to(DTYPE) * 0.125
        y, x = divide(i.to(DTYPE) - centre, spread), divide(j.to(DTYPE) - centre, spread)
        share = tl.exp(y * y * -0.5)[:, None] * tl.exp(x * x * -0.5)[None, :]
        return tl.where(inside, tl.maximum(share, tl.full(share.shape, 1e-3, DTYPE)), 0.0)


@triton.jit(do_not_specialize=["fill", "channels", "height", "columns", "count", "patch"])
def scatter_kernel(  # type: ignore[no-untyped-def]
    patches,
    coords,
    weight,
    fill,
    mean,
    total,
    coverage,
    channels,
    height,
    columns,
    count,
    patch,
    stride_batch,
    stride_k,
    stride_c,
    stride_y,
    stride_x,
    WEIGHT: tl.constexpr,
    FILL_IN_MEMORY: tl.constexpr,
    KEEP_TOTAL: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """patches [B, K, C, p, p] -> mean [B, C, H, W], total and coverage [B, 1, H, W]; W = columns * ALIGN."""
    width = columns * ALIGN
    image, first, top, left = tile_of_image(channels, height, width, BLOCK_C, BLOCK_Y, BLOCK_X)
    c, y, x = first + tl.arange(0, BLOCK_C), top + tl.arange(0, BLOCK_Y), left + tl.arange(0, BLOCK_X)
    coords += image.to(tl.int64) * count * 2
    patches += image.to(tl.int64) * stride_batch
    sums = tl.zeros((BLOCK_C, BLOCK_Y, BLOCK_X), ACCUMULATE)
    weights = tl.zeros((BLOCK_Y, BLOCK_X), ACCUMULATE)
    for start in range(0, count, CHUNK):
        waiting = patches_on_tile(coords, start, count, patch, patch, top, left, BLOCK_Y, BLOCK_X, CHUNK)
        k = tl.min(waiting, 0)
        while k < count:
            corner = coords + k.to(tl.int64) * 2
            # What lies on the tile is near it: 32 bits, of which fewer registers are needed.
            i = (top - tl.load(corner).to(tl.int64)).to(tl.int32) + tl.arange(0, BLOCK_Y)
            j = (left - tl.load(corner + 1).to(tl.int64)).to(tl.int32) + tl.arange(0, BLOCK_X)
            i_inside, j_inside = (i >= 0) & (i < patch), (j >= 0) & (j < patch)
            counted = i_inside[:, None] & j_inside[None, :]
            offsets = volume(c * stride_c, i.to(tl.int64) * stride_y, j.to(tl.int64) * stride_x)
            inside = valid(c < channels, i_inside, j_inside)
            values = tl.load(patches + k.to(tl.int64) * stride_k + offsets, mask=inside, other=0).to(ACCUMULATE)
            if WEIGHT != "none":
                share = shares(weight, i, j, counted, patch, WEIGHT, ACCUMULATE)
                counted = share > 0
                weights += tl.where(counted, share, 0.0)
                sums += tl.where(counted[None, :, :], values * share[None, :, :], 0.0)
            else:
                weights += counted.to(ACCUMULATE)
                sums += values
            waiting = tl.where(waiting == k, count, waiting)
            k = tl.min(waiting, 0)
    covered = weights > 0
    value = double(fill, FILL_IN_MEMORY).to(ACCUMULATE)
    means = divide(sums, tl.where(covered, weights, 1.0)[None, :, :])
    means = tl.where(covered[None, :, :], means, value)
    size = height.to(tl.int64) * width
    mean += image.to(tl.int64) * channels * size
    written = valid(c < channels, y < height, x < width)
    tl.store(mean + volume(c * size, y * width, x), means.to(mean.dtype.element_ty), mask=written)
    pixels = image.to(tl.int64) * size + (y * width)[:, None] + x[None, :]
    written = ((y < height) & (first == 0))[:, None] & (x < width)[None, :]
    tl.store(coverage + pixels, covered.to(tl.int8), mask=written)
    if KEEP_TOTAL:
        tl.store(total + pixels, weights, mask=written)


@triton.jit(do_not_specialize=["channels", "height", "width", "count", "units"])
def scatter_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    total,
    coords,
    weight,
    patches,
    channels,
    height,
    width,
    count,
    units,
    stride_batch,
    stride_c,
    stride_y,
    stride_x,
    WEIGHT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """grad [B, C, H, W], total [B, 1, H, W] -> patches [B, K, C, p, p], p = units * ALIGN."""
    patch = units * ALIGN
    number, c, i, j = block_of_patch(channels, patch, BLOCK_C, BLOCK_Y, BLOCK_X)
    image, side = (number // count).to(tl.int64), patch.to(tl.int64)
    corner = coords + number.to(tl.int64) * 2
    y = clamped_corner(corner, patch, height) + i
    x = clamped_corner(corner + 1, patch, width) + j
    y_inside, x_inside = (i < patch) & (y >= 0) & (y < height), (j < patch) & (x >= 0) & (x < width)
    counted = y_inside[:, None] & x_inside[None, :]
    pixels = (y * width)[:, None] + x[None, :]
    weights = tl.load(total + image * height * width + pixels, mask=counted, other=0)
    inside = valid(c < channels, y_inside, x_inside)
    offsets = volume(c * stride_c, y * stride_y, x * stride_x)
    values = tl.load(grad + image * stride_batch + offsets, mask=inside, other=0).to(ACCUMULATE)
    counted = weights > 0
    values = divide(values, tl.where(counted, weights, 1.0)[None, :, :])
    if WEIGHT != "none":
        in_patch = (i < patch)[:, None] & (j < patch)[None, :]
        share = shares(weight, i, j, in_patch, patch, WEIGHT, ACCUMULATE)
        values *= share[None, :, :]
        counted &= share > 0
    values = tl.where(counted[None, :, :], values, 0.0)
    patches += number.to(tl.int64) * channels * side * side
    written = valid(c < channels, i < patch, j < patch)
    tl.store(patches + volume(c * side * side, i * side, j), values.to(patches.dtype.element_ty), mask=written)


def _forward(dtype: torch.dtype, channels: int, weight: str, keep_total: bool) -> Compilation:
    blocks = tile_blocks(channels)
    num_warps, pointer, strides = blocks.pop("num_warps"), POINTERS[dtype], ("stride_batch", "stride_c", "stride_y")
    pointers = {"patches": pointer, "coords": "*i32", "fill": "i64", "mean": pointer, "coverage": "*i8"}
    pointers |= ({"weight": "*fp32"} if weight == "table" else {}) | ({"total": "*fp32"} if keep_total else {})
    integers = ("channels", "height", "columns", "count", "patch", "stride_k", *strides)
    options = {"WEIGHT": weight, "FILL_IN_MEMORY": False, "KEEP_TOTAL": keep_total}
    absent = dict.fromkeys({"weight", "total"} - set(pointers))
    return Compilation(
        f"scatter_patches: {pointer[1:]} C{channels} weight {weight}{', total' if keep_total else ''}",
        scatter_kernel,
        pointers | dict.fromkeys(integers, "i32"),
        {"stride_x": 1, "ALIGN": 16, "ACCUMULATE": accumulation(dtype)} | absent | options | blocks,
        aligned=("stride_k", *strides),
        num_warps=num_warps,
        enable_fp_fusion=False,
    )


def _backward(dtype: torch.dtype, channels: int, patch_size: int, weight: str) -> Compilation:
    blocks = patch_blocks(channels, patch_size)
    num_warps, pointer, strides = blocks.pop("num_warps"), POINTERS[dtype], ("stride_batch", "stride_c", "stride_y")
    pointers = {"grad": pointer, "total": "*fp32", "coords": "*i32", "patches": pointer}
    pointers |= {"weight": "*fp32"} if weight == "table" else {}
    integers = ("channels", "height", "width", "count", "units", *strides)
    constants = {"stride_x": 1, "WEIGHT": weight, "ACCUMULATE": accumulation(dtype), "ALIGN": alignment(patch_size)}
    return Compilation(
        f"scatter_patches: backward {pointer[1:]} C{channels} p{patch_size} weight {weight}",
        scatter_backward_kernel,
        pointers | dict.fromkeys(integers, "i32"),
        constants | dict.fromkeys({"weight"} - set(pointers)) | blocks,
        aligned=strides,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )


COMPILATIONS = [
    *(
        _forward(dtype, *call)
        for dtype in POINTERS
        for call in ((1, "none", False), (3, "table", True), (3, "gaussian", True))
    ),
    *(_backward(dtype, *call) for dtype in POINTERS for call in ((1, 16, "gaussian"), (3, 8, "table"))),
]
