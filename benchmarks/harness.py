"""Timing of rivals in one process: interleaved rounds, medians, outputs compared, one row of results a case."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One case: median seconds of each rival, and how far its output lies from that of the rival that it must equal."""

    subject: str
    case: str
    seconds: dict[str, float]
    max_abs_difference: dict[str, float]
    flops: dict[str, float]
    rounds: int
    threads: int
    machine: str
    versions: dict[str, str]
    commit: str


def compare(
    subject: str,
    case: str,
    rivals: dict[str, Callable[[], Tensor]],
    *,
    rounds: int,
    tolerance: float,
    same: dict[str, str] | None = None,
    flops: dict[str, float] | None = None,
) -> Row:
    """Time the rivals round by round, after checking their outputs.

    tolerance: largest absolute difference allowed between rivals that compute the same thing.
    same:      which rival each rival's output must equal; None: all of them the first one's.
    """
    outputs = {name: run() for name, run in rivals.items()}
    if same is None:
        first, *others = rivals
        same = dict.fromkeys(others, first)
    difference = {name: (outputs[name] - outputs[other]).abs().max().item() for name, other in same.items()}
    wrong = {name: d for name, d in difference.items() if not d <= tolerance}
    if wrong:
        raise AssertionError(f"{subject} {case}: outputs must agree within {tolerance}, got {wrong}")
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return Row(
        subject,
        case,
        medians,
        difference,
        flops or {},
        rounds,
        torch.get_num_threads(),
        machine(),
        versions(),
        commit(),
    )


def append(path: Path, row: Row) -> None:
    """Add a row to a JSON-lines file."""
    with path.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def machine() -> str:
    """The processor's name and how many of its cores are ours."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = next((s.split(": ", 1)[1] for s in info.read_text().splitlines() if s.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of Python and torch."""
    return {"python": platform.python_version(), "torch": torch.__version__}


def commit() -> str:
    """The commit of the working tree, marked if it has changes."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return found.stdout.strip() or "unknown"
