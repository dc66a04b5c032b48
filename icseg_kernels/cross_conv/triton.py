"""The tail of cross_conv2d by Triton kernels: one launch forward, one backward."""

from __future__ import annotations

import math

from torch import Tensor

from icseg_kernels import triton_launch
from icseg_kernels.numerics import accumulation_dtype

BLOCKS = ((256, 2), (1024, 4))  # elements of an image a program has, its warps
_ENOUGH = 528  # programs: four for each multiprocessor of an H100
_ACTIVATIONS = {None: 0, "relu": 1, "leaky_relu": 2, "gelu": 3}


def unsupported(x: Tensor) -> list[str]:
    """Why the kernels cannot serve images such as `x`."""
    return triton_launch.unsupported_device("x", x) + triton_launch.unsupported_dtype("x", x)


def tail(
    zx: Tensor, zy: Tensor, pairs: bool, mean: bool, activation: str | None, slope: float, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Pairs [B, Sx, Sy, Co, Ho, Wo] and their mean [B, Sx, Co, Ho, Wo]; without elements where not wanted.

    overwrite: pairs may lie in the memory of zy, which is lost.
    """
    from icseg_kernels.cross_conv.triton_kernels import tail_kernel

    image, batch, xs, ys, elements = _sizes(zx, zy)
    if mean and ys == 0:
        raise ValueError("zy must hold at least one image to take the mean of, got Sy = 0")
    if not pairs:
        all_pairs = zx.new_empty(0)
    elif overwrite and xs == 1 and zy.is_contiguous():  # a program stores an element where it has loaded it
        all_pairs = zy.view(batch, xs, ys, *image)
    else:
        all_pairs = zx.new_empty((batch, xs, ys, *image))
    means = zx.new_empty(zx.shape if mean else 0)
    x, y = (z.reshape(*z.shape[:2], elements) for z in (zx, zy))  # a copy where elements are not evenly spaced
    block, warps = _block(batch * xs, elements)
    blocks = math.ceil(elements / block)
    # A program that has all images of y reads its element of x once; fewer are for more programs.
    runs = 1 if mean else max(1, min(ys, math.ceil(_ENOUGH / max(blocks * batch * xs, 1))))
    run = math.ceil(ys / runs)
    runs = math.ceil(ys / run) if run else 0
    triton_launch.launch(
        tail_kernel,
        (blocks * runs * batch * xs,),
        zx.device,
        x,
        y,
        all_pairs if pairs else None,
        means if mean else None,
        *x.stride(),
        *y.stride(),
        blocks,
        runs,
        run,
        xs,
        ys,
        elements,
        slope,
        ACTIVATION=_ACTIVATIONS[activation],
        ACC=triton_launch.triton_dtype(accumulation_dtype(zx.dtype)),
        BLOCK=block,
        num_warps=warps,
    )
    return all_pairs, means


def tail_backward(
    zx: Tensor,
    zy: Tensor,
    grad_pairs: Tensor | None,
    grad_mean: Tensor | None,
    activation: str | None,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of zx and zy; None: nothing depends on it."""
    from icseg_kernels.cross_conv.triton_kernels import tail_backward_kernel

    image, batch, xs, ys, elements = _sizes(zx, zy)
    for name, grad, shape in (("pairs", grad_pairs, (batch, xs, ys, *image)), ("mean", grad_mean, zx.shape)):
        if grad is not None and (grad.shape != shape or grad.device != zx.device):
            raise ValueError(f"the gradient of {name} must have shape {list(shape)}, got {list(grad.shape)}")
    grad_zx, grad_zy = zx.new_empty(zx.shape), zy.new_empty(zy.shape)
    x, y = (z.reshape(*z.shape[:2], elements) for z in (zx, zy))
    one = xs == 1
    images = batch if one else batch * (xs + ys)
    block, warps = _block(images, elements)
    blocks = math.ceil(elements / block)
    triton_launch.launch(
        tail_backward_kernel,
        (blocks * images,),
        zx.device,
        x,
        y,
        None if grad_pairs is None else grad_pairs.contiguous(),
        None if grad_mean is None else grad_mean.contiguous(),
        grad_zx,
        grad_zy,
        *x.stride(),
        *y.stride(),
        blocks,
        batch,
        xs,
        ys,
        elements,
        slope,
        ACTIVATION=_ACTIVATIONS[activation],
        ACC=triton_launch.triton_dtype(accumulation_dtype(zx.dtype)),
        BLOCK=block,
        ONE=one,
        num_warps=warps,
    )
    return grad_zx, grad_zy


def _block(images: int, elements: int) -> tuple[int, int]:
    """Elements and warps of a program: few, where more would leave multiprocessors idle."""
    return BLOCKS[0] if images * elements < _ENOUGH * BLOCKS[1][0] else BLOCKS[1]


def _sizes(zx: Tensor, zy: Tensor) -> tuple[tuple[int, ...], int, int, int, int]:
    """Shape of an image; B, Sx, Sy; elements of an image."""
    shape, other = zx.shape, zy.shape
    if (
        (len(shape), len(other)) != (5, 5)
        or (other[0], other[2:]) != (shape[0], shape[2:])
        or (zy.dtype, zy.device) != (zx.dtype, zx.device)
    ):
        raise ValueError(f"zx and zy must have shapes [B, Sx, C, H, W], [B, Sy, C, H, W], got {shape}, {other}")
    return shape[2:], shape[0], shape[1], other[1], math.prod(shape[2:])
