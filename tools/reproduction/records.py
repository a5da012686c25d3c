"""One JSON line for each finished run, in a file for each experiment; a rerun goes on where the file ends."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdunet_infer.errors import TrainingError
from reproduction.setting import Arm

Line = Mapping[str, Any]


def read_lines(path: Path) -> list[Line]:
    """The lines of a file, none where it is missing; a last line that a crash has cut short is cut off the file.

    Raises TrainingError for any other line that is no JSON object.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    return [_parsed(path, number, text) for number, text in enumerate(whole.splitlines(), start=1)]


def append_line(path: Path, line: Line) -> None:
    """Add a line; on the disk when it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def line_of(lines: Sequence[Line], arm: Arm, budget: str) -> Line | None:
    """The newest line of that very run, whichever experiment it was made for; None where there is none.

    Equal configurations give equal results, so that an experiment may use a run of another.
    """
    wanted = (arm.seed, budget, arm.fingerprint)
    return next((line for line in reversed(lines) if (line["seed"], line["budget"], line["fingerprint"]) == wanted), None)


def of_experiment(arms: Sequence[Arm], lines: Sequence[Line], budget: str) -> list[Line]:
    """The lines of an experiment's finished runs in its own order; those made for another experiment renamed to this one."""
    found = ((arm, line_of(lines, arm, budget)) for arm in arms)
    return [
        {**line, "experiment": arm.experiment, "arm": arm.label, "published": dict(arm.published)}
        for arm, line in found
        if line is not None
    ]


def _parsed(path: Path, number: int, text: bytes) -> Line:
    try:
        line = json.loads(text)
        missing = {"experiment", "arm", "seed", "budget", "fingerprint"} - line.keys()
    except (ValueError, AttributeError):
        line, missing = {}, {"JSON"}
    if missing:
        raise TrainingError(f"line {number} of {path} lacks {', '.join(sorted(missing))}; remove that line and run again.")
    return dict(line)
