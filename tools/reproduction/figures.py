"""The figures of docs/reproduction.md, drawn from the lines of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reproduction.comparisons import BN_CASES, TARGET_IOU, versus_pairs
from reproduction.experiments import FINAL_OURS, INITS, VERSUS_WIDTHS, WITHOUT, bn_label, versus_label, versus_steps
from reproduction.records import Line
from reproduction.sections import by_row, own_lines
from reproduction.setting import Setting
from reproduction.statistics import SUCCESS_IOU, n_successes, rate

Rows = Mapping[str, Sequence[Line]]
OURS, LABELS, REPORT = "tab:blue", "tab:orange", "0.35"
PARAMETERS = {
    128: 124_107_522,
    64: 31_030_658,
    32: 7_759_554,
    16: 1_940_834,
    8: 485_682,
    4: 121_658,
    2: 30_534,
    1: 7694,
}
"""Of the k-Unet without batch normalisation, as in the report's table 1."""
REPORT_TEST_LOSS = {128: 0.1170, 64: 0.1021, 32: 0.0871, 16: 0.0822, 8: 0.0830, 4: 0.0974, 2: 0.8227, 1: 0.8337}
REPORT_IOU = {31_042_434: (0.804, "64-Unet"), 30_902: (0.759, "2-Unet, mixed")}


def write_figures(lines: Sequence[Line], setting: Setting, folder: Path) -> list[Path]:
    """Draw every figure that there are lines for, as PNG; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = ("table1", "table4", "bn", "final", "versus")
    found = {name: by_row(own_lines(name, lines, setting)) for name in names}
    figures: dict[str, Callable[[Any], Any]] = {}
    if found["bn"]:
        figures["learning-curves"] = lambda plt: _learning_curves(plt, found["bn"])
    if found["bn"] or found["table4"] or found["final"]:
        figures["success"] = lambda plt: _success(plt, found)
    if found["table1"] or found["final"]:
        figures["parameters"] = lambda plt: _parameters(plt, found, setting)
    if found["versus"]:
        figures["versus"] = lambda plt: _versus(plt, found["versus"], setting)
    paths = []
    for name, draw in figures.items():
        figure = draw(pyplot)
        paths.append(folder / f"reproduction-{name}.png")
        figure.savefig(paths[-1], dpi=100, bbox_inches="tight")
        pyplot.close(figure)
    return paths


def _learning_curves(plt: Any, found: Rows) -> Any:
    """Validation IoU over the steps: a panel for each way to train the 2-Unet, a thin line a seed."""
    figure, panels = plt.subplots(1, len(BN_CASES), figsize=(13, 3.4), sharey=True, sharex=True)
    for panel, (case, (batch_norm, weights)) in zip(panels, BN_CASES.items(), strict=True):
        runs = found.get(bn_label(2, batch_norm, weights), [])
        _curves(panel, runs, OURS, label="mean")
        panel.set_title(f"{case}\n{n_successes(runs)} of {len(runs)} trained", fontsize=9)
        panel.set(xlabel="steps", ylim=(0, 0.9))
        panel.axhline(SUCCESS_IOU, color=REPORT, linewidth=0.8, linestyle=":")
        panel.grid(alpha=0.3)
        if not runs:
            panel.text(0.5, 0.5, "not run yet", transform=panel.transAxes, ha="center")
    panels[0].set_ylabel("validation IoU")
    figure.suptitle("2-Unet on labels alone, the report's setting: each seed and their mean (EPFL)", y=1.04)
    return figure


def _curves(panel: Any, runs: Sequence[Line], colour: str, *, label: str) -> None:
    curves = [np.array(line["curves"]["validation"], float)[:, :2] for line in runs if line.get("curves")]
    for curve in curves:
        panel.plot(*curve.T, color=colour, alpha=0.35, linewidth=0.8)
    whole = [curve for curve in curves if len(curve) == max(map(len, curves))]
    if whole:
        mean = np.mean(whole, axis=0)
        panel.plot(*mean.T, color=colour, linewidth=2.2, label=label, marker="o", markersize=3)


def _success(plt: Any, found: Mapping[str, Rows]) -> Any:
    """The share of runs that trained, with its 95 % interval, beside the report's."""
    cases = {f"report's setting, {INITS[init]} weights": found["table4"].get(f"2-Unet, {INITS[init]}", []) for init in INITS}
    cases |= {
        f"report's setting, with {case}": found["bn"].get(bn_label(2, *how), [])
        for case, how in BN_CASES.items()
        if case != "neither"
    }
    cases |= {f"our recipe{missing}": found["final"].get(f"{FINAL_OURS}{missing}", []) for missing in WITHOUT}
    cases = {case: runs for case, runs in cases.items() if runs}
    bars = [("report, neither (its text)", 3, 10, REPORT), ("report, neither (its table 4)", 4, 10, REPORT)]
    bars += [(case, n_successes(runs), len(runs), OURS) for case, runs in cases.items()]
    figure, panel = plt.subplots(figsize=(8, 0.45 * len(bars) + 1.3))
    for place, (_, n_good, n, colour) in enumerate(bars):
        share, low, high = rate(n_good, n)
        panel.barh(place, share, color=colour, alpha=0.75)
        panel.errorbar(share, place, xerr=[[share - low], [high - share]], color="black", capsize=3, linewidth=1)
        panel.text(1.02, place, f"{n_good} of {n}", va="center")
    panel.set_yticks(range(len(bars)), [bar[0] for bar in bars])
    panel.invert_yaxis()
    panel.set(xlim=(0, 1), xlabel=f"share of runs that train (validation IoU above {SUCCESS_IOU}), with 95 % interval")
    panel.set_title("2-Unet: how often training succeeds (EPFL)")
    panel.grid(alpha=0.3, axis="x")
    return figure


def _parameters(plt: Any, found: Mapping[str, Rows], setting: Setting) -> Any:
    """Test IoU and test cross-entropy over the number of parameters, beside the report's points."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4))
    vanilla = [line for label, runs in found["table1"].items() if label.endswith(INITS["he-normal"]) for line in runs]
    groups = [
        ("labels alone, the report's setting", vanilla, LABELS),
        ("distilled, our recipe", found["final"].get(FINAL_OURS, []), OURS),
    ]
    for label, lines, colour in groups:
        tested = [line for line in lines if line.get("test")]
        for panel, key in ((left, "iou"), (right, "cross_entropy")):
            points = [(line["n_parameters"], line["test"][key]) for line in tested]
            if points:
                panel.scatter(*zip(*points, strict=True), color=colour, alpha=0.6, label=label, zorder=3)
    for parameters, (iou, label) in REPORT_IOU.items():
        left.scatter(parameters, iou, color=REPORT, marker="x", s=60, zorder=3, label="report" if label == "64-Unet" else None)
        left.annotate(
            f"{label} {iou}",
            (parameters, iou),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
            fontsize=8,
            color=REPORT,
        )
    right.plot(
        *zip(*[(PARAMETERS[k], loss) for k, loss in REPORT_TEST_LOSS.items()], strict=True),
        color=REPORT,
        marker="x",
        linewidth=0.8,
        label="report, table 1",
    )
    floors = [line["test"]["constant_floor"] for line in vanilla if line.get("test")]
    if floors:
        right.axhline(floors[0], color=LABELS, linestyle=":", label=f"best constant, {floors[0]:.3f}")
    left.set(ylabel="test IoU", ylim=(0, 1))
    right.set(ylabel="test cross-entropy, nats", yscale="log")
    ticks = (0.05, 0.1, 0.2, 0.5, 1)
    right.set_yticks(ticks, [str(tick) for tick in ticks])
    right.minorticks_off()
    for panel in (left, right):
        panel.set(xscale="log", xlabel="trained parameters", xlim=(4e3, 2.5e8))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    steps = setting.budget.steps
    figure.suptitle(f"Accuracy over size after {steps:,} steps (EPFL; the report: up to 320,000 iterations)")
    figure.tight_layout()
    return figure


def _versus(plt: Any, found: Rows, setting: Setting) -> Any:
    """Validation IoU over the steps, distilled and on labels alone: a row of panels for each width, one for each length."""
    lengths = versus_steps(setting)
    figure, panels = plt.subplots(len(VERSUS_WIDTHS), len(lengths), figsize=(11, 8), sharey=True, sharex="col")
    for width, row in zip(VERSUS_WIDTHS, panels, strict=True):
        for steps, panel in zip(lengths, row, strict=True):
            for method, colour, label in (("vanilla", LABELS, "labels alone"), ("mixed", OURS, "distilled")):
                _curves(panel, found.get(versus_label(width, steps, method), []), colour, label=label)
            panel.set_title(f"{width}-Unet, {steps:,} steps, {len(versus_pairs(found, width, steps))} pairs", fontsize=9)
            panel.axhline(TARGET_IOU, color=REPORT, linewidth=0.8, linestyle=":")
            panel.set(ylim=(0, 0.9))
            panel.grid(alpha=0.3)
        row[0].set_ylabel("validation IoU")
    for panel in panels[-1]:
        panel.set_xlabel("steps")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper right", fontsize=9)
    figure.suptitle("A teacher against labels alone: same student, crops, seeds and steps (EPFL)")
    figure.tight_layout()
    return figure
