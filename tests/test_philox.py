"""The random-number contract, against published answers and an independent implementation in numpy."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import BACKENDS, DEVICE
from scipy import stats

from icseg_kernels.philox import exponential, gumbel_noise, log, noise_reference, philox4x32, seed_tensor

FLOAT = np.float32
COEFFICIENTS = np.array(
    [
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ],
    FLOAT,
)


def numpy_philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 of counter uint64 [4, n], by 64-bit products."""
    c0, c1, c2, c3 = counter.astype(np.uint64)
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    word = np.uint64(32)
    mask = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c2 = (product1 >> word) ^ c1 ^ k0, (product0 >> word) ^ c3 ^ k1
        c1, c3 = product1 & mask, product0 & mask
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    return np.stack([c0, c1, c2, c3])


def numpy_log_mantissa(x: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    z = x * x
    y = np.full_like(x, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        y = y * x + coefficient
    y = (y * x) * z
    y = y + exponent * FLOAT(-2.12194440e-4)
    y = y + z * FLOAT(-0.5)
    return (x + y) + exponent * FLOAT(0.693359375)


def numpy_log(x: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(x)
    small = mantissa < FLOAT(np.sqrt(0.5))
    mantissa = np.where(small, mantissa + mantissa, mantissa)
    return numpy_log_mantissa(mantissa - FLOAT(1), (exponent - small).astype(FLOAT))


def numpy_exponential(bits: np.ndarray) -> np.ndarray:
    v = np.minimum((bits.astype(FLOAT) + FLOAT(0.5)) * FLOAT(2.0**-32), FLOAT(1 - 2.0**-24))
    return -np.where(v < FLOAT(9 / 32), numpy_log_mantissa(-v, np.zeros_like(v)), numpy_log(FLOAT(1) - v))


def numpy_noise(seed: int, rows: int, elements: int, stream: int = 0, offset: int = 0) -> np.ndarray:
    row, element = np.divmod(np.arange(rows * elements), elements)
    counter = np.stack([element >> 2, row, np.full_like(row, stream), np.full_like(row, offset)])
    words = numpy_philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    bits = words[element & 3, np.arange(rows * elements)]
    return -numpy_log(numpy_exponential(bits)).reshape(rows, elements)


def bits_of(x: torch.Tensor | np.ndarray) -> np.ndarray:
    return np.asarray(x).view(np.int32)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_published_known_answers(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor(int(word, 16)) for word in text.split())

    assert philox4x32(words(counter), words(key)) == words(expected)


def test_words_equal_numpy() -> None:
    rng = np.random.default_rng(0)
    counter = rng.integers(0, 2**32, (4, 10_000), dtype=np.uint64)
    key = (0xDEADBEEF, 0x80000001)
    ours = philox4x32(tuple(torch.from_numpy(counter.astype(np.int64))), tuple(map(torch.tensor, key)))
    assert np.array_equal(torch.stack(ours).numpy(), numpy_philox(counter, key).astype(np.int64))


@pytest.mark.parametrize(
    ("seed", "rows", "elements", "stream", "offset"),
    [
        (0, 1, 1, 0, 0),
        (1, 3, 7, 0, 0),
        (2**32 + 5, 2, 64, 3, 0),
        (-1, 2, 9, 0, 2**32 - 1),
        (2**64 - 2, 5, 4, 0, 0),
        (9, 4, 250_000, 0, 0),
    ],
)
def test_noise_equals_numpy_bit_for_bit(seed: int, rows: int, elements: int, stream: int, offset: int) -> None:
    ours = gumbel_noise(seed, rows, elements, stream=stream, offset=offset)
    assert ours.dtype == torch.float32
    assert ours.shape == (rows, elements)
    assert np.array_equal(bits_of(ours), bits_of(numpy_noise(seed, rows, elements, stream, offset)))


def test_draws_are_fixed() -> None:
    expected = [
        [0x3F2CC257, -0x40BF14E5, -0x416DB636, 0x3D946D1A, -0x405C9A76],
        [0x3F1DBF22, -0x40998360, 0x3F025A64, 0x4062DDE0, 0x3F14E009],
    ]
    assert bits_of(gumbel_noise(0, 2, 5)).tolist() == expected
    expected = [[1069296087, 1067201222, 1064913834]]
    assert bits_of(gumbel_noise(12345678901234567, 1, 3, stream=1, offset=2)).tolist() == expected


def test_every_random_word_gives_finite_noise() -> None:
    edges = torch.tensor([0, 1, 2, 2**24, 2**31, 2**32 - 129, 2**32 - 128, 2**32 - 1])
    v = torch.tensor([9 / 32], dtype=torch.float64) * 2**32
    edges = torch.cat([edges, (v.long() + torch.arange(-200, 200))])
    exponentials = exponential(edges)
    assert np.array_equal(bits_of(exponentials), bits_of(numpy_exponential(edges.numpy())))
    assert exponentials[0] == 2.0**-33
    assert exponentials.max() == exponentials[7] == np.float32(24 * np.log(2))
    assert bool((exponentials > 0).all())


def test_log_is_accurate() -> None:
    x = torch.logspace(-33, 5, 1_000_000, base=2, dtype=torch.float32)
    exact = np.log(x.double().numpy())
    error = np.abs(log(x).double().numpy() - exact) / np.maximum(np.abs(exact), 1e-30)
    assert error[exact != 0].max() < 1.0e-7
    assert np.array_equal(bits_of(log(x)), bits_of(numpy_log(x.numpy())))
    assert log(torch.ones(1)) == 0


def test_exponential_is_accurate() -> None:
    bits = torch.linspace(0, 2**32 - 1, 1_000_000, dtype=torch.float64).long()
    v = np.minimum((bits.numpy().astype(FLOAT) + FLOAT(0.5)) * FLOAT(2.0**-32), FLOAT(1 - 2.0**-24))
    exact = -np.log1p(-v.astype(np.float64))
    # Half a unit in the last place from rounding 1 - v (1.2e-7 of E), and the logarithm's own error (7.1e-8).
    assert np.abs(exponential(bits).double().numpy() / exact - 1).max() < 1.92e-7


def test_noise_is_gumbel_distributed() -> None:
    noise = gumbel_noise(11, 20, 10_000).double().numpy()
    assert stats.kstest(noise.ravel(), "gumbel_r").pvalue > 1e-3
    correlations = np.corrcoef(noise) - np.eye(20)
    assert np.abs(correlations).max() < 5 / np.sqrt(10_000)
    assert len(np.unique(noise)) > 0.99 * noise.size


def test_each_row_stream_offset_and_seed_draws_anew() -> None:
    base = gumbel_noise(1, 2, 100)
    others = [base[1:], gumbel_noise(2, 1, 100), gumbel_noise(1 + 2**32, 1, 100)]
    others += [gumbel_noise(1, 1, 100, stream=1), gumbel_noise(1, 1, 100, offset=1)]
    noises = torch.cat([base[:1], *others])
    assert len(noises[:, 0].unique()) == len(noises)


def test_noise_does_not_depend_on_the_shape_drawn() -> None:
    whole = gumbel_noise(4, 6, 101)
    assert torch.equal(gumbel_noise(4, 3, 50), whole[:3, :50])


def test_seed_forms_agree() -> None:
    noise = gumbel_noise(2**64 - 3, 2, 8)
    assert torch.equal(noise, gumbel_noise(-3, 2, 8))
    assert torch.equal(noise, gumbel_noise(torch.tensor(-3), 2, 8))


def test_seed_none_follows_torch_generator() -> None:
    torch.manual_seed(0)
    first, second = seed_tensor(None, "cpu"), seed_tensor(None, "cpu")
    torch.manual_seed(0)
    assert seed_tensor(None, "cpu") == first != second


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    assert gumbel_noise(0, *shape).shape == shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_noise_on_a_gpu_has_the_same_bits() -> None:
    assert torch.equal(gumbel_noise(9, 3, 100_001, device="cuda").cpu(), gumbel_noise(9, 3, 100_001))


def test_compiled_noise_has_the_same_bits() -> None:
    compiled = torch.compile(lambda seed: gumbel_noise(seed, 3, 10), fullgraph=True)
    for seed in (5, -(2**62)):
        assert torch.equal(compiled(torch.tensor(seed)), gumbel_noise(seed, 3, 10))


def test_opcheck() -> None:
    for backend in BACKENDS:
        torch.library.opcheck(torch.ops.icseg.gumbel_noise.default, (torch.tensor(3), 2, 5, 0, 0, backend))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((2**64, 1, 1), ValueError, r"seed must lie in \[-2\^63, 2\^64\), got 18446744073709551616"),
        ((-(2**63) - 1, 1, 1), ValueError, "seed must lie"),
        ((1.5, 1, 1), TypeError, "seed must be an integer, a 0-dim int64 tensor or None, got 1.5"),
        ((True, 1, 1), TypeError, "got True"),
        ((torch.tensor([1]), 1, 1), ValueError, r"0-dim int64 tensor on cpu, got shape \[1\]"),
        ((torch.tensor(1.0), 1, 1), ValueError, "torch.float32 on cpu"),
        ((0, -1, 1), ValueError, "rows must be an integer of at least 0, got -1"),
    ],
)
def test_errors(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gumbel_noise(*arguments)


def test_stream_outside_32_bits_is_an_error() -> None:
    with pytest.raises(ValueError, match="stream must be an integer from 0 to 4294967295, got 4294967296"):
        gumbel_noise(0, 1, 1, stream=2**32)


def test_native_noise_equals_the_reference_bit_for_bit(isa: str, poisoned: None) -> None:
    cases = [(0, 1, 1, 0, 0), (-3, 3, 257, 5, 2**32 - 1), (2**62 + 11, 2, 100_003, 2**32 - 1, 0), (7, 40_000, 3, 0, 0)]
    for seed, *sizes in cases:
        *shape, stream, offset = sizes
        noise = gumbel_noise(seed, *shape, stream=stream, offset=offset, backend="native")
        expected = noise_reference(torch.tensor(seed), *sizes)
        assert np.array_equal(bits_of(noise), bits_of(expected))


linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux")


@linux
def test_triton_noise_has_the_same_bits(poisoned: None) -> None:
    for seed, rows, elements, stream, offset in [
        (5, 3, 17_001, 0, 0),
        (-(2**62) - 3, 2, 130, 7, 2**32 - 1),
        (1, 1, 5, 2**31, 1),
        (0, 0, 5, 0, 0),
    ]:
        noise = gumbel_noise(seed, rows, elements, stream=stream, offset=offset, device=DEVICE, backend="triton").cpu()
        expected = noise_reference(torch.tensor(seed), rows, elements, stream, offset)
        assert np.array_equal(bits_of(noise), bits_of(expected))


TRITON_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from icseg_kernels.philox_triton_kernels import COMPILATIONS

(noise,) = COMPILATIONS
source = triton.compiler.ASTSource(noise.kernel, {**noise.signature, "BLOCK": "constexpr"}, noise.constants)
options = {"enable_fp_fusion": False}
print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
"""


@linux
def test_triton_noise_compiles_without_contraction(tmp_path: Path) -> None:
    """For an H100, which need not be there. Contracted, a multiplication and an addition round once, not twice."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", TRITON_COMPILE]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True
    )
    assert "mul.rn.f32" in done.stdout
    assert "fma" not in done.stdout


def test_importing_the_ops_needs_no_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; import icseg_kernels"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=True)
