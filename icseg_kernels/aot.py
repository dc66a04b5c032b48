"""Compile every Triton kernel for GPUs that need not be there: `python -m icseg_kernels.aot --arch 80 90 100 --json`.

A row for each `Compilation` and architecture: registers, spilled bytes, stack and shared memory, instructions, and
whether tensor cores are used. Exits with 1 if a kernel spills, does not compile, or uses no tensor cores where it must.

`--table FILE` takes from a file of rows those whose kernel, constants and options have not changed since, compiles the
others, and writes the file anew, row by row.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import icseg_kernels
from icseg_kernels.compilation import Compilation

ARCHITECTURES = (80, 90, 100)
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|IMMA|IGMMA|QGMMA|UTCHMMA|UTCQMMA|UTCIMMA)\b")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def compilations() -> list[Compilation]:
    """Those of all modules of kernels, `*triton_kernels`, in the package."""
    found: list[Compilation] = []
    for module in pkgutil.walk_packages(icseg_kernels.__path__, "icseg_kernels."):
        if module.name.endswith("triton_kernels"):
            found += importlib.import_module(module.name).COMPILATIONS
    return found


def fingerprint(compilation: Compilation, architecture: int) -> str:
    """Differs where the compiled code may: by the source of all device functions, the specialisation and Triton."""
    import triton

    parts = [
        triton.__version__,
        architecture,
        sorted(_sources(compilation.kernel).items()),
        sorted(compilation.signature.items()),
        sorted((name, str(value)) for name, value in compilation.constants.items()),
        sorted(compilation.unaligned),
        sorted(compilation.aligned),
        *(getattr(compilation, name) for name in _OPTIONS),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _sources(kernel: Any) -> dict[str, str]:
    """The source of a device function and of those it calls, and the numbers that they name."""
    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop().fn
        name = f"{function.__module__}.{function.__qualname__}"
        if name in found:
            continue
        found[name] = inspect.getsource(function)
        for used in function.__code__.co_names:
            value = function.__globals__.get(used)
            if hasattr(value, "fn") and hasattr(value, "arg_names"):
                waiting.append(value)
            elif not callable(value) and not inspect.ismodule(value):
                found[f"{function.__module__}.{used}"] = repr(getattr(value, "value", value))
    return found


def compile_for(compilation: Compilation, architecture: int) -> dict[str, Any]:
    """The row of one kernel on one architecture; `error` where it does not compile."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature = compilation.kernel, dict(compilation.signature)
    names = kernel.arg_names
    missing = set(names) - set(signature) - set(compilation.constants)
    if missing:
        raise ValueError(f"{compilation.name} must give every argument, got none for {', '.join(sorted(missing))}")
    signature = {name: "constexpr" if name in compilation.constants else signature[name] for name in names}
    divisible = [
        name
        for name, kind in signature.items()
        if (kind.startswith("*") and name not in compilation.unaligned) or name in compilation.aligned
    ]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in compilation.constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    options = {name: getattr(compilation, name) for name in _OPTIONS}
    row: dict[str, Any] = {"name": compilation.name, "arch": architecture, **options, "triton": triton.__version__}
    row["fingerprint"] = fingerprint(compilation, architecture)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"}
    return row | _resources(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each row that is not as it must be."""
    wanted = {c.name: c.tensor_cores for c in compilations()}
    found = []
    for row in rows:
        where = f"{row['name']} for sm_{row['arch']}"
        if "error" in row:
            found.append(f"{where} must compile, got {row['error']}")
        elif row["spilled_bytes"]:
            found.append(f"{where} must spill no register, got {row['spilled_bytes']} bytes")
        elif wanted[row["name"]] and not row["tensor_cores"]:
            found.append(f"{where} must use tensor cores, got none")
    return found


def _resources(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(path))
        code = _tool("nvdisasm", "-c", str(path))
    resources = _RESOURCES.search(usage)
    if resources is None:
        raise RuntimeError(f"cuobjdump must report registers, got {usage.strip()!r}")
    registers, stack, _, local = map(int, resources.groups())
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", code, re.MULTILINE)
    return {
        "registers": registers,
        "stack": stack,
        "spilled_bytes": stack + local if re.search(r"\b(STL|LDL)\b", code) else 0,
        "instructions": len(instructions),
        "tensor_cores": sum(bool(_TENSOR_CORE.search(i)) for i in instructions),
    }


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the tools that come with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(tool), *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def rows(
    chosen: Sequence[Compilation], architectures: Sequence[int], known: Sequence[dict[str, Any]], jobs: int
) -> Iterator[dict[str, Any]]:
    """Those of `known` that still hold, then the others as they are compiled, by `jobs` processes."""
    by_fingerprint = {row["fingerprint"]: row for row in known if "error" not in row}
    missing = []
    for compilation in chosen:
        for architecture in architectures:
            row = by_fingerprint.get(fingerprint(compilation, architecture))
            if row is None:
                missing.append((compilation.name, architecture))
            else:
                yield row | {"name": compilation.name}
    if not missing:
        return
    with ProcessPoolExecutor(jobs) as pool:
        for number, row in enumerate(pool.map(_compiled, *zip(*missing, strict=True)), 1):
            print(f"{number}/{len(missing)} {row['name']} for sm_{row['arch']}", file=sys.stderr, flush=True)
            yield row


def _compiled(name: str, architecture: int) -> dict[str, Any]:
    return compile_for(next(c for c in compilations() if c.name == name), architecture)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m icseg_kernels.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, as 90")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--json", action="store_true", help="rows as JSON in place of a table")
    parser.add_argument("--table", type=Path, help="a file of rows, a JSON object a line")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET must not be 1, which compiles nothing")
    if given.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {given.jobs}")
    chosen = [c for c in compilations() if given.only in c.name]
    if not chosen:
        parser.error(f"--only must be part of a kernel's name, got {given.only!r}")
    known = _read(given.table) if given.table is not None and given.table.exists() else []
    found: list[dict[str, Any]] = []
    try:
        for row in rows(chosen, given.arch, known, given.jobs):
            found.append(row)
    finally:
        if given.table is not None:
            of_found = {(row["name"], row["arch"]) for row in found}
            _write(given.table, found + [row for row in known if (row["name"], row["arch"]) not in of_found])
    if given.json:
        print(json.dumps(found, indent=1))
    else:
        print(f"{'kernel':<56}{'arch':>5}{'regs':>6}{'spill':>7}{'shared':>8}{'instr':>7}{'mma':>5}")
        for row in (row for row in found if "error" not in row):
            numbers = f"{row['registers']:>6}{row['spilled_bytes']:>7}{row['shared']:>8}{row['instructions']:>7}"
            print(f"{row['name']:<56}{row['arch']:>5}{numbers}{row['tensor_cores']:>5}")
    wrong = failures(found)
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """All rows, of kernels that there still are, in the order of their names."""
    names = {c.name for c in compilations()}
    kept = sorted((row for row in found if row["name"] in names), key=lambda row: (row["name"], row["arch"]))
    temporary = path.with_name(path.name + ".part")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
