"""The comparison of the working tree with a revision: statistics, verdicts, workers, git, and one tiny run."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
CASE = "halvings 256 px, forward"

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not on PATH")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.compare")


def times(median: float, spread: float, rounds: int = 20, seed: int = 0) -> np.ndarray:
    return median * np.exp(spread * np.random.default_rng(seed).standard_normal(rounds))


# Statistics


def test_a_slower_one_is_slower(script: ModuleType) -> None:
    ratio = script.ratio_of_medians(times(1e-3, 0.05), times(1.5e-3, 0.05, seed=1))
    assert 1.25 < ratio.low < ratio.value < ratio.high < 1.8
    assert script.verdict_of(ratio, 1.25) == "slower"
    assert script.verdict_of(ratio, ratio.value) == "unclear"
    assert script.verdict_of(ratio, 2.0) == "same"


def test_equal_ones_are_the_same(script: ModuleType) -> None:
    ratio = script.ratio_of_medians(times(1e-3, 0.05), times(1e-3, 0.05, seed=1))
    assert ratio.low < 1 < ratio.high
    assert script.verdict_of(ratio, 1.25) == "same"


def test_noise_decides_nothing(script: ModuleType) -> None:
    ratio = script.ratio_of_medians(times(1e-3, 0.8), times(1.3e-3, 0.8, seed=1))
    assert script.verdict_of(ratio, 1.25) == "unclear"


def test_a_faster_one_is_faster(script: ModuleType) -> None:
    ratio = script.ratio_of_medians(times(1e-3, 0.05), times(0.5e-3, 0.05, seed=1))
    assert script.verdict_of(ratio, 1.25) == "faster"


def test_drift_that_both_share_cancels(script: ModuleType) -> None:
    drift = np.linspace(1, 3, 20)
    ratio = script.ratio_of_medians(drift, 1.1 * drift)
    assert ratio.value == pytest.approx(1.1)
    assert ratio.low == pytest.approx(1.1)
    assert ratio.high == pytest.approx(1.1)


def test_the_interval_has_its_coverage(script: ModuleType) -> None:
    """Of equal times it holds 1 about 19 times in 20; medians of few rounds make it wider rather than narrower."""
    held = 0
    for seed in range(100):
        ratio = script.ratio_of_medians(times(1, 0.2, seed=2 * seed), times(1, 0.2, seed=2 * seed + 1))
        held += ratio.low <= 1 <= ratio.high
    assert held >= 88


def test_difference_of_outputs(script: ModuleType) -> None:
    one = np.array([1.0, -4.0])
    assert script.relative_difference([one], [one]) == 0
    assert script.relative_difference([one + 0.4], [one]) == pytest.approx(0.1)
    special = np.array([np.inf, np.nan, 2.0])
    assert script.relative_difference([special], [special.copy()]) == 0
    assert script.relative_difference([np.zeros(0)], [np.zeros(0)]) == 0
    for wrong in ([], [one[:1]], [one, one], [np.array([1.0, np.nan])], [np.array([np.inf, -4.0])]):
        assert script.relative_difference(wrong, [one]) == np.inf
    assert script.relative_difference([one], [0 * one]) == np.inf


# Workers


class Fake:
    """A worker whose every call takes `seconds`, by the clock of the test."""

    def __init__(self, seconds: float, output: float = 1.0, lacks: str = "", calls: list[str] | None = None) -> None:
        self.seconds, self.output, self.lacks, self.calls = seconds, output, lacks, calls

    def prepare(self, case: str) -> dict[str, Any]:
        return {"lacks": self.lacks} if self.lacks else {"seconds": self.seconds}

    def time(self, case: str, repeats: int) -> float:
        if self.calls is not None:
            self.calls.append(f"{case} {self.seconds} x{repeats}")
        return self.seconds

    def outputs(self) -> list[np.ndarray]:
        return [np.full(3, self.output)]


def test_workers_take_turns(script: ModuleType) -> None:
    calls: list[str] = []
    results = script.measure(Fake(0.002, calls=calls), Fake(0.004, calls=calls), ["a", "b"], rounds=3, margin=1.25)
    # As many calls a timing for both; each case once a round; who is first alternates from case to case and round.
    assert calls[:4] == ["a 0.002 x5", "a 0.004 x5", "b 0.004 x5", "b 0.002 x5"]
    assert calls[4:8] == ["a 0.004 x5", "a 0.002 x5", "b 0.002 x5", "b 0.004 x5"]
    assert len(calls) == 12
    assert [result.case for result in results] == ["a", "b"]
    for result in results:
        assert result.verdict == "slower"
        assert result.ratio.value == pytest.approx(2)
        assert (len(result.before), len(result.now)) == (3, 3)
        assert not result.differs
    assert script.remarks(results, 1.25)[0].startswith("slower: a: 2.000 times, from 2 ms to 4 ms (95 % interval 2.000")


def test_what_a_revision_lacks_is_no_failure(script: ModuleType) -> None:
    found = script.measure(Fake(1, lacks="AttributeError: no a"), Fake(1), ["a"], rounds=3, margin=1.25)
    found += script.measure(Fake(1), Fake(1, lacks="TypeError: b"), ["b"], rounds=3, margin=1.25)
    assert [result.verdict for result in found] == ["new", "gone"]
    assert not any(result.differs for result in found)
    assert script.remarks(found, 1.25) == ["new: a: AttributeError: no a", "gone: b: TypeError: b"]
    assert script.table(found).splitlines()[2] == "| a |  |  |  |  | new |  |"
    with pytest.raises(script.Problem, match="either revision must have what 'c' calls, got TypeError: c"):
        script.measure(Fake(1, lacks="x"), Fake(1, lacks="TypeError: c"), ["c"], rounds=3, margin=1.25)


@pytest.mark.parametrize(("now", "output", "status"), [(0.01, 1.0, 0), (0.02, 1.01, 1), (0.01, 1.01, 3)])
def test_the_exit_status(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    now: float,
    output: float,
    status: int,
) -> None:
    def compared(root: Path, revision: str, names: list[str], *, rounds: int, margin: float, threads: int | None):
        return script.measure(Fake(0.01), Fake(now, output), names, rounds=rounds, margin=margin), 1

    monkeypatch.setattr(script, "compared", compared)
    monkeypatch.setattr(script, "commit_of", lambda root, revision: "0" * 40)
    out = tmp_path / "rows.jsonl"
    assert script.main(["HEAD", "--only", CASE, "--out", str(out)]) == status
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + (now > 0.01) + (output > 1)
    assert lines[2].startswith(f"| {CASE} | 10 ms |")
    if status:
        assert lines[3].startswith("slower: halvings" if now == 0.02 else "differs: halvings")
    row = json.loads(out.read_text())
    assert row["case"] == CASE
    assert row["verdict"] == ("slower" if now == 0.02 else "same")
    assert row["before"] == [0.01] * 20
    assert row["margin"] == 1.25


STUB = """
import os
print("a line that is no reply")
def halvings(image, count, deviations=0):
    return [2 * image], [image]
def upsample_with_patches(coarser):
    pass
def gumbel_topk(*arguments, **settings):
    raise ValueError("never seen")
def gather_patches(*arguments, **settings):
    os._exit(3)
"""


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A tree whose ops are made up."""
    tree = tmp_path / "tree"
    (tree / "icseg_kernels").mkdir(parents=True)
    (tree / "icseg_kernels" / "__init__.py").write_text(STUB)
    return tree


def test_a_worker_runs_the_packages_of_its_tree(script: ModuleType, stub: Path, tmp_path: Path) -> None:
    worker = script.Worker("abc", stub, tmp_path, threads=1)
    try:
        assert worker.started() == {"threads": 1, "root": str(stub.resolve()), "library": None}
        assert worker.prepare(CASE)["seconds"] > 0
        image, same = worker.outputs()
        assert image.shape == (1, 1, 256, 256)
        np.testing.assert_array_equal(image, 2 * same)
        assert 0 < worker.time(CASE, 2) < 1
        assert worker.prepare("halvings 1024 px, forward")["seconds"] > 0
        lacks = worker.prepare("upsample_with_patches 256 px K64, forward")["lacks"]
        assert lacks.startswith("TypeError: ")
        assert worker.prepare("scatter_patches B1 C1 128 px K16 p16, forward")["lacks"].startswith("AttributeError: ")
        with pytest.raises(script.Problem, match="failed in abc: ValueError: never seen"):
            worker.prepare("gumbel_topk B1 N1024 k16, forward")
        with pytest.raises(script.Problem, match="the worker of abc ended with status 3 while it ran 'gather_patches"):
            worker.prepare("gather_patches B1 C1 128 px K16 p8, forward")
    finally:
        worker.close()


def test_inputs_are_the_same_for_all(script: ModuleType, tmp_path: Path) -> None:
    name = "gather_patches B1 C1 128 px K16 p8, forward + backward"
    found = []
    for i in range(2):
        path = tmp_path / f"{i}.npz"
        assert script.compare_cases.Worker().prepare(name, str(path))["seconds"] > 0
        with np.load(path) as saved:
            found.append([saved[key] for key in saved.files])
    assert len(found[0]) == 2  # output and gradient
    assert script.relative_difference(*found) == 0


# Git


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *settings, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


BUILD = "import pathlib; pathlib.Path('icseg_kernels/libicseg.so').write_text('built')"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A checkout with one commit, whose setup.py writes its library, which is there."""
    folder = tmp_path / "repository"
    for name, text in {
        "setup.py": BUILD,
        "csrc/cpu/op.cpp": "int one;",
        "icseg_kernels/__init__.py": "",
        ".gitignore": "*.so",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "icseg_kernels" / "libicseg.so").write_text("ours")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "one")
    return folder


@needs_git
def test_a_library_is_copied_only_if_nothing_it_is_built_of_differs(
    script: ModuleType, repository: Path, tmp_path: Path
) -> None:
    head = script.commit_of(repository, "HEAD")

    def provided() -> tuple[str, str]:
        with script.checked_out(repository, head, tmp_path) as tree:
            how = script.provide_library(repository, tree, head)
            return how, (tree / "icseg_kernels" / "libicseg.so").read_text()

    assert provided() == ("copied", "ours")
    (repository / "icseg_kernels" / "__init__.py").write_text("changed = True")
    assert provided() == ("copied", "ours")
    extra = repository / "csrc" / "cpu" / "extra.cpp"
    extra.write_text("int two;")
    assert provided() == ("built", "built")
    extra.unlink()
    (repository / "csrc" / "cpu" / "op.cpp").write_text("int other;")
    assert provided() == ("built", "built")


@needs_git
def test_a_failed_build_says_why(script: ModuleType, repository: Path, tmp_path: Path) -> None:
    (repository / "setup.py").write_text("raise SystemExit('no compiler today')")
    git(repository, "commit", "-q", "-a", "-m", "two")
    head = script.commit_of(repository, "HEAD")
    (repository / "setup.py").write_text(BUILD)
    with (
        pytest.raises(script.Problem, match=f"library of {head[:10]} could not be built: no compiler today"),
        script.checked_out(repository, head, tmp_path) as tree,
    ):
        script.provide_library(repository, tree, head)
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@needs_git
def test_the_worktree_is_removed_if_interrupted(script: ModuleType, repository: Path, tmp_path: Path) -> None:
    head = script.commit_of(repository, "HEAD")
    trees = []

    def interrupted() -> None:
        with script.ended_as_interrupted(), script.checked_out(repository, head, tmp_path) as tree:
            assert (tree / "setup.py").exists()
            (tree / "left.txt").write_text("by a build")
            trees.append(tree)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not trees[0].exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="process groups are POSIX's")
def test_an_interrupted_command_leaves_no_process(script: ModuleType, tmp_path: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            script.finished(["sh", "-c", "sleep 30 & echo $! > pid; wait"], cwd=tmp_path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running(child)


def running(pid: int) -> bool:
    """Whether the process is there, and not only waits to be collected."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/status")
        return not status.exists() or "State:\tZ" not in status.read_text()
    except ProcessLookupError:
        return False


@needs_git
def test_what_cannot_be_compared_is_said_in_a_sentence(
    script: ModuleType, repository: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def said(*arguments: str, root: Path = repository) -> str:
        assert script.main(list(arguments), root) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        return line.removeprefix("compare: ")

    assert said("nowhere") == f"REV must name a commit of {repository}, got 'nowhere'"
    assert said("HEAD", root=tmp_path) == f"{tmp_path} must be a git checkout, and is none"
    assert "existing folder" in said("HEAD", "--out", str(tmp_path / "missing" / "rows.jsonl"))

    os.utime(repository / "csrc" / "cpu" / "op.cpp", (time.time() + 9,) * 2)
    assert said("HEAD").startswith(f"libicseg.so must be newer than its sources, got a later {Path('csrc/cpu/op.cpp')}")
    (repository / "icseg_kernels" / "libicseg.so").unlink()
    assert "must be built first" in said("HEAD")

    git(repository, "checkout", "-q", "-b", "other")
    (repository / "setup.py").write_text("one")
    git(repository, "commit", "-q", "-a", "-m", "one")
    git(repository, "checkout", "-q", "-")
    (repository / "setup.py").write_text("two")
    git(repository, "commit", "-q", "-a", "-m", "two")
    with pytest.raises(subprocess.CalledProcessError):
        git(repository, "merge", "other")
    assert said("HEAD") == "the working tree must have no unresolved conflicts, got one in setup.py"

    monkeypatch.setenv("PATH", str(tmp_path))
    assert said("HEAD") == "git must be on PATH, found none"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["HEAD", "--only", "no such op"], "--only must be part of a case's name, got 'no such op'"),
        (["HEAD", "--rounds", "2"], "--rounds must be at least 3, got 2"),
        (["HEAD", "--margin", "0.9"], "--margin must be at least 1, got 0.9"),
        (["HEAD", "--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_options_out_of_range(
    script: ModuleType, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(arguments)
    assert message in capsys.readouterr().err


def test_the_quick_set_has_the_smallest_case_of_each_op(script: ModuleType) -> None:
    found = script.parsed(["HEAD", "--quick"])[1]
    assert {name.split()[0] for name in found} == {name.split()[0] for name in script.compare_cases.cases()}
    assert "gumbel_topk B1 N1024 k16, forward + backward" in found
    assert "sparse model 128 px, cold" in found
    assert not any("256 px, cold" in name or "N1024 half" in name for name in found)
    assert script.parsed(["HEAD", "--quick", "--only", "sparse"])[1] == found[-2:]


@needs_git
def test_the_working_tree_against_its_own_commit(
    script: ModuleType, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    head = script.commit_of(ROOT, "HEAD")
    before = git(ROOT, "worktree", "list")
    out = tmp_path / "rows.jsonl"
    arguments = ["HEAD", "--only", CASE, "--rounds", "3", "--margin", "1000", "--threads", "1", "--out", str(out)]
    status = script.main(arguments)
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert captured.out.splitlines()[2].startswith(f"| {CASE} |")
    assert ("copied" in captured.err) == script.has_same_sources(ROOT, head)
    row = json.loads(out.read_text())
    assert row["revision"] == head
    assert row["verdict"] == "same"
    assert row["threads"] == 1
    assert row["difference"] < 1e-3
    assert row["ratio"]["low"] <= row["ratio"]["value"] <= row["ratio"]["high"]
    assert git(ROOT, "worktree", "list") == before
