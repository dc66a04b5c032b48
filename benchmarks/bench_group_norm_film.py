"""group_norm_film: C++ against the reference and against torch's group_norm, gain, bias and GELU, also compiled."""

import pytest
import torch
import torch.nn.functional as F
from harness import compare, compiled, thread_counts, with_backward

from icseg_kernels import flops, group_norm_film

GROUPS = 8
CASES = [  # N, C, side: maps of patches as the published encoder has them, and of whole images
    (64, 256, 8),
    (64, 256, 2),
    (2304, 64, 8),
    (1, 64, 128),
    (1, 64, 512),
]


def by_hand(x: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What one writes without the op."""
    return F.gelu(gain[:, None, None] * F.group_norm(x, GROUPS) + bias[:, None, None])


compiled_by_hand = compiled(by_hand, dynamic=False)


def ours(backend):
    return lambda x, gain, bias: group_norm_film(x, GROUPS, gain, bias, activation="gelu", backend=backend)


@pytest.mark.quick(samples=64, channels=256, side=8, work="forward")
@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize("work", ["forward", "forward + backward"])
@pytest.mark.parametrize(("samples", "channels", "side"), CASES)
def bench_group_norm_film(record, samples, channels, side, work, threads):
    generator = torch.Generator().manual_seed(0)
    backward = work != "forward"
    x = torch.randn(samples, channels, side, side, generator=generator, requires_grad=backward)
    gain, bias = (torch.randn(channels, generator=generator, requires_grad=backward) for _ in range(2))
    rivals = {
        "reference": ours("reference"),
        "torch": by_hand,
        "torch compiled": compiled_by_hand,
        "native": ours("native"),
    }
    inputs = (x, gain, bias)
    runs = {
        name: with_backward(run, *inputs) if backward else (lambda run=run: run(*inputs))
        for name, run in rivals.items()
    }
    case = f"N{samples} C{channels} {side} x {side}"
    # With the gradients, as much again: that of the output in, those of x, gain and bias out.
    least = flops.group_norm_film_bytes(samples, channels, side**2, 2 * channels) * (2 if backward else 1)
    # The gradients of gain and bias are sums over as many values as a channel has.
    tolerance = 1e-5 * (samples * side**2) ** 0.5 if backward else 1e-5
    row = compare("group_norm_film", case, runs, work=work, threads=threads, tolerance=tolerance, bytes=least)
    record(row, runs["native"])
