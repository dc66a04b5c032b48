"""What is installed, what this machine offers, and why a backend is missing."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import icseg
import icseg_kernels  # declares the ops  # noqa: F401
from icseg.checkpoint import bundled_weights, load_checkpoint
from icseg_kernels import backend, library

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "scipy",
    "pillow",
    "tifffile",
    "imagecodecs",
    "nibabel",
    "safetensors",
    "typer",
)
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve")


def examine() -> dict[str, Any]:
    """Plain data (JSON): versions, system, devices, native library, the ops' backends, bundled weights."""
    return {
        "versions": {"icseg": icseg.__version__, "python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "system": {
            "platform": platform.platform(),
            "machine": platform.machine(),
            "cpu_features": _cpu_features(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "devices": ["cpu", *_cuda_devices()],
        "native_library": _native_library(),
        "ops": backend.status(),
        "backend_forced": backend.named_by_environment(),
        "weights": _weights(),
    }


def format_report(report: dict[str, Any]) -> str:
    """The report as text, one fact a line."""
    lines = [f"{name:<16}{version or 'not installed'}" for name, version in report["versions"].items()]
    system = report["system"]
    lines += [
        "",
        f"{'platform':<16}{system['platform']}",
        f"{'cpu':<16}{system['cpu_capability']} ({' '.join(system['cpu_features']) or 'no known features'})",
        f"{'threads':<16}{system['threads']} of {system['cpus']} CPUs",
        f"{'devices':<16}{', '.join(report['devices'])}",
        f"{'library':<16}{_sentence(report['native_library'])}",
        f"{'weights':<16}{_sentence(report['weights'])}",
        "",
    ]
    if forced := report["backend_forced"]:
        known = forced in backend.BACKENDS
        problem = "" if known else f", but must be one of {', '.join(backend.BACKENDS)}: every call fails"
        lines.append(f"{backend.ENVIRONMENT_VARIABLE}={forced} names the backend of every op{problem}")
    for op, backends in report["ops"].items():
        lines.append(op)
        lines += [f"  {name:<12}{'; '.join(reasons) or 'available'}" for name, reasons in backends.items()]
    return "\n".join(lines)


def _sentence(facts: dict[str, Any]) -> str:
    if facts["problem"]:
        return f"{facts['path']}: {facts['problem']}"
    rest = ", ".join(f"{key} {value}" for key, value in facts.items() if key not in ("path", "problem"))
    return f"{facts['path']} ({rest})"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_features() -> list[str]:
    """Those of CPU_FEATURES that the system reports; empty where it has no /proc/cpuinfo."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [name for name in CPU_FEATURES if name in words]


def _cuda_devices() -> list[str]:
    return [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]


def _native_library() -> dict[str, Any]:
    reasons = library.missing()
    return {
        "path": str(library.PATH),
        "abi": library.ABI_VERSION,
        "build": None if reasons else library.build(),
        "instruction set": None if reasons else library.isa(),
        "problem": "; ".join(reasons) or None,
    }


def _weights() -> dict[str, Any]:
    path = bundled_weights()
    try:
        config, state = load_checkpoint(path)
    except (OSError, ValueError) as error:
        return {"path": str(path), "architecture": None, "parameters": None, "problem": str(error)}
    parameters = sum(tensor.numel() for tensor in state.values())
    return {"path": str(path), "architecture": config.architecture, "parameters": parameters, "problem": None}
