"""Warps and stages of Triton kernels that were measured on a GPU, in place of those that are chosen from shapes.

Opt-in: `python -m icseg_kernels.tune` writes a table, and ICSEG_TUNED names the one to be used. Imports no Triton.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

VERSION = 1
_WARPS = (1, 2, 4, 8, 16)
_STAGES = (2, 3, 4)
_DEFAULT_WARPS, _DEFAULT_STAGES = 4, 3  # of a launch that names none
_GAIN = 0.03  # share of the time by which a choice must beat the one made from shapes


class Choice(NamedTuple):
    num_warps: int
    num_stages: int


Table = dict[str, Choice]
Measure = Callable[[Callable[[], None]], float]  # seconds that a launch takes

_measuring: tuple[Table, Measure] | None = None
_loaded: Table | None = None


def key(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """What a choice is kept for: the kernel, its constants, its tensors' dtypes, its programs to a power of two."""
    programs = 1
    for n in grid:
        programs *= n
    dtypes = ",".join(str(a.dtype).removeprefix("torch.") for a in arguments if isinstance(a, Tensor))
    constants = " ".join(f"{name}={options[name]}" for name in sorted(options.keys() - {"num_warps", "num_stages"}))
    function = kernel.fn
    return f"{function.__module__}.{function.__name__} {1 << (programs - 1).bit_length()} {dtypes} {constants}"


def tunable(options: dict[str, Any]) -> bool:
    """Whether a launch may have other warps and stages.

    Not where the bits of the result are promised, which depend on the order of sums, nor where no load may be moved
    before a barrier, for which a launch has one stage.
    """
    return bool(options.get("enable_fp_fusion", True)) and options.get("num_stages") != 1


def chosen(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    run: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """`options`, with the table's warps and stages if it has some; while tuning, measured first. run: launches."""
    if (_measuring is None and not _loaded) or not tunable(options):
        return options
    name = key(kernel, grid, arguments, options)
    if _measuring is not None:
        table, measure = _measuring
        if name not in table:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return options
            table[name] = _fastest(options, run, measure)
    else:
        table = _loaded or {}
    found = table.get(name)
    return options if found is None else options | found._asdict()


def _fastest(options: dict[str, Any], run: Callable[[dict[str, Any]], None], measure: Measure) -> Choice:
    own = Choice(options.get("num_warps", _DEFAULT_WARPS), options.get("num_stages", _DEFAULT_STAGES))
    best, least = own, measure(lambda: run(options)) * (1 - _GAIN)
    for warps in _WARPS:
        for stages in _STAGES:
            choice = Choice(warps, stages)
            if choice == own:
                continue
            tried = options | choice._asdict()
            try:
                seconds = measure(lambda tried=tried: run(tried))  # type: ignore[misc]
            except Exception as error:
                if type(error).__name__ != "OutOfResources":  # of shared memory or registers: Triton's own
                    raise
                continue
            if seconds < least:
                best, least = choice, seconds
    return best


@contextlib.contextmanager
def tuning(measure: Measure) -> Iterator[Table]:
    """Measure the choices for every launch inside the block that is met for the first time; yields the table."""
    global _measuring
    before, table = _measuring, Table()
    _measuring = table, measure
    try:
        yield table
    finally:
        _measuring = before


def is_used() -> bool:
    """Whether launches ask for a choice."""
    return _measuring is not None or bool(_loaded)


def save(path: Path, table: Table, device: str, triton_version: str) -> None:
    """Write a table that `load` reads, for one kind of device and one version of Triton."""
    content = {
        "version": VERSION,
        "device": device,
        "triton": triton_version,
        "choices": {name: choice._asdict() for name, choice in sorted(table.items())},
    }
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def load(path: Path, device: str, triton_version: str) -> Table:
    """The table of a file. Raises ValueError for one that is none, or was made elsewhere, OSError without a file."""
    try:
        content = json.loads(path.read_text())
        made = content["version"], content["device"], content["triton"]
        table = {
            name: Choice(int(c["num_warps"]), int(c["num_stages"])) for name, c in dict(content["choices"]).items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a table of python -m icseg_kernels.tune: {error!r}") from None
    if made != (VERSION, device, triton_version):
        raise ValueError(
            f"{path} must be made for version {VERSION}, {device}, Triton {triton_version}, got version {made[0]}, "
            f"{made[1]}, Triton {made[2]}"
        )
    return table


def use(table: Table | None) -> None:
    """Let launches take their warps and stages from `table`; None: from shapes alone."""
    global _loaded
    _loaded = table


def use_named_table() -> None:
    """Use the table that ICSEG_TUNED names, if it names one."""
    path = os.environ.get("ICSEG_TUNED")
    if path:
        import triton

        use(load(Path(path), torch.cuda.get_device_name(), triton.__version__))
