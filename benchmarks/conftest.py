"""`pytest benchmarks --benchmark-only`: every rival, compared and timed.

`--quick` keeps the smallest cases that tell something, those that a benchmark's `quick` marks name; `--one-thread-too`
times ops on one thread besides; `--results FILE` also appends one row a case to FILE.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Row, append, thread_counts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="append one JSON line a case to this file")
    parser.addoption("--pack", type=Path, help="bench_model: a target of this pack in place of a synthetic one")
    parser.addoption("--quick", action="store_true", help="only the smallest cases that tell something")
    parser.addoption("--one-thread-too", action="store_true", help="ops on one thread beside all that torch would use")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "quick(**values): --quick keeps the cases whose parameters have these values")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = is_quick if config.getoption("--quick") else takes_all_threads
    if config.getoption("--one-thread-too") and not config.getoption("--quick"):
        return
    left = [item for item in items if item.path.is_relative_to(Path(__file__).parent) and not wanted(item)]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in set(left)]


def takes_all_threads(item: pytest.Item) -> bool:
    return values_of(item).get("threads", thread_counts()[-1]) == thread_counts()[-1]


def values_of(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def is_quick(item: pytest.Item) -> bool:
    """Whether one of its `quick` marks fits; of the numbers of threads, only the largest is kept."""
    values = values_of(item)
    if not takes_all_threads(item):
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
