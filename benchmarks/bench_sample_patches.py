"""sample_patches: C++ against the chain as it is published, its separable rewrite, and that rewrite compiled."""

import pytest
import torch
import torch.nn.functional as F
from harness import compare, compiled, thread_counts, with_backward
from torch import Tensor

from icseg_kernels import flops, sample_patches
from icseg_kernels.patches.windows import blur_kernel, candidate_grid
from icseg_kernels.philox import gumbel_noise

CASES = [  # B, image side, p, stride, blur sigma, k
    (1, 128, 8, 1, 0.0, 16),
    (1, 256, 16, 1, 1.0, 64),
    (4, 256, 16, 8, 1.0, 64),
    (1, 512, 16, 1, 1.0, 64),
    (1, 512, 16, 8, 1.0, 64),
    (1, 1024, 16, 8, 4.0, 256),
]
FEW_CASES = [CASES[i] for i in (0, 2, 3, 4)]


def random_maps(batch: int, side: int) -> Tensor:
    return torch.rand(batch, 1, side, side, generator=torch.Generator().manual_seed(0))


def rescaled(pooled: Tensor) -> Tensor:
    lowest, highest = pooled.amin((2, 3), keepdim=True), pooled.amax((2, 3), keepdim=True)
    return (pooled - lowest) / (highest - lowest + 1e-6)


def published_logits(weights: Tensor, p: int, stride: int, kernel: Tensor | None) -> Tensor:
    """Square windows and a square kernel, everywhere; then every stride-th."""
    scaled = rescaled(F.max_pool2d(weights, p, 1))
    if kernel is not None:
        square = kernel[:, None] * kernel
        scaled = F.conv2d(scaled, square[None, None], padding=len(kernel) // 2)
    return scaled[:, 0, ::stride, ::stride].flatten(1)


def separable_logits(weights: Tensor, p: int, stride: int, kernel: Tensor | None) -> Tensor:
    """Rows, then columns; the blur only where windows are kept."""
    scaled = rescaled(F.max_pool2d(F.max_pool2d(weights, (1, p), 1), (p, 1), 1))
    if kernel is None:
        return scaled[:, 0, ::stride, ::stride].flatten(1)
    radius = len(kernel) // 2
    down = F.conv2d(scaled, kernel[None, None, :, None], padding=(radius, 0), stride=(stride, 1))
    return F.conv2d(down, kernel[None, None, None], padding=(0, radius), stride=(1, stride)).flatten(1)


def drawn(logits: Tensor, k: int, noise: Tensor | None) -> Tensor:
    """Scores; the noise, if none is given, is torch's."""
    if noise is None:
        noise = -torch.empty_like(logits).exponential_().log()
    return (logits + noise).topk(k)[0]


def published(weights: Tensor, p: int, stride: int, kernel: Tensor | None, k: int, noise: Tensor | None) -> Tensor:
    return drawn(published_logits(weights, p, stride, kernel), k, noise)


def separable(weights: Tensor, p: int, stride: int, kernel: Tensor | None, k: int, noise: Tensor | None) -> Tensor:
    return drawn(separable_logits(weights, p, stride, kernel), k, noise)


compiled_separable = compiled(separable, dynamic=False)
RIVALS = {"eager": published, "separable eager": separable, "separable compiled": compiled_separable}


def taps(sigma: float) -> Tensor | None:
    return torch.tensor(blur_kernel(sigma)) if sigma else None


def name(batch: int, side: int, p: int, stride: int, sigma: float, k: int) -> str:
    return f"B{batch} {side} px p{p} stride {stride} blur {sigma:g} k{k}"


@pytest.mark.quick(case=CASES[1])
@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize("case", CASES, ids=lambda case: name(*case))
def bench_draw(record, case, threads):
    """Everyone's own noise, so that only ours can be compared with each other."""
    batch, side, p, stride, sigma, k = case
    weights, kernel = random_maps(batch, side), taps(sigma)
    rivals = {label: lambda rival=rival: rival(weights, p, stride, kernel, k, None) for label, rival in RIVALS.items()}
    for backend in ("reference", "native"):
        rivals[backend] = lambda backend=backend: (
            sample_patches(weights, k, p, stride=stride, blur_sigma=sigma, seed=1, backend=backend).scores
        )
    row = compare(
        "sample_patches",
        name(*case),
        rivals,
        threads=threads,
        tolerance=0.0,
        same={"native": "reference"},
        bytes=flops.sample_patches_bytes(batch, side * side, k),
    )
    record(row, rivals["native"])


@pytest.mark.parametrize("case", FEW_CASES, ids=lambda case: name(*case))
def bench_plain(record, case):
    """The best k windows: no noise, and everyone's scores are the same."""
    batch, side, p, stride, sigma, k = case
    weights, kernel, none = random_maps(batch, side), taps(sigma), torch.zeros(())
    rivals = {label: lambda rival=rival: rival(weights, p, stride, kernel, k, none) for label, rival in RIVALS.items()}
    rivals["native"] = lambda: (
        sample_patches(weights, k, p, stride=stride, blur_sigma=sigma, noise=0, backend="native").scores
    )
    row = compare("sample_patches", f"plain, {name(*case)}", rivals, threads=1, tolerance=1e-5)
    record(row, rivals["native"])


@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize("case", FEW_CASES, ids=lambda case: name(*case))
def bench_gradient(record, case, threads):
    batch, side, p, stride, sigma, k = case
    weights, kernel = random_maps(batch, side).requires_grad_(), taps(sigma)
    rows, columns = candidate_grid(side, side, p, stride, (0, 0))
    noise = gumbel_noise(1, batch, rows * columns)
    rivals = {
        label: with_backward(lambda weights, rival=rival: rival(weights, p, stride, kernel, k, noise), weights)
        for label, rival in RIVALS.items()
    }
    rivals["native"] = with_backward(
        lambda weights: (
            sample_patches(
                weights, k, p, stride=stride, blur_sigma=sigma, noise=noise, differentiable=True, backend="native"
            ).scores
        ),
        weights,
    )
    row = compare("sample_patches", name(*case), rivals, work="forward + backward", threads=threads, tolerance=1e-2)
    record(row, rivals["native"])
