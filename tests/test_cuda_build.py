"""The CUDA library: its header, what setup.py builds, and what happens where it cannot."""

from __future__ import annotations

import ctypes
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from icseg_kernels import cuda_library
from icseg_kernels.gumbel_topk import cuda  # noqa: F401
from icseg_kernels.patches import sample_cuda

KERNELS = 6  # three draws and their gradient, two samplers
ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "csrc" / "icseg_cuda.h"
CTYPES = {
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "double": ctypes.c_double,
}

setup = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py"), run_name="setup"))


def has_nvcc() -> bool:
    try:
        setup.cuda_command(setup.find_nvcc())
    except setup.BuildError:
        return False
    return True


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="needs nvcc")


def ctype(declaration: str) -> type:
    """The ctypes type of a parameter or field; of every pointer c_void_p."""
    return ctypes.c_void_p if "*" in declaration else CTYPES[declaration.split()[0]]


@pytest.fixture(scope="module")
def header() -> str:
    """Preprocessed, in one line."""
    command = [*setup.find_compiler(), "-E", "-P", str(HEADER)]
    return " ".join(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


@pytest.fixture(scope="module")
def declared(header: str) -> dict[str, list[type]]:
    """The ctypes arguments of every function."""
    found = re.findall(r"\b(icseg_cuda_\w+) ?\(([^()]*)\);", header)
    return {
        name: [] if given.strip() == "void" else [ctype(a.strip()) for a in given.split(",")] for name, given in found
    }


def test_header_and_signatures_agree(declared: dict[str, list[type]]) -> None:
    bound = {name: arguments for name, (_, arguments) in cuda_library._OF_THE_LIBRARY.items()} | cuda_library.functions
    assert declared == bound


def test_header_and_settings_agree(header: str) -> None:
    (body,) = re.findall(r"struct icseg_cuda_windows \{([^}]*)\}", header)
    fields = []
    for declaration in body.split(";")[:-1]:
        words = declaration.strip().removeprefix("const ")
        kind, _, names = words.partition(" ")
        fields += [(name.strip(" *"), ctype(kind.strip())) for name in names.split(",")]
    assert fields == list(sample_cuda._Settings._fields_)


def test_header_and_constants_agree() -> None:
    numbers = dict(re.findall(r"#define ICSEG_CUDA_(\w+) (\d+)", HEADER.read_text()))
    for name in ("ABI_VERSION", "MOST_DRAWS", "MOST_PIXELS", "MOST_TAPS"):
        assert int(numbers[name]) == getattr(cuda_library, name)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library as setup.py builds it, and what the assembler says of its kernels."""
    path = tmp_path_factory.mktemp("built") / cuda_library.PATH.name
    messages = []

    def run(*commands: list[str]) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for done in pool.map(lambda c: subprocess.run(c, capture_output=True, text=True), commands):
                assert done.returncode == 0, done.stderr
                messages.append(done.stdout + done.stderr)

    with pytest.MonkeyPatch.context() as patch:
        variables = setup.build_cuda_library.__globals__
        patch.setitem(variables, "CUDA_FLAGS", [*variables["CUDA_FLAGS"], "-Xptxas", "-v"])
        patch.setitem(variables, "run", run)
        setup.build_cuda_library(path)
    return path, "".join(messages)


@pytest.fixture(scope="module")
def built(compiled: tuple[Path, str]) -> Path:
    return compiled[0]


@needs_nvcc
def test_library_loads_without_a_gpu_and_says_what_it_is(built: Path) -> None:
    library = cuda_library.open_library(built)
    assert re.fullmatch(r"nvcc \d+\.\d+\.\d+, CUDA runtime \d+", library.icseg_cuda_build().decode())
    (listing,) = re.findall(r"enum icseg_cuda_code \{([^}]*)\}", HEADER.read_text())
    codes = [int(code) for _, code in re.findall(r"(ICSEG_\w+) = (\d+)", listing)]
    sentences = {library.icseg_cuda_error(code).decode() for code in [*codes[:-1], codes[-1] + 1]}
    assert len(sentences) == len(codes)
    assert "unknown error code" not in sentences
    assert library.icseg_cuda_driver() in codes


@needs_nvcc
def test_library_exports_what_the_header_declares_and_nothing_else(
    built: Path, declared: dict[str, list[type]]
) -> None:
    command = ["nm", "--dynamic", "--defined-only", str(built)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert {line.split()[-1] for line in lines} == set(declared)
    needed = subprocess.run(["ldd", str(built)], check=True, capture_output=True, text=True).stdout
    assert "cuda" not in needed.replace(str(built), "")


@needs_nvcc
def test_no_kernel_spills_or_uses_a_stack(compiled: tuple[Path, str]) -> None:
    messages = compiled[1]
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", messages)
    architectures = {architecture for _, architecture in kernels}
    assert "sm_80" in architectures
    assert len(kernels) == KERNELS * len(architectures)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", messages)
    assert frames == [("0", "0", "0")] * len(kernels)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What setup.py needs of the source tree; of the C++ no op."""
    tree = tmp_path / "project"
    for folder in ("csrc", "icseg_kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for source in (tree / "csrc" / "cpu").rglob("*.cpp"):
        if source.name != "library.cpp":
            source.unlink()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    return tree


@pytest.fixture
def pretended(tmp_path: Path) -> Path:
    """A CUDA_HOME whose nvcc knows no sm_100, and writes its arguments where it should write code."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo sm_80 sm_90 && exit\n'
        'arguments="$*"\nwhile [ "$1" != -o ]; do shift; done\necho "$arguments" > "$2"\n'
    )
    nvcc.chmod(0o755)
    return nvcc.parent.parent


def build_ext(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "ICSEG_CUDA": "", "ICSEG_REQUIRE_NATIVE": "", **environment}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True)


def test_nvcc_of_cuda_home_builds_for_what_it_knows(project: Path, pretended: Path) -> None:
    done = build_ext(project, CUDA_HOME=str(pretended))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (project / "icseg_kernels").glob("*.so")} == {"libicseg.so", "libicseg_cuda.so"}
    arguments = shlex.split((project / "icseg_kernels" / "libicseg_cuda.so").read_text())
    targets = [a.rpartition("code=")[2] for a in arguments if a.startswith("-gencode")]
    assert targets == ["sm_80", "sm_90", "compute_90"]
    assert {"-shared", "-fmad=false"} < set(arguments)
    assert arguments[arguments.index("-cudart") + 1] == "static"


def test_without_nvcc_the_rest_is_built_and_the_reason_said(project: Path, pretended: Path) -> None:
    for environment, reason in (
        ({"CUDA_HOME": "/nonexistent"}, "no nvcc in CUDA_HOME = /nonexistent"),
        ({"CUDA_HOME": str(pretended), "ICSEG_CUDA": "0"}, "ICSEG_CUDA is 0"),
    ):
        done = build_ext(project, **environment)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(f"icseg: CUDA library not built: {reason}") == 1
        assert [path.name for path in (project / "icseg_kernels").glob("*.so")] == ["libicseg.so"]


def test_a_required_library_that_cannot_be_built_is_one_error(project: Path) -> None:
    done = build_ext(project, CUDA_HOME="/nonexistent", ICSEG_CUDA="1")
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith("BuildError: no nvcc in CUDA_HOME = /nonexistent")


def test_a_library_that_is_missing_or_of_another_version_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"libicseg_cuda.so was not built when icseg was installed \(no nvcc\?\)"):
        cuda_library.open_library(tmp_path / "libicseg_cuda.so")
    (tmp_path / "other.so").write_bytes(b"of another machine")
    with pytest.raises(OSError, match=r"other.so cannot be loaded: .*; install icseg again"):
        cuda_library.open_library(tmp_path / "other.so")
    (tmp_path / "old.c").write_text("int icseg_cuda_abi_version(void) { return 0; }\n")
    command = [*setup.find_compiler(), "-x", "c", "-shared", "-fPIC", str(tmp_path / "old.c")]
    subprocess.run([*command, "-o", str(tmp_path / "old.so")], check=True)
    with pytest.raises(OSError, match=f"has ABI version 0, this icseg needs {cuda_library.ABI_VERSION}"):
        cuda_library.open_library(tmp_path / "old.so")


def test_missing_gives_reasons_and_touches_no_device() -> None:
    program = """if True:
        import torch
        from icseg_kernels import cuda_library
        assert cuda_library._opened.cache_info().currsize == 0  # loaded at first use
        print(cuda_library.missing())
        assert not torch.cuda.is_initialized()"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("[")


def test_missing_can_be_asked_by_compiled_functions() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def reasons(x: Tensor) -> Tensor:
        return x + len(cuda_library.missing())

    assert reasons(torch.zeros(())) == len(cuda_library.missing())
