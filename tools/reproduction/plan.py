"""What is left to run of an experiment, and what has to be made for it first, as jobs."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdunet.config import RunConfig
from reproduction.experiments import banks, teachers
from reproduction.records import Line, line_of
from reproduction.schedule import Job
from reproduction.setting import Arm, Setting

TEACHERS = "teachers"
"""The experiment that the lines of teachers trained here go to."""
BANK_FILE, RESULT_FILE, CHECKPOINT_FILE, NETWORK_FILE = (
    "bank.json",
    "result.json",
    "checkpoint.safetensors",
    "network.safetensors",
)
"""As kdunet.bank, measures, fit and checkpoint call them, which import torch; a test compares."""
KEPT_FILES = {NETWORK_FILE, "config.toml", RESULT_FILE}
"""Of a teacher's folder."""


@dataclass(frozen=True, slots=True)
class Task:
    """What one process makes: the line of a run, or a bank."""

    name: str
    folder: Path
    config: RunConfig
    arm: Arm | None
    """None for a bank."""
    keeps_network: bool
    setting: Setting

    @property
    def job(self) -> Job:
        """The process; its other files lie beside the folder."""
        return Job(
            name=self.name,
            command=[sys.executable, "-m", "reproduction.worker", str(self._beside(".json"))],
            log=self._beside(".log"),
            makes=str(self.folder),
            needs=frozenset(_named(self.config)),
            one_thread=self.setting.budget.one_thread,
        )

    def write_job_file(self) -> None:
        """Write what the process reads."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._beside(".toml").write_text(self.config.to_toml(), encoding="utf-8")
        self._beside(".json").write_text(json.dumps(self._as_json(), indent=1), encoding="utf-8")

    def line(self) -> Line:
        """The line that the process has written."""
        found: Line = json.loads(self._beside(".line.json").read_text(encoding="utf-8"))
        return found

    def tidy(self) -> None:
        """Remove all that is not needed any more once the line is kept."""
        for suffix in (".json", ".toml", ".line.json", ".log", ".seconds"):
            self._beside(suffix).unlink(missing_ok=True)
        if self.arm is None:
            return
        if not self.keeps_network:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for path in [path for path in self.folder.iterdir() if path.name not in KEPT_FILES]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _beside(self, suffix: str) -> Path:
        return self.folder.with_name(self.folder.name + suffix)

    def _as_json(self) -> dict[str, Any]:
        budget = self.setting.budget
        about: dict[str, Any] = {"folder": str(self.folder), "one_thread": budget.one_thread}
        if self.arm is None:
            return {**about, "kind": "bank", "n_crops": budget.bank[0] if budget.bank else 0}
        line = {
            "experiment": self.arm.experiment,
            "arm": self.arm.label,
            "seed": self.arm.seed,
            "budget": budget.name,
            "published": dict(self.arm.published),
            "fingerprint": self.arm.fingerprint,
        }
        return {**about, "kind": "run", "line": line, "test_stride": self.arm.test_stride, "keeps_network": self.keeps_network}


def tasks_left(arms: Sequence[Arm], lines: Sequence[Line], setting: Setting) -> list[Task]:
    """The tasks for those `arms` that have no line yet, each after what it needs and what is not there."""
    left = [arm for arm in arms if line_of(lines, arm, setting.budget.name) is None]
    tasks: dict[str, Task] = {}
    for arm in left:
        _add_needs(arm.config, setting, tasks)
    for arm in left:
        name = f"{arm.experiment}, {arm.label}, seed {arm.seed}"
        slug = re.sub(r"[^a-z0-9.]+", "-", arm.label.lower()).strip("-")
        folder = setting.places.runs / setting.budget.name / f"{arm.experiment}-{slug}-{arm.seed}-{arm.fingerprint[:8]}"
        tasks.setdefault(str(folder), Task(name, folder, arm.config, arm, False, setting))
    return list(tasks.values())


def estimate(tasks: Sequence[Task], lines: Sequence[Line], *, n_jobs: int) -> str:
    """How many runs and steps are left, and about how many hours, where runs of that width have been timed."""
    arms = [task.arm for task in tasks if task.arm]
    n_banks = len(tasks) - len(arms)
    steps = sum(arm.config.optim.steps for arm in arms)
    text = f"{len(arms)} runs left, {steps:,} steps" + (f", and {n_banks} banks" if n_banks else "")
    timed: dict[int, list[float]] = {}
    for line in lines:
        if tasks and line["budget"] == tasks[0].setting.budget.name and line.get("width"):
            timed.setdefault(line["width"], []).append(1 / line["steps_per_s"])
    known = [arm for arm in arms if arm.config.width in timed]
    if not known:
        return text
    seconds = sum(arm.config.optim.steps * statistics.median(timed[arm.config.width]) for arm in known)
    among = "" if len(known) == len(arms) else f" for {len(known)} of them, the others' widths have not been timed"
    return f"{text}; about {seconds / 3600 / n_jobs:.1f} hours{among}"


def _add_needs(config: RunConfig, setting: Setting, tasks: dict[str, Task]) -> None:
    """Add what makes the teachers and the bank of a configuration, unless they are there."""
    rows, known_banks = teachers(setting), banks(setting)
    for name in _named(config):
        folder = Path(name)
        if name in tasks or _is_made(folder):
            continue
        if name in known_banks:
            _add_needs(known_banks[name], setting, tasks)
            tasks[name] = Task(f"bank {folder.name}", folder, known_banks[name], None, False, setting)
        elif name in rows:
            _add_needs(rows[name].config, setting, tasks)
            arm = Arm(
                experiment=TEACHERS,
                label=rows[name].label,
                seed=rows[name].config.seed,
                config=rows[name].config,
                published=rows[name].published,
                test_stride=setting.budget.test_stride,
            )
            tasks[name] = Task(f"teacher {folder.name}", folder, arm.config, arm, True, setting)


def _named(config: RunConfig) -> list[str]:
    return [name for name in (*config.teachers, config.data.bank) if name]


def _is_made(folder: Path) -> bool:
    """A teacher's checkpoint is removed once its line is kept."""
    ended = (folder / RESULT_FILE).exists() and not (folder / CHECKPOINT_FILE).exists()
    return ended or (folder / BANK_FILE).exists()
