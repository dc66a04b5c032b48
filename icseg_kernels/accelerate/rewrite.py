"""What the rewrites of all models share: switches, hooks, convolutions of a group of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


class Memory:
    """What was made of some tensors last, for as long as their values stay the same; copies start without it."""

    def __init__(self) -> None:
        self._mode: torch.dtype | None = None
        self._sources: list[Tensor | None] | None = None
        self._made: tuple[Tensor, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {"_mode": None, "_sources": None, "_made": ()}

    def recall(self, sources: list[Tensor | None], make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` returned for equal sources in the same autocast mode, or returns now."""
        kind = next(source.device.type for source in sources if source is not None)
        mode = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        known = self._sources is not None and len(self._sources) == len(sources) and mode == self._mode
        if self._sources is None or not known or not all(map(_same, sources, self._sources)):
            self.forget()
            self._made = make()
            self._sources, self._mode = [None if s is None else s.detach().clone() for s in sources], mode
        return self._made

    def forget(self) -> None:
        """Free what is kept."""
        self._sources, self._made = None, ()

    def __len__(self) -> int:
        """Tensors kept."""
        return len(self._made)


def _same(source: Tensor | None, kept: Tensor | None) -> bool:
    """Whether the values are equal, of one dtype, on one device."""
    if source is None or kept is None:
        return source is kept
    return source.dtype == kept.dtype and source.device == kept.device and torch.equal(source, kept)
