"""What a run writes down while it goes: rows of (step, name, value) as CSV, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


class Metrics:
    """Rows of (step, name, value) appended to a CSV file; those after `from_step` in an existing one are dropped."""

    def __init__(self, path: Path, *, from_step: int) -> None:
        rows = rows_until(path, from_step)  # a stopped run may have logged steps that its checkpoint does not hold
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerows([("step", "name", "value"), *rows])
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board: Any = SummaryWriter(path.parent / "tensorboard", purge_step=from_step)
        except ModuleNotFoundError:
            self._board = None

    def add(self, step: int, values: dict[str, float]) -> None:
        """Append one row a value; on disk when it returns."""
        for name, value in values.items():
            self._writer.writerow((step, name, f"{value:.6g}"))
            if self._board is not None:
                self._board.add_scalar(name, value, step)
        self._file.flush()

    def close(self) -> None:
        """Nothing can be added after."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def rows_until(path: Path, step: int) -> list[list[str]]:
    """The rows of a CSV file whose first column is a step up to `step`; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= step]
