"""cross_conv2d: a convolution of every pair of two sets of images, without building the pairs."""

from __future__ import annotations

from torch import Tensor

from icseg_kernels import backend as backends
from icseg_kernels import checks
from icseg_kernels.cross_conv import reference
from icseg_kernels.cross_conv.reference import Geometry
from icseg_kernels.numerics import autocast

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

    x:            [B, Sx, Cx, H, W] float16, bfloat16, float32 or float64; H, W > 0. Cx may be 0, or else Cy.
    y:            [B, Sy, Cy, H, W].
    weight:       [Co, Cx + Cy, kh, kw], none of them 0, the channels of x first, as for torch.nn.Conv2d.
    bias:         [Co] or None. All of one dtype, unless autocast is enabled, which acts as on torch.nn.Conv2d.
    stride, dilation, padding, padding_mode: as torch.nn.Conv2d; padding="same", the default, needs stride 1.
    backend:      None or "reference".
    Returns [B, Sx, Sy, Co, Ho, Wo]. Differentiable, any number of times, also in forward mode. Raises TypeError or
    ValueError for an argument of another type, dtype, shape, device or range, BackendError if the named backend
    cannot serve.

    ```
    x, y = torch.randn(2, 1, 64, 32, 32), torch.randn(2, 8, 64, 32, 32)     # one target, eight supports
    z = cross_conv2d(x, y, torch.randn(64, 128, 3, 3))                      # [2, 1, 8, 64, 32, 32]
    ```
    """
    x, y, weight, bias = _checked_tensors(x, y, weight, bias)
    geometry = _checked_geometry(x, weight, stride, padding, dilation, padding_mode)
    backends.select("cross_conv2d", backend, x, y, weight)
    return reference.cross_conv2d(x, y, weight, bias, geometry)


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
    applied after a nonlinearity. Sy must be at least 1. Raises as `cross_conv2d` does.
    """
    x, y, weight, bias = _checked_tensors(x, y, weight, bias)
    if y.shape[1] == 0:
        raise ValueError("y must hold at least one image to take the mean of, got Sy = 0")
    geometry = _checked_geometry(x, weight, stride, padding, dilation, padding_mode)
    backends.select("cross_conv2d_mean", backend, x, y, weight)
    return reference.cross_conv2d_mean(x, y, weight, bias, geometry)


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
