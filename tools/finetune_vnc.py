"""What a few annotated slices are worth: a student of the hippocampus (EPFL) on fly neuropil (VNC), fine-tuned or trained anew.

    python tools/finetune_vnc.py ../shared/data/vnc

Each number of slices and seed is run twice on the same crops for as many steps: from the released student, and from random
weights. All are measured on slices 10 to 13; slice 9 is a gap. Each finished run is a line of docs/results/finetune.jsonl;
Ctrl-C stops, and the same command goes on. Prints a table. Fine-tuned models stay in RUNS: the VNC data are for
non-commercial use, so nothing derived from them is released.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import tifffile

from kdunet.before_after import Score, score
from kdunet.checkpoint import load_network
from kdunet.config import OptimConfig, RunConfig
from kdunet.data import load_annotated
from kdunet.finetune import RUN_FOLDER, Finetuned, finetune
from kdunet.finetune_config import FINETUNE
from kdunet.fit import CONFIG_FILE, fit
from kdunet.measures import RESULT_FILE
from kdunet_infer.errors import KdunetError
from kdunet_infer.model import Model

PARENT = "mito-epfl-2unet"
SLICES: Mapping[int, Sequence[int]] = {1: (4,), 3: (0, 4, 7), 8: tuple(range(8))}
"""Number of annotated slices -> which; each set holds the smaller ones."""
VALIDATION = 10, 14
IGNORED_VALUE = 1
"""Of labels that are 0 and 255."""
SCRATCH_LEARNING_RATE = OptimConfig().learning_rate
FINETUNED, SCRATCH, UNCHANGED = "fine-tuned", "from scratch", "unchanged"

Line = dict[str, Any]


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--steps", default=FINETUNE.optim.steps, show_default=True)
@click.option("--seeds", default=3, show_default=True, help="Runs of each kind.")
@click.option("--runs", type=click.Path(path_type=Path), default="runs/finetune-vnc", show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default="docs/results/finetune.jsonl", show_default=True)
def main(data: Path, steps: int, seeds: int, runs: Path, results: Path) -> None:
    """Run what is not in RESULTS yet, then print the table."""
    try:
        for n_slices in SLICES:
            for seed in range(seeds):
                if not run_pair(data, runs, results, n_slices=n_slices, seed=seed, steps=steps):
                    click.echo("stopped; the same command goes on.")
                    return
    except KdunetError as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(table(read_lines(results), steps))


def run_pair(data: Path, runs: Path, results: Path, *, n_slices: int, seed: int, steps: int) -> bool:
    """Both runs of one seed, each a line of `results` once it has ended; False where one was stopped."""
    there = {(line["arm"], line["n_slices"], line["seed"], line["steps"]) for line in read_lines(results)}
    folder = runs / f"{n_slices}-slices-{steps}-steps-seed{seed}"
    about = {"n_slices": n_slices, "slices": list(SLICES[n_slices]), "seed": seed, "steps": steps}
    asked = FINETUNE.replaced(
        {
            "data.images": str(data / "raw.tif"),
            "data.labels": str(write_labels(data, runs, n_slices)),
            "data.foreground": 255,
            "data.ignore": IGNORED_VALUE,
            "data.validation_slices": VALIDATION,
            "optim.steps": steps,
            "seed": seed,
        }
    )
    if (FINETUNED, n_slices, seed, steps) not in there:
        began = time.monotonic()
        result = finetune(Model.load(PARENT), asked, folder, progress=show(folder.name))
        if not isinstance(result, Finetuned):
            return False
        found = result.comparison
        if not any(line["arm"] == UNCHANGED for line in read_lines(results)):
            add_line(results, UNCHANGED, found.before, {"n_slices": 0, "slices": [], "seed": 0, "steps": 0})
        told = about | {"learning_rate": asked.optim.learning_rate, "kept_step": found.step, "minutes": minutes(began)}
        add_line(results, FINETUNED, found.after, told)
    if (SCRATCH, n_slices, seed, steps) not in there:
        began = time.monotonic()
        config = RunConfig.from_toml(folder / RUN_FOLDER / CONFIG_FILE).replaced(
            {"start": "", "optim.learning_rate": SCRATCH_LEARNING_RATE}
        )
        run = folder / "scratch"
        if not (run / RESULT_FILE).exists() and not fit(config, run, progress=show(f"{folder.name} {SCRATCH}")).finished:
            return False
        network, of_run = load_network(run)
        found_after = score(network, load_annotated(config.data)[1], of_run["validation"]["threshold"])
        told = about | {"learning_rate": SCRATCH_LEARNING_RATE, "kept_step": of_run["step"], "minutes": minutes(began)}
        add_line(results, SCRATCH, found_after, told)
    return True


def write_labels(data: Path, runs: Path, n_slices: int) -> Path:
    """The labels (z, y, x) of which all but the chosen slices and those to validate on are IGNORED_VALUE."""
    labels = tifffile.imread(data / "mitochondria.tif")
    kept = [*SLICES[n_slices], *range(*VALIDATION)]
    labels[np.setdiff1d(np.arange(len(labels)), kept)] = IGNORED_VALUE
    path = runs / f"labels-{n_slices}.tif"
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, labels, photometric="minisblack")
    return path


def table(lines: Sequence[Line], steps: int) -> str:
    """Mean and standard deviation over seeds of the IoU on the held-out slices, as markdown."""
    return "\n".join(_rows(lines, steps))


def _rows(lines: Sequence[Line], steps: int) -> Iterator[str]:
    yield f"| annotated slices | {PARENT} {FINETUNED} | {SCRATCH} |"
    yield "|---|---|---|"
    for line in lines:
        if line["arm"] == UNCHANGED:
            yield f"| none | {line['iou']:.3f} ({line['iou_at_own_threshold']:.3f} at its own threshold) | |"
    for n_slices in sorted({line["n_slices"] for line in lines if line["steps"] == steps}):
        cells = [
            _cell([line["iou"] for line in lines if (line["arm"], line["n_slices"], line["steps"]) == (arm, n_slices, steps)])
            for arm in (FINETUNED, SCRATCH)
        ]
        yield f"| {n_slices} | {' | '.join(cells)} |"


def _cell(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.3f}" for value in values)
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f} (n = {len(values)})"


def read_lines(results: Path) -> list[Line]:
    """What has been measured, in order."""
    return [json.loads(text) for text in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []


def add_line(results: Path, arm: str, found: Score, told: Line) -> None:
    """Append one run; `iou` is that at the best threshold on the held-out slices, the fairest to all arms."""
    line = {
        "arm": arm, **told, "iou": found.best_iou, "threshold": found.best_threshold,
        "iou_at_own_threshold": found.iou_at_own, "own_threshold": found.own_threshold,
    }  # fmt: skip
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    click.echo(f"{arm}: {line}")


def minutes(began: float) -> float:
    """Since `began`, of this call alone."""
    return round((time.monotonic() - began) / 60, 2)


def show(name: str) -> Callable[[Any], None]:
    """Says now and then how far a run is."""
    return lambda progress: click.echo(f"{name}: {progress}", err=True) if progress.step % 100 == 0 else None


if __name__ == "__main__":
    main()
