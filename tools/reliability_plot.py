"""Draws how far probabilities can be believed: predicted against observed share of foreground, before and after calibration.

    python tools/reliability_plot.py ../shared/data/epfl --model mito-epfl-2unet [--model ...] [-o docs/results/reliability.png]

Answers come from an engine of kdunet_infer. Where a model's card says how it was calibrated, that is undone for `before`;
where it says nothing, `after` is a fit to the validation slices made here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from averaging import Ask, engine_ask

from kdunet.calibration import Calibration, MarginHistogram, fitted
from kdunet.config import DataConfig
from kdunet.data import Annotated, load_annotated, read_annotated
from kdunet_infer.engines import create_engine
from kdunet_infer.errors import KdunetError
from kdunet_infer.model import Model

TRAIN_SLICES, VALIDATION_SLICES = (0, 135), (145, 165)
BEFORE, AFTER = "before", "after"
COLOURS = {BEFORE: "tab:orange", AFTER: "tab:blue"}


@dataclass(frozen=True, slots=True)
class Answers:
    """A model's margins, as they were before any calibration, on some slabs."""

    model: Model
    scale: float
    offset: float
    """Of the calibration: the card's, or one fitted to the validation slices."""
    histograms: Mapping[str, MarginHistogram]
    """Of each slab, by name."""


def answers(model: Model, slabs: Mapping[str, Annotated], *, engine: str = "native", n_threads: int | None = None) -> Answers:
    """Run `model` over `slabs`, the first of which is what a calibration is fitted to where the card has none."""
    told = model.card.provenance.get("calibration", {"scale": 1.0, "offset": 0.0})
    ask = engine_ask(create_engine(engine, model, n_threads=n_threads), model.card)
    histograms = {name: _histogram(slab, ask, told["scale"], told["offset"]) for name, slab in slabs.items()}
    if "calibration" in model.card.provenance:
        return Answers(model, told["scale"], told["offset"], histograms)
    found: Calibration = fitted(next(iter(histograms.values())))
    return Answers(model, found.scale, found.offset, histograms)


def _histogram(slab: Annotated, ask: Ask, scale: float, offset: float) -> MarginHistogram:
    histogram = MarginHistogram()
    for image, truth in zip(slab.images, slab.truth, strict=True):
        histogram.add((ask(image) - offset) / scale, truth)
    return histogram


def draw(rows: list[Answers], path: Path) -> None:
    """A row for each model, a column for each slab; below each the voxels in each bin."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    n_columns = len(rows[0].histograms)
    figure, axes = pyplot.subplots(
        2 * len(rows), n_columns, figsize=(4.4 * n_columns, 5.2 * len(rows)), squeeze=False, sharex=True, sharey="row",
        height_ratios=[4, 1] * len(rows), layout="constrained",
    )  # fmt: skip
    for i, row in enumerate(rows):
        for j, (name, histogram) in enumerate(row.histograms.items()):
            panel, counts = axes[2 * i][j], axes[2 * i + 1][j]
            _panel(panel, counts, histogram, {BEFORE: (1.0, 0.0), AFTER: (row.scale, row.offset)})
            panel.set_title(f"{row.model.card.name} {row.model.card.version}, {name}", fontsize=10)
            if j == 0:
                panel.set_ylabel("observed share of foreground")
                counts.set_ylabel("voxels")
            if i == len(rows) - 1:
                counts.set_xlabel("predicted probability")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(panel: Any, counts: Any, histogram: MarginHistogram, maps: Mapping[str, tuple[float, float]]) -> None:
    panel.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":", label="what a probability promises")
    for name, (scale, offset) in maps.items():
        table, entropy = histogram.reliability(scale, offset), histogram.cross_entropy(scale, offset)
        label = f"{name}: ECE {table.expected_error:.4f}, cross-entropy {entropy:.4f}"
        panel.plot(table.predicted, table.observed, marker="o", markersize=4, color=COLOURS[name], label=label)
        edges = [k / len(table.count) for k in range(len(table.count) + 1)]
        counts.stairs(table.count, edges, color=COLOURS[name])
    panel.set(xlim=(0, 1), ylim=(0, 1))
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="upper left")
    counts.set_yscale("log")
    counts.grid(alpha=0.3)


def epfl_slabs(data: Path) -> dict[str, Annotated]:
    """The validation slices of the training sub-volume, and the test slices."""
    config = DataConfig(
        images=str(data / "training.tif"),
        labels=str(data / "training_groundtruth.tif"),
        train_slices=TRAIN_SLICES,
        validation_slices=VALIDATION_SLICES,
    )
    _, validation = load_annotated(config)
    test = read_annotated(str(data / "testing.tif"), str(data / "testing_groundtruth.tif"))
    return {"validation slices": validation, "test slices": test}


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--model", "names", multiple=True, default=("mito-epfl-2unet",), show_default=True, help="May be repeated.")
@click.option("--engine", default="native", show_default=True)
@click.option("--threads", "n_threads", type=int, help="[default: the engine's]")
@click.option("-o", "--out", type=click.Path(path_type=Path), default="docs/results/reliability.png", show_default=True)
def main(data: Path, names: tuple[str, ...], engine: str, n_threads: int | None, out: Path) -> None:
    """Draw OUT from the slices in the folder DATA (training.tif, testing.tif and their _groundtruth.tif)."""
    try:
        slabs = epfl_slabs(data)
        rows = [answers(Model.load(name), slabs, engine=engine, n_threads=n_threads) for name in names]
    except KdunetError as exc:
        raise click.ClickException(str(exc)) from exc
    draw(rows, out)
    for row in rows:
        for name, histogram in row.histograms.items():
            before, after = (histogram.reliability(*chosen).expected_error for chosen in ((1.0, 0.0), (row.scale, row.offset)))
            click.echo(f"{row.model.card.name:20} {name:18} ECE {before:.4f} -> {after:.4f}")
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
