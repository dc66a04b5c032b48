"""gumbel_topk: C++ against the reference, compiled too, and against the noise and top-k that torch has."""

import pytest
import torch
from harness import compare, compiled, thread_counts, with_backward
from torch import Tensor

from icseg_kernels import flops, gumbel_topk
from icseg_kernels.gumbel_topk import reference

CASES = [  # B, N (the windows of an image of 128 to 1024 pixels, at some stride), k
    (1, 1024, 16),
    (1, 4096, 64),
    (4, 4096, 64),
    (1, 16384, 64),
    (4, 65536, 256),
    (1, 1048576, 256),
]


def random_logits(batch: int, candidates: int) -> Tensor:
    return torch.randn(batch, candidates, generator=torch.Generator().manual_seed(0))


def repeats(batch: int, candidates: int) -> int:
    """Calls a timing: what takes microseconds is called in a row, as in a loop over images."""
    return 20 if batch * candidates < 2**16 else 1


def torch_topk(logits: Tensor, k: int) -> Tensor:
    """What one writes without the op, less -1 for missing draws and ties to the lower index."""
    scores, _ = logits.topk(k + 1)
    return scores[:, :k] + 0 * logits.logsumexp(1, keepdim=True)


def torch_gumbel_topk(logits: Tensor, k: int) -> Tensor:
    """The same with torch's own exponential variates."""
    return torch_topk(logits - torch.empty_like(logits).exponential_().log(), k)


compiled_reference = compiled(lambda logits, k, seed: reference.gumbel_topk(logits, k, seed, None)[1])
compiled_topk = compiled(torch_topk)


@pytest.mark.quick(candidates=16384)
@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize(("batch", "candidates", "k"), CASES)
def bench_draw(record, batch, candidates, k, threads):
    logits, seed = random_logits(batch, candidates), torch.tensor(7)
    rivals = {
        "reference": lambda: gumbel_topk(logits, k, seed=7, backend="reference").scores,
        "reference, compiled": lambda: compiled_reference(logits, k, seed),
        "torch's exponential and topk": lambda: torch_gumbel_topk(logits, k),
        "native": lambda: gumbel_topk(logits, k, seed=7, backend="native").scores,
    }
    row = compare(
        "gumbel_topk",
        f"B{batch} N{candidates} k{k}",
        rivals,
        threads=threads,
        tolerance=1e-5,
        same={"reference, compiled": "reference", "native": "reference"},
        bytes=flops.gumbel_topk_bytes(batch, candidates, k),
        repeats=repeats(batch, candidates),
    )
    record(row, rivals["native"])


@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize(("batch", "candidates", "k"), CASES)
def bench_plain(record, batch, candidates, k, threads):
    logits = random_logits(batch, candidates)
    rivals = {
        "reference": lambda: gumbel_topk(logits, k, noise=0, backend="reference").scores,
        "torch's topk": lambda: torch_topk(logits, k),
        "torch's topk, compiled": lambda: compiled_topk(logits, k),
        "native": lambda: gumbel_topk(logits, k, noise=0, backend="native").scores,
    }
    row = compare(
        "gumbel_topk",
        f"plain, B{batch} N{candidates} k{k}",
        rivals,
        threads=threads,
        tolerance=0.0,
        bytes=flops.gumbel_topk_bytes(batch, candidates, k),
        repeats=repeats(batch, candidates),
    )
    record(row, rivals["native"])


@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize(("batch", "candidates", "k"), CASES[2:5])
def bench_forward_and_backward(record, batch, candidates, k, threads):
    logits = random_logits(batch, candidates).requires_grad_()

    def draw(backend: str, logits: Tensor) -> Tensor:
        drawn = gumbel_topk(logits, k, seed=7, backend=backend)
        return torch.cat([drawn.scores, drawn.logsumexp[:, None]], 1)

    rivals = {
        name: with_backward(lambda logits, name=name: draw(name, logits), logits) for name in ("reference", "native")
    }
    case = f"B{batch} N{candidates} k{k}"
    row = compare(
        "gumbel_topk",
        case,
        rivals,
        work="forward + backward",
        threads=threads,
        tolerance=1e-5,
        repeats=repeats(batch, candidates),
    )
    record(row, rivals["native"])
