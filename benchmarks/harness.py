"""Timing of rivals in one process: interleaved rounds, medians, outputs compared, one row of results a case."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from icseg_kernels import backend as backends

Run = Callable[[], Tensor | Sequence[Tensor]]
SLOW = 5.0


@dataclass(frozen=True)
class Row:
    """One case: median seconds of each rival, and how far its output lies from that of the rival that it must equal.

    work:           what was timed: "forward" or "forward + backward".
    bytes:          of inputs and outputs, each once: the least traffic; 0 if not counted.
    copy_bandwidth: bytes a second, read plus written, of a large torch copy on as many threads, in the same run; 0
                    if bytes were not counted.
    megabytes:      the most that a call of a rival holds beyond what it was given, where that was measured.
    matrix_rate:    FLOP/s of a large float32 matrix product on as many threads, in the same run; 0 if FLOPs were not
                    counted.
    left_out:       why a rival was not timed, in one clause. Its FLOPs may be counted all the same.
    """

    subject: str
    case: str
    work: str
    threads: int
    seconds: dict[str, float]
    max_abs_difference: dict[str, float]
    flops: dict[str, float]
    bytes: int
    copy_bandwidth: float
    rounds: int
    machine: str
    versions: dict[str, str]
    commit: str
    megabytes: dict[str, float] = field(default_factory=dict)
    matrix_rate: float = 0.0
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> str:
        """The last of the rivals."""
        return list(self.seconds)[-1]

    def share_of_roof(self, rival: str) -> float | None:
        """The least time of a call over its time; None where neither bytes nor FLOPs were counted.

        The least: what its bytes take at the copy's bandwidth or its FLOPs at the matrix product's rate, if that is
        longer. In caches a call may move bytes faster than the copy, whose tensors fit into none.
        """
        moved = self.bytes / self.copy_bandwidth if self.copy_bandwidth else 0.0
        computed = self.flops.get(rival, 0.0) / self.matrix_rate if self.matrix_rate else 0.0
        return max(moved, computed) / self.seconds[rival] if moved or computed else None

    def summary(self) -> dict[str, Any]:
        """The row, with the backend and the share of the roof of ours."""
        backend = self.ours if self.ours in backends.BACKENDS else backends.named() or "each op's own choice"
        return asdict(self) | {"backend": backend, "share_of_roof": self.share_of_roof(self.ours)}


def compare(
    subject: str,
    case: str,
    rivals: dict[str, Run],
    *,
    tolerance: float,
    work: str = "forward",
    threads: int | None = None,
    rounds: int | None = None,
    same: dict[str, str] | None = None,
    flops: dict[str, float] | None = None,
    bytes: int = 0,
    left_out: dict[str, str] | None = None,
    repeats: int = 1,
    warm: bool = False,
    limit: float = math.inf,
    single: float = math.inf,
) -> Row:
    """Time the rivals round by round, after checking their outputs (which also warms them up, and compiles).

    tolerance: largest absolute difference allowed between rivals that compute the same thing.
    threads:   of torch, for this case; None leaves them as they are.
    rounds:    None: as many as take about half a second, from 7 to 300.
    same:      which rival each rival's output must equal; None: all of them the first one's. Pairs of which one is
               left out are passed over.
    left_out:  rivals that are not timed, and why.
    repeats:   calls a timing, for what takes microseconds.
    warm:      before each timing that rival is called once, so that it does not find the cache as the one before left
               it; not where it takes more than a second, to which that makes no difference.
    limit:     seconds that all rounds may take; there are fewer then, but at least 3 (or `rounds`).
    single:    a rival whose first call takes more seconds than this is not called again: only for what is not compiled.

    A rival that takes more than `SLOW` seconds a call is timed once, after the check: what disturbs such a call is
    small beside it.
    """
    left_out = left_out or {}
    if both := sorted(left_out.keys() & rivals.keys()):
        raise ValueError(f"left_out must name none of the rivals, got {', '.join(both)}")
    with using_threads(threads or torch.get_num_threads()):
        outputs, held, first = {}, {}, {}
        for name, run in rivals.items():
            outputs[name], held[name], first[name] = _checked(run)
        if same is None:
            reference, *others = rivals
            same = dict.fromkeys(others, reference)
        same = {name: other for name, other in same.items() if name in rivals and other in rivals}
        difference = {name: _difference(outputs[name], outputs[other]) for name, other in same.items()}
        wrong = {name: d for name, d in difference.items() if not d <= tolerance}
        if wrong:
            raise AssertionError(f"{subject} {case}: outputs must agree within {tolerance}, got {wrong}")
        del outputs
        once = {name: first[name] if first[name] > single else seconds_of(run, repeats) for name, run in rivals.items()}
        done = {name for name in rivals if first[name] > single or once[name] > SLOW}
        total = sum(seconds for name, seconds in once.items() if name not in done) * repeats
        rounds = rounds or _rounds(total)
        if rounds * total > limit:
            rounds = min(rounds, max(3, int(limit / total)))
        # What takes more than a second was warmed up by the check: that timing is its first round.
        times: dict[str, list[float]] = {
            name: [seconds] if name in done or seconds >= 1 else [] for name, seconds in once.items()
        }
        for number in range(rounds):
            for name, run in rivals.items():
                if name in done or len(times[name]) > number:
                    continue
                if warm and once[name] < 1:
                    run()
                times[name].append(seconds_of(run, repeats))
        return Row(
            subject,
            case,
            work,
            torch.get_num_threads(),
            {name: statistics.median(values) for name, values in times.items()},
            difference,
            flops or {},
            bytes,
            copy_bandwidth(torch.get_num_threads()) if bytes else 0.0,
            rounds,
            machine(),
            versions(),
            commit(),
            held if HAS_PEAK else {},
            matrix_rate(torch.get_num_threads()) if flops else 0.0,
            left_out,
        )


def _tensors(output: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


def _difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest absolute difference, equal infinities being equal; NaN if shapes or NaNs differ."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("nan")
    gaps = [torch.where(x == y, 0.0, (x.double() - y.double()).abs()) for x, y in zip(found, expected, strict=True)]
    return max((gap.max().item() for gap in gaps if gap.numel()), default=0.0)


def seconds_of(run: Callable[[], Any], repeats: int = 1) -> float:
    """A call, timed together with the others of `repeats`."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _checked(run: Run) -> tuple[list[Tensor], float, float]:
    """Its outputs, the most megabytes that a call holds, and the seconds of the first call.

    The megabytes are those of a second call, as the first may compile, unless it is slow.
    """
    outputs: list[Tensor] = []
    seconds = 0.0

    def call() -> None:
        nonlocal seconds
        start = time.perf_counter()
        outputs.extend(_tensors(run()))
        seconds = time.perf_counter() - start

    held = held_megabytes(call)
    if seconds < SLOW:
        held = held_megabytes(run)
    return outputs, held, seconds


def held_megabytes(run: Callable[[], object]) -> float:
    """The most that one call holds beyond what this process did before it; 0 where the system does not say."""
    if not HAS_PEAK:
        run()
        return 0.0
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was freed before must not hide what the call takes
    _FORGET_PEAK.write_text("5")
    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) / 1024


_FORGET_PEAK = Path("/proc/self/clear_refs")  # of Linux
HAS_PEAK = os.access(_FORGET_PEAK, os.W_OK)


def kilobytes(name: str, file: Path = Path("/proc/self/status")) -> int:
    """An entry of a file of /proc (on Linux)."""
    return int(next(line.split()[1] for line in file.read_text().splitlines() if line.startswith(f"{name}:")))


def _rounds(seconds: float) -> int:
    return max(7, min(300, int(0.5 / max(seconds, 1e-9))))


def with_backward(run: Callable[..., Tensor], *inputs: Tensor) -> Run:
    """A rival that calls run(*inputs), sends a fixed gradient back, and returns the output and the inputs' gradients.

    The inputs that require gradients are differentiated.
    """
    wanted = [x for x in inputs if x.requires_grad]
    gradient: list[Tensor] = []

    def both() -> list[Tensor]:
        output = run(*inputs)
        if not gradient:
            gradient.append(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype))
        return [output.detach(), *torch.autograd.grad(output, wanted, gradient[0])]

    return both


def compiled(function: Callable[..., Any], *, dynamic: bool = True) -> Callable[..., Any]:
    """`function` under torch.compile; `dynamic`: once for all shapes, else anew for each.

    The threads are those at the time of the call, not of compilation.
    """
    # Beyond 8 compilations of one function (shapes, gradients, numbers of threads) torch refuses.
    name = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, name, 128)
    return torch.compile(function, fullgraph=True, dynamic=dynamic, options={"cpp.dynamic_threads": True})


@contextlib.contextmanager
def using_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def thread_counts() -> list[int]:
    """1, and all that torch would use."""
    return sorted({1, torch.get_num_threads()})


@functools.cache
def copy_bandwidth(threads: int) -> float:
    """Bytes a second, read plus written, of a copy of 256 MiB: the median of 9."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    with using_threads(threads):
        seconds = statistics.median(seconds_of(lambda: target.copy_(source)) for _ in range(10))
    return 2 * source.nbytes / seconds


@functools.cache
def matrix_rate(threads: int) -> float:
    """FLOP/s of the product of two float32 matrices of 2048 rows and columns: the median of 7."""
    side = 2048
    left, right = torch.ones(side, side), torch.ones(side, side)
    target = torch.empty(side, side)
    with using_threads(threads), torch.inference_mode():
        torch.mm(left, right, out=target)
        seconds = statistics.median(seconds_of(lambda: torch.mm(left, right, out=target)) for _ in range(7))
    return 2 * side**3 / seconds


def append(path: Path, row: Row) -> None:
    """Add a row to a JSON-lines file."""
    with path.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


@functools.cache
def machine() -> str:
    """The processor's name and its number of cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next((s.split(": ", 1)[1] for s in info.read_text().splitlines() if s.startswith("model name")), name)
    return name


def versions() -> dict[str, str]:
    """Of Python and torch."""
    return {"python": platform.python_version(), "torch": torch.__version__}


@functools.cache
def commit() -> str:
    """The commit of the working tree, marked if it has changes."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return found.stdout.strip() or "unknown"
