"""The cells of a support set that label propagation looks up, and the decoder of patches: one launch each.

For inference, by Triton, on what `icseg.sparse` computes with `LabelPropagation` and `PatchDecoder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icseg_kernels import triton_launch

SIDE, CELLS, CELL_PIXELS = 8, 16, 4  # of a patch: pixels along its side, cells; of a cell: pixels
PRIORS = 2  # channels of a class that the coarser prediction gives
NEGATIVE_SLOPE = 0.05  # of the leaky ReLUs


class DecodeWeights(NamedTuple):
    """Weights and biases of label propagation and of the decoder, as torch.nn's layers have them.

    Cf: channels of the features; D: of a token; h, kd, vd: heads, channels of keys and of values.
    match_*, value_*: cell [*, 4 Cf], token [*, D], match_out [h kd, *]; log_scale: [h, 1, 1].
    out:      [4 Ci, h vd], the learned values of a cell as Ci channels of its pixels.
    token:    [16 Ct, D], a token as Ct channels of 4 x 4 pixels.
    shared:   shared_in [E, Cf + Ct + Ci, 3, 3] and shared_out [O, E, 1, 1], of what all classes have in common.
    own:      own_in [O, h + 2, 3, 3], own_mid [O, O, 3, 3] and own_out [2, O, 1, 1], of every class.
    Weights of 3 x 3 are contiguous or channels_last, all of them alike; others are copied in every call.
    """

    match_cell_weight: Tensor
    match_cell_bias: Tensor
    match_token_weight: Tensor
    match_out_weight: Tensor
    match_out_bias: Tensor
    value_cell_weight: Tensor
    value_cell_bias: Tensor
    value_token_weight: Tensor
    log_scale: Tensor
    out_weight: Tensor
    out_bias: Tensor
    token_weight: Tensor
    token_bias: Tensor
    shared_in_weight: Tensor
    shared_in_bias: Tensor
    shared_out_weight: Tensor
    shared_out_bias: Tensor
    own_in_weight: Tensor
    own_in_bias: Tensor
    own_mid_weight: Tensor
    own_mid_bias: Tensor
    own_out_weight: Tensor
    own_out_bias: Tensor


class Sizes(NamedTuple):
    """Channels: of features, tokens, heads, keys and values a head, and of the layers of `DecodeWeights`."""

    features: int
    dim: int
    heads: int
    key: int
    value: int
    hidden: int
    context: int
    token: int
    shared: int
    own: int


def sizes_of(weights: DecodeWeights) -> Sizes:
    """Those that all weights must have, from some of them."""
    heads = weights.log_scale.shape[0]
    return Sizes(
        weights.match_cell_weight.shape[1] // CELL_PIXELS,
        weights.match_token_weight.shape[1],
        heads,
        weights.match_out_weight.shape[0] // max(heads, 1),
        weights.value_cell_weight.shape[0] // max(heads, 1),
        weights.match_cell_weight.shape[0],
        weights.out_weight.shape[0] // CELL_PIXELS,
        weights.token_weight.shape[0] // CELLS,
        weights.shared_in_weight.shape[0],
        weights.own_in_weight.shape[0],
    )


def shapes(s: Sizes) -> tuple[tuple[int, ...], ...]:
    """Of `DecodeWeights`, in their order."""
    cell, keys, values = CELL_PIXELS * s.features, s.heads * s.key, s.heads * s.value
    match = (s.hidden, cell), (s.hidden,), (s.hidden, s.dim), (keys, s.hidden), (keys,)
    value = (values, cell), (values,), (values, s.dim)
    pixels = CELL_PIXELS * s.context
    out = (s.heads, 1, 1), (pixels, values), (pixels,), (CELLS * s.token, s.dim), (CELLS * s.token,)
    common = (s.shared, s.features + s.token + s.context, 3, 3), (s.shared,), (s.own, s.shared, 1, 1), (s.own,)
    own = (s.own, s.heads + PRIORS, 3, 3), (s.own,), (s.own, s.own, 3, 3), (s.own,), (2, s.own, 1, 1), (2,)
    return *match, *value, *out, *common, *own


def terms_of(dtype: torch.dtype, fused: bool) -> int:
    """Products summed up at a time; fused: by fused multiply-adds, of which a thread holds whole rows of factors."""
    return 16 if fused else 64 if dtype.itemsize == 2 else 32


def match_constants(s: Sizes, terms: int) -> dict[str, Any]:
    """The kernels' that keys and queries need, by name; terms: of `terms_of`."""
    return {
        "FEATURES": s.features,
        "D": s.dim,
        "HEADS": s.heads,
        "KEY": s.key,
        "VALUE": s.value,
        "HIDDEN": s.hidden,
        "BLOCK_HEADS": triton_launch.power_of_two(s.heads),
        "BLOCK_KEY": max(16, triton_launch.power_of_two(s.key)),
        "BLOCK_HIDDEN": terms,
        "BLOCK_INNER": terms,
    }


def decode_constants(s: Sizes, classes: int, terms: int, *, channels_last: bool) -> dict[str, Any]:
    """All of `decode_kernel` but those of arithmetic, and options of its launch."""
    width = CELL_PIXELS * classes + s.value
    block_value = max(16, triton_launch.power_of_two(width))
    block_heads = triton_launch.power_of_two(s.heads)
    period = max(16, triton_launch.power_of_two(s.features + s.token + s.context))
    block_own = max(16, triton_launch.power_of_two(s.own))
    tokens_at = (s.heads + PRIORS) * CELLS * block_value
    map_at = tokens_at + CELLS * s.token
    block_shared = max(16, triton_launch.power_of_two(s.shared))
    hidden_at = map_at + SIDE * SIDE * period
    own_at = hidden_at + (SIDE * SIDE * block_shared if terms < block_shared else 0)
    return {
        **match_constants(s, terms),
        "CLASSES": classes,
        "CONTEXT": s.context,
        "TOKEN": s.token,
        "SHARED": s.shared,
        "OWN": s.own,
        "NEGATIVE_SLOPE": NEGATIVE_SLOPE,
        "CHANNELS_LAST": channels_last,
        "BLOCK_VALUE": block_value,
        "BLOCK_KEYS": min(terms, 64 if block_value <= 32 else 32),
        "SPLITS": max(1, min(8 // block_heads, 128 // (block_heads * block_value))),
        "BLOCK_CONTEXT": max(16, triton_launch.power_of_two(CELL_PIXELS * s.context)),
        "BLOCK_TOKEN": triton_launch.power_of_two(s.token),
        "BLOCK_SHARED": block_shared,
        "BLOCK_OWN": block_own,
        "PERIOD": period,
        "BLOCK_SHARED_IN": min(period, terms),
        "BLOCK_SHARED_OUT": min(block_shared, terms),
        "BLOCK_OWN_IN": min(max(16, triton_launch.power_of_two(9 * (s.heads + PRIORS))), terms),
        "BLOCK_OWN_MID": min(block_own, terms),
        "BLOCK_OUT": min(max(16, triton_launch.power_of_two(s.heads * s.value)), terms),
        "BLOCK_TOKENS": min(triton_launch.power_of_two(CELLS * s.token), 128 if terms == 64 else 64),
        "BLOCK_D": min(triton_launch.power_of_two(s.dim), 128),
        "TOKENS_AT": tokens_at,
        "MAP_AT": map_at,
        "HIDDEN_AT": hidden_at,
        "OWN_AT": own_at,
        "SLOT": own_at + 2 * SIDE * SIDE * block_own,
        "num_warps": 16 if terms == 16 else 8,
        "num_stages": 1,
    }


def decode_patches(
    features: Tensor,
    tokens: Tensor,
    coords: Tensor,
    keys: Tensor,
    values: Tensor,
    coarser: Tensor | None,
    weights: DecodeWeights,
    *,
    gain: Tensor,
    bound: float,
) -> tuple[Tensor, Tensor]:
    """Logits and logits of the error that remains, [B, K, C, 8, 8] each, of K patches a target.

    features: [B K, Cf, 8, 8] and tokens [B, K, D], of one dtype with the weights, gain and the coarser logits.
    coords:   int64 [B, K, 2] (y, x) of the patches' corners; one wholly outside of the image has no prior.
    keys, values: [B or 1, h, n, kd] and [B or 1, h, n, 4 C + vd] of `support_cells`, also of another dtype.
    coarser:  [B, C, .., ..] logits at half the resolution; None at the first level, where the prior is zero.
    gain:     0-dim, of the labels that were looked up; bound: of what is added to the prior.
    ValueError if they do not fit together or are not where kernels run.
    """
    batch, count = _leading(tokens)
    if keys.ndim != 4 or values.ndim != 4 or keys.shape[2] % CELLS:
        raise ValueError(
            f"keys and values must be [B, h, n, ..] of n in whole patches of {CELLS}, "
            f"got {list(keys.shape)}, {list(values.shape)}"
        )
    s = _checked(features, tokens, coords, weights)
    classes, rest = divmod(values.shape[3] - s.value, CELL_PIXELS)
    if rest or classes < 1:
        raise ValueError(f"values must have {CELL_PIXELS} C + {s.value} channels, got {values.shape[3]}")
    sets, cells = keys.shape[0], keys.shape[2]
    if sets not in (1, batch):
        raise ValueError(f"keys must be of {batch} targets, or of 1 for all, got {sets}")
    _guard("keys", keys, (sets, s.heads, cells, s.key), features, dtype=keys.dtype)
    _guard("values", values, (sets, s.heads, cells, values.shape[3]), features, dtype=keys.dtype)
    if reasons := triton_launch.unsupported_dtype("keys", keys):
        raise ValueError("; ".join(reasons))
    _guard("gain", gain, (), features)
    if coarser is not None:
        if coarser.ndim != 4 or 0 in coarser.shape[2:]:
            raise ValueError(f"coarser must be [B, C, h, w], got {list(coarser.shape)}")
        coarser = coarser.contiguous()
        _guard("coarser", coarser, (batch, classes, *coarser.shape[2:]), features)
    logits = features.new_empty((batch, count, classes, SIDE, SIDE))
    error = torch.empty_like(logits)
    patches = batch * count
    if patches == 0:
        return logits, error

    from icseg_kernels.cascade import decode_triton_kernels as kernels

    keys, keys_batch = _per_set(keys, batch)
    values, values_batch = _per_set(values, batch)
    weights, channels_last = _laid_out(weights)
    fused = _fused(features.dtype)
    constants = decode_constants(s, classes, _terms(features.dtype, fused), channels_last=channels_last)
    height, width = (1, 1) if coarser is None else coarser.shape[2:]
    triton_launch.launch(
        kernels.decode_kernel, (patches,), features.device,
        features.contiguous(), tokens.contiguous(), coords.contiguous(), keys, values, coarser, gain, logits, error,
        features.new_empty(patches * constants["SLOT"]), *weights[:5], *weights[8:], keys_batch, values_batch,
        count, cells, height, width,
        **constants, BOUND=float(bound), **kernels.arithmetic(features.dtype, triton_launch.INTERPRETED, fused),
    )  # fmt: skip
    return logits, error


def support_cells(
    features: Tensor, tokens: Tensor, coords: Tensor, masks: Tensor, weights: DecodeWeights
) -> tuple[Tensor, Tensor]:
    """Keys [B, h, n, kd] and values [B, h, n, 4 C + vd] of the n = 16 S K cells of K patches of each of S images.

    features: [B S K, Cf, 8, 8] and tokens [B, S K, D], of one dtype with the weights and masks.
    coords:   int64 [B S, K, 2] (y, x) of the patches' corners; masks are replicated beyond borders, 0 far from them.
    masks:    [B S, C, h, w] in [0, 1], h and w > 0.
    ValueError if they do not fit together or are not where kernels run.
    """
    sets, patches_of_set = _leading(tokens)
    if coords.ndim != 3 or coords.shape[0] * coords.shape[1] != sets * patches_of_set:
        raise ValueError(f"coords must be [N, K, 2] of {sets * patches_of_set} patches, got {list(coords.shape)}")
    images, count, _ = coords.shape
    if sets and images % sets:
        raise ValueError(f"coords must be of the images of {sets} sets, got {images}")
    s = _checked(features, tokens, coords, weights)
    if masks.ndim != 4 or 0 in masks.shape[1:]:
        raise ValueError(f"masks must be [N, C, h, w], got {list(masks.shape)}")
    classes, height, width = masks.shape[1:]
    _guard("masks", masks, (images, classes, height, width), features)
    cells = CELLS * patches_of_set
    keys = features.new_empty((sets, s.heads, cells, s.key))
    values = features.new_empty((sets, s.heads, cells, CELL_PIXELS * classes + s.value))
    if cells * sets == 0:
        return keys, values

    from icseg_kernels.cascade import decode_triton_kernels as kernels

    fused = _fused(features.dtype)
    triton_launch.launch(
        kernels.support_kernel, (sets * patches_of_set,), features.device,
        features.contiguous(), tokens.contiguous(), coords.contiguous(), masks.contiguous(), keys, values,
        *weights[:8], patches_of_set, count, height, width,
        **support_constants(s, classes, _terms(features.dtype, fused)),
        **kernels.arithmetic(features.dtype, triton_launch.INTERPRETED, fused),
    )  # fmt: skip
    return keys, values


def support_constants(s: Sizes, classes: int, terms: int) -> dict[str, Any]:
    """All of `support_kernel` but those of arithmetic, and options of its launch."""
    return {
        **match_constants(s, terms),
        "CLASSES": classes,
        "BLOCK_LEARNED": max(16, triton_launch.power_of_two(s.heads * s.value)),
        "BLOCK_LABELS": triton_launch.power_of_two(CELL_PIXELS * classes),
        "num_warps": 4,
        "num_stages": 2,
    }


def _leading(tokens: Tensor) -> tuple[int, int]:
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be [B, K, D], got {list(tokens.shape)}")
    return tokens.shape[0], tokens.shape[1]


def _checked(features: Tensor, tokens: Tensor, coords: Tensor, weights: DecodeWeights) -> Sizes:
    """Sizes of what the two functions have in common. The last check before kernels read what the shapes promise."""
    if reasons := [
        *triton_launch.missing(),
        *triton_launch.unsupported_device("features", features),
        *triton_launch.unsupported_dtype("features", features),
    ]:
        raise ValueError("; ".join(reasons))
    s = sizes_of(weights)
    if min(s) < 1:
        raise ValueError(f"weights must have channels, got {s}")
    for name, weight, shape in zip(DecodeWeights._fields, weights, shapes(s), strict=True):
        _guard(name, weight, shape, features)
        if weight.ndim != 4 and not weight.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {weight.stride()}")
    batch, count, _ = tokens.shape
    _guard("features", features, (batch * count, s.features, SIDE, SIDE), features)
    _guard("tokens", tokens, (batch, count, s.dim), features)
    _guard("coords", coords, (*coords.shape[:2], 2), features, dtype=torch.int64)
    if coords.shape[0] * coords.shape[1] != batch * count:
        raise ValueError(f"coords must be of {batch * count} patches, got {list(coords.shape)}")
    return s


def _guard(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor, *, dtype: torch.dtype | None = None) -> None:
    dtype = like.dtype if dtype is None else dtype
    if tensor.shape != tuple(shape) or tensor.dtype != dtype or tensor.device != like.device:
        raise ValueError(
            f"{name} must be {dtype} {list(shape)} on {like.device}, got {tensor.dtype} {list(tensor.shape)} "
            f"on {tensor.device}"
        )


def _per_set(x: Tensor, batch: int) -> tuple[Tensor, int]:
    """With contiguous sets, and the step from one target's to the next one's: 0 if they share it."""
    shared = x.shape[0] == 1 or x.stride(0) == 0
    x = x[:1] if shared else x
    x = x.contiguous()
    return x, 0 if shared else x.stride(0)


def _laid_out(weights: DecodeWeights) -> tuple[DecodeWeights, bool]:
    """With weights of 3 x 3 all contiguous, or all channels_last (True)."""
    names = [name for name, weight in zip(DecodeWeights._fields, weights, strict=True) if weight.ndim == 4]
    if all(getattr(weights, name).is_contiguous(memory_format=torch.channels_last) for name in names):
        return weights, True
    return weights._replace(**{name: getattr(weights, name).contiguous() for name in names}), False


def _fused(dtype: torch.dtype) -> bool:
    """Whether products are of fused multiply-adds: float32 that torch does not let be rounded to TF32, and wider."""
    return dtype.itemsize >= 4 and (dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest")


def _terms(dtype: torch.dtype, fused: bool) -> int:
    """In the interpreter as many as ever: it takes its time for each operation, whatever the size."""
    return terms_of(dtype, fused) if not triton_launch.INTERPRETED else 64
