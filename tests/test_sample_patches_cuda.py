"""sample_patches by the CUDA library, against the reference on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_on_cpu import DEVICE, gpu, served  # noqa: F401
from torch import Tensor

from icseg_kernels.patches import sample_cuda, sample_reference
from icseg_kernels.patches.windows import Windows, candidate_grid

INF, NAN = float("inf"), float("nan")
# patch size, stride, before, after, temperature, sigma of the blur
SETTINGS = [
    Windows(4, 1, 0, 0, 1.0, 0.0),
    Windows(1, 3, 0, 0, 0.3, 0.0),
    Windows(8, 6, 1, 1, 0.1, 1.0),
    Windows(5, 2, 1, 3, 7.0, 4.0),
    Windows(13, 1, 6, 7, 0.003, 0.3),
]

pytestmark = pytest.mark.usefixtures("served")


def random_map(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def check(weights: Tensor, k: int, windows: Windows, seed: Any = None, noise: Tensor | None = None) -> None:
    """`weights`, `seed` and `noise` on the CPU. The sign of a zero score is free."""
    expected = sample_reference.sample_patches(weights, k, windows, seed, noise)
    there = windows
    if isinstance(windows.temperature, Tensor):
        there = windows._replace(temperature=windows.temperature.to(DEVICE))
    seed = seed.to(DEVICE) if isinstance(seed, Tensor) else seed
    noise = None if noise is None else noise.to(DEVICE)
    for _ in range(2):
        found = sample_cuda.sample_patches(weights.to(DEVICE), k, there, seed, noise)
        for name, x, wanted in zip(("coords", "scores", "indices"), found, expected, strict=True):
            assert x.dtype == wanted.dtype, name
            assert torch.equal(x.cpu(), wanted), name


def candidates(weights: Tensor, windows: Windows) -> int:
    size, stride, before, after, *_ = windows
    rows, columns = candidate_grid(weights.shape[2], weights.shape[3], size, stride, (before, after))
    return rows * columns


@pytest.mark.parametrize("windows", SETTINGS)
@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (1, 1, 19, 70)])
@pytest.mark.parametrize("kind", ["seed", "seed tensor", "noise", "neither"])
def test_equals_the_reference_bit_for_bit(windows: Windows, shape: tuple[int, ...], kind: str) -> None:
    weights = random_map(*shape)
    k = min(11, candidates(weights, windows))
    match kind:
        case "seed":
            check(weights, k, windows, seed=7)
        case "seed tensor":
            check(weights, k, windows, seed=torch.tensor(-(2**40)))
        case "noise":
            noise = torch.linspace(0, 1, candidates(weights, windows)).expand(shape[0], -1)
            check(weights, k, windows, noise=noise)
        case _:
            check(weights, k, windows)


def test_temperature_may_be_a_tensor() -> None:
    windows = SETTINGS[2]._replace(temperature=torch.tensor(0.3, dtype=torch.float64))
    check(random_map(1, 1, 20, 20), 4, windows, seed=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_dtypes_are_converted(dtype: torch.dtype) -> None:
    check(random_map(2, 1, 20, 20).to(dtype), 4, SETTINGS[2], seed=1)


def test_strided_maps() -> None:
    whole = random_map(2, 3, 24, 40)
    check(whole[:, 1:2, 2:, ::2], 5, SETTINGS[2], seed=1)
    check(whole[:, :1].transpose(2, 3), 5, SETTINGS[2], seed=1)
    check(whole[:1, :1].expand(3, 1, 24, 40), 5, SETTINGS[2], seed=1)


def test_hostile_maps() -> None:
    weights = random_map(5, 1, 15, 18)
    weights[0, 0, 3:5] = NAN
    weights[1, 0, 2, 2], weights[1, 0, 2, 3] = INF, -INF
    weights[2] = NAN
    weights[3] = 0.25
    weights[4] -= 3
    for windows in SETTINGS:
        check(weights, 2, windows, seed=1)


def test_all_windows_and_none() -> None:
    weights = random_map(2, 1, 10, 12)
    check(weights, candidates(weights, SETTINGS[0]), SETTINGS[0], seed=1)
    check(weights, 0, SETTINGS[0], seed=1)
    check(weights[:0], 3, SETTINGS[0], seed=1)


def test_unsupported() -> None:
    reasons = sample_cuda.unsupported(random_map(1, 1, 140, 150), 900, Windows(8, 4, 2, 2, 1.0, 40.0), 5000, True)
    assert reasons == [
        "it runs on CUDA devices, and weights is on cpu",
        "it keeps at most 20480 pixels of a padded map, got 22176",
        "it draws at most 4096 windows, got k = 5000",
        "it blurs with at most 127 taps, and blur_sigma needs 161",
        "it has no gradients",
    ]
    with pytest.raises(RuntimeError, match="CUDA library: "):
        sample_cuda.sample_patches(random_map(1, 1, 140, 150).to(DEVICE), 5, SETTINGS[0], 0, None)


@pytest.mark.gpu
@gpu
def test_the_largest_maps() -> None:
    weights, windows = random_map(3, 1, 128, 140), Windows(16, 1, 2, 2, 0.1, 2.0)
    assert sample_cuda.unsupported(weights.cuda(), 1, windows, 2048, False) == []
    check(weights, 2048, windows, seed=1)
    check(weights, 4096, windows)


@pytest.mark.gpu
@gpu
def test_a_graph_draws_anew_with_a_new_seed() -> None:
    weights, seed = random_map(2, 1, 64, 64).cuda(), torch.tensor(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, _, indices = sample_cuda.sample_patches(weights, 20, SETTINGS[2], seed, None)
    for value in (5, 6):
        seed.fill_(value)
        graph.replay()
        expected = sample_reference.sample_patches(weights.cpu(), 20, SETTINGS[2], value, None)
        assert torch.equal(indices.cpu(), expected[2])
