"""Blocks of Neuralizer: 1 x 1 convolutions of every (context, target) pair, averaged for the target."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from icseg_kernels.accelerate.report import Change
from icseg_kernels.accelerate.rewrite import Switches, hooked, overridden

_NAME = "PairwiseConvAvgModelBlock"
_LINEAR = {nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def rewrite(
    name: str, module: nn.Module, switches: Switches, changes: list[Change], replaced: list[tuple[nn.Module, Any]]
) -> None:
    """Split the mixers of one block, and average before the target's."""
    if type(module).__name__ != _NAME:
        return
    reason = "switched off" if not switches.split else _mismatch(module)
    changes.append(Change(name, "Neuralizer", "split", not reason, reason))
    mean = reason or ("" if switches.commute_mean else "switched off")
    changes.append(Change(name, "Neuralizer", "commute_mean", not mean, mean))
    if not reason:
        replaced.append((module, PairwiseBlock(module, switches.commute_mean).forward))


def _mismatch(module: nn.Module) -> str:
    """Why the module is not the block that is known, or ""."""
    if overridden(module):
        return "its forward has been replaced already"
    if list(inspect.signature(type(module).forward).parameters) != ["self", "context", "target"]:
        return "forward takes other arguments than context and target"
    for mixer in ("combine_conv_target", "combine_conv_context"):
        conv: Any = getattr(getattr(module, mixer, None), "vmapped", None)
        if type(conv) not in _LINEAR or conv.kernel_size != (1,) * len(conv.kernel_size) or conv.groups != 1:
            return f"{mixer} is no 1 x 1 convolution"
        if conv.in_channels != 2 * conv.out_channels or set(conv.stride) != {1}:
            return f"{mixer} does not halve its channels at stride 1"
    if not all(isinstance(getattr(module, side, None), nn.Module) for side in ("context_conv", "target_conv")):
        return "it lacks context_conv or target_conv"
    return ""


class PairwiseBlock:
    """The forward of one block."""

    def __init__(self, block: Any, commute_mean: bool) -> None:
        self.block, self.commute_mean = block, commute_mean

    def forward(self, context: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """context: [B, L, C, ...], target: [B, C, ...], and back."""
        mixers: tuple[Any, ...] = (self.block.combine_conv_target, self.block.combine_conv_context)
        to_target, to_context = (mixer.vmapped for mixer in mixers)
        if hooked((*mixers, to_target, to_context)):
            found: tuple[Tensor, Tensor] = type(self.block).forward(self.block, context, target)
            return found
        context, target = self.block.context_conv(context), self.block.target_conv(target)
        pooled = context.mean(dim=1, keepdim=True) if self.commute_mean else context
        update = _split(to_target, pooled, target).mean(dim=1)
        return F.gelu(context + _split(to_context, context, target)), F.gelu(target + update)

    def forget(self) -> None:
        """Nothing is kept."""


def _split(conv: Any, context: Tensor, target: Tensor) -> Tensor:
    """The convolution of every [context; target], [B, L, C, ...]."""
    linear = _LINEAR[type(conv)]
    of_context, of_target = conv.weight.split([context.shape[2], target.shape[1]], dim=1)
    parts = linear(context.flatten(0, 1), of_context).unflatten(0, context.shape[:2])
    return parts + linear(target, of_target, conv.bias).unsqueeze(1)
