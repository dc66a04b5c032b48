"""Does the working tree run slower than a revision?

    python -m benchmarks.compare main
    python -m benchmarks.compare HEAD~3 --only gather_patches --rounds 40 --out rows.jsonl

The revision is checked out beside, and its library built there or, where nothing that it is made of differs, copied.
Then one process for each runs the same seeded cases, `benchmarks.compare_cases`, in turn, round by round. A case is
slower if the 95 % interval of the ratio of medians lies above the margin. The exit status is 0; 1 if a case is slower;
2 if there is no answer; 3 if none is slower, but outputs differ by more than a thousandth; 130 if interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks import compare_cases
from benchmarks.harness import commit, machine, versions
from icseg.files import check_file, written_whole

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = Path("icseg_kernels") / "libicseg.so"
SOURCES = ("csrc", "setup.py")

LARGEST_DIFFERENCE = 1e-3
SECONDS_A_TIMING = 0.02
RESAMPLES = 4_000
LEVEL = 0.95


class Problem(Exception):
    """Why there is no answer, in one sentence."""


@dataclass(frozen=True)
class Ratio:
    """Of the median times, now over before, with the bounds of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """One case. What a revision lacks has no times; then `lacks` says what was raised.

    verdict:    "slower", "faster", "same", "unclear"; "new" or "gone" where one revision lacks the case.
    difference: of the outputs, relative to the largest value; infinite where shapes or NaNs differ.
    before, now: seconds of a call, one a round.
    """

    case: str
    verdict: str
    lacks: str = ""
    ratio: Ratio | None = None
    difference: float = 0.0
    repeats: int = 0
    before: tuple[float, ...] = ()
    now: tuple[float, ...] = ()

    @property
    def differs(self) -> bool:
        return not self.difference <= LARGEST_DIFFERENCE


class Side(Protocol):
    """A worker, or what stands for it."""

    def prepare(self, case: str) -> dict[str, Any]: ...

    def time(self, case: str, repeats: int) -> float: ...

    def outputs(self) -> list[NDArray[Any]]: ...


# Statistics


def ratio_of_medians(before: Sequence[float], now: Sequence[float]) -> Ratio:
    """With its percentile interval by the bootstrap, which draws rounds: both times of a round stay together."""
    a, b = np.asarray(before), np.asarray(now)
    drawn = np.random.default_rng(0).integers(0, len(a), (RESAMPLES, len(a)))
    ratios = np.median(b[drawn], 1) / np.median(a[drawn], 1)
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Ratio(float(np.median(b) / np.median(a)), float(low), float(high))


def verdict_of(ratio: Ratio, margin: float) -> str:
    """ "unclear" where the interval crosses the margin, on either side."""
    if ratio.low > margin:
        return "slower"
    if ratio.high < 1 / margin:
        return "faster"
    return "same" if 1 / margin <= ratio.low and ratio.high <= margin else "unclear"


def relative_difference(found: Sequence[NDArray[Any]], expected: Sequence[NDArray[Any]]) -> float:
    """Largest of the outputs, each relative to its largest finite value; infinite where shapes or NaNs differ."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    largest = 0.0
    for x, y in zip(found, expected, strict=True):
        a, b = x.astype(np.float64), y.astype(np.float64)
        unequal = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        if not unequal.any():
            continue
        gap = np.abs(a[unequal] - b[unequal]).max()
        scale = np.abs(b[np.isfinite(b)]).max(initial=0.0)
        largest = max(largest, float(gap / scale) if scale and np.isfinite(gap) else float("inf"))
    return largest


# Git and the build


def git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A finished command of git; of no other repository than that of `root`, also where a hook of one calls."""
    variables = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    command = ["git", "-C", str(root), "-c", "core.hooksPath=/dev/null", *arguments]
    try:
        return finished(command, env=variables)
    except FileNotFoundError:
        raise Problem("git must be on PATH, found none") from None


def finished(command: list[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    """As subprocess.run; but interrupted, it ends the command with all that this has started."""
    settings |= {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, start_new_session=True, **settings) as process:
        try:
            out, errors = process.communicate()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)


def commit_of(root: Path, revision: str) -> str:
    """The full hash that `revision` names."""
    inside = git(root, "rev-parse", "--show-toplevel")
    if inside.returncode or Path(inside.stdout.strip()).resolve() != root.resolve():
        raise Problem(f"{root} must be a git checkout, and is none")
    found = git(root, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if found.returncode:
        raise Problem(f"REV must name a commit of {root}, got {revision!r}")
    return found.stdout.strip()


def check_working_tree(root: Path) -> None:
    """Raise Problem if what would be timed is not the working tree: half merged, or with another library."""
    unmerged = git(root, "diff", "--name-only", "--diff-filter=U").stdout.split("\n")[0]
    if unmerged:
        raise Problem(f"the working tree must have no unresolved conflicts, got one in {unmerged}")
    library = root / LIBRARY
    if not library.exists():
        raise Problem(f"{library} must be built first (python setup.py build_ext --inplace), and is not there")
    sources = [root / "setup.py", root / "csrc" / "icseg.h", *(root / "csrc" / "cpu").rglob("*.*")]
    later = max((path for path in sources if path.exists()), key=lambda path: path.stat().st_mtime, default=library)
    if later.stat().st_mtime > library.stat().st_mtime:
        raise Problem(
            f"{library.name} must be newer than its sources, got a later {later.relative_to(root)} "
            "(python setup.py build_ext --inplace)"
        )


def has_same_sources(root: Path, revision: str) -> bool:
    """Whether nothing that a library is built of differs between the working tree and `revision`."""
    changed = git(root, "diff", "--no-ext-diff", "--quiet", revision, "--", *SOURCES).returncode
    return not changed and not git(root, "ls-files", "--others", "--exclude-standard", "--", *SOURCES).stdout


@contextlib.contextmanager
def checked_out(root: Path, revision: str, folder: Path) -> Iterator[Path]:
    """A worktree of `revision` in `folder`, whatever happens removed at the end."""
    tree = folder / f"icseg-{revision[:10]}"
    try:
        added = git(root, "worktree", "add", "--detach", str(tree), revision)
        if added.returncode:
            raise Problem(f"git could not check out {revision[:10]}: {last_line(added.stderr)}")
        yield tree
    finally:
        shutil.rmtree(tree, ignore_errors=True)
        # Twice: also one that git had locked for as long as it was made.
        git(root, "worktree", "remove", "--force", "--force", str(tree))


def provide_library(root: Path, tree: Path, revision: str) -> str:
    """Put the library of `revision` into its `tree`; how, in one word: "copied", "built" or "none"."""
    if has_same_sources(root, revision):
        for path in (root / LIBRARY).parent.glob("*.so"):
            shutil.copy2(path, tree / LIBRARY.parent)
        return "copied"
    if not (tree / "csrc").is_dir() or not (tree / "setup.py").exists():
        return "none"
    say(f"building the library of {revision[:10]}, which can take minutes")
    variables = {**os.environ, "ICSEG_REQUIRE_NATIVE": "1", "ICSEG_CUDA": "0"}
    done = finished([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=tree, env=variables)
    if done.returncode:
        raise Problem(f"the library of {revision[:10]} could not be built: {last_line(done.stderr)}")
    if not (tree / LIBRARY).exists():
        raise Problem(f"the build of {revision[:10]} must make {LIBRARY}, and did not")
    return "built"


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


# Workers


class Worker:
    """A process that runs the cases of this file's tree on the packages of `tree`."""

    def __init__(self, name: str, tree: Path, folder: Path, threads: int | None = None) -> None:
        self.name, self._saved, self._errors = name, folder / f"{name}.npz", folder / f"{name}.txt"
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(tree)}
        if threads is not None:
            variables["OMP_NUM_THREADS"] = str(threads)
        # -P: modules beside the cases are not imported in place of the revision's own.
        command = [sys.executable, "-P", str(Path(compare_cases.__file__).resolve())]
        with self._errors.open("w") as errors:
            # A session of its own: Ctrl-C reaches this process alone, which then ends its workers.
            self._process = subprocess.Popen(
                command,
                text=True,
                cwd=folder,
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._tree = tree.resolve()

    def started(self) -> dict[str, Any]:
        """What it says of itself, once it is ready. Raises Problem if its packages are not those of its tree."""
        about = self._read("started")
        if about["root"] not in (None, str(self._tree)):
            raise Problem(f"the worker of {self.name} must import from {self._tree}, and did so from {about['root']}")
        return about

    def prepare(self, case: str) -> dict[str, Any]:
        self._saved.unlink(missing_ok=True)
        return self._ask(do="prepare", case=case, outputs=str(self._saved))

    def time(self, case: str, repeats: int) -> float:
        return self._ask(do="time", case=case, repeats=repeats)["seconds"]

    def outputs(self) -> list[NDArray[Any]]:
        """Of the case that was prepared last."""
        with np.load(self._saved) as saved:
            return [saved[f"arr_{i}"] for i in range(len(saved.files))]

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                pipe.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self._requests, flush=True)
        reply = self._read(f"ran {request['case']!r}")
        if "error" in reply:
            raise Problem(f"{request['case']!r} failed in {self.name}: {reply['error']}")
        return reply

    def _read(self, doing: str) -> dict[str, Any]:
        line = self._replies.readline()
        if line:
            return json.loads(line)
        status, said = self._process.wait(), last_line(self._errors.read_text())
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        raise Problem(f"the worker of {self.name} {how} while it {doing}: {said}")


# Measuring


def measure(
    before: Side,
    now: Side,
    names: Sequence[str],
    *,
    rounds: int,
    margin: float,
    progress: Callable[[], object] = lambda: None,
) -> list[Result]:
    """One result a case. progress: called after each timing of a case, by both, `rounds` times for each name.

    Rounds are the outer loop, so that each case is spread over the whole time; who is first alternates.
    """
    found: dict[str, Result] = {}
    repeats: dict[str, int] = {}
    difference: dict[str, float] = {}
    for name in names:
        replies = before.prepare(name), now.prepare(name)
        lacks = [reply.get("lacks", "") for reply in replies]
        if all(lacks):
            raise Problem(f"either revision must have what {name!r} calls, got {lacks[1]}")
        if any(lacks):
            found[name] = Result(name, "new" if lacks[0] else "gone", "".join(lacks))
            continue
        repeats[name] = max(1, int(SECONDS_A_TIMING / max(max(reply["seconds"] for reply in replies), 1e-9)))
        difference[name] = relative_difference(now.outputs(), before.outputs())
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in repeats}
    for round_ in range(rounds):
        for i, (name, (of_before, of_now)) in enumerate(times.items()):
            pair = [(before, of_before), (now, of_now)]
            for side, seconds in pair if (round_ + i) % 2 == 0 else reversed(pair):
                seconds.append(side.time(name, repeats[name]))
            progress()
    for name, (of_before, of_now) in times.items():
        ratio = ratio_of_medians(of_before, of_now)
        verdict = verdict_of(ratio, margin)
        found[name] = Result(name, verdict, "", ratio, difference[name], repeats[name], tuple(of_before), tuple(of_now))
    return [found[name] for name in names]


def compared(
    root: Path,
    revision: str,
    names: Sequence[str],
    *,
    rounds: int,
    margin: float,
    threads: int | None = None,
) -> tuple[list[Result], int]:
    """The results, and the threads that were used."""
    check_working_tree(root)
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="icseg-compare-", ignore_cleanup_errors=True))
        )
        folder = folder.resolve()
        say(f"checking out {revision[:10]}")
        tree = stack.enter_context(checked_out(root, revision, folder))
        started = time.monotonic()
        say(f"library of {revision[:10]}: {provide_library(root, tree, revision)}, {time.monotonic() - started:.0f} s")
        before = Worker(revision[:10], tree, folder, threads)
        stack.callback(before.close)
        now = Worker("the working tree", root, folder, threads)
        stack.callback(now.close)
        about = before.started(), now.started()
        makers = [a["library"] for a in about]
        if all(makers) and makers[0] != makers[1]:
            say(f"the libraries have different builds, which may tell in the times: {makers[0]}; {makers[1]}")
        say(f"{len(names)} cases, {rounds} rounds, {about[1]['threads']} threads")
        with tqdm(total=rounds * len(names), unit="timing", file=sys.stderr, leave=False, disable=None) as bar:
            results = measure(before, now, names, rounds=rounds, margin=margin, progress=bar.update)
        return results, about[1]["threads"]


def say(message: str) -> None:
    print(f"compare: {message}", file=sys.stderr, flush=True)


# Reports


def table(results: Sequence[Result]) -> str:
    """Markdown, one line a case."""
    lines = ["| case | before | now | ratio | 95 % interval | verdict | outputs differ by |", "|---" * 7 + "|"]
    for r in results:
        cells = [r.case, "", "", "", "", r.verdict, ""]
        if r.ratio is not None:
            cells[1:3] = (milliseconds(statistics.median(seconds)) for seconds in (r.before, r.now))
            cells[3:5] = f"{r.ratio.value:.3f}", f"{r.ratio.low:.3f} to {r.ratio.high:.3f}"
            cells[6] = f"{r.difference:.1g}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def remarks(results: Sequence[Result], margin: float) -> list[str]:
    """One line for each case that is slower or differs, and for each that a revision lacks."""
    lines = []
    for r in results:
        if r.verdict == "slower" and r.ratio is not None:
            times = " to ".join(milliseconds(statistics.median(seconds)) for seconds in (r.before, r.now))
            interval = f"{r.ratio.low:.3f} to {r.ratio.high:.3f}, above {margin:g}"
            lines.append(f"slower: {r.case}: {r.ratio.value:.3f} times, from {times} (95 % interval {interval})")
        if r.differs:
            lines.append(f"differs: {r.case}: outputs by {r.difference:.1g}, above {LARGEST_DIFFERENCE:g}")
        if r.lacks:
            lines.append(f"{r.verdict}: {r.case}: {r.lacks}")
    return lines


def write_rows(path: Path, results: Sequence[Result], **of_all: Any) -> None:
    """One JSON line a case, null for an infinite difference; the file appears whole or not at all."""
    rows = [asdict(r) | of_all | {"difference": r.difference if np.isfinite(r.difference) else None} for r in results]
    with written_whole(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))


def parsed(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the names of the chosen cases."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", metavar="REV", help="what the working tree, changes included, is compared with")
    parser.add_argument("--only", metavar="NAME", default="", help="cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="the smallest case of each op, and of the model")
    parser.add_argument("--rounds", metavar="N", type=int, default=20, help="timings of each case by each (20)")
    parser.add_argument("--margin", type=float, default=1.25, help="the ratio above which a case is slower (1.25)")
    parser.add_argument("--threads", metavar="N", type=int, help="of each worker; else as torch chooses")
    parser.add_argument("--out", metavar="FILE", type=Path, help="rows of JSON, one a case, with all timings")
    given = parser.parse_args(arguments)
    names = [name for name in compare_cases.cases() if given.only in name]
    if given.quick:
        names = quick(names)
    if not names:
        parser.error(f"--only must be part of a case's name, got {given.only!r}")
    if given.rounds < 3:
        parser.error(f"--rounds must be at least 3, got {given.rounds}")
    if not given.margin >= 1:
        parser.error(f"--margin must be at least 1, got {given.margin:g}")
    if given.threads is not None and given.threads < 1:
        parser.error(f"--threads must be at least 1, got {given.threads}")
    return given, names


def quick(names: Sequence[str]) -> list[str]:
    """The first of those that begin and end with the same word: the smallest, of each op and kind of work."""
    first: dict[tuple[str, str], str] = {}
    for name in names:
        first.setdefault((name.split()[0], name.split()[-1]), name)
    return list(first.values())


@contextlib.contextmanager
def ended_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, so that nothing is left behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    given, names = parsed(arguments)
    try:
        with ended_as_interrupted():
            if given.out:
                check_file(given.out)
            revision = commit_of(root, given.revision)
            results, threads = compared(
                root, revision, names, rounds=given.rounds, margin=given.margin, threads=given.threads
            )
            if given.out:
                write_rows(
                    given.out, results, revision=revision, commit=commit(), threads=threads, margin=given.margin,
                    machine=machine(), versions=versions(),
                )  # fmt: skip
    except (Problem, OSError) as problem:
        say(str(problem))
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    print(table(results))
    for line in remarks(results, given.margin):
        print(line)
    if any(r.verdict == "slower" for r in results):
        return 1
    return 3 if any(r.differs for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
