"""small_convolutions by the native library: float32 on the CPU, without gradients."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from ctypes import byref, c_int64, c_void_p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from icseg_kernels import library
from icseg_kernels.backend import without_gradients

if TYPE_CHECKING:
    from icseg_kernels.small_convolutions import ConvLayer

# layers, their number, h, w, slots, bytes
_workspace = library.function("icseg_small_convolutions_workspace", [c_void_p] + [c_int64] * 4 + [c_void_p])
# x, layers, their number, out; N, h, w; strides of x; slots; workspace, its bytes
_convolve = library.function(
    "icseg_small_convolutions_f32", [c_void_p, c_void_p, c_int64, c_void_p] + [c_int64] * 8 + [c_void_p, c_int64]
)
# icseg_convolution: weight, bias; input and output channels, kernel, stride, padding, replicate; slope
_LAYER = "QQqqqqqqd"

MOST_LAYERS, MOST_CHANNELS, MOST_PIXELS = 16, 128, 32  # of a call, of a map, of a map's side


def unsupported(x: Tensor, layers: Sequence[ConvLayer], sizes: Sequence[tuple[int, int, int]]) -> list[str]:
    """Why the library cannot convolve `x`; sizes: channels, height and width of x and of the outputs of the layers."""
    reasons = []
    if not x.is_cpu:
        reasons.append(f"it runs on the CPU, and x is on {x.device}")
    if x.dtype != torch.float32:
        reasons.append(f"it computes in float32, and x is {x.dtype}")
    tensors = (tensor for layer in layers for tensor in (layer.weight, layer.bias))
    reasons += without_gradients("x, a weight or a bias", (x, *tensors))
    if len(layers) > MOST_LAYERS:
        reasons.append(f"it takes at most {MOST_LAYERS} layers, got {len(layers)}")
    for channels, height, width in sizes:
        if channels > MOST_CHANNELS or height > MOST_PIXELS or width > MOST_PIXELS:
            reasons.append(
                f"it takes maps of at most {MOST_CHANNELS} channels and {MOST_PIXELS} x {MOST_PIXELS} pixels, "
                f"got {channels} of {height} x {width}"
            )
            break
    return reasons


def small_convolutions(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    strides: Sequence[int],
    paddings: Sequence[int],
    replicates: Sequence[bool],
    slopes: Sequence[float],
) -> Tensor:
    """[N, C, h, w] -> [N, C', h', w'], contiguous; x of any strides. A slope of 1 is no leaky ReLU."""
    if not x.is_cpu or x.dtype != torch.float32 or len(x.shape) != 4:
        raise ValueError(f"x must be float32 [N, C, h, w] on the CPU, got {list(x.shape)} {x.dtype} on {x.device}")
    layers = list(zip(weights, biases, strides, paddings, replicates, slopes, strict=True))
    channels, height, width = x.shape[1:]
    for weight, bias, stride, padding, _, _ in layers:
        _guard("weight", weight, 4)
        outputs, inputs, kernel, other = weight.shape
        if other != kernel or stride < 1:
            raise ValueError(f"weights must be [Co, Ci, k, k] and strides positive, got {list(weight.shape)}, {stride}")
        if inputs != channels:
            raise ValueError(f"weight must have {channels} input channels, got {list(weight.shape)}")
        if bias is not None:
            _guard("bias", bias, 1)
            if bias.shape != (outputs,):
                raise ValueError(f"bias must have shape [{outputs}], got {list(bias.shape)}")
        channels = outputs
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    return convolve(x, layers, (channels, height, width))


def _guard(name: str, tensor: Tensor, dimensions: int) -> None:
    """The library takes no other."""
    if not tensor.is_cpu or tensor.dtype != torch.float32 or len(tensor.shape) != dimensions:
        raise ValueError(
            f"{name} must be float32 of {dimensions} dimensions on the CPU, got {list(tensor.shape)} {tensor.dtype} on "
            f"{tensor.device}"
        )


def convolve(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None, int, int, bool, float | None]],
    size: tuple[int, int, int],
) -> Tensor:
    """The same of checked arguments; size: that of an image of the output."""
    fields: list[float] = []
    copies = []  # must outlive the call
    for weight, bias, stride, padding, replicate, slope in layers:
        if not weight.is_contiguous():
            copies.append(weight := weight.contiguous())
        address = 0
        if bias is not None:
            if not bias.is_contiguous():
                copies.append(bias := bias.contiguous())
            address = bias.data_ptr()
        outputs, inputs, kernel, _ = weight.shape
        fields += (weight.data_ptr(), address, inputs, outputs, kernel, stride, padding, replicate)
        fields.append(1.0 if slope is None else slope)
    samples, _, height, width = x.shape
    count, slots = len(layers), torch.get_num_threads()
    described = _packed(count).pack(*fields)
    found = c_int64()
    if code := _workspace(described, count, height, width, slots, byref(found)):
        library.check(code)
    workspace = x.new_empty(found.value, dtype=torch.uint8)
    out = x.new_empty((samples, *size))
    code = _convolve(
        x.data_ptr(),
        described,
        count,
        out.data_ptr(),
        samples,
        height,
        width,
        *x.stride(),
        slots,
        workspace.data_ptr(),
        found.value,
    )
    if code:
        library.check(code)
    return out


@functools.lru_cache(maxsize=64)
def _packed(count: int) -> struct.Struct:
    return struct.Struct("=" + count * _LAYER)
