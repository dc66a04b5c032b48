"""The Triton kernel of small_convolutions: up to four layers of a few images a program, one after the other.

A layer is a matrix product of [pixels, k * k * Ci] by [k * k * Ci, Co], whose left operand is gathered from the map
before. Maps between layers lie in global memory, [images, pixels, WIDTH] with channels padded by zeros to a power of
two, in a slot that belongs to one program and is used again for its next images, so that it stays in the caches.
What a thread has stored there, all threads of its program see after a barrier, which orders global memory for them.
A layer's loads must stay behind that barrier: launch with num_stages=1, for which nothing is loaded in advance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from icseg_kernels.compilation import Compilation
from icseg_kernels.small_convolutions.triton import Layer, constants, plan


@triton.jit
def _layer(  # type: ignore[no-untyped-def]
    source, weight, bias, target, slope, first, samples, image_stride, channel_stride, row_stride, column_stride,
    IMAGES: tl.constexpr, CI: tl.constexpr, PERIOD: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    CO: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, REPLICATE: tl.constexpr,
    WIDTH: tl.constexpr, LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One layer of images first to first + IMAGES, of which there are `samples`; `source` is that of the first.

    PERIOD: channels of the source, with padding. LAST: the target is the output of all images, [samples, CO, pixels].
    """
    HO: tl.constexpr = (H + 2 * PADDING - KERNEL) // STRIDE + 1
    WO: tl.constexpr = (W + 2 * PADDING - KERNEL) // STRIDE + 1
    PIXELS: tl.constexpr = HO * WO
    TERMS: tl.constexpr = KERNEL * KERNEL * PERIOD
    n = tl.arange(0, WIDTH)
    for start in range(0, IMAGES * PIXELS, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        image, pixel = m // PIXELS, m % PIXELS
        inside = (m < IMAGES * PIXELS) & (first + image < samples)
        images = source + image.to(tl.int64) * image_stride
        top, left = pixel // WO * STRIDE - PADDING, pixel % WO * STRIDE - PADDING
        total = tl.zeros((BLOCK_M, WIDTH), ACC)
        for term in range(0, TERMS, BLOCK_K):
            k = term + tl.arange(0, BLOCK_K)
            tap, channel = k // PERIOD, k % PERIOD
            y, x = top[:, None] + (tap // KERNEL)[None, :], left[:, None] + (tap % KERNEL)[None, :]
            there = inside[:, None] & (k < TERMS)[None, :]
            if REPLICATE:
                y, x = tl.minimum(tl.maximum(y, 0), H - 1), tl.minimum(tl.maximum(x, 0), W - 1)
            elif PADDING > 0:
                there = there & (y >= 0) & (y < H) & (x >= 0) & (x < W)
            offsets = y * row_stride + x * column_stride + (channel * channel_stride)[None, :]
            pixels = tl.load(images[:, None] + offsets, mask=there, other=0).to(OPERAND)  # [BLOCK_M, BLOCK_K]
            of_term = channel * (KERNEL * KERNEL) + tap
            weighted = (k < TERMS) & (channel < CI)
            weights = tl.load(
                weight + of_term[:, None] + (n * (CI * KERNEL * KERNEL))[None, :],
                mask=weighted[:, None] & (n < CO)[None, :],
                other=0,
            ).to(OPERAND)  # [BLOCK_K, WIDTH]
            total = tl.dot(pixels, weights, total, input_precision=PRECISION, out_dtype=ACC)
        if bias is not None:
            total += tl.load(bias + n, mask=n < CO, other=0).to(ACC)[None, :]
        total = tl.where(total > 0, total, total * slope).to(target.dtype.element_ty)
        if LAST:
            offsets = ((first + image).to(tl.int64) * (CO * PIXELS) + pixel)[:, None] + (n * PIXELS)[None, :]
            tl.store(target + offsets, total, mask=inside[:, None] & (n < CO)[None, :])
        else:
            # Zeros, not what infinities times zeros are, where there is no channel.
            total = tl.where((n < CO)[None, :], total, 0.0)
            tl.store(target + m[:, None] * WIDTH + n[None, :], total, mask=(m < IMAGES * PIXELS)[:, None])
    tl.debug_barrier()


@triton.jit(do_not_specialize=["samples", "groups", "x_image"])
def stack_kernel(  # type: ignore[no-untyped-def]
    x, out, scratch, weight1, bias1, weight2, bias2, weight3, bias3, weight4, bias4, slope1, slope2, slope3, slope4,
    x_image, x_channel, x_row, x_column, samples, groups,
    LAYERS: tl.constexpr, IMAGES: tl.constexpr, SECOND: tl.constexpr, SLOT: tl.constexpr,
    C0: tl.constexpr, H0: tl.constexpr, W0: tl.constexpr,
    C1: tl.constexpr, KERNEL1: tl.constexpr, STRIDE1: tl.constexpr, PADDING1: tl.constexpr, REPLICATE1: tl.constexpr,
    WIDTH1: tl.constexpr, ROWS1: tl.constexpr,
    C2: tl.constexpr, KERNEL2: tl.constexpr, STRIDE2: tl.constexpr, PADDING2: tl.constexpr, REPLICATE2: tl.constexpr,
    WIDTH2: tl.constexpr, ROWS2: tl.constexpr,
    C3: tl.constexpr, KERNEL3: tl.constexpr, STRIDE3: tl.constexpr, PADDING3: tl.constexpr, REPLICATE3: tl.constexpr,
    WIDTH3: tl.constexpr, ROWS3: tl.constexpr,
    C4: tl.constexpr, KERNEL4: tl.constexpr, STRIDE4: tl.constexpr, PADDING4: tl.constexpr, REPLICATE4: tl.constexpr,
    WIDTH4: tl.constexpr, ROWS4: tl.constexpr,
    BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`groups` of IMAGES images, on a grid of as many programs as there are slots of SLOT elements.

    The maps of the layers go to the beginning of a slot, to its element SECOND, and to the beginning again.
    """
    here = scratch + tl.program_id(0).to(tl.int64) * SLOT
    for group in range(tl.program_id(0), groups, tl.num_programs(0)):
        first = group * IMAGES
        _layer(
            x + tl.cast(first, tl.int64) * x_image, weight1, bias1, out if LAYERS == 1 else here, slope1,
            first, samples, x_image, x_channel, x_row, x_column, IMAGES, C0, C0, H0, W0,
            C1, KERNEL1, STRIDE1, PADDING1, REPLICATE1, WIDTH1, LAYERS == 1, ROWS1, BLOCK_K, OPERAND, ACC, PRECISION,
        )  # fmt: skip
        H1: tl.constexpr = (H0 + 2 * PADDING1 - KERNEL1) // STRIDE1 + 1
        W1: tl.constexpr = (W0 + 2 * PADDING1 - KERNEL1) // STRIDE1 + 1
        if LAYERS > 1:
            _layer(
                here, weight2, bias2, out if LAYERS == 2 else here + SECOND, slope2,
                first, samples, H1 * W1 * WIDTH1, 1, W1 * WIDTH1, WIDTH1, IMAGES, C1, WIDTH1, H1, W1,
                C2, KERNEL2, STRIDE2, PADDING2, REPLICATE2, WIDTH2, LAYERS == 2, ROWS2, BLOCK_K,
                OPERAND, ACC, PRECISION,
            )  # fmt: skip
        if LAYERS > 2:
            H2: tl.constexpr = (H1 + 2 * PADDING2 - KERNEL2) // STRIDE2 + 1
            W2: tl.constexpr = (W1 + 2 * PADDING2 - KERNEL2) // STRIDE2 + 1
            _layer(
                here + SECOND, weight3, bias3, out if LAYERS == 3 else here, slope3,
                first, samples, H2 * W2 * WIDTH2, 1, W2 * WIDTH2, WIDTH2, IMAGES, C2, WIDTH2, H2, W2,
                C3, KERNEL3, STRIDE3, PADDING3, REPLICATE3, WIDTH3, LAYERS == 3, ROWS3, BLOCK_K,
                OPERAND, ACC, PRECISION,
            )  # fmt: skip
            if LAYERS > 3:
                H3: tl.constexpr = (H2 + 2 * PADDING3 - KERNEL3) // STRIDE3 + 1
                W3: tl.constexpr = (W2 + 2 * PADDING3 - KERNEL3) // STRIDE3 + 1
                _layer(
                    here, weight4, bias4, out, slope4,
                    first, samples, H3 * W3 * WIDTH3, 1, W3 * WIDTH3, WIDTH3, IMAGES, C3, WIDTH3, H3, W3,
                    C4, KERNEL4, STRIDE4, PADDING4, REPLICATE4, WIDTH4, True, ROWS4, BLOCK_K,
                    OPERAND, ACC, PRECISION,
                )  # fmt: skip


# As small encoders and heads have them: channels, height and width of x, then output channels, kernel, stride, padding.
_STACKS: dict[str, tuple[tuple[int, int, int], list[Layer]]] = {
    "stem": (
        (3, 16, 16),
        [Layer(12, 3, 1, 0, False), Layer(16, 3, 1, 0, False), Layer(24, 3, 1, 0, False), Layer(24, 3, 1, 0, False)],
    ),
    "down": ((32, 8, 8), [Layer(48, 4, 2, 1, False)]),
    "head": ((20, 16, 16), [Layer(20, 3, 1, 1, True), Layer(2, 1, 1, 0, False)]),
    "widest": ((128, 16, 16), [Layer(128, 3, 1, 1, False), Layer(128, 3, 1, 1, False)]),
}
_POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}


def _compiled(name: str, dtype: str, precision: str, samples: int) -> Compilation:
    """Of contiguous images; every layer has a bias."""
    (channels, height, width), layers = _STACKS[name]
    chosen = plan((channels, height, width), layers, samples, fused=precision == "ieee" and dtype == "float32")
    signature = {"x": _POINTERS[dtype], "out": _POINTERS[dtype], "scratch": _POINTERS[dtype]}
    given: dict[str, Any] = constants((channels, height, width), layers, chosen)
    for i in range(1, 5):
        if i <= len(layers):
            signature |= {f"weight{i}": _POINTERS[dtype], f"bias{i}": _POINTERS[dtype]}
        else:
            given |= {f"weight{i}": None, f"bias{i}": None}
        signature[f"slope{i}"] = "fp32"
    signature |= dict.fromkeys(("x_image", "x_channel", "x_row", "samples", "groups"), "i32")
    operand = {"float32": tl.float32, "float16": tl.float16, "bfloat16": tl.bfloat16}[dtype]
    given |= {"x_column": 1, "OPERAND": operand, "ACC": tl.float32, "PRECISION": precision}
    return Compilation(
        f"small_convolutions: {name} {dtype}{'' if precision == 'ieee' else ' ' + precision} {samples}",
        stack_kernel,
        signature,
        given,
        aligned=tuple(s for s, step in (("x_channel", height * width), ("x_row", width)) if step % 16 == 0),
        num_warps=chosen.warps,
        num_stages=1,
        tensor_cores=dtype != "float32" or precision != "ieee",
    )


def _compilations() -> Iterator[Compilation]:
    for dtype, precision in (("float32", "ieee"), ("float32", "tf32"), ("float16", "ieee"), ("bfloat16", "ieee")):
        for name in _STACKS:
            yield _compiled(name, dtype, precision, 2304)
    yield _compiled("down", "bfloat16", "ieee", 64)


COMPILATIONS = list(_compilations())
