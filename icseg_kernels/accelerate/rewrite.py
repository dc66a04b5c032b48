"""What the rewrites of all models share: switches, structure, hooks, what a call may look at, convolutions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.modules.module as hooks_of_all
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.module_tracker import ModuleTracker

from icseg_kernels.cross_conv import cross_conv2d

_PLAIN = (Tensor, nn.Parameter)
_ALIVE = 8  # of the widest maps of a block, those that one support image has at once, with its skips, at most
_COUNTERS = ("torch.utils.flop_counter", "icseg_kernels.accelerate.measure")  # of modes that only look on

# Of torch's modules, those that in training as in evaluation make of an image the same, whatever else they are given.
_KINDS = "activation container conv linear normalization padding pixelshuffle pooling upsampling"
_RANDOM = (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.MultiheadAttention)
_SETTLED = frozenset(
    kind
    for file in _KINDS.split()
    for kind in vars(getattr(nn.modules, file)).values()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and kind not in _RANDOM
)
# And of the models'.
_SETTLED_NAMES = (
    *("UniverSeg", "TysegXC", "MultiverSegNet", "CrossBlock", "CrossBlockTarget", "CrossOp", "CrossConv2d"),
    *("FastCrossConv2d", "Vmap", "ConvOp", "ChannelNorm", "PairwiseConvAvgModel", "PairwiseConvAvgModelBlock"),
    *("PairwiseConvAvgModelOutput", "ResidualUnit", "UnetDownsampleAndCreateShortcutBlock"),
    *("UnetUpsampleAndConcatShortcutBlock",),
)


class Switches(NamedTuple):
    """Which rewrites are wanted; see `accelerate`."""

    split: bool = True
    commute_mean: bool = True
    drop_dead_support: bool = True
    cache_support: bool = True
    max_memory: int | None = None


class Rewritten:
    """A forward in place of that of one module's class; `forward` takes its arguments.

    Modules and weights are looked up at every call. What a call would compute otherwise than the model is left to the
    model: hooks on modules that would not be called, a structure that is no longer the known one.
    """

    forward: Callable[..., Any]
    arguments: tuple[str, ...] = ()

    def __init__(self, module: Any, switches: Switches) -> None:
        self.module, self.switches = module, switches
        self._seen: tuple[list[Any], bool, list[nn.Module]] | None = None  # modules, whether they fit, those left out

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_seen": None}

    @classmethod
    def refusal(cls, module: Any) -> str:
        """Why the module is not rewritten, or ""."""
        if "forward" in module.__dict__:
            return "its forward has been replaced already"
        if argument_names(module) != cls.arguments:
            return f"forward takes other arguments than {', '.join(cls.arguments)}"
        return cls.mismatch(module)

    @classmethod
    def mismatch(cls, module: Any) -> str:
        """Why the module has not the structure that is known, or ""."""
        raise NotImplementedError

    def bypassed(self) -> list[nn.Module]:
        """Modules that the class's forward would call, and this does not, or with something else."""
        raise NotImplementedError

    def fits(self) -> bool:
        """Whether the structure is still the known one, and no hooks wait for what is not called."""
        if torch.compiler.is_compiling():
            return not self.mismatch(self.module) and not hooked(self.bypassed())
        modules = [self.module]
        for module in modules:
            modules.extend(part for part in module._modules.values() if part is not None)
        now = [*modules, *map(type, modules), *(module.__dict__.get("forward") for module in modules)]
        seen = self._seen
        if seen is None or seen[0] != now:  # checked again only after a change
            known_one = not self.mismatch(self.module)
            seen = self._seen = now, known_one, self.bypassed() if known_one else []
        return seen[1] and not hooked(seen[2])

    def install(self) -> None:
        """Replace the forward of the module."""
        self.module.__dict__["_replicate_for_data_parallel"] = self.replicate
        self.module.__dict__["forward"] = self.forward

    def remove(self) -> None:
        """Take that back."""
        self.module.__dict__.pop("forward", None)
        self.module.__dict__.pop("_replicate_for_data_parallel", None)

    def replicate(self) -> Any:
        """A copy for nn.DataParallel, which shares the __dict__ of the module but not its parameters, for one call."""
        replica = type(self.module)._replicate_for_data_parallel(self.module)
        # Its `parameters()` are none, so that nobody could tell whether they are differentiated.
        limit = None if torch.is_grad_enabled() else self.switches.max_memory
        type(self)(replica, self.switches._replace(cache_support=False, max_memory=limit)).install()
        return replica

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """What the class of the module makes of the arguments."""
        return type(self.module).forward(self.module, *args, **kwargs)

    def forget(self) -> None:
        """Free what is kept of a support set."""


# Structure.


def known(module: Any, names: Collection[str]) -> bool:
    """Whether the forward of the module's class is that of a class of one of these names."""
    for kind in type(module).__mro__:
        if kind.__name__ in names:
            return True
        if "forward" in kind.__dict__:
            return False
    return False


def overridden(module: Any) -> bool:
    """Whether the instance has a forward of its own that is not one of ours."""
    own = module.__dict__.get("forward")
    return own is not None and not isinstance(getattr(own, "__self__", None), Rewritten)


def argument_names(module: Any) -> tuple[str, ...]:
    """Names of the arguments of its class's forward."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def foreign(module: nn.Module, parts: Collection[str]) -> str:
    """What the module itself holds beside these modules, in words, or ""."""
    held = (*module._modules, *module._parameters, *module._buffers)
    unknown = [name for name in held if name not in parts]
    return f"{type(module).__name__} holds {', '.join(unknown)}, which the known one does not" if unknown else ""


def is_vmap(module: Any, name: str) -> bool:
    """Whether it calls its part of this name on every image."""
    return known(module, ("Vmap",)) and not overridden(module) and not foreign(module, (name,))


def is_sequence(module: Any) -> bool:
    """Whether it calls its children one after the other."""
    if not isinstance(module, nn.Sequential) or overridden(module):
        return False
    return next(kind for kind in type(module).__mro__ if "forward" in kind.__dict__) is nn.Sequential


def unsettled(modules: Iterable[nn.Module], *, training: bool = False) -> str:
    """The class of a module whose output for an image depends on other images or changes between calls, or "".

    training: of modules as they would be in training mode. Those that are not known count as settled in evaluation.
    """
    for module in modules:
        trains = module.training or training
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            found = trains or module.running_mean is None
        elif isinstance(module, nn.modules.instancenorm._InstanceNorm):
            found = trains and module.track_running_stats
        else:
            found = trains and type(module) not in _SETTLED and not known(module, _SETTLED_NAMES)
        if found:
            return type(module).__name__
    return ""


def hooked(modules: Iterable[nn.Module]) -> bool:
    """Whether hooks wait for calls of these modules, or of all modules, which a rewrite would not make."""
    of_all = (
        *hooks_of_all._global_forward_pre_hooks.values(),
        *hooks_of_all._global_forward_hooks.values(),
        *hooks_of_all._global_backward_pre_hooks.values(),
        *hooks_of_all._global_backward_hooks.values(),
    )
    if any(not isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in of_all):  # of FLOP counters
        return True
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)


# Convolutions.


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


# What a call may look at and keep.


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

    def recall(
        self, sources: list[Tensor | None], make: Callable[[], tuple[Tensor, ...]], *way: object
    ) -> tuple[Tensor, ...]:
        """What `make` returned, or returns now, for equal sources and an equal `way`, autocast mode and CUDA stream.

        Tensors kept are no inference tensors. Nothing is kept where a mode may record what is done with values.
        """
        tensors = [source for source in sources if source is not None]
        plain = all(type(source) in _PLAIN for source in tensors)
        if not plain or any(type(mode).__module__ not in _COUNTERS for mode in _get_current_dispatch_mode_stack()):
            return make()
        way = (*way, *_surroundings(tensors[0].device))
        kept = self._kept
        if kept is not None and kept.way == way and all(map(_same, sources, kept.sources)):
            return kept.made
        del kept
        self.forget()  # before the next are made
        with torch.inference_mode(False), torch.no_grad():
            kept = _Kept(way, [None if s is None else s.detach().clone() for s in sources], make())
        self._kept = kept
        return kept.made

    def forget(self) -> None:
        """Free what is kept."""
        self._kept = None

    def __len__(self) -> int:
        """Tensors kept."""
        return 0 if self._kept is None else len(self._kept.made)


class _Kept(NamedTuple):
    way: tuple[object, ...]
    sources: list[Tensor | None]
    made: tuple[Tensor, ...]


def _surroundings(device: torch.device) -> tuple[object, ...]:
    """What else decides of results on the device, and when they are there."""
    kind = device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return dtype, torch.cuda.current_stream(device) if kind == "cuda" else None


def _same(source: Tensor | None, kept: Tensor | None) -> bool:
    """Whether the values are equal, of one dtype, on one device."""
    if source is None or kept is None:
        return source is kept
    return source.dtype == kept.dtype and source.device == kept.device and torch.equal(source, kept)


class Network(Rewritten):
    """The forward of a whole network, which may keep features of a support set, or stream it in chunks."""

    def __init__(self, module: Any, switches: Switches) -> None:
        super().__init__(module, switches)
        self._memory = Memory()

    def forget(self) -> None:
        """Free what is kept of a support set."""
        self._memory.forget()

    def _chunk(self, support: Tensor) -> int:
        """Images of the support set [B, S, C, ...] to hold features of at once."""
        images = support.shape[1]
        if self.switches.max_memory is None or recorded(support):
            return images
        parts = [module for module in self.module.modules() if module is not self.module]
        if differentiated((support, *self.module.parameters())) or unsettled(parts) or hooked(parts):
            return images
        return min(images, max(1, self._room(support, 0)))

    def _room(self, support: Tensor, kept: int) -> int:
        """Images of the support set whose features fit, with this many maps more; without a limit, all."""
        if self.switches.max_memory is None:
            return support.shape[1]
        pixels = max(1, support.shape[0] * math.prod(support.shape[3:]))
        return int(self.switches.max_memory // ((_ALIVE * self._maps() + kept) * pixels * support.element_size()))

    def _maps(self) -> float:
        """The most feature maps that a block makes of an image of the support set, in maps of that image's size."""
        raise NotImplementedError
