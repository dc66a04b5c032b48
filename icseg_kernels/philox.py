"""The one random-number contract: Gumbel noise, the same bits on every backend and for any launch shape.

The noise of element `e` of row `b` under a 64-bit `seed`, in float32 arithmetic that rounds to nearest even
after every single operation (no fused multiply-add, no reassociation):

1. r = Philox4x32-10(counter = (e >> 2, b, stream, offset), key = (seed low, seed high))[e & 3], 32 bits
   (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
2. v = min((float(r) + 0.5) * 2^-32, 1 - 2^-24), the conversion rounded to nearest even: 2^-33 <= v < 1.
3. E = -log1p(-v), a standard exponential. If v < 9/32: E = -log_mantissa(-v, 0). Else E = -log(1 - v).
   Small v thus keep all their bits, and E reaches down to 2^-33: ties among noises are rare.
4. noise = -log(E).

log(x) for normal x > 0: write x = m * 2^e with 1/2 <= m < 1, from the bits. If m < 0x1.6a09e6p-1, which is
sqrt(1/2), replace m by m + m and e by e - 1. The result is log_mantissa(m - 1, e); all of this is exact.

log_mantissa(x, e) = log((1 + x) * 2^e), in this order (the coefficients of the Cephes library's logf):

    z = x * x
    y = c0;  y = y * x + c1;  ...;  y = y * x + c8         one multiplication, then one addition
    y = (y * x) * z
    y = y + float(e) * -2.12194440e-4                      ln 2 = 0.693359375 - 2.12194440e-4
    y = y + z * -0.5
    result = (x + y) + float(e) * 0.693359375
"""

from __future__ import annotations

from ctypes import c_int64, c_uint64, c_void_p
from typing import Any

import torch
from torch import Tensor

from icseg_kernels import backend as backends
from icseg_kernels import checks, flops, library, triton_launch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

_COEFFICIENTS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SQRT_HALF = float.fromhex("0x1.6a09e6p-1")
_SMALL = 9 / 32

Counter = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Counter, key: tuple[Tensor, Tensor]) -> Counter:
    """Philox4x32-10: four 32-bit words for each counter.

    counter, key: int64 tensors with values in [0, 2^32), broadcastable with each other.
    Returns four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(x: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of a 32 x 32 bit product, by halves so that int64 never overflows."""
    low = x * (multiplier & 0xFFFF)
    high = x * (multiplier >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def log(x: Tensor) -> Tensor:
    """Natural logarithm of normal positive float32 values, as the module's contract defines it."""
    bits = x.view(torch.int32)
    mantissa = ((bits & 0x007FFFFF) | 0x3F000000).view(torch.float32)
    exponent = (bits >> 23) - 126
    small = mantissa < _SQRT_HALF
    mantissa = torch.where(small, mantissa + mantissa, mantissa)
    return _log_mantissa(mantissa - 1.0, (exponent - small.to(torch.int32)).to(torch.float32))


def _log_mantissa(x: Tensor, exponent: Tensor) -> Tensor:
    z = x * x
    y = torch.full_like(x, _COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:
        y = y * x + coefficient
    y = (y * x) * z
    y = y + exponent * -2.12194440e-4
    y = y + z * -0.5
    return (x + y) + exponent * 0.693359375


def exponential(bits: Tensor) -> Tensor:
    """Standard exponential float32 variates from random 32-bit words (int64 tensor): steps 2 and 3."""
    v = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.where(v < _SMALL, _log_mantissa(-v, torch.zeros_like(v)), log(1.0 - v))


def checked_seed(seed: int | Tensor | None, device: torch.device | str) -> int | Tensor:
    """`seed` as an integer in [-2^63, 2^63), or a 0-dim int64 tensor on `device`; None draws one.

    It comes from torch's generator, without a host sync.

    Raises TypeError or ValueError unless seed is None, an integer in [-2^63, 2^64), or such a tensor.
    """
    if type(seed) is int and -(2**63) <= seed < 2**63:
        return seed  # the usual case, at once
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        wanted = torch.device(device)
        elsewhere = seed.device.type != wanted.type or wanted.index not in (None, seed.device.index)
        if seed.ndim != 0 or seed.dtype != torch.int64 or elsewhere:
            raise ValueError(
                f"seed must be a 0-dim int64 tensor on {device}, "
                f"got shape {list(seed.shape)}, {seed.dtype} on {seed.device}"
            )
        return seed
    seed = checks.integer("seed", seed, otherwise=", a 0-dim int64 tensor or None")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must lie in [-2^63, 2^64), got {seed}")
    return seed if seed < 2**63 else seed - 2**64


def seed_tensor(seed: int | Tensor | None, device: torch.device | str) -> Tensor:
    """`checked_seed` as a 0-dim int64 tensor on `device`, without a host sync."""
    checked = checked_seed(seed, device)
    return checked if isinstance(checked, Tensor) else torch.full((), checked, dtype=torch.int64, device=device)


def gumbel_noise(
    seed: int | Tensor,
    rows: int,
    elements: int,
    *,
    stream: int = 0,
    offset: int = 0,
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Standard Gumbel noise [rows, elements], float32, bit-identical on every device (the module's contract).

    seed:           integer in [-2^63, 2^64), or a 0-dim int64 tensor, which a CUDA graph may refill.
    stream, offset: the counter's two upper words, in [0, 2^32): independent noises under one seed.
    device:         where; None means the seed tensor's device, or the CPU.
    backend:        "triton" (CUDA devices), "native" (C++, on the CPU), "reference", or None for the best.

    Raises TypeError or ValueError; BackendError if the named backend cannot serve.
    """
    rows, elements = checks.integer("rows", rows, 0), checks.integer("elements", elements, 0)
    stream, offset = checks.integer("stream", stream, 0, _MASK), checks.integer("offset", offset, 0, _MASK)
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else "cpu"
    seeded = seed_tensor(seed, device)
    chosen = backends.select("gumbel_noise", backend, seeded)
    noise: Tensor = _noise_op(seeded, rows, elements, stream, offset, chosen)
    return noise


def noise_reference(seed: Tensor, rows: int, elements: int, stream: int = 0, offset: int = 0) -> Tensor:
    """`gumbel_noise` for a 0-dim int64 seed tensor, in plain PyTorch."""
    groups = (elements + 3) // 4
    counter = (
        torch.arange(groups, device=seed.device).view(1, groups),
        torch.arange(rows, device=seed.device).view(rows, 1),
        torch.full((1, 1), stream, dtype=torch.int64, device=seed.device),
        torch.full((1, 1), offset, dtype=torch.int64, device=seed.device),
    )
    words = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    bits = torch.stack(words, dim=-1).view(rows, 4 * groups)[:, :elements]
    return -log(exponential(bits))


def noise_native(seed: Tensor, rows: int, elements: int, stream: int = 0, offset: int = 0) -> Tensor:
    """`gumbel_noise` by the native library."""
    noise = torch.empty((rows, elements), dtype=torch.float32)
    library.check(_native(noise.data_ptr(), rows, elements, int(seed), stream, offset))
    return noise


def noise_triton(seed: Tensor, rows: int, elements: int, stream: int = 0, offset: int = 0) -> Tensor:
    """`gumbel_noise` by a Triton kernel."""
    from icseg_kernels.philox_triton_kernels import gumbel_noise

    return gumbel_noise(seed, rows, elements, stream, offset)


# noise; rows, elements; seed; stream, offset
_native = library.function("icseg_gumbel_noise", [c_void_p, c_int64, c_int64, c_uint64, c_int64, c_int64])
_IMPLEMENTATIONS = {"triton": noise_triton, "native": noise_native, "reference": noise_reference}


def _triton_unsupported(seed: Tensor) -> list[str]:
    return triton_launch.unsupported_device("seed", seed)


def _native_unsupported(seed: Tensor) -> list[str]:
    return [] if seed.device.type == "cpu" else [f"it runs on the CPU, and the noise is wanted on {seed.device}"]


backends.declare(
    "gumbel_noise",
    {
        "triton": backends.Backend(triton_launch.missing, _triton_unsupported, triton_launch.slower),
        "native": backends.Backend(library.missing, _native_unsupported),
        "reference": backends.Backend(),
    },
)


def _implementation(seed: Tensor, rows: int, elements: int, stream: int, offset: int, backend: str) -> Tensor:
    return _IMPLEMENTATIONS[backend](seed, rows, elements, stream, offset)


def _fake_noise(seed: Tensor, rows: int, elements: int, stream: int, offset: int, backend: str) -> Tensor:
    return seed.new_empty((rows, elements), dtype=torch.float32)


# Opaque to compilers, which might fuse its multiplications and additions and so change bits.
_noise_op = backends.register(
    "gumbel_noise(Tensor seed, SymInt rows, SymInt elements, SymInt stream, SymInt offset, str backend) -> Tensor",
    _implementation,
    _fake_noise,
)


def _count(seed: Any, rows: int, elements: int, *_: Any, out_shape: Any = None) -> int:
    return 2 * flops.LOGARITHM_FLOPS * rows * elements


flops.register(_noise_op, _count)
