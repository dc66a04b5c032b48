"""Print a results file as Markdown tables: `python benchmarks/report.py benchmarks/results/FILE.jsonl`."""

import json
import sys
from pathlib import Path
from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    """One line a case, milliseconds (and GFLOPs where counted) of every rival."""
    names = list(rows[0]["seconds"])
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += ["| " + " | ".join([row["case"], *(_cell(row, name) for name in names)]) + " |" for row in rows]
    return "\n".join(lines)


def _cell(row: dict[str, Any], name: str) -> str:
    seconds = row["seconds"][name]
    time = f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
    flops = row["flops"].get(name)
    return time if flops is None else f"{time}, {flops / 1e9:.4g} GFLOPs"


def main(path: str) -> None:
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for subject in dict.fromkeys(row["subject"] for row in rows):
        latest = {row["case"]: row for row in rows if row["subject"] == subject}
        row = next(iter(latest.values()))
        versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
        print(f"**{subject}**: medians of {row['rounds']} interleaved rounds; {row['machine']}; {versions}\n")
        print(table(list(latest.values())) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
