"""Device functions that the Triton kernels of several ops share: GELU and its slope, division to the last bit."""

from __future__ import annotations

import triton
import triton.language as tl

from icseg_kernels.compilation import Compilation


@triton.jit
def gelu(v):  # type: ignore[no-untyped-def]
    """Exact, by the error function; v float32 or float64."""
    return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))


@triton.jit
def gelu_slope(v):  # type: ignore[no-untyped-def]
    """The derivative of `gelu`."""
    below = 0.5 + 0.5 * tl.erf(v * 0.7071067811865476)
    return below + v * tl.exp(-0.5 * v * v) * 0.3989422804014327


@triton.jit
def divide(a, b):  # type: ignore[no-untyped-def]
    """a / b, rounded to nearest, for a and b both float32 or both float64: `/` alone is off by a bit in float32."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.math.div_rn(a, b)


COMPILATIONS: list[Compilation] = []
