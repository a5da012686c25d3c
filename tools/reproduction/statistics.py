"""What is computed from the lines of runs: rates, paired differences and their intervals, speed of learning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats  # type: ignore[import-untyped,import-not-found,unused-ignore]

from reproduction.records import Line

SUCCESS_IOU = 0.6
"""A run whose validation IoU is above this has trained."""
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """An estimate and the interval around it; without an end where there are too few values."""

    value: float
    low: float
    high: float


def validation_iou(line: Line) -> float:
    """Of the network that a run kept; 0 for one that diverged."""
    return float(line["validation"]["iou"]) if line.get("validation") else 0.0


def n_successes(lines: Sequence[Line]) -> int:
    """How many runs trained."""
    return sum(validation_iou(line) > SUCCESS_IOU for line in lines)


def rate(n_good: int, n: int) -> Interval:
    """A share with its Wilson score interval; raises ValueError for none of none."""
    low, high = stats.binomtest(n_good, n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(n_good / n, float(low), float(high))


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Mean of ours less theirs, pair by pair, with Student's t interval; raises ValueError for lengths that differ."""
    differences = np.subtract(ours, theirs, dtype=float)
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} and {len(theirs)} values make no pairs")
    mean, n = float(differences.mean()), len(differences)
    if n < 2:
        return Interval(mean, -math.inf, math.inf)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * differences.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half)


def paired(ours: Sequence[Line], theirs: Sequence[Line]) -> list[tuple[Line, Line]]:
    """Those runs of two rows that have the same seed."""
    by_seed = {line["seed"]: line for line in theirs}
    return [(line, by_seed[line["seed"]]) for line in ours if line["seed"] in by_seed]


def steps_to(line: Line, iou: float) -> float | None:
    """The step at which the validation IoU first reaches `iou`, interpolated between validations; None if never."""
    before = (0.0, 0.0)
    for step, reached, *_ in line.get("curves", {}).get("validation", ()):
        if reached >= iou:
            share = (iou - before[1]) / (reached - before[1])
            return float(before[0] + share * (step - before[0]))
        before = (step, reached)
    return None
