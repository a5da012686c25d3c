"""Jobs in processes of their own, some at once, each after those it needs; Ctrl-C stops all of them where they can go on."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdunet.interrupts import stop_requests

POLL_SECONDS = 0.1
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MKL_NUM_THREADS": "1"}
"""The environment of a job that shares the processor with others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A command."""

    name: str
    """For messages."""
    command: Sequence[str]
    log: Path
    """Gets what it writes; the last line of a failed one is its sentence."""
    makes: str
    """What others may need."""
    needs: frozenset[str] = frozenset()
    one_thread: bool = True


@dataclass(slots=True)
class Outcome:
    """How a list of jobs ended."""

    stopped_by: str = ""
    """The name of the signal that stopped them, or ""."""
    failed: dict[str, str] = field(default_factory=dict)
    """What was to be made -> the sentence of why it was not."""


def run_jobs(jobs: Sequence[Job], *, at_once: int, done: Callable[[Job], None], failed: Callable[[Job, str], None]) -> Outcome:
    """Run all jobs, in order as far as their needs allow; a failed one takes along those that need it, and no other.

    `done` and `failed` are called in this process as jobs end.
    """
    pool = _Pool(jobs, at_once=at_once, done=done, failed=failed)
    with stop_requests() as stop:
        while pool.running or (pool.waiting and not stop):
            if stop:
                pool.stop(stop[0])
            else:
                pool.start_some()
            time.sleep(POLL_SECONDS if pool.running else 0)
            pool.collect()
    return pool.outcome


class _Pool:
    def __init__(
        self, jobs: Sequence[Job], *, at_once: int, done: Callable[[Job], None], failed: Callable[[Job, str], None]
    ) -> None:
        self.waiting, self.at_once, self.done, self.failed = list(jobs), at_once, done, failed
        self.running: dict[subprocess.Popen[bytes], Job] = {}
        self.outcome = Outcome()

    def start_some(self) -> None:
        """Start what has its needs, up to the limit; give up what never will."""
        for job in list(self.waiting):
            unmade = {other.makes for other in (*self.waiting, *self.running.values())}
            if lost := job.needs & self.outcome.failed.keys():
                self.waiting.remove(job)
                self._give_up(job, f"needs {min(lost)}, which could not be made")
            elif len(self.running) < self.at_once and not job.needs & unmade:
                self.waiting.remove(job)
                self.running[_started(job)] = job

    def collect(self) -> None:
        """Report those that have ended."""
        for process in [process for process in self.running if process.poll() is not None]:
            job = self.running.pop(process)
            if process.returncode == 0:
                self.done(job)
            elif not self.outcome.stopped_by:
                self._give_up(job, last_sentence(job.log) or f"ended with {process.returncode}")

    def stop(self, signal_name: str) -> None:
        """Ask all that run to stop, once."""
        if not self.outcome.stopped_by:
            self.outcome.stopped_by = signal_name
            for process in self.running:
                process.terminate()

    def _give_up(self, job: Job, sentence: str) -> None:
        self.outcome.failed[job.makes] = sentence
        self.failed(job, sentence)


def last_sentence(log: Path) -> str:
    """The last line of a file that says something, or ""."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _started(job: Job) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        # a session of its own: Ctrl-C in a terminal reaches this process alone, which tells the others once
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | (ONE_THREAD if job.one_thread else {}),
            start_new_session=True,
        )
