"""Compile every Triton kernel for GPUs that need not be there: `python -m icseg_kernels.aot --arch 80 90 100 --json`.

A row for each `Compilation` and architecture: registers, spilled bytes, stack and shared memory, instructions, and
whether tensor cores are used. Exits with 1 if a kernel spills, does not compile, or uses no tensor cores where it must.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import icseg_kernels
from icseg_kernels.compilation import Compilation

ARCHITECTURES = (80, 90, 100)
_TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|IMMA|IGMMA|QGMMA|UTCHMMA|UTCQMMA|UTCIMMA)\b")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def compilations() -> list[Compilation]:
    """Those of all modules of kernels, `*triton_kernels`, in the package."""
    found: list[Compilation] = []
    for module in pkgutil.walk_packages(icseg_kernels.__path__, "icseg_kernels."):
        if module.name.endswith("triton_kernels"):
            found += importlib.import_module(module.name).COMPILATIONS
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
    options = {name: getattr(compilation, name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    row: dict[str, Any] = {"name": compilation.name, "arch": architecture, **options, "triton": triton.__version__}
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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m icseg_kernels.aot", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, as 90")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--json", action="store_true", help="rows as JSON in place of a table")
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("TRITON_INTERPRET must not be 1, which compiles nothing")
    chosen = [c for c in compilations() if given.only in c.name]
    if not chosen:
        parser.error(f"--only must be part of a kernel's name, got {given.only!r}")
    rows = []
    for number, compilation in enumerate(chosen, 1):
        print(f"{number}/{len(chosen)} {compilation.name}", file=sys.stderr, flush=True)
        rows += [compile_for(compilation, architecture) for architecture in given.arch]
    if given.json:
        print(json.dumps(rows, indent=1))
    else:
        print(f"{'kernel':<56}{'arch':>5}{'regs':>6}{'spill':>7}{'shared':>8}{'instr':>7}{'mma':>5}")
        for row in (row for row in rows if "error" not in row):
            numbers = f"{row['registers']:>6}{row['spilled_bytes']:>7}{row['shared']:>8}{row['instructions']:>7}"
            print(f"{row['name']:<56}{row['arch']:>5}{numbers}{row['tensor_cores']:>5}")
    wrong = failures(rows)
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
