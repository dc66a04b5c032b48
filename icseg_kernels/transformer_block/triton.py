"""transformer_block by Triton: two launches, without gradients."""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from icseg_kernels import triton_launch
from icseg_kernels.backend import without_gradients
from icseg_kernels.transformer_block.shapes import shapes

MOST_CHANNELS, LEAST_OF_A_HEAD = 256, 16


def _too_old(version: str) -> list[str]:
    """Why the kernels do not compile: products of three dimensions inside a loop, before 3.3."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) >= (3, 3):
        return []
    return [f"it needs Triton 3.3 or newer, got {version}"]


def _version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # missing, or installed under another name
        return "unknown"


_missing = [*triton_launch.missing(), *_too_old(_version())]


def missing() -> list[str]:
    """Why the kernels cannot serve any call on this machine."""
    return list(_missing)


def unsupported(
    tokens: Tensor,
    memory: Sequence[Tensor],
    weights: Sequence[Tensor],
    heads: int,
    index: Tensor | None,
    autocasting: bool,
) -> list[str]:
    """Why the kernels cannot serve these tensors."""
    reasons = triton_launch.unsupported_device("tokens", tokens)
    if autocasting:
        reasons.append("it computes in the dtype of tokens, and autocast is enabled")
    else:
        reasons += triton_launch.unsupported_dtype("tokens", tokens)
    for i, piece in enumerate(memory):
        if piece.dtype != tokens.dtype:
            reasons.append(f"memory must have the dtype of tokens, {tokens.dtype}, and memory[{i}] is {piece.dtype}")
    reasons += without_gradients("tokens, memory or a weight", (tokens, *memory, *weights))
    if limit := _limit(tokens.shape[2], heads):
        reasons.append(limit)
    return reasons


def _limit(dim: int, heads: int) -> str | None:
    width = dim // heads
    if dim <= MOST_CHANNELS and width >= LEAST_OF_A_HEAD and not width & (width - 1):
        return None
    return (
        f"it takes at most {MOST_CHANNELS} channels, a power of two of at least {LEAST_OF_A_HEAD} a head, "
        f"got {dim} in {heads} heads"
    )


def transformer_block(
    tokens: Tensor, memory: Sequence[Tensor], weights: Sequence[Tensor], heads: int, index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """[B, N, D], pieces [B, M, 2D] -> [B, N, D], [B, N, 2D], contiguous. weights: as in `BlockWeights`."""
    if len(tokens.shape) != 3 or heads < 1 or tokens.shape[2] % heads:
        raise ValueError(f"tokens must have shape [B, N, D] and heads divide D, got {list(tokens.shape)}, {heads}")
    samples, _, dim = tokens.shape
    if limit := _limit(dim, heads):
        raise ValueError(limit)
    if reasons := [
        *triton_launch.unsupported_device("tokens", tokens),
        *triton_launch.unsupported_dtype("tokens", tokens),
    ]:
        raise ValueError("; ".join(reasons))
    if len(weights) != 14 or len(weights[10].shape) != 2:
        raise ValueError(f"weights must be 14, the 11th of [hidden, {dim}], got {len(weights)}")
    for i, (weight, shape) in enumerate(zip(weights, shapes(dim, weights[10].shape[0]), strict=True)):
        _guard(f"weights[{i}]", weight, shape, tokens)
    for i, piece in enumerate(memory):
        if len(piece.shape) != 3:
            raise ValueError(f"memory[{i}] must have shape [{samples}, M, {2 * dim}], got {list(piece.shape)}")
        _guard(f"memory[{i}]", piece, (samples, piece.shape[1], 2 * dim), tokens)
    if index is not None and (
        index.device != tokens.device
        or index.dtype not in _INTEGERS
        or len(index.shape) != 2
        or index.shape[0] != samples
    ):
        raise ValueError(
            f"index must be int32 or int64 [{samples}, M] on {tokens.device}, got {list(index.shape)} {index.dtype} on "
            f"{index.device}"
        )
    return apply(tokens, memory, weights, heads, index, eps)


_INTEGERS = (torch.int32, torch.int64)


def _guard(name: str, tensor: Tensor, shape: Sequence[int], tokens: Tensor) -> None:
    """The last check before raw pointers: the kernels read as much memory as the shapes promise."""
    if tensor.shape != shape or tensor.dtype != tokens.dtype or tensor.device != tokens.device:
        raise ValueError(
            f"{name} must be {tokens.dtype} {list(shape)} on {tokens.device}, got {list(tensor.shape)} {tensor.dtype} "
            f"on {tensor.device}"
        )


def apply(
    tokens: Tensor, memory: Sequence[Tensor], weights: Sequence[Tensor], heads: int, index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The same of checked arguments.

    Copied are tokens, memory and index whose last dimension has gaps, memory whose rows do not follow each other, and
    what starts its rows or samples at no multiple of 16 elements, which would be compiled for anew and read slowly.
    """
    from icseg_kernels.transformer_block import triton_kernels as kernels

    samples, count, dim = tokens.shape
    out, own = tokens.new_empty((samples, count, dim)), tokens.new_empty((samples, count, 2 * dim))
    if samples == 0 or count == 0:
        return out, own
    device, dtype, hidden = tokens.device, tokens.dtype, weights[10].shape[0]
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    batch_stride, token_stride, stride = tokens.stride()
    if samples == 1:
        batch_stride = 0  # whatever torch says
    if stride != 1 or batch_stride % 16 or token_stride % 16:
        tokens = tokens.contiguous()
        batch_stride, token_stride = count * dim, dim
    pieces = [piece for piece in memory if piece.shape[1]]
    if len(pieces) > kernels.MOST_PIECES:
        last = kernels.MOST_PIECES - 1
        pieces[last:] = [torch.cat(pieces[last:], 1)]
    strides, starts, memory_end = [], [], 0
    for i, piece in enumerate(pieces):
        batch, stride_row, stride = piece.stride()
        batch = 0 if samples == 1 else batch
        if stride != 1 or stride_row != 2 * dim or batch % 16:
            pieces[i] = piece = piece.contiguous()
            batch = piece.shape[1] * 2 * dim
        strides.append(batch)
        starts.append(memory_end)
        memory_end += piece.shape[1]
    listed, index_stride = memory_end + count, 0
    if index is not None:
        if index.stride(1) != 1:
            index = index.contiguous()
        listed, index_stride = index.shape[1], index.stride(0)
    weights = [weight if weight.is_contiguous() else weight.contiguous() for weight in weights]
    norm_weight, norm_bias, query_weight, query_bias, key_value_weight, key_value_bias, *later = weights

    # Scores are exponents of 2, and have their factors from the queries.
    scale = (dim // heads) ** -0.5 / math.log(2)
    queries = torch.empty_like(out)
    options = kernels.project_options(samples * count, dim, dtype, tf32)
    grid = -(-samples * count // options["BLOCK_TOKENS"]), 3 * -(-dim // options["BLOCK_OUTPUTS"])
    triton_launch.launch(
        kernels.project_kernel, grid, device,
        tokens, batch_stride, token_stride, norm_weight, norm_bias, query_weight, query_bias, key_value_weight,
        key_value_bias, queries, own, eps, scale, samples, count, **options,
    )  # fmt: skip

    options = kernels.attend_options(samples, count, dim, heads, hidden, len(pieces), dtype, tf32)
    empty, absent = options["PIECES"] - len(pieces), kernels.MOST_PIECES - options["PIECES"]
    triton_launch.launch(
        kernels.attend_kernel, (samples * -(-count // options["BLOCK_TOKENS"]),), device,
        tokens, batch_stride, token_stride, queries, own, index, index_stride, out, *later, eps,
        count, listed, memory_end,
        *pieces, *[own] * empty, *[None] * absent,
        *strides, *[0] * empty, *[None] * absent,
        *[*starts, *[memory_end] * empty, *[None] * absent][1:], **options,
    )  # fmt: skip
    return out, own
