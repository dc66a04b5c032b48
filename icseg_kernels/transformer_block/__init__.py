"""transformer_block: attention of few tokens to a memory and to each other, and an MLP, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icseg_kernels import backend as backends
from icseg_kernels import checks, flops, library, triton_launch
from icseg_kernels.transformer_block import native, reference, triton
from icseg_kernels.transformer_block.shapes import shapes

__all__ = ["BlockWeights", "transformer_block"]


class BlockWeights(NamedTuple):
    """Weights [outputs, inputs] and biases [outputs] of a block of D channels, as torch.nn's layers have them.

    norm_attention, norm_mlp: [D] each; query, out: [D, D]; key_value: [2D, D], the keys' rows first; mlp_in: [H, D];
    mlp_out: [D, H]. eps: of both norms, added to the variance.
    """

    norm_attention_weight: Tensor
    norm_attention_bias: Tensor
    query_weight: Tensor
    query_bias: Tensor
    key_value_weight: Tensor
    key_value_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    norm_mlp_weight: Tensor
    norm_mlp_bias: Tensor
    mlp_in_weight: Tensor
    mlp_in_bias: Tensor
    mlp_out_weight: Tensor
    mlp_out_bias: Tensor
    eps: float = 1e-5


def transformer_block(
    tokens: Tensor,
    memory: Sequence[Tensor],
    block: BlockWeights,
    *,
    heads: int,
    index: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A pre-norm transformer block whose tokens attend to a memory of other tokens and to each other.

    With x = norm_attention(tokens), own = key_value(x), and keys and values the halves of the channels of memory and
    own, one after the other: tokens += out(softmax(query(x) keys^T / sqrt(D / heads)) values), head by head; then
    tokens += mlp_out(gelu(mlp_in(norm_mlp(tokens)))).

    tokens:  [B, N, D] float16, bfloat16, float32 or float64.
    memory:  any number of [B, M_i, 2D] tensors, keys and values as `own` of an earlier call; M_i may be 0.
    block:   the weights, of the dtype of tokens. heads: a divisor of D; head h has channels h D / heads and following.
    index:   [B, L] int32 or int64: the keys to be seen, rows of memory and own together, in any order; an entry below 0
             or not below their number is no key, and one named twice counts twice. Usually L is that number, and each
             entry its own position, or -1 to hide that key. What a hidden key holds, NaN too, changes nothing. None:
             all are seen. Where no key is, attention adds nothing but the bias of `out`.
    backend: None, "triton" (float32, float16 and bfloat16 on CUDA devices, Triton 3.3 or newer, no gradients, D up to
             256, D / heads a power of two of at least 16), "native" (float32 on the CPU, no gradients, D up to 512, H
             up to 2048) or "reference", torch's own layers and `selected_attention`. None takes the first that can
             serve.
    Returns tokens [B, N, D] and own [B, N, 2D], contiguous. Differentiable as `selected_attention` is: where a gradient
    is wanted, the reference serves; also under autocast, which acts on the layers. Memory may have another floating
    dtype than tokens, and becomes that of `own`, with the reference alone.
    Raises TypeError or ValueError for an argument of another type, dtype, shape, device or range,
    BackendError if the named backend cannot serve.

    ```
    tokens, own = transformer_block(tokens, [support, *earlier], weights, heads=4)
    earlier.append(own)
    ```
    """
    checks.floating("tokens", tokens)
    shape = tokens.shape
    if len(shape) != 3 or shape[2] < 1:
        raise ValueError(f"tokens must have shape [B, N, D] with D > 0, got {list(shape)}")
    samples, _, dim = shape
    if not isinstance(block, BlockWeights):
        raise TypeError(f"block must be a BlockWeights, got {type(block).__name__}")
    if type(heads) is not int or heads < 1:
        heads = checks.integer("heads", heads, 1)
    if dim % heads:
        raise ValueError(f"heads must divide the {dim} channels of tokens, got {heads}")
    kind = tokens.device.type
    autocasting = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    weights, eps = block[:14], block[14]
    plain = _check_weights(weights, tokens, autocasting)
    if type(eps) is not float or not 0 <= eps < 1:
        eps = checks.number("block.eps", eps, least=0.0)
    if type(memory) is not list and (not isinstance(memory, Sequence) or isinstance(memory, str)):
        raise TypeError(f"memory must be a sequence of tensors, got {type(memory).__name__}")
    for i, piece in enumerate(memory):
        if not (type(piece) in _PLAIN and piece.dtype is tokens.dtype and piece.is_cpu and tokens.is_cpu) or (
            piece.layout is not torch.strided
        ):
            _check_tensor(f"memory[{i}]", piece, tokens, any_dtype=True)
        shape = piece.shape
        if len(shape) != 3 or shape[0] != samples or shape[2] != 2 * dim:
            raise ValueError(f"memory[{i}] must have shape [{samples}, M, {2 * dim}], got {list(shape)}")
    if index is not None:
        checks.device("index", checks.tensor("index", index), tokens.device)
        if index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"index must be int32 or int64, got {index.dtype}")
        if len(index.shape) != 2 or index.shape[0] != samples:
            raise ValueError(f"index must have shape [B, L] with B = {samples}, got {list(index.shape)}")
    name = backends.select("transformer_block", backend, tokens, memory, weights, heads, index, autocasting)
    if name == "reference":
        return reference.transformer_block(tokens, memory, block, heads, index, backend)
    # Weights that require gradients are the reference's by now.
    if (
        plain
        and backends.unwatched((tokens, index, *memory))
        and not any(map(Tensor.is_neg, weights))
        and not any(map(Tensor._is_zerotensor, weights))
    ):
        return _IMPLEMENTATIONS[name].apply(tokens, memory, weights, heads, index, eps)
    found, own = _transformer_block(tokens, list(memory), list(weights), heads, index, eps, name)
    return found, own


def _check_weights(weights: Sequence[Any], tokens: Tensor, autocasting: bool) -> bool:
    """Whether they are as usual: torch's own tensors such as `tokens`, on a CPU or a CUDA device."""
    first = weights[10]
    checks.floating("block.mlp_in_weight", first)
    if len(first.shape) != 2 or first.shape[0] < 1:
        raise ValueError(f"block.mlp_in_weight must have shape [H, D] with H > 0, got {list(first.shape)}")
    expected, dtype, device = shapes(tokens.shape[2], first.shape[0]), tokens.dtype, tokens.device
    on_cpu = tokens.is_cpu
    for weight, shape in zip(weights, expected, strict=True):
        if not (
            type(weight) in _PLAIN
            and weight.shape == shape
            and weight.dtype is dtype
            and (weight.is_cpu if on_cpu else weight.device == device)
            and weight.layout is torch.strided
        ):
            break
    else:
        if on_cpu or tokens.is_cuda:
            return True  # without building names
    for name, weight, shape in zip(BlockWeights._fields, weights, expected, strict=False):
        _check_tensor(f"block.{name}", weight, tokens, any_dtype=autocasting)
        if weight.shape != shape:
            raise ValueError(f"block.{name} must have shape {list(shape)}, got {list(weight.shape)}")
    return False


_PLAIN = (Tensor, torch.nn.Parameter)


def _check_tensor(name: str, value: Any, tokens: Tensor, any_dtype: bool) -> None:
    checks.device(name, checks.floating(name, value), tokens.device)
    if value.dtype != tokens.dtype and not any_dtype:
        raise TypeError(f"{name} must have the dtype of tokens, {tokens.dtype}, got {value.dtype}")


def _fake(tokens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    samples, count, dim = tokens.shape
    return tokens.new_empty((samples, count, dim)), tokens.new_empty((samples, count, 2 * dim))


_IMPLEMENTATIONS: dict[str, Any] = {"triton": triton, "native": native}


def _implementation(*arguments: Any) -> tuple[Tensor, Tensor]:
    *rest, backend = arguments
    return _IMPLEMENTATIONS[backend].transformer_block(*rest)


_transformer_block = backends.register(
    "transformer_block(Tensor tokens, Tensor[] memory, Tensor[] weights, SymInt heads, Tensor? index, float eps, "
    "str backend) -> (Tensor, Tensor)",
    _implementation,
    _fake,
)
backends.declare(
    "transformer_block",
    {
        "triton": backends.Backend(triton.missing, triton.unsupported, triton_launch.slower),
        "native": backends.Backend(library.missing, native.unsupported),
        "reference": backends.Backend(),
    },
)


def _flops(tokens: Any, memory: Any, weights: Any, heads: Any, index: Any, *_: Any, **__: Any) -> int:
    samples, count, dim = tokens
    keys = sum(piece[1] for piece in memory) + count if index is None else index[1]
    return flops.transformer_block_flops(samples, count, keys, dim, weights[10][0])


flops.register(_transformer_block, _flops)
