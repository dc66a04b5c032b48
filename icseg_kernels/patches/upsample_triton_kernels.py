"""upsample_with_patches as a Triton kernel: a program owns a tile and finds the last patch on each of its pixels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from icseg_kernels.compilation import Compilation
from icseg_kernels.patches.gather_triton_kernels import (
    POINTERS,
    accumulation,
    patches_on_tile,
    tile_blocks,
    tile_of_image,
    valid,
    volume,
)


@triton.jit
def halfway(pixel, length):  # type: ignore[no-untyped-def]
    """low, high, and fourths of high: the neighbours of pixels along an axis of half the size, `length`."""
    last = tl.maximum(length - 1, 0).to(tl.int64)
    low = tl.minimum(tl.maximum((pixel + 1) // 2 - 1, 0), last)
    fourths = tl.where(pixel == 0, 0, tl.where(pixel % 2 == 0, 3, 1))
    return low, tl.minimum(low + 1, last), fourths


@triton.jit(
    do_not_specialize=["channels", "low_height", "low_width", "height", "columns", "count", "rows_p", "columns_p"]
)
def upsample_kernel(  # type: ignore[no-untyped-def]
    coarser,
    patches,
    coords,
    out,
    channels,
    low_height,
    low_width,
    height,
    columns,
    count,
    rows_p,
    columns_p,
    stride_batch,
    stride_c,
    stride_y,
    stride_x,
    patch_stride_batch,
    patch_stride_k,
    patch_stride_c,
    patch_stride_y,
    patch_stride_x,
    ACCUMULATE: tl.constexpr,
    ALIGN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """coarser [B, C, h, w], patches [B, K, C, p, q] -> out [B, C, H, W], W = columns * ALIGN."""
    width = columns * ALIGN
    image, first, top, left = tile_of_image(channels, height, width, BLOCK_C, BLOCK_Y, BLOCK_X)
    c, y, x = first + tl.arange(0, BLOCK_C), top + tl.arange(0, BLOCK_Y), left + tl.arange(0, BLOCK_X)
    coords += image.to(tl.int64) * count * 2
    patches += image.to(tl.int64) * patch_stride_batch
    coarser += image.to(tl.int64) * stride_batch
    seen = tl.full((BLOCK_Y, BLOCK_X), -1, tl.int64)  # where each pixel lies in `patches`
    for start in range(0, count, CHUNK):
        waiting = patches_on_tile(coords, start, count, rows_p, columns_p, top, left, BLOCK_Y, BLOCK_X, CHUNK)
        k = tl.min(waiting, 0)
        while k < count:
            corner = coords + k.to(tl.int64) * 2
            # What lies on the tile is near it: 32 bits, of which fewer registers are needed.
            i = (top - tl.load(corner).to(tl.int64)).to(tl.int32) + tl.arange(0, BLOCK_Y)
            j = (left - tl.load(corner + 1).to(tl.int64)).to(tl.int32) + tl.arange(0, BLOCK_X)
            here = ((i >= 0) & (i < rows_p))[:, None] & ((j >= 0) & (j < columns_p))[None, :]
            down_patch, along_patch = i.to(tl.int64) * patch_stride_y, j.to(tl.int64) * patch_stride_x
            offsets = k.to(tl.int64) * patch_stride_k + down_patch[:, None] + along_patch[None, :]
            seen = tl.where(here, offsets, seen)
            waiting = tl.where(waiting == k, count, waiting)
            k = tl.min(waiting, 0)
    inside = valid(c < channels, y < height, x < width)
    hidden = (seen >= 0)[None, :, :]
    upper, lower, down = halfway(y, low_height)
    before, after, right = halfway(x, low_width)
    down, right = down.to(ACCUMULATE) * 0.25, right.to(ACCUMULATE) * 0.25
    read = inside & (seen < 0)[None, :, :]
    doubled = tl.zeros((BLOCK_C, BLOCK_Y, BLOCK_X), ACCUMULATE)
    for row in tl.static_range(2):
        rows, of_row = upper, 1.0 - down
        if row == 1:
            rows, of_row = lower, down
        offsets = volume(c * stride_c, rows * stride_y, before * stride_x)
        line = tl.load(coarser + offsets, mask=read, other=0).to(ACCUMULATE) * (1.0 - right)[None, None, :]
        offsets = volume(c * stride_c, rows * stride_y, after * stride_x)
        line += tl.load(coarser + offsets, mask=read, other=0).to(ACCUMULATE) * right[None, None, :]
        doubled += line * of_row[None, :, None]
    values = tl.load(patches + (c * patch_stride_c)[:, None, None] + seen[None, :, :], mask=inside & hidden, other=0)
    size = height.to(tl.int64) * width
    out += image.to(tl.int64) * channels * size
    values = tl.where(hidden, values, doubled.to(out.dtype.element_ty))
    tl.store(out + volume(c * size, y * width, x), values, mask=inside)


def _compilation(dtype: torch.dtype, channels: int) -> Compilation:
    blocks = tile_blocks(channels)
    num_warps, pointer = blocks.pop("num_warps"), POINTERS[dtype]
    of_map = ("stride_batch", "stride_c", "stride_y")
    strides = (*of_map, *(f"patch_{name}" for name in (*of_map, "stride_k")))
    sizes = ("channels", "low_height", "low_width", "height", "columns", "count", "rows_p", "columns_p")
    pointers = {"coarser": pointer, "patches": pointer, "coords": "*i32", "out": pointer}
    return Compilation(
        f"upsample_with_patches: {pointer[1:]} C{channels}",
        upsample_kernel,
        pointers | dict.fromkeys((*sizes, *strides), "i32"),
        {"stride_x": 1, "patch_stride_x": 1, "ALIGN": 16, "ACCUMULATE": accumulation(dtype)} | blocks,
        aligned=strides,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )


COMPILATIONS = [_compilation(dtype, channels) for dtype in POINTERS for channels in (1, 3)]
