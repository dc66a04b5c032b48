"""UniverSeg's cross convolution as a module, for images and volumes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from icseg_kernels import checks
from icseg_kernels.cross_conv import cross_conv2d, cross_conv2d_mean

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class CrossConv2d(nn.Conv2d):
    """A convolution of every pair of two sets of images: out[b, i, j] = conv([x[b, i]; y[b, j]]).

    Constructor, state dict and outputs are those of UniverSeg's CrossConv2d (arXiv 2304.06131); the convolution is
    split (`icseg_kernels.cross_conv2d`), so that the concatenation never exists and costs Sx + Sy convolutions instead
    of Sx * Sy. With groups > 1 the pairs are concatenated.

    in_channels: (Cx, Cy), or an int for both. All else is as for torch.nn.Conv2d.
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        channels = sum(checks.one_or_pair("in_channels", in_channels, 0))
        super().__init__(
            channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """x [B, Sx, Cx, H, W], y [B, Sy, Cy, H, W] -> [B, Sx, Sy, Co, Ho, Wo]. Raises TypeError or ValueError."""
        _check_sets(x, y, self.in_channels, 2)
        if self.groups > 1:
            return self._concatenated(x, y)
        return cross_conv2d(x, y, self.weight, self.bias, **self._geometry())

    def mean(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean of `forward` over y, [B, Sx, Co, Ho, Wo], by convolving the mean of y: exact, being linear.

        Sy must be at least 1.
        """
        _check_sets(x, y, self.in_channels, 2, least=1)
        if self.groups > 1:
            return self._concatenated(x, y).mean(dim=2)
        return cross_conv2d_mean(x, y, self.weight, self.bias, **self._geometry())

    def _geometry(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "padding_mode")}

    def _concatenated(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = _pairs(x, y)
        return super().forward(pairs.flatten(0, 2)).unflatten(0, pairs.shape[:3])


class CrossConv3d(nn.Conv3d):
    """`CrossConv2d` for volumes, split likewise, with torch's conv3d.

    in_channels: (Cx, Cy), or an int for both; at least 1 each. All else is as for torch.nn.Conv3d.
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: str | int | tuple[int, int, int] = 0,
        dilation: int | tuple[int, int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        channels = sum(checks.one_or_pair("in_channels", in_channels, 1))
        super().__init__(
            channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """x [B, Sx, Cx, D, H, W], y [B, Sy, Cy, D, H, W] -> [B, Sx, Sy, Co, Do, Ho, Wo]. Raises TypeError, ValueError.

        With groups > 1 the pairs are concatenated.
        """
        _check_sets(x, y, self.in_channels, 3)
        if self.groups > 1:
            pairs = _pairs(x, y)
            return super().forward(pairs.flatten(0, 2)).unflatten(0, pairs.shape[:3])
        zx, zy = self._both(x, y)
        return zx[:, :, None] + zy[:, None]

    def mean(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean of `forward` over y, [B, Sx, Co, Do, Ho, Wo], by convolving the mean of y. Sy at least 1."""
        _check_sets(x, y, self.in_channels, 3, least=1)
        if self.groups > 1:
            return self(x, y).mean(dim=2)
        zx, zy = self._both(x, y.mean(dim=1, keepdim=True))
        return zx + zy

    def _both(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        wx, wy = self.weight.split([x.shape[2], y.shape[2]], dim=1)
        zx = self._conv_forward(x.flatten(0, 1), wx, self.bias).unflatten(0, x.shape[:2])
        return zx, self._conv_forward(y.flatten(0, 1), wy, None).unflatten(0, y.shape[:2])


def _check_sets(x: Tensor, y: Tensor, channels: int, axes: int, least: int = 0) -> None:
    layout = "D, H, W" if axes == 3 else "H, W"
    checks.floating("x", x), checks.floating("y", y)
    if x.ndim != axes + 3:
        raise ValueError(f"x must have shape [B, Sx, Cx, {layout}], got {list(x.shape)}")
    if y.ndim != axes + 3 or y.shape[0] != x.shape[0] or y.shape[3:] != x.shape[3:]:
        sizes = ", ".join(str(n) for n in (x.shape[0], *x.shape[3:]))
        raise ValueError(f"y must have shape [B, Sy, Cy, {layout}] with B, {layout} = {sizes}, got {list(y.shape)}")
    if x.shape[2] + y.shape[2] != channels:
        raise ValueError(f"x and y must have {channels} channels between them, got {x.shape[2]} and {y.shape[2]}")
    if y.shape[1] < least:
        kind = "volume" if axes == 3 else "image"
        raise ValueError(f"y must hold at least one {kind} to take the mean of, got Sy = 0")


def _pairs(x: Tensor, y: Tensor) -> Tensor:
    """[B, Sx, Sy, Cx + Cy, ...]"""
    sizes = x.shape[0], x.shape[1], y.shape[1]
    return torch.cat([x[:, :, None].expand(*sizes, *x.shape[2:]), y[:, None].expand(*sizes, *y.shape[2:])], dim=3)
