"""Which backend serves a call, and every reason why another does not.

An op declares its backends once, best first, each with a function that lists the reasons why it cannot
serve a given call (an empty list: it can). `backend=None` takes the first that can; a named backend
never falls back: it serves, or the error says why not.

A backend is named, in order of precedence, by the `backend=` argument of the call, by
`with use_backend("reference"):`, or by the environment variable `ICSEG_BACKEND` as it was at import.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from icseg_kernels.numerics import scalar

BACKENDS = ("cuda", "triton", "native", "reference")
ENVIRONMENT_VARIABLE = "ICSEG_BACKEND"

_from_environment = os.environ.get(ENVIRONMENT_VARIABLE) or None
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("icseg_backend", default=None)
# The same choice for torch.compile, which cannot trace a ContextVar but recompiles if a global changes.
_forced_in_graphs: str | None = None


class BackendError(NotImplementedError):
    """A named backend cannot serve this call. The message gives every reason."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    missing():           reasons why it cannot serve any call on this machine (not built, not importable).
    unsupported(*call):  reasons why it cannot serve this call (dtype, device, size); never reads values.
    slower(*call):       whether the next backend is the better choice for this call, where none is named.
    """

    missing: Callable[[], list[str]] = list
    unsupported: Callable[..., list[str]] = lambda *call: []
    slower: Callable[..., bool] = lambda *call: False

    def reasons(self, *call: Any) -> list[str]:
        return [*self.missing(), *self.unsupported(*call)]


_registry: dict[str, Mapping[str, Backend]] = {}


def declare(op: str, backends: Mapping[str, Backend]) -> None:
    """Declare the backends of `op`, best first. The reference must be among them."""
    unknown = set(backends) - set(BACKENDS)
    if unknown or "reference" not in backends:
        raise ValueError(f"op {op} must declare backends among {BACKENDS} and a reference, got {list(backends)}")
    _registry[op] = dict(backends)


def select(op: str, backend: str | None, *call: Any) -> str:
    """The name of the backend that serves `op` for the arguments `call`.

    Raises ValueError for an unknown name, BackendError if the named backend cannot serve.
    """
    declared = _registry[op]
    forced = _forced_in_graphs if torch.compiler.is_compiling() else _forced.get()
    named = forced if backend is None else backend
    origin = ""
    if named is None:
        named, origin = _from_environment, f" from {ENVIRONMENT_VARIABLE}"
    if named is None:
        for name, b in declared.items():
            if not (b.missing() or b.unsupported(*call) or b.slower(*call)):
                return name
    if named not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {named!r}{origin}")
    if named not in declared:
        raise BackendError(f"{op} has no {named} backend; it has {', '.join(declared)}")
    if reasons := declared[named].reasons(*call):
        given = ", ".join(f"{tuple(a.shape)} {a.dtype} on {a.device}" for a in call if isinstance(a, Tensor))
        raise BackendError(f"the {named} backend cannot serve {op} of {given}: {'; '.join(reasons)}")
    return named


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Name the backend of every op inside the block; None lifts an outer choice.

    The choice holds for this thread or task only, except in compiled functions, which see the latest choice
    made in any thread.
    """
    global _forced_in_graphs
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")
    token = _forced.set(name)
    _forced_in_graphs = name
    try:
        yield
    finally:
        _forced.reset(token)
        _forced_in_graphs = _forced.get()


def named() -> str | None:
    """The backend that `use_backend` or ICSEG_BACKEND names here; None: each op takes the best that can serve."""
    forced = _forced_in_graphs if torch.compiler.is_compiling() else _forced.get()
    return _from_environment if forced is None else forced


def named_by_environment() -> str | None:
    """The backend that ICSEG_BACKEND named at import, which is in force where nothing else names one."""
    return _from_environment


def status() -> dict[str, dict[str, list[str]]]:
    """{op: {backend: reasons why it is missing on this machine}}; an empty list means that it is there."""
    return {op: {name: b.missing() for name, b in declared.items()} for op, declared in sorted(_registry.items())}


def without_gradients(names: str, tensors: Iterable[Tensor | None]) -> list[str]:
    """Why an implementation that has no gradients cannot serve `tensors`, which are the arguments `names`."""
    reasons = []
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        reasons.append(f"it has no gradients, and {names} requires one")
    if not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    ):
        reasons.append("it has no rules for forward-mode differentiation and function transforms")
    return reasons


_library = torch.library.Library("icseg", "DEF")
_implementations: dict[Any, Callable[..., Any]] = {}
_tensor_arguments: dict[Any, tuple[bool, ...]] = {}


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `icseg::<schema>` with one implementation for CPU and CUDA and a fake kernel: the overload.

    define/impl, not custom_op: a call costs a third as much. Gradients come from an autograd.Function around the
    overload. An implementation takes a number for a 0-dim tensor, since `call` may skip the overload.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"icseg::{name}", fake, lib=_library)
    overload = getattr(torch.ops.icseg, name).default
    _implementations[overload] = implementation
    _tensor_arguments[overload] = tuple("Tensor" in str(a.type) for a in overload._schema.arguments)
    return overload


def call(function: type[torch.autograd.Function], overload: Any, *arguments: Any) -> Any:
    """`overload` through its autograd.Function; without gradients bare, so that a traced graph names the op.

    A number where the schema has a tensor becomes a 0-dim tensor, whose values never compile anew. If nothing but
    the caller needs to know of the call, its implementation is called at once, with numbers as they are.

    The Function also serves where no argument requires a gradient: it refuses forward-mode differentiation, which
    the op alone would take for zero.
    """
    if unwatched(arguments):
        return _implementations[overload](*arguments)
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    arguments = tuple(
        _zero_dim(a, device) if is_tensor and isinstance(a, _NUMBERS) else a
        for a, is_tensor in zip(arguments, _tensor_arguments[overload], strict=True)
    )
    differentiated = torch.is_grad_enabled() or forward_ad._current_level >= 0  # no_grad leaves forward mode on
    if not differentiated:
        return overload(*arguments)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    # As Function.apply goes on, which first binds the arguments to their names: half of a small call's time.
    return super(torch.autograd.Function, function).apply(*unwrap_dead_wrappers(arguments))  # type: ignore[misc]


def unwatched(arguments: tuple[Any, ...]) -> bool:
    """Whether no gradient, compiler, tracer, mode, transform or profiler needs to see a call."""
    if (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    differentiating = torch.is_grad_enabled()
    for a in arguments:
        if isinstance(a, Tensor) and (
            type(a) not in _PLAIN
            or a.is_meta
            or a.is_neg()
            or a._is_zerotensor()
            or (differentiating and a.requires_grad)
        ):
            return False
    return True


_PLAIN = (Tensor, torch.nn.Parameter)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def _zero_dim(value: Any, device: torch.device) -> Tensor:
    if isinstance(value, int | torch.SymInt):
        return torch.full((), value, dtype=torch.int64, device=device)  # type: ignore[arg-type]
    return scalar(value, device)
