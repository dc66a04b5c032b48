"""The CUDA library (csrc/cuda, built by setup.py where nvcc is): found next to this file, loaded at first use."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_char_p, c_int
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI_VERSION = 1
PATH = Path(__file__).with_name("libicseg_cuda.so")

MOST_DRAWS = 4096
MOST_PIXELS = 20480
MOST_TAPS = 127
_LEAST_MAJOR = 8  # of the compute capability

_OF_THE_LIBRARY = {
    "icseg_cuda_abi_version": (c_int, []),
    "icseg_cuda_build": (c_char_p, []),
    "icseg_cuda_driver": (c_int, []),
    "icseg_cuda_error": (c_char_p, [c_int]),
}


def open_library(path: Path) -> ctypes.CDLL:
    """Load the library at `path` and set the signatures of all its functions.

    Raises OSError, in one sentence, if it is missing, cannot be loaded or was built from another version.
    """
    if not path.exists():
        raise OSError(
            f"{path.name} was not built when icseg was installed (no nvcc?); `ICSEG_CUDA=1 pip install -v` says why"
        )
    try:
        library = ctypes.CDLL(str(path))
        version = library.icseg_cuda_abi_version()
        if version == ABI_VERSION:
            signatures = _OF_THE_LIBRARY | {name: (c_int, arguments) for name, arguments in functions.items()}
            for name, (result, arguments) in signatures.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise OSError(f"{path} cannot be loaded: {error}; install icseg again") from error
    if version != ABI_VERSION:
        raise OSError(f"{path} has ABI version {version}, this icseg needs {ABI_VERSION}: install icseg again")
    return library


@functools.cache
def _opened() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    try:
        return open_library(PATH)
    except OSError as error:
        return str(error)


@torch.compiler.assume_constant_result  # to compilers, which cannot look into libraries
def _reasons() -> str:
    """Why no CUDA backend can serve, in lines; empty if nothing is missing."""
    return _found_reasons()


@functools.cache
def _found_reasons() -> str:
    reasons = [] if torch.version.cuda else ["it runs on CUDA devices, and torch was built without CUDA"]
    library = _opened()
    if isinstance(library, str):
        reasons.append(library)
    elif not reasons and (code := library.icseg_cuda_driver()):
        reasons.append(f"there is {library.icseg_cuda_error(code).decode()}")
    return "\n".join(reasons)


def missing() -> list[str]:
    """Why no CUDA backend can serve on this machine; an empty list if the library is there. Touches no device."""
    return _reasons().splitlines()


def get() -> ctypes.CDLL:
    """The loaded library. Raises OSError with the reason if there is none."""
    library = _opened()
    if isinstance(library, str):
        raise OSError(library)
    return library


def build() -> str:
    """The versions of nvcc and of the CUDA runtime the loaded library was built with."""
    return get().icseg_cuda_build().decode()


def function(name: str, arguments: list[Any]) -> Callable[..., None]:
    """The library's function `name`, of ctypes `arguments` before the stream.

    Called with the device to launch on, whose current stream it takes, then `arguments`. Raises OSError without the
    library, RuntimeError for what it refuses.
    """
    functions[name] = [*arguments, ctypes.c_void_p]

    def launch(device: torch.device, *given: Any) -> None:
        library = get()
        with torch.cuda.device(device):
            code = getattr(library, name)(*given, torch.cuda.current_stream(device).cuda_stream)
        if code:
            raise RuntimeError(f"CUDA library: {library.icseg_cuda_error(code).decode()}")

    return launch


def unsupported_tensor(name: str, tensor: Tensor) -> list[str]:
    """Why the library cannot compute with the argument `name`: in float32, on devices from the A100 on."""
    if not tensor.is_cuda:
        return [f"it runs on CUDA devices, and {name} is on {tensor.device}"]
    reasons = []
    if tensor.dtype == torch.float64:
        reasons.append(f"it computes in float32, and {name} is float64")
    properties = torch.cuda.get_device_properties(tensor.device)
    if properties.major < _LEAST_MAJOR:
        found = f"{properties.major}.{properties.minor}"
        reasons.append(f"it needs compute capability {_LEAST_MAJOR}.0, and {tensor.device} has {found}")
    return reasons


def seed_arguments(seed: int | Tensor | None) -> tuple[int | None, bool, int]:
    """What functions take for a seed: the address of a 0-dim int64 tensor on the device, seeded, the seed itself."""
    if isinstance(seed, Tensor):
        return seed.data_ptr(), True, 0
    return None, seed is not None, (seed or 0) % 2**64


functions: dict[str, list[Any]] = {}
"""The ctypes arguments of every op's functions, the stream last."""
