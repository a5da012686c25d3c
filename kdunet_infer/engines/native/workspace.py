"""Buffers and records: a schedule and packed parameters as the memory that the kernels work in."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdunet_infer.blockwise import Float32Array, Range, UInt8Array
from kdunet_infer.engines.native.graph import Network
from kdunet_infer.engines.native.machine import MARGIN, Field, Machine
from kdunet_infer.engines.native.schedule import ROWS_PER_STEP, Kind, Layer, Task, make_schedule

_KERNEL = {
    Kind.NORMALISE: "normalise",
    Kind.CONVOLVE: "convolve",
    Kind.POOL: "pool",
    Kind.UPSAMPLE: "upsample",
    Kind.HEAD: "probability",
}
_HEADS = {np.float32: "probability", np.uint8: "mask"}


@dataclass(frozen=True, slots=True)
class Packed:
    """A network for one machine: for each layer the kernel that runs it, and its parameters in the order that kernel reads."""

    layers: tuple[Layer, ...]
    kernels: tuple[int, ...]
    weights: tuple[Float32Array, ...]
    biases: tuple[Float32Array, ...]


def pack(network: Network, machine: Machine) -> Packed:
    """Choose the kernels and lay the parameters out for them."""
    kernels, weights, biases = [], [], []
    for layer, own in zip(network.layers, network.parameters, strict=True):
        kernel, group = machine.kernel(_KERNEL[layer.kind], layer.n_channels)
        kernels.append(kernel)
        weights.append(_packed_weights(layer.kind, own, group))
        has_biases = layer.kind in (Kind.CONVOLVE, Kind.UPSAMPLE, Kind.HEAD)
        biases.append(np.ascontiguousarray(own[1] if has_biases else np.zeros(0), dtype=np.float32))
    return Packed(network.layers, tuple(kernels), tuple(weights), tuple(biases))


def _packed_weights(kind: Kind, own: tuple[Float32Array, ...], group: int) -> Float32Array:
    """`group` outputs at a time: (group of outputs, input, y, x, output)."""
    if kind is Kind.NORMALISE:
        return np.concatenate(own).astype(np.float32)
    if not own:
        return np.zeros(0, np.float32)
    found = own[0] if kind is Kind.UPSAMPLE else own[0].swapaxes(0, 1)  # (input, output, y, x)
    n_in, n_out, *size = found.shape
    grouped = found.reshape(n_in, n_out // group, group, *size).transpose(1, 0, 3, 4, 2)
    return np.ascontiguousarray(grouped, dtype=np.float32)


class Workspace:
    """Memory for one window of tiles of one size; one thread at a time."""

    def __init__(self, packed: Packed, machine: Machine, size: tuple[int, int], window: tuple[Range, Range]) -> None:
        self._packed = packed
        self._machine = machine
        self._window = window
        self._schedule = make_schedule(packed.layers, size, window)
        tasks = self._schedule.tasks
        self._strides = [_stride(task, machine, size[1]) for task in tasks]
        sizes = [task.n_buffer_rows * task.layer.n_channels * stride for task, stride in zip(tasks, self._strides, strict=True)]
        self._buffer = _aligned_zeros(sum(sizes))
        places = np.cumsum([0, *sizes[:-1]])
        self._addresses = [self._buffer.ctypes.data + 4 * int(place) for place in places]
        self._zeros = np.zeros(max(self._strides) + MARGIN, np.float32)
        self._threshold = np.zeros(1, np.float32)
        self._head_kernels = {np.dtype(dtype): machine.kernel(name)[0] for dtype, name in _HEADS.items()}
        self._records = np.stack([self._record(i, size) for i in range(len(tasks))])

    @property
    def n_bytes(self) -> int:
        """Of its buffers."""
        return self._buffer.nbytes

    def run(self, run: Any, tile: UInt8Array, out: Float32Array | UInt8Array, threshold: float = 0.0) -> None:
        """Compute the window of `tile` (y, x) into `out`, both contiguous along x. `run` is the compiled driver.

        float32 gets the probability, uint8 a mask: 1 where the probability is at least `threshold`.
        """
        first, last = self._records[0], self._records[-1]
        last[Field.KERNEL] = self._head_kernels[out.dtype]
        self._threshold[0] = threshold
        first[Field.IN], first[Field.IN_STRIDE] = tile.ctypes.data, tile.strides[0]
        last[Field.OUT], last[Field.OUT_STRIDE] = out.ctypes.data, out.strides[0] // out.itemsize
        run(self._records.ctypes.data, len(self._records), ROWS_PER_STEP, *self._schedule.steps)

    def _record(self, index: int, size: tuple[int, int]) -> npt.NDArray[np.int64]:
        task, packed = self._schedule.tasks[index], self._packed
        halved = 2 if task.layer.kind is Kind.UPSAMPLE else 1  # counts the pixels of its input
        aligned = 1 if task.layer.kind is Kind.HEAD else self._machine.n_lanes
        record = np.zeros(len(Field), np.int64)
        record[Field.KERNEL] = packed.kernels[index]
        record[Field.CLOCK], record[Field.LAG] = task.clock, task.lag
        record[Field.ROW_BEGIN], record[Field.ROW_END] = (row // halved for row in task.rows)
        begin, end = (column // halved for column in task.columns)
        record[Field.X_BEGIN], record[Field.X_END] = begin // aligned * aligned, end
        record[Field.HEIGHT] = size[0] >> task.layer.level
        record[Field.IN_ROWS] = record[Field.IN2_ROWS] = 1  # of a map that is not there: a divisor
        for field, source in zip((Field.IN, Field.IN2), task.layer.inputs, strict=False):
            record[field : field + 4] = self._map(source)
        record[Field.OUT : Field.OUT + 4] = self._map(index)
        record[Field.WEIGHTS], record[Field.BIASES] = packed.weights[index].ctypes.data, packed.biases[index].ctypes.data
        record[Field.ZEROS], record[Field.THRESHOLD] = self._zeros.ctypes.data, self._threshold.ctypes.data
        record[Field.ORIGIN_Y], record[Field.ORIGIN_X] = (begin for begin, _ in self._window)
        return record

    def _map(self, index: int) -> tuple[int, int, int, int]:
        """Address, channels, stride and rows of a layer's buffer."""
        task = self._schedule.tasks[index]
        return self._addresses[index], task.layer.n_channels, self._strides[index], task.n_buffer_rows


class Workspaces:
    """Workspaces for any thread: made when there is none free of the kind, kept for the next tile of the kind.

    What is kept takes `kept_bytes` at most; kinds not used for long go first.
    """

    def __init__(self, packed: Packed, machine: Machine, kept_bytes: int) -> None:
        self._packed = packed
        self._machine = machine
        self._kept_bytes = kept_bytes
        self._lock = threading.Lock()
        self._free: dict[_Kind, list[Workspace]] = {}

    @contextmanager
    def one(self, size: tuple[int, int], window: tuple[Range, Range]) -> Iterator[Workspace]:
        """A workspace that no other thread uses meanwhile."""
        kind = (size, window)
        with self._lock:
            free = self._free.get(kind)
            workspace = free.pop() if free else None
        workspace = workspace or Workspace(self._packed, self._machine, size, window)
        yield workspace  # after an error it is not put back
        with self._lock:
            self._free[kind] = [*self._free.pop(kind, []), workspace]  # now the last one used
            while self.n_bytes > self._kept_bytes:
                oldest = next(iter(self._free))
                self._free[oldest].pop()
                if not self._free[oldest]:
                    del self._free[oldest]

    @property
    def n_bytes(self) -> int:
        """Of all that are kept and free."""
        return sum(workspace.n_bytes for free in self._free.values() for workspace in free)


_Kind = tuple[tuple[int, int], tuple[Range, Range]]


def _stride(task: Task, machine: Machine, width: int) -> int:
    """Floats of a row of one channel: a margin, the columns, and room for the last register before the next margin's zero."""
    columns = width >> task.layer.level
    registers = -(-columns // machine.n_lanes) + 2
    # An odd number of registers: rows a power of two apart would fall into the same lines of the cache.
    return MARGIN + (registers | 1) * machine.n_lanes


def _aligned_zeros(n: int) -> Float32Array:
    """Zeros that begin at a cache line."""
    raw = np.zeros(n + 16, np.float32)
    skip = -raw.ctypes.data % 64 // 4
    return raw[skip : skip + n]
