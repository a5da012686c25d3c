"""tools/reproduce.py: what was published is copied right, runs go on where they ended, and lines become tables and figures."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from click.testing import CliRunner
from scipy import stats

from kdunet import bank, checkpoint, fit, measures
from kdunet.config import RunConfig
from kdunet_infer.errors import ConfigError, TrainingError, VolumeNotFound

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def tools() -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "tools"))
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)
    sys.path.remove(str(ROOT / "tools"))


def load(name: str) -> ModuleType:
    return importlib.import_module(f"reproduction.{name}")


def setting(budget: str = "small") -> Any:
    return load("setting").Setting(load("setting").BUDGETS[budget], load("setting").Places())


def arms(name: str, budget: str = "small", seeds: int | None = None) -> list[Any]:
    found: list[Any] = load("experiments").experiment(name, budget, seeds)
    return found


def a_line(arm: Any, *, iou: float = 0.7, budget: str = "small", **changes: Any) -> dict[str, Any]:
    """A line as the worker writes it."""
    config = arm.config
    every, steps = config.validate_every, config.optim.steps
    test = {"iou": iou - 0.1, "threshold": 0.5, "cross_entropy": 0.1, "constant_floor": 0.2075, "n_slices": 8}
    unseen = range(config.unseen.every, steps + 1, config.unseen.every)
    return {
        "experiment": arm.experiment,
        "arm": arm.label,
        "seed": arm.seed,
        "budget": budget,
        "published": dict(arm.published),
        "fingerprint": arm.fingerprint,
        "diverged": None,
        "steps": steps,
        "width": config.width,
        "n_parameters": 30_902,
        "validation": {"iou": iou, "threshold": 0.5, "cross_entropy": 0.1},
        "collapsed": None,
        "restarts": 0,
        "windows": {"alpha_t": 200, "beta_t": 1, "n_t": 50},
        "loss_train": 0.05,
        "loss_train_terms": {"hard": 0.04, "soft": 0.3},
        "loss_test": 0.125,
        "test": test if config.unseen.images else None,
        "curves": {
            "validation": [[step, iou * step / steps, 0.1] for step in range(every, steps + 1, every)],
            "train": [[steps, 0.05]],
            "test": [[step, 0.2 if step <= steps / 4 else 0.9] for step in unseen],
        },
        "seconds": 100.0,
        "steps_per_s": 15.0,
        "torch": "2.13.0",
    } | changes


def test_the_published_numbers_are_the_report_s() -> None:
    def published(name: str, label: str, key: str) -> list[Any]:
        return [arm.published.get(key) for arm in arms(name, "full", 10) if arm.label == label]

    assert published("table1", "64-Unet, He-normal", "test") == [0.1021] * 10
    assert published("table1", "4-Unet, He-normal", "train") == [0.0286] * 10
    assert published("table1", "1-Unet, He-normal", "iterations") == [320_000] * 10
    assert published("table2", "T = 0.25", "test") == ["diverged"] * 10
    assert published("table2", "T = 5", "test") == [0.610] * 10
    assert published("table2", "T = 20", "iterations") == [48_800] * 10
    assert published("table3", "T = 6", "test")[:3] == [0.151, 0.525, 0.482]
    assert published("table3", "T = 5", "min") == [0.097, 0.480, 0.480] + [None] * 7
    of_ten = [0.156, 0.142, 1.371, 0.138, 1.376, 1.379, 1.380, 1.381, 0.223, 1.384]
    assert published("table4", "2-Unet, He-normal", "test") == of_ten
    assert published("table4", "1-Unet, He-normal", "test")[8:] == [1.30, 1.31]
    assert published("table5", "T = 15", "train soft") == [0.326] * 10
    assert published("table6", "T = 10, 20,000 iterations", "start") == [0.550] * 10
    assert published("table6", "T = 5, 10,000 iterations", "test") == [0.883] * 10
    assert published("bn", "4-Unet, BN both, weights none", "test") == [0.0727] * 10
    assert published("final", "EPFL: report, soft labels only", "IoU") == [0.752] * 10
    assert published("final", "EPFL: report, mixed", "test") == [0.135] * 10


@pytest.mark.parametrize("budget", ["small", "full", "quick"])
def test_every_configuration_is_a_run_of_its_own(budget: str, tmp_path: Path) -> None:
    limits = load("setting").BUDGETS[budget]
    for name in load("experiments").NAMES:
        found = arms(name, budget, 2)
        assert found
        assert len({(arm.label, arm.seed) for arm in found}) == len({arm.fingerprint for arm in found}) == len(found)
        for arm in found[::5]:
            (tmp_path / "config.toml").write_text(arm.config.to_toml())
            assert RunConfig.from_toml(tmp_path / "config.toml") == arm.config
            assert (arm.config.seed, arm.config.on_collapse) == (arm.seed, "ignore")
            assert arm.config.width <= limits.widest
            assert bool(arm.config.teachers) == bool(arm.config.loss.soft_weight and not limits.bank)


def test_the_report_s_tables_use_the_report_s_setting() -> None:
    for name in ("table1", "table2", "table3", "table4", "table5", "table6"):
        for arm in arms(name, seeds=1):
            assert (arm.config.batch_norm, arm.config.loss.class_weights, arm.config.loss.dice_weight) == ("none", "none", 0)
    assert {arm.config.loss.temperature for arm in arms("table2")} == {0.1, 0.25, 0.5, 1, 2, 4, 5, 7, 10, 15, 20, 25}
    assert {arm.config.loss.hard_weight for arm in arms("table2")} == {0}
    sequential = {arm.label: arm.config for arm in arms("table6", "full", 1)}["T = 5, 20,000 iterations"]
    assert sequential.loss.soft_first * sequential.optim.steps == pytest.approx(20_000)
    assert {arm.config.width for arm in arms("table6")} == {1}


def test_the_sides_of_a_comparison_differ_in_the_teacher_alone() -> None:
    mixed, vanilla = (arm.config for arm in arms("versus", seeds=1)[:2])
    assert mixed.differences(vanilla) == ["loss.soft_weight: 1.0 -> 0.0"]
    assert {arm.config.optim.steps for arm in arms("versus")} == set(load("experiments").versus_steps(setting()))


def test_a_fingerprint_knows_names_and_values_but_no_folders() -> None:
    experiment, places = load("experiments").experiment, load("setting").Places
    here = experiment("table2", "small", 1, places())
    elsewhere = experiment("table2", "small", 1, places(data=Path("/data"), runs=Path("/scratch")))
    assert [arm.fingerprint for arm in here] == [arm.fingerprint for arm in elsewhere]
    other_teacher = experiment("table1", "small", 1, places(teacher=Path("runs/better")))
    assert other_teacher[0].fingerprint != arms("table1", seeds=1)[0].fingerprint


def test_a_rerun_leaves_out_what_has_a_line_whichever_experiment_it_was_made_for() -> None:
    tasks_left, table4 = load("plan").tasks_left, arms("table4")
    assert len([task for task in tasks_left(table4, [], setting()) if task.arm]) == len(table4)
    lines = [a_line(arm) for arm in arms("bn") if arm.label == "2-Unet, BN none, weights none"]
    left = [task.arm for task in tasks_left(table4, lines, setting()) if task.arm]
    assert len(left) == len(table4) - len(lines)
    assert [arm.seed for arm in left if arm.label == "2-Unet, He-normal"] == list(range(len(lines), 10))
    renamed = load("records").of_experiment(table4, lines, "small")
    assert {(line["experiment"], line["arm"]) for line in renamed} == {("table4", "2-Unet, He-normal")}
    assert renamed[2]["published"] == {"test": 1.371}
    assert not load("records").of_experiment(table4, lines, "full")
    old = [line | {"fingerprint": "of another configuration"} for line in lines]
    assert len([task for task in tasks_left(table4, old, setting()) if task.arm]) == len(table4)


def test_teachers_and_banks_are_made_once_and_before_what_needs_them(tmp_path: Path) -> None:
    places = load("setting").Places(runs=tmp_path)
    small = load("setting").Setting(load("setting").BUDGETS["small"], places)
    found = load("experiments").experiment("table2", "small", 1, places)
    tasks = load("plan").tasks_left(found, [], small)
    assert [task.name for task in tasks[:4]] == [
        "bank small-epfl-by-epfl-16unet",
        "teacher small-epfl-4unet",
        "bank small-epfl-by-small-epfl-4unet",
        "table2, T = 0.1, seed 0",
    ]
    assert [task.arm is None for task in tasks].count(True) == 2
    for before, after in itertools.pairwise(tasks[:4]):
        assert before.job.makes in after.job.needs
    teacher = tasks[1]
    assert (teacher.config.on_collapse, teacher.config.optim.steps) == ("restart", small.budget.teacher_steps)
    (tmp_path / "teachers" / "small-epfl-4unet").mkdir(parents=True)
    (tmp_path / "teachers" / "small-epfl-4unet" / "result.json").touch()
    assert load("plan").tasks_left(found, [], small)[0].name == "bank small-epfl-by-small-epfl-4unet"


def test_the_plan_tells_runs_steps_and_hours_where_widths_have_been_timed() -> None:
    plan = load("plan")
    tasks, n = plan.tasks_left(arms("table4"), [], setting()), len(arms("table4"))
    assert plan.estimate(tasks, [], n_jobs=2).startswith(f"{n} runs left, {n * setting().budget.steps:,} steps")
    lines = [a_line(arm, steps_per_s=setting().budget.steps / 1800) for arm in arms("bn", seeds=1)]
    assert "about 3.8 hours for 15 of them" in plan.estimate(tasks, lines, n_jobs=2)


def test_a_line_cut_short_by_a_crash_is_cut_off_and_its_run_done_again(tmp_path: Path) -> None:
    records, path = load("records"), tmp_path / "results" / "table4.jsonl"
    first, second = (a_line(arm) for arm in arms("table4")[:2])
    records.append_line(path, first)
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps(second).encode()[:-20])
    assert records.read_lines(path) == [first]
    assert path.read_bytes() == whole
    records.append_line(path, second)
    assert records.read_lines(path) == [first, second]
    assert records.read_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(("text", "lacks"), [("{", "JSON"), ("[1]", "JSON"), ('{"arm": 1, "seed": 1}', "budget, experiment")])
def test_a_line_damaged_otherwise_is_told(tmp_path: Path, text: str, lacks: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(TrainingError, match=rf"line 1 of .*lines.jsonl lacks {lacks}.*; remove that line"):
        load("records").read_lines(path)


def test_the_paired_interval_is_scipy_s() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(0.7, 0.02, (2, 7))
    found = load("statistics").paired_difference(ours, theirs)
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found == pytest.approx((np.mean(ours - theirs), expected.low, expected.high))
    assert load("statistics").paired_difference([0.7], [0.6])[1:] == (-np.inf, np.inf)
    assert load("comparisons").difference_text(load("statistics").paired_difference([0.7], [0.6])) == "+0.100"
    with pytest.raises(ValueError, match="2 and 1 values"):
        load("statistics").paired_difference([1, 2], [1])


def test_a_rate_has_wilson_s_interval() -> None:
    p, n, z = 0.3, 10, stats.norm.ppf(0.975)
    middle, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = (p, (middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n))
    assert load("statistics").rate(3, 10) == pytest.approx(expected)


def test_steps_to_an_iou_are_interpolated() -> None:
    steps_to = load("statistics").steps_to
    line = {"curves": {"validation": [[100, 0.4, 0.1], [200, 0.6, 0.1], [300, 0.5, 0.1], [400, 0.9, 0.1]]}}
    assert [steps_to(line, iou) for iou in (0.2, 0.5, 0.6, 0.75)] == pytest.approx([50, 150, 200, 362.5])
    assert steps_to(line, 0.95) is None
    assert steps_to({"diverged": "the loss is nan"}, 0.5) is None


def test_sections_stand_between_their_markers_and_the_prose_stays(tmp_path: Path) -> None:
    sections, places = load("sections"), load("setting").Places()
    docs = tmp_path / "reproduction.md"
    prose = "before\n<!-- reproduce:table1:begin -->{}<!-- reproduce:table1:end -->\nafter\n"
    docs.write_text(prose.format("old\n"))
    found = arms("table1", seeds=3)
    lines = [a_line(arm, iou=0.7 if arm.seed else 0.1, collapsed=None if arm.seed else "collapsed") for arm in found[:3]]
    sections.write_section("table1", docs, lines, places)
    sections.write_section("table1", docs, lines, places)
    text = docs.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert text.count(f"**Budget `small`**: {setting().budget.steps:,} steps") == 1
    assert "old" not in text
    rows = {row.split(" | ")[0].strip("| "): row for row in text.splitlines() if row.startswith("|")}
    assert "| test 0.1021; train 0.0256; 80,000 iterations | not run (needs a GPU) |" in rows["64-Unet, He-normal"]
    assert rows["16-Unet, He-normal"].endswith("| 0.500 (0.100 to 0.700) | 0.400 (0.000 to 0.600) | 2 of 3 | 1 of 3 |")
    assert "not run yet" in rows["8-Unet, He-normal"]
    assert "0.207" in text or "0.208" in text
    sections.write_section("table1", docs, [], places)
    assert "Not run yet: `python tools/reproduce.py table1`." in docs.read_text()
    with pytest.raises(ConfigError, match=r"lacks the lines <!-- reproduce:bn:begin --> and .*; put them"):
        sections.write_section("bn", docs, [], places)


def test_the_page_has_room_for_every_experiment() -> None:
    text = (ROOT / "docs" / "reproduction.md").read_text()
    for name in load("experiments").NAMES:
        assert text.count(f"<!-- reproduce:{name}:begin -->") == text.count(f"<!-- reproduce:{name}:end -->") == 1


def test_the_losses_after_the_switch_are_those_of_the_labels() -> None:
    lines = [a_line(arm) for arm in arms("table6", seeds=1)]  # 0.2 for a quarter of the steps, 0.9 after
    text = "\n".join(load("sections").section("table6", lines, load("setting").Places()))
    assert "| T = 5, 10,000 iterations | start 0.480; test 0.883 | 0.200 | 0.900 | 0.900 |" in text


def test_a_diverged_run_counts_as_one_that_did_not_train() -> None:
    arm = arms("table2")[0]
    keys = ("experiment", "arm", "seed", "budget", "published", "fingerprint", "seconds", "steps_per_s", "torch")
    line = {key: a_line(arm)[key] for key in keys} | {"diverged": "the loss is nan at step 7"}
    row = next(
        row for row in load("sections").section("table2", [line], load("setting").Places()) if row.startswith("| T = 0.1 |")
    )
    assert row == "| T = 0.1 | test diverged | - | - | - | 0 of 1 | 0 of 1 | 1 of 1 |"


def test_comparisons_pair_seeds_and_tell_rates() -> None:
    places = load("setting").Places()
    gains = {0: 0.01, 1: 0.02, 2: 0.06}
    steps = setting().budget.steps
    found = [arm for arm in arms("versus", seeds=3) if arm.label.startswith(f"2-Unet, {steps} steps")]
    lines = [a_line(arm, iou=0.75 + gains[arm.seed] * ("distilled" in arm.label)) for arm in found]
    text = "\n".join(load("sections").section("versus", lines, places))
    half = stats.t.ppf(0.975, 2) * np.std(list(gains.values()), ddof=1) / np.sqrt(3)
    cell = f"+0.030 ({0.03 - half:+.3f} to {0.03 + half:+.3f})"
    assert f"| 2-Unet, {steps:,} steps | 3 | {cell} | {cell} |" in text
    reached = np.mean([steps * 0.7 / (0.75 + gain) for gain in gains.values()])  # the curves are straight
    assert f"| 2-Unet, {steps:,} steps | {reached:,.0f} | {steps * 0.7 / 0.75:,.0f} | 1.04 |" in text
    without = [arm for arm in arms("final", seeds=10) if arm.label.endswith("without both")]
    lines = [a_line(arm, iou=0.7 if arm.seed < 4 else 0.1) for arm in without]
    text = "\n".join(load("sections").section("final", lines, places))
    assert "| our recipe, without both | 4 of 10 | 17% to 69% | 3 of 10 (its text), 4 of 10 (its table 4) |" in text


def test_figures_are_drawn_of_what_has_been_run(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the figures need kdunet[bench]")
    names = ("bn", "final", "table1", "versus")
    lines = [a_line(arm, iou=0.6 + 0.05 * arm.seed) for name in names for arm in arms(name, seeds=2)]
    paths = load("figures").write_figures(lines, setting(), tmp_path)
    assert [path.name for path in paths] == [
        f"reproduction-{name}.png" for name in ("learning-curves", "success", "parameters", "versus")
    ]
    assert all(path.stat().st_size > 10_000 for path in paths)
    shown = [name for figures in load("sections").FIGURES.values() for name in figures]
    assert sorted(path.name for path in paths) == sorted(f"reproduction-{name}.png" for name in shown)
    section = load("sections").section("versus", lines, load("setting").Places())
    assert section[-1].endswith("](results/reproduction-versus.png)\n")
    assert load("figures").write_figures([], setting(), tmp_path) == []


def shell(tmp_path: Path, makes: str, script: str, *needs: str) -> Any:
    command = ["/bin/sh", "-c", script]
    return load("schedule").Job(name=makes, command=command, log=tmp_path / f"{makes}.log", makes=makes, needs=frozenset(needs))


def test_jobs_wait_for_their_needs_and_a_failure_takes_along_no_others(tmp_path: Path) -> None:
    jobs = [
        shell(tmp_path, "late", f"test -e {tmp_path}/made", "early"),
        shell(tmp_path, "lost", "true", "broken"),
        shell(tmp_path, "broken", "echo first; echo 'it broke.' >&2; exit 3"),
        shell(tmp_path, "early", f"test $OMP_NUM_THREADS = 1 && touch {tmp_path}/made"),
        shell(tmp_path, "there", "true", "what no job makes"),
    ]
    done: list[str] = []
    failed: dict[str, str] = {}
    outcome = load("schedule").run_jobs(
        jobs,
        at_once=2,
        done=lambda job: done.append(job.name),
        failed=lambda job, sentence: failed.update({job.name: sentence}),
    )
    assert sorted(done) == ["early", "late", "there"]
    assert failed == outcome.failed == {"broken": "it broke.", "lost": "needs broken, which could not be made"}
    assert outcome.stopped_by == ""


def test_a_stop_reaches_all_that_run_and_starts_no_more(tmp_path: Path) -> None:
    wait = f"trap 'echo told > {tmp_path}/told; exit 143' TERM; touch {tmp_path}/up; while :; do sleep 0.02; done"
    stop = f"while [ ! -e {tmp_path}/up ]; do sleep 0.02; done"
    jobs = [shell(tmp_path, "long", wait), shell(tmp_path, "short", stop), shell(tmp_path, "next", f"touch {tmp_path}/next")]
    outcome = load("schedule").run_jobs(
        jobs,
        at_once=2,
        done=lambda job: os.kill(os.getpid(), signal.SIGINT),
        failed=lambda job, sentence: pytest.fail(sentence),
    )
    assert (outcome.stopped_by, outcome.failed) == ("SIGINT", {})
    assert (tmp_path / "told").exists()
    assert not (tmp_path / "next").exists()


def test_file_names_are_those_of_the_packages() -> None:
    plan = load("plan")
    ours = (plan.BANK_FILE, plan.RESULT_FILE, plan.CHECKPOINT_FILE, plan.NETWORK_FILE)
    assert ours == (bank.BANK_FILE, measures.RESULT_FILE, fit.CHECKPOINT_FILE, checkpoint.NETWORK_FILE)


def test_divergence_is_told_from_other_errors() -> None:
    says = load("worker").DIVERGED.match
    assert says("the loss is nan at step 12; nothing was saved yet. Lower optim.learning_rate")
    assert says("the gradient is inf at step 0; the last")
    assert not says("soft_weight is 1 and there is no teacher")


def test_curves_are_thinned_to_means() -> None:
    assert load("worker").thinned([(1, 1.0), (1, 3.0), (2, 5.0), (2, 7.0)], 2) == [[1, 2.0], [2, 6.0]]
    assert load("worker").thinned([(1, 1.0)], 60) == [[1, 1.0]]


def test_missing_volumes_are_told_in_one_sentence(tmp_path: Path) -> None:
    reproduce = importlib.import_module("reproduce")
    (tmp_path / "reproduction.md").write_text((ROOT / "docs" / "reproduction.md").read_text())
    with pytest.raises(VolumeNotFound):
        load("setting").refuse_missing([arms("table1")[0].config.replaced({"data.images": "none.tif"})])
    asked = ["table4", "--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--docs", str(tmp_path)]
    found = CliRunner().invoke(reproduce.main, asked)
    assert found.exit_code == 1
    assert found.output.endswith(
        f"Error: there is no file {tmp_path}/epfl/training.tif; name the folder that holds epfl and vnc with --data.\n"
    )


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """Dark discs on noise, as many slices as the splits ask for."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :48]
    (tmp_path / "data" / "epfl").mkdir(parents=True)
    for name, n in (("training", 165), ("testing", 64)):
        truth = np.stack([(y - cy) ** 2 + (x - cx) ** 2 < 60 for cy, cx in rng.integers(10, 38, (n, 2))])
        images = np.clip(rng.normal(170, 20, truth.shape) - 90 * truth, 0, 255).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"data/epfl/{name}.tif", images, photometric="minisblack")
        tifffile.imwrite(tmp_path / f"data/epfl/{name}_groundtruth.tif", truth.astype(np.uint8) * 255, photometric="minisblack")
    return tmp_path / "data"


def no_matplotlib(*_: object) -> None:
    raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")


def test_runs_end_as_lines_a_table_and_nothing_else_and_a_rerun_has_nothing_to_do(
    volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "")  # what the command changes goes back
    reproduce, worker = importlib.import_module("reproduce"), load("worker")
    monkeypatch.setattr(reproduce, "write_figures", no_matplotlib)
    docs, runs, teacher = tmp_path / "docs", tmp_path / "runs", ROOT / "models" / "teachers" / "epfl-16unet"
    docs.mkdir()
    (docs / "reproduction.md").write_text((ROOT / "docs" / "reproduction.md").read_text())
    places = load("setting").Places(data=volumes, runs=runs, teacher=teacher)
    quick = load("setting").Setting(load("setting").BUDGETS["quick"], places)
    found = [arm for arm in load("experiments").experiment("table4", "quick", 1, places) if "Unet, He" in arm.label]
    for task, parents, code in zip(load("plan").tasks_left(found, [], quick), ([1], [1, 2]), (0, 143), strict=False):
        # the bank, and a run that stops after a step, because its parent is gone
        with monkeypatch.context() as patch:
            patch.setattr(os, "getppid", lambda parents=parents: parents[0] if len(parents) == 1 else parents.pop(0))
            task.write_job_file()
            assert worker.main(Path(task.job.command[-1])) == code
    asked = ["table4", "--budget", "quick", "--seeds", "1", "--only", "Unet, He", "--jobs", "2", "--docs", str(docs)]
    asked += ["--data", str(volumes), "--runs", str(runs), "--teacher", str(teacher)]
    first = CliRunner().invoke(reproduce.main, asked)
    assert first.exit_code == 0, first.output
    assert first.output.startswith("table4: 2 runs left, 8 steps\n1/2 table4, ")
    lines = [json.loads(line) for line in (docs / "results" / "table4.jsonl").read_text().splitlines()]
    assert sorted(line["arm"] for line in lines) == ["1-Unet, He-normal", "2-Unet, He-normal"]
    for line in lines:
        assert (line["steps"], line["seed"], line["budget"], line["diverged"]) == (4, 0, "quick", None)
        assert line["n_parameters"] == {1: 7694, 2: 30_534}[line["width"]]
        assert [step for step, *_ in line["curves"]["validation"]] == [2, 4]
        assert [step for step, _ in line["curves"]["test"]] == [2, 4]
        assert line["loss_test"] == pytest.approx(min(value for _, value in line["curves"]["test"]), abs=1e-6)
        assert line["validation"]["iou"] == pytest.approx(max(iou for _, iou, _ in line["curves"]["validation"]), abs=1e-5)
        assert line["test"]["threshold"] == line["validation"]["threshold"]
        assert line["test"]["n_slices"] == 2
        assert str(tmp_path) not in json.dumps(line)
    assert not list((runs / "quick").iterdir())
    assert "| 2-Unet, He-normal | test 0.156, 0.142, 1.371" in (docs / "reproduction.md").read_text()
    assert first.output.endswith("no figures, which need 'matplotlib': pip install 'kdunet[bench]'.\n")
    page = (docs / "reproduction.md").read_bytes()
    second = CliRunner().invoke(reproduce.main, asked)
    assert second.exit_code == 0, second.output
    assert second.output.startswith("table4: 0 runs left, 0 steps\n")
    assert (docs / "reproduction.md").read_bytes() == page
