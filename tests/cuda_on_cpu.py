"""Where tests of the CUDA library run: on a CUDA device, or where none is, on the CPU (csrc/tests/cuda_on_cpu.h).

On the CPU the very kernels run behind the very calls, but for the launch and the stream: slow, so few and small.
"""

from __future__ import annotations

import ctypes
import functools
import runpy
import subprocess
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from icseg_kernels import cuda_library

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")

_SOURCE = """
#include "{root}/csrc/tests/cuda_on_cpu.h"
#include "{root}/csrc/cuda/gumbel_topk.cu"
#include "{root}/csrc/cuda/sample_patches.cu"
namespace testing {{
void fail(const char* format, ...) {{ std::fputs(format, stderr), std::abort(); }}
uint64_t Random::bits() {{ return state_ = state_ * 6364136223846793005u + 1442695040888963407u, state_ >> 32; }}
}}
extern "C" ICSEG_CUDA_API const char* icseg_cuda_error(int code) {{ return code == 3 ? "too large" : "other"; }}
"""


@functools.cache
def _library() -> ctypes.CDLL:
    setup = SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py"), run_name="setup"))
    with tempfile.TemporaryDirectory() as directory:
        source, output = Path(directory) / "emulated.cpp", Path(directory) / "emulated.so"
        source.write_text("#include <cstdio>\n#include <cstdlib>\n" + _SOURCE.format(root=ROOT))
        try:
            command = [*setup.find_compiler(), *setup.FLAGS, "-O1", "-shared", str(source), "-o", str(output)]
        except setup.BuildError as error:
            pytest.skip(str(error))
        subprocess.run(command, check=True)
        library = ctypes.CDLL(str(output))
    library.icseg_cuda_error.restype = ctypes.c_char_p
    for name, arguments in cuda_library.functions.items():
        getattr(library, name).argtypes = arguments
    return library


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's functions serve tensors on DEVICE; skips where there is no library for it."""
    if DEVICE == "cuda":
        if reasons := cuda_library.missing():
            pytest.skip("; ".join(reasons))
        return
    library = _library()
    monkeypatch.setattr(cuda_library, "_opened", lambda: library)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=None))
