"""Where Triton kernels can run, and how they are launched. Imports no Triton itself.

An op's kernels lie in a module of their own, which its host code imports at the first call. They run on CUDA devices,
or with TRITON_INTERPRET=1, set before Triton is imported, on the CPU in Triton's interpreter, which is for tests: slow,
right for float16, float32 and float64, and wrong for bfloat16 that is not converted to float32 right after a load.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from icseg_kernels import tuning

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _reasons() -> list[str]:
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("Triton is not installed (pip install 'icseg[triton]')")
    if not INTERPRETED and torch.version.cuda is None:
        reasons.append("it runs on CUDA devices, and torch was built without CUDA")
    return reasons


_missing = _reasons()


def missing() -> list[str]:
    """Why no Triton backend can serve on this machine; an empty list if they can."""
    return list(_missing)


def unsupported_device(name: str, tensor: Tensor) -> list[str]:
    """Why kernels cannot run where the argument `name` lies."""
    if tensor.is_cuda or (INTERPRETED and tensor.is_cpu):
        return []
    return [f"it runs on CUDA devices, and {name} is on {tensor.device}"]


def unsupported_dtype(name: str, tensor: Tensor) -> list[str]:
    """Why kernels cannot compute in the dtype of the argument `name`; float64 is for tests in the interpreter."""
    if tensor.dtype in (torch.float32, torch.float16, torch.bfloat16) or (
        INTERPRETED and tensor.dtype == torch.float64
    ):
        return []
    return [f"it computes in float32, float16 and bfloat16, and {name} is {tensor.dtype}"]


# Until the kernels for CUDA devices have run on one, they serve where they are named and nowhere else.
PREFERRED = False


def slower(*call: Any) -> bool:
    """Whether kernels for CUDA devices serve only where they are named, as in the interpreter."""
    return INTERPRETED or not PREFERRED


def power_of_two(value: int) -> int:
    """The smallest that is at least `value`: what a block of Triton is as long as."""
    return 1 << max(value - 1, 0).bit_length()


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of it."""
    import triton.language as tl

    return getattr(tl, str(dtype).removeprefix("torch."))


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options) on `device` and its current stream; a grid without programs does nothing."""
    if 0 in grid:
        return
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        _launch(kernel, grid, arguments, options)
    else:
        with torch.cuda.device(device):
            _launch(kernel, grid, arguments, options)


def _launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    if tuning.is_used():
        options = tuning.chosen(kernel, grid, arguments, options, lambda o: kernel[grid](*arguments, **o))
    kernel[grid](*arguments, **options)


if not _missing and not INTERPRETED:
    tuning.use_named_table()
