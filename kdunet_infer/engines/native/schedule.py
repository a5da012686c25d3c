"""What the kernels do, in integers: which layer makes which rows and columns, when, and from which buffer. No arrays, no code.

Every layer keeps only a rolling window of its rows. Time runs in steps; a step feeds the network `ROWS_PER_STEP` more rows of
the image, and then each layer makes all rows whose inputs exist:

    rows of level l that exist after step s     ((s + 1) * ROWS_PER_STEP >> l) - lag      clipped to the rows that are needed

The lag of a layer is how many rows its input must be ahead. A 3x3 convolution adds 1; a pooling halves the lag, an up-sampling
doubles it. For five levels the last layer lags 94 rows, which is the receptive field seen from the other side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from kdunet_infer.blockwise import Range

ROWS_PER_STEP = 16
"""A multiple of 2 ** (levels - 1) keeps rows of the up-sampled maps whole; see docs/performance.md for other values."""


class Kind(Enum):
    """What a layer does."""

    NORMALISE = "uint8 image -> normalised float32"
    CONVOLVE = "3x3 convolution with bias and ReLU of one input or of two concatenated ones"
    POOL = "2x2 maximum"
    UPSAMPLE = "2x2 transposed convolution of stride 2"
    HEAD = "1x1 convolution to one map, and the logistic function"


@dataclass(frozen=True, slots=True)
class Layer:
    """One operation of the network; its place in the list of layers is its name."""

    kind: Kind
    level: int
    """Of its output: rows and columns are those of the image divided by 2 ** level."""
    n_channels: int
    """Of its output."""
    inputs: tuple[int, ...] = ()
    """Layers it reads, in the order of concatenation."""


@dataclass(frozen=True, slots=True)
class Task:
    """A layer on tiles of one size: what of it is needed, and how it is buffered."""

    layer: Layer
    rows: Range
    """Needed rows; no other row is ever computed."""
    columns: Range
    clock: int
    """Level whose rows count its steps: an up-sampling makes two rows for each row of its input."""
    lag: int
    n_buffer_rows: int = 0
    """Rows kept, the oldest overwritten by the newest; 0 for the head, which writes to the result."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """All tasks in the order in which each step runs them, and how many steps there are."""

    tasks: tuple[Task, ...]
    steps: Range


def unet_layers(width: int, n_levels: int) -> tuple[Layer, ...]:
    """The layers of a k-Unet in order of evaluation."""
    layers = [Layer(Kind.NORMALISE, 0, 1)]

    def add(kind: Kind, level: int, n_channels: int, *inputs: int) -> int:
        layers.append(Layer(kind, level, n_channels, inputs))
        return len(layers) - 1

    skips, last = [], 0
    for level in range(n_levels):
        n = width << level
        last = add(Kind.CONVOLVE, level, n, last)
        last = add(Kind.CONVOLVE, level, n, last)
        skips.append(last)
        if level + 1 < n_levels:
            last = add(Kind.POOL, level + 1, n, last)
    for level in reversed(range(n_levels - 1)):
        n = width << level
        last = add(Kind.UPSAMPLE, level, n, last)
        last = add(Kind.CONVOLVE, level, n, skips[level], last)
        last = add(Kind.CONVOLVE, level, n, last)
    add(Kind.HEAD, 0, 1, last)
    return tuple(layers)


def make_schedule(layers: tuple[Layer, ...], size: tuple[int, int], window: tuple[Range, Range]) -> Schedule:
    """How to compute rows and columns `window` of a tile of `size` (y, x) pixels: only what that window depends on."""
    rows, columns = (_needed(layers, length, wanted) for length, wanted in zip(size, window, strict=True))
    lags = _lags(layers)
    tasks = [
        Task(layer, rows[i], columns[i], layer.level + (layer.kind is Kind.UPSAMPLE), lags[i]) for i, layer in enumerate(layers)
    ]
    steps = _steps(tasks)
    buffered = [replace(task, n_buffer_rows=_buffer_rows(tasks, i, steps)) for i, task in enumerate(tasks)]
    return Schedule(tuple(buffered), steps)


def rows_done(task: Task, step: int) -> int:
    """The end of the rows of its clock's level that `task` has made when `step` ends, before clipping."""
    return ((step + 1) * ROWS_PER_STEP >> task.clock) - task.lag


def _needed(layers: tuple[Layer, ...], length: int, window: Range) -> list[Range]:
    """What of each layer, along one axis, the window of the last one depends on; from the last layer back."""
    needed: list[Range] = [(length, 0)] * len(layers)  # empty: nothing is asked for yet
    needed[-1] = window
    for i in reversed(range(len(layers))):
        if layers[i].kind is Kind.UPSAMPLE:
            needed[i] = (needed[i][0] // 2 * 2, -(-needed[i][1] // 2) * 2)  # it makes pairs
        begin, end = _read(layers[i].kind, needed[i])
        for source in layers[i].inputs:
            limit = length >> layers[source].level
            old = needed[source]
            needed[source] = (min(old[0], max(0, begin)), max(old[1], min(limit, end)))
    return needed


def _read(kind: Kind, written: Range) -> Range:
    """What a layer reads of its inputs to write this."""
    begin, end = written
    if kind is Kind.CONVOLVE:
        return begin - 1, end + 1
    if kind is Kind.POOL:
        return 2 * begin, 2 * end
    if kind is Kind.UPSAMPLE:
        return begin // 2, -(-end // 2)
    return begin, end


def _lags(layers: tuple[Layer, ...]) -> list[int]:
    """For each layer, in rows of its clock."""
    lags: list[int] = []
    for layer in layers:
        ready = [_lag_seen(layers[i], lags[i], layer) for i in layer.inputs]
        lag = max(ready, default=0)
        lags.append(lag + 1 if layer.kind is Kind.CONVOLVE else lag)
    return lags


def _lag_seen(source: Layer, lag: int, reader: Layer) -> int:
    """The lag of `source` in rows of the reader's clock."""
    if reader.kind is Kind.POOL:
        return -(-lag // 2)
    if source.kind is Kind.UPSAMPLE:
        whole = ROWS_PER_STEP % (2 << source.level) == 0  # else a row waits for the second of its pair
        return 2 * lag + (0 if whole else 1)
    return lag


def _steps(tasks: list[Task]) -> Range:
    begin = tasks[0].rows[0] // ROWS_PER_STEP
    end = begin + 1
    while rows_done(tasks[-1], end - 1) < tasks[-1].rows[1]:
        end += 1
    return begin, end


def _buffer_rows(tasks: list[Task], index: int, steps: Range) -> int:
    """The most rows of a layer that lie between the oldest one still read and the newest one, at any step."""
    readers = [task for task in tasks if index in task.layer.inputs]
    if not readers:
        return 0
    twice = 2 if tasks[index].layer.kind is Kind.UPSAMPLE else 1

    def span(step: int) -> int:
        newest = twice * rows_done(tasks[index], step)
        oldest = min(_oldest_read(task, step) for task in readers)
        return newest - oldest

    return max(span(step) for step in range(*steps))


def _oldest_read(reader: Task, step: int) -> int:
    begin = rows_done(reader, step - 1)
    if reader.layer.kind is Kind.CONVOLVE:
        return begin - 1
    return 2 * begin if reader.layer.kind is Kind.POOL else begin
