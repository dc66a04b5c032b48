"""The benchmarks for GPUs as far as they go without one: their cases, counts and comparisons."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gpu")


def test_every_op_has_a_case_whose_rivals_can_be_called(script: ModuleType) -> None:
    smallest = {case.op: case for case in reversed(script.cases())}
    assert len(smallest) == 12
    for case in smallest.values():
        rivals = case.make(torch.device("cpu"))
        assert {"eager", *script.OURS} <= set(rivals)
        outputs = rivals["eager"]()
        assert outputs
        if "SDPA" in rivals:
            assert script.relative_error(rivals["SDPA"](), outputs) <= case.tolerance


def test_names_of_cases_differ(script: ModuleType) -> None:
    names = [(case.op, case.shape) for case in script.cases()]
    assert len(set(names)) == len(names)


def test_the_floor_is_the_larger_of_two_times(script: ModuleType) -> None:
    case = script.cases()[0]
    assert script.floor(case) == 1e6 * max(case.bytes / 3.0e12, case.flops / 800e12)
    assert script.floor(case) > 0


def test_counting_needs_no_gpu(script: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert script.main(["--count", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 12
    assert lines[2].startswith("| gumbel_topk | B1 n4096 k64 | float32 | 0.017 |")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_measuring_without_a_gpu_says_so(script: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main([])
    assert "a CUDA device must be there unless --count is given" in capsys.readouterr().err


def test_relative_error(script: ModuleType) -> None:
    one = torch.tensor([3.0, 4.0])
    assert script.relative_error([one], [one]) == 0
    assert script.relative_error([one * 1.01], [one]) == pytest.approx(0.01, rel=1e-5)
    assert script.relative_error([torch.tensor([3.0, math.inf])], [torch.tensor([3.0, math.inf])]) == 0
    for wrong in ([one[:1]], [one, one], [torch.tensor([3.0, math.nan])], [torch.tensor([3.0, math.inf])]):
        assert script.relative_error(wrong, [one]) == math.inf
