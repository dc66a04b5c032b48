"""What importing the packages needs, and which names they offer."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import icseg
import icseg_kernels


def run(code: str, **environment: str) -> str:
    """The output of `code` in a new interpreter with nothing but `environment`."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_public_name_is_there():
    for package in (icseg, icseg_kernels):
        for name in package.__all__:
            assert getattr(package, name) is not None
        assert sorted(package.__all__) == list(package.__all__)


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'icseg' has no attribute 'segmnet'"):
        icseg.segmnet  # noqa: B018


def test_import_waits_for_nothing_heavy():
    assert run("import sys, icseg; print('torch' in sys.modules)") == "False"


def test_everything_works_without_compiler_or_triton():
    code = """
import sys
sys.modules["triton"] = None  # an import of it fails
import torch, icseg, icseg_kernels
assert icseg_kernels.gather_patches(torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 2, dtype=torch.int64), 4).sum() == 16
print(type(icseg.PatchICL()).__name__)
"""
    assert run(code, PATH="") == "PatchICL"


def test_native_library_may_be_missing(tmp_path):
    shutil.copytree(
        Path(icseg_kernels.__file__).parent,
        tmp_path / "icseg_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import torch, icseg_kernels
assert icseg_kernels.__file__.startswith({str(tmp_path)!r})
source, coords = torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 2, dtype=torch.int64)
assert icseg_kernels.gather_patches(source, coords, 4).sum() == 16
try:
    icseg_kernels.gather_patches(source, coords, 4, backend="native")
except icseg_kernels.BackendError as error:
    print(error)
"""
    assert "the native backend cannot serve gather_patches" in run(code)
