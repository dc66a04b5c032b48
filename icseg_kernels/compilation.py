"""What a module of Triton kernels says of itself, so that it can be compiled without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Compilation:
    """One specialisation of a kernel, as a launch makes it.

    name:      what reports call it: op, kernel, and what tells it from the others.
    kernel:    the triton.jit function.
    signature: Triton's type of every argument that is no tl.constexpr ("*fp32", "i32", "i64", ...), by name.
    constants: the value of every tl.constexpr, by name; also of arguments that are None or 1: a launch makes these
               constants.
    unaligned: pointers that are not, and
    aligned:   integers that are divisible by 16: what a launch finds out by itself.
    num_warps, num_stages, enable_fp_fusion: as the launch has them.
    tensor_cores: whether the compiled code must use them.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    unaligned: tuple[str, ...] = ()
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    enable_fp_fusion: bool = True
    tensor_cores: bool = False
