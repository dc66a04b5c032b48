"""halvings by a Triton kernel, up to six in a launch, without gradients; means have the bits of the reference."""

from __future__ import annotations

import math

from torch import Tensor

from icseg_kernels import triton_launch
from icseg_kernels.backend import without_gradients
from icseg_kernels.halvings.reference import LEAST_VARIANCE
from icseg_kernels.numerics import accumulation_dtype


def unsupported(image: Tensor) -> list[str]:
    """Why the kernel cannot halve `image`."""
    return [
        *triton_launch.unsupported_device("image", image),
        *triton_launch.unsupported_dtype("image", image),
        *without_gradients("image", (image,)),
    ]


def halvings(image: Tensor, count: int, deviations: int) -> list[Tensor]:
    """As `reference.halvings`. An image of any strides."""
    from icseg_kernels.halvings import triton_kernels as kernels

    if image.ndim != 4 or not 0 <= deviations <= count:
        raise ValueError(
            f"image must be [N, C, h, w] and deviations from 0 to count, got {list(image.shape)}, {deviations}, {count}"
        )
    means: list[Tensor] = []
    spreads: list[Tensor] = []
    sums = accumulation_dtype(image.dtype)
    height, width = image.shape[2:]
    for level in range(count):
        height, width = (height + 1) // 2, (width + 1) // 2
        means.append(image.new_empty((*image.shape[:2], height, width)))
        if level < deviations:
            spreads.append(image.new_empty(means[-1].shape))
    per_launch = math.ceil(count / max(math.ceil(count / kernels.MOST_LEVELS), 1))
    square: Tensor | None = None
    for first in range(0, count, max(per_launch, 1)):
        end = min(first + per_launch, count)
        more = deviations > end
        here = max(0, min(deviations, end) - first)
        wide_mean = wide_square = None  # where another launch goes on from them
        if end < count and image.dtype != sums:
            wide_mean = means[end - 1].new_empty(means[end - 1].shape, dtype=sums)
        if more:
            wide_square = means[end - 1].new_empty(means[end - 1].shape, dtype=sums)
        images, channels, height, width = image.shape
        options = kernels.options(end - first, here, more, square is not None, wide_mean is not None)
        side = options["SIDE"]
        absent = [None] * kernels.MOST_LEVELS
        triton_launch.launch(
            kernels.halvings_kernel,
            (images * channels * math.ceil(height / side) * math.ceil(width / side),),
            image.device,
            image,
            square,
            *[*means[first:end], *absent][: kernels.MOST_LEVELS],
            *[*spreads[first : first + here], *absent][: kernels.MOST_LEVELS],
            wide_mean,
            wide_square,
            channels,
            height,
            width,
            *image.stride(),
            ACCUMULATE=kernels.accumulation(image.dtype),
            LEAST=LEAST_VARIANCE,
            enable_fp_fusion=False,
            **options,
        )
        image, square = means[end - 1] if wide_mean is None else wide_mean, wide_square
    return means + spreads
