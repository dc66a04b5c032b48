"""group_norm_film by Triton kernels. A group of up to 16384 values is read once; backward, of half as many."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from icseg_kernels import triton_launch
from icseg_kernels.numerics import accumulation_dtype

MOST_VALUES = 16384  # of a group, padded, in the registers of a program: of the gradient half
MOST_PARTS = 128  # of a larger group
_TILE = 4096  # values of a larger group, padded, at a time


class Tile(NamedTuple):
    """How a group is cut.

    channels, pixels: of a program, powers of two.
    warps:            of a program.
    parts:            0: the program has the whole group; or how many sums there are, of a group's moments (forward) or
                      of each channel (backward), a power of two.
    """

    channels: int
    pixels: int
    warps: int
    parts: int


def forward_tile(each: int, length: int) -> Tile:
    """For a group of `each` channels of `length` pixels."""
    tile = _tile(each, length, MOST_VALUES)
    if not tile.parts:
        return tile
    tiles = math.ceil(each / tile.channels) * math.ceil(length / tile.pixels)
    return tile._replace(parts=min(triton_launch.power_of_two(tiles), MOST_PARTS))


def backward_tile(each: int, length: int) -> Tile:
    tile = _tile(each, length, MOST_VALUES // 2)
    if not tile.parts:
        return tile
    # A program of the second launch adds up the parts of all channels of its group: few where these are many.
    parts = max(1, min(MOST_PARTS // 2, 512 // triton_launch.power_of_two(each)))
    return tile._replace(parts=min(triton_launch.power_of_two(math.ceil(length / tile.pixels)), parts))


def _tile(each: int, length: int, most: int) -> Tile:
    channels, pixels = triton_launch.power_of_two(each), triton_launch.power_of_two(length)
    if channels * pixels <= most:
        return Tile(channels, pixels, max(1, min(channels * pixels // 512, 16)), 0)
    pixels = min(pixels, _TILE)
    return Tile(min(channels, _TILE // pixels), pixels, 8, 1)


def unsupported(x: Tensor) -> list[str]:
    """Why the kernels cannot normalise `x`."""
    return triton_launch.unsupported_device("x", x) + triton_launch.unsupported_dtype("x", x)


def group_norm_film(
    x: Tensor, groups: int, gain: Tensor | None, bias: Tensor | None, activation: str | None, eps: float
) -> tuple[Tensor, Tensor]:
    """[N, C, *spatial] -> the same, contiguous, and the groups' means and reciprocal standard deviations, [2, N, G]."""
    from icseg_kernels.group_norm_film import triton_kernels as kernels

    samples, channels, length = _sizes(x, groups)
    wide = accumulation_dtype(x.dtype)
    out, stats = x.new_empty(x.shape), x.new_empty((2, samples, groups), dtype=wide)
    films = _films(x, gain, bias)
    if x.numel() == 0:
        return out, stats.fill_(math.nan)
    each, rows = channels // groups, samples * groups
    flat = x.reshape(samples, channels, length)  # a copy where pixels are not evenly spaced
    tile = forward_tile(each, length)
    options: dict[str, Any] = {
        "ACC": triton_launch.triton_dtype(wide),
        "BLOCK_C": tile.channels,
        "BLOCK_L": tile.pixels,
    }
    strides = (*flat.stride(), *films[2:])
    gelu = activation == "gelu"
    if not tile.parts:
        triton_launch.launch(
            kernels.forward_kernel, (rows,), x.device, flat, *films[:2], out, stats, *strides, groups, each, length,
            eps, GELU=gelu, **options, num_warps=tile.warps,
        )  # fmt: skip
        return out, stats
    options["PARTS"] = tile.parts
    partial = stats.new_empty((3, rows, tile.parts))
    triton_launch.launch(
        kernels.moments_kernel, (rows * tile.parts,), x.device, flat, partial, *flat.stride(), groups, each, length,
        **options, num_warps=tile.warps,
    )  # fmt: skip
    tiles = math.ceil(each / tile.channels) * math.ceil(length / tile.pixels)
    triton_launch.launch(
        kernels.apply_kernel, (rows * tiles,), x.device, flat, *films[:2], out, stats, partial, *strides, rows, groups,
        each, length, eps, GELU=gelu, **options, num_warps=tile.warps,
    )  # fmt: skip
    return out, stats


def group_norm_film_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    groups: int,
    gain: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of x, and of gain and bias, a sample at a time: [2, N, C]."""
    from icseg_kernels.group_norm_film import triton_kernels as kernels

    samples, channels, length = _sizes(x, groups)
    if grad.shape != x.shape or stats.shape != (2, samples, groups) or not grad.device == stats.device == x.device:
        raise ValueError(f"grad and stats must be those of x {list(x.shape)}, got {list(grad.shape)}, {stats.shape}")
    wide = accumulation_dtype(x.dtype)
    grad_x, sums = x.new_empty(x.shape), x.new_empty((2, samples, channels), dtype=wide)
    films = _films(x, gain, bias)
    if x.numel() == 0:
        return grad_x, sums.zero_()
    each, rows = channels // groups, samples * groups
    flat, outer = (t.reshape(samples, channels, length) for t in (x, grad))
    saved = stats.to(wide).contiguous()
    tile = backward_tile(each, length)
    strides = (*outer.stride(), *flat.stride(), *films[2:])
    options: dict[str, Any] = {
        "GELU": activation == "gelu",
        "ACC": triton_launch.triton_dtype(wide),
        "BLOCK_C": tile.channels,
        "BLOCK_L": tile.pixels,
        "num_warps": tile.warps,
    }
    given = (outer, flat, saved, *films[:2])
    if not tile.parts:
        triton_launch.launch(
            kernels.backward_kernel, (rows,), x.device, *given, grad_x, sums, *strides, groups, each, length, **options
        )
        return grad_x, sums
    options["PARTS"] = tile.parts
    partial = sums.new_empty((*sums.shape, tile.parts))
    down, across = math.ceil(each / tile.channels), math.ceil(length / tile.pixels)
    triton_launch.launch(
        kernels.sums_kernel, (rows * down * tile.parts,), x.device, *given, partial, *strides, rows, groups, each,
        length, **options,
    )  # fmt: skip
    triton_launch.launch(
        kernels.backward_apply_kernel, (rows * down * across,), x.device, *given, grad_x, sums, partial, *strides, rows,
        groups, each, length, BLOCK_M=summed_channels(each, tile), **options,
    )  # fmt: skip
    return grad_x, sums


def summed_channels(each: int, tile: Tile) -> int:
    """Channels whose parts a program adds up at a time."""
    return min(triton_launch.power_of_two(each), max(1, 1024 // tile.parts))


def _sizes(x: Tensor, groups: int) -> tuple[int, int, int]:
    """N, C and the number of pixels."""
    samples, channels, *spatial = x.shape
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must be at least 1 and divide the {channels} channels of x, got {groups}")
    return samples, channels, math.prod(spatial)


def _films(
    x: Tensor, gain: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, int, int, int, int]:
    """Gain, bias, and how far apart the samples and channels of each are."""
    strides = []
    for name, values in (("gain", gain), ("bias", bias)):
        if values is None:
            strides += [0, 0]
            continue
        if values.device != x.device or values.shape not in (x.shape[1:2], x.shape[:2]):
            raise ValueError(f"{name} must be on {x.device}, [C] or [N, C] of x {list(x.shape)}, got {values.shape}")
        strides += [0 if values.ndim == 1 else values.stride(0), values.stride(-1)]
    return gain, bias, strides[0], strides[1], strides[2], strides[3]
