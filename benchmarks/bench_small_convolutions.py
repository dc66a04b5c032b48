"""small_convolutions: C++ against torch's convolutions, one after the other, also of channels-last images."""

import pytest
import torch
import torch.nn.functional as F
from harness import compare, thread_counts

from icseg_kernels import ConvLayer, flops, small_convolutions

# Input channels and side; output channels, kernel, stride, padding, replicate, leaky ReLU: as encoders of patches and
# heads have them.
STACKS = {
    "four 3 x 3, 3 to 24 channels": (
        3,
        16,
        [
            (12, 3, 1, 0, False, True),
            (16, 3, 1, 0, False, True),
            (24, 3, 1, 0, False, True),
            (24, 3, 1, 0, False, True),
        ],
    ),
    "4 x 4 stride 2, 32 to 48": (32, 16, [(48, 4, 2, 1, False, True)]),
    "3 x 3 and 1 x 1, 56 to 20": (56, 16, [(32, 3, 1, 1, True, True), (20, 1, 1, 0, False, False)]),
    "3 x 3, 4 to 20": (4, 16, [(20, 3, 1, 1, True, True)]),
    "3 x 3 and 1 x 1, 20 to 2": (20, 16, [(20, 3, 1, 1, True, True), (2, 1, 1, 0, False, False)]),
    "4 x 4 stride 2, 1 to 8": (1, 16, [(8, 4, 2, 1, False, True)]),
    "two 4 x 4 stride 2, 3 to 32": (3, 16, [(16, 4, 2, 1, False, True), (32, 4, 2, 1, False, True)]),
}
COUNTS = (16, 100)


def by_hand(x: torch.Tensor, layers: list[ConvLayer]) -> torch.Tensor:
    """What one writes without the op."""
    for layer in layers:
        padding = layer.padding
        if layer.replicate:
            x, padding = F.pad(x, (padding,) * 4, mode="replicate"), 0
        x = F.conv2d(x, layer.weight, layer.bias, layer.stride, padding)
        if layer.negative_slope is not None:
            x = F.leaky_relu(x, layer.negative_slope)
    return x


@pytest.mark.quick(name="four 3 x 3, 3 to 24 channels", count=100)
@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", STACKS)
def bench_small_convolutions(record, name, count, threads):
    channels, side, rows = STACKS[name]
    generator = torch.Generator().manual_seed(0)
    x, layers, inputs = torch.randn(count, channels, side, side, generator=generator), [], channels
    for outputs, kernel, stride, padding, replicate, leaky in rows:
        weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator) / (inputs * kernel**2) ** 0.5
        bias = torch.randn(outputs, generator=generator)
        layers.append(ConvLayer(weight, bias, stride, padding, replicate, 0.01 if leaky else None))
        inputs = outputs
    last = [layer._replace(weight=layer.weight.to(memory_format=torch.channels_last)) for layer in layers]
    x_last = x.to(memory_format=torch.channels_last)
    runs = {
        "torch": lambda: by_hand(x, layers),
        "torch, channels last": lambda: by_hand(x_last, last),
        "native": lambda: small_convolutions(x, layers, backend="native"),
    }
    least = flops.small_convolutions_bytes(count, channels, side, side, [row[:4] for row in rows])
    work = flops.small_convolutions_flops(count, channels, side, side, [row[:4] for row in rows])
    case = f"N{count} {name}"
    with torch.no_grad():
        row = compare(
            "small_convolutions",
            case,
            runs,
            threads=threads,
            tolerance=1e-4,
            flops=dict.fromkeys(runs, work),
            bytes=least,
        )
        record(row, runs["native"])
