"""cross_conv2d: a convolution of every pair of two sets of images, without building the pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from icseg_kernels import backend as backends
from icseg_kernels import checks, flops, library, triton_launch
from icseg_kernels.cross_conv import native, reference, triton
from icseg_kernels.cross_conv.convolution import Geometry, convolve_both
from icseg_kernels.numerics import autocast

__all__ = ["cross_conv2d", "cross_conv2d_and_mean", "cross_conv2d_mean"]

# torch.nn.Conv2d's names -> torch.nn.functional.pad's
_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}
_ACTIVATIONS = ("relu", "leaky_relu", "gelu")
_IMPLEMENTATIONS: dict[str, Any] = {"triton": triton, "native": native, "reference": reference}

for _op in ("cross_conv2d", "cross_conv2d_mean", "cross_conv2d_and_mean"):
    backends.declare(
        _op,
        {
            "triton": backends.Backend(triton_launch.missing, triton.unsupported, triton_launch.slower),
            "native": backends.Backend(library.missing, native.unsupported),
            "reference": backends.Backend(),
        },
    )


def cross_conv2d(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = "same",
    dilation: int | tuple[int, int] = 1,
    padding_mode: str = "zeros",
    activation: str | None = None,
    negative_slope: float = 0.01,
    backend: str | None = None,
) -> Tensor:
    """Convolve every x concatenated with every y, along channels: out[b, i, j] = act(conv([x[b, i]; y[b, j]])).

    UniverSeg's CrossConv2d (arXiv 2304.06131, section 3.2) as conv_x(x[b, i]) + conv_y(y[b, j]): exact,
    Sx + Sy convolutions instead of Sx * Sy, and the concatenation never exists.

    x:            [B, Sx, Cx, H, W] float16, bfloat16, float32 or float64; H, W > 0. Cx may be 0, or else Cy.
    y:            [B, Sy, Cy, H, W].
    weight:       [Co, Cx + Cy, kh, kw], none of them 0, the channels of x first, as for torch.nn.Conv2d.
    bias:         [Co] or None. All of one dtype, unless autocast is enabled, which acts as on torch.nn.Conv2d.
    stride, dilation, padding, padding_mode: as torch.nn.Conv2d; padding="same", the default, needs stride 1.
    activation:   of every pair: None, "relu", "leaky_relu" (slope `negative_slope` below 0) or "gelu" (exact).
    backend:      None, "triton" (CUDA, not float64), "native" (CPU) or "reference": of what follows the convolutions,
                  which are torch's.
    Returns [B, Sx, Sy, Co, Ho, Wo]. Differentiable, any number of times, also in forward mode; with an activation
    once, and in reverse mode only. Raises TypeError or ValueError for an argument of another type, dtype, shape,
    device or range, BackendError if the named backend cannot serve.

    ```
    x, y = torch.randn(2, 1, 64, 32, 32), torch.randn(2, 8, 64, 32, 32)     # one target, eight supports
    z = cross_conv2d(x, y, torch.randn(64, 128, 3, 3))                      # [2, 1, 8, 64, 32, 32]
    ```
    """
    x, y, weight, bias = _checked_tensors(x, y, weight, bias)
    geometry = _checked_geometry(x, weight, stride, padding, dilation, padding_mode)
    slope = _checked_activation(activation, negative_slope)
    name = backends.select("cross_conv2d", backend, x)
    zx, zy = convolve_both(x, y, weight, bias, geometry)
    if activation is None and not _serves_sum(zx, zy, name):
        return zx[:, :, None] + zy[:, None]
    return _activated(zx, zy, True, False, activation, slope, name)[0]


def cross_conv2d_mean(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = "same",
    dilation: int | tuple[int, int] = 1,
    padding_mode: str = "zeros",
    activation: str | None = None,
    negative_slope: float = 0.01,
    backend: str | None = None,
) -> Tensor:
    """The mean over y of `cross_conv2d`, [B, Sx, Co, Ho, Wo].

    Arguments as for `cross_conv2d`. Without an activation by convolving the mean of y, exact because the convolution
    is linear; with one it is the mean of the activated pairs, added up in the order of y, which never exist at once.
    Sy must be at least 1. Raises as `cross_conv2d` does.
    """
    x, y, weight, bias = _checked_tensors(x, y, weight, bias)
    _check_not_empty(y)
    geometry = _checked_geometry(x, weight, stride, padding, dilation, padding_mode)
    slope = _checked_activation(activation, negative_slope)
    name = backends.select("cross_conv2d_mean", backend, x)
    if activation is None:
        zx, zy = convolve_both(x, y.mean(dim=1, keepdim=True), weight, bias, geometry)
        return zx + zy
    zx, zy = convolve_both(x, y, weight, bias, geometry)
    return _activated(zx, zy, False, True, activation, slope, name)[1]


def cross_conv2d_and_mean(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: str | int | tuple[int, int] = "same",
    dilation: int | tuple[int, int] = 1,
    padding_mode: str = "zeros",
    activation: str | None = None,
    negative_slope: float = 0.01,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`cross_conv2d` and its mean over y, [B, Sx, Sy, Co, Ho, Wo] and [B, Sx, Co, Ho, Wo], in one pass.

    What a block of UniverSeg reads: the pairs become the new support set, their mean the new target. Arguments as for
    `cross_conv2d`. Once differentiable, in reverse mode only, also without an activation. Sy must be at least 1.
    Raises as `cross_conv2d` does.

    ```
    x, y = torch.randn(2, 1, 64, 32, 32), torch.randn(2, 8, 64, 32, 32)              # one target, eight supports
    support, target = cross_conv2d_and_mean(x, y, torch.randn(64, 128, 3, 3))        # [2, 1, 8, ...], [2, 1, ...]
    ```
    """
    x, y, weight, bias = _checked_tensors(x, y, weight, bias)
    _check_not_empty(y)
    geometry = _checked_geometry(x, weight, stride, padding, dilation, padding_mode)
    slope = _checked_activation(activation, negative_slope)
    name = backends.select("cross_conv2d_and_mean", backend, x)
    zx, zy = convolve_both(x, y, weight, bias, geometry)
    return _activated(zx, zy, True, True, activation, slope, name)


def _serves_sum(zx: Tensor, zy: Tensor, backend: str) -> bool:
    """Whether the tail is to add without an activation: where it adds in place, and nobody differentiates."""
    return backend == "native" and zx.shape[1] == 1 and zx.dtype.itemsize >= 4 and backends.unwatched((zx, zy))


def _activated(
    zx: Tensor, zy: Tensor, pairs: bool, mean: bool, activation: str | None, slope: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Pairs and their mean, whichever are wanted.

    zx and zy must be of nobody else: what `convolve_both` has just made. If nobody watches, zy is overwritten.
    """
    if zx.shape[2:] != zy.shape[2:]:  # one of them comes of no channels
        image = torch.broadcast_shapes(zx.shape[2:], zy.shape[2:])
        zx, zy = zx.expand(*zx.shape[:2], *image), zy.expand(*zy.shape[:2], *image)
    elif _channels_last(zx) and _channels_last(zy):  # what follows is elementwise
        results = _activated(zx.movedim(2, -1), zy.movedim(2, -1), pairs, mean, activation, slope, backend)
        return results[0].movedim(-1, 3) if pairs else results[0], results[1].movedim(-1, 2) if mean else results[1]
    if backend != "reference" and backends.unwatched((zx, zy)):
        found: tuple[Tensor, Tensor] = _IMPLEMENTATIONS[backend].tail(
            zx, zy, pairs, mean, activation, slope, overwrite=True
        )
        return found
    return backends.call(_CrossTail, _tail, zx, zy, pairs, mean, activation, slope, backend)


def _channels_last(z: Tensor) -> bool:
    return not z.is_contiguous() and z.movedim(2, -1).is_contiguous()


class _CrossTail(torch.autograd.Function):
    @staticmethod
    def forward(
        zx: Tensor, zy: Tensor, pairs: bool, mean: bool, activation: str | None, slope: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        return _tail(zx, zy, pairs, mean, activation, slope, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        zx, zy, ctx.pairs, ctx.mean, ctx.activation, ctx.slope, ctx.backend = inputs
        ctx.save_for_backward(zx, zy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_pairs: Tensor, grad_mean: Tensor) -> tuple[Tensor | None, ...]:
        wanted = grad_pairs if ctx.pairs else None, grad_mean if ctx.mean else None
        grads = _tail_backward(*ctx.saved_tensors, *wanted, ctx.activation, ctx.slope, ctx.backend)
        return *grads, None, None, None, None, None


def _tail_implementation(
    zx: Tensor, zy: Tensor, pairs: bool, mean: bool, activation: str | None, slope: float, backend: str
) -> tuple[Tensor, Tensor]:
    return _IMPLEMENTATIONS[backend].tail(zx, zy, pairs, mean, activation, slope)


def _tail_fake(zx: Tensor, zy: Tensor, pairs: bool, mean: bool, *_: Any) -> tuple[Tensor, Tensor]:
    batch, xs, *image = zx.shape
    return zx.new_empty((batch, xs, zy.shape[1], *image) if pairs else 0), zx.new_empty(zx.shape if mean else 0)


def _tail_backward_implementation(
    zx: Tensor,
    zy: Tensor,
    grad_pairs: Tensor | None,
    grad_mean: Tensor | None,
    activation: str | None,
    slope: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _IMPLEMENTATIONS[backend].tail_backward(zx, zy, grad_pairs, grad_mean, activation, slope)


def _tail_backward_fake(zx: Tensor, zy: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return zx.new_empty(zx.shape), zy.new_empty(zy.shape)


_tail = backends.register(
    "cross_conv2d_tail(Tensor zx, Tensor zy, bool pairs, bool mean, str? activation, float slope, str backend)"
    " -> (Tensor, Tensor)",
    _tail_implementation,
    _tail_fake,
)
_tail_backward = backends.register(
    "cross_conv2d_tail_backward(Tensor zx, Tensor zy, Tensor? grad_pairs, Tensor? grad_mean, str? activation,"
    " float slope, str backend) -> (Tensor, Tensor)",
    _tail_backward_implementation,
    _tail_backward_fake,
)


def _no_flops(*_: Any, **__: Any) -> int:
    """Elementwise: the convolutions count themselves."""
    return 0


flops.register(_tail, _no_flops)
flops.register(_tail_backward, _no_flops)


def _check_not_empty(y: Tensor) -> None:
    if y.shape[1] == 0:
        raise ValueError("y must hold at least one image to take the mean of, got Sy = 0")


def _checked_activation(activation: Any, negative_slope: Any) -> float:
    """The slope."""
    if activation is not None and activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)} or None, got {activation!r}")
    return checks.number("negative_slope", negative_slope)


def _checked_tensors(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors as autocast has them."""
    named = {"x": x, "y": y, "weight": weight} | ({} if bias is None else {"bias": bias})
    named = {name: autocast(checks.floating(name, value)) for name, value in named.items()}
    x, y, weight, bias = named["x"], named["y"], named["weight"], named.get("bias")
    for name, value in named.items():
        checks.device(name, value, x.device)
        if value.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {value.dtype}")
    if x.ndim != 5 or 0 in x.shape[3:]:
        raise ValueError(f"x must have shape [B, Sx, Cx, H, W] with H, W > 0, got {list(x.shape)}")
    b, _, cx, h, w = x.shape
    if y.ndim != 5 or y.shape[0] != b or y.shape[3:] != x.shape[3:]:
        raise ValueError(f"y must have shape [B, Sy, Cy, H, W] with B, H, W = {b}, {h}, {w}, got {list(y.shape)}")
    channels = cx + y.shape[2]
    if channels == 0:
        raise ValueError("x and y must have at least one channel between them, got Cx = Cy = 0")
    if weight.ndim != 4 or weight.shape[1] != channels or 0 in weight.shape:
        raise ValueError(
            f"weight must have shape [Co, {channels}, kh, kw] (Cx + Cy), none of them 0, got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    return x, y, weight, bias


def _checked_geometry(
    x: Tensor,
    weight: Tensor,
    stride: int | tuple[int, int],
    padding: str | int | tuple[int, int],
    dilation: int | tuple[int, int],
    padding_mode: str,
) -> Geometry:
    if padding_mode not in _PAD_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(_PAD_MODES)}, got {padding_mode!r}")
    strides = checks.one_or_pair("stride", stride, 1)
    dilations = checks.one_or_pair("dilation", dilation, 1)
    (h, w), (kh, kw) = x.shape[3:], weight.shape[2:]
    reach = dilations[0] * (kh - 1), dilations[1] * (kw - 1)
    left, right, top, bottom = _pads(padding, strides, reach)
    if reach[0] >= h + top + bottom or reach[1] >= w + left + right:
        padded = f"{h + top + bottom} x {w + left + right}"
        raise ValueError(
            f"weight must fit the padded images of {padded} pixels, got {reach[0] + 1} x {reach[1] + 1} (dilated)"
        )
    spare = {"reflect": 1, "circular": 0}.get(padding_mode)
    if spare is not None and (max(left, right) > w - spare or max(top, bottom) > h - spare):
        raise ValueError(
            f'padding must be at most {h - spare} x {w - spare} pixels for padding_mode="{padding_mode}" '
            f"of {h} x {w}, got {max(top, bottom)} x {max(left, right)}"
        )
    return Geometry(strides, dilations, (left, right, top, bottom), _PAD_MODES[padding_mode])


def _pads(
    padding: str | int | tuple[int, int], stride: tuple[int, int], reach: tuple[int, int]
) -> tuple[int, int, int, int]:
    """left, right, top, bottom; reach: from the first to the last row and column that an output pixel sees."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f'padding="same" needs stride 1, got {stride}')
        height, width = reach
        return width // 2, width - width // 2, height // 2, height - height // 2
    if isinstance(padding, str):
        raise ValueError(f'padding must be "same", "valid", an integer or a pair of them, got {padding!r}')
    top, left = checks.one_or_pair("padding", padding, 0)
    return left, left, top, top
