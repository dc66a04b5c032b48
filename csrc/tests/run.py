"""Build the tests of the C ABI (csrc/tests) in a temporary directory, and run them.

    python csrc/tests/run.py                                 against the installed library
    python csrc/tests/run.py --sanitize address,undefined    against sources built with sanitizers
    python csrc/tests/run.py --sanitize thread               without OpenMP, which ThreadSanitizer cannot see into

CUDA kernels (csrc/cuda) run on the CPU, as fibers (cuda_on_cpu.h), which sanitizers do not follow: only as installed.
Other arguments go to the program: --seed S, --iterations N, names of tests.
"""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ROOT / "csrc" / "tests"
LIBRARY = ROOT / "icseg_kernels" / "libicseg.so"
# -O0: optimising what sanitizers add to the kernels takes minutes.
SANITIZED = ["-O0", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def sanitizer_flags(sanitize: str) -> list[str]:
    # A float beyond an integer's range is undefined too.
    names = sanitize + ",float-cast-overflow" if "undefined" in sanitize.split(",") else sanitize
    return [*SANITIZED, f"-fsanitize={names}"]


setup = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py"), run_name="setup"))


def build(sanitize: str | None, directory: Path) -> Path:
    """The test program: linked with the built library, or with objects of its sources if `sanitize` is given."""
    compiler = setup.find_compiler()
    flags = [*compiler, *setup.FLAGS, *setup.openmp_flags(compiler), "-pthread"]
    sources = [path for path in sorted(TESTS.glob("*.cpp")) if not (sanitize and "cuda" in path.stem)]
    tests = [[*flags, "-O1", "-g", "-c", str(path)] for path in sources]
    commands = [[*command, "-o", str(directory / f"{Path(command[-1]).stem}.test.o")] for command in tests]
    if sanitize:
        commands += setup.compile_commands(compiler, directory)
        commands = [[*command, *sanitizer_flags(sanitize)] for command in commands]
        for command in commands[: len(tests)]:
            command[command.index("-O0")] = "-O1"  # plain definitions, which take most of the time
        flags += sanitizer_flags(sanitize)
    if sanitize == "thread":
        commands = [[word for word in command if word != "-fopenmp"] for command in commands]
        flags = [word for word in flags if word != "-fopenmp"]
    setup.run(*commands)
    objects = [command[command.index("-o") + 1] for command in commands]
    program = directory / "tests"
    library = [] if sanitize else [str(LIBRARY), f"-Wl,-rpath,{LIBRARY.parent}"]
    setup.run([*flags, *objects, *library, "-o", str(program)])
    return program


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitize", help="what -fsanitize names, such as address,undefined or thread")
    options, arguments = parser.parse_known_args()
    if not options.sanitize and not LIBRARY.exists():
        parser.error(f"{LIBRARY} must be built first (python setup.py build_ext --inplace)")
    with tempfile.TemporaryDirectory() as directory:
        started = time.monotonic()
        try:
            program = build(options.sanitize, Path(directory))
        except setup.BuildError as error:
            parser.exit(1, f"{error}\n")
        print(f"{options.sanitize or 'as installed'}: built in {time.monotonic() - started:.0f} s", flush=True)
        environment = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
        return subprocess.run([str(program), *arguments], env={**os.environ, **environment}).returncode


if __name__ == "__main__":
    sys.exit(main())
