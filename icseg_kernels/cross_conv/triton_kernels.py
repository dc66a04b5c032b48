"""Triton kernels of the tail of cross_conv2d: every z[i, j] = zx[i] + zy[j] exists in registers alone.

ACTIVATION: 0 none, 1 relu, 2 leaky_relu, 3 gelu.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import triton
import triton.language as tl

from icseg_kernels.arithmetic_triton_kernels import divide, gelu, gelu_slope
from icseg_kernels.compilation import Compilation
from icseg_kernels.cross_conv.triton import BLOCKS


@triton.jit
def _activated(z, slope, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == 1:
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == 2:
        return tl.where(z > 0, z, z * slope)
    elif ACTIVATION == 3:
        return gelu(z)
    else:
        return z


@triton.jit
def _pulled(grad, z, slope, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of z, for that of the activated."""
    if ACTIVATION == 1:
        return tl.where(z <= 0, 0.0, grad)
    elif ACTIVATION == 2:
        return tl.where(z > 0, grad, grad * slope)
    elif ACTIVATION == 3:
        return grad * gelu_slope(z)
    else:
        return grad


@triton.jit(do_not_specialize=["blocks", "runs", "run", "xs", "ys"])
def tail_kernel(  # type: ignore[no-untyped-def]
    zx_pointer, zy_pointer, pairs_pointer, mean_pointer, zx_batch, zx_image, zx_step, zy_batch, zy_image, zy_step,
    blocks, runs, run, xs, ys, elements, slope,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pairs of one image of x with `run` images of y, and their mean; grid (blocks * runs * batch * xs,).

    With a mean there is one run.
    """
    block, outer = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    first, image = outer % runs * run, outer // runs
    batch = (image // xs).to(tl.int64)
    e = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = e < elements
    x = tl.load(zx_pointer + batch * zx_batch + (image % xs).to(tl.int64) * zx_image + e * zx_step, mask=mask, other=0)
    x = x.to(ACC)
    total = tl.zeros((BLOCK,), ACC)
    for j in range(first, tl.minimum(first + run, ys)):
        y = tl.load(zy_pointer + batch * zy_batch + tl.cast(j, tl.int64) * zy_image + e * zy_step, mask=mask, other=0)
        z = _activated(x + y.to(ACC), slope, ACTIVATION)
        if pairs_pointer is not None:
            pair = image.to(tl.int64) * ys + j
            tl.store(pairs_pointer + pair * elements + e, z.to(pairs_pointer.dtype.element_ty), mask=mask)
        total += z
    if mean_pointer is not None:
        total = divide(total, tl.zeros((BLOCK,), ACC) + ys)
        tl.store(mean_pointer + image.to(tl.int64) * elements + e, total.to(mean_pointer.dtype.element_ty), mask=mask)


@triton.jit
def _of_mean(pointer, image, e, mask, ys, elements, BLOCK: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """The share of every pair in the gradient of the mean, or zeros."""
    share = tl.zeros((BLOCK,), ACC)
    if pointer is not None:
        share = divide(tl.load(pointer + image * elements + e, mask=mask, other=0).to(ACC), share + tl.maximum(ys, 1))
    return share


@triton.jit
def _of_pair(x, y, grad_pairs, share, pair, e, mask, slope, elements, ACTIVATION: tl.constexpr, ACC: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of z."""
    grad = share
    if grad_pairs is not None:
        grad = grad + tl.load(grad_pairs + pair * elements + e, mask=mask, other=0).to(ACC)
    return _pulled(grad, x + y, slope, ACTIVATION)


@triton.jit
def _gradient_of_x(  # type: ignore[no-untyped-def]
    zx_pointer, zy_pointer, grad_pairs_pointer, grad_mean_pointer, grad_zx_pointer, grad_zy_pointer,
    zx_batch, zx_image, zx_step, zy_batch, zy_image, zy_step, image, e, xs, ys, elements, slope,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    mask = e < elements
    batch, i = image // xs, image % xs
    x = tl.load(zx_pointer + batch * zx_batch + i * zx_image + e * zx_step, mask=mask, other=0).to(ACC)
    share = _of_mean(grad_mean_pointer, image, e, mask, ys, elements, BLOCK, ACC)
    total = tl.zeros((BLOCK,), ACC)
    for j in range(ys):
        zy = zy_pointer + batch * zy_batch + tl.cast(j, tl.int64) * zy_image
        y = tl.load(zy + e * zy_step, mask=mask, other=0).to(ACC)
        grad = _of_pair(
            x, y, grad_pairs_pointer, share, image * ys + j, e, mask, slope, elements, ACTIVATION, ACC
        )  # fmt: skip
        if ONE:
            grad_zy = grad_zy_pointer + (batch * ys + j) * elements
            tl.store(grad_zy + e, grad.to(grad_zy_pointer.dtype.element_ty), mask=mask)
        total += grad
    tl.store(grad_zx_pointer + image * elements + e, total.to(grad_zx_pointer.dtype.element_ty), mask=mask)


@triton.jit
def _gradient_of_y(  # type: ignore[no-untyped-def]
    zx_pointer, zy_pointer, grad_pairs_pointer, grad_mean_pointer, grad_zy_pointer,
    zx_batch, zx_image, zx_step, zy_batch, zy_image, zy_step, image, e, xs, ys, elements, slope,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    mask = e < elements
    batch, j = image // ys, image % ys
    y = tl.load(zy_pointer + batch * zy_batch + j * zy_image + e * zy_step, mask=mask, other=0).to(ACC)
    total = tl.zeros((BLOCK,), ACC)
    for i in range(xs):
        zx = zx_pointer + batch * zx_batch + tl.cast(i, tl.int64) * zx_image
        x = tl.load(zx + e * zx_step, mask=mask, other=0).to(ACC)
        row = batch * xs + i
        share = _of_mean(grad_mean_pointer, row, e, mask, ys, elements, BLOCK, ACC)
        total += _of_pair(
            x, y, grad_pairs_pointer, share, row * ys + j, e, mask, slope, elements, ACTIVATION, ACC
        )  # fmt: skip
    tl.store(grad_zy_pointer + image * elements + e, total.to(grad_zy_pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["blocks", "batches", "xs", "ys"])
def tail_backward_kernel(  # type: ignore[no-untyped-def]
    zx_pointer, zy_pointer, grad_pairs_pointer, grad_mean_pointer, grad_zx_pointer, grad_zy_pointer,
    zx_batch, zx_image, zx_step, zy_batch, zy_image, zy_step, blocks, batches, xs, ys, elements, slope,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """The gradients of images of x, then of y; grid (blocks * batches * (xs + ys),).

    ONE: xs is 1, and the programs of x write the gradients of y, which are no sums; the grid is (blocks * batches,).
    """
    image = (tl.program_id(0) // blocks).to(tl.int64)
    e = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if ONE:
        _gradient_of_x(
            zx_pointer, zy_pointer, grad_pairs_pointer, grad_mean_pointer, grad_zx_pointer, grad_zy_pointer,
            zx_batch, zx_image, zx_step, zy_batch, zy_image, zy_step, image, e, xs, ys, elements, slope,
            ACTIVATION, ACC, BLOCK, True,
        )  # fmt: skip
    else:
        if image < batches * xs:
            _gradient_of_x(
                zx_pointer, zy_pointer, grad_pairs_pointer, grad_mean_pointer, grad_zx_pointer, grad_zy_pointer,
                zx_batch, zx_image, zx_step, zy_batch, zy_image, zy_step, image, e, xs, ys, elements, slope,
                ACTIVATION, ACC, BLOCK, False,
            )  # fmt: skip
        else:
            _gradient_of_y(
                zx_pointer, zy_pointer, grad_pairs_pointer, grad_mean_pointer, grad_zy_pointer,
                zx_batch, zx_image, zx_step, zy_batch, zy_image, zy_step, image - batches * xs, e, xs, ys, elements,
                slope, ACTIVATION, ACC, BLOCK,
            )  # fmt: skip


_POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
_INTEGERS = ("zx_batch", "zx_image", "zy_batch", "zy_image", "blocks", "runs", "run", "batches", "xs", "ys", "elements")
_ALIGNED = ("zx_batch", "zx_image", "zy_batch", "zy_image", "elements")


def _compilations() -> Iterator[Compilation]:
    """Of contiguous tensors: pairs and their mean, and pairs alone; backward with one image of x and with several."""
    for (dtype, pointer), (block, warps) in itertools.product(_POINTERS.items(), BLOCKS):
        for what, kernel, more in (
            ("pairs", tail_kernel, {"mean_pointer": None}),
            ("pairs and mean", tail_kernel, {}),
            ("backward of pairs", tail_backward_kernel, {"ONE": False, "grad_mean_pointer": None}),
            ("backward of pairs and mean, one x", tail_backward_kernel, {"ONE": True}),
        ):
            if block != BLOCKS[-1][0] and kernel != tail_kernel:
                continue
            names = kernel.arg_names
            given = {"ACTIVATION": 3, "ACC": tl.float32, "BLOCK": block, "zx_step": 1, "zy_step": 1} | more
            kinds = dict.fromkeys(_INTEGERS, "i32") | {"slope": "fp32"}
            kinds |= {name: pointer for name in names if name.endswith("pointer")}
            yield Compilation(
                f"cross_conv: {what} {dtype} {block}",
                kernel,
                {name: kinds[name] for name in names if name in kinds and name not in given},
                given,
                aligned=tuple(name for name in _ALIGNED if name in names),
                num_warps=warps,
            )


COMPILATIONS = list(_compilations())
