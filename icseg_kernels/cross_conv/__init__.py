"""cross_conv2d: a convolution of every pair of two sets of images, without building the pairs."""

from __future__ import annotations

from torch import Tensor

from icseg_kernels import backend as backends
from icseg_kernels.cross_conv import reference

__all__ = ["cross_conv2d", "cross_conv2d_mean"]

# torch.nn.Conv2d's names -> torch.nn.functional.pad's
_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}

for _op in ("cross_conv2d", "cross_conv2d_mean"):
    backends.declare(_op, {"reference": backends.Backend()})


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
    backend: str | None = None,
) -> Tensor:
    """Convolve every x concatenated with every y, along channels: out[b, i, j] = conv([x[b, i]; y[b, j]]).

    UniverSeg's CrossConv2d (arXiv 2304.06131, section 3.2) as conv_x(x[b, i]) + conv_y(y[b, j]): exact,
    Sx + Sy convolutions instead of Sx * Sy, and the concatenation never exists.

    x:            [B, Sx, Cx, H, W] floating point.
    y:            [B, Sy, Cy, H, W], same dtype.
    weight:       [Co, Cx + Cy, kh, kw], the channels of x first, as for torch.nn.Conv2d.
    bias:         [Co] or None.
    stride, dilation, padding, padding_mode: as torch.nn.Conv2d; padding="same", the default, needs stride 1.
    backend:      None or "reference".
    Returns [B, Sx, Sy, Co, Ho, Wo]. Differentiable, any number of times. Raises TypeError or ValueError.

    ```
    x, y = torch.randn(2, 1, 64, 32, 32), torch.randn(2, 8, 64, 32, 32)     # one target, eight supports
    z = cross_conv2d(x, y, torch.randn(64, 128, 3, 3))                      # [2, 1, 8, 64, 32, 32]
    ```
    """
    settings = _checked(x, y, weight, bias, stride, padding, dilation, padding_mode)
    backends.select("cross_conv2d", backend, x, y, weight)
    return reference.cross_conv2d(x, y, weight, bias, *settings)


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
    backend: str | None = None,
) -> Tensor:
    """The mean over y of `cross_conv2d`, [B, Sx, Co, Ho, Wo], by convolving the mean of y.

    Arguments as for `cross_conv2d`. Exact because the convolution is linear; it is not the mean of anything
    applied after a nonlinearity. Sy must be at least 1.
    """
    settings = _checked(x, y, weight, bias, stride, padding, dilation, padding_mode)
    if y.shape[1] == 0:
        raise ValueError("y must hold at least one image to take the mean of, got Sy = 0")
    backends.select("cross_conv2d_mean", backend, x, y, weight)
    return reference.cross_conv2d_mean(x, y, weight, bias, *settings)


def _checked(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | tuple[int, int],
    padding: str | int | tuple[int, int],
    dilation: int | tuple[int, int],
    padding_mode: str,
) -> tuple[tuple[int, int], reference.Pads, tuple[int, int], str]:
    """Check shapes; return stride, pads (left, right, top, bottom), dilation and the mode of F.pad."""
    if x.ndim != 5:
        raise ValueError(f"x must have shape [B, Sx, Cx, H, W], got {list(x.shape)}")
    b, _, cx, h, w = x.shape
    if y.ndim != 5 or y.shape[0] != b or y.shape[3:] != x.shape[3:]:
        raise ValueError(
            f"y must have shape [B, Sy, Cy, H, W] with B, H, W = {b}, {h}, {w}, got {list(y.shape)}"
        )
    channels = cx + y.shape[2]
    if weight.ndim != 4 or weight.shape[1] != channels:
        raise ValueError(
            f"weight must have shape [Co, {channels}, kh, kw] (Cx + Cy), got {list(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    if padding_mode not in _PAD_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(_PAD_MODES)}, got {padding_mode!r}")
    strides, dilations = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    pads = _pads(padding, strides, dilations, (weight.shape[2], weight.shape[3]))
    return strides, pads, dilations, _PAD_MODES[padding_mode]


def _pads(
    padding: str | int | tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    kernel: tuple[int, int],
) -> reference.Pads:
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f'padding="same" needs stride 1, got {stride}')
        height, width = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return width // 2, width - width // 2, height // 2, height - height // 2
    if isinstance(padding, str):
        raise ValueError(f'padding must be "same", "valid", an int or two ints, got {padding!r}')
    top, left = _pair("padding", padding, 0)
    return left, left, top, top


def _pair(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name} must be one or two ints of at least {least}, got {value!r}")
    return pair
