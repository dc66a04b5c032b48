"""The native library: built, loaded, packed into wheels; and what happens where it cannot be."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from icseg_kernels import backend, library

ROOT = Path(__file__).resolve().parent.parent
HOOK = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


@pytest.fixture(scope="module")
def setup() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py"), run_name="setup"))


@pytest.fixture(scope="module")
def built(setup, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("built") / "libicseg.so"
    setup.build_library(path)
    return path


@pytest.fixture
def project(tmp_path) -> Path:
    """What setup.py needs of the source tree, without anything built."""
    tree = tmp_path / "project"
    for folder in ("csrc", "icseg_kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"):
        (tree / name).write_text("\n")
    return tree


def run_hook(hook: str, project: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Call the build backend as pip does; return the finished process and the file that it made."""
    command = [sys.executable, "-c", HOOK, hook, str(project.parent)]
    variables = {**os.environ, "ICSEG_REQUIRE_NATIVE": "", **environment}
    done = subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True)
    return done, project.parent / (done.stdout.split() or ["nothing"])[-1]


def test_built_library_loads_and_says_what_it_is(built):
    loaded = library.open_library(built)
    assert loaded.icseg_abi_version() == library.ABI_VERSION
    assert re.match(r"(GCC|Clang|clang|Apple)", loaded.icseg_build().decode())
    assert list(built.parent.iterdir()) == [built]


def test_header_and_signatures_name_the_same_functions():
    header = (ROOT / "csrc" / "icseg.h").read_text()
    declared = dict(re.findall(r"ICSEG_API [^;(]*?(icseg_\w+)\(([^;]*)\);", header))
    assert set(declared) == set(library._SIGNATURES)
    for name, arguments in declared.items():
        count = 0 if arguments == "void" else arguments.count(",") + 1
        assert count == len(library._SIGNATURES[name][1]), name
    assert f"#define ICSEG_ABI_VERSION {library.ABI_VERSION}\n" in header


def test_threads_are_those_of_torch(built):
    loaded = library.open_library(built)
    if "no OpenMP" in loaded.icseg_build().decode():
        assert loaded.icseg_threads() == 1
        return
    before = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert loaded.icseg_threads() == count
    finally:
        torch.set_num_threads(before)


HUGE = 2**62
TOO_LARGE = "sizes must not multiply beyond 63 bits of bytes"


@pytest.mark.parametrize(
    ("sizes", "element_bytes", "message"),
    [  # outer, inner, channels, height, width, count, patch
        ((1, 1, 1, -4, 4, 1, 2), 4, "sizes must not be negative"),
        ((1, 1, 1, 4, 4, 1, 0), 4, "patch must be at least 1"),
        ((1, 1, 1, 4, 4, 1, 2), 3, "element_bytes must be 1, 2, 4 or 8"),
        ((1, 1, 1, 4, 4, 1, 2), 16, "element_bytes must be 1, 2, 4 or 8"),
        ((1, 1, 1, HUGE, HUGE, 1, 2), 4, TOO_LARGE),
        ((1, 1, HUGE, 4, 4, 1, 2), 4, TOO_LARGE),
        ((2**32, 2**31, 1, 1, 1, 1, 1), 4, TOO_LARGE),
        ((1, 1, 1, 4, 4, 1, HUGE), 4, TOO_LARGE),
        ((1, 1, 1, 4, 4, HUGE, 2), 4, TOO_LARGE),
        ((1, 1, 0, 4, 4, HUGE, 2), 4, TOO_LARGE),
        ((1, 1, 1, HUGE, 0, 1, HUGE), 4, TOO_LARGE),
        ((1, 1, 0, HUGE, 0, 1, HUGE), 4, TOO_LARGE),
        ((HUGE, HUGE, 0, 4, 4, 0, 2), 4, None),  # nothing to do
        ((1, 1, 1, HUGE, 0, 0, 2), 4, None),
    ],
)
def test_impossible_sizes_are_refused_by_every_entry_point(built, monkeypatch, sizes, element_bytes, message):
    loaded = library.open_library(built)
    monkeypatch.setattr(library, "_library", loaded)
    outer, inner, channels, height, width, count, patch = sizes
    codes = [loaded.icseg_gather_patches(None, None, None, *sizes, *(0,) * 5, element_bytes)]
    if element_bytes == 4:
        arguments = (outer, inner, count, channels, patch, height, width, *(0,) * 6)
        codes.append(loaded.icseg_gather_patches_backward_f32(None, None, None, *arguments))
        codes.append(loaded.icseg_gather_patches_backward_f64(None, None, None, *arguments))
    for code in codes:
        if message is None:
            library.check(code)
        else:
            with pytest.raises(RuntimeError, match=message):
                library.check(code)
    assert loaded.icseg_error(99).decode() == "unknown error code"


def test_a_library_that_cannot_serve_is_named(built, tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"libicseg.so was not built when icseg was installed .* prints why"):
        library.open_library(tmp_path / "libicseg.so")
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(built.read_bytes()[:64])
    with pytest.raises(OSError, match=r"damaged.so cannot be loaded"):
        library.open_library(damaged)
    version = library.ABI_VERSION
    monkeypatch.setattr(library, "ABI_VERSION", 99)
    with pytest.raises(OSError, match=f"has ABI version {version}, this icseg needs 99: install icseg again"):
        library.open_library(built)


def compiled_stub(setup: SimpleNamespace, path: Path, version: int) -> Path:
    """A library that gives its version and nothing else."""
    source = path.with_suffix(".cpp")
    source.write_text(
        f'extern "C" __attribute__((visibility("default"))) int icseg_abi_version() {{ return {version}; }}'
    )
    subprocess.run([*setup.find_compiler(), *setup.FLAGS, str(source), "-o", str(path)], check=True)
    return path


def test_a_stale_library_of_the_right_version_is_named(setup, tmp_path):
    stub = compiled_stub(setup, tmp_path / "stale.so", library.ABI_VERSION)
    with pytest.raises(OSError, match=r"stale.so cannot be loaded: .*icseg_build.*; install icseg again"):
        library.open_library(stub)
    older = compiled_stub(setup, tmp_path / "older.so", library.ABI_VERSION - 1)
    with pytest.raises(OSError, match=f"has ABI version {library.ABI_VERSION - 1}, this icseg needs"):
        library.open_library(older)


def test_a_stale_library_beside_the_package_does_not_break_its_import(setup, project):
    compiled_stub(setup, project / "icseg_kernels" / "libicseg.so", library.ABI_VERSION)
    program = "from icseg_kernels import library; print(library.__file__); print(library.missing()[0])"
    done = subprocess.run([sys.executable, "-c", program], cwd=project, capture_output=True, text=True)
    file, reason = done.stdout.splitlines()
    assert Path(file).is_relative_to(project)
    assert "libicseg.so cannot be loaded" in reason


def test_the_installed_library_is_there_or_its_absence_is_explained():
    reasons = backend.status()["gather_patches"]["native"]
    assert reasons == library.missing()
    if library.PATH.exists():
        assert reasons == []
        assert library.build()
    else:
        assert "was not built" in reasons[0]
        with pytest.raises(OSError, match="was not built"):
            library.get()


def test_compiler_is_the_one_named(setup, monkeypatch):
    monkeypatch.setenv("CXX", f"{sys.executable} -O1")
    assert setup.find_compiler() == [sys.executable, "-O1"]
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(setup.BuildError, match="CXX names /nonexistent/c\\+\\+, which is not an executable"):
        setup.find_compiler()


def test_no_compiler(setup, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(setup.BuildError, match=r"no C\+\+ compiler found \(tried g\+\+, clang\+\+, c\+\+"):
        setup.build_library(tmp_path / "libicseg.so")
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails_leaves_nothing_and_is_heard_once(setup, monkeypatch, tmp_path, capfd):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(setup.BuildError, match="broken failed"):
        setup.build_library(tmp_path / "libicseg.so")
    assert capfd.readouterr().err.count("no such header") == 1
    assert list(tmp_path.iterdir()) == [compiler]


def test_an_error_in_the_sources_is_not_taken_for_missing_openmp(setup, monkeypatch, tmp_path, capfd):
    """The probe passes, the sources fail: one attempt, with OpenMP, and its messages once."""
    sources = tmp_path / "csrc" / "cpu"
    sources.mkdir(parents=True)
    (sources / "broken.cpp").write_text("int f() { return undeclared; }\n")
    monkeypatch.setitem(setup.build_library.__globals__, "ROOT", tmp_path)
    with pytest.raises(setup.BuildError, match="failed"):
        setup.build_library(tmp_path / "libicseg.so")
    error = capfd.readouterr().err
    assert error.count("icseg: ") == 1
    assert "undeclared" in error
    assert "WITHOUT OpenMP" not in error


def test_a_compiler_without_openmp_gives_a_library_and_says_so(setup, monkeypatch, tmp_path, capfd):
    compiler = tmp_path / "plain"
    real = shutil.which(setup.find_compiler()[0])
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec {real} -O0 "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    setup.build_library(tmp_path / "libicseg.so")
    assert re.search(r"icseg: built WITHOUT OpenMP, so of one thread: .*plain cannot", capfd.readouterr().err)
    loaded = library.open_library(tmp_path / "libicseg.so")
    assert loaded.icseg_build().decode().endswith("no OpenMP")
    assert loaded.icseg_threads() == 1


def test_wheel_holds_the_library_and_any_python_takes_it(project):
    done, wheel = run_hook("build_wheel", project)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"icseg-[\d.]+-py3-none-(?!any)\w+\.whl", wheel.name)
    assert "icseg_kernels/libicseg.so" in zipfile.ZipFile(wheel).namelist()


def test_without_a_compiler_the_wheel_is_pure_python_and_imports(project, tmp_path):
    # What an earlier build left beside the package must not slip in.
    (project / "icseg_kernels" / "libicseg.so").write_bytes(b"of another machine")
    done, wheel = run_hook("build_wheel", project, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert "native library not built, installing as pure Python: CXX names /nonexistent/c++" in done.stderr
    assert wheel.name.endswith("-py3-none-any.whl")
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    assert not list(installed.rglob("*.so"))

    program = """if True:
        import torch, icseg_kernels
        from icseg_kernels import library
        print(icseg_kernels.__file__)
        print(library.missing()[0])
        print(icseg_kernels.gather_patches(torch.ones(1, 4, 4), torch.zeros(1, 2).long(), 2).sum().item())
        icseg_kernels.gather_patches(torch.ones(1, 4, 4), torch.zeros(1, 2).long(), 2, backend="native")"""
    command = [sys.executable, "-c", program]
    used = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    file, reason, total = used.stdout.splitlines()
    assert Path(file).is_relative_to(installed)
    assert "was not built when icseg was installed" in reason
    assert total == "4.0"
    assert "BackendError: the native backend cannot serve gather_patches" in used.stderr


def test_a_required_library_that_cannot_be_built_is_an_error(project):
    done, _ = run_hook("build_wheel", project, CXX="/nonexistent/c++", ICSEG_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "CXX names /nonexistent/c++" in done.stderr


def test_editable_install_puts_the_library_beside_the_package(project):
    done, _ = run_hook("build_editable", project)
    assert done.returncode == 0, done.stderr
    assert library.open_library(project / "icseg_kernels" / "libicseg.so").icseg_abi_version() == library.ABI_VERSION


def test_editable_install_without_a_compiler(project):
    done, _ = run_hook("build_editable", project, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert "installing as pure Python" in done.stderr
    assert not list((project / "icseg_kernels").rglob("*.so"))


def test_source_distribution_holds_the_sources_and_nothing_built(project):
    (project / "icseg_kernels" / "libicseg.so").write_bytes(b"of another machine")
    done, archive = run_hook("build_sdist", project)
    assert done.returncode == 0, done.stderr
    with tarfile.open(archive) as tar:
        names = {str(Path(*Path(name).parts[1:])) for name in tar.getnames()}
    assert {"setup.py", "csrc/icseg.h", "csrc/cpu/library.cpp", "csrc/cpu/gather_patches.cpp"} <= names
    assert not [name for name in names if name.endswith(".so")]


def test_setup_never_imports_torch():
    program = f"import runpy, sys; runpy.run_path({str(ROOT / 'setup.py')!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0
