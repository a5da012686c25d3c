"""What averaging over flips and planes is worth: IoU at the card's threshold, apart from the plain figures.

    python tools/averaging.py VOLUME.tif TRUTH.tif --model mito-epfl-2unet [--average flips] [--json]

    none     each slice once, as `kdunet-infer segment` does
    flips    the mean over the eight flips and quarter turns of each slice
    planes   the mean over the xy, xz and yz slices; for isotropic volumes
    both     the eight flips and turns of the slices of all three planes

Means are of margins (log odds). Slices are mirrored and run whole. For a network in training:

    averaged_margins(volume, lambda image: slice_margin(network, image, device=device), "flips")
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from kdunet.data import Annotated, read_annotated
from kdunet.losses import IGNORED
from kdunet_infer.blockwise import Engine, Float32Array, UInt8Array
from kdunet_infer.card import ModelCard
from kdunet_infer.engines import create_engine
from kdunet_infer.errors import ConfigError, KdunetError
from kdunet_infer.metrics import confusion
from kdunet_infer.model import Model
from kdunet_infer.testing import segment_whole

Ask = Callable[[UInt8Array], Float32Array]
"""A slice (y, x) uint8 -> margins (y, x) float32, of any size."""

AVERAGES = ("none", "flips", "planes", "both")
PLANES = ((0, 1, 2), (1, 0, 2), (2, 0, 1))
"""Of zyx: the axis along which slices follow each other, and the two that they lie in."""
SMALLEST = 1e-7
"""Probabilities are cut to this and 1 less this before their margin is taken: float32 knows no better near 1."""


def averaged_margins(volume: UInt8Array, ask: Ask, average: str) -> Float32Array:
    """Margins (z, y, x) of `volume` (z, y, x), averaged as one of AVERAGES says. Raises ConfigError for another word."""
    if average not in AVERAGES:
        raise ConfigError(f"average is {average!r}; choose {', '.join(AVERAGES[:-1])} or {AVERAGES[-1]}.")
    ask = over_flips(ask) if average in ("flips", "both") else ask
    planes = PLANES if average in ("planes", "both") else PLANES[:1]
    total = np.zeros(volume.shape, np.float32)
    for order in planes:
        for into, image in zip(total.transpose(order), volume.transpose(order), strict=True):
            into += ask(np.ascontiguousarray(image))
    return total / np.float32(len(planes))


def over_flips(ask: Ask) -> Ask:
    """The mean of the answers to the eight flips and quarter turns of a slice, each turned back."""

    def answer(image: UInt8Array) -> Float32Array:
        total = np.zeros(image.shape, np.float32)
        for turns in range(4):
            for step in (1, -1):
                seen = np.rot90(image, turns)[:, ::step]
                total += np.rot90(ask(np.ascontiguousarray(seen))[:, ::step], -turns)
        return total / np.float32(8)

    return answer


def engine_ask(engine: Engine, card: ModelCard) -> Ask:
    """Ask an engine: whole mirrored slices, margins within the 16 that float32 probabilities can tell."""

    def answer(image: UInt8Array) -> Float32Array:
        p = segment_whole(image[None], engine, card)[0].clip(SMALLEST, 1 - SMALLEST)
        margins: Float32Array = np.log(p) - np.log1p(-p)
        return margins

    return answer


def score(slab: Annotated, ask: Ask, *, threshold: float, average: str) -> dict[str, Any]:
    """IoU and Dice of the annotated voxels of `slab` at `threshold` of the probability, and the seconds that it took."""
    began = time.perf_counter()
    margins = averaged_margins(slab.images, ask, average)
    seconds = time.perf_counter() - began
    annotated = slab.truth != IGNORED
    mask = margins >= np.float32(np.log(threshold / (1 - threshold)))
    counts = confusion(mask[annotated], slab.truth[annotated])
    return {"average": average, "iou": counts.iou, "dice": counts.dice, "seconds": round(seconds, 2)}


@click.command()
@click.argument("volume", type=click.Path(path_type=Path))
@click.argument("truth", type=click.Path(path_type=Path))
@click.option("--model", "name", default="mito-epfl-2unet", show_default=True, help="A released model or an ONNX file.")
@click.option(
    "--average", "averages", multiple=True, type=click.Choice(AVERAGES), help="May be repeated. [default: each of them]"
)
@click.option("--engine", default="native", show_default=True)
@click.option("--threads", "n_threads", type=int, help="[default: the engine's]")
@click.option("--foreground", type=int, help="The value of TRUTH that is foreground. [default: the only one beside 0]")
@click.option("--ignore", type=int, help="The value of TRUTH that nobody annotated.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def main(
    volume: Path,
    truth: Path,
    name: str,
    averages: tuple[str, ...],
    engine: str,
    n_threads: int | None,
    foreground: int | None,
    ignore: int | None,
    as_json: bool,
) -> None:
    """IoU of VOLUME (TIFF, uint8) against TRUTH (TIFF) at the model's threshold, for each average."""
    try:
        model = Model.load(name)
        slab = read_annotated(str(volume), str(truth), foreground=foreground, ignore=ignore)
        ask = engine_ask(create_engine(engine, model, n_threads=n_threads), model.card)
        for average in averages or AVERAGES:
            found = score(slab, ask, threshold=model.card.threshold, average=average)
            about = {"model": model.card.name, "version": model.card.version, "sha256": model.sha256}
            line = f"{average:8} IoU {found['iou']:.4f}  Dice {found['dice']:.4f}  {found['seconds']:.1f} s"
            click.echo(json.dumps({**about, "threshold": model.card.threshold, **found}) if as_json else line)
    except KdunetError as exc:
        raise click.ClickException(str(exc)) from exc


if __name__ == "__main__":
    main()
