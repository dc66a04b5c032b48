"""The cases of `benchmarks.compare`; and, as a program, the worker that runs them on one revision's packages.

They use the public API alone, `icseg` and `icseg_kernels`, imported when a case is made, so that old revisions can run
those that they have. Inputs are seeded. The worker takes requests and gives replies as JSON, one a line, by its
standard input and output; it ends with its input.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[], Sequence[Tensor]]

MISSING = (AttributeError, TypeError, ImportError)
"""What a case raises where its revision has not all that it calls."""
WARM_SECONDS = 0.01


def cases() -> dict[str, Callable[[], Run]]:
    """By name: a function that makes inputs and gives what is timed, which returns the outputs."""
    return dict(_named())


def _named() -> Iterator[tuple[str, Callable[[], Run]]]:
    works = (("forward", False), ("forward + backward", True))
    for batch, candidates, k in [(1, 1024, 16), (4, 4096, 64), (4, 65536, 256)]:
        for work, backward in works:
            yield f"gumbel_topk B{batch} N{candidates} k{k}, {work}", partial(draw, batch, candidates, k, backward)
    for batch, side, p, stride, sigma, k in [(1, 128, 8, 1, 0.0, 16), (1, 512, 16, 8, 1.0, 64)]:
        for work, backward in works:
            name = f"sample_patches B{batch} {side} px p{p} stride {stride} k{k}, {work}"
            yield name, partial(sample, batch, side, p, stride, sigma, k, backward)
    for batch, channels, side, count, p in [(1, 1, 128, 16, 8), (1, 4, 512, 256, 16)]:
        for work, backward in works:
            size = f"B{batch} C{channels} {side} px K{count} p{p}"
            yield f"gather_patches {size}, {work}", partial(gather, batch, channels, side, count, p, p, backward)
            yield (
                f"gather_patches resampled {size}, {work}",
                partial(gather, batch, channels, side, count, p, 1.25 * p, backward),
            )
    for batch, channels, side, count, p in [(1, 1, 128, 16, 16), (1, 4, 512, 64, 8)]:
        for work, backward in works:
            name = f"scatter_patches B{batch} C{channels} {side} px K{count} p{p}, {work}"
            yield name, partial(scatter, batch, channels, side, count, p, backward)
    for side, count in [(256, 64), (1024, 256)]:
        yield f"upsample_with_patches {side} px K{count}, forward", partial(upsample, side, count)
    for side in (256, 1024):
        yield f"halvings {side} px, forward", partial(halve, side)
    for tokens in (60, 256, 1024):
        for work, backward in works:
            yield f"selected_attention N{tokens} all keys, {work}", partial(attend, tokens, False, backward)
            yield f"selected_attention N{tokens} half of the keys, {work}", partial(attend, tokens, True, backward)
    for tokens, channels in [(60, 256), (1024, 256)]:
        for work, backward in works:
            yield f"qkv_projection N{tokens} C{channels}, {work}", partial(project, tokens, channels, backward)
    for batch, tokens, memory in [(1, 10, (120, 30)), (1, 60, (180, 10, 20, 40)), (16, 52, ())]:
        name = f"transformer_block B{batch} N{tokens} memory {sum(memory)}, forward"
        yield name, partial(block, batch, tokens, memory)
    for count in (16, 100):
        yield f"small_convolutions N{count}, forward", partial(convolve, count)
    for samples, channels, side in [(64, 256, 8), (1, 64, 128)]:
        for work, backward in works:
            name = f"group_norm_film N{samples} C{channels} {side} px, {work}"
            yield name, partial(normalise, samples, channels, side, backward)
    for supports, side in [(8, 32), (4, 64)]:
        for work, backward in works:
            yield f"cross_conv2d S{supports} {side} px, {work}", partial(cross, supports, side, backward)
        yield f"cross_conv2d_mean S{supports} {side} px, forward", partial(cross_mean, supports, side)
    for side in (128, 256):
        yield f"sparse model {side} px, cold", partial(segment, side, False)
        yield f"sparse model {side} px, with memory", partial(segment, side, True)


def kernels() -> ModuleType:
    import icseg_kernels

    return icseg_kernels


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def corners(batch: int, count: int, side: int, p: int) -> Tensor:
    """int32 [batch, count, 2], of patches that lie inside."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, side - p + 1, (batch, count, 2), generator=generator, dtype=torch.int32)


def timed_part(op: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence[Tensor], backward: bool) -> Run:
    """op(*inputs); `backward`: with the gradients of all inputs, for fixed ones of the floating-point outputs."""
    given = [x.requires_grad_(backward) for x in inputs]
    gradients: list[Tensor] = []

    def run() -> Sequence[Tensor]:
        output = op(*given)
        outputs = [output] if isinstance(output, Tensor) else list(output)
        if not backward:
            return outputs
        if not gradients:
            gradients.extend(normal(*x.shape, seed=9 + i) for i, x in enumerate(outputs))
        return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, given, gradients)]

    return run


def draw(batch: int, candidates: int, k: int, backward: bool) -> Run:
    op = kernels().gumbel_topk
    return timed_part(lambda x: op(x, k, seed=7).scores, [normal(batch, candidates)], backward)


def sample(batch: int, side: int, p: int, stride: int, sigma: float, k: int, backward: bool) -> Run:
    op = partial(kernels().sample_patches, stride=stride, blur_sigma=sigma, seed=1, differentiable=backward)
    return timed_part(lambda x: op(x, k, p).scores, [normal(batch, 1, side, side).sigmoid()], backward)


def gather(batch: int, channels: int, side: int, count: int, p: int, extent: float, backward: bool) -> Run:
    """Copies of patches, or `extent` pixels resampled to p."""
    op, coords = kernels().gather_patches, corners(batch, count, side, p)
    settings = {} if extent == p else {"out_size": p}
    return timed_part(lambda x: op(x, coords, extent, **settings), [normal(batch, channels, side, side)], backward)


def scatter(batch: int, channels: int, side: int, count: int, p: int, backward: bool) -> Run:
    op, coords = kernels().scatter_patches, corners(batch, count, side, p)
    patches = normal(batch, count, channels, p, p)
    return timed_part(lambda x: op(x, coords, (side, side), fill=0.0).mean, [patches], backward)


def upsample(side: int, count: int, p: int = 8) -> Run:
    """Patches of a grid, each at a place of its own."""
    op, across = kernels().upsample_with_patches, side // p
    cells = torch.randperm(across**2, generator=torch.Generator().manual_seed(1))[:count]
    coords = torch.stack([cells // across, cells % across], -1)[None] * p
    inputs = [normal(1, 1, side // 2, side // 2), normal(1, count, 1, p, p, seed=2)]
    return timed_part(lambda coarser, patches: op(coarser, patches, coords, (side, side)), inputs, False)


def halve(side: int) -> Run:
    op, count = kernels().halvings, side.bit_length() - 4  # down to 8 pixels

    def flat(image: Tensor) -> list[Tensor]:
        means, deviations = op(image, count, deviations=count - 2)
        return [*means, *deviations]

    return timed_part(flat, [normal(1, 1, side, side)], False)


def attend(tokens: int, listed: bool, backward: bool, heads: int = 4, width: int = 64) -> Run:
    """To all keys, or to a list of half of them."""
    op = kernels().selected_attention
    half = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))[None, : tokens // 2]
    inputs = [normal(1, tokens, heads, width, seed=i).transpose(1, 2) for i in range(3)]
    return timed_part(partial(op, index=half if listed else None), inputs, backward)


def project(tokens: int, channels: int, backward: bool, heads: int = 4) -> Run:
    """With a norm before and a rotation after, as the published model has it."""
    op = kernels().qkv_projection
    angles = normal(1, tokens, heads, channels // heads // 2, seed=8).transpose(1, 2)
    turn = kernels().Rotation(angles.cos(), angles.sin())
    x, bias, gain, shift = normal(1, tokens, channels), *(normal(n, seed=n) for n in (3 * channels, channels, channels))
    weight = channels**-0.5 * normal(3 * channels, channels, seed=2)

    def run(x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, shift: Tensor) -> Sequence[Tensor]:
        return op(x, weight, bias, heads=heads, norm=(gain, shift), rotary=(turn, turn))

    return timed_part(run, [x, weight, bias, gain, shift], backward)


def block(batch: int, tokens: int, memory: Sequence[int], dim: int = 128, hidden: int = 256) -> Run:
    op = kernels().transformer_block
    sizes = {
        "norm_attention_weight": (dim,),
        "norm_attention_bias": (dim,),
        "query_weight": (dim, dim),
        "query_bias": (dim,),
        "key_value_weight": (2 * dim, dim),
        "key_value_bias": (2 * dim,),
        "out_weight": (dim, dim),
        "out_bias": (dim,),
        "norm_mlp_weight": (dim,),
        "norm_mlp_bias": (dim,),
        "mlp_in_weight": (hidden, dim),
        "mlp_in_bias": (hidden,),
        "mlp_out_weight": (dim, hidden),
        "mlp_out_bias": (dim,),
    }
    tensors = {name: normal(*s, seed=i) / s[-1] ** 0.5 for i, (name, s) in enumerate(sizes.items())}
    weights = kernels().BlockWeights(**tensors)
    pieces = [normal(batch, n, 2 * dim, seed=n) for n in memory]
    return timed_part(lambda x: op(x, pieces, weights, heads=4), [normal(batch, tokens, dim)], False)


def convolve(count: int) -> Run:
    """The stem of the sparse model: four 3 x 3 convolutions of patches of 16 x 16 pixels."""
    op, layers, inputs = kernels().small_convolutions, [], 3
    for i, outputs in enumerate((12, 16, 24, 24)):
        weight = normal(outputs, inputs, 3, 3, seed=i) / (9 * inputs) ** 0.5
        layers.append(kernels().ConvLayer(weight, normal(outputs, seed=i), negative_slope=0.01))
        inputs = outputs
    return timed_part(lambda x: op(x, layers), [normal(count, 3, 16, 16)], False)


def normalise(samples: int, channels: int, side: int, backward: bool) -> Run:
    op = kernels().group_norm_film
    inputs = [normal(samples, channels, side, side), normal(channels, seed=1), normal(channels, seed=2)]
    return timed_part(lambda x, gain, bias: op(x, 8, gain, bias, activation="gelu"), inputs, backward)


def cross(supports: int, side: int, backward: bool) -> Run:
    """Smooth: at a kink, rounding alone would decide the gradient."""
    op = partial(kernels().cross_conv2d, activation="gelu")
    return timed_part(op, crossed(supports, side), backward)


def cross_mean(supports: int, side: int) -> Run:
    return timed_part(kernels().cross_conv2d_mean, crossed(supports, side), False)


def crossed(supports: int, side: int, channels: int = 64) -> list[Tensor]:
    weight = 0.03 * normal(channels, 2 * channels, 3, 3, seed=1)
    return [*(normal(1, n, channels, side, side, seed=n) for n in (1, supports)), weight, normal(channels, seed=2)]


def segment(side: int, remembered: bool) -> Run:
    """The bundled model: a blurred disk in noise, three support pairs; `remembered`: encoded before."""
    import icseg

    model = icseg.PatchICL.from_pretrained()
    images, masks = zip(*(disk(side, seed) for seed in range(4)), strict=True)
    target = images[0][None]
    support = torch.stack(images[1:])[None], torch.stack(masks[1:])[None]
    memory = model.encode_support(*support) if remembered else None

    def run() -> Sequence[Tensor]:
        output = model(target, *support) if memory is None else model(target, memory=memory)
        return [output.logits]

    return run


def disk(side: int, seed: int) -> tuple[Tensor, Tensor]:
    """An image and its mask, each [1, side, side]."""
    generator = torch.Generator().manual_seed(seed)
    row, column, radius = (torch.tensor([0.3, 0.3, 0.1]) + torch.rand(3, generator=generator) * 0.3).tolist()
    place = (torch.arange(side) + 0.5) / side
    inside = ((place[:, None] - row) ** 2 + (place - column) ** 2).sqrt() < radius
    noise = F.interpolate(torch.rand(1, 1, side // 8, side // 8, generator=generator), (side, side), mode="bilinear")
    return (0.5 * noise[0] + 0.4 * inside).clamp(0, 1), inside[None].float()


class Worker:
    """Makes each case once and keeps it."""

    def __init__(self) -> None:
        self.cases = cases()
        self.runs: dict[str, Run] = {}

    def reply(self, request: dict[str, Any]) -> dict[str, Any]:
        """What a request asks for: "prepare" or "time" a case."""
        return getattr(self, request.pop("do"))(**request)

    def prepare(self, case: str, outputs: str) -> dict[str, Any]:
        """Make a case and save its outputs as .npz: seconds of a call, or why this revision lacks it."""
        try:
            run = self.cases[case]()
            found = run()
        except MISSING as error:
            return {"lacks": f"{type(error).__name__}: {error}".splitlines()[0]}
        np.savez(outputs, *(x.detach().numpy() for x in found))
        self.runs[case] = run
        return {"seconds": min(_seconds(run, 1) for _ in range(3))}

    def time(self, case: str, repeats: int) -> dict[str, Any]:
        """Seconds of a call; before, some that do not count: the other worker has used the caches and the cores."""
        run, start = self.runs[case], time.perf_counter()
        run()
        while time.perf_counter() - start < WARM_SECONDS:
            run()
        return {"seconds": _seconds(run, repeats)}


def _seconds(run: Run, repeats: int) -> float:
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    finally:
        gc.enable()


def about() -> dict[str, Any]:
    """Where the packages come from, what built their library (None where that cannot be asked), and the threads."""
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "root": None, "library": None}
    try:
        import icseg_kernels

        found["root"] = str(Path(icseg_kernels.__file__ or "").resolve().parent.parent)
        from icseg_kernels import library

        found["library"] = library.build()
    except (*MISSING, OSError):
        pass
    return found


def main() -> None:
    # What packages print must not come between the replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    print(json.dumps(about()), file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        with torch.inference_mode(mode=not request["case"].endswith("backward")):
            try:
                reply = worker.reply(request)
            except Exception as error:
                reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
