"""One job in a process of its own: a run with all its figures, or a bank.

    python -m reproduction.worker JOB.json

Exit codes: 0 done, the line lies in JOB.line.json; 1 an error, its sentence is the last line of stderr; 130 and 143 stopped
and resumable.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdunet.bank import make_bank
from kdunet.checkpoint import NETWORK_FILE, load_network, write_whole
from kdunet.collapse import Collapse, constant_floor
from kdunet.config import RunConfig
from kdunet.data import Annotated, read_annotated
from kdunet.evaluate import answers
from kdunet.fit import Progress, fit
from kdunet.interrupts import EXIT_BY_SIGNAL
from kdunet.measures import EXAMPLES_FILE, RESULT_FILE, UNSEEN_FILE, MeasureWindows, UnseenLog, best_window
from kdunet.records import METRICS_FILE
from kdunet.unet import UNet, n_parameters
from kdunet_infer.errors import KdunetError, TrainingError
from kdunet_infer.metrics import CrossEntropy, ProbabilityHistogram

DIVERGED = re.compile(r"the (loss|gradient) is \S+ at step \d+")
"""How `fit` says that a loss is no number any more: a result of an experiment, not a failure of this tool."""
CURVE_POINTS = 60
"""Of a training curve in a line."""


def main(job_file: Path) -> int:
    """Do what the file says; returns the exit code."""
    job = json.loads(job_file.read_text(encoding="utf-8"))
    if job["one_thread"]:
        torch.set_num_threads(1)
    config = RunConfig.from_toml(job_file.with_suffix(".toml"))
    try:
        if job["kind"] == "bank":
            make_bank(config, Path(job["folder"]), n_crops=job["n_crops"])
            return 0
        return _run(config, Path(job["folder"]), job, job_file.with_suffix(".line.json"))
    except KdunetError as exc:
        print(exc, file=sys.stderr)
        return 1


def _run(config: RunConfig, folder: Path, job: dict[str, Any], line_file: Path) -> int:
    began, clock = time.monotonic(), folder.with_suffix(".seconds")
    diverged, stopped_by = None, ""
    try:
        if not (folder / RESULT_FILE).exists():
            stopped_by = fit(config, folder, progress=_stop_without(os.getppid())).stopped_by
    except TrainingError as exc:
        if not DIVERGED.match(str(exc)):
            raise
        diverged = str(exc)
    finally:
        seconds = time.monotonic() - began + (float(clock.read_text()) if clock.exists() else 0.0)
        clock.write_text(repr(seconds))
    if stopped_by in EXIT_BY_SIGNAL:
        return EXIT_BY_SIGNAL[stopped_by]
    line = {
        **job["line"],
        "diverged": diverged,
        **(ended_run(config, folder, job["test_stride"]) if diverged is None else {}),
        "seconds": round(seconds, 1),
        "steps_per_s": round(config.optim.steps / seconds, 3),
        "torch": torch.__version__,
    }
    if job["keeps_network"] and line.get("collapsed"):
        raise TrainingError(f"{line['collapsed']} It cannot teach; remove {folder} to train it again.")
    write_whole(line_file, (json.dumps(line) + "\n").encode())
    return 0


def _stop_without(parent: int) -> Callable[[Progress], None]:
    """Stops the run once its parent is gone: nobody would write its line, and another parent would start it again."""

    def watch(_: Progress) -> None:
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return watch


def ended_run(config: RunConfig, folder: Path, test_stride: int) -> dict[str, Any]:
    """The figures of a run that has ended.

    The network and its threshold are those that validation chose; the test set is scored once, here.
    """
    result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    windows = MeasureWindows.scaled(config.optim.steps, config.data.batch, every=config.unseen.every)
    examples = UnseenLog.read(folder / EXAMPLES_FILE)
    network, _ = load_network(folder / NETWORK_FILE)
    found: dict[str, Any] = {
        "steps": result["step"],
        "width": config.width,
        "n_parameters": n_parameters(network),
        "validation": result["best"],
        "collapsed": str(Collapse(**result["collapse"])) if result["collapse"] else None,
        "restarts": result["n_restarts"],
        "windows": asdict(windows),
        "loss_train": best_window([value for _, value in examples], windows.alpha_t)[0],
        "loss_train_terms": last_terms(folder / METRICS_FILE),
        "loss_test": None,
        "test": None,
    }
    curves = {"validation": validations(folder / METRICS_FILE), "train": thinned(examples), "test": []}
    if config.unseen.images:
        unseen = UnseenLog.read(folder / UNSEEN_FILE)
        found["loss_test"] = best_window([value for _, value in unseen], windows.beta_t)[0]
        curves["test"] = [[step, round(value, 6)] for step, value in unseen]
        found["test"] = _test(network, config, result["best"]["threshold"], test_stride)
    return found | {"curves": curves}


def _test(network: UNet, config: RunConfig, threshold: float, stride: int) -> dict[str, Any]:
    whole = read_annotated(
        config.unseen.images, config.unseen.labels, foreground=config.data.foreground, ignore=config.data.ignore
    )
    slab = Annotated(whole.images[::stride], whole.truth[::stride])
    device = torch.device("cuda" if config.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    histogram, cross_entropy = ProbabilityHistogram(), CrossEntropy()
    for probability, truth in answers(network.to(device), slab, device=device):
        histogram.add(probability, truth)
        cross_entropy.add(probability, truth)
    return {
        "iou": histogram.iou_at([threshold])[0],
        "threshold": threshold,
        "cross_entropy": cross_entropy.mean(),
        "constant_floor": constant_floor(slab.foreground_fraction, (1.0, 1.0)),
        "n_slices": len(slab.images),
    }


def validations(metrics: Path) -> list[list[float]]:
    """Rows of (step, IoU, cross-entropy) of a run's metrics file."""
    found: dict[int, dict[str, float]] = {}
    for step, name, value in _metrics(metrics):
        if name in ("iou", "cross_entropy"):
            found.setdefault(step, {})[name] = value
    return [[step, values["iou"], values["cross_entropy"]] for step, values in sorted(found.items())]


def last_terms(metrics: Path) -> dict[str, float]:
    """The mean of each term of the training loss over the last tenth of a run's rows that have it."""
    found: dict[str, list[float]] = {}
    for _, name, value in _metrics(metrics):
        if name in ("hard", "soft", "dice"):
            found.setdefault(name, []).append(value)
    return {name: float(np.mean(values[-max(1, len(values) // 10) :])) for name, values in found.items()}


def thinned(curve: Sequence[tuple[int, float]], n_points: int = CURVE_POINTS) -> list[list[float]]:
    """A curve of (step, value) as the means of at most `n_points` equal pieces, each at its last step."""
    pieces = np.array_split(np.array(curve, float), min(n_points, len(curve)))
    return [[int(piece[-1, 0]), round(float(piece[:, 1].mean()), 6)] for piece in pieces]


def _metrics(path: Path) -> Iterator[tuple[int, str, float]]:
    with path.open(newline="", encoding="utf-8") as file:
        for step, name, value in csv.reader(file):
            if step.isdigit():
                yield int(step), name, float(value)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
