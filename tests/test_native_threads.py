"""Native ops and threads: OpenMP's, Python's, those of a forked process; and the instruction set by environment."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import SAMPLES, Run
from torch import Tensor

from icseg_kernels import backend as backends
from icseg_kernels import gather_patches, library

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 40  # seconds after which a process is taken to hang

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def op_of(sample: str) -> str:
    return sample.split(" ")[0]


# What the library serves. The convolutions in cross_conv2d are torch's, whose sums depend on its threads.
NATIVE = [
    name
    for name in SAMPLES
    if backends.status()[op_of(name)].get("native") == [] and not op_of(name).startswith("cross_conv2d")
]


@pytest.fixture(params=NATIVE)
def sample(request: pytest.FixtureRequest) -> str:
    return request.param


def same_bits(found: list[Tensor], expected: list[Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)


def test_samples_are_of_every_op() -> None:
    assert set(map(op_of, SAMPLES)) == set(backends.status()) - {"gumbel_noise"}  # which takes no tensor


def test_results_do_not_depend_on_the_number_of_threads(sample: str) -> None:
    run = SAMPLES[sample](True)
    torch.set_num_threads(1)
    expected = run()
    for count in (2, 3, 1, 2):
        torch.set_num_threads(count)
        assert same_bits(run(), expected), f"{count} threads"


def test_python_threads_at_once_on_the_same_inputs(sample: str) -> None:
    run = SAMPLES[sample](True)
    torch.set_num_threads(2)
    expected = run()
    with ThreadPoolExecutor(3) as pool:
        for found in [pool.submit(run) for _ in range(9)]:
            assert same_bits(found.result(timeout=LIMIT), expected)


def test_the_interpreter_runs_on_while_the_library_works() -> None:
    """A call of some tenths of a second, in which another Python thread counts."""
    if library.missing():
        return
    source, coords = torch.zeros(1, 4, 4), torch.zeros(300_000, 2, dtype=torch.int64)
    started, ended = threading.Event(), threading.Event()
    counted = 0

    def work() -> None:
        started.set()
        gather_patches(source, coords, 32, backend="native")
        ended.set()

    torch.set_num_threads(1)
    thread = threading.Thread(target=work)
    thread.start()
    started.wait(LIMIT)
    while not ended.is_set():
        counted += 1
        time.sleep(0.001)
    thread.join(LIMIT)
    assert counted >= 20
    assert isinstance(library.get(), ctypes.CDLL)
    assert not isinstance(library.get(), ctypes.PyDLL)  # which would hold the interpreter's lock


def in_a_child(run: Run, results: Any) -> None:
    torch.set_num_threads(1)  # for torch's own ops; the library knows by itself
    results.put([x.numpy().tobytes() for x in run(gradients=False)])  # torch refuses gradients after fork


def test_a_forked_process_does_not_wait_for_threads_that_it_lacks(sample: str) -> None:
    run = SAMPLES[sample](True)
    torch.set_num_threads(3)
    torch.ones(2**20).mul_(2)  # torch's threads, and so OpenMP's, now exist
    expected = [x.numpy().tobytes() for x in run(gradients=False)]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=in_a_child, args=(run, results))
    child.start()
    try:
        assert results.get(timeout=LIMIT) == expected
        child.join(LIMIT)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert [x.numpy().tobytes() for x in run(gradients=False)] == expected


def test_a_forked_process_needs_no_setting(tmp_path: Path) -> None:
    """torch's own ops would wait for ever here: none may be in the way of a native call."""
    if library.missing():
        return
    source = torch.randn(3, 300, 300, generator=torch.Generator().manual_seed(0))
    coords = torch.randint(-9, 300, (64, 2), generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(3)
    torch.ones(2**20).mul_(2)
    expected = gather_patches(source, coords, 24).numpy().tobytes()
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: (tmp_path / "found").write_bytes(gather_patches(source, coords, 24).numpy()))
    child.start()
    child.join(LIMIT)
    try:
        assert child.exitcode == 0
    finally:
        child.kill()
    assert (tmp_path / "found").read_bytes() == expected


class Patches(torch.utils.data.Dataset):
    """Patches cut in the workers of a DataLoader."""

    def __init__(self, source: Tensor, coords: Tensor) -> None:
        self.source, self.coords = source, coords

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Tensor:
        return gather_patches(self.source[i], self.coords[i], 24)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method: str) -> None:
    torch.set_num_threads(2)
    source = torch.randn(4, 3, 200, 200, generator=torch.Generator().manual_seed(0))
    coords = torch.randint(-9, 200, (4, 64, 2), generator=torch.Generator().manual_seed(1))
    expected = gather_patches(source, coords, 24)
    loader = torch.utils.data.DataLoader(
        Patches(source, coords), batch_size=2, num_workers=2, multiprocessing_context=method, timeout=LIMIT
    )
    assert torch.equal(torch.cat(list(loader)), expected)


def imported(**environment: str) -> subprocess.CompletedProcess[str]:
    """Import the package in a new process, and print the instruction set."""
    program = "from icseg_kernels import library; print(library.isa())"
    variables = {name: value for name, value in os.environ.items() if name != library.ISA_VARIABLE} | environment
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=LIMIT)


def test_instruction_set_by_environment() -> None:
    if not library.missing():
        assert imported(ICSEG_CPU_ISA="portable").stdout.split() == ["portable"]


def test_an_empty_name_in_the_environment_is_none() -> None:
    if not library.missing():
        assert imported(ICSEG_CPU_ISA="").stdout.split() == library.instruction_sets()[-1:]


def test_an_unknown_instruction_set_is_named_at_import() -> None:
    if library.missing():
        return
    name = "AVX2"
    done = imported(ICSEG_CPU_ISA=name)
    assert done.returncode == 1
    expected = f"ValueError: ICSEG_CPU_ISA: the instruction set must be portable, avx2 or avx512, got {name!r}"
    assert done.stderr.splitlines()[-1] == expected
    assert "During handling" not in done.stderr


def test_an_instruction_set_that_the_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.missing():
        return
    before = library.isa()
    with pytest.raises(ValueError, match="the instruction set must be portable, avx2 or avx512, got 'neon'"):
        library.select_isa("neon")
    assert library.isa() == before
    missing = {"portable", "avx2", "avx512"} - set(library.instruction_sets())
    for name in missing:
        with pytest.raises(ValueError, match=f"this machine has no such instruction set, got '{name}'"):
            library.select_isa(name)


def test_every_instruction_set_serves_every_op(isa: str, sample: str) -> None:
    """Close to the reference; what is equal bit for bit is for each op's own tests."""
    run = SAMPLES[sample](False)
    for found, expected in zip(run(), run("reference"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
