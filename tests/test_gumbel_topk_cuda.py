"""gumbel_topk by the CUDA library, against the reference on the CPU."""

from __future__ import annotations

import pytest
import torch
from cuda_on_cpu import DEVICE, gpu, served  # noqa: F401
from torch import Tensor

from icseg_kernels import cuda_library
from icseg_kernels.gumbel_topk import cuda, reference

INF, NAN = float("inf"), float("nan")
SIZES = [(2, 1, 1), (1, 7, 3), (2, 1023, 64), (1, 4096, 4096), (1, 5000, 300), (1, 20001, 64), (1, 65536, 4095)]

pytestmark = pytest.mark.usefixtures("served")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def equal_bits(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.cpu().view(torch.int32), expected.view(torch.int32))


def check(logits: Tensor, k: int, seed: int | Tensor | None = None, noise: Tensor | None = None) -> None:
    """`logits` and `noise` on the CPU."""
    expected = reference.gumbel_topk(logits, k, seed, noise)
    there = [None if x is None else x.to(DEVICE) for x in (logits, noise)]
    found = cuda.gumbel_topk(there[0], k, seed.to(DEVICE) if isinstance(seed, Tensor) else seed, there[1])
    indices, scores, logsumexp, kappa, kappa_index = found
    assert torch.equal(indices.cpu(), expected[0])
    assert equal_bits(scores, expected[1])
    torch.testing.assert_close(logsumexp.cpu(), expected[2], rtol=2e-6, atol=2e-6)
    assert equal_bits(kappa, expected[3])
    assert torch.equal(kappa_index.cpu(), expected[4])
    again = cuda.gumbel_topk(there[0], k, seed.to(DEVICE) if isinstance(seed, Tensor) else seed, there[1])
    for first, second in zip(found, again, strict=True):
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))


@pytest.mark.parametrize(("batch", "count", "k"), SIZES)
@pytest.mark.parametrize("kind", ["seed", "seed tensor", "noise", "neither"])
def test_equals_the_reference_bit_for_bit(batch: int, count: int, k: int, kind: str) -> None:
    logits = normal(batch, count) * 3
    match kind:
        case "seed":
            check(logits, k, seed=-5)
        case "seed tensor":
            check(logits, k, seed=torch.tensor(2**62 + 7))
        case "noise":
            check(logits, k, noise=normal(1, count, seed=1).expand(batch, count))
        case _:
            check(logits, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_dtypes_are_converted(dtype: torch.dtype) -> None:
    logits = normal(2, 100).to(dtype)
    check(logits, 9, seed=3)
    check(logits, 9, noise=normal(2, 100, seed=1).to(dtype))


def test_strided_rows() -> None:
    whole = normal(3, 210)
    check(whole[:, 1:102], 10, seed=1)
    check(whole[:, ::2], 10, seed=1)
    check(whole[1:2].expand(3, 210), 10, seed=1)


@pytest.mark.parametrize("k", [0, 3, 40])
def test_hostile_values(k: int) -> None:
    logits = torch.zeros(6, 40)
    logits[0] = -INF
    logits[1, ::3] = NAN
    logits[2, 5:] = -INF
    logits[3, 7] = logits[3, 3] = INF
    logits[4] = -0.0
    for seed in (0, None):
        check(logits, k, seed=seed)
    check(logits, k, noise=torch.where(normal(6, 40) > 1, NAN, -INF))


def test_empty() -> None:
    check(torch.empty(0, 5), 2, seed=0)
    check(torch.empty(2, 0), 0, seed=0)


@pytest.mark.parametrize("of_noise", [False, True])
def test_gradient(of_noise: bool) -> None:
    logits, k = normal(3, 50), 6
    logits[0, 4] = NAN
    logits[1, :48] = -INF  # fewer than k are left
    indices, _, logsumexp, _, kappa_index = reference.gumbel_topk(logits, k, 1, None)
    arguments = (indices, kappa_index, logsumexp, normal(3, k), normal(3), normal(3, seed=1), of_noise)
    expected = reference.gumbel_topk_backward(logits, *arguments)
    there = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments]
    found = cuda.gumbel_topk_backward(logits.to(DEVICE), *there)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)


def test_what_is_too_large_is_refused() -> None:
    with pytest.raises(RuntimeError, match="CUDA library: "):
        cuda.gumbel_topk(torch.zeros(1, 5000, device=DEVICE), 4096, 0, None)


def test_unsupported() -> None:
    elsewhere = torch.zeros(1, 70000, dtype=torch.float64)
    assert cuda.unsupported(elsewhere, 4096) == [
        "it runs on CUDA devices, and logits is on cpu",
        "it draws from at most 65536 candidates, got 70000",
        "it draws at most 4095 of more candidates than that, got k = 4096",
    ]
    assert len(cuda.unsupported(torch.zeros(1, 4096), 4096)) == 1


@pytest.mark.gpu
@gpu
def test_the_largest_draws() -> None:
    logits = normal(3, 65536)
    assert cuda.unsupported(logits.cuda(), 2048) == []
    assert len(cuda.unsupported(logits.cuda().double(), 2048)) == 1
    for seed in (1, None):
        check(logits, 2048, seed=seed)
        check(logits * 100, 4095, seed=seed)


@pytest.mark.gpu
@gpu
def test_a_graph_draws_anew_with_a_new_seed() -> None:
    logits, seed = normal(2, 3000).cuda(), torch.tensor(1, device="cuda")
    assert not cuda_library.missing()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices, *_ = cuda.gumbel_topk(logits, 20, seed, None)
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        assert torch.equal(indices.cpu(), reference.gumbel_topk(logits.cpu(), 20, value, None)[0])
