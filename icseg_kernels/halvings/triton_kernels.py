"""halvings as a Triton kernel: a program takes a tile of the image through several halvings in registers.

Means have the bits of the reference if nothing is contracted.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from icseg_kernels.compilation import Compilation
from icseg_kernels.halvings.reference import LEAST_VARIANCE

MOST_LEVELS = 6  # of one launch
_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


@triton.jit
def square_root(x):  # type: ignore[no-untyped-def]
    """Rounded to nearest."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def half_width(x, left, width):  # type: ignore[no-untyped-def]
    """[Y, X] sums of two rows -> [Y, X / 2] means of four pixels; the last column without a partner is its own."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    column = left + 2 * tl.arange(0, x.shape[1] // 2)
    return (even + tl.where((column + 1 < width)[None, :], odd, even)) * 0.25


@triton.jit
def halve(x, top, left, height, width):  # type: ignore[no-untyped-def]
    """[Y, X] -> [Y / 2, X / 2], a tile at (top, left) of an image; a last row without a partner is its own."""
    pairs = tl.permute(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), (0, 2, 1))
    even, odd = tl.split(pairs)
    row = top + 2 * tl.arange(0, x.shape[0] // 2)
    return half_width(even + tl.where((row + 1 < height)[:, None], odd, even), left, width)


@triton.jit
def store(pointer, number, values, top, left, height, width):  # type: ignore[no-untyped-def]
    """A tile at (top, left) of image `number` of [height, width], contiguous."""
    y, x = top + tl.arange(0, values.shape[0]), left + tl.arange(0, values.shape[1])
    pixels = number * height * width + (y * width)[:, None] + x[None, :]
    written = (y < height)[:, None] & (x < width)[None, :]
    tl.store(pointer + pixels, values.to(pointer.dtype.element_ty), mask=written)


@triton.jit
def pick(level: tl.constexpr, first, second, third, fourth, fifth, sixth):  # type: ignore[no-untyped-def]
    """One of six arguments."""
    found = first
    if level == 1:
        found = second
    if level == 2:
        found = third
    if level == 3:
        found = fourth
    if level == 4:
        found = fifth
    if level == 5:
        found = sixth
    return found


@triton.jit(do_not_specialize=["channels", "height", "width"])
def halvings_kernel(  # type: ignore[no-untyped-def]
    image,
    squares,
    mean_1,
    mean_2,
    mean_3,
    mean_4,
    mean_5,
    mean_6,
    spread_1,
    spread_2,
    spread_3,
    spread_4,
    spread_5,
    spread_6,
    wide_mean,
    wide_square,
    channels,
    height,
    width,
    stride_image,
    stride_channel,
    stride_y,
    stride_x,
    LEVELS: tl.constexpr,
    SPREADS: tl.constexpr,
    SQUARES: tl.constexpr,
    GIVEN: tl.constexpr,
    WIDE_MEAN: tl.constexpr,
    WIDE_SQUARE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    LEAST: tl.constexpr,
    SIDE: tl.constexpr,
):
    """`image` [N, C, h, w] to LEVELS means and SPREADS deviations, [N, C, ...] contiguous.

    SQUARES: whether the means of squares are wanted. GIVEN: whether they start from `squares`, of the strides of
    `image`. WIDE_MEAN, WIDE_SQUARE: whether the last are also written in ACCUMULATE, for a launch that goes on.
    """
    program = tl.program_id(0)
    tiles_y, tiles_x = tl.cdiv(height, SIDE), tl.cdiv(width, SIDE)
    left = (program % tiles_x).to(tl.int64) * SIDE
    program = (program // tiles_x).to(tl.int32)
    top = (program % tiles_y).to(tl.int64) * SIDE
    number = program // tiles_y
    start = (number // channels).to(tl.int64) * stride_image + (number % channels).to(tl.int64) * stride_channel
    number = number.to(tl.int64)
    height, width = height.to(tl.int64), width.to(tl.int64)

    row = top + 2 * tl.arange(0, SIDE // 2)
    column = left + tl.arange(0, SIDE)
    partner = tl.where(row + 1 < height, row + 1, row)
    inside = (row < height)[:, None] & (column < width)[None, :]
    even_row = start + (row * stride_y)[:, None] + (column * stride_x)[None, :]
    odd_row = start + (partner * stride_y)[:, None] + (column * stride_x)[None, :]
    even = tl.load(image + even_row, mask=inside, other=0).to(ACCUMULATE)
    odd = tl.load(image + odd_row, mask=inside, other=0).to(ACCUMULATE)
    mean = half_width(even + odd, left, width)
    square = mean
    if SQUARES:
        if GIVEN:
            even = tl.load(squares + even_row, mask=inside, other=0)
            odd = tl.load(squares + odd_row, mask=inside, other=0)
        else:
            even, odd = even * even, odd * odd
        square = half_width(even + odd, left, width)

    for level in tl.static_range(LEVELS):
        if level > 0:
            mean = halve(mean, top, left, height, width)
            if SQUARES:
                square = halve(square, top, left, height, width)
        top, left, height, width = top // 2, left // 2, (height + 1) // 2, (width + 1) // 2
        pointer = pick(level, mean_1, mean_2, mean_3, mean_4, mean_5, mean_6)
        store(pointer, number, mean, top, left, height, width)
        if level < SPREADS:
            variance = square - mean * mean
            least = tl.full(variance.shape, LEAST, ACCUMULATE)
            variance = tl.where(variance < least, least, variance)  # NaN stays
            spread = square_root(variance)
            pointer = pick(level, spread_1, spread_2, spread_3, spread_4, spread_5, spread_6)
            store(pointer, number, spread, top, left, height, width)
    if WIDE_MEAN:
        store(wide_mean, number, mean, top, left, height, width)
    if WIDE_SQUARE:
        store(wide_square, number, square, top, left, height, width)


def options(levels: int, spreads: int, more_spreads: bool, given: bool, wide_mean: bool) -> dict[str, Any]:
    """Of a launch: its halvings, its deviations, whether another has more of them, whether squares are given."""
    return {
        "LEVELS": levels,
        "SPREADS": spreads,
        "SQUARES": spreads > 0 or more_spreads,
        "GIVEN": given,
        "WIDE_MEAN": wide_mean,
        "WIDE_SQUARE": more_spreads,
        "SIDE": 64 if levels == MOST_LEVELS else 32,
        "num_warps": 8 if levels == MOST_LEVELS else 4,
    }


def accumulation(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of the dtype of sums."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _compilation(
    dtype: torch.dtype, levels: int, spreads: int, more_spreads: bool = False, given: bool = False
) -> Compilation:
    wide_mean = more_spreads and dtype != torch.float32
    constants = options(levels, spreads, more_spreads, given, wide_mean)
    source = "*fp32" if given else _POINTERS[dtype]
    pointers = {"image": source, "squares": "*fp32" if given else None}
    for kind, there in (("mean", levels), ("spread", spreads)):
        pointers |= {f"{kind}_{i}": _POINTERS[dtype] if i <= there else None for i in range(1, MOST_LEVELS + 1)}
    pointers |= {"wide_mean": "*fp32" if wide_mean else None, "wide_square": "*fp32" if more_spreads else None}
    strides = ("stride_image", "stride_channel", "stride_y")
    num_warps = constants.pop("num_warps")
    return Compilation(
        f"halvings: {_POINTERS[dtype][1:]} {levels} levels, {spreads} deviations{', the rest' if given else ''}",
        halvings_kernel,
        {name: kind for name, kind in pointers.items() if kind is not None}
        | dict.fromkeys(("channels", "height", "width", *strides), "i32"),
        {name: None for name, kind in pointers.items() if kind is None}
        | {"stride_x": 1, "ACCUMULATE": accumulation(dtype), "LEAST": LEAST_VARIANCE}
        | constants,
        aligned=strides,
        num_warps=num_warps,
        enable_fp_fusion=False,
    )


COMPILATIONS = [
    _compilation(dtype, *call) for dtype in _POINTERS for call in ((5, 0), (6, 6), (4, 4, True), (4, 2, False, True))
]
