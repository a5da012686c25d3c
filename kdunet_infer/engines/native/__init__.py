"""Engine `native`: k-Unets in float32 on the CPU, vectorised along x, streaming rows through all layers at once.

schedule.py   which layer makes which rows, when, from which buffer: integers
graph.py      ONNX -> layers and parameters
kernels.py    the arithmetic as LLVM code; emit.py: the verbs it is written in
compiled.py   that code as functions of this process
workspace.py  buffers and records of one schedule
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np

from kdunet_infer.blockwise import Float32Array, UInt8Array
from kdunet_infer.engines import available_cpus, check_tiles
from kdunet_infer.engines.native.compiled import compiled, host_machine, version
from kdunet_infer.engines.native.graph import read_network
from kdunet_infer.engines.native.schedule import ROWS_PER_STEP, Range
from kdunet_infer.engines.native.workspace import Packed, Workspace, pack
from kdunet_infer.errors import EngineError
from kdunet_infer.model import Model

Window = tuple[Range, Range]

LEAST_ROWS = 128
"""Of a part of a tile: fewer would cost more in rows of halo computed twice than another thread brings."""


class NativeEngine:
    """A k-Unet in float32 on `n_threads` CPU threads; None takes every CPU this process may use.

    A pixel's bits depend on its neighbourhood alone: not on the tile, the batch or the number of threads. Raises UnsupportedModel
    for a model that is no k-Unet, EngineError for another device than the CPU.
    """

    def __init__(self, model: Model, device: str = "cpu", n_threads: int | None = None) -> None:
        if device != "cpu":
            raise EngineError(f"engine 'native' has no device {device!r}; it runs on cpu.")
        self._stride_zyx = model.card.stride_zyx
        self._n_threads = n_threads or available_cpus()
        self._code = compiled(host_machine())
        self._packed = pack(read_network(model), self._code.machine)
        self._threads = ThreadPoolExecutor(self._n_threads, thread_name_prefix="native")
        self._workspaces: dict[tuple[tuple[int, int], Window], queue.SimpleQueue[Workspace]] = {}

    def infer(self, tiles: UInt8Array) -> Float32Array:
        """Foreground probability (n, y, x) float32 of tiles (n, y, x) uint8; y and x multiples of the stride.

        Raises EngineInputError for other tiles.
        """
        check_tiles(tiles, self._stride_zyx)
        return self.infer_window(tiles, (0, tiles.shape[1]), (0, tiles.shape[2]))

    def infer_window(self, tiles: UInt8Array, rows: Range, columns: Range) -> Float32Array:
        """The same for a window of every tile alone, (n, rows, columns): nothing it does not depend on is computed."""
        check_tiles(tiles, self._stride_zyx)
        tiles = tiles if tiles.strides[2] == 1 else np.ascontiguousarray(tiles)
        found = np.empty((len(tiles), rows[1] - rows[0], columns[1] - columns[0]), np.float32)
        jobs = [
            self._threads.submit(self._infer_one, tiles[i], (part, columns), found[i, part[0] - rows[0] : part[1] - rows[0]])
            for i, part in self._parts(len(tiles), rows)
        ]
        for job in jobs:
            job.result()
        return found

    def describe(self) -> str:
        """One line: the engine, its compiler, the CPU and the threads."""
        threads = f"{self._n_threads} thread{'s' * (self._n_threads != 1)}"
        return f"native ({version()}) on CPU {self._code.cpu} with {self._code.machine.n_lanes} lanes, {threads}"

    def _parts(self, n_tiles: int, rows: Range) -> Iterator[tuple[int, Range]]:
        """Tiles and the rows of them that make a job each: whole tiles, the last few cut so that every thread has work."""
        n_whole = n_tiles // self._n_threads * self._n_threads
        n_parts = min(self._n_threads, max(1, (rows[1] - rows[0]) // LEAST_ROWS))
        for i in range(n_tiles):
            cuts = np.linspace(*rows, (1 if i < n_whole else n_parts) + 1).astype(int).tolist()
            yield from ((i, part) for part in pairwise(cuts))

    def _infer_one(self, tile: UInt8Array, window: Window, out: Float32Array) -> None:
        size = (tile.shape[0], tile.shape[1])
        free = self._workspaces.setdefault((size, window), queue.SimpleQueue())
        try:
            workspace = free.get_nowait()
        except queue.Empty:
            workspace = Workspace(self._packed, self._code.machine, size, window)
        workspace.run(self._code.run, ROWS_PER_STEP, tile, out)
        free.put(workspace)
