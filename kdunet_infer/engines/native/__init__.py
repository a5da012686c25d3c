"""Engine `native`: k-Unets in float32 on the CPU, vectorised along x, streaming rows through all layers at once.

schedule.py   which layer makes which rows, when, from which buffer: integers
graph.py      ONNX -> layers and parameters
kernels.py    the arithmetic as LLVM code; emit.py: the verbs it is written in; machine.py: what it is cut to
compiled.py   that code as functions of this process
workspace.py  buffers and records of one schedule
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from kdunet_infer.blockwise import Float32Array, Range, UInt8Array
from kdunet_infer.engines import available_cpus, check_precision, check_tiles, check_window
from kdunet_infer.engines.native.compiled import compile_kernels, host_machine, version
from kdunet_infer.engines.native.graph import read_network
from kdunet_infer.engines.native.machine import Machine
from kdunet_infer.engines.native.workspace import Workspace, Workspaces, pack
from kdunet_infer.errors import EngineError
from kdunet_infer.model import Model

KEPT_BYTES = 2**28
"""Of workspaces kept for further tiles: hundreds of a 2-Unet's, which take 4 MB each; those of eight threads at k = 16."""

Window = tuple[Range, Range]

LEAST_ROWS = 128
"""Of a part of a tile: fewer would cost more in rows of halo computed twice than another thread brings."""


class NativeEngine:
    """A k-Unet in float32 on `n_threads` CPU threads; None takes every CPU this process may use.

    A pixel's bits depend on its neighbourhood alone: not on the tile, the batch or the number of threads. `machine` None is the
    host's kind. Raises UnsupportedModel for a model that is no k-Unet, EngineError for any other
    device or precision and for less than one thread.
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
        if n_threads is not None and n_threads < 1:
            raise EngineError(f"engine 'native' cannot run on {n_threads} threads; give at least 1.")
        self._stride_zyx = model.card.stride_zyx
        self._n_threads = n_threads or available_cpus()
        self._code = compile_kernels(machine or host_machine())
        self._packed = pack(read_network(model), self._code.machine)
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._threads = ThreadPoolExecutor(self._n_threads, thread_name_prefix="native")
        self._workspaces = Workspaces(self._packed, self._code.machine, KEPT_BYTES)

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

    def working_bytes(self, tile_shape: tuple[int, int]) -> int:
        """Bytes that buffers may take at most while tiles of up to that size (y, x) are run."""
        y, x = tile_shape
        return KEPT_BYTES + self._n_threads * Workspace(self._packed, self._code.machine, (y, x), ((0, y), (0, x))).n_bytes

    def describe(self) -> str:
        """One line: the engine, its compiler, the CPU and the threads."""
        threads = f"{self._n_threads} thread{'s' * (self._n_threads != 1)}"
        return f"native ({version()}) on CPU {self._code.cpu} with {self._code.machine.n_lanes} lanes, {threads}"

    def _infer(
        self, tiles: UInt8Array, window: Window, dtype: np.dtype[Any], threshold: float
    ) -> npt.NDArray[np.uint8 | np.float32]:
        check_tiles(tiles, self._stride_zyx)
        check_window(tiles, *window)
        if self._pid != os.getpid():  # after a fork the threads are not here, and whoever held a lock is not either
            self._start()
        tiles = tiles if tiles.strides[2] == 1 else np.ascontiguousarray(tiles)
        rows, columns = window
        found = np.empty((len(tiles), rows[1] - rows[0], columns[1] - columns[0]), dtype)

        def job(i: int, part: Range) -> None:
            with self._workspaces.one((tiles.shape[1], tiles.shape[2]), (part, columns)) as workspace:
                workspace.run(self._code.run, tiles[i], found[i, part[0] - rows[0] : part[1] - rows[0]], threshold)

        jobs = [self._threads.submit(job, i, part) for i, part in self._parts(len(tiles), rows)]
        try:
            for each in jobs:
                each.result()
        finally:
            for each in jobs:  # after an error or Ctrl-C nobody waits for the rest
                each.cancel()
        return found

    def _parts(self, n_tiles: int, rows: Range) -> Iterator[tuple[int, Range]]:
        """Tiles and the rows of them that make a job each: whole tiles, the last few cut so that every thread has work."""
        n_whole = n_tiles // self._n_threads * self._n_threads
        n_parts = min(self._n_threads, max(1, (rows[1] - rows[0]) // LEAST_ROWS))
        for i in range(n_tiles):
            cuts = np.linspace(*rows, (1 if i < n_whole else n_parts) + 1).astype(int).tolist()
            yield from ((i, part) for part in pairwise(cuts))
