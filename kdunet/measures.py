"""The EPFL report's measures, beside the honest protocol: the best mean of consecutive losses in training and on the test set.

Mangalam & Salzmann 2018, section 2.3. Its losses are sums over an image's pixels; ours are means over them, in nats. The
minimum over a test curve picks the moment to stop on the test set, which flatters: compare it with the report's alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np

from kdunet.checkpoint import write_whole
from kdunet_infer.errors import ConfigError, TrainingError

EXAMPLES_FILE = "examples.csv"
"""Cross-entropy of each training crop, in the order seen."""
UNSEEN_FILE = "unseen.csv"
"""Cross-entropy of the test set, a row an evaluation."""
RESULT_FILE = "result.json"
"""Lies in a run's folder once the run has ended."""

_HEADER = "step,cross_entropy\n"
_ROW = re.compile(r"(\d+),(\S+)\n")  # a row that a power cut has shortened lacks its newline
_REPORT_STEPS = 300_000


@dataclass(frozen=True, slots=True)
class MeasureWindows:
    """Over how much the report's measures average; its own values are the defaults. Raises ConfigError for values below 1."""

    alpha_t: int = 5000
    """Consecutive training examples."""
    beta_t: int = 25
    """Consecutive evaluations of the test set."""
    n_t: int = 500
    """Steps between evaluations."""

    def __post_init__(self) -> None:
        for name in ("alpha_t", "beta_t", "n_t"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; the report's measures need windows of at least 1.")

    @classmethod
    def scaled(cls, steps: int, batch: int, *, every: int | None = None) -> MeasureWindows:
        """The same shares of a run of `steps` steps of `batch` crops as the report's values are of its 300,000 iterations.

        The report's batch is unknown and taken as 1, so that alpha_t is 1/60 of all examples. n_t is 1/600 of the steps, or
        `every`; beta_t evaluations span 1/24 of the steps. Each is rounded, and at least 1.
        """
        n_t = max(1, round(steps / 600)) if every is None else every
        return cls(max(1, round(steps * batch / 60)), max(1, round(steps / 24 / max(1, n_t))), n_t)

    def __str__(self) -> str:
        return (
            f"training loss: the best mean of {self.alpha_t} consecutive examples; "
            f"test loss: the best mean of {self.beta_t} consecutive evaluations, one every {self.n_t} steps"
        )


@dataclass(frozen=True, slots=True)
class ReportLosses:
    """The report's two losses of a run, in nats a pixel, and the steps where their windows begin."""

    train_loss: float
    train_at_step: int
    test_loss: float
    test_at_step: int


def best_window(values: Sequence[float], length: int, *, name: str = "the record") -> tuple[float, int]:
    """The smallest mean of `length` consecutive values, and the index where that window begins: the first such window.

    The report sums k to k + length, one value more than it divides by; this sums `length`. Raises TrainingError where there are
    fewer values than `length`, or one of them is not finite.
    """
    if not 1 <= length <= len(values):
        raise TrainingError(f"{name} holds {len(values)} values, no window of {length}; give a window that fits the run.")
    record = np.asarray(values, np.float64)
    if not np.isfinite(record).all():
        raise TrainingError(f"{name} holds a value that is not finite; train again at a lower learning rate.")
    means = np.lib.stride_tricks.sliding_window_view(record, length).mean(axis=1)
    begin = int(means.argmin())
    return float(means[begin]), begin


def report_losses(run_folder: Path, windows: MeasureWindows) -> ReportLosses:
    """L*_train and L*_test of a run that has ended, from its two logs; of the test curve the evaluations at multiples of n_t.

    Raises TrainingError where the run has not ended, a log is missing or damaged, or a window is longer than its log.
    """
    train = _best_of(run_folder / EXAMPLES_FILE, windows.alpha_t)
    return ReportLosses(*train, *_best_of(run_folder / UNSEEN_FILE, windows.beta_t, every=windows.n_t))


class UnseenLog:
    """A CSV file (step, cross_entropy) that a run only appends to: nothing in it can steer the training.

    A resumed run gives its checkpoint's step as `from_step`: later rows, which will come again, are dropped, and the file ends
    as if the run had never stopped. A new run gives 0.
    """

    def __init__(self, path: Path, *, from_step: int) -> None:
        kept = takewhile(lambda line: (row := _ROW.fullmatch(line)) and int(row[1]) <= from_step, _lines(path)[1:])
        write_whole(path, (_HEADER + "".join(kept)).encode())
        self._file = path.open("a", encoding="ascii", newline="\n")

    def add(self, step: int, *cross_entropies: float) -> None:
        """Append a row a value, in nats; with the system when it returns, so that a killed process loses none."""
        self._file.writelines(f"{step},{float(value)!r}\n" for value in cross_entropies)
        self._file.flush()

    def sync(self) -> None:
        """Wait until all rows are on the disk: before each checkpoint, which must not outlive them in a power cut."""
        os.fsync(self._file.fileno())

    @staticmethod
    def read(path: Path) -> list[tuple[int, float]]:
        """All rows (step, cross-entropy); TrainingError where the run has not ended, or the log is missing or damaged."""
        if not (path.parent / RESULT_FILE).exists():
            raise TrainingError(
                f"the run in {path.parent} has not ended, and nothing reads {path.name} before; finish the run."
            )
        if not path.exists():
            raise TrainingError(f"there is no log {path}; train again with a test set to log (unseen.images).")
        return [_parsed(path, number, line) for number, line in enumerate(_lines(path)[1:], start=2)]

    def close(self) -> None:
        """Nothing can be added after."""
        self._file.close()


def _best_of(path: Path, length: int, *, every: int = 1) -> tuple[float, int]:
    rows = [(step, value) for step, value in UnseenLog.read(path) if step % every == 0]
    loss, k = best_window([value for _, value in rows], length, name=str(path))
    return loss, rows[k][0]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []


def _parsed(path: Path, number: int, line: str) -> tuple[int, float]:
    try:
        step, value = line.removesuffix("\n").split(",")
        return int(step), float(value)
    except ValueError as exc:
        raise TrainingError(f"line {number} of {path} is {line!r}, not a step and a cross-entropy; train again.") from exc
