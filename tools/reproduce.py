"""Runs the experiments of the EPFL report (Mangalam & Salzmann 2018) again, and writes docs/reproduction.md.

    python tools/reproduce.py table4 bn --jobs 2       hours on two cores; Ctrl-C stops, the same command goes on
    python tools/reproduce.py table4 --plan            what would be run
    python tools/reproduce.py table4 --report-only     tables and figures of what has been run

Each finished run is a line of docs/results/EXPERIMENT.jsonl. Needs pip install '.[train,test,bench]'.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from reproduction.experiments import NAMES, experiment
from reproduction.figures import write_figures
from reproduction.plan import TEACHERS, Task, estimate, tasks_left
from reproduction.records import Line, append_line, line_of, read_lines
from reproduction.schedule import Job, Outcome, run_jobs
from reproduction.sections import write_section
from reproduction.setting import BUDGETS, Places, Setting, refuse_missing
from reproduction.statistics import validation_iou

from kdunet.interrupts import EXIT_BY_SIGNAL
from kdunet_infer.errors import KdunetError

DEFAULTS = Places()


@click.command()
@click.argument("names", nargs=-1, required=True, type=click.Choice(NAMES))
@click.option("--budget", type=click.Choice(list(BUDGETS)), default="small", show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), help="Of each row, instead of the 3 or 10 it has.")
@click.option("--only", help="Rows whose label holds this text.")
@click.option("--jobs", "n_jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes at once.")
@click.option("--data", type=click.Path(path_type=Path), default=DEFAULTS.data, show_default=True, help="Holds epfl and vnc.")
@click.option(
    "--teacher", type=click.Path(path_type=Path), default=DEFAULTS.teacher, show_default=True, help="Of the final experiments."
)
@click.option(
    "--runs",
    type=click.Path(path_type=Path),
    default=DEFAULTS.runs,
    show_default=True,
    help="Banks, teachers, unfinished runs.",
)
@click.option("--docs", type=click.Path(path_type=Path), default="docs", show_default=True)
@click.option("--report-only", is_flag=True, help="Run nothing.")
@click.option("--plan", "plan_only", is_flag=True, help="Say what would be run, and no more.")
def main(
    names: tuple[str, ...],
    budget: str,
    seeds: int | None,
    only: str | None,
    n_jobs: int,
    docs: Path,
    report_only: bool,
    plan_only: bool,
    **places: Path,
) -> None:
    """Run experiments of the report, and write what came of them beside what it published."""
    setting = Setting(BUDGETS[budget], Places(**places))
    n_failed, stopped_by = 0, ""
    try:
        for name in names:
            tasks = _tasks(name, setting, seeds, only, docs)
            if not report_only:
                click.echo(f"{name}: {estimate(tasks, _all_lines(docs), n_jobs=n_jobs)}")
            if plan_only:
                continue
            if tasks and not report_only:
                outcome = _run(tasks, docs, n_jobs)
                n_failed, stopped_by = n_failed + len(outcome.failed), outcome.stopped_by
            write_section(name, docs / "reproduction.md", _all_lines(docs), setting.places)
            if stopped_by:
                break
        if not plan_only:
            _draw(docs, setting)
    except KdunetError as exc:
        raise click.ClickException(str(exc)) from exc
    if stopped_by:
        click.echo(f"stopped by {stopped_by}; the same command goes on.", err=True)
        sys.exit(EXIT_BY_SIGNAL[stopped_by])
    if n_failed:
        raise click.ClickException(f"{n_failed} runs failed, as told above; the same command tries them again.")


def _tasks(name: str, setting: Setting, seeds: int | None, only: str | None, docs: Path) -> list[Task]:
    arms = experiment(name, setting.budget.name, seeds, setting.places)
    if only:
        arms = [arm for arm in arms if only in arm.label]
    return tasks_left(arms, _all_lines(docs), setting)


def _all_lines(docs: Path) -> list[Line]:
    """The lines of all experiments: an experiment may use a run of another."""
    return [line for name in (*NAMES, TEACHERS) for line in read_lines(_results(docs, name))]


def _results(docs: Path, name: str) -> Path:
    return docs / "results" / f"{name}.jsonl"


def _run(tasks: Sequence[Task], docs: Path, n_jobs: int) -> Outcome:
    """Do the tasks; a line is kept as each ends."""
    refuse_missing([task.config for task in tasks])
    by_folder = {str(task.folder): task for task in tasks}
    for task in tasks:
        task.write_job_file()
    # the worker is found beside this file, wherever the command runs
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    n_ended = 0

    def done(job: Job) -> None:
        nonlocal n_ended
        n_ended += 1
        click.echo(f"{n_ended}/{len(tasks)} {job.name}: {_keep(by_folder[job.makes], docs)}")

    def failed(job: Job, sentence: str) -> None:
        nonlocal n_ended
        n_ended += 1
        click.echo(f"{n_ended}/{len(tasks)} {job.name} failed: {sentence}", err=True)

    return run_jobs([task.job for task in tasks], at_once=n_jobs, done=done, failed=failed)


def _draw(docs: Path, setting: Setting) -> None:
    try:
        for path in write_figures(_all_lines(docs), setting, docs / "results"):
            click.echo(f"wrote {path}")
    except ModuleNotFoundError as exc:
        click.echo(f"no figures, which need {exc.name!r}: pip install 'kdunet[bench]'.", err=True)


def _keep(task: Task, docs: Path) -> str:
    """Append the line of a task that has ended, and remove the rest; returns a summary."""
    summary = "made"
    if task.arm:
        line, path = task.line(), _results(docs, task.arm.experiment)
        if line_of(read_lines(path), task.arm, line["budget"]) is None:
            append_line(path, line)
        summary = line["diverged"] or f"validation IoU {validation_iou(line):.3f}, {line['seconds']:,.0f} s"
    task.tidy()
    return summary


if __name__ == "__main__":
    main()
