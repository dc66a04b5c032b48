"""`pytest benchmarks --benchmark-only`: every rival, compared and timed.

`--quick` keeps the smallest cases that tell something, those that a benchmark's `quick` marks name; `--results FILE`
also appends one row a case to FILE.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Row, append, thread_counts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="append one JSON line a case to this file")
    parser.addoption("--pack", type=Path, help="bench_model: a target of this pack in place of a synthetic one")
    parser.addoption("--quick", action="store_true", help="only the smallest cases that tell something")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick(**values): --quick keeps the cases whose parameters have these values")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--quick"):
        return
    left = [item for item in items if item.path.is_relative_to(Path(__file__).parent) and not is_quick(item)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in set(left)]


def is_quick(item: pytest.Item) -> bool:
    """Whether one of its `quick` marks fits; of the numbers of threads, only the largest is kept."""
    values = item.callspec.params if hasattr(item, "callspec") else {}
    if values.get("threads", thread_counts()[-1]) != thread_counts()[-1]:
        return False
    marks = [mark.kwargs.items() for mark in item.iter_markers("quick")]
    return any(all(values[name] == value for name, value in wanted) for wanted in marks)


@pytest.fixture
def record(benchmark, request) -> Callable[[Row, Callable[[], object]], None]:
    """Keep a row, and let pytest-benchmark time our side too, so that its table shows every case.

    `benchmark.extra_info` holds the row: seconds, FLOPs, bytes, peak memory and largest difference of every rival, the
    rates of the machine, and the share of the roof that ours reaches.
    """

    def keep(row: Row, ours: Callable[[], object]) -> None:
        benchmark.extra_info.update(row.summary())
        benchmark.pedantic(ours, rounds=3)
        if path := request.config.getoption("--results"):
            append(path, row)

    return keep


@pytest.fixture
def quick(request) -> bool:
    """Whether `--quick` is given."""
    return request.config.getoption("--quick")
