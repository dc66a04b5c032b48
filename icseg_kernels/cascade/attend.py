"""attend_patches: the tokens of a level's patches, through all blocks of the transformer, in one launch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from icseg_kernels import triton_launch
from icseg_kernels.transformer_block import BlockWeights
from icseg_kernels.transformer_block.shapes import shapes
from icseg_kernels.transformer_block.triton import LEAST_OF_A_HEAD, MOST_CHANNELS

MOST_BLOCKS = 4
_numbers = itertools.count(1 << 44)  # of launches: no two are alike, nor like what memory is likely to hold


class TokenWeights(NamedTuple):
    """What makes tokens of hidden units: weights [D, inputs] and biases [D], as torch.nn's layers have them.

    token, context: of the first and of the other hidden units; position: [D, 4 N] of the waves of `frequency` [N].
    level, role: [D] each, added. norm: of tokens before the first block; final: after the last. registers: [1, R, D].
    """

    token_weight: Tensor
    token_bias: Tensor
    context_weight: Tensor
    context_bias: Tensor
    position_weight: Tensor
    position_bias: Tensor
    frequency: Tensor
    level: Tensor
    role: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    registers: Tensor
    final_weight: Tensor
    final_bias: Tensor
    norm_eps: float = 1e-5
    final_eps: float = 1e-5


def attend_patches(
    hidden: Tensor,
    coords: Tensor,
    longer_side: int,
    weights: TokenWeights,
    blocks: Sequence[BlockWeights],
    memory: Sequence[Tensor],
    cache: Tensor,
    start: int,
    heads: int,
    *,
    words: Tensor | None = None,
) -> Tensor:
    """Tokens [B, K, D] of K patches, which have seen the memory, earlier tokens, R registers and each other.

    hidden:      [B, K, F] float32, float16 or bfloat16 (in the interpreter float64 too): what the linear layers of
                 tokens and context take.
    coords:      [B, K, 2] int64, the top-left corners (y, x) of the patches, in an image of `longer_side` pixels.
    blocks:      one to four, whose norms have the same eps.
    memory:      [B or 1, M, 2D] for each block: keys and values that come first; or empty.
    cache:       [depth, B, T, 2D]: keys and values of each block. Its rows before `start` are seen as well; those of
                 registers and patches are written from there on.
    words:       [B] int64 of any values, of nothing that runs at the same time; zeros afterwards. None: made.
    All but coords and words are of one dtype, and contiguous, of memory only the last two dimensions.
    One launch; in Triton's interpreter one for the embedding and one for each block, if the tokens of a sample take
    several programs. Programs of a sample wait for each other, so all of them must fit on the device together.
    Raises TypeError or ValueError for what it cannot serve.
    """
    _check(hidden, coords, weights, blocks, memory, cache, start, heads)
    from icseg_kernels.cascade import attend_triton_kernels as kernels

    samples, count, _ = hidden.shape
    device, dtype, dim, registers = hidden.device, hidden.dtype, cache.shape[3] // 2, weights.registers.shape[1]
    tokens = registers + count
    out = hidden.new_empty((samples, count, dim))
    if samples == 0 or tokens == 0:
        return out
    programs = -(-tokens // kernels.BLOCK_TOKENS)
    if tokens > (most := most_tokens(device)):
        raise ValueError(f"tokens of a sample must be at most {most} here, got {tokens}")
    stages, together = len(blocks) + 1, programs == 1 or not triton_launch.INTERPRETED
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    options = kernels.attend_options(
        len(blocks), dim, heads, blocks[0].mlp_in_weight.shape[0], registers, weights.token_weight.shape[1],
        weights.context_weight.shape[1], weights.frequency.shape[0], dtype, tf32, together,
    )  # fmt: skip
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    residual = hidden.new_empty((samples, tokens, dim), dtype=wide)
    queries, scratch = hidden.new_empty((samples, tokens, dim)), hidden.new_empty((samples, tokens, dim))
    if words is None:
        words = hidden.new_empty(samples, dtype=torch.int64)
    _guard("words", words, (samples,), hidden, torch.int64)
    number = next(_numbers)
    pieces = list(memory) or [cache[0]] * len(blocks)
    missing = MOST_BLOCKS - len(blocks)
    of_blocks = [
        tensor for tensors in zip(*(block[:14] for block in blocks), strict=True)
        for tensor in (*tensors, *[tensors[-1]] * missing)
    ]  # fmt: skip
    for first, last in [(0, stages)] if together else [(stage, stage + 1) for stage in range(stages)]:
        triton_launch.launch(
            kernels.attend_kernel, (samples * programs,), device,
            hidden, coords, longer_side, weights.registers if registers else out,
            weights.token_weight, weights.token_bias, weights.context_weight, weights.context_bias,
            weights.position_weight, weights.position_bias, weights.frequency, weights.level, weights.role,
            weights.norm_weight, weights.norm_bias, weights.norm_eps,
            weights.final_weight, weights.final_bias, weights.final_eps,
            *of_blocks, blocks[0].eps,
            *pieces, *[pieces[-1]] * missing, _sample_stride(pieces[0]), pieces[0].shape[1] if memory else 0,
            cache, cache.stride(0), _sample_stride(cache[0]), start,
            # Scores are exponents of 2, and have their factors from the queries.
            residual, queries, scratch, words, out, number, (dim // heads) ** -0.5 / math.log(2), count, first, last,
            **options,
        )  # fmt: skip
    if not together:
        words.zero_()
    return out


def most_tokens(device: torch.device) -> int:
    """Of a sample: as many as programs that run at the same time take."""
    from icseg_kernels.cascade.attend_triton_kernels import BLOCK_TOKENS

    if device.type != "cuda":
        return 1 << 30
    return int(torch.cuda.get_device_properties(device).multi_processor_count) * BLOCK_TOKENS


def _sample_stride(rows: Tensor) -> int:
    return 0 if rows.shape[0] == 1 else rows.stride(0)


def _check(
    hidden: Tensor, coords: Tensor, weights: TokenWeights, blocks: Sequence[BlockWeights], memory: Sequence[Tensor],
    cache: Tensor, start: int, heads: int,
) -> None:  # fmt: skip
    """The last before raw pointers: the kernel reads and writes as much memory as the shapes promise."""
    if reasons := [
        *triton_launch.unsupported_device("hidden", hidden),
        *triton_launch.unsupported_dtype("hidden", hidden),
    ]:
        raise ValueError("; ".join(reasons))
    if hidden.ndim != 3 or cache.ndim != 4 or weights.registers.ndim != 3:
        raise ValueError(
            f"hidden must be [B, K, F], cache [depth, B, T, 2D] and registers [1, R, D], got {list(hidden.shape)}, "
            f"{list(cache.shape)} and {list(weights.registers.shape)}"
        )
    samples, count, features = hidden.shape
    depth, _, room, dim = *cache.shape[:3], cache.shape[3] // 2
    registers, token_terms = weights.registers.shape[1], weights.token_weight.shape[-1]
    frequencies = weights.frequency.shape[-1]
    if not 1 <= depth == len(blocks) <= MOST_BLOCKS or len(memory) not in (0, depth):
        raise ValueError(
            f"blocks must be 1 to {MOST_BLOCKS}, as many as cache has, and memory as many or none, got {len(blocks)}, "
            f"{depth} and {len(memory)}"
        )
    width = dim // heads if heads > 0 and dim % heads == 0 else 0
    if dim > MOST_CHANNELS or width < LEAST_OF_A_HEAD or width & (width - 1):
        raise ValueError(
            f"D must be at most {MOST_CHANNELS}, a power of two of at least {LEAST_OF_A_HEAD} a head, got {dim} in "
            f"{heads} heads"
        )
    if not 0 <= start <= room - registers - count:
        raise ValueError(f"cache must have room for rows {start} to {start + registers + count}, got {room}")
    if any(block.eps != blocks[0].eps for block in blocks):
        raise ValueError(f"eps must be that of all blocks, got {[block.eps for block in blocks]}")
    _guard("coords", coords, (samples, count, 2), hidden, torch.int64)
    _guard("hidden", hidden, hidden.shape, hidden)
    expected = (
        (dim, token_terms), (dim,), (dim, features - token_terms), (dim,), (dim, 4 * frequencies), (dim,),
        (frequencies,), *[(dim,)] * 4, (1, registers, dim), (dim,), (dim,),
    )  # fmt: skip
    for name, weight, shape in zip(TokenWeights._fields[:14], weights[:14], expected, strict=True):
        _guard(f"weights.{name}", weight, shape, hidden)
    inner = blocks[0].mlp_in_weight.shape[0]
    for i, block in enumerate(blocks):
        for name, weight, shape in zip(BlockWeights._fields[:14], block[:14], shapes(dim, inner), strict=True):
            _guard(f"blocks[{i}].{name}", weight, shape, hidden)
    of_samples = (memory[0].shape[0], memory[0].shape[1]) if memory and memory[0].ndim == 3 else (samples, 0)
    if of_samples[0] not in (1, samples):
        raise ValueError(f"memory must be of 1 or {samples} samples, got {of_samples[0]}")
    for i, piece in enumerate(memory):
        _guard(f"memory[{i}]", piece, (*of_samples, 2 * dim), hidden, rows=True)
        if _sample_stride(piece) != _sample_stride(memory[0]):
            raise ValueError("memory must have the same strides for all blocks")
    _guard("cache", cache, (depth, samples, room, 2 * dim), hidden)


def _guard(
    name: str, tensor: Tensor, shape: Sequence[int], hidden: Tensor, dtype: torch.dtype | None = None, *,
    rows: bool = False,
) -> None:  # fmt: skip
    """rows: only the last two dimensions must be contiguous."""
    dtype = hidden.dtype if dtype is None else dtype
    if tensor.dtype != dtype or tensor.device != hidden.device:
        raise TypeError(f"{name} must be {dtype} on {hidden.device}, got {tensor.dtype} on {tensor.device}")
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    whole = tensor.is_contiguous()
    if rows and not whole and tensor.numel():
        *_, row, unit = tensor.stride()
        whole = unit == 1 and (row == shape[-1] or shape[-2] == 1)
    if not whole:
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
