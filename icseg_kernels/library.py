"""The native library (csrc/, built by setup.py): found next to this file, loaded once, at import."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import c_char_p, c_int
from pathlib import Path
from typing import Any

# torch loads its OpenMP runtime, which the library then shares: torch.set_num_threads holds for both.
import torch  # noqa: F401

ABI_VERSION = 4
PATH = Path(__file__).with_name("libicseg.so")

ISA_VARIABLE = "ICSEG_CPU_ISA"

_OF_THE_LIBRARY = {
    "icseg_abi_version": (c_int, []),
    "icseg_build": (c_char_p, []),
    "icseg_threads": (c_int, []),
    "icseg_isa": (c_char_p, []),
    "icseg_select_isa": (c_int, [c_char_p]),
    "icseg_error": (c_char_p, [c_int]),
}


def open_library(path: Path) -> ctypes.CDLL:
    """Load the library at `path` and set the signatures of the functions that are no op's.

    Raises OSError, in one sentence, if it is missing, cannot be loaded or was built from another version.
    """
    if not path.exists():
        raise OSError(
            f"{path.name} was not built when icseg was installed (no working C++ compiler?); "
            "`pip install -v` prints why"
        )
    try:
        library = ctypes.CDLL(str(path))
        version = library.icseg_abi_version()
        if version == ABI_VERSION:
            for name, (result, arguments) in _OF_THE_LIBRARY.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise OSError(f"{path} cannot be loaded: {error}; install icseg again") from error
    if version != ABI_VERSION:
        raise OSError(f"{path} has ABI version {version}, this icseg needs {ABI_VERSION}: install icseg again")
    return library


def missing() -> list[str]:
    """Why no native backend can serve on this machine; an empty list if the library is there."""
    return list(_reasons)


def build() -> str:
    """Compiler and OpenMP version the loaded library was built with."""
    return get().icseg_build().decode()


def get() -> ctypes.CDLL:
    """The loaded library. Raises OSError with the reason if there is none."""
    if _library is None:
        raise OSError("; ".join(_reasons))
    return _library


def isa() -> str:
    """The instruction set that serves calls: "portable", "avx2" or "avx512"."""
    return get().icseg_isa().decode()


def select_isa(name: str | None) -> None:
    """Serve every thread's calls with the instruction set `name`; None: with the widest that the machine has.

    The environment variable ICSEG_CPU_ISA does so at import, which fails alike. Raises ValueError for an unknown name,
    or one that this machine lacks.
    """
    if code := get().icseg_select_isa(None if name is None else name.encode()):
        raise ValueError(f"{get().icseg_error(code).decode()}, got {name!r}")


def instruction_sets() -> list[str]:
    """Those that this machine can be served with, widest last."""
    used = isa()
    names = []
    for name in ("portable", "avx2", "avx512"):
        if get().icseg_select_isa(name.encode()) == 0:
            names.append(name)
    select_isa(used)
    return names


def function(name: str, arguments: list[Any]) -> Callable[..., int]:
    """The library's function `name`, of ctypes `arguments` and an error code, which `check` takes.

    Without the library, or if it lacks the function (then it is `missing`), one that raises OSError with the reason.
    """
    functions[name] = arguments
    found = getattr(_library, name, None)
    if found is None:
        if _library is not None and not _reasons:
            _reasons.append(f"{PATH} lacks {name}: install icseg again")

        def refuse(*_: Any) -> int:
            raise OSError("; ".join(_reasons))

        return refuse
    found.restype, found.argtypes = c_int, arguments
    return found


def check(code: int) -> None:
    """Raise RuntimeError unless `code`, returned by the library, means success."""
    if code:
        raise RuntimeError(f"native library: {get().icseg_error(code).decode()}")


functions: dict[str, list[Any]] = {}
"""The ctypes arguments of every op's functions."""

_reasons: list[str] = []
_library: ctypes.CDLL | None = None
try:
    _library = open_library(PATH)
except OSError as error:
    _reasons.append(str(error))
else:
    try:
        select_isa(os.environ.get(ISA_VARIABLE) or None)
    except ValueError as error:
        raise ValueError(f"{ISA_VARIABLE}: {error}") from None
