"""The log of a run: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from icseg.files import written_whole

LOG_FILE = "log.jsonl"


def append_row(directory: Path, row: dict[str, Any]) -> None:
    """Add one row at the end."""
    with (directory / LOG_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """All whole rows; a last line that an interruption cut short is left out."""
    path = directory / LOG_FILE
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def rewind_log(directory: Path, step: int) -> None:
    """Drop the rows after `step`: a resumed run writes them again."""
    rows = [row for row in read_rows(directory) if row["step"] <= step]
    with written_whole(directory / LOG_FILE) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
