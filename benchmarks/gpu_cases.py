"""The ops' benchmark cases on a GPU: inputs, rivals, and how much each must move and compute at least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from icseg_kernels import (
    BlockWeights,
    ConvLayer,
    Rotation,
    cross_conv2d_mean,
    flops,
    gather_patches,
    group_norm_film,
    gumbel_topk,
    halvings,
    qkv_projection,
    sample_patches,
    scatter_patches,
    selected_attention,
    small_convolutions,
    transformer_block,
    upsample_with_patches,
)
from icseg_kernels.transformer_block.native import shapes

Run = Callable[[], Sequence[Tensor]]
OURS = ("cuda", "triton")


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    make:      device -> rivals by name, with inputs of their own; "eager" is the reference that the others must equal.
    bytes, flops: the least traffic and the arithmetic of one call, by `icseg_kernels.flops`.
    tolerance: largest relative error, ||out - eager|| / ||eager||; 0: equal bits.
    """

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[torch.device], dict[str, Run]]
    bytes: int
    flops: int
    tolerance: float


def cases() -> list[Case]:
    """All of them, smallest first in each op."""
    return [
        *(draw_case(*sizes) for sizes in [(1, 4096, 64), (4, 16384, 64), (16, 65536, 256)]),
        *(sample_case(*sizes) for sizes in [(1, 128, 8, 64), (4, 256, 16, 64), (16, 256, 16, 64)]),
        *(gather_case(*sizes) for sizes in [(2, 4, 128, 64, 8), (36, 4, 256, 64, 16), (256, 4, 1024, 256, 16)]),
        *(resample_case(*sizes) for sizes in [(1, 1, 512, 64, 16), (16, 4, 512, 64, 16)]),
        *(scatter_case(*sizes) for sizes in [(1, 4, 128, 64, 8), (4, 4, 256, 64, 16), (16, 4, 1024, 256, 16)]),
        *(upsample_case(*sizes) for sizes in [(1, 1, 512, 64), (16, 3, 1024, 64)]),
        *(halvings_case(*sizes) for sizes in [(1, 512), (64, 1024)]),
        *(attention_case(*sizes) for sizes in [(1, 60, 60), (4, 256, 256), (16, 256, 256), (4, 1024, 1024)]),
        *(attention_case(*sizes, listed=True) for sizes in [(1, 256, 512), (4, 256, 1024), (16, 1024, 2048)]),
        *(attention_case(*sizes, listed=True, gradients=True) for sizes in [(4, 256, 512), (16, 1024, 1024)]),
        *(qkv_case(*sizes) for sizes in [(1, 320, 256), (16, 320, 256), (16, 1024, 1024)]),
        *(qkv_case(*sizes, gradients=True) for sizes in [(16, 320, 256), (16, 1024, 1024)]),
        *(block_case(*sizes) for sizes in [(1, 68, 300), (16, 68, 300), (64, 68, 300)]),
        *(norm_case(*sizes) for sizes in [(64, 64, 16), (16, 64, 256)]),
        *(convolutions_case(count) for count in (64, 4096)),
        *(cross_case(*sizes) for sizes in [(1, 3, 128), (4, 16, 128)]),
    ]


def normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def corners(device: torch.device, size: int, patch: int, *shape: int) -> Tensor:
    """int32 [*shape, 2], everywhere in images of `size`, some beyond the border."""
    found = torch.randint(-patch // 2, size - patch // 2, (*shape, 2), generator=torch.Generator().manual_seed(1))
    return found.to(device, torch.int32)


def rivals(op: Callable[..., object], compiled: bool = True) -> dict[str, Run]:
    """The reference, that compiled, and our own backends; `op` takes `backend` alone."""
    eager = partial(_listed, op, "reference")
    found: dict[str, Run] = {"eager": eager}
    if compiled:
        found["compiled"] = torch.compile(eager, dynamic=False)
    return found | {name: partial(_listed, op, name) for name in OURS}


def _listed(op: Callable[..., object], backend: str) -> list[Tensor]:
    found = op(backend=backend)
    return [t for t in (found if isinstance(found, tuple | list) else (found,)) if isinstance(t, Tensor)]


def draw_case(batch: int, candidates: int, k: int) -> Case:
    def make(device: torch.device) -> dict[str, Run]:
        logits, seed = normal(device, batch, candidates), torch.tensor(7, device=device)
        return rivals(lambda backend: gumbel_topk(logits, k, seed=seed, backend=backend)[:2])

    count, work = flops.gumbel_topk_bytes(batch, candidates, k), flops.gumbel_topk_flops(batch, candidates)
    return Case("gumbel_topk", f"B{batch} n{candidates} k{k}", torch.float32, make, count, work, 0.0)


def sample_case(batch: int, side: int, patch: int, k: int) -> Case:
    def make(device: torch.device) -> dict[str, Run]:
        map_, seed = normal(device, batch, 1, side, side).sigmoid(), torch.tensor(7, device=device)
        return rivals(
            lambda backend: sample_patches(map_, k, patch, blur_sigma=1.0, temperature=0.3, seed=seed, backend=backend)[
                :3
            ]
        )

    grid = (side - patch + 1, side - patch + 1)
    count = flops.sample_patches_bytes(batch, side * side, k)
    work = flops.sample_patches_flops(batch, grid, grid, 5)
    return Case("sample_patches", f"B{batch} {side} px p{patch} k{k}", torch.float32, make, count, work, 0.0)


def gather_case(images: int, channels: int, side: int, k: int, patch: int) -> Case:
    def make(device: torch.device) -> dict[str, Run]:
        source, coords = normal(device, images, channels, side, side), corners(device, side, patch, images, k)
        return rivals(lambda backend: gather_patches(source, coords, patch, backend=backend))

    count = flops.gather_patches_bytes(images, k, channels, patch)
    return Case("gather_patches", f"{images} x {channels}x{side} px K{k} p{patch}", torch.float32, make, count, 0, 0.0)


def resample_case(images: int, channels: int, side: int, k: int, patch: int) -> Case:
    def make(device: torch.device) -> dict[str, Run]:
        source, coords = normal(device, images, channels, side, side), corners(device, side, patch, images, k)
        return rivals(lambda backend: gather_patches(source, coords, 2 * patch, out_size=patch, backend=backend))

    count = flops.gather_patches_bytes(images, k, channels, 2 * patch, patch)
    work = flops.gather_patches_flops(images, k, channels, patch, bilinear=True)
    shape = f"{images} x {channels}x{side} px K{k} {2 * patch} to {patch}"
    return Case("gather_patches", shape, torch.float32, make, count, work, 1e-6)


def scatter_case(batch: int, channels: int, side: int, k: int, patch: int) -> Case:
    def make(device: torch.device) -> dict[str, Run]:
        patches, coords = normal(device, batch, k, channels, patch, patch), corners(device, side, patch, batch, k)
        return rivals(
            lambda backend: (
                scatter_patches(patches, coords, (side, side), weight="gaussian", fill=0.0, backend=backend).mean
            )
        )

    count = flops.scatter_patches_bytes(batch, k, channels, patch, side, side)
    work = flops.scatter_patches_flops(batch, k, channels, patch, side, side)
    shape = f"B{batch} {channels}x{side} px K{k} p{patch}"
    return Case("scatter_patches", shape, torch.float32, make, count, work, 1e-6)


def upsample_case(batch: int, channels: int, side: int, k: int) -> Case:
    def make(device: torch.device) -> dict[str, Run]:
        coarser = normal(device, batch, channels, side // 2, side // 2)
        patches, coords = normal(device, batch, k, channels, 8, 8), corners(device, side, 8, batch, k)
        return rivals(lambda backend: upsample_with_patches(coarser, patches, coords, (side, side), backend=backend))

    count = flops.upsample_with_patches_bytes(batch, k, channels, 64, side, side)
    return Case("upsample_with_patches", f"B{batch} {channels}x{side} px K{k}", torch.float32, make, count, 0, 1e-6)


def halvings_case(images: int, side: int) -> Case:
    def make(device: torch.device) -> dict[str, Run]:
        image = normal(device, images, 1, side, side)

        def run(backend: str) -> list[Tensor]:
            means, deviations = halvings(image, 6, deviations=4, backend=backend)
            return [*means, *deviations]

        return rivals(run)

    count = flops.halvings_bytes(images, 1, side, side, 6, 4)
    return Case("halvings", f"{images} x {side} px", torch.float32, make, count, 0, 1e-5)


def attention_case(batch: int, queries: int, keys: int, *, listed: bool = False, gradients: bool = False) -> Case:
    """Four heads of 64 channels; `listed`: half of the keys, in any order, beside gathering them for torch's own."""
    heads, dim = 4, 64
    count = keys // 2 if listed else keys

    def make(device: torch.device) -> dict[str, Run]:
        tokens = [
            normal(device, batch, n, heads, dim, dtype=torch.bfloat16, seed=i).transpose(1, 2)
            for i, n in enumerate((queries, keys, keys))
        ]
        q, k, v = (t.detach().requires_grad_(gradients) for t in tokens)
        generator = torch.Generator().manual_seed(2)
        lists = torch.stack([torch.randperm(keys, generator=generator)[:count] for _ in range(batch)]).to(device)
        index = lists if listed else None

        def ours(backend: str) -> list[Tensor]:
            return with_gradients(selected_attention(q, k, v, index=index, backend=backend))

        def by_sdpa() -> list[Tensor]:
            if index is None:
                return with_gradients(F.scaled_dot_product_attention(q, k, v))
            rows = index[:, None, :, None].expand(-1, heads, -1, dim)
            return with_gradients(F.scaled_dot_product_attention(q, k.gather(2, rows), v.gather(2, rows)))

        def with_gradients(out: Tensor) -> list[Tensor]:
            return [out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))] if gradients else [out]

        return rivals(ours, compiled=not gradients) | {"SDPA": by_sdpa}

    moved = flops.selected_attention_bytes(batch, heads, queries, count, dim, dim, 2)
    work = flops.selected_attention_flops(batch, heads, queries * count, dim, dim)
    if gradients:
        moved, work = (
            3 * moved,
            work + flops.selected_attention_backward_flops(batch, heads, queries * count, dim, dim),
        )
    of = f" of {keys} listed" if listed else ""
    shape = f"B{batch} h{heads} Nq{queries} Nk{count}{of} D{dim}{' with gradients' if gradients else ''}"
    return Case("selected_attention", shape, torch.bfloat16, make, moved, work, 2e-2)


def qkv_case(batch: int, tokens: int, channels: int, *, gradients: bool = False) -> Case:
    """As the published model has them: two layers, norm, kinds of tokens, rotation; heads of 64 channels."""
    width, heads = 64, channels // 64

    def make(device: torch.device) -> dict[str, Run]:
        shapes_ = (
            (batch, tokens, channels),
            (channels, channels),
            (2 * channels, channels),
            (channels,),
            (2 * channels,),
        )
        scales = 1, channels**-0.5, channels**-0.5, 1, 1
        leaves = [
            (scale * normal(device, *shape, dtype=torch.bfloat16, seed=i)).requires_grad_(gradients)
            for i, (shape, scale) in enumerate(zip(shapes_, scales, strict=True))
        ]
        x, query, key_value, *biases = leaves
        gain, shift = (normal(device, channels, dtype=torch.bfloat16, seed=i).requires_grad_(gradients) for i in (5, 6))
        kinds = normal(device, tokens, channels, dtype=torch.bfloat16, seed=7)
        angles = normal(device, batch, tokens, heads, width // 2, seed=8).transpose(1, 2)
        turn = Rotation(angles.cos(), angles.sin())
        leaves += [gain, shift]

        def run(backend: str) -> list[Tensor]:
            out = qkv_projection(
                x, [query, key_value], biases, heads=heads, norm=(gain, shift), added=kinds, rotary=(turn, turn),
                backend=backend,
            )  # fmt: skip
            if not gradients:
                return list(out)
            return [*(t.detach() for t in out), *torch.autograd.grad(sum(t.sum() for t in out), leaves)]

        return rivals(run, compiled=not gradients)

    moved = flops.qkv_projection_bytes(batch, tokens, channels, heads, width, itemsize=2)
    work = flops.qkv_projection_flops(batch, tokens, channels, heads, width)
    if gradients:
        moved, work = 3 * moved, 3 * work
    shape = f"B{batch} N{tokens} C{channels} h{heads}{' with gradients' if gradients else ''}"
    return Case("qkv_projection", shape, torch.bfloat16, make, moved, work, 2e-2)


def block_case(batch: int, tokens: int, memory: int) -> Case:
    """As the sparse model has them: 128 channels, 4 heads, two pieces of memory."""
    dim, hidden = 128, 256

    def make(device: torch.device) -> dict[str, Run]:
        weights = [
            normal(device, *shape, dtype=torch.bfloat16, seed=i) / shape[-1] ** 0.5
            for i, shape in enumerate(shapes(dim, hidden))
        ]
        block = BlockWeights(*weights)
        x = normal(device, batch, tokens, dim, dtype=torch.bfloat16)
        pieces = [normal(device, batch, n, 2 * dim, dtype=torch.bfloat16) for n in (memory - memory // 3, memory // 3)]

        def run(backend: str) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                return transformer_block(x, pieces, block, heads=4, backend=backend)

        return rivals(run)

    moved = flops.transformer_block_bytes(batch, tokens, memory, dim, hidden, 2)
    work = flops.transformer_block_flops(batch, tokens, memory + tokens, dim, hidden)
    return Case("transformer_block", f"B{batch} N{tokens} memory {memory}", torch.bfloat16, make, moved, work, 2e-2)


def norm_case(samples: int, channels: int, side: int) -> Case:
    def make(device: torch.device) -> dict[str, Run]:
        x = normal(device, samples, channels, side, side, dtype=torch.bfloat16)
        gain, bias = (normal(device, samples, channels, dtype=torch.bfloat16, seed=i) for i in (1, 2))
        return rivals(lambda backend: group_norm_film(x, 8, gain, bias, activation="gelu", backend=backend))

    moved = flops.group_norm_film_bytes(samples, channels, side * side, 2 * samples * channels, 2)
    return Case("group_norm_film", f"{samples} x {channels}x{side} px", torch.bfloat16, make, moved, 0, 2e-2)


def convolutions_case(count: int) -> Case:
    """The stem of the sparse model: four 3 x 3 convolutions of 16 x 16 pixels, 3 to 24 channels."""
    layers = [(12, 3, 1, 0), (16, 3, 1, 0), (24, 3, 1, 0), (24, 3, 1, 0)]

    def make(device: torch.device) -> dict[str, Run]:
        x = normal(device, count, 3, 16, 16, dtype=torch.bfloat16)
        stack, channels = [], 3
        for outputs, kernel, stride, padding in layers:
            weight = normal(device, outputs, channels, kernel, kernel, dtype=torch.bfloat16) / (9 * channels) ** 0.5
            stack.append(ConvLayer(weight, None, stride, padding, False, 0.05))
            channels = outputs

        def run(backend: str) -> Tensor:
            with torch.no_grad():
                return small_convolutions(x, stack, backend=backend)

        return rivals(run)

    moved = flops.small_convolutions_bytes(count, 3, 16, 16, layers, 2)
    work = flops.small_convolutions_flops(count, 3, 16, 16, layers)
    return Case("small_convolutions", f"{count} x 3x16 px, four 3 x 3", torch.bfloat16, make, moved, work, 2e-2)


def cross_case(batch: int, support: int, side: int, channels: int = 64) -> Case:
    def make(device: torch.device) -> dict[str, Run]:
        x = normal(device, batch, 1, channels, side, side, dtype=torch.bfloat16)
        y = normal(device, batch, support, channels, side, side, dtype=torch.bfloat16, seed=1)
        weight = normal(device, channels, 2 * channels, 3, 3, dtype=torch.bfloat16, seed=2) / (18 * channels) ** 0.5
        return rivals(lambda backend: cross_conv2d_mean(x, y, weight, padding=1, backend=backend))

    sizes, kernel = (side, side), (3, 3)
    moved = flops.cross_conv2d_bytes(
        batch, 1, support, channels, channels, channels, kernel, sizes, sizes, mean=True, itemsize=2
    )
    work = flops.cross_conv2d_mean_flops(batch, 1, channels, channels, channels, kernel, sizes)
    return Case(
        "cross_conv2d_mean", f"B{batch} S{support} {channels}x{side} px", torch.bfloat16, make, moved, work, 2e-2
    )
