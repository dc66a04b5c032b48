"""Builds the native library (csrc/cpu) with the C++ compiler found; without one, icseg installs as pure Python.

Where nvcc is found, in CUDA_HOME or on PATH, the CUDA library (csrc/cuda) too. CXX names the compiler;
ICSEG_REQUIRE_NATIVE=1 makes a failed build of the first an error, ICSEG_CUDA=1 of the second; ICSEG_CUDA=0 leaves the
second out. All else is in pyproject.toml.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILERS = ("g++", "clang++", "c++")
# No -march=native, no -ffast-math: one library serves every machine, and equals the reference bit for bit.
FLAGS = shlex.split("-O3 -ffp-contract=off -fno-math-errno -std=c++17 -Wall -Wextra -fPIC -fvisibility=hidden")
# csrc/cpu/kernels is compiled once for each: chosen at run time (csrc/cpu/isa.h).
_AVX2 = "-mavx2 -mfma -mbmi -mbmi2"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
INSTRUCTION_SETS = {"portable": "", "avx2": _AVX2, "avx512": _AVX512}
# Every multiplication and addition of noise and scores is rounded by itself, as on the CPU.
CUDA_FLAGS = shlex.split("-O3 -std=c++17 -fmad=false --threads 0 -Xcompiler -fPIC,-fvisibility=hidden,-Wall")
CUDA_ARCHITECTURES = (80, 90, 100)


class BuildError(Exception):
    """The native library cannot be built; the message says why."""


def find_compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, or the first of COMPILERS that is installed."""
    if named := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(named[0]) is None:
            raise BuildError(f"CXX names {named[0]}, which is not an executable")
        return named
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(f"no C++ compiler found (tried {', '.join(COMPILERS)}; CXX can name another)")


def compiles(compiler: list[str], flags: list[str], source: str) -> bool:
    """Whether `compiler` can make a shared library of `source` with `flags`."""
    with tempfile.TemporaryDirectory() as directory:
        probe = Path(directory) / "probe.cpp"
        probe.write_text(source)
        command = [*compiler, *FLAGS, *flags, "-shared", str(probe), "-o", str(probe.with_suffix(".so"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def openmp_flags(compiler: list[str]) -> list[str]:
    """["-fopenmp"] if `compiler` can use it; Apple's clang cannot."""
    source = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
    return ["-fopenmp"] if compiles(compiler, ["-fopenmp"], source) else []


def instruction_sets(compiler: list[str]) -> list[str]:
    """The INSTRUCTION_SETS of the machine that `compiler` compiles for."""
    is_x86 = compiles(compiler, [], "#ifndef __x86_64__\n#error\n#endif\n")
    return list(INSTRUCTION_SETS) if is_x86 else ["portable"]


def compile_commands(compiler: list[str], directory: Path) -> list[list[str]]:
    """One command an object file in `directory`."""
    common = [*compiler, *FLAGS, *openmp_flags(compiler), "-c"]
    csrc = Path("csrc") / "cpu"
    entries = [(path, path.stem, []) for path in sorted((ROOT / csrc).glob("*.cpp"))]
    kernels = [
        (path, f"{path.stem}.{isa}", [f"-DICSEG_ISA={isa}", *shlex.split(INSTRUCTION_SETS[isa])])
        for path in sorted((ROOT / csrc / "kernels").glob("*.cpp"))
        for isa in instruction_sets(compiler)
    ]
    kernels = [(path, f"kernel.{name}", flags) for path, name, flags in kernels]
    return [
        [*common, *flags, str(path.relative_to(ROOT)), "-o", str(directory / f"{name}.o")]
        for path, name, flags in entries + kernels
    ]


def run(*commands: list[str]) -> None:
    """Run `commands` side by side. Raises BuildError, after its messages, if one fails; the rest is then left."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for result in pool.map(lambda c: subprocess.run(c, cwd=ROOT, capture_output=True, text=True), commands):
            if result.returncode:
                pool.shutdown(cancel_futures=True)
                print(f"icseg: {shlex.join(result.args)} failed:\n{result.stdout}{result.stderr}", file=sys.stderr)
                raise BuildError(f"{result.args[0]} failed (its messages are above)")


def build(output: Path, commands_into: Callable[[Path], list[list[str]]], link: list[str]) -> None:
    """Run `commands_into` a directory, which end in their objects, and link these to the shared library `output`."""
    started = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(f".{os.getpid()}.so")
    with tempfile.TemporaryDirectory() as directory:
        commands = commands_into(Path(directory))
        run(*commands)
        try:
            run([*link, "-shared", *(command[-1] for command in commands), "-o", str(unfinished)])
        except BuildError:
            unfinished.unlink(missing_ok=True)
            raise
    unfinished.replace(output)
    print(f"icseg: built {output.name} in {time.monotonic() - started:.0f} s with {shlex.join(link)}")


def build_library(output: Path) -> None:
    """Compile csrc/cpu into the shared library `output`. Raises BuildError if it cannot."""
    if sys.platform == "win32":
        raise BuildError("the native library is not supported on Windows")
    if not (ROOT / "csrc" / "cpu").is_dir():
        raise BuildError(f"no sources in {ROOT / 'csrc' / 'cpu'}")
    compiler = find_compiler()
    openmp = openmp_flags(compiler)
    build(output, partial(compile_commands, compiler), [*compiler, *FLAGS, *openmp])
    if not openmp:
        print(f"icseg: built WITHOUT OpenMP, so of one thread: {compiler[0]} cannot use -fopenmp", file=sys.stderr)


def find_nvcc() -> str:
    """The path of nvcc, of $CUDA_HOME or else on PATH."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if nvcc is None:
        raise BuildError(f"no nvcc in CUDA_HOME = {home}" if home else "no nvcc on PATH (CUDA_HOME can say where)")
    return nvcc


def cuda_command(nvcc: str) -> list[str]:
    """nvcc for those of CUDA_ARCHITECTURES that it knows, and for later ones by way of PTX."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    known = [number for number in CUDA_ARCHITECTURES if f"sm_{number}" in listed]
    if not known:
        raise BuildError(f"{nvcc} knows none of the architectures {CUDA_ARCHITECTURES}")
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in known]
    targets += [f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]
    return [nvcc, "-ccbin", find_compiler()[0], *CUDA_FLAGS, *targets]


def build_cuda_library(output: Path) -> None:
    """Compile csrc/cuda into the shared library `output`. Raises BuildError if it cannot."""
    command = cuda_command(find_nvcc())
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

    def commands_into(directory: Path) -> list[list[str]]:
        return [[*command, "-c", str(path), "-o", str(directory / f"{path.stem}.o")] for path in sources]

    # The runtime is linked in, and seen by nobody else: the library loads without CUDA, and beside another runtime.
    build(output, commands_into, [*command, "-cudart", "static", "-Xlinker", "--exclude-libs,ALL"])


class BuildNative(build_ext):
    """Builds the libraries where setuptools expects an extension module: in the package, or in the wheel."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extensions(self) -> None:
        for extension in self.extensions:
            output = Path(self.get_ext_fullpath(extension.name))
            is_cuda = output.name == "libicseg_cuda.so"
            try:
                if is_cuda and os.environ.get("ICSEG_CUDA") == "0":
                    raise BuildError("ICSEG_CUDA is 0")
                (build_cuda_library if is_cuda else build_library)(output)
            except BuildError as error:
                output.unlink(missing_ok=True)  # of an earlier build
                if os.environ.get("ICSEG_CUDA" if is_cuda else "ICSEG_REQUIRE_NATIVE") == "1":
                    raise
                what = "CUDA library not built" if is_cuda else "native library not built, installing as pure Python"
                print(f"icseg: {what}: {error}", file=sys.stderr)


class Wheel(bdist_wheel):
    """py3-none-<platform>: the library uses no Python ABI. py3-none-any if it could not be built."""

    def get_tag(self) -> tuple[str, str, str]:
        built = any(Path(self.bdist_dir).rglob("libicseg*.so"))
        return "py3", "none", super().get_tag()[2] if built else "any"


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(f"icseg_kernels.{name}", sources=[], optional=True) for name in ("libicseg", "libicseg_cuda")
        ],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    )
