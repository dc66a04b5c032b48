"""Print a results file as Markdown tables: `python benchmarks/report.py benchmarks/results/FILE.jsonl [SUBJECT...]`."""

import json
import sys
from pathlib import Path
from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    """One line a case: the time (and GFLOPs where counted) of every rival, and the best rival's time over ours.

    Ours is the last of a row's rivals; those whose names start with "native" are ours too. Models have no ratio: they
    do not compute the same.
    """
    ours = list(dict.fromkeys(list(row["seconds"])[-1] for row in rows))
    others = dict.fromkeys(name for row in rows for name in row["seconds"] if name not in ours)
    names = [*others, *ours]
    columns = ["", "threads", *names]
    compared = rows[0]["subject"] != "model"
    copied = any(row["bytes"] for row in rows)
    columns += ["ratio"] * compared + ["share of a copy"] * copied
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [row["case"], str(row["threads"]), *(_cell(row, name) for name in names)]
        cells += [_ratio(row)] * compared + [_share_of_a_copy(row)] * copied
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], name: str) -> str:
    if name not in row["seconds"]:
        return ""
    seconds = row["seconds"][name]
    time = f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
    flops, memory = row["flops"].get(name), row.get("megabytes", {}).get(name)
    counted = "" if flops is None else f", {flops / 1e9:.4g} GFLOPs"
    return time + counted + ("" if memory is None else f", {memory:.0f} MB")


def _ratio(row: dict[str, Any]) -> str:
    *others, ours = row["seconds"]
    seconds = [row["seconds"][name] for name in others if not name.startswith("native")]
    return f"{min(seconds) / row['seconds'][ours]:.2g}" if seconds else ""


def _share_of_a_copy(row: dict[str, Any]) -> str:
    """The time a copy of as many bytes takes, at the bandwidth of large copies, over ours."""
    if not row["bytes"]:
        return ""
    *_, ours = row["seconds"].values()
    return f"{row['bytes'] / row['copy_bandwidth'] / ours:.2f}"


def main(path: str, *subjects: str) -> None:
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for subject, work in dict.fromkeys((row["subject"], row["work"]) for row in rows):
        if subjects and subject not in subjects:
            continue
        found = [row for row in rows if (row["subject"], row["work"]) == (subject, work)]
        latest = {(row["case"], row["threads"]): row for row in found}
        row = found[-1]
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        print(f"**{subject}**, {work}: medians of interleaved rounds; {row['machine']}; {versions}\n")
        print(table(list(latest.values())) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
