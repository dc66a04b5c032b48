"""Checks of arguments that every op shares: TypeError or ValueError in one sentence that names the argument."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (int, torch.SymInt)


def tensor(name: str, value: Any) -> Tensor:
    """`value`, if it is a dense (strided) tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    return value


def floating(name: str, value: Any) -> Tensor:
    """`value`, if it is a dense tensor of one of the dtypes that every op takes."""
    checked = tensor(name, value)
    if checked.dtype not in FLOATING:
        raise TypeError(
            f"{name} must be a floating-point tensor (float16, bfloat16, float32 or float64), got {checked.dtype}"
        )
    return checked


def device(name: str, value: Tensor, wanted: torch.device) -> None:
    """Raise ValueError unless the tensor lies on the device `wanted`."""
    if value.device != wanted:
        raise ValueError(f"{name} must be on {wanted}, as the other tensors are, got {value.device}")


def integer(name: str, value: Any, least: int | None = None, most: int | None = None, *, otherwise: str = "") -> int:
    """`value` as an int from `least` to `most`, if it is one: also a numpy integer, never a bool or a tensor.

    otherwise: for the message, what else the argument may be.
    """
    plain = type(value) is int or (isinstance(value, _INTEGERS) and not isinstance(value, bool))
    found: int | None = value if plain else _index(value)
    if found is None:
        raise TypeError(f"{name} must be {_integer_in(least, most)}{otherwise}, got {shown(value)}")
    if (least is not None and found < least) or (most is not None and found > most):
        raise ValueError(f"{name} must be {_integer_in(least, most)}{otherwise}, got {found}")
    return found


def pair(name: str, value: Any, least: int | None = None) -> tuple[int, int]:
    """`value` as two ints of at least `least`, if it is a sequence of two."""
    if type(value) is tuple and [type(side) for side in value] == [int, int] and min(value) >= (least or 0):
        return value  # the usual case, without building names
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{name} must be a pair of integers, got {shown(value)}")
    if len(value) != 2:
        raise ValueError(f"{name} must be a pair of integers, got {len(value)} of them")
    return integer(f"{name}[0]", value[0], least), integer(f"{name}[1]", value[1], least)


def one_or_pair(name: str, value: Any, least: int | None = None) -> tuple[int, int]:
    """`pair`, or a single integer for both."""
    if isinstance(value, Sequence):
        return pair(name, value, least)
    both = integer(name, value, least, otherwise=" or a pair of them")
    return both, both


def number(name: str, value: Any, *, least: float | None = None, above: float | None = None) -> float:
    """`value` as a finite float, not below `least` and greater than `above`, if it is one; never a bool or a tensor."""
    real = isinstance(value, int | float | torch.SymInt | torch.SymFloat)
    if isinstance(value, bool) or not (real or isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be {_number_in(least, above)}, got {shown(value)}")
    found = float(value)
    if (
        not float("-inf") < found < float("inf")
        or (least is not None and found < least)
        or (above is not None and found <= above)
    ):
        raise ValueError(f"{name} must be {_number_in(least, above)}, got {shown(value)}")
    return found


def _index(value: Any) -> int | None:
    """What operator.index makes of `value`; nothing of a bool, or of a tensor, whose value may lie on a device."""
    if isinstance(value, bool | Tensor):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def shown(value: Any) -> str:
    """`value` for an error message: a tensor by its type alone, since its values may lie on a device."""
    return type(value).__name__ if isinstance(value, Tensor) else repr(value)


def _integer_in(least: int | None, most: int | None) -> str:
    if most is None:
        return "an integer" if least is None else f"an integer of at least {least}"
    return f"an integer of at most {most}" if least is None else f"an integer from {least} to {most}"


def _number_in(least: float | None, above: float | None) -> str:
    if above is not None:
        return f"a finite number greater than {above:g}"
    return "a finite number" if least is None else f"a finite number of at least {least:g}"
