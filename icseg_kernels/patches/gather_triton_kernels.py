"""Copies of gather_patches as Triton kernels, and what the kernels of the other patch ops share with them.

A copy is made of integers of the size of an element. Its program owns a block of channels, rows and columns of one
patch. In the adjoint a program owns a tile of an image and adds what lies on it in the order of K, so that nothing is
added by two programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from icseg_kernels.compilation import Compilation

CHUNK = 128  # patches that are tested against a tile at once


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
    return {"BLOCK_C": c, "BLOCK_Y": 16 // c, "BLOCK_X": 32, "CHUNK": CHUNK, "num_warps": 4}


def tile_programs(images: int, channels: int, height: int, width: int, blocks: dict[str, int]) -> int:
    """How many programs own tiles of `images` images; also of those without channels."""
    y, x = triton.cdiv(height, blocks["BLOCK_Y"]), triton.cdiv(width, blocks["BLOCK_X"])
    return images * max(triton.cdiv(channels, blocks["BLOCK_C"]), 1) * y * x


POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
SIZES = ("inner", "channels", "height", "width", "count", "units")
STRIDES = ("stride_outer", "stride_inner", "stride_c", "stride_y")
PATCHES = ((3, 16), (64, 8))  # channels and side of those that are compiled


def _copies() -> list[Compilation]:
    found = []
    for itemsize, kind in ((1, "i8"), (2, "i16"), (4, "i32")):
        for channels, side in PATCHES:
            constants = {"stride_x": 1, "ALIGN": alignment(side)} | patch_blocks(channels, side)
            num_warps = constants.pop("num_warps")
            found.append(
                Compilation(
                    f"gather_patches: copy {8 * itemsize} bit C{channels} p{side}",
                    copy_kernel,
                    {"source": f"*{kind}", "coords": "*i32", "patches": f"*{kind}"}
                    | dict.fromkeys(SIZES + STRIDES, "i32"),
                    constants,
                    aligned=STRIDES,
                    num_warps=num_warps,
                )
            )
    return found


def _adjoints() -> list[Compilation]:
    found = []
    strides = (*STRIDES, "stride_k")
    for dtype, pointer in POINTERS.items():
        for channels, _side in PATCHES:
            blocks = tile_blocks(channels)
            num_warps = blocks.pop("num_warps")
            found.append(
                Compilation(
                    f"gather_patches: copy backward {pointer[1:]} C{channels}",
                    copy_backward_kernel,
                    {"grad": pointer, "coords": "*i32", "images": pointer}
                    | dict.fromkeys(("inner", "channels", "height", "columns", "count", "patch", *strides), "i32"),
                    {"stride_x": 1, "ALIGN": 16, "ACCUMULATE": accumulation(dtype)} | blocks,
                    aligned=strides,
                    num_warps=num_warps,
                    enable_fp_fusion=False,
                )
            )
    return found


COMPILATIONS = _copies() + _adjoints()
