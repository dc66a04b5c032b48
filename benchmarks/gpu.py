"""Every op on a GPU beside what one writes without it, and the whole model; or, without a GPU, what they must cost.

    python benchmarks/gpu.py --count                      # bytes, FLOPs and their floor in time; needs no GPU
    python benchmarks/gpu.py --out gpu.json               # measured, on the current CUDA device

A rival is captured in a CUDA graph, its output compared with the reference's after a replay, and then timed: the
rivals of a case in turn, so many replays a round as take a millisecond, between two events; the median of the rounds.
Inputs that fit into the cache stay in it, for all rivals alike. A rival whose output differs has no time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from gpu_cases import OURS, Case, Run, cases
from harness import commit, versions
from torch import Tensor

import icseg
import icseg_kernels
from icseg.sparse.budget import Budget

BANDWIDTH, MATRIX_RATE = 3.0e12, 800e12  # an H100's, bytes and bfloat16 FLOPs a second
ROUNDS = 30


def floor(case: Case) -> float:
    """Microseconds that no implementation beats on an H100, launches set aside."""
    return 1e6 * max(case.bytes / BANDWIDTH, case.flops / MATRIX_RATE)


def count_table(chosen: Sequence[Case]) -> str:
    """Markdown: bytes, FLOPs and floor of each case."""
    lines = ["| op | shape | dtype | MB | GFLOPs | floor, us |", "|---|---|---|---|---|---|"]
    for case in chosen:
        kind = str(case.dtype).removeprefix("torch.")
        numbers = f"{case.bytes / 1e6:.3f} | {case.flops / 1e9:.3f} | {floor(case):.2f}"
        lines.append(f"| {case.op} | {case.shape} | {kind} | {numbers} |")
    return "\n".join(lines)


def measure(case: Case) -> dict[str, Any]:
    """The row of one case: microseconds and errors of its rivals, and why others have none."""
    device = torch.device("cuda")
    row: dict[str, Any] = {"op": case.op, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch.")}
    row |= {"bytes": case.bytes, "flops": case.flops, "floor_us": floor(case), "us": {}, "error": {}, "failed": {}}
    found = case.make(device)
    expected = [t.clone() for t in found["eager"]()]
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    for name, run in found.items():
        try:
            graph, outputs = captured(run)
            graph.replay()
            error = relative_error(outputs, expected)
        except Exception as problem:
            row["failed"][name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:300]
            torch.cuda.synchronize()
            continue
        row["error"][name] = error
        if error <= case.tolerance:
            graphs[name] = graph
        else:
            row["failed"][name] = f"its output must agree within {case.tolerance}, got {error:.2e}"
    row["us"] = timed({name: graph.replay for name, graph in graphs.items()})
    ours = min((row["us"][name] for name in OURS if name in row["us"]), default=None)
    others = [us for name, us in row["us"].items() if name not in OURS]
    if ours is not None:
        row["share_of_bandwidth"] = case.bytes / (ours * 1e-6) / copy_bandwidth()
        row["speed_up"] = min(others) / ours if others else None
    return row


def captured(run: Run) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
    """A graph of one call, and the tensors that a replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph, outputs


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest ||found - expected|| / ||expected|| of the tensors; infinite where shapes differ or a value is NaN."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    errors = [0.0]
    for ours, theirs in zip(found, expected, strict=True):
        a, b = ours.double(), theirs.double()
        gap = torch.where(a == b, 0.0, a - b).norm()
        norm = b[b.isfinite()].norm()
        errors.append(float(gap / norm.clamp_min(1e-30)) if float(gap) else 0.0)
    return float("inf") if any(e != e for e in errors) else max(errors)


def timed(runs: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median microseconds a call, round by round in turn."""
    repeats = {name: max(1, min(200, int(1e-3 / once(run, 3)))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(once(run, repeats[name]))
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}


def once(run: Callable[[], object], repeats: int) -> float:
    """Seconds a call, by device events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / repeats


@cache
def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of a copy of 2 GiB."""
    source = torch.ones(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(once(lambda: target.copy_(source), 3) for _ in range(9))


@cache
def matrix_rate() -> float:
    """FLOPs a second of a bfloat16 product of 8192 x 8192 matrices of random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / statistics.median(once(lambda: a @ b, 3) for _ in range(9))


def measure_model(side: int, batch: int, dtype: torch.dtype, support: int = 3) -> list[dict[str, Any]]:
    """Rows of the whole forward pass with a fixed number of patches, cold and with memory: eager and captured.

    By Triton; in float32 the outputs are compared with the reference's, in bfloat16 a replay's with those of the call.
    """
    device = torch.device("cuda")
    model = icseg.PatchICL.from_pretrained().to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(batch, 1, side, side, generator=generator).to(device, dtype)
    images = torch.rand(batch, support, 1, side, side, generator=generator).to(device, dtype)
    masks = (torch.rand(batch, support, 1, side, side, generator=generator) > 0.5).to(device, dtype)
    budget = Budget(patches=sum(model.config.target_patches[:5]))
    rows = []
    with torch.inference_mode(), icseg_kernels.use_backend("triton"):
        memory = model.encode_support(images, masks)
        runs: dict[str, Run] = {
            "cold": lambda: [model(target, images, masks, budget=budget).logits],
            "with memory": lambda: [model(target, memory=memory, budget=budget).logits],
        }
        for name, run in runs.items():
            short = "fp32" if dtype == torch.float32 else "bf16"
            row: dict[str, Any] = {"op": "model", "shape": f"{side} px B{batch} S{support} {short} {name}"}
            row |= {
                "us": {},
                "failed": {},
            }
            with icseg_kernels.use_backend("reference" if dtype == torch.float32 else "triton"):
                expected = [t.clone() for t in run()]
            row["launches"] = launches(run)
            row["us"]["eager"] = 1e6 * statistics.median(once(run, 3) for _ in range(9))
            try:
                graph, outputs = captured(run)
                graph.replay()
                row["error"] = {"captured": relative_error(outputs, expected)}
                if row["error"]["captured"] > 1e-4:
                    raise AssertionError(
                        f"a captured pass must give the same masks, got {row['error']['captured']:.1e}"
                    )
                row["us"] |= timed({"captured": graph.replay})
            except Exception as problem:
                row["failed"]["captured"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:300]
                torch.cuda.synchronize()
            rows.append(row)
    return rows


def launches(run: Run) -> int:
    """Kernels, copies and fills that one call puts on the device."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    import triton

    return {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "copy_bandwidth": copy_bandwidth(),
        "matrix_rate": matrix_rate(),
        "versions": versions() | {"triton": triton.__version__, "cuda": torch.version.cuda},
        "commit": commit(),
    }


def line(row: dict[str, Any]) -> str:
    times = "  ".join(f"{name} {us:.1f}" for name, us in row["us"].items())
    notes = [
        f"{row['speed_up']:.2f}x" if row.get("speed_up") else "",
        *(f"{n}: {why}" for n, why in row["failed"].items()),
    ]
    launched = f"  launches {row['launches']}" if "launches" in row else ""
    return f"{row['op']:<22}{row['shape']:<44}{times}{launched}  {'; '.join(n for n in notes if n)}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="bytes, FLOPs and floors alone, as Markdown")
    parser.add_argument("--out", type=Path, help="rows as JSON, written after each case")
    parser.add_argument("--only", default="", help="ops whose name contains this; 'model' is the whole model")
    parser.add_argument("--quick", action="store_true", help="the smallest case of each op")
    given = parser.parse_args(arguments)
    chosen = [case for case in cases() if given.only in case.op]
    if given.quick:
        chosen = list({case.op: case for case in reversed(chosen)}.values())[::-1]
    if given.count:
        print(count_table(chosen))
        return 0
    if not torch.cuda.is_available():
        parser.error("a CUDA device must be there unless --count is given, torch finds none")
    found = {"machine": machine(), "rows": []}

    def keep(row: dict[str, Any]) -> None:
        found["rows"].append(row)
        print(line(row), flush=True)
        if given.out:
            given.out.write_text(json.dumps(found, indent=1) + "\n")

    for case in chosen:
        keep(measure(case))
        torch._dynamo.reset()
    if given.only in "model":
        for side, batch in [(512, 1)] if given.quick else [(128, 1), (512, 1), (1024, 1), (512, 64)]:
            for dtype in (torch.float32, torch.bfloat16):
                for row in measure_model(side, batch, dtype):
                    keep(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
