"""Compilation for GPUs that need not be there: rows, what fails, and the table that spares compiling."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from icseg_kernels import triton_launch

pytestmark = pytest.mark.skipif("Triton is not installed" in str(triton_launch.missing()), reason="needs Triton")
SMALL = "halvings"


def named(part):
    from icseg_kernels.aot import compilations

    return [c for c in compilations() if part in c.name]


def run(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "icseg_kernels.aot", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_every_compilation_has_a_name_and_gives_every_argument():
    compilations = named("")
    assert len({c.name for c in compilations}) == len(compilations) > 100
    for c in compilations:
        assert set(c.kernel.arg_names) == set(c.signature) | set(c.constants), c.name
        assert set(c.aligned) | set(c.unaligned) <= set(c.signature), c.name


def test_the_fingerprint_is_that_of_the_compiled_code():
    from icseg_kernels.aot import fingerprint

    c = named(SMALL)[0]
    same = dataclasses.replace(c, name="another name")
    assert fingerprint(same, 90) == fingerprint(c, 90)
    others = [fingerprint(c, 80), fingerprint(dataclasses.replace(c, num_warps=16), 90)]
    others.append(fingerprint(dataclasses.replace(c, constants={**c.constants, "more": 1}), 90))
    assert len({fingerprint(c, 90), *others}) == 4


def test_the_fingerprint_sees_what_a_kernel_calls():
    from icseg_kernels.aot import _sources

    (c, *_) = [c for c in named("group_norm_film") if "backward" in c.name]
    assert {"gelu_slope", "divide"} <= {name.rsplit(".", 1)[1] for name in _sources(c.kernel)}


def test_failures_say_what_must_hold():
    from icseg_kernels.aot import failures

    c = next(c for c in named("") if c.tensor_cores)
    row = {"name": c.name, "arch": 90, "spilled_bytes": 0, "tensor_cores": 4}
    assert failures([row]) == []
    where = f"{c.name} for sm_90 must"
    assert failures([row | {"spilled_bytes": 8}]) == [f"{where} spill no register, got 8 bytes"]
    assert failures([row | {"tensor_cores": 0}]) == [f"{where} use tensor cores, got none"]
    assert failures([{"name": c.name, "arch": 90, "error": "no"}]) == [f"{where} compile, got no"]


def test_a_table_spares_what_has_not_changed(tmp_path):
    table, name = tmp_path / "aot.jsonl", named(SMALL)[0].name
    first = run("--arch", 90, "--only", name, "--table", table, "--json", "--jobs", 1)
    assert first.returncode == 0, first.stderr
    assert "1/1" in first.stderr
    (row,) = json.loads(first.stdout)
    assert (row["name"], row["arch"], row["spilled_bytes"]) == (name, 90, 0)
    assert min(row["registers"], row["instructions"]) > 0
    assert [json.loads(line) for line in table.read_text().splitlines()] == [row]
    again = run("--arch", 90, "--only", name, "--table", table, "--json", "--jobs", 1)
    assert (again.returncode, json.loads(again.stdout), again.stderr) == (0, [row], "")
    table.write_text(json.dumps(row | {"spilled_bytes": 16}) + "\n")
    spilled = run("--arch", 90, "--only", name, "--table", table, "--jobs", 1)
    assert (spilled.returncode, spilled.stderr) == (1, f"{name} for sm_90 must spill no register, got 16 bytes\n")
    table.write_text(json.dumps(row | {"fingerprint": "older"}) + "\n")
    assert "1/1" in run("--arch", 90, "--only", name, "--table", table, "--jobs", 1).stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--only", "no such kernel"], "--only must be part of a kernel's name"),
        (["--jobs", 0], "--jobs must be at least 1"),
    ],
)
def test_wrong_arguments(arguments, reason):
    found = run(*arguments)
    assert found.returncode == 2
    assert reason in found.stderr
