"""The log of a run: train.csv and validation.csv in its folder, and TensorBoard's event files if they are asked for."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from icseg.files import written_whole

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TRAIN_FILE = "train.csv"
VALIDATION_FILE = "validation.csv"
EVENTS_FOLDER = "tensorboard"

Row = dict[str, float]


class Table:
    """A CSV file of numbers with a header and a column `step`, to which rows are added; a missing number is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns = list(dict.fromkeys(name for row in self.rows() for name in row))

    def rows(self) -> list[Row]:
        """All whole rows; a last line that an interruption cut short is left out. Empty without a file.

        Raises ValueError if the file is no such table.
        """
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        lines = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
        try:
            rows = [{name: _number(value) for name, value in line.items() if value} for line in lines]
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.path} must be a table of numbers, got another file ({error})") from error
        if not all("step" in row for row in rows):
            raise ValueError(f"{self.path} must have a step in every row, got rows without one")
        return rows

    def append(self, row: Row) -> None:
        """Add a row; a name that is new becomes a further column."""
        new = [name for name in row if name not in self._columns]
        if new:
            self._columns += new
            self._write(self.rows())
        with self.path.open("a", encoding="utf-8", newline="") as file:
            self._writer(file).writerow(row)

    def rewind(self, step: int) -> None:
        """Drop the rows after `step`: a resumed run writes them again."""
        if self.path.exists():
            self._write([row for row in self.rows() if row["step"] <= step])

    def _write(self, rows: list[Row]) -> None:
        with written_whole(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(rows)

    def _writer(self, file: object) -> csv.DictWriter[str]:
        return csv.DictWriter(file, self._columns, lineterminator="\n")  # type: ignore[arg-type]


class Log:
    """Both tables of a run, and the event files.

    step: what the run goes on from; validated_at: the step of the last validation that it remembers. What a run that
    was killed has logged after them is dropped.
    """

    def __init__(self, directory: Path, step: int, validated_at: int, tensorboard: bool) -> None:
        self._training, self._validation = Table(directory / TRAIN_FILE), Table(directory / VALIDATION_FILE)
        self._training.rewind(step)
        self._validation.rewind(validated_at)
        self._events = _event_writer(directory / EVENTS_FOLDER, step) if tensorboard else None

    def training(self, row: Row) -> None:
        self._training.append(row)
        self._add_events("train", row)

    def validation(self, row: Row) -> None:
        self._validation.append(row)
        self._add_events("validation", row)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def _add_events(self, group: str, row: Row) -> None:
        if self._events is None:
            return
        for name, value in row.items():
            if name != "step":
                self._events.add_scalar(f"{group}/{name}", value, int(row["step"]))


def check_tensorboard() -> None:
    """Raise ModuleNotFoundError, in one sentence, where event files cannot be written."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "[run] tensorboard must be false without the package tensorboard, which pip install 'icseg[train]' brings, "
            "got true"
        ) from error


def _event_writer(directory: Path, step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory), purge_step=step + 1)


def _number(text: str) -> float:
    number = float(text)
    return int(number) if text.isdecimal() else number
