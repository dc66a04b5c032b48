"""Cross convolutions in any model: targets and supports convolved apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from icseg_kernels.accelerate.report import Change
from icseg_kernels.accelerate.rewrite import Rewritten, Switches, foreign, geometry, known, overridden
from icseg_kernels.cross_conv import cross_conv2d
from icseg_kernels.nn.cross_conv import CrossConv2d

NAMES = ("CrossConv2d", "FastCrossConv2d")


def rewrite(name: str, module: nn.Module, switches: Switches, changes: list[Change], replaced: list[Rewritten]) -> None:
    """Split the module if it is a cross convolution that concatenates."""
    if not known(module, NAMES) or not isinstance(module, nn.Conv2d):
        return
    if not switches.split:
        reason = "switched off"
    elif known(module, ("FastCrossConv2d",)) or (isinstance(module, CrossConv2d) and module.groups == 1):
        reason = "the model splits it already"
    else:
        reason = CrossConvolution.refusal(module)
    changes.append(Change(name, "", "split", not reason, reason))
    if not reason:
        replaced.append(CrossConvolution(module, switches))


def mismatch(conv: Any) -> str:
    """Why the module is not a cross convolution that can be split, or ""."""
    if not known(conv, NAMES) or not isinstance(conv, nn.Conv2d):
        return f"{type(conv).__name__} is no cross convolution"
    if overridden(conv) or type(conv)._conv_forward is not nn.Conv2d._conv_forward:
        return "the forward of a cross convolution has been replaced already"
    if conv.groups != 1:
        return f"{conv.groups} groups of channels, which targets and supports share"
    return foreign(conv, ("weight", "bias", "parametrizations"))


class CrossConvolution(Rewritten):
    """The forward of one cross convolution."""

    arguments = ("x", "y")

    @classmethod
    def mismatch(cls, module: Any) -> str:
        return mismatch(module)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[B, Sx, Cx, H, W], [B, Sy, Cy, H, W] -> [B, Sx, Sy, Co, Ho, Wo]"""
        if mismatch(self.module):
            found: Tensor = self.original(x, y)
            return found
        dtype = torch.promote_types(x.dtype, y.dtype)  # as their concatenation
        return cross_conv2d(x.to(dtype), y.to(dtype), self.module.weight, self.module.bias, **geometry(self.module))
