"""Cross convolutions in any model: targets and supports convolved apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from icseg_kernels.accelerate.report import Change
from icseg_kernels.accelerate.rewrite import Switches, geometry, overridden
from icseg_kernels.cross_conv import cross_conv2d

NAMES = ("CrossConv2d", "FastCrossConv2d")


def rewrite(
    name: str, module: nn.Module, switches: Switches, changes: list[Change], replaced: list[tuple[nn.Module, Any]]
) -> None:
    """Split the module if it is a cross convolution that concatenates."""
    if type(module).__name__ not in NAMES or not isinstance(module, nn.Conv2d):
        return
    reason = ""
    if not switches.split:
        reason = "switched off"
    elif type(module).__name__ == "FastCrossConv2d":
        reason = "the model splits it already"
    elif overridden(module):
        reason = "its forward has been replaced already"
    elif module.groups != 1:
        reason = f"{module.groups} groups of channels, which targets and supports share"
    changes.append(Change(name, "", "split", not reason, reason))
    if not reason:
        replaced.append((module, CrossConvolution(module).forward))


class CrossConvolution:
    """The forward of one cross convolution."""

    def __init__(self, module: nn.Conv2d) -> None:
        self.module = module

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[B, Sx, Cx, H, W], [B, Sy, Cy, H, W] -> [B, Sx, Sy, Co, Ho, Wo]"""
        return cross_conv2d(x, y, self.module.weight, self.module.bias, **geometry(self.module))

    def forget(self) -> None:
        """Nothing is kept."""
