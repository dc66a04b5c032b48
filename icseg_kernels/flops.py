"""FLOP and byte formulas of every op, and their registration with torch.utils.flop_counter and fvcore.

`*_flops` return FLOPs of one call, `*_bytes` bytes. Arguments are counts (batch, patches, channels, heads, tokens,
k) and sizes in pixels (patch_size, out_size, height, width, kernel); `itemsize` is bytes per element.

A multiply-add is two FLOPs. Comparisons, copies and index arithmetic are none, nor, as in torch's own
counter, normalisations and the elementwise operations in the attention and convolution ops.
Bytes are compulsory traffic: every input read once, every output written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import flop_counter

# One logarithm by polynomial: nine multiply-adds and six further operations.
LOGARITHM_FLOPS = 24

Formula = Callable[..., int]


def gumbel_topk_flops(batch: int, candidates: int) -> int:
    """FLOPs. Per candidate: two logarithms make the noise, an addition applies it, and one exponential is summed."""
    return batch * candidates * (3 * LOGARITHM_FLOPS + 2)


def gumbel_topk_bytes(batch: int, candidates: int, k: int, itemsize: int = 4) -> int:
    """Bytes: logits in; int64 indices, scores, logsumexp and kappa out."""
    return batch * (candidates * itemsize + k * (8 + itemsize) + 2 * itemsize)


def sample_patches_flops(batch: int, grid: tuple[int, int], kept: tuple[int, int], blur_taps: int = 0) -> int:
    """FLOPs of rescaling (2 a window), a separable blur, and the draw.

    grid:      (rows, columns) of windows at stride 1; kept: at the stride, those drawn from.
    blur_taps: of the Gaussian, 0 for none. Its first pass makes the kept rows of every column, its second the
               kept columns of those.
    """
    windows, candidates = grid[0] * grid[1], kept[0] * kept[1]
    blur = 2 * blur_taps * (kept[0] * grid[1] + candidates)
    return batch * (2 * windows + blur) + gumbel_topk_flops(batch, candidates)


def sample_patches_bytes(batch: int, pixels: int, k: int, itemsize: int = 4) -> int:
    """Bytes: weights in; int32 coords, int64 indices and scores out."""
    return batch * (pixels * itemsize + k * (2 * 4 + 8 + itemsize))


def gather_patches_flops(batch: int, patches: int, channels: int, out_size: int, *, bilinear: bool = False) -> int:
    """FLOPs: a copy is free; a bilinear sample is the weighted sum of four pixels."""
    return 8 * batch * patches * channels * out_size**2 if bilinear else 0


def gather_patches_bytes(
    batch: int, patches: int, channels: int, patch_size: int, out_size: int | None = None, itemsize: int = 4
) -> int:
    """Bytes: int32 coords and patch pixels in (overlaps read again), patches out."""
    pixels = patch_size**2 + (patch_size if out_size is None else out_size) ** 2
    return batch * patches * (2 * 4 + channels * pixels * itemsize)


def scatter_patches_flops(batch: int, patches: int, channels: int, patch_size: int, height: int, width: int) -> int:
    """FLOPs: one multiply-add a patch pixel, one division an output pixel."""
    return batch * channels * (2 * patches * patch_size**2 + height * width)


def scatter_patches_bytes(
    batch: int, patches: int, channels: int, patch_size: int, height: int, width: int, itemsize: int = 4
) -> int:
    """Bytes: patches and int32 coords in; mean and a one-byte coverage out."""
    read = patches * (channels * patch_size**2 * itemsize + 2 * 4)
    return batch * (read + height * width * (channels * itemsize + 1))


def selected_attention_flops(batch: int, heads: int, pairs: int, dim: int, value_dim: int) -> int:
    """FLOPs of the two products q k^T and p v.

    pairs: query-key pairs per head: Nq * Nk, Nq * M with an index, the sum of queries * keys over the runs of
    `kv_end`. A sink is one more key where SDPA serves the call (no index), and free elsewhere.
    """
    return 2 * batch * heads * pairs * (dim + value_dim)


def selected_attention_backward_flops(batch: int, heads: int, pairs: int, dim: int, value_dim: int) -> int:
    """FLOPs of the five products of the backward pass: scores again, and the gradients of p, v, q and k."""
    return 2 * batch * heads * pairs * (3 * dim + 2 * value_dim)


def selected_attention_bytes(
    batch: int, heads: int, queries: int, keys: int, dim: int, value_dim: int, itemsize: int = 4
) -> int:
    """Bytes: queries, attended keys and values in (once per query group), outputs out."""
    return batch * heads * (queries + keys) * (dim + value_dim) * itemsize


def qkv_projection_flops(
    batch: int,
    tokens: int,
    channels: int,
    heads: int,
    dim: int,
    kv_heads: int | None = None,
    queries: int | None = None,
) -> int:
    """FLOPs of the products; backward as many for the gradients of x, and again for those of weight.

    dim: channels of a head. kv_heads: of keys and values; None: heads. queries: tokens that have one; None: all.
    """
    kv_heads, queries = heads if kv_heads is None else kv_heads, tokens if queries is None else queries
    return 2 * batch * channels * dim * (heads * queries + 2 * kv_heads * tokens)


def qkv_projection_bytes(
    batch: int,
    tokens: int,
    channels: int,
    heads: int,
    dim: int,
    kv_heads: int | None = None,
    queries: int | None = None,
    itemsize: int = 4,
) -> int:
    """Bytes: x, weight and bias in; queries, keys and values out."""
    kv_heads, queries = heads if kv_heads is None else kv_heads, tokens if queries is None else queries
    written = batch * dim * (heads * queries + 2 * kv_heads * tokens)
    return (batch * tokens * channels + (heads + 2 * kv_heads) * dim * (channels + 1) + written) * itemsize


def cross_conv2d_flops(
    batch: int,
    x_images: int,
    y_images: int,
    x_channels: int,
    y_channels: int,
    out_channels: int,
    kernel: tuple[int, int],
    out_size: tuple[int, int],
) -> int:
    """FLOPs: one convolution an image of x and of y; the pairwise additions do not count."""
    channels = x_images * x_channels + y_images * y_channels
    return 2 * batch * channels * out_channels * kernel[0] * kernel[1] * out_size[0] * out_size[1]


def cross_conv2d_mean_flops(
    batch: int,
    x_images: int,
    x_channels: int,
    y_channels: int,
    out_channels: int,
    kernel: tuple[int, int],
    out_size: tuple[int, int],
) -> int:
    """FLOPs: one convolution an image of x and one of the mean of y."""
    return cross_conv2d_flops(batch, x_images, 1, x_channels, y_channels, out_channels, kernel, out_size)


def cross_conv2d_bytes(
    batch: int,
    x_images: int,
    y_images: int,
    x_channels: int,
    y_channels: int,
    out_channels: int,
    kernel: tuple[int, int],
    size: tuple[int, int],
    out_size: tuple[int, int],
    *,
    mean: bool = False,
    itemsize: int = 4,
) -> int:
    """Bytes: images and weight in; every pair, or with `mean` every x, out."""
    read = batch * (x_images * x_channels + y_images * y_channels) * size[0] * size[1]
    weight = (x_channels + y_channels) * out_channels * kernel[0] * kernel[1]
    written = batch * x_images * (1 if mean else y_images) * out_channels * out_size[0] * out_size[1]
    return (read + weight + written) * itemsize


def group_norm_film_flops() -> int:
    """FLOPs: none, as in torch's own counter, which counts neither normalisations nor activations."""
    return 0


def group_norm_film_bytes(samples: int, channels: int, length: int, film: int = 0, itemsize: int = 4) -> int:
    """Bytes: x in, as much out; film: values of gain and bias together."""
    return (2 * samples * channels * length + film) * itemsize


def small_convolutions_flops(
    images: int, channels: int, height: int, width: int, layers: Sequence[tuple[int, int, int, int]]
) -> int:
    """FLOPs: those of the convolutions; layers: output channels, kernel, stride and padding of each."""
    total = 0
    for outputs, kernel, stride, padding in layers:
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        total += 2 * images * channels * outputs * kernel**2 * height * width
        channels = outputs
    return total


def small_convolutions_bytes(
    images: int,
    channels: int,
    height: int,
    width: int,
    layers: Sequence[tuple[int, int, int, int]],
    itemsize: int = 4,
) -> int:
    """Bytes: x, weights and a bias for every layer in, the last layer's output out."""
    elements = images * channels * height * width
    for outputs, kernel, stride, padding in layers:
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        elements += (channels * kernel**2 + 1) * outputs
        channels = outputs
    return (elements + images * channels * height * width) * itemsize


def transformer_block_flops(batch: int, tokens: int, keys: int, dim: int, hidden: int) -> int:
    """FLOPs: those of the linear layers, of scores, and of weighted values; keys: all that a token may attend to."""
    return 2 * batch * tokens * (4 * dim**2 + 2 * dim * hidden + 2 * keys * dim)


def transformer_block_bytes(batch: int, tokens: int, memory: int, dim: int, hidden: int, itemsize: int = 4) -> int:
    """Bytes: tokens, keys and values of `memory` tokens a sample and weights in; tokens, their keys and values out."""
    weights = 4 * dim**2 + 2 * dim * hidden + 9 * dim + hidden
    return (weights + batch * (tokens * 4 * dim + memory * 2 * dim)) * itemsize


def halvings_bytes(
    images: int, channels: int, height: int, width: int, count: int, deviations: int = 0, itemsize: int = 4
) -> int:
    """Bytes: the image in, halvings and deviations out. They are no FLOPs."""
    pixels = height * width
    for level in range(count):
        height, width = (height + 1) // 2, (width + 1) // 2
        pixels += height * width * (2 if level < deviations else 1)
    return images * channels * pixels * itemsize


def upsample_with_patches_bytes(
    batch: int, patches: int, channels: int, patch_area: int, height: int, width: int, itemsize: int = 4
) -> int:
    """Bytes: the map of half that size, patches and int64 coords in, the map out. It is no FLOPs."""
    coarser = ((height + 1) // 2) * ((width + 1) // 2)
    return batch * (channels * (coarser + height * width + patches * patch_area) * itemsize + patches * 2 * 8)


def register(overload: Any, formula: Formula) -> None:
    """Let torch.utils.flop_counter, and with it fvcore, count `overload` (what `backend.register` returned).

    formula: takes the op's arguments with each tensor replaced by its shape, and the keyword `out_shape`.
    """
    flop_counter.register_flop_formula(overload.overloadpacket)(formula)


def fvcore_handles() -> dict[str, Callable[[list[Any], list[Any]], int]]:
    """Handles for fvcore's FlopCountAnalysis: a multiply-add counts once, and seen under no_grad only.

    ```
    with torch.no_grad():
        FlopCountAnalysis(model, inputs).set_op_handle(**icseg_kernels.flops.fvcore_handles()).total()
    ```
    """
    registered = {str(target): formula for target, formula in flop_counter.flop_registry.items()}
    ours = {name: formula for name, formula in registered.items() if name.startswith("icseg.")}
    return {name.replace(".", "::"): _fvcore_handle(formula) for name, formula in ours.items()}


def _fvcore_handle(formula: Formula) -> Callable[[list[Any], list[Any]], int]:
    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        found = [_plain(output) for output in outputs]
        return formula(*map(_plain, inputs), out_val=found[0] if len(found) == 1 else found) // 2

    return handle


def _plain(value: Any) -> Any:
    """The shape of a traced tensor, or the value of a traced constant, list or size; None for others."""
    if value.isCompleteTensor():
        return tuple(value.type().sizes())
    node = value.node()
    inputs = list(node.inputs())
    match node.kind():
        case "prim::ListConstruct":
            return [_plain(element) for element in inputs]
        case "aten::size":
            return _plain(inputs[0])[_plain(inputs[1])]
        case "prim::NumToTensor" | "aten::Int":
            return _plain(inputs[0])
    return value.toIValue()


def _register_cpu_sdpa() -> None:
    """torch counts the attention kernels of every device but the CPU."""
    aten = torch.ops.aten
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    if forward not in flop_counter.flop_registry:
        flop_counter.register_flop_formula(forward)(_cpu_sdpa_flops)
    if backward not in flop_counter.flop_registry:
        flop_counter.register_flop_formula(backward)(_cpu_sdpa_backward_flops)


def _cpu_sdpa_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return flop_counter.sdpa_flop_count(query, key, value)


def _cpu_sdpa_backward_flops(grad_out: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return flop_counter.sdpa_backward_flop_count(grad_out, query, key, value)


_register_cpu_sdpa()
