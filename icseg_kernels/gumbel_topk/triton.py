"""gumbel_topk by Triton kernels. Indices and scores equal the reference bit for bit.

One launch for rows of up to 8192 elements and k below 512; longer rows take two. A larger k takes one more, or a sort.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from icseg_kernels import triton_launch
from icseg_kernels.numerics import accumulation_dtype

_MOST_CANDIDATES = 2**31 - 2**15  # so that no index of a tile overflows int32
RANKED_AT_ONCE = 512  # survivors that the drawing kernel ranks by itself
_RANKED = 16384  # more are sorted


class Corners(NamedTuple):
    """How an index becomes a corner (y, x) of a grid of windows."""

    columns: int
    stride: int
    before: int
    no_patch: int


class Draw(NamedTuple):
    """Outputs of a draw, and the survivors [B, 2, k + 1] that it is ranked from; None where they are not wanted."""

    survivors: Tensor
    indices: Tensor
    scores: Tensor
    logsumexp: Tensor | None
    kappa: Tensor | None
    kappa_index: Tensor | None
    coords: Tensor | None


def unsupported(logits: Tensor, k: int) -> list[str]:
    """Why the kernels cannot draw from `logits`."""
    reasons = triton_launch.unsupported_device("logits", logits) + triton_launch.unsupported_dtype("logits", logits)
    return reasons + unsupported_count(logits.shape[1])


def unsupported_count(count: int) -> list[str]:
    """Why the kernels cannot draw from `count` candidates."""
    if count > _MOST_CANDIDATES:
        return [f"it draws from at most {_MOST_CANDIDATES} candidates, got {count}"]
    return []


def gumbel_topk(
    logits: Tensor, k: int, seed: int | Tensor | None, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the reference's. Inputs are read where they lie."""
    draw = outputs(logits, k, probabilities=True)
    draw_into(draw, logits, seed, noise)
    _, indices, scores, *of_rows, _ = draw
    logsumexp, kappa, kappa_index = cast(list[Tensor], of_rows)
    return indices, scores, logsumexp, kappa, kappa_index


def outputs(like: Tensor, k: int, *, probabilities: bool = False, coords: bool = False) -> Draw:
    """Empty outputs for rows of `like` [B, ...]."""
    batch, device, dtype = like.shape[0], like.device, accumulation_dtype(like.dtype)
    return Draw(
        torch.empty(batch, 2, k + 1, dtype=dtype, device=device),
        torch.empty(batch, k, dtype=torch.int64, device=device),
        torch.empty(batch, k, dtype=dtype, device=device),
        torch.empty(batch, dtype=dtype, device=device) if probabilities else None,
        torch.empty(batch, dtype=dtype, device=device) if probabilities else None,
        torch.empty(batch, dtype=torch.int64, device=device) if probabilities else None,
        torch.empty(batch, k, 2, dtype=torch.int32, device=device) if coords else None,
    )


def noise_arguments(seed: int | Tensor | None, noise: Tensor | None) -> tuple[str, tuple[Any, ...], tuple[int, int]]:
    """(kind, (noise, seed, its low and high word), strides of noise) as the kernels take them.

    An integer seed is two int32 words, so that no value of it compiles anew.
    """
    if noise is not None:
        return "given", (noise, None, 0, 0), (noise.stride(0), noise.stride(1))
    if seed is None:
        return "none", (None, None, 0, 0), (0, 1)
    if isinstance(seed, Tensor):
        return "pointer", (None, seed, 0, 0), (0, 1)
    return "words", (None, None, (int(seed) + 2**31) % 2**32 - 2**31, int(seed) >> 32), (0, 1)


def draw_into(
    draw: Draw, logits: Tensor, seed: int | Tensor | None, noise: Tensor | None, corners: Corners | None = None
) -> None:
    """Launch the draw from logits [B, N] into `draw`."""
    from icseg_kernels.gumbel_topk import triton_kernels as kernels

    batch, count = logits.shape
    k = draw.indices.shape[1]
    device = logits.device
    dtype = triton_launch.triton_dtype(draw.scores.dtype)
    kind, source, noise_strides = noise_arguments(seed, noise)
    strides = (*logits.stride(), *noise_strides)
    ranked = k < RANKED_AT_ONCE
    written = (draw.indices, draw.scores, draw.logsumexp, draw.kappa, draw.kappa_index, draw.coords)
    columns, stride, before, no_patch = corners if corners is not None else Corners(1, 1, 0, 0)
    grid = (columns, stride, before)
    tile, warps = kernels.tile_of(count)
    options: dict[str, Any] = {"TILE": tile, "RANKS": kernels.RANKS, "DTYPE": dtype}
    launch: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    last: dict[str, Any] = {"RANKED": ranked, "NO_PATCH": no_patch}
    if count <= kernels.LARGEST_TILE:
        triton_launch.launch(
            kernels.draw_kernel,
            (batch,),
            device,
            logits,
            *source,
            draw.survivors,
            *written,
            count,
            k,
            *strides,
            *grid,
            NOISE=kind,
            **options,
            **last,
            **launch,
        )
    else:
        chunks, kept = -(-count // tile), min(k + 1, tile)
        candidates = torch.empty(batch, 2, chunks * kept, dtype=draw.scores.dtype, device=device)
        sums = None if draw.logsumexp is None else torch.empty(batch, 2, chunks, dtype=candidates.dtype, device=device)
        triton_launch.launch(
            kernels.filter_kernel,
            (batch * chunks,),
            device,
            logits,
            *source,
            candidates,
            sums,
            count,
            kept,
            chunks,
            *strides,
            NOISE=kind,
            **options,
            **launch,
        )
        options["TILE"], launch["num_warps"] = kernels.tile_of_merge(chunks * kept)
        triton_launch.launch(
            kernels.merge_kernel,
            (batch,),
            device,
            candidates,
            sums,
            draw.survivors,
            *written,
            chunks * kept,
            chunks,
            k,
            *grid,
            IN_TILE=chunks * kept <= kernels.MERGED_AT_ONCE,
            **options,
            **last,
            **launch,
        )
    if ranked:
        return
    survivors = draw.survivors
    if k >= _RANKED:
        # Counting who comes before each would take k^2 steps. A stable sort keeps the lower of equal indices first.
        scores, order = survivors[:, 0].sort(dim=1, descending=True, stable=True)
        index = survivors[:, 1].gather(1, order)
        survivors = torch.stack([scores, index], 1)
    blocks = -(-(k + 1) // kernels.RANKS)
    triton_launch.launch(
        kernels.rank_kernel,
        (batch * blocks,),
        device,
        survivors,
        draw.indices,
        draw.scores,
        draw.kappa,
        draw.kappa_index,
        draw.coords,
        k,
        blocks,
        *grid,
        RANKS=kernels.RANKS,
        SORTED=k >= _RANKED,
        NO_PATCH=no_patch,
        num_warps=8,
        enable_fp_fusion=False,
    )


def gumbel_topk_backward(
    logits: Tensor,
    indices: Tensor,
    kappa_index: Tensor,
    logsumexp: Tensor,
    grad_scores: Tensor,
    grad_logsumexp: Tensor,
    grad_kappa: Tensor,
    of_noise: bool,
) -> Tensor:
    """As the reference's, in one launch; an index that does not exist goes nowhere, and one drawn twice counts once."""
    from icseg_kernels.gumbel_topk import triton_kernels as kernels

    batch, count = logits.shape
    grad = torch.empty(batch, count, dtype=logsumexp.dtype, device=logits.device)
    blocks = -(-count // kernels.BACKWARD_BLOCK)
    triton_launch.launch(
        kernels.backward_kernel,
        (batch * blocks,),
        logits.device,
        logits,
        *(x.contiguous() for x in (indices, kappa_index, logsumexp, grad_scores, grad_logsumexp, grad_kappa)),
        grad,
        count,
        indices.shape[1],
        blocks,
        *logits.stride(),
        BLOCK=kernels.BACKWARD_BLOCK,
        RANKS=kernels.RANKS,
        OF_NOISE=of_noise,
        DTYPE=triton_launch.triton_dtype(grad.dtype),
        enable_fp_fusion=False,
    )
    return grad
