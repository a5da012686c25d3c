"""How fast engines run a model on this machine, measured side by side. Knows no files and no command line.

What counts is what `segment` gets: pixels of cores, from tiles that carry their halo. The halo is worked for and not counted.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kdunet_infer.blockwise import Engine, Float32Array, UInt8Array, batch_size_of, infer_window
from kdunet_infer.engines import ENGINES, create_engine
from kdunet_infer.errors import EngineError
from kdunet_infer.geometry import Box
from kdunet_infer.model import Model
from kdunet_infer.phantom import phantom_box
from kdunet_infer.plan import YX

SLICE_SHAPE: YX = (768, 1024)
"""Of one slice of the EPFL volume: what the figures in docs/performance.md are for."""
N_ROUNDS = 5
REFERENCE = "onnxruntime"
"""What every engine is compared with."""

VARIANTS: Mapping[str, tuple[dict[str, Any], ...]] = {
    "onnxruntime": ({"device": "cpu"}, {"device": "cuda"}),
    "openvino": ({}, {"precision": "bf16"}),
}
"""Options that an engine is measured with; without any where it is not listed."""
PLAIN = ("cpu",)
"""Options that need no name."""

PHANTOM_SIDE = 128
"""Pixels of the synthetic patch that slices are mirrored from: a whole slice of the phantom takes 15 seconds."""
REST = 0.02
"""Seconds between two turns: the threads of some runtimes go on spinning for a while, and would take a CPU from the next."""


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine of the table, and the options it is measured with."""

    engine: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`openvino bf16`."""
        return " ".join([self.engine, *(str(value) for value in self.options.values() if value not in PLAIN)])


@dataclass(frozen=True, slots=True)
class Speed:
    """What one contender did, or why it did nothing."""

    name: str
    pixels_per_second: float = 0.0
    """Median of the rounds; 0 where it cannot run."""
    description: str = ""
    refusal: str = ""


def contenders() -> Iterator[Contender]:
    """Every engine of the table, in each of its variants."""
    for engine in ENGINES:
        for options in VARIANTS.get(engine, ({},)):
            yield Contender(engine, options)


def measure(
    model: Model,
    engines: Sequence[Contender],
    *,
    size: YX = SLICE_SHAPE,
    n_tiles: int = 2,
    n_threads: int | None = None,
    seconds: float = 2.0,
) -> list[Speed]:
    """Measure `engines` in turns, on synthetic slices of `size` rounded up to the model's stride.

    `seconds` is how long each is measured in all, and at least once a round. Raises no EngineError: what cannot run is
    returned with its sentence.
    """
    stride, margins = model.card.stride_zyx[1:], model.card.halo_zyx[1:]
    height, width = (-(-n // s) * s for n, s in zip(size, stride, strict=True))
    tiles = mirrored(synthetic_slices(n_tiles, (height, width)), margins)
    runs: dict[str, Callable[[], object]] = {}
    n_pixels: dict[str, int] = {}
    found: dict[str, Speed] = {}
    for contender in engines:
        try:
            engine = create_engine(contender.engine, model, n_threads=n_threads, **contender.options)
            run, n_at_once = core_run(engine, tiles, margins)
            run()
        except EngineError as exc:
            found[contender.name] = Speed(contender.name, refusal=str(exc))
        else:
            found[contender.name] = Speed(contender.name, description=engine.describe())
            runs[contender.name] = run
            n_pixels[contender.name] = n_at_once * height * width
    for name, times in race(runs, seconds=seconds).items():
        found[name] = Speed(name, n_pixels[name] / statistics.median(times), found[name].description)
    return list(found.values())


def race(runs: Mapping[str, Callable[[], object]], *, seconds: float, n_rounds: int = N_ROUNDS) -> dict[str, list[float]]:
    """Seconds of a call of each run, one figure a round; each has been called before, so that it is warm.

    Round by round every run has its turn, so that whatever else the machine does hits all alike. A turn is as many calls as
    fit into its share of `seconds`, and at least one.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(n_rounds):
        for name, run in runs.items():
            time.sleep(REST)
            times[name].append(_turn(run, seconds / n_rounds))
    return times


def _turn(run: Callable[[], object], seconds: float) -> float:
    """Seconds a call."""
    n_calls, elapsed, began = 0, 0.0, time.perf_counter()
    while not n_calls or elapsed < seconds:
        run()
        n_calls += 1
        elapsed = time.perf_counter() - began
    return elapsed / n_calls


def core_run(engine: Engine, tiles: UInt8Array, margins: YX) -> tuple[Callable[[], Float32Array], int]:
    """A call without arguments that computes the cores (n, y, x) of the next n of `tiles`, again and again; and n.

    As a run does: as many tiles at once as the engine asks for, through `blockwise.infer_window`. Probabilities of every
    engine, so that the work is the same.
    """
    n = batch_size_of(engine)
    indices = np.arange(math.lcm(n, len(tiles))).reshape(-1, n) % len(tiles)
    turn = itertools.cycle([tiles[chosen] for chosen in indices])
    rows, columns = ((margin, length - margin) for margin, length in zip(margins, tiles.shape[1:], strict=True))
    return lambda: infer_window(engine, next(turn), rows, columns), n


def mirrored(slices: UInt8Array, margins: YX) -> UInt8Array:
    """Slices (n, y, x) with a halo of `margins` pixels, in which the image is mirrored as beyond a volume's faces."""
    return np.pad(slices, ((0, 0), *((margin, margin) for margin in margins)), mode="reflect")


def synthetic_slices(n: int, size: YX) -> UInt8Array:
    """Slices (n, y, x) uint8 that look like electron microscopy and cost little: a patch of the phantom, mirrored on and on."""
    patch, _ = phantom_box(Box((0, 0, 0), (n, PHANTOM_SIDE, PHANTOM_SIDE)), seed=0)
    y, x = (max(0, length - PHANTOM_SIDE) for length in size)
    return np.pad(patch, ((0, 0), (0, y), (0, x)), mode="reflect")[:, : size[0], : size[1]]


def table(speeds: Sequence[Speed]) -> str:
    """Lines to print: engine, Mpx/s, times the reference, what it is; the fastest first, those that cannot run last."""
    reference = next((speed.pixels_per_second for speed in speeds if speed.name == REFERENCE), 0.0)
    rows = [("engine", "Mpx/s", f"x {REFERENCE}", "")]
    for speed in sorted(speeds, key=lambda speed: -speed.pixels_per_second):
        if speed.refusal:
            rows.append((speed.name, "-", "-", speed.refusal))
        else:
            ratio = f"{speed.pixels_per_second / reference:.2f}" if reference else "-"
            rows.append((speed.name, f"{speed.pixels_per_second / 1e6:.1f}", ratio, speed.description))
    return "\n".join(f"{name:20} {speed:>8} {ratio:>14}  {about}".rstrip() for name, speed, ratio, about in rows)
