"""The sections of docs/reproduction.md: a table for each experiment and budget, beside what the report published."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from kdunet_infer.errors import ConfigError
from reproduction.comparisons import bn_rates, recipe_rates, versus_tables
from reproduction.experiments import Row, experiment, rows
from reproduction.plan import TEACHERS
from reproduction.records import Line, of_experiment
from reproduction.setting import BUDGETS, Places, Published, Setting
from reproduction.statistics import SUCCESS_IOU, n_successes, validation_iou

Lines = Sequence[Line]


FIGURES = {
    "table1": {"parameters": "Test IoU and cross-entropy over the number of parameters"},
    "bn": {
        "success": "How often the 2-Unet trains, with what",
        "learning-curves": "Validation IoU over the steps, with and without batch normalisation and class weights",
    },
    "versus": {"versus": "Validation IoU over the steps, distilled and on labels alone"},
}
"""Of each experiment, by the name that `figures.py` gives them."""


def write_section(name: str, docs: Path, lines: Lines, places: Places) -> None:
    """Put the tables of an experiment between its markers in `docs`, whose other text stays as it is.

    Raises ConfigError where the markers are not there.
    """
    text = docs.read_text(encoding="utf-8") if docs.exists() else ""
    begin, end = f"<!-- reproduce:{name}:begin -->", f"<!-- reproduce:{name}:end -->"
    head, found_begin, rest = text.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found_begin and found_end):
        raise ConfigError(f"{docs} lacks the lines {begin} and {end}; put them where the section goes.")
    docs.write_text("\n".join([head + begin, *section(name, lines, places), end + tail]), encoding="utf-8")


def section(name: str, lines: Lines, places: Places) -> list[str]:
    """Lines of markdown: a table for each budget that has been run, or what there is to run."""
    found: list[str] = []
    for budget in BUDGETS:
        setting = Setting(BUDGETS[budget], places)
        own = own_lines(name, lines, setting)
        if own:
            found += [
                *_about(name, own, setting),
                *_table(name, own, setting),
                *_after(name, own, setting),
                *_teachers(own, lines),
            ]
    if not found:
        return ["", f"Not run yet: `python tools/reproduce.py {name}`.", ""]
    return found + [f"![{text}](results/reproduction-{figure}.png)\n" for figure, text in FIGURES.get(name, {}).items()]


def own_lines(name: str, lines: Lines, setting: Setting) -> list[Line]:
    """The lines of an experiment at a budget, for as many seeds as there are; none of configurations that have changed."""
    seeds = [line["seed"] for line in lines if line["budget"] == setting.budget.name]
    arms = experiment(name, setting.budget.name, max(seeds, default=0) + 1, setting.places)
    return of_experiment(arms, lines, setting.budget.name)


def by_row(lines: Lines) -> dict[str, list[Line]]:
    """Lines by the label of their row."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line["arm"], []).append(line)
    return found


def _about(name: str, own: Lines, setting: Setting) -> Iterator[str]:
    budget = setting.budget
    hours = sum(line["seconds"] for line in own) / 3600
    steps = sorted({line["steps"] for line in own if line.get("steps")})
    crop = f"{budget.batch} crops of {budget.crop} x {budget.crop}"
    bank = f", drawn from a bank of {budget.bank[0]:,}" if budget.bank else ""
    versions = ", ".join(sorted({line["torch"] for line in own}))
    yield f"\n**Budget `{budget.name}`**: {' or '.join(f'{n:,}' for n in steps)} steps of {crop}{bank};"
    yield f"{len(own)} runs, {hours:.1f} hours of one process, torch {versions}."
    floors = [line["test"]["constant_floor"] for line in own if line.get("test")]
    if floors:
        yield f"The best constant has a test cross-entropy of {floors[0]:.3f} (report: stuck at 0.480)."
    yield f"Means, with the least and the most; trained: validation IoU above {SUCCESS_IOU}.\n"


def _table(name: str, own: Lines, setting: Setting) -> Iterator[str]:
    columns = COLUMNS[name]
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    found = by_row(own)
    for row in rows(name, setting):
        runs = found.get(row.label, [])
        cells = [CELLS[column](row, runs) for column in columns]
        if not runs:
            why = "not run (needs a GPU)" if row.config.width > setting.budget.widest else "not run yet"
            cells = [cell if column == PUBLISHED else "" for column, cell in zip(columns, cells, strict=True)]
            cells[1] = why
        yield f"| {row.label} | {' | '.join(cells)} |"
    yield ""


def _after(name: str, own: Lines, setting: Setting) -> Iterator[str]:
    if name == "final":
        yield from recipe_rates(by_row(own))
    if name == "bn":
        yield from bn_rates(by_row(own))
    if name == "versus":
        yield from versus_tables(by_row(own), setting)
    windows = next((line["windows"] for line in own if line.get("windows")), None)
    if windows:
        several = f"mean of {windows['beta_t']} consecutive test losses" if windows["beta_t"] > 1 else "test loss"
        yield (
            f"L\\*_test is the lowest {several}, one every {windows['n_t']} steps; "
            f"L\\*_train the lowest mean of {windows['alpha_t']} consecutive training crops."
            + (" Windows keep their share of the steps." if name == "versus" else "")
        )
        yield ""


def _teachers(own: Lines, lines: Lines) -> Iterator[str]:
    """The teachers trained here that taught these runs."""
    wanted = {"final": ("4-Unet, vnc",), **dict.fromkeys(("table2", "table3", "table5", "table6"), ("4-Unet, vanilla",))}
    for line in lines:
        if line["experiment"] != TEACHERS or line["budget"] != own[0]["budget"]:
            continue
        if line["arm"].startswith(wanted.get(own[0]["experiment"], ())):
            test = f", test cross-entropy {line['test']['cross_entropy']:.4f}" if line.get("test") else ""
            again = f", begun again {line['restarts']} times after a collapse" if line["restarts"] else ""
            yield f"Teacher: {line['arm']}, {line['steps']:,} steps, validation IoU {validation_iou(line):.3f}{test}{again}.\n"


def mean_and_range(values: Sequence[float], *, digits: int = 3) -> str:
    """`0.712 (0.650 to 0.744)`; a single value alone, `-` for none."""
    if not values:
        return "-"
    mean, low, high = (f"{value:.{digits}f}" for value in (np.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def published_text(row: Row) -> str:
    """What the report gives for a row, in words."""
    found = [
        f"{_number(value)} iterations" if name == "iterations" else f"{name} {_number(value)}"
        for name, value in row.published.items()
    ]
    for name in row.trials[0] if row.trials else ():
        found.append(f"{name} {', '.join(_number(trial[name]) for trial in row.trials)}")
    return "; ".join(found) or "-"


def _number(value: Published) -> str:
    """As the report prints it: three decimals, or four where it gives them."""
    if isinstance(value, float):
        return f"{value:.3f}" if round(value, 3) == value else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else value


def _of(*keys: str) -> Callable[[Row, Lines], str]:
    """A column of a figure that lies in a line below `keys`."""

    def cell(_: Row, lines: Lines) -> str:
        values = [_value(line, keys) for line in lines]
        return mean_and_range([value for value in values if value is not None])

    return cell


def _value(line: Line, keys: Sequence[str]) -> float | None:
    value: object = line
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def _count(is_one: Callable[[Lines], int]) -> Callable[[Row, Lines], str]:
    return lambda _, lines: f"{is_one(lines)} of {len(lines)}"


def _n_collapsed(lines: Lines) -> int:
    return sum(bool(line.get("collapsed")) for line in lines)


def _n_diverged(lines: Lines) -> int:
    return sum(bool(line.get("diverged")) for line in lines)


def _around_switch(measure: Callable[[np.ndarray, np.ndarray, int], float]) -> Callable[[Row, Lines], str]:
    """A column of a measure of the test losses (before, after) the labels take over, and of beta_t."""

    def cell(row: Row, lines: Lines) -> str:
        values = []
        for line in (line for line in lines if line.get("curves")):
            curve = np.array(line["curves"]["test"], float)
            after = curve[:, 0] > round(row.config.loss.soft_first * row.config.optim.steps)
            if after.any() and not after.all():
                values.append(measure(curve[~after, 1], curve[after, 1], line["windows"]["beta_t"]))
        return mean_and_range(values)

    return cell


def _best_after(_: np.ndarray, after: np.ndarray, beta_t: int) -> float:
    n = min(beta_t, len(after))
    return float(np.convolve(after, np.full(n, 1 / n), mode="valid").min())


PUBLISHED = "published"
_TEST_LOSS, _TRAIN_LOSS, _IOU, _TEST_IOU = "L\\*_test", "L\\*_train", "validation IoU", "test IoU"
_TRAINED, _COLLAPSED, _DIVERGED = "trained", "collapsed at some time", "diverged"
CELLS: Mapping[str, Callable[[Row, Lines], str]] = {
    PUBLISHED: lambda row, _: published_text(row),
    _TEST_LOSS: _of("loss_test"),
    _TRAIN_LOSS: _of("loss_train"),
    _IOU: _of("validation", "iou"),
    _TEST_IOU: _of("test", "iou"),
    "test cross-entropy": _of("test", "cross_entropy"),
    _TRAINED: _count(n_successes),
    _COLLAPSED: _count(_n_collapsed),
    _DIVERGED: _count(_n_diverged),
    "train hard": _of("loss_train_terms", "hard"),
    "train soft (KL x T^2)": _of("loss_train_terms", "soft"),
    "test loss at the switch": _around_switch(lambda before, _, __: float(before[-1])),
    "highest after": _around_switch(lambda _, after, __: float(after.max())),
    "L\\*_test after": _around_switch(_best_after),
    "parameters": lambda _, lines: f"{lines[0]['n_parameters']:,}" if lines and lines[0].get("n_parameters") else "-",
}
_SCORES = (_IOU, _TEST_IOU, _TRAINED, _COLLAPSED)
COLUMNS: Mapping[str, Sequence[str]] = {
    "table1": (PUBLISHED, _TEST_LOSS, _TRAIN_LOSS, *_SCORES),
    "table2": (PUBLISHED, _TEST_LOSS, *_SCORES, _DIVERGED),
    "table3": (PUBLISHED, _TEST_LOSS, *_SCORES),
    "table4": (PUBLISHED, _TEST_LOSS, *_SCORES),
    "table5": (PUBLISHED, _TEST_LOSS, "train hard", "train soft (KL x T^2)", *_SCORES),
    "table6": (PUBLISHED, "test loss at the switch", "L\\*_test after", "highest after", *_SCORES),
    "bn": (PUBLISHED, _TEST_LOSS, _TRAIN_LOSS, *_SCORES),
    "final": (PUBLISHED, _TEST_LOSS, "test cross-entropy", *_SCORES),
    "versus": (_IOU, _TEST_IOU, "test cross-entropy", _TRAINED),
}
