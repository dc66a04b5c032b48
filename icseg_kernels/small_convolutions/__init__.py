"""small_convolutions: several convolutions, one after the other, of many small images, in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from icseg_kernels import backend as backends
from icseg_kernels import checks, flops, library, triton_launch
from icseg_kernels.small_convolutions import native, reference, triton

__all__ = ["ConvLayer", "small_convolutions"]

_IMPLEMENTATIONS: dict[str, Any] = {"triton": triton, "native": native}  # the reference is differentiable as it is


class ConvLayer(NamedTuple):
    """A convolution and what follows it.

    weight:         [Co, Ci, k, k], k from 1 to 5.
    bias:           [Co], or None.
    stride:         1 or 2.
    padding:        0 to k - 1 pixels on every side: zeros, or with `replicate` the nearest pixels of the border.
    negative_slope: of the leaky ReLU that follows; None: nothing does.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: int = 1
    padding: int = 0
    replicate: bool = False
    negative_slope: float | None = None


def small_convolutions(x: Tensor, layers: Sequence[ConvLayer], *, backend: str | None = None) -> Tensor:
    """Convolve every image of x by the layers, one after the other; what lies between them never leaves the cache.

    x:       [N, C, h, w] float16, bfloat16, float32 or float64, any strides; C, h, w > 0.
    layers:  at least one; weights and biases of the dtype of x.
    backend: None, "triton" (CUDA, not float64), "native" (float32 on the CPU, up to 16 layers), both without gradients
             and for maps of up to 128 channels and 32 x 32 pixels, or "reference", torch's own convolutions. "triton"
             rounds factors of float32 to TF32 where torch.set_float32_matmul_precision allows it.
    Returns [N, C', h', w'], contiguous. Differentiable as torch's convolutions are: where a gradient is wanted, the
    reference serves. Under autocast, 16-bit tensors become float32, in which the layers are then computed. Raises
    TypeError or ValueError for an argument of another type, dtype, shape, device or range, BackendError if the named
    backend cannot serve.

    ```
    x = torch.randn(64, 3, 16, 16)                                              # 64 patches
    layers = [
        ConvLayer(torch.randn(12, 3, 3, 3), torch.randn(12), negative_slope=0.01),
        ConvLayer(torch.randn(24, 12, 4, 4), stride=2, padding=1),
    ]
    small_convolutions(x, layers)                                               # [64, 24, 7, 7]
    ```
    """
    checks.floating("x", x)
    shape = x.shape
    if len(shape) != 4 or 0 in shape[1:]:
        raise ValueError(f"x must have shape [N, C, h, w] with C, h, w > 0, got {list(shape)}")
    if type(layers) is not list and (not isinstance(layers, Sequence) or isinstance(layers, (str, bytes, ConvLayer))):
        raise TypeError(f"layers must be a sequence of ConvLayer, got {type(layers).__name__}")
    if not layers:
        raise ValueError("layers must have at least one ConvLayer, got none")
    kind = x.device.type
    autocasting = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if autocasting:
        x, layers = _widened(x), [_widened_layer(layer) for layer in layers]
    size = shape[1], shape[2], shape[3]
    sizes = [size]
    for i, layer in enumerate(layers):
        sizes.append(size := _checked(f"layers[{i}]", layer, x, size))
    name = backends.select("small_convolutions", backend, x, layers, sizes)
    if name == "reference":
        if not autocasting:
            return reference.small_convolutions(x, layers)
        with torch.autocast(kind, enabled=False):
            return reference.small_convolutions(x, layers)
    if backends.unwatched((x, *(tensor for layer in layers for tensor in layer[:2]))):
        convolved: Tensor = _IMPLEMENTATIONS[name].convolve(x, layers, size)
        return convolved
    weights, biases, strides, paddings, replicates, slopes = map(list, zip(*layers, strict=True))
    slopes = [1.0 if slope is None else float(slope) for slope in slopes]
    return _small_convolutions(
        x, weights, biases, list(map(int, strides)), list(map(int, paddings)), replicates, slopes, name
    )


def _checked(name: str, layer: ConvLayer, x: Tensor, size: tuple[int, int, int]) -> tuple[int, int, int]:
    """Channels, height and width of what the layer makes of as much."""
    if not isinstance(layer, ConvLayer):
        raise TypeError(f"{name} must be a ConvLayer, got {type(layer).__name__}")
    weight, bias, stride, padding, replicate, negative_slope = layer
    channels, height, width = size
    if not _follows(weight, x):
        _check_tensor(f"{name}.weight", weight, x)
    shape = weight.shape
    if len(shape) != 4 or shape[1] != channels or shape[0] < 1 or shape[2] != shape[3] or not 1 <= shape[2] <= 5:
        raise ValueError(f"{name}.weight must have shape [Co, {channels}, k, k] with k from 1 to 5, got {list(shape)}")
    outputs, kernel = shape[0], shape[2]
    if bias is not None:
        if not _follows(bias, x):
            _check_tensor(f"{name}.bias", bias, x)
        if bias.shape != (outputs,):
            raise ValueError(f"{name}.bias must have shape [{outputs}], got {list(bias.shape)}")
    if type(stride) is not int or not 1 <= stride <= 2:
        stride = checks.integer(f"{name}.stride", stride, 1, 2)
    if type(padding) is not int or not 0 <= padding < kernel:
        padding = checks.integer(f"{name}.padding", padding, 0, kernel - 1)
    if not isinstance(replicate, bool):
        raise TypeError(f"{name}.replicate must be True or False, got {checks.shown(replicate)}")
    if negative_slope is not None and not (type(negative_slope) is float and -math.inf < negative_slope < math.inf):
        checks.number(f"{name}.negative_slope", negative_slope)
    if height + 2 * padding < kernel or width + 2 * padding < kernel:
        padded = f"{height + 2 * padding} x {width + 2 * padding}"
        raise ValueError(f"{name}.weight must fit the padded images of {padded} pixels, got {kernel} x {kernel}")
    return outputs, (height + 2 * padding - kernel) // stride + 1, (width + 2 * padding - kernel) // stride + 1


def _follows(value: Any, x: Tensor) -> bool:
    """Whether it is a tensor such as x, in the usual case; without building names."""
    return type(value) in _PLAIN and value.dtype == x.dtype and value.device == x.device and value.layout == x.layout


_PLAIN = (Tensor, torch.nn.Parameter)


def _check_tensor(name: str, value: Tensor, x: Tensor) -> None:
    checks.floating(name, value)
    checks.device(name, value, x.device)
    if value.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {value.dtype}")


def _widened(x: Tensor) -> Tensor:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize < 4 else x


def _widened_layer(layer: ConvLayer) -> ConvLayer:
    if not isinstance(layer, ConvLayer):
        return layer
    bias = None if layer.bias is None else _widened(layer.bias)
    return layer._replace(weight=_widened(layer.weight), bias=bias)


def _implementation(*arguments: Any) -> Tensor:
    *of_layers, backend = arguments
    found: Tensor = _IMPLEMENTATIONS[backend].small_convolutions(*of_layers)
    return found


def _fake(x: Tensor, weights: list[Tensor], _: Any, strides: list[int], paddings: list[int], *rest: Any) -> Tensor:
    height, width = x.shape[2:]
    for weight, stride, padding in zip(weights, strides, paddings, strict=True):
        height, width = ((side + 2 * padding - weight.shape[2]) // stride + 1 for side in (height, width))
    return x.new_empty((x.shape[0], weights[-1].shape[0], height, width))


_small_convolutions = backends.register(
    "small_convolutions(Tensor x, Tensor[] weights, Tensor?[] biases, SymInt[] strides, SymInt[] paddings,"
    " bool[] replicates, float[] slopes, str backend) -> Tensor",
    _implementation,
    _fake,
)
backends.declare(
    "small_convolutions",
    {
        "triton": backends.Backend(triton_launch.missing, triton.unsupported, triton_launch.slower),
        "native": backends.Backend(library.missing, native.unsupported),
        "reference": backends.Backend(),
    },
)


def _flops(x: Any, weights: Any, biases: Any, strides: Any, paddings: Any, *_: Any, **__: Any) -> int:
    layers = [(w[0], w[2], s, p) for w, s, p in zip(weights, strides, paddings, strict=True)]
    images, channels, height, width = x
    return flops.small_convolutions_flops(images, channels, height, width, layers)


flops.register(_small_convolutions, _flops)
