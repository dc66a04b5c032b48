"""What an interrupted evaluation has scored so far: a file a class, which `--resume` takes up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from icseg.evaluation.scoring import ClassScores, TargetScores, Unit
from icseg.files import written_whole

FOLDER = "scores.parts"


class Parts:
    """The parts in a folder of results, of evaluations with the same `settings` (plain data)."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.folder = out / FOLDER
        self.settings = json.loads(json.dumps(settings))  # as it reads back: lists for tuples

    def check(self) -> None:
        """Raise ValueError if there is a part of other settings, or a damaged one."""
        for path in self._paths():
            found = _read(path)["settings"]
            names = found.keys() | self.settings.keys()
            other = sorted(name for name in names if found.get(name) != self.settings.get(name))
            if other:
                raise ValueError(
                    f"resume needs the settings of the run in {self.folder.parent}, got another {', '.join(other)}"
                )

    def clear(self) -> None:
        for path in self._paths():
            path.unlink()

    def read(self, unit: Unit) -> list[ClassScores] | None:
        """The scores of the unit; None if there are none of its present content."""
        path = self._path(unit)
        if not path.is_file():
            return None
        part = _read(path)
        return part["scores"] if part["content"] == unit.content else None

    def write(self, unit: Unit, scores: Sequence[ClassScores]) -> None:
        path = self._path(unit)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "settings": self.settings,
            "content": unit.content,
            "scores": [dataclasses.asdict(one) for one in scores],
        }
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("*/*.json"))

    def _path(self, unit: Unit) -> Path:
        return self.folder / unit.dataset / f"{file_name(unit.name)}.json"


def file_name(class_name: str) -> str:
    """A name for files, another for each class; it has no ending."""
    return quote(class_name, safe=" ()=,").replace(".", "%2E")


def _read(path: Path) -> dict[str, Any]:
    try:
        part = json.loads(path.read_text(encoding="utf-8"))
        scores = [
            ClassScores(one["dataset"], one["class_name"], tuple(_target(target) for target in one["targets"]))
            for one in part["scores"]
        ]
        return {"settings": dict(part["settings"]), "content": str(part["content"]), "scores": scores}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a part of an earlier evaluation, got a damaged file") from error


def _target(values: dict[str, Any]) -> TargetScores:
    return TargetScores(**{**values, "supports": tuple(tuple(drawn) for drawn in values["supports"])})
