"""Builds the native library (csrc/) with the C++ compiler found; without one, icseg installs as pure Python.

CXX names the compiler; ICSEG_REQUIRE_NATIVE=1 makes a failed build an error. All else is in pyproject.toml.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILERS = ("g++", "clang++", "c++")
# No -march=native, no -ffast-math: one library serves every machine, and equals the reference bit for bit.
FLAGS = shlex.split("-O3 -ffp-contract=off -fno-math-errno -std=c++17 -Wall -Wextra -fPIC -shared -fvisibility=hidden")


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


def openmp_flags(compiler: list[str]) -> list[str]:
    """["-fopenmp"] if `compiler` can use it; Apple's clang cannot."""
    with tempfile.TemporaryDirectory() as directory:
        probe = Path(directory) / "probe.cpp"
        probe.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n")
        command = [*compiler, *FLAGS, "-fopenmp", str(probe), "-o", str(probe.with_suffix(".so"))]
        return ["-fopenmp"] if subprocess.run(command, capture_output=True).returncode == 0 else []


def build_library(output: Path) -> None:
    """Compile csrc/cpu into the shared library `output`. Raises BuildError if it cannot."""
    if sys.platform == "win32":
        raise BuildError("the native library is not supported on Windows")
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    if not sources:
        raise BuildError(f"no sources in {ROOT / 'csrc' / 'cpu'}")
    compiler = find_compiler()
    openmp = openmp_flags(compiler)
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_suffix(f".{os.getpid()}.so")
    command = [*compiler, *FLAGS, *openmp, *sources, "-o", str(unfinished)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        unfinished.unlink(missing_ok=True)
        print(f"icseg: {shlex.join(command)} failed:\n{result.stdout}{result.stderr}", file=sys.stderr)
        raise BuildError(f"{compiler[0]} failed (its messages are above)")
    unfinished.replace(output)
    print(f"icseg: built {output.name} with {shlex.join(command)}")
    if not openmp:
        print(f"icseg: built WITHOUT OpenMP, so of one thread: {compiler[0]} cannot use -fopenmp", file=sys.stderr)


class BuildNative(build_ext):
    """Builds the library where setuptools expects an extension module: in the package, or in the wheel."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extensions(self) -> None:
        for extension in self.extensions:
            output = Path(self.get_ext_fullpath(extension.name))
            try:
                build_library(output)
            except BuildError as error:
                output.unlink(missing_ok=True)  # of an earlier build
                if os.environ.get("ICSEG_REQUIRE_NATIVE") == "1":
                    raise
                print(f"icseg: native library not built, installing as pure Python: {error}", file=sys.stderr)


class Wheel(bdist_wheel):
    """py3-none-<platform>: the library uses no Python ABI. py3-none-any if it could not be built."""

    def get_tag(self) -> tuple[str, str, str]:
        built = any(Path(self.bdist_dir).rglob("libicseg.so"))
        return "py3", "none", super().get_tag()[2] if built else "any"


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("icseg_kernels.libicseg", sources=[], optional=True)],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    )
