"""A page of Markdown and pictures from rows of results: is sparse cheaper, from which size on, and at what accuracy?

```
python -m benchmarks.report [RESULTS...] --out FOLDER              # rows of JSON lines; else benchmarks/results/*.jsonl
python -m benchmarks.report RESULTS... --tables [SUBJECT...]       # the tables alone, printed
```

Of rows that measure the same the last one counts. The pictures need matplotlib (`pip install 'icseg[train]'`).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks import equal_training
from benchmarks.report_pictures import draw_accuracy, draw_cost, draw_memory, draw_roofline, draw_speedup
from benchmarks.report_rows import (
    ACCURACY,
    COLD,
    DENSE,
    EVERYTHING,
    NO_OPS,
    OURS,
    PARTS,
    RESULTS,
    SIZES,
    SUPPORT,
    TRAINED_ALIKE,
    WITH_MEMORY,
    BadRowsError,
    Crossover,
    Point,
    Row,
    Scored,
    Series,
    crossover,
    gflops,
    is_dirty,
    megabytes,
    quotient,
    read_all,
    roofline_points,
    scored,
    seconds,
    series,
    speedup,
)
from icseg.files import written_whole

PAGE = "report.md"
NEXT_TO_NOTHING = 0.01  # of Dice
CONDITIONS = {COLD: "", WITH_MEMORY: "with the support set encoded before, "}
DIRTY = "†"
DIRTY_NOTE = f"{DIRTY} measured with changes that were not committed"


def answers(rows: Sequence[Row]) -> list[str]:
    """One each: how much cheaper, from which size on, at what cost in accuracy."""
    found = series(rows, SIZES)
    alike = [one for one in found if one.fixed == found[0].fixed]  # one a machine and number of threads
    return [
        f"**How much cheaper?** {_cheaper(found)}",
        f"**From which size on?** {_from_which_size(alike)}",
        f"**Does it cost accuracy?** {_accuracy(rows)}{_trained_alike(rows)}",
    ]


def _cheaper(found: Sequence[Series]) -> str:
    if not found:
        return f'Not answered: there is no row of whole models (subject "{SIZES}").'
    timed = [one for one in found if one.ratios(seconds, COLD)]
    if not timed:
        return f"Not answered: no row times {COLD} and a dense rival ({' or '.join(DENSE)}) at one size."
    parts = [
        f"{COLD} is so many times faster than each of the others; in brackets: with its own support set encoded "
        "before. No Dice belongs to these times: the others have random or borrowed weights."
    ]
    for one in timed:
        reasons = _left_out(one, DENSE)
        parts += [f"{one.fixed}; {one.place}{f'; left out: {reasons}' if reasons else ''}:", _faster(one)]
    return "\n\n".join(parts)


def _faster(one: Series) -> str:
    """Times faster at every size, a line a rival, the dense ones first."""
    rivals = [*DENSE, *(name for name in one.names if name not in (*DENSE, *OURS))]
    lines = []
    for rival in rivals:
        cells = []
        for row in one.rows.values():
            cold, kept = (quotient(row, seconds, rival, ours) for ours in OURS)
            cells.append((_factor(cold) if cold else "") + (f" ({_factor(kept)})" if kept else ""))
        if any(cells):
            lines.append([rival, *cells])
    return _markdown(["", *(f"{x} px" for x in one.rows)], lines)


def _left_out(one: Series, names: Iterable[str]) -> str:
    found = [
        (name, x, row["left_out"][name]) for name in names for x, row in one.rows.items() if name in row["left_out"]
    ]
    return ", ".join(f"{name} at {x} px ({reason})" for name, x, reason in found)


def _from_which_size(alike: Sequence[Series]) -> str:
    sentences = []
    for one in alike:
        found = {ours: crossover(one, ours) for ours in OURS}
        texts = [condition + _crossing(cross) for ours, condition in CONDITIONS.items() if (cross := found[ours])]
        if texts and found[COLD] == found[WITH_MEMORY]:
            texts = [f"{texts[0]}, the support set encoded before or not"]
        if texts:
            on = f"; on {one.place}" if len(alike) > 1 else ""
            sentences.append(f"By measured time {COLD} is faster than the best dense rival {'; '.join(texts)}{on}.")
    return " ".join(sentences) or "Not answered: that takes rows of whole models with a dense rival."


def _crossing(found: Crossover) -> str:
    measured = sorted([*found.cheaper, *found.slower])
    if not found.cheaper:
        return f"at no measured size ({_pixels(measured)})"
    if found.first is None:
        return f"at {_pixels(found.cheaper)} but not at {_pixels(found.slower)}, the largest size included"
    if not found.slower:
        more = "" if len(measured) > 1 else ", the only one"
        return f"from {found.first} px on, the smallest size measured{more} (where it crosses below is not measured)"
    also = [x for x in found.cheaper if x < max(found.slower)]
    notes = [f"slower at {_pixels(found.slower)}"]
    notes += [f"faster at {_pixels(also)}, too"] if also else []
    notes += [f"interpolated, not measured: {found.interpolated:.0f} px"] if found.interpolated else []
    return f"from {found.first} px on ({', '.join(notes)})"


def _accuracy(rows: Iterable[Row]) -> str:
    places = scored(rows)
    if not places:
        return f'Not answered: there is no row of accuracy (subject "{ACCURACY}").'
    machines_too = len({machine for _, _, machine, _ in places}) > 1
    lines, reasons = [], []
    for (size, support, machine, trained), models in places.items():
        where = f"{size} px, {support} pairs"
        where += f", {machine}" if machines_too else ""
        where += f", {trained} of training each" if trained else ""
        found = _losses(models)
        if isinstance(found, str):
            reasons.append(f"{where}: {found}.")
        lines += [] if isinstance(found, str) else [[where, *cells] for cells in found]
    lead = (
        "Mean Dice over classes of a reference (the sparse model with every patch, or a dense one) and of the sparse "
        f"model at its cheapest budget that is at most {NEXT_TO_NOTHING:g} below (or else at its best).\n\n"
    )
    columns = ["", "reference", "its Dice", "sparse", "its Dice", "sparse is lower in", "FLOPs, reference to sparse"]
    columns.append("time, reference to sparse")
    return "\n\n".join([*([lead + _markdown(columns, lines)] if lines else []), *reasons])


def _trained_alike(rows: Iterable[Row]) -> str:
    """On data sets of real images: synthetic tasks are what the models were trained on."""
    found = trained_alike(row for row in rows if row.get("dataset") != "synthetic").get(equal_training.DENSE)
    if not found:
        return ""
    *sets, d = found if len(found) > 1 else [*found, *found]
    return (
        f"\n\nOn all targets of {len(sets)} data sets after equal training, the sparse model's Dice is "
        f"{abs(d.mean):.3f} {'less' if d.mean < 0 else 'more'} than that of a dense UniverSeg in their mean "
        f"(95 % interval over targets {d.low:+.3f} to {d.high:+.3f}), less in {sum(s.mean < 0 for s in sets)} of them, "
        f"{min(s.mean for s in sets):+.3f} to {max(s.mean for s in sets):+.3f}. One training run each, which the "
        "interval leaves out."
    )


def trained_alike(rows: Iterable[Row]) -> dict[str, list[equal_training.Difference]]:
    """Of each rival: what the sparse model's Dice lies above its own, data set by data set, the mean last."""
    found = [
        equal_training.Row(**{name: value for name, value in row.items() if name != "subject"})
        for row in rows
        if row["subject"] == TRAINED_ALIKE
    ]
    rivals = dict.fromkeys(row.model for row in found if row.model != equal_training.OURS)
    return {rival: equal_training.paired_bootstrap(found, equal_training.OURS, rival) for rival in rivals}


def _losses(models: Sequence[Scored]) -> list[list[str]] | str:
    """Cells of a line for every reference, or why there is none."""
    if not models:
        return "no class is scored for every model"
    ours = [m for m in models if m.ours and not m.everything]
    dense = [m for m in models if m.dense]
    references = dense and [max(dense, key=lambda m: m.dice)]
    references += [m for m in models if m.ours and m.everything]
    if not ours:
        return "there is no row of a sparse model with a budget"
    if not references:
        return f'there is no row of a dense rival, nor of a sparse model that takes every patch (budget "{EVERYTHING}")'
    return [_loss(reference, ours) for reference in references]


def _loss(reference: Scored, ours: Sequence[Scored]) -> list[str]:
    """Of the cheapest budget that loses next to nothing, or else of the best one."""
    close = [m for m in ours if m.dice >= reference.dice - NEXT_TO_NOTHING]
    chosen = min(close, key=lambda m: m.gflops) if close else max(ours, key=lambda m: m.dice)
    lower = sum(chosen.of_class[c] < reference.of_class[c] for c in chosen.of_class)
    return [
        reference.name,
        f"{reference.dice:.3f}",
        chosen.name,
        f"{chosen.dice:.3f}",
        f"{lower} of {chosen.classes}",
        _times(reference.gflops / chosen.gflops),
        _times(reference.seconds / chosen.seconds),
    ]


def _factor(ratio: float) -> str:
    """To two digits, or all before the point."""
    return f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}"


def _times(ratio: float) -> str:
    return f"{_factor(ratio)} times"


def _and(words: Sequence[str]) -> str:
    return " and ".join(words)


def _pixels(sizes: Iterable[int]) -> str:
    *most, last = [str(x) for x in sorted(sizes)]
    return f"{', '.join(most)} and {last} px" if most else f"{last} px"


def table(rows: list[Row]) -> str:
    """One line a case: the time (and GFLOPs where counted) of every rival, and the best rival's time over ours.

    Ours is the last of a row's rivals. Models have no ratio: they do not compute the same.
    """
    compared = rows[0]["subject"] not in (SIZES, SUPPORT, PARTS)
    rivals = dict.fromkeys(name for row in rows for name in [*row["seconds"], *row["left_out"]])
    ours = list(dict.fromkeys(list(row["seconds"])[-1] for row in rows if row["seconds"]) if compared else OURS)
    names = [*(name for name in rivals if name not in ours), *(name for name in ours if name in rivals)]
    columns = ["", "threads", *names]
    copied = any(row["bytes"] for row in rows)
    columns += ["ratio"] * compared + ["share of a copy"] * copied
    lines = []
    for row in rows:
        cells = [row["case"] + f" {DIRTY}" * is_dirty(row), str(row["threads"]), *(_cell(row, name) for name in names)]
        ratio = speedup(row)
        cells += [f"{ratio:.2g}" if ratio else ""] * compared + [_share_of_a_copy(row)] * copied
        lines.append(cells)
    return _markdown(columns, lines) + f"\n\n{DIRTY_NOTE}" * any(map(is_dirty, rows))


def _markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    made = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join([*made, *("| " + " | ".join(cells) + " |" for cells in lines)])


def _cell(row: Row, name: str) -> str:
    if name not in row["seconds"]:
        return f"left out: {row['left_out'][name]}" if name in row["left_out"] else ""
    time = _time(row["seconds"][name])
    flops, memory = row["flops"].get(name), row["megabytes"].get(name)
    counted = "" if flops is None else f", {flops / 1e9:.4g} GFLOPs"
    return time + counted + ("" if memory is None else f", {memory:.0f} MB")


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _share_of_a_copy(row: Row) -> str:
    """The time a copy of as many bytes takes, at the bandwidth of large copies, over ours."""
    if not row["bytes"] or not row["copy_bandwidth"] or not row["seconds"]:
        return ""
    *_, ours = row["seconds"].values()
    return f"{row['bytes'] / row['copy_bandwidth'] / ours:.2f}"


def summary_table(rows: Iterable[Row]) -> str:
    """One line an op and kind of work: how many times faster than the best rival, over the latest row of each case."""
    latest = {(r["subject"], r["work"], r["machine"], r["case"], r["threads"]): r for r in rows}
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for (subject, work, machine, *_), row in latest.items():
        if ratio := speedup(row):
            ratios.setdefault((subject, work, machine), []).append(ratio)
    machines = {machine for _, _, machine in ratios}
    lines = [
        [subject, work, *([machine] * (len(machines) > 1)), str(len(of)), f"{min(of):.2g}", f"{median(of):.2g}",
         f"{max(of):.2g}"]
        for (subject, work, machine), of in ratios.items()
    ]  # fmt: skip
    return _markdown(["", "work", *["machine"] * (len(machines) > 1), "cases", "least", "median", "most"], lines)


def tables(rows: Sequence[Row], subjects: Sequence[str] = ()) -> str:
    """Of all subjects that are timed, or of some; one a subject, work and machine."""
    timed = [row for row in rows if row["subject"] not in (ACCURACY, TRAINED_ALIKE)]
    unknown = [subject for subject in subjects if subject not in {row["subject"] for row in timed}]
    if unknown:
        raise BadRowsError(f"subjects must be of the rows, got {unknown[0]!r}, of which there is none")
    groups: dict[tuple[str, str, str], dict[tuple[str, int], Row]] = {}
    for row in timed:
        if not subjects or row["subject"] in subjects:
            key = row["subject"], row["work"], row["machine"]
            groups.setdefault(key, {})[row["case"], row["threads"]] = row
    return "\n".join(
        f"**{subject}**, {work}: medians of interleaved rounds; {machine}; {_versions(latest.values())}\n\n"
        f"{table(list(latest.values()))}\n"
        for (subject, work, machine), latest in groups.items()
    )


def _versions(rows: Iterable[Row]) -> str:
    return "; ".join(dict.fromkeys(", ".join(f"{n} {v}" for n, v in row["versions"].items()) for row in rows))


def speedup_table(one: Series) -> str:
    """FLOP ratio, the bound that FLOPs alone give, and measured speed-up, of each dense rival to ours."""
    lines = []
    for x, row in one.rows.items():
        for rival in DENSE:
            cells = [f"{x} px" + f" {DIRTY}" * is_dirty(row), rival]
            for ours in OURS:
                bound, measured = quotient(row, gflops, rival, ours), quotient(row, seconds, rival, ours)
                share = f"{measured / bound:.2f}" if bound and measured else ""
                cells += [_times(bound) if bound else "", _times(measured) if measured else "", share]
            if any(cells[2:]):
                lines.append(cells)
    heads = ["FLOP ratio", "speed-up", "speed-up over FLOP ratio"]
    return _markdown(["", "dense rival", *heads, *(f"{head}, support encoded before" for head in heads)], lines)


def accuracy_table(models: Iterable[Scored]) -> str:
    return _markdown(
        ["model", "budget", "Dice", "GFLOPs", "time"],
        [
            [m.model + f" {DIRTY}" * m.dirty, m.budget, f"{m.dice:.3f}", f"{m.gflops:.4g}", _time(m.seconds)]
            for m in models
        ],
    )


def roofline_table(points: Iterable[Point]) -> str:
    lines = []
    for point in points:
        row, roof = point.row, point.roof
        kind = "arithmetic" if row["matrix_rate"] and roof == row["matrix_rate"] else "memory"
        share = f"{point.rate / roof:.2f}, {kind}" if roof < math.inf else ""
        name = f"{row['subject']}, {row['case']}" + f" {DIRTY}" * is_dirty(row)
        lines.append(
            [name, row["work"], str(row["threads"]), f"{point.intensity:.3g}", f"{point.rate / 1e9:.3g}", share]
        )
    return _markdown(["", "work", "threads", "FLOPs a byte", "GFLOP/s", "share of the roof"], lines)


def machines(rows: Iterable[Row]) -> list[str]:
    """One line a machine and set of versions: what the rows say, no more."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["subject"] != TRAINED_ALIKE:
            groups.setdefault((row["machine"], _versions([row])), []).append(row)
    lines = []
    for (machine, versions), found in groups.items():
        threads = sorted({row["threads"] for row in found if "threads" in row})
        parts = [machine, f"threads {', '.join(map(str, threads))}"] if threads else [machine]
        commits = dict.fromkeys(row["commit"] + f" {DIRTY}" * is_dirty(row) for row in found)
        lines.append("; ".join([*parts, versions, f"commits {', '.join(commits)}"]))
    return lines


def write_report(rows: Sequence[Row], folder: Path) -> Path:
    """The page and its pictures into a folder, each written whole, the page last; returns its path."""
    text, pictures = page(rows)
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures.items():
        draw(path=folder / name)
    with written_whole(folder / PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return folder / PAGE


def page(rows: Sequence[Row]) -> tuple[str, dict[str, Callable[..., None]]]:
    """Its text, and what draws each picture to a path."""
    pictures: dict[str, Callable[..., None]] = {}
    by_size, by_support = series(rows, SIZES), series(rows, SUPPORT)
    places, points = scored(rows), roofline_points(rows)
    parts = ["# Sparse against dense, measured", *answers(rows), *machines(rows)]
    dirty = any(is_dirty(row) for row in rows if row["subject"] != TRAINED_ALIKE)
    parts.append("Rows bear no date; the commit says which code was measured." + f" {DIRTY_NOTE}." * dirty)

    parts.append("## FLOPs and latency against size")
    if by_size:
        pictures["size.png"] = partial(draw_cost, by_size[0], xlabel="size in pixels", crossovers=True)
        parts.append("![FLOPs and latency of every rival against image size](size.png)")
        parts += [f"{_source(one)}\n\n{table(list(one.rows.values()))}" for one in by_size]
    else:
        parts.append(_none(SIZES))

    parts.append("## The bound that FLOPs give, and the speed-up measured")
    if by_size and any(by_size[0].ratios(seconds, ours) for ours in OURS):
        pictures["speedup.png"] = partial(draw_speedup, by_size[0])
        parts += [
            "The FLOP ratio is the speed-up if both ran at the same FLOP/s; what is lost of it is memory traffic and "
            "the cost of small operations.",
            "![FLOP ratio and measured speed-up against image size](speedup.png)",
            speedup_table(by_size[0]),
        ]
    else:
        parts.append("There is no row of whole models with a dense rival.")

    parts.append("## Support size")
    if by_support:
        pictures["support.png"] = partial(draw_cost, by_support[0], xlabel="support pairs", crossovers=False)
        parts.append("![FLOPs and latency of every rival against the number of support pairs](support.png)")
        parts += [f"{_source(one)}\n\n{table(list(one.rows.values()))}" for one in by_support]
    else:
        parts.append(_none(SUPPORT))

    parts.append("## Dice against cost")
    if any(places.values()):
        pictures["accuracy.png"] = partial(draw_accuracy, places)
        parts.append("![Dice against GFLOPs and against latency](accuracy.png)")
        parts += [
            f"{size} px, {support} support pairs{f', after {trained} of training each' if trained else ''}, mean over "
            f"{models[0].classes} that all are scored on; cost of the target alone; {machine}.\n\n"
            f"{accuracy_table(models)}"
            for (size, support, machine, trained), models in places.items()
            if models
        ]
    else:
        parts.append(_none(ACCURACY) if not places else "No class is scored for every model.")

    if alike := trained_alike(rows):
        parts.append("## Dice after equal training")
        parts.append(
            "Each model was trained on synthetic tasks for the steps that the same time on one idle core allows, and "
            "scored on held-out ones and real images; docs/sparse.md has the time, and the size at which each sees "
            "them. 95 % intervals of a paired bootstrap over targets, which do not cover another training run."
        )
        lines = [
            [same[0].dataset, *(f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" for d in same)]
            for same in zip(*alike.values(), strict=True)
        ]
        parts.append(_markdown(["data set", *(f"{equal_training.OURS} minus {rival}" for rival in alike)], lines))

    parts.append("## Roofline of the ops")
    if points:
        pictures["roofline.png"] = partial(draw_roofline, points)
        parts.append("![FLOP/s of the ops against FLOPs a byte, with the roofs of the machine](roofline.png)")
        if not all(point.row["matrix_rate"] for point in points):
            parts.append("Where the rate of a large matrix product was not measured, memory is the only roof.")
        parts.append(f"<details><summary>Every case</summary>\n\n{roofline_table(points)}\n\n</details>")
    else:
        parts.append("There is no row of an op with both FLOPs and bytes counted.")

    parts.append("## Peak memory")
    if by_size and any(by_size[0].values(megabytes, name) for name in by_size[0].names):
        pictures["memory.png"] = partial(draw_memory, by_size[0])
        parts.append("The most that one call holds beyond the model and its inputs.")
        parts.append("![Peak memory of every rival against image size](memory.png)")
    else:
        parts.append("There is no row of whole models with peak memory.")

    parts.append("## Every op")
    ops = [row for row in rows if row["subject"] not in NO_OPS]
    if ops:
        parts.append(f"How many times faster than the best rival, over the cases:\n\n{summary_table(ops)}")
        parts.append(
            "<details><summary>Every case</summary>\n\n*ratio*: the best rival's time over ours, which stands last; "
            "*share of a copy*: the time that a large copy takes for the bytes of inputs and outputs over ours.\n\n"
            f"{tables(ops).rstrip()}\n\n</details>"
        )
    else:
        parts.append("There is no row of an op.")
    return "\n\n".join(parts) + "\n", pictures


def _none(subject: str) -> str:
    return f'There is no row of the subject "{subject}".'


def _source(one: Series) -> str:
    """What a series is of."""
    rows = one.rows.values()
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    return f"{one.fixed}; {one.place}; {_versions(rows)}; commits {commits}."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, help="files of JSON lines; else benchmarks/results/*.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "report", help="folder of the page and its pictures")
    parser.add_argument(
        "--tables", nargs="*", metavar="SUBJECT", help="print the tables, of some subjects, and no more"
    )
    given = parser.parse_args(arguments)
    try:
        rows = read_all(given.results)
        if given.tables is not None:
            print(tables(rows, given.tables))
        else:
            print(write_report(rows, given.out))
    except (BadRowsError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"report: {error}")


if __name__ == "__main__":
    main()
