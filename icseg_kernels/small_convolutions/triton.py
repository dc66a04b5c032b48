"""small_convolutions by a Triton kernel, without gradients: one launch for every four layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from icseg_kernels import triton_launch
from icseg_kernels.backend import without_gradients

if TYPE_CHECKING:
    from icseg_kernels.small_convolutions import ConvLayer

MOST_CHANNELS, MOST_PIXELS = 128, 32  # of a map, of a map's side
LAYERS = 4  # of a launch
_ENOUGH = 264  # programs that share no images, before a program takes several: two for each multiprocessor of an H100
_PROGRAMS = 4  # for each multiprocessor, before a program takes one group of images after the other

Size = tuple[int, int, int]  # channels, height, width


class Layer(NamedTuple):
    """What a launch is compiled for: as of ConvLayer."""

    outputs: int
    kernel: int
    stride: int
    padding: int
    replicate: bool

    def size(self, size: Size) -> Size:
        """That of the output, for that of the input."""
        _, height, width = size
        reach = 2 * self.padding - self.kernel
        return self.outputs, (height + reach) // self.stride + 1, (width + reach) // self.stride + 1


class Plan(NamedTuple):
    """How a launch goes about it.

    images:       of a group, which a program convolves together.
    second, slot: elements of scratch before the second map, and of one program.
    rows:         pixels at a time, of each layer.
    terms:        products summed up at a time.
    warps:        of a program.
    """

    images: int
    second: int
    slot: int
    rows: tuple[int, ...]
    terms: int
    warps: int


def plan(size: Size, layers: Sequence[Layer], samples: int, *, fused: bool) -> Plan:
    """For up to LAYERS layers of `samples` images; fused: by fused multiply-adds, not on tensor cores."""
    maps = []  # pixels, channels with padding
    for layer in layers:
        size = layer.size(size)
        maps.append((size[1] * size[2], padded(size[0])))
    pixels, widest = (max(values) for values in zip(*maps, strict=True))
    images = 1
    while 2 * images * pixels <= 128 and math.ceil(samples / (2 * images)) >= _ENOUGH:
        images *= 2
    kept = [images * count * width for count, width in maps[:-1]] + [0, 0]
    second = max(kept[::2])
    most = 128 if widest <= 64 else 64
    rows = tuple(max(16, min(most, triton_launch.power_of_two(images * count))) for count, _ in maps)
    warps = 8 if max(rows) * max(widest, 32) >= 4096 else 4
    return Plan(images, second, second + max(kept[1::2]), rows, 16 if fused else 32, warps)


def constants(size: Size, layers: Sequence[Layer], chosen: Plan) -> dict[str, Any]:
    """The kernel's, of sizes: by name."""
    channels, height, width = size
    found: dict[str, Any] = {
        "LAYERS": len(layers),
        "IMAGES": chosen.images,
        "SECOND": chosen.second,
        "SLOT": chosen.slot,
        "BLOCK_K": chosen.terms,
        "C0": channels,
        "H0": height,
        "W0": width,
    }
    nothing = Layer(0, 0, 0, 0, False)
    for i, layer in enumerate([*layers, *[nothing] * (LAYERS - len(layers))], 1):
        found |= {f"C{i}": layer.outputs, f"KERNEL{i}": layer.kernel, f"STRIDE{i}": layer.stride}
        found |= {f"PADDING{i}": layer.padding, f"REPLICATE{i}": layer.replicate, f"WIDTH{i}": padded(layer.outputs)}
        found[f"ROWS{i}"] = chosen.rows[i - 1] if i <= len(layers) else 0
    return found


def padded(channels: int) -> int:
    """Channels of a map in scratch: products need 16 of them."""
    return max(16, triton_launch.power_of_two(channels))


def unsupported(x: Tensor, layers: Sequence[ConvLayer], sizes: Sequence[Size]) -> list[str]:
    """Why the kernel cannot convolve `x`; sizes: channels, height and width of x and of the outputs of the layers."""
    reasons = triton_launch.unsupported_device("x", x) + triton_launch.unsupported_dtype("x", x)
    tensors = (tensor for layer in layers for tensor in (layer.weight, layer.bias))
    reasons += without_gradients("x, a weight or a bias", (x, *tensors))
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
    layers = list(zip(weights, biases, strides, paddings, replicates, slopes, strict=True))
    if x.ndim != 4 or 0 in x.shape[1:] or not layers:
        raise ValueError(f"x must be [N, C, h, w] with C, h, w > 0, with layers, got {list(x.shape)}")
    size = x.shape[1], x.shape[2], x.shape[3]
    for weight, bias, stride, padding, replicate, _ in layers:
        for tensor in (weight,) if bias is None else (weight, bias):
            if tensor.device != x.device or tensor.dtype != x.dtype:
                raise ValueError(f"weights and biases must be {x.dtype} on {x.device}, got {tensor.dtype}")
        kernel = weight.shape[-1]
        if stride < 1 or padding < 0 or weight.shape[1:] != (size[0], kernel, kernel) or 0 in weight.shape:
            raise ValueError(f"weight must have shape [Co, {size[0]}, k, k], got {list(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
        size = Layer(weight.shape[0], kernel, stride, padding, replicate).size(size)
        if min(size) < 1:
            raise ValueError(f"weight must fit the padded images, got {list(weight.shape)}")
    return convolve(x, layers, size)


def convolve(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None, int, int, bool, float | None]],
    size: Size,
) -> Tensor:
    """The same of checked arguments; size: that of an image of the output."""
    for start in range(0, len(layers), LAYERS):
        x = _launched(x, layers[start : start + LAYERS])
    return x


def _launched(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None, int, int, bool, float | None]]) -> Tensor:
    import triton.language as tl

    from icseg_kernels.small_convolutions.triton_kernels import stack_kernel

    samples, *image = x.shape
    channels, height, width = size = image[0], image[1], image[2]
    if max(sum((n - 1) * s for n, s in zip(image, x.stride()[1:], strict=True)), x.stride(0)) >= 2**31:
        x = x.contiguous()  # offsets within an image are of 32 bits
    shapes = [
        Layer(weight.shape[0], weight.shape[2], int(stride), int(padding), bool(replicate))
        for weight, _, stride, padding, replicate, _ in layers
    ]
    precise = x.dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    chosen = plan(size, shapes, samples, fused=precise and x.dtype.itemsize >= 4)
    for shape in shapes:
        size = shape.size(size)
    out = x.new_empty((samples, *size))
    groups = math.ceil(samples / chosen.images)
    programs = min(groups, _most_programs(x.device))
    tensors: list[Tensor | None] = []
    slopes = []
    for weight, bias, *_, slope in layers:
        tensors += [weight.contiguous(), None if bias is None else bias.contiguous()]
        slopes.append(1.0 if slope is None else slope)
    missing = LAYERS - len(layers)
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    narrow = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    triton_launch.launch(
        stack_kernel,
        (programs,),
        x.device,
        x,
        out,
        x.new_empty(programs * chosen.slot),
        *tensors,
        *[None] * (2 * missing),
        *slopes,
        *[1.0] * missing,
        *x.stride(),
        samples,
        groups,
        **constants((channels, height, width), shapes, chosen),
        OPERAND=wide if triton_launch.INTERPRETED else narrow.get(x.dtype, wide),
        ACC=wide,
        PRECISION="ieee" if precise else "tf32",
        num_warps=chosen.warps,
        num_stages=1,
    )
    return out


def _most_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 2
    return _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
