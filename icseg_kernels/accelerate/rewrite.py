"""What the rewrites of all models share: switches, hooks, convolutions of a group of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from icseg_kernels.cross_conv import cross_conv2d

_PLAIN = (Tensor, nn.Parameter)


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


def recorded(tensor: Tensor) -> bool:
    """Whether the call is compiled, traced or captured, or has no values, so that it cannot look at them."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or tensor.is_meta or type(tensor) not in _PLAIN:
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Memory:
    """What was made of some tensors last, for as long as their values stay the same; copies start without it."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None  # replaced as a whole, for threads that share a model

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": None}

    def recall(self, sources: list[Tensor | None], make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` returned for equal sources in the same autocast mode, or returns now."""
        kind = next(source.device.type for source in sources if source is not None)
        mode = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        kept = self._kept
        if kept is not None and kept.mode == mode and all(map(_same, sources, kept.sources)):
            return kept.made
        del kept
        self.forget()  # before the next are made
        kept = _Kept(mode, [None if s is None else s.detach().clone() for s in sources], make())
        self._kept = kept
        return kept.made

    def forget(self) -> None:
        """Free what is kept."""
        self._kept = None

    def __len__(self) -> int:
        """Tensors kept."""
        return 0 if self._kept is None else len(self._kept.made)


class _Kept(NamedTuple):
    mode: torch.dtype | None
    sources: list[Tensor | None]
    made: tuple[Tensor, ...]


def _same(source: Tensor | None, kept: Tensor | None) -> bool:
    """Whether the values are equal, of one dtype, on one device."""
    if source is None or kept is None:
        return source is kept
    return source.dtype == kept.dtype and source.device == kept.device and torch.equal(source, kept)
