"""Triton kernels of group_norm_film.

A tile is BLOCK_C channels by BLOCK_L pixels of a group, which has `each` channels of `length` pixels. Where a tile
holds a whole group, one launch reads it once: its statistics come from registers. Larger groups take two launches, the
first of which leaves sums of parts of a group for the programs of the second to add up, all in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from icseg_kernels.arithmetic_triton_kernels import divide, gelu, gelu_slope
from icseg_kernels.compilation import Compilation
from icseg_kernels.group_norm_film.triton import Tile, backward_tile, forward_tile, summed_channels

_UNSPECIALIZED = ["groups", "gain_sample", "gain_channel", "bias_sample", "bias_channel"]


@triton.jit
def _values(pointer, sample, channels, pixels, mask, sample_stride, channel_stride, pixel_stride, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """A tile of a tensor, 0 where not `mask`."""
    rows = sample * sample_stride + channels.to(tl.int64) * channel_stride
    return tl.load(pointer + rows[:, None] + (pixels.to(tl.int64) * pixel_stride)[None, :], mask=mask, other=0).to(ACC)


@triton.jit
def _film(pointer, sample, channels, mask, sample_stride, channel_stride, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """Gain or bias of channels."""
    offsets = sample * sample_stride + channels.to(tl.int64) * channel_stride
    return tl.load(pointer + offsets, mask=mask, other=0).to(ACC)


@triton.jit
def _reciprocal_deviation(squares, count, eps, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    variance = divide(squares, count) + eps
    one = tl.full((), 1, ACC)
    if variance.dtype == tl.float64:
        return one / tl.sqrt(variance)
    else:
        return divide(one, tl.math.sqrt_rn(variance))


@triton.jit
def _moments(x, mask, count):  # type: ignore[no-untyped-def]
    """The mean as a sum of two, the second of which the rounding of the first leaves; squares of deviations, summed."""
    mean = divide(tl.sum(x), count)
    deviation = tl.where(mask, x - mean, 0.0)
    rest = divide(tl.sum(deviation), count)
    return mean, rest, tl.sum(deviation * deviation) - count * rest * rest


@triton.jit
def _modulated(  # type: ignore[no-untyped-def]
    normed, gain_pointer, bias_pointer, sample, channels, mask,
    gain_sample, gain_channel, bias_sample, bias_channel, ACC: tl.constexpr,
):  # fmt: skip
    v = normed
    if gain_pointer is not None:
        v = v * _film(gain_pointer, sample, channels, mask, gain_sample, gain_channel, ACC)[:, None]
    if bias_pointer is not None:
        v = v + _film(bias_pointer, sample, channels, mask, bias_sample, bias_channel, ACC)[:, None]
    return v


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def forward_kernel(  # type: ignore[no-untyped-def]
    x_pointer, gain_pointer, bias_pointer, out_pointer, stats_pointer,
    x_sample, x_channel, x_pixel, gain_sample, gain_channel, bias_sample, bias_channel, groups, each, length, eps,
    GELU: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One tile a group, on a grid of (samples * groups,)."""
    program = tl.program_id(0)
    sample = (program // groups).to(tl.int64)
    inner, pixels = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_L)
    channels = (program % groups) * each + inner
    rows = inner < each
    mask = rows[:, None] & (pixels < length)[None, :]
    x = _values(x_pointer, sample, channels, pixels, mask, x_sample, x_channel, x_pixel, ACC)
    count = tl.full((), 1, ACC) * each * length
    mean, rest, squares = _moments(x, mask, count)
    rstd = _reciprocal_deviation(squares, count, eps, ACC)
    tl.store(stats_pointer + program, mean + rest)
    tl.store(stats_pointer + tl.num_programs(0) + program, rstd)
    normed = ((x - mean) - rest) * rstd
    v = _modulated(
        normed, gain_pointer, bias_pointer, sample, channels, rows,
        gain_sample, gain_channel, bias_sample, bias_channel, ACC,
    )  # fmt: skip
    if GELU:
        v = gelu(v)
    start = program.to(tl.int64) * each * length
    offsets = (start + inner.to(tl.int64) * length)[:, None] + pixels[None, :]
    tl.store(out_pointer + offsets, v.to(out_pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["groups"])
def moments_kernel(  # type: ignore[no-untyped-def]
    x_pointer, partial_pointer, x_sample, x_channel, x_pixel, groups, each, length,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Count, mean and squared deviations of each part of a group, [3, samples * groups, PARTS], one a program."""
    program = tl.program_id(0)
    part = program % PARTS
    group = program // PARTS
    sample = (group // groups).to(tl.int64)
    first = (group % groups) * each
    across = tl.cdiv(length, BLOCK_L)
    n, mean, squares = tl.full((), 0, ACC), tl.full((), 0, ACC), tl.full((), 0, ACC)
    for tile in range(part, across * tl.cdiv(each, BLOCK_C), PARTS):
        inner = (tile // across) * BLOCK_C + tl.arange(0, BLOCK_C)
        pixels = (tile % across) * BLOCK_L + tl.arange(0, BLOCK_L)
        mask = (inner < each)[:, None] & (pixels < length)[None, :]
        x = _values(x_pointer, sample, first + inner, pixels, mask, x_sample, x_channel, x_pixel, ACC)
        here = tl.full((), 1, ACC) * tl.minimum(BLOCK_C, each - (tile // across) * BLOCK_C)
        here = here * tl.minimum(BLOCK_L, length - (tile % across) * BLOCK_L)
        base, rest, more = _moments(x, mask, here)
        # Chan, Golub and LeVeque: the moments of a union.
        total = n + here
        delta = (base - mean) + rest
        mean += delta * divide(here, total)
        squares += more + delta * delta * n * divide(here, total)
        n = total
    size = tl.num_programs(0)
    tl.store(partial_pointer + program, n)
    tl.store(partial_pointer + size + program, mean)
    tl.store(partial_pointer + 2 * size + program, squares)


@triton.jit(do_not_specialize=[*_UNSPECIALIZED, "rows"])
def apply_kernel(  # type: ignore[no-untyped-def]
    x_pointer, gain_pointer, bias_pointer, out_pointer, stats_pointer, partial_pointer,
    x_sample, x_channel, x_pixel, gain_sample, gain_channel, bias_sample, bias_channel, rows, groups, each, length, eps,
    GELU: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What `forward_kernel` does, of moments of parts; a program a tile of one of `rows` groups."""
    across = tl.cdiv(length, BLOCK_L)
    tiles = across * tl.cdiv(each, BLOCK_C)
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles
    sample = (group // groups).to(tl.int64)

    part = partial_pointer + group * PARTS + tl.arange(0, PARTS)
    n = tl.load(part)
    means = tl.load(part + rows * PARTS)
    base = tl.load(partial_pointer + rows * PARTS + group * PARTS)
    count = tl.sum(n)
    mean = base + divide(tl.sum(n * (means - base)), count)
    squares = tl.sum(tl.load(part + 2 * rows * PARTS) + n * (means - mean) * (means - mean))
    rstd = _reciprocal_deviation(squares, count, eps, ACC)
    if tile == 0:
        tl.store(stats_pointer + group, mean)
        tl.store(stats_pointer + rows + group, rstd)

    inner = (tile // across) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixels = (tile % across) * BLOCK_L + tl.arange(0, BLOCK_L)
    channels = (group % groups) * each + inner
    mask = (inner < each)[:, None] & (pixels < length)[None, :]
    x = _values(x_pointer, sample, channels, pixels, mask, x_sample, x_channel, x_pixel, ACC)
    v = _modulated(
        (x - mean) * rstd, gain_pointer, bias_pointer, sample, channels, inner < each,
        gain_sample, gain_channel, bias_sample, bias_channel, ACC,
    )  # fmt: skip
    if GELU:
        v = gelu(v)
    start = group.to(tl.int64) * each * length
    offsets = (start + inner.to(tl.int64) * length)[:, None] + pixels[None, :]
    tl.store(out_pointer + offsets, v.to(out_pointer.dtype.element_ty), mask=mask)


@triton.jit
def _inner_gradient(  # type: ignore[no-untyped-def]
    grad_pointer, x_pointer, gain_pointer, bias_pointer, mean, rstd, sample, channels, pixels, rows, mask,
    grad_sample, grad_channel, grad_pixel, x_sample, x_channel, x_pixel,
    gain_sample, gain_channel, bias_sample, bias_channel, GELU: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of what the activation is given, 0 where not `mask`, and the normalised values."""
    x = _values(x_pointer, sample, channels, pixels, mask, x_sample, x_channel, x_pixel, ACC)
    grad = _values(grad_pointer, sample, channels, pixels, mask, grad_sample, grad_channel, grad_pixel, ACC)
    normed = (x - mean) * rstd
    if GELU:
        v = _modulated(
            normed, gain_pointer, bias_pointer, sample, channels, rows,
            gain_sample, gain_channel, bias_sample, bias_channel, ACC,
        )  # fmt: skip
        grad = grad * gelu_slope(v)
    return tl.where(mask, grad, 0.0), tl.where(mask, normed, 0.0)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def backward_kernel(  # type: ignore[no-untyped-def]
    grad_pointer, x_pointer, stats_pointer, gain_pointer, bias_pointer, grad_x_pointer, sums_pointer,
    grad_sample, grad_channel, grad_pixel, x_sample, x_channel, x_pixel,
    gain_sample, gain_channel, bias_sample, bias_channel, groups, each, length,
    GELU: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """One tile a group, on a grid of (samples * groups,)."""
    program = tl.program_id(0)
    size = tl.num_programs(0)
    sample = (program // groups).to(tl.int64)
    inner, pixels = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_L)
    channels = (program % groups) * each + inner
    rows = inner < each
    mask = rows[:, None] & (pixels < length)[None, :]
    rstd = tl.load(stats_pointer + size + program)
    grad, normed = _inner_gradient(
        grad_pointer, x_pointer, gain_pointer, bias_pointer, tl.load(stats_pointer + program), rstd,
        sample, channels, pixels, rows, mask, grad_sample, grad_channel, grad_pixel, x_sample, x_channel, x_pixel,
        gain_sample, gain_channel, bias_sample, bias_channel, GELU, ACC,
    )  # fmt: skip
    tilts, levels = tl.sum(grad * normed, axis=1), tl.sum(grad, axis=1)
    sums = sums_pointer + program.to(tl.int64) * each + inner
    tl.store(sums, tilts, mask=rows)
    tl.store(sums + size.to(tl.int64) * each, levels, mask=rows)
    if gain_pointer is not None:
        gain = _film(gain_pointer, sample, channels, rows, gain_sample, gain_channel, ACC)
        tilts, levels, grad = tilts * gain, levels * gain, grad * gain[:, None]
    count = tl.full((), 1, ACC) * each * length
    level, tilt = divide(tl.sum(levels), count), divide(tl.sum(tilts), count)
    found = rstd * (grad - level - normed * tilt)
    start = program.to(tl.int64) * each * length
    offsets = (start + inner.to(tl.int64) * length)[:, None] + pixels[None, :]
    tl.store(grad_x_pointer + offsets, found.to(grad_x_pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*_UNSPECIALIZED, "rows"])
def sums_kernel(  # type: ignore[no-untyped-def]
    grad_pointer, x_pointer, stats_pointer, gain_pointer, bias_pointer, partial_pointer,
    grad_sample, grad_channel, grad_pixel, x_sample, x_channel, x_pixel,
    gain_sample, gain_channel, bias_sample, bias_channel, rows, groups, each, length,
    GELU: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The two sums over each part of the pixels of BLOCK_C channels: [2, samples * channels, PARTS]."""
    part = tl.program_id(0) % PARTS
    block = tl.program_id(0) // PARTS
    down = tl.cdiv(each, BLOCK_C)
    group = block // down
    sample = (group // groups).to(tl.int64)
    inner = (block % down) * BLOCK_C + tl.arange(0, BLOCK_C)
    channels = (group % groups) * each + inner
    mean, rstd = tl.load(stats_pointer + group), tl.load(stats_pointer + rows + group)
    tilts, levels = tl.zeros((BLOCK_C, BLOCK_L), ACC), tl.zeros((BLOCK_C, BLOCK_L), ACC)
    for start in range(part * BLOCK_L, length, PARTS * BLOCK_L):
        pixels = start + tl.arange(0, BLOCK_L)
        grad, normed = _inner_gradient(
            grad_pointer, x_pointer, gain_pointer, bias_pointer, mean, rstd, sample, channels, pixels, inner < each,
            (inner < each)[:, None] & (pixels < length)[None, :],
            grad_sample, grad_channel, grad_pixel, x_sample, x_channel, x_pixel,
            gain_sample, gain_channel, bias_sample, bias_channel, GELU, ACC,
        )  # fmt: skip
        tilts += grad * normed
        levels += grad
    row = group.to(tl.int64) * each + inner
    partial = partial_pointer + row * PARTS + part
    tl.store(partial, tl.sum(tilts, axis=1), mask=inner < each)
    tl.store(partial + rows.to(tl.int64) * each * PARTS, tl.sum(levels, axis=1), mask=inner < each)


@triton.jit(do_not_specialize=[*_UNSPECIALIZED, "rows"])
def backward_apply_kernel(  # type: ignore[no-untyped-def]
    grad_pointer, x_pointer, stats_pointer, gain_pointer, bias_pointer, grad_x_pointer, sums_pointer, partial_pointer,
    grad_sample, grad_channel, grad_pixel, x_sample, x_channel, x_pixel,
    gain_sample, gain_channel, bias_sample, bias_channel, rows, groups, each, length,
    GELU: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What `backward_kernel` does, of sums of parts, BLOCK_M channels of them at a time; a program a tile."""
    across = tl.cdiv(length, BLOCK_L)
    tiles = across * tl.cdiv(each, BLOCK_C)
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles
    sample = (group // groups).to(tl.int64)
    size = rows.to(tl.int64) * each

    level, tilt = tl.full((), 0, ACC), tl.full((), 0, ACC)
    for start in range(0, each, BLOCK_M):
        summed = start + tl.arange(0, BLOCK_M)
        row = group.to(tl.int64) * each + summed
        partial = partial_pointer + (row * PARTS)[:, None] + tl.arange(0, PARTS)[None, :]
        tilts = tl.sum(tl.load(partial, mask=(summed < each)[:, None], other=0), axis=1)
        levels = tl.sum(tl.load(partial + size * PARTS, mask=(summed < each)[:, None], other=0), axis=1)
        if tile == 0:
            tl.store(sums_pointer + row, tilts, mask=summed < each)
            tl.store(sums_pointer + size + row, levels, mask=summed < each)
        if gain_pointer is not None:
            channels = (group % groups) * each + summed
            gain = _film(gain_pointer, sample, channels, summed < each, gain_sample, gain_channel, ACC)
            tilts, levels = tilts * gain, levels * gain
        tilt += tl.sum(tilts)
        level += tl.sum(levels)
    count = tl.full((), 1, ACC) * each * length
    level, tilt = divide(level, count), divide(tilt, count)

    inner = (tile // across) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixels = (tile % across) * BLOCK_L + tl.arange(0, BLOCK_L)
    channels = (group % groups) * each + inner
    mask = (inner < each)[:, None] & (pixels < length)[None, :]
    rstd = tl.load(stats_pointer + rows + group)
    grad, normed = _inner_gradient(
        grad_pointer, x_pointer, gain_pointer, bias_pointer, tl.load(stats_pointer + group), rstd,
        sample, channels, pixels, inner < each, mask,
        grad_sample, grad_channel, grad_pixel, x_sample, x_channel, x_pixel,
        gain_sample, gain_channel, bias_sample, bias_channel, GELU, ACC,
    )  # fmt: skip
    if gain_pointer is not None:
        grad = grad * _film(gain_pointer, sample, channels, inner < each, gain_sample, gain_channel, ACC)[:, None]
    found = rstd * (grad - level - normed * tilt)
    start = group.to(tl.int64) * each * length
    offsets = (start + inner.to(tl.int64) * length)[:, None] + pixels[None, :]
    tl.store(grad_x_pointer + offsets, found.to(grad_x_pointer.dtype.element_ty), mask=mask)


_POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


def _compiled(
    kernel: Any, dtype: str, each: int, length: int, tile: Tile, *, film: bool = True, **more: Any
) -> Compilation:
    """Of contiguous tensors, with GELU; film: with gain and bias."""
    names = kernel.arg_names
    wide = ("stats_pointer", "sums_pointer", "partial_pointer")
    signature = {name: "i32" for name in names if name.islower() and not name.endswith("pointer")}
    signature |= {name: _POINTERS["float32" if name in wide else dtype] for name in names if name.endswith("pointer")}
    signature |= {"eps": "fp32"} if "eps" in names else {}
    constants = {"GELU": True, "ACC": tl.float32, "BLOCK_C": tile.channels, "BLOCK_L": tile.pixels, "PARTS": tile.parts}
    constants |= {"x_pixel": 1, "grad_pixel": 1, **more}
    if not film:
        constants |= {"gain_pointer": None, "bias_pointer": None}
    aligned = [name for name in ("x_sample", "grad_sample") if each * length % 16 == 0]
    aligned += [name for name in ("x_channel", "grad_channel", "length") if length % 16 == 0]
    what = f"{kernel.__name__.removesuffix('_kernel')} {dtype} {each} x {length}"
    return Compilation(
        f"group_norm_film: {what}{'' if film else ' plain'}",
        kernel,
        {name: signature[name] for name in names if name in signature and name not in constants},
        {name: value for name, value in constants.items() if name in names},
        aligned=tuple(name for name in aligned if name in names),
        num_warps=tile.warps,
    )


def _compilations() -> Iterator[Compilation]:
    for dtype, length in itertools.product(_POINTERS, (64, 2048, 65536)):
        tile = forward_tile(8, length)
        for kernel in (moments_kernel, apply_kernel) if tile.parts else (forward_kernel,):
            yield _compiled(kernel, dtype, 8, length, tile)
    for dtype, length in itertools.product(_POINTERS, (64, 1024, 65536)):
        tile = backward_tile(8, length)
        if not tile.parts:
            yield _compiled(backward_kernel, dtype, 8, length, tile)
        else:
            yield _compiled(sums_kernel, dtype, 8, length, tile)
            yield _compiled(backward_apply_kernel, dtype, 8, length, tile, BLOCK_M=summed_channels(8, tile))
    for each, length, film in ((12, 49, True), (8, 64, False)):
        yield _compiled(forward_kernel, "float32", each, length, forward_tile(each, length), film=film)
        yield _compiled(backward_kernel, "float32", each, length, backward_tile(each, length), film=film)


COMPILATIONS = list(_compilations())
