"""Engine `native`: k-Unets in float32 on the CPU, vectorised along x, streaming rows through all layers at once.

schedule.py   which layer makes which rows, when, from which buffer: integers
graph.py      ONNX -> layers and parameters
kernels.py    the arithmetic as LLVM code; emit.py: the verbs it is written in; machine.py: what it is cut to
compiled.py   that code as functions of this process
workspace.py  buffers and records of one schedule
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from kdunet_infer.blockwise import Float32Array, UInt8Array
from kdunet_infer.engines import available_cpus, check_precision, check_tiles
from kdunet_infer.engines.native.compiled import compiled, host_machine, version
from kdunet_infer.engines.native.graph import read_network
from kdunet_infer.engines.native.machine import Machine
from kdunet_infer.engines.native.schedule import Range
from kdunet_infer.engines.native.workspace import Workspace, pack
from kdunet_infer.errors import EngineError
from kdunet_infer.model import Model

KEPT_KINDS = 8
"""Sizes and windows whose workspaces are kept: a volume has few, as only its outer blocks differ. A 2-Unet's takes 4 MB."""

Window = tuple[Range, Range]

LEAST_ROWS = 128
"""Of a part of a tile: fewer would cost more in rows of halo computed twice than another thread brings."""


class NativeEngine:
    """A k-Unet in float32 on `n_threads` CPU threads; None takes every CPU this process may use.

    A pixel's bits depend on its neighbourhood alone: not on the tile, the batch or the number of threads. `machine` None is the
    host's kind. Raises UnsupportedModel for a model that is no k-Unet, EngineError for any
    other device or precision.
    """

    def __init__(
        self,
        model: Model,
        device: str = "cpu",
        n_threads: int | None = None,
        precision: str = "fp32",
        machine: Machine | None = None,
    ) -> None:
        if device != "cpu":
            raise EngineError(f"engine 'native' has no device {device!r}; it runs on cpu.")
        check_precision("native", precision)
        self._stride_zyx = model.card.stride_zyx
        self._n_threads = n_threads or available_cpus()
        self._code = compiled(machine or host_machine())
        self._packed = pack(read_network(model), self._code.machine)
        self._threads = ThreadPoolExecutor(self._n_threads, thread_name_prefix="native")
        self._lock = threading.Lock()
        self._free: dict[tuple[tuple[int, int], Window], list[Workspace]] = {}

    @property
    def batch_size(self) -> int:
        """Tiles to hand over at once: some for every thread, so that none waits long for the others at the end."""
        return 4 * self._n_threads

    def infer(self, tiles: UInt8Array) -> Float32Array:
        """Foreground probability (n, y, x) float32 of tiles (n, y, x) uint8; y and x multiples of the stride.

        Raises EngineInputError for other tiles.
        """
        check_tiles(tiles, self._stride_zyx)
        return self.infer_window(tiles, (0, tiles.shape[1]), (0, tiles.shape[2]))

    def infer_window(self, tiles: UInt8Array, rows: Range, columns: Range) -> Float32Array:
        """The same for a window of each tile alone, (n, rows, columns): nothing it does not depend on is computed."""
        return self._infer(tiles, (rows, columns), np.dtype(np.float32), 0.0)  # type: ignore[return-value]

    def mask_window(self, tiles: UInt8Array, rows: Range, columns: Range, threshold: float) -> UInt8Array:
        """1 where the window's probability is at least `threshold` rounded to float32, else 0; 255 for NaN. uint8."""
        return self._infer(tiles, (rows, columns), np.dtype(np.uint8), threshold)  # type: ignore[return-value]

    def describe(self) -> str:
        """One line: the engine, its compiler, the CPU and the threads."""
        threads = f"{self._n_threads} thread{'s' * (self._n_threads != 1)}"
        return f"native ({version()}) on CPU {self._code.cpu} with {self._code.machine.n_lanes} lanes, {threads}"

    def _infer(
        self, tiles: UInt8Array, window: Window, dtype: np.dtype[Any], threshold: float
    ) -> npt.NDArray[np.uint8 | np.float32]:
        check_tiles(tiles, self._stride_zyx)
        tiles = tiles if tiles.strides[2] == 1 else np.ascontiguousarray(tiles)
        rows, columns = window
        found = np.empty((len(tiles), rows[1] - rows[0], columns[1] - columns[0]), dtype)

        def job(i: int, part: Range) -> None:
            with self._workspace((tiles.shape[1], tiles.shape[2]), (part, columns)) as workspace:
                workspace.run(self._code.run, tiles[i], found[i, part[0] - rows[0] : part[1] - rows[0]], threshold)

        for done in [self._threads.submit(job, i, part) for i, part in self._parts(len(tiles), rows)]:
            done.result()
        return found

    def _parts(self, n_tiles: int, rows: Range) -> Iterator[tuple[int, Range]]:
        """Tiles and the rows of them that make a job each: whole tiles, the last few cut so that every thread has work."""
        n_whole = n_tiles // self._n_threads * self._n_threads
        n_parts = min(self._n_threads, max(1, (rows[1] - rows[0]) // LEAST_ROWS))
        for i in range(n_tiles):
            cuts = np.linspace(*rows, (1 if i < n_whole else n_parts) + 1).astype(int).tolist()
            yield from ((i, part) for part in pairwise(cuts))

    @contextmanager
    def _workspace(self, size: tuple[int, int], window: Window) -> Iterator[Workspace]:
        """One that no other thread uses, kept for the next tile of the kind."""
        key = (size, window)
        with self._lock:
            free = self._free.pop(key, [])
            self._free[key] = free  # now the last one used
            while len(self._free) > KEPT_KINDS:
                self._free.pop(next(iter(self._free)))
            workspace = free.pop() if free else None
        workspace = workspace or Workspace(self._packed, self._code.machine, size, window)
        try:
            yield workspace
        finally:
            with self._lock:
                free.append(workspace)
