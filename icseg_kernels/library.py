"""The native library (csrc/, built by setup.py): found next to this file, loaded once, at import."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_int, c_int64, c_void_p
from pathlib import Path

# torch loads its OpenMP runtime, which the library then shares: torch.set_num_threads holds for both.
import torch  # noqa: F401

ABI_VERSION = 2
PATH = Path(__file__).with_name("libicseg.so")

_SIGNATURES = {
    "icseg_abi_version": (c_int, []),
    "icseg_build": (c_char_p, []),
    "icseg_threads": (c_int, []),
    "icseg_error": (c_char_p, [c_int]),
    # source, coords, patches; outer, inner, C, H, W, K, p; strides of outer, inner, C, H, W; bytes an element
    "icseg_gather_patches": (c_int, [c_void_p] * 3 + [c_int64] * 13),
    # patches, coords, images; outer, inner, K, C, p, H, W; strides of outer, inner, K, C, y, x
    "icseg_gather_patches_backward_f32": (c_int, [c_void_p] * 3 + [c_int64] * 13),
    "icseg_gather_patches_backward_f64": (c_int, [c_void_p] * 3 + [c_int64] * 13),
}


def open_library(path: Path) -> ctypes.CDLL:
    """Load the library at `path` and set the signatures of its functions.

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
            for name, (result, arguments) in _SIGNATURES.items():
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


def check(code: int) -> None:
    """Raise RuntimeError unless `code`, returned by the library, means success."""
    if code:
        raise RuntimeError(f"native library: {get().icseg_error(code).decode()}")


_reasons: list[str] = []
_library: ctypes.CDLL | None = None
try:
    _library = open_library(PATH)
except OSError as error:
    _reasons.append(str(error))
