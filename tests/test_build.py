"""The native library: built, loaded, packed into wheels; and what happens where it cannot be."""

from __future__ import annotations

import ctypes
import importlib
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import icseg_kernels
from icseg_kernels import backend, library

ROOT = Path(__file__).resolve().parent.parent
HOOK = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


@pytest.fixture(scope="module")
def setup() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py"), run_name="setup"))


@pytest.fixture(scope="module")
def quick(setup, tmp_path_factory) -> str:
    """A compiler that optimises nothing, for tests of all else."""
    path = tmp_path_factory.mktemp("compiler") / "quick"
    path.write_text(f'#!/bin/sh\nexec {shlex.join(setup.find_compiler())} "$@" -O0\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def objects(setup, quick, tmp_path_factory) -> list[Path]:
    """The objects of the library; not optimised, so that what would be inlined is seen too."""
    directory = tmp_path_factory.mktemp("objects")
    setup.run(*setup.compile_commands([quick], directory))
    return sorted(directory.iterdir())


@pytest.fixture(scope="module")
def built(setup, quick, objects, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("built") / "libicseg.so"
    setup.run([quick, *setup.FLAGS, *setup.openmp_flags([quick]), "-shared", *map(str, objects), "-o", str(path)])
    return path


@pytest.fixture
def project(tmp_path) -> Path:
    """What setup.py needs of the source tree, without anything built; of the C++, for speed, no op."""
    tree = tmp_path / "project"
    for folder in ("csrc", "icseg_kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for source in (tree / "csrc" / "cpu").rglob("*.cpp"):
        if source.name != "library.cpp":
            source.unlink()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree)
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"):
        (tree / name).write_text("\n")
    return tree


def run_hook(hook: str, project: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Call the build backend as pip does; return the finished process and the file that it made."""
    command = [sys.executable, "-c", HOOK, hook, str(project.parent)]
    variables = {**os.environ, "ICSEG_REQUIRE_NATIVE": "", "ICSEG_CUDA": "0", **environment}
    done = subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True)
    return done, project.parent / (done.stdout.split() or ["nothing"])[-1]


def test_built_library_loads_and_says_what_it_is(built):
    loaded = library.open_library(built)
    assert loaded.icseg_abi_version() == library.ABI_VERSION
    assert re.match(r"(GCC|Clang|clang|Apple)", loaded.icseg_build().decode())


CTYPES = {
    "int": ctypes.c_int,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


def ctype(declaration: str) -> type:
    """The ctypes type of a parameter as the header declares it; of every pointer c_void_p."""
    return ctypes.c_void_p if "*" in declaration else CTYPES[declaration.split()[0]]


@pytest.fixture(scope="module")
def declared(setup) -> dict[str, list[type]]:
    """The ctypes arguments of every function that the header declares."""
    command = [*setup.find_compiler(), "-E", "-P", str(ROOT / "csrc" / "icseg.h")]
    header = " ".join(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    found = re.findall(r"\b(icseg_\w+) ?\(([^()]*)\);", header)
    return {
        name: [] if given.strip() == "void" else [ctype(a.strip()) for a in given.split(",")] for name, given in found
    }


def test_header_and_signatures_agree(declared):
    for module in pkgutil.walk_packages(icseg_kernels.__path__, "icseg_kernels."):
        if module.name.endswith("native"):
            importlib.import_module(module.name)
    bound = {name: arguments for name, (_, arguments) in library._OF_THE_LIBRARY.items()} | library.functions
    assert len(bound) > len(library._OF_THE_LIBRARY)
    assert set(declared) == set(bound)
    for name, arguments in declared.items():
        assert arguments == [ctypes.c_void_p if a is ctypes.c_char_p else a for a in bound[name]], name
    header = (ROOT / "csrc" / "icseg.h").read_text()
    assert f"#define ICSEG_ABI_VERSION {library.ABI_VERSION}\n" in header


def listed(*command: str | Path) -> list[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_library_exports_what_the_header_declares_and_nothing_else(built, declared):
    exported = {line.split()[-1] for line in listed("nm", "--dynamic", "--defined-only", built)}
    mangled = {name for name in exported if name.startswith("_")}  # of std:: where nothing is inlined
    assert exported - mangled == set(declared)
    assert not [name for name in mangled if name.startswith("_ZN5icseg")]


def test_kernels_are_compiled_for_every_instruction_set(setup, objects):
    sets = setup.instruction_sets(setup.find_compiler())
    kernels = {path.stem for path in (ROOT / "csrc" / "cpu" / "kernels").glob("*.cpp")}
    assert {f"kernel.{name}.{isa}.o" for name in kernels for isa in sets} <= {path.name for path in objects}
    assert sets[0] == "portable"


def test_no_function_of_wide_instructions_can_replace_a_narrow_one(objects):
    """Of a weak function the linker keeps any one copy: wide objects may have none but their own kernels."""
    for path in objects:
        isa = path.stem.rpartition(".")[2]
        if isa not in ("avx2", "avx512"):
            continue
        symbols = [line.split()[-2:] for line in listed("nm", "--defined-only", path)]
        weak = [name for kind, name in symbols if kind in "WwVvu" and not name.startswith("DW.ref.")]
        own = rf"_ZZ*N5icseg{len(isa)}{isa}"  # mangled: a kernel of the namespace, or something within one
        assert not [name for name in weak if not re.match(own, name)], path.name


def test_nothing_but_the_wide_kernels_needs_wide_instructions(objects):
    """Instructions that begin with v are of AVX and later; %zmm and mask registers are of AVX-512."""
    for path in objects:
        isa = path.stem.rpartition(".")[2]
        if isa == "avx512":
            continue
        too_wide = r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])" if isa == "avx2" else r"^\s*\w+:\s+v(?!err|erw)|%[yz]mm"
        code = listed("objdump", "--disassemble", "--no-show-raw-insn", path)
        assert not [line for line in code if re.search(too_wide, line)], path.name
        assert len(code) > 10


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


def test_error_codes_have_sentences(built):
    loaded = library.open_library(built)
    (listing,) = re.findall(r"enum icseg_code \{([^}]*)\}", (ROOT / "csrc" / "icseg.h").read_text())
    codes = dict(re.findall(r"(ICSEG_\w+) = (\d+)", listing))
    sentences = {loaded.icseg_error(int(code)).decode() for code in codes.values()}
    assert len(sentences) == len(codes) == max(map(int, codes.values())) + 1
    assert "unknown error code" not in sentences
    assert loaded.icseg_error(99).decode() == "unknown error code"
    assert loaded.icseg_error(-1).decode() == "unknown error code"


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


def compiled_stub(setup: SimpleNamespace, path: Path, version: int, *, complete: bool = False) -> Path:
    """A library that gives its version and nothing else; of no op, if `complete`."""
    source = path.with_suffix(".cpp")
    text = f'extern "C" __attribute__((visibility("default"))) int icseg_abi_version() {{ return {version}; }}'
    sources = [str(source)]
    if complete:
        text = f"#include <{ROOT / 'csrc' / 'icseg.h'}>\n"
        sources += [str(ROOT / "csrc" / "cpu" / "library.cpp")]
    source.write_text(text)
    subprocess.run([*setup.find_compiler(), *setup.FLAGS, "-shared", *sources, "-o", str(path)], check=True)
    return path


def test_a_stale_library_of_the_right_version_is_named(setup, tmp_path):
    stub = compiled_stub(setup, tmp_path / "stale.so", library.ABI_VERSION)
    with pytest.raises(OSError, match=r"stale.so cannot be loaded: .*icseg_build.*; install icseg again"):
        library.open_library(stub)
    older = compiled_stub(setup, tmp_path / "older.so", library.ABI_VERSION - 1)
    with pytest.raises(OSError, match=f"has ABI version {library.ABI_VERSION - 1}, this icseg needs"):
        library.open_library(older)


@pytest.mark.parametrize("complete", [False, True])
def test_a_stale_library_beside_the_package_does_not_break_its_import(setup, project, complete):
    """One that lacks the ops' functions, and one that lacks even its own."""
    compiled_stub(setup, project / "icseg_kernels" / "libicseg.so", library.ABI_VERSION, complete=complete)
    program = """if True:
        import torch
        import icseg_kernels
        from icseg_kernels import backend, library
        from icseg_kernels.patches import gather_native as native
        print(library.__file__)
        print("; ".join(library.missing()))
        given = torch.ones(1, 4, 4), torch.zeros(1, 2).long(), 2
        print(icseg_kernels.gather_patches(*given).sum().item())
        for reasons in backend.status().values():
            assert reasons.get("native", library.missing()) == library.missing(), reasons
        for call in (lambda: icseg_kernels.gather_patches(*given, backend="native"), lambda: native.gather(*given)):
            try:
                call()
            except (backend.BackendError, OSError) as error:
                print(type(error).__name__, error)"""
    done = subprocess.run([sys.executable, "-c", program], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, reason, total, by_name, by_module = done.stdout.splitlines()
    assert Path(file).is_relative_to(project)
    expected = r"libicseg.so lacks icseg_\w+: install icseg again" if complete else "libicseg.so cannot be loaded"
    assert re.search(expected, reason)
    assert total == "4.0"
    assert by_name.startswith("BackendError the native backend cannot serve gather_patches")
    assert by_name.endswith(reason)
    assert by_module == f"OSError {reason}"


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


def test_a_compiler_without_openmp_gives_a_library_and_says_so(setup, quick, project, monkeypatch, tmp_path, capfd):
    monkeypatch.setitem(setup.build_library.__globals__, "ROOT", project)
    compiler = tmp_path / "plain"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec {quick} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    setup.build_library(tmp_path / "libicseg.so")
    assert re.search(r"icseg: built WITHOUT OpenMP, so of one thread: .*plain cannot", capfd.readouterr().err)
    loaded = library.open_library(tmp_path / "libicseg.so")
    assert loaded.icseg_build().decode().endswith("no OpenMP")
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "project", "libicseg.so"}
    assert loaded.icseg_threads() == 1


def test_wheel_holds_the_library_and_any_python_takes_it(project, quick):
    done, wheel = run_hook("build_wheel", project, CXX=quick)
    assert done.returncode == 0, done.stderr
    assert re.search(r"icseg: built libicseg.so in \d+ s with ", done.stdout)
    assert re.fullmatch(r"icseg-[\d.]+-py3-none-(?!any)\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(project)) for path in (project / "icseg_kernels").rglob("*.py")}
    assert {"icseg_kernels/libicseg.so", "icseg_kernels/py.typed"} | modules <= names
    assert {Path(name).parts[0] for name in names} == {"icseg_kernels", f"icseg-{wheel.name.split('-')[1]}.dist-info"}


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


def test_editable_install_puts_the_library_beside_the_package(project, quick):
    done, _ = run_hook("build_editable", project, CXX=quick)
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
    sources = {str(path.relative_to(project)) for path in (project / "csrc").rglob("*.*")}
    assert {"csrc/icseg.h", "csrc/cpu/library.cpp", "csrc/cpu/kernels/simd.h", "csrc/tests/run.py"} <= sources
    assert sources | {"setup.py"} <= names
    assert not [name for name in names if name.endswith(".so")]


def test_setup_never_imports_torch():
    program = f"import runpy, sys; runpy.run_path({str(ROOT / 'setup.py')!r}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0
