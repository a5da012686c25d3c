"""What a run writes down while it goes: metrics for people, and the report's two curves, which nothing reads before it ends."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdunet.measures import EXAMPLES_FILE, UNSEEN_FILE, UnseenLog

METRICS_FILE = "metrics.csv"
LOG_EVERY = 50
"""Steps between rows of the metrics file."""


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


class RunLogs:
    """All files that a run appends to; a context manager. Rows after `from_step` are dropped."""

    def __init__(self, out: Path, *, from_step: int) -> None:
        self.out = out
        self._open(from_step)

    def _open(self, from_step: int) -> None:
        self.metrics = Metrics(self.out / METRICS_FILE, from_step=from_step)
        self.examples = UnseenLog(self.out / EXAMPLES_FILE, from_step=from_step)
        self.unseen = UnseenLog(self.out / UNSEEN_FILE, from_step=from_step)
        self._waited, self._row_began = 0.0, time.monotonic()

    def add_step(self, step: int, measured: dict[str, float], cross_entropies: list[float], waited: float) -> None:
        """Keep what a step measured; `waited` seconds of it were for data."""
        self._waited += waited
        self.examples.add(step, *cross_entropies)
        if step % LOG_EVERY == 0:
            seconds = time.monotonic() - self._row_began
            self.metrics.add(step, {**measured, "data_wait": self._waited / seconds, "seconds": seconds})
            self._waited, self._row_began = 0.0, time.monotonic()

    def add_validation(self, step: int, validation: Mapping[str, float]) -> None:
        """Keep the figures of a validation."""
        self.metrics.add(step, dict(validation))
        self._waited, self._row_began = 0.0, time.monotonic()  # validation is not training time

    def sync(self) -> None:
        """Wait until the curves are on the disk, before a checkpoint that must not outlive them."""
        self.examples.sync()
        self.unseen.sync()

    def begin_again(self) -> None:
        """Drop all rows: the run starts over."""
        self.__exit__()
        self._open(from_step=0)

    def __enter__(self) -> RunLogs:
        return self

    def __exit__(self, *_: object) -> None:
        for log in (self.metrics, self.examples, self.unseen):
            log.close()
