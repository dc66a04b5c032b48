"""transformer_block by the native library: float32 on the CPU, without gradients."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int64, c_void_p

import torch
from torch import Tensor

from icseg_kernels import library
from icseg_kernels.backend import without_gradients
from icseg_kernels.transformer_block.shapes import shapes

# B, N, D, heads, hidden, keys, listed, slots, bytes
_workspace = library.function("icseg_transformer_block_workspace", [c_int64] * 8 + [c_void_p])
# block; memory, how much; out, own
_transformer_block = library.function("icseg_transformer_block_f32", [c_char_p, c_char_p, c_int64, c_void_p, c_void_p])
# icseg_block: weights and biases; eps; D, heads, hidden; tokens, B, N, two strides; index, its bytes, listed, two
# strides; workspace, its bytes, slots
_call_bytes = struct.Struct("=14Q d 3q Q4q Q4q Q2q").pack

MOST_CHANNELS, MOST_HIDDEN = 512, 2048


def unsupported(
    tokens: Tensor,
    memory: Sequence[Tensor],
    weights: Sequence[Tensor],
    heads: int,
    index: Tensor | None,
    autocasting: bool,
) -> list[str]:
    """Why the library cannot serve these tensors."""
    reasons = []
    if not tokens.is_cpu:
        reasons.append(f"it runs on the CPU, and tokens are on {tokens.device}")
    if autocasting:
        reasons.append("it computes in float32, and autocast is enabled")
    elif tokens.dtype != torch.float32:
        reasons.append(f"it computes in float32, and tokens are {tokens.dtype}")
    for i, piece in enumerate(memory):
        if piece.dtype != torch.float32:
            reasons.append(f"it computes in float32, and memory[{i}] is {piece.dtype}")
    reasons += without_gradients("tokens, memory or a weight", (tokens, *memory, *weights))
    width, hidden = tokens.shape[2], weights[10].shape[0]
    if width > MOST_CHANNELS or hidden > MOST_HIDDEN:
        reasons.append(
            f"it takes at most {MOST_CHANNELS} channels and {MOST_HIDDEN} hidden ones, got {width} and {hidden}"
        )
    return reasons


def transformer_block(
    tokens: Tensor, memory: Sequence[Tensor], weights: Sequence[Tensor], heads: int, index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """[B, N, D], pieces [B, M, 2D] -> [B, N, D], [B, N, 2D], contiguous. weights: as in `BlockWeights`."""
    if len(tokens.shape) != 3 or heads < 1:
        raise ValueError(f"tokens must have shape [B, N, D] and heads be positive, got {list(tokens.shape)}, {heads}")
    samples, _, dim = tokens.shape
    _guard("tokens", tokens, tokens.shape)
    if len(weights) != 14 or len(weights[10].shape) != 2:
        raise ValueError(f"weights must be 14, the 11th of [hidden, {dim}], got {len(weights)}")
    for i, (weight, shape) in enumerate(zip(weights, shapes(dim, weights[10].shape[0]), strict=True)):
        _guard(f"weights[{i}]", weight, shape)
    for i, piece in enumerate(memory):
        if len(piece.shape) != 3:
            raise ValueError(f"memory[{i}] must have shape [{samples}, M, {2 * dim}], got {list(piece.shape)}")
        _guard(f"memory[{i}]", piece, (samples, piece.shape[1], 2 * dim))
    if index is not None and (
        not index.is_cpu or index.dtype not in _INTEGERS or len(index.shape) != 2 or index.shape[0] != samples
    ):
        raise ValueError(
            f"index must be int32 or int64 [{samples}, M] on the CPU, got {list(index.shape)} {index.dtype} on "
            f"{index.device}"
        )
    return apply(tokens, memory, weights, heads, index, eps)


_INTEGERS = (torch.int32, torch.int64)


def _guard(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    """The last check before raw pointers: the library reads as much memory as the shapes promise."""
    if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_cpu:
        raise ValueError(
            f"{name} must be float32 {list(shape)} on the CPU, got {list(tensor.shape)} {tensor.dtype} on "
            f"{tensor.device}"
        )


def apply(
    tokens: Tensor, memory: Sequence[Tensor], weights: Sequence[Tensor], heads: int, index: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The same of checked arguments."""
    samples, count, dim = tokens.shape
    stride_batch, stride_token, stride = tokens.stride()
    if stride != 1:
        tokens = tokens.contiguous()
        stride_batch, stride_token, _ = tokens.stride()
    if not all(map(Tensor.is_contiguous, weights)):
        weights = [weight.contiguous() for weight in weights]
    copies = []  # must outlive the call
    pieces: list[int] = []
    keys = count
    for piece in memory:
        more = piece.shape[1]
        keys += more
        piece_batch, piece_token, stride = piece.stride()
        if stride != 1:
            copies.append(piece := piece.contiguous())
            piece_batch, piece_token, _ = piece.stride()
        pieces += (piece.data_ptr(), more, piece_batch, piece_token)
    listed = keys
    lists: tuple[int, ...] = (0, 0, keys, 0, 0)
    if index is not None:
        listed = index.shape[1]
        lists = (index.data_ptr(), index.element_size(), listed, *index.stride())
    slots, hidden = torch.get_num_threads(), weights[10].shape[0]
    size = _workspace_bytes(samples, count, dim, heads, hidden, keys, listed, slots)
    workspace = torch.empty(size, dtype=torch.uint8)
    out, own = tokens.new_empty((samples, count, dim)), tokens.new_empty((samples, count, 2 * dim))
    call = _call_bytes(
        *map(Tensor.data_ptr, weights),
        eps,
        dim,
        heads,
        hidden,
        tokens.data_ptr(),
        samples,
        count,
        stride_batch,
        stride_token,
        *lists,
        workspace.data_ptr(),
        size,
        slots,
    )
    described = _memory_bytes(len(memory)).pack(*pieces)
    if code := _transformer_block(call, described, len(memory), out.data_ptr(), own.data_ptr()):
        library.check(code)
    return out, own


@functools.lru_cache(maxsize=1024)
def _workspace_bytes(*sizes: int) -> int:
    size = c_int64()
    library.check(_workspace(*sizes, byref(size)))
    return size.value


@functools.lru_cache(maxsize=64)
def _memory_bytes(pieces: int) -> struct.Struct:
    return struct.Struct("=" + pieces * "Q3q")  # icseg_block_memory
