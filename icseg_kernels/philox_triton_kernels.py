"""The random-number contract of `icseg_kernels.philox` as Triton device functions, and the noise alone as a kernel.

Bits equal those of every other backend if nothing is contracted: launch with `enable_fp_fusion=False`, as
`gumbel_noise` does. Under TRITON_INTERPRET=1, set before triton is imported, the kernels run on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from icseg_kernels.compilation import Compilation
from icseg_kernels.triton_launch import launch

_BLOCK = 1024


@triton.jit
def _log_mantissa(x, exponent):  # type: ignore[no-untyped-def]
    z = x * x
    y = x * 7.0376836292e-2 + -1.1514610310e-1
    y = y * x + 1.1676998740e-1
    y = y * x + -1.2420140846e-1
    y = y * x + 1.4249322787e-1
    y = y * x + -1.6668057665e-1
    y = y * x + 2.0000714765e-1
    y = y * x + -2.4999993993e-1
    y = y * x + 3.3333331174e-1
    y = (y * x) * z
    y = y + exponent * -2.12194440e-4
    y = y + z * -0.5
    return (x + y) + exponent * 0.693359375


@triton.jit
def _mantissa_and_exponent(x):  # type: ignore[no-untyped-def]
    bits = x.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    exponent = (bits >> 23) - 126
    small = mantissa < 0.707106769084930419921875  # 0x1.6a09e6p-1
    mantissa = tl.where(small, mantissa + mantissa, mantissa)
    return mantissa - 1.0, (exponent - small.to(tl.int32)).to(tl.float32)


@triton.jit
def gumbel(words):  # type: ignore[no-untyped-def]
    """Standard Gumbel noise, float32, of random words (uint32)."""
    v = (words.to(tl.float32) + 0.5) * 2.3283064365386962890625e-10
    v = tl.minimum(v, 0.999999940395355224609375)
    mantissa, exponent = _mantissa_and_exponent(1.0 - v)
    small = v < 0.28125
    # Products, not negations, which Triton makes 0 - x: the noise of E = 1 is -0.
    exponential = _log_mantissa(tl.where(small, v * -1.0, mantissa), tl.where(small, 0.0, exponent)) * -1.0
    mantissa, exponent = _mantissa_and_exponent(exponential)
    return _log_mantissa(mantissa, exponent) * -1.0


@triton.jit
def words_of_groups(seed, row, stream, offset, groups):  # type: ignore[no-untyped-def]
    """The four words of each group of four elements (uint32): Philox4x32-10 of (group, row, stream, offset).

    seed: int64; row, stream, offset: integers; groups: int32 tensor, element >> 2.
    """
    seed = seed.to(tl.uint64)
    c0 = groups.to(tl.uint32)
    zero = c0 * 0
    c1, c2, c3 = (zero + row).to(tl.uint32), (zero + stream).to(tl.uint32), (zero + offset).to(tl.uint32)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    return tl.philox_impl(c0, c1, c2, c3, k0, k1)


@triton.jit
def noise_of_groups(seed, row, stream, offset, groups):  # type: ignore[no-untyped-def]
    """Gumbel noise [G, 4] of the elements of `groups` int32 [G]: that of element e at [e >> 2, e & 3]."""
    w0, w1, w2, w3 = words_of_groups(seed, row, stream, offset, groups)
    # Even and odd words are joined first, so that the last dimension counts 0, 1, 2, 3.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [G, 2, 2]: at [i, j] word i * 2 + j
    return gumbel(words.reshape([groups.shape[0], 4]))


@triton.jit
def noise_kernel(seed_pointer, noise_pointer, elements, blocks, stream, offset, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Noise [rows, elements] on a grid of rows * blocks, each of BLOCK elements."""
    program = tl.program_id(0)
    row, block = program // blocks, program % blocks
    groups = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    noise = noise_of_groups(tl.load(seed_pointer), row, stream, offset, groups)
    element = groups[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(noise_pointer + row.to(tl.int64) * elements + element, noise, mask=element < elements)


def gumbel_noise(seed: Tensor, rows: int, elements: int, stream: int = 0, offset: int = 0) -> Tensor:
    """`icseg_kernels.philox.gumbel_noise` for a 0-dim int64 seed tensor, by a Triton kernel on its device."""
    noise = torch.empty((rows, elements), dtype=torch.float32, device=seed.device)
    blocks = triton.cdiv(elements, _BLOCK)
    arguments = seed, noise, elements, blocks, stream, offset
    launch(noise_kernel, (rows * blocks,), seed.device, *arguments, BLOCK=_BLOCK, enable_fp_fusion=False)
    return noise


COMPILATIONS = [
    Compilation(
        "philox: gumbel_noise",
        noise_kernel,
        {
            "seed_pointer": "*i64",
            "noise_pointer": "*fp32",
            "elements": "i32",
            "blocks": "i32",
            "stream": "i32",
            "offset": "i32",
        },
        {"BLOCK": _BLOCK},
        enable_fp_fusion=False,
    )
]
