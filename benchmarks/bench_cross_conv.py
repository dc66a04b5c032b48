"""cross_conv2d: UniverSeg's cross convolution, whole, and what follows its convolutions, against plain PyTorch."""

import functools

import pytest
import torch
import torch.nn.functional as F
from harness import compare, compiled, thread_counts, with_backward

from icseg_kernels import cross_conv2d, cross_conv2d_mean, flops
from icseg_kernels.cross_conv import cross_conv2d_and_mean

CHANNELS = 64
CASES = [(1, 8, 128), (1, 8, 256)]  # B, supports, side
TAILS = [(1, 8, 32), *CASES, (4, 4, 128), (1, 2, 512)]


def pairs_by_hand(zx, zy):
    return F.leaky_relu(zx[:, :, None] + zy[:, None])


def mean_by_hand(zx, zy):
    return pairs_by_hand(zx, zy).mean(dim=2)


def sums_and_mean_by_hand(zx, zy):
    pairs = zx[:, :, None] + zy[:, None]
    return pairs, pairs.mean(dim=2)


COMPILED = {form: compiled(form, dynamic=False) for form in (pairs_by_hand, mean_by_hand, sums_and_mean_by_hand)}


def tail(zx, zy, *, pairs, mean, activation, backend):
    return torch.ops.icseg.cross_conv2d_tail(zx, zy, pairs, mean, activation, 0.01, backend)


def convolutions(batch, supports, side):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, n, CHANNELS, side, side, generator=generator) for n in (1, supports)]


@pytest.mark.quick(side=32, wanted="sums and mean")
@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize("wanted", ["pairs", "mean", "sums and mean"])
@pytest.mark.parametrize(("batch", "supports", "side"), TAILS)
def bench_tail(record, batch, supports, side, wanted, threads):
    """Into new memory each; the op itself adds in place where nobody watches."""
    zx, zy = convolutions(batch, supports, side)
    settings = {
        "pairs": {"pairs": True, "mean": False, "activation": "leaky_relu"},
        "mean": {"pairs": False, "mean": True, "activation": "leaky_relu"},
        "sums and mean": {"pairs": True, "mean": True, "activation": None},
    }[wanted]
    by_hand = {"pairs": pairs_by_hand, "mean": mean_by_hand, "sums and mean": sums_and_mean_by_hand}[wanted]
    kept = {"pairs": slice(0, 1), "mean": slice(1, 2), "sums and mean": slice(0, 2)}[wanted]
    fast = COMPILED[by_hand]
    rivals = {
        "torch": lambda: by_hand(zx, zy),
        "torch compiled": lambda: fast(zx, zy),
        "native": lambda: tail(zx, zy, **settings, backend="native")[kept],
    }
    image = CHANNELS * side**2 * 4
    written = {"pairs": supports, "mean": 1, "sums and mean": supports + 1}[wanted]
    case = f"B{batch} S{supports} {side} px {wanted}"
    least = batch * (1 + supports + written) * image
    record(compare("cross_conv2d tail", case, rivals, threads=threads, tolerance=1e-5, bytes=least), rivals["native"])


# With gradients the smooth one: at the kink of leaky_relu, rounding alone decides which side a sum is on.
ACTIVATIONS = {"forward": "leaky_relu", "forward + backward": "gelu"}


def by_hand(activation, x, y, weight, bias):
    """What one writes: every pair concatenated."""
    batch, supports = y.shape[:2]
    pairs = torch.cat([x.expand(-1, supports, -1, -1, -1), y], dim=2).flatten(0, 1)
    sums = F.conv2d(pairs, weight, bias, padding=1)
    return getattr(F, activation)(sums).unflatten(0, (batch, supports))[:, None]


def split(activation, x, y, weight, bias):
    """The same without the pairs, in plain PyTorch."""
    return getattr(F, activation)(cross_conv2d(x, y, weight, bias, backend="reference"))


compiled_split = compiled(split, dynamic=False)


def ours(activation, x, y, weight, bias):
    return cross_conv2d(x, y, weight, bias, activation=activation, backend="native")


def weights():
    generator = torch.Generator().manual_seed(1)
    weight = 0.03 * torch.randn(CHANNELS, 2 * CHANNELS, 3, 3, generator=generator)
    return weight, torch.randn(CHANNELS, generator=generator)


@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize(
    ("batch", "supports", "side", "work"),
    [(*CASES[0], "forward"), (*CASES[0], "forward + backward"), (*CASES[1], "forward")],
)
def bench_cross_conv2d(record, batch, supports, side, work, threads):
    backward = work != "forward"
    inputs = [t.requires_grad_(backward) for t in (*convolutions(batch, supports, side), *weights())]
    forms = {"concatenated": by_hand, "split": split, "split compiled": compiled_split, "native": ours}
    rivals = {name: functools.partial(form, ACTIVATIONS[work]) for name, form in forms.items()}
    runs = {
        name: with_backward(run, *inputs) if backward else functools.partial(run, *inputs)
        for name, run in rivals.items()
    }
    case = f"B{batch} S{supports} {side} px {ACTIVATIONS[work]}"
    # Gradients of the weight sum that many terms: the concatenated form itself lies 8e-8 of them from float64's.
    tolerance = 3e-7 * batch * supports * side**2 if backward else 1e-4
    rounds = 5 if side > 128 else None
    shape = (3, 3), (side, side)
    count = flops.cross_conv2d_flops(batch, 1, supports, CHANNELS, CHANNELS, CHANNELS, *shape)
    least = flops.cross_conv2d_bytes(batch, 1, supports, CHANNELS, CHANNELS, CHANNELS, *shape, (side, side))
    concatenated = 2 * batch * supports * 2 * CHANNELS * CHANNELS * 9 * side**2
    row = compare(
        "cross_conv2d",
        case,
        runs,
        work=work,
        threads=threads,
        tolerance=tolerance,
        rounds=rounds,
        flops={} if backward else dict.fromkeys(runs, count) | {"concatenated": concatenated},
        bytes=0 if backward else least,
    )
    record(row, runs["native"])


@pytest.mark.quick(side=128, wanted="pairs and mean")
@pytest.mark.parametrize("threads", thread_counts())
@pytest.mark.parametrize("wanted", ["pairs and mean", "mean"])
@pytest.mark.parametrize(("batch", "supports", "side"), CASES)
def bench_cross_conv2d_mean(record, batch, supports, side, wanted, threads):
    """Pairs and mean as a block of UniverSeg needs them, and the mean alone, as its last one does."""
    x, y = convolutions(batch, supports, side)
    weight, bias = weights()

    def separately():
        pairs = cross_conv2d(x, y, weight, bias, backend="reference")
        return pairs, pairs.mean(dim=2)

    def mean_of_supports():
        return cross_conv2d(x, y.mean(dim=1, keepdim=True), weight, bias, backend="reference").squeeze(2)

    if wanted == "mean":
        rivals = {
            "sums, then mean": lambda: separately()[1],
            "sum with the mean": mean_of_supports,
            "native": lambda: cross_conv2d_mean(x, y, weight, bias, backend="native"),
        }
    else:
        rivals = {
            "sums, then mean": separately,
            "native": lambda: cross_conv2d_and_mean(x, y, weight, bias, backend="native"),
        }
    case = f"B{batch} S{supports} {side} px {wanted}"
    sizes = batch, 1, supports, CHANNELS, CHANNELS, CHANNELS, (3, 3), (side, side)
    counts = dict.fromkeys(rivals, flops.cross_conv2d_flops(*sizes))
    least = flops.cross_conv2d_bytes(*sizes, (side, side), mean=wanted == "mean")
    if wanted == "mean":
        of_mean = flops.cross_conv2d_mean_flops(batch, 1, *sizes[3:])
        counts |= {"sum with the mean": of_mean, "native": of_mean}
    else:
        least += batch * CHANNELS * side**2 * 4  # the mean, beside the pairs
    row = compare("cross_conv2d, mean", case, rivals, threads=threads, tolerance=1e-4, flops=counts, bytes=least)
    record(row, rivals["native"])
