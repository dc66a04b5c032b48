"""What the rewrites of all models share: switches, hooks, convolutions of a group of images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from icseg_kernels.cross_conv import cross_conv2d


class Switches(NamedTuple):
    """Which rewrites are wanted; see `accelerate`."""

    split: bool = True
    commute_mean: bool = True
    drop_dead_support: bool = True
    cache_support: bool = True
    max_memory: int | None = None


def hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether hooks wait for calls of these modules, which a rewrite would not make."""
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


def overridden(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own, by an earlier rewrite or by somebody else's."""
    return "forward" in module.__dict__


def geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """The arguments of `cross_conv2d` that make it move as `conv` does."""
    return {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "padding_mode": conv.padding_mode,
    }


def each(module: nn.Module, images: Tensor) -> Tensor:
    """`module` on every image of [B, S, C, H, W]."""
    return module(images.flatten(0, 1)).unflatten(0, images.shape[:2])


def convolve(images: Tensor, conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`conv` with another weight on every image of [B, S, C, H, W]."""
    nothing = images[:, :1, :0]
    return cross_conv2d(images, nothing, weight, bias, **geometry(conv))[:, :, 0]


def differentiated(tensors: Iterable[Tensor | None]) -> bool:
    """Whether gradients of anything may be asked for, now or by a transform."""
    if torch.autograd.forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def recorded() -> bool:
    """Whether the call is compiled, traced or captured, so that it cannot look at values."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
