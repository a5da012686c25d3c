"""Tables that compare rows: how often training succeeds with what, and what a teacher is worth at equal steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from reproduction.experiments import FINAL_OURS, VERSUS_WIDTHS, WITHOUT, bn_label, versus_label, versus_steps
from reproduction.records import Line
from reproduction.setting import Setting
from reproduction.statistics import Interval, n_successes, paired, paired_difference, rate, steps_to, validation_iou

Rows = Mapping[str, Sequence[Line]]
TARGET_IOU = 0.70
SOMETIMES, CONSISTENT = "3 of 10 (its text), 4 of 10 (its table 4)", '"consistent results"'
BN_CASES = {
    "neither": ("none", "none"),
    "class weights (sqrt)": ("none", "sqrt"),
    "batch normalisation (both paths)": ("both", "none"),
    "both": ("both", "sqrt"),
}
"""Of the 2-Unet: what it is trained with -> batch_norm and class_weights."""


def success_rates(found: Rows, cases: Mapping[str, str], reported: Mapping[str, str]) -> Iterator[str]:
    """How often the 2-Unet trains in each case: cases and what the report says of them by name, labels of rows by case."""
    yield "| 2-Unet | trained | 95 % interval | report |"
    yield "|---|---|---|---|"
    for case, label in cases.items():
        if runs := found.get(label):
            _, low, high = rate(n_successes(runs), len(runs))
            yield f"| {case} | {n_successes(runs)} of {len(runs)} | {low:.0%} to {high:.0%} | {reported.get(case, '-')} |"
    yield ""


def recipe_rates(found: Rows) -> Iterator[str]:
    """With our recipe, and with parts of it left out."""
    cases = {f"our recipe{missing}": f"{FINAL_OURS}{missing}" for missing in WITHOUT}
    yield from success_rates(found, cases, dict(zip(cases, (CONSISTENT, "-", "-", SOMETIMES), strict=True)))


def bn_rates(found: Rows) -> Iterator[str]:
    """In the report's setting, with and without batch normalisation and class weights."""
    cases = {f"the report's setting, {case}": bn_label(2, *how) for case, how in BN_CASES.items()}
    yield from success_rates(found, cases, dict(zip(cases, (SOMETIMES, "-", "-", CONSISTENT), strict=True)))


def versus_tables(found: Rows, setting: Setting) -> Iterator[str]:
    """Distilled less labels alone, paired by seed, and the steps until the validation IoU reaches the target."""
    yield "| distilled less labels alone, 95 % interval | pairs | validation IoU | test IoU |"
    yield "|---|---|---|---|"
    yield from _differences(found, setting)
    yield ""
    steps = f"steps to a validation IoU of {TARGET_IOU:.2f}"
    yield f"| {steps} | distilled | labels alone | times faster, where both reach it (report: 15 to 20) |"
    yield "|---|---|---|---|"
    yield from _speeds(found, setting)
    yield ""


def versus_pairs(found: Rows, width: int, steps: int) -> list[tuple[Line, Line]]:
    """(distilled, labels alone) of the seeds that have both."""
    return paired(*(found.get(versus_label(width, steps, method), ()) for method in ("mixed", "vanilla")))


def _differences(found: Rows, setting: Setting) -> Iterator[str]:
    for width in VERSUS_WIDTHS:
        for steps in versus_steps(setting):
            if pairs := versus_pairs(found, width, steps):
                tests = [pair for pair in pairs if all(line.get("test") for line in pair)]
                of_validation = paired_difference(*zip(*[map(validation_iou, pair) for pair in pairs], strict=True))
                cells = [difference_text(of_validation), "-"]
                if tests:
                    scores = [[line["test"]["iou"] for line in pair] for pair in tests]
                    cells[1] = difference_text(paired_difference(*zip(*scores, strict=True)))
                yield f"| {width}-Unet, {steps:,} steps | {len(pairs)} | {' | '.join(cells)} |"


def _speeds(found: Rows, setting: Setting) -> Iterator[str]:
    for width in VERSUS_WIDTHS:
        for steps in versus_steps(setting):
            if pairs := versus_pairs(found, width, steps):
                reached = [[steps_to(line, TARGET_IOU) for line in column] for column in zip(*pairs, strict=True)]
                ratios = [b / a for a, b in zip(*reached, strict=True) if a and b]
                ratio = f"{np.mean(ratios):.2f}" if ratios else "-"
                yield f"| {width}-Unet, {steps:,} steps | {' | '.join(map(_reached_text, reached))} | {ratio} |"


def difference_text(difference: Interval) -> str:
    """`+0.012 (-0.003 to +0.027)`; without the interval where one pair gives none."""
    value, low, high = difference
    return f"{value:+.3f}" if math.isinf(low) else f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def _reached_text(reached: Sequence[float | None]) -> str:
    known = [steps for steps in reached if steps is not None]
    if not known:
        return f"none of {len(reached)}"
    return f"{np.mean(known):,.0f}" + ("" if len(known) == len(reached) else f" ({len(known)} of {len(reached)})")
