"""`pytest benchmarks --benchmark-only`; `--results FILE` also appends one row a case to FILE."""

from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Row, append


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="append one JSON line a case to this file")
    parser.addoption("--pack", type=Path, help="bench_model: a target of this pack in place of a synthetic one")


@pytest.fixture
def record(benchmark, request) -> Callable[[Row, Callable[[], object]], None]:
    """Keep a row, and let pytest-benchmark time our side too, so that its table shows every case."""

    def keep(row: Row, ours: Callable[[], object]) -> None:
        benchmark.extra_info.update(seconds=row.seconds, max_abs_difference=row.max_abs_difference, flops=row.flops)
        benchmark.pedantic(ours, rounds=3)
        if path := request.config.getoption("--results"):
            append(path, row)

    return keep
