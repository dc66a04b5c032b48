"""One thread a worker where pytest-xdist runs several: their thread pools would wait for each other."""

import os
from collections.abc import Callable, Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, which is next

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which is later


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `isa` runs once for every instruction set that this machine has."""
    from icseg_kernels import library

    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", [] if library.missing() else library.instruction_sets(), indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Serve native calls with this instruction set."""
    from icseg_kernels import library

    library.select_isa(request.param)
    yield request.param
    library.select_isa(None)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN, or the largest integer, so that what is not written shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set torch's threads; after the test they are as many as before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
