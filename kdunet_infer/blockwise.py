"""One block from source to target, over three protocols. Knows no Zarr, dask, click or paths.

Reading, computing and writing are separate calls, so that a run can time them and overlap them; writing is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from kdunet_infer.errors import EngineError
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.plan import Block, Plan

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]

Range = tuple[int, int]
"""Begin and end, half-open."""

DEFAULT_BATCH_SIZE = 1
"""Tiles handed at once to an engine that says nothing of it. A tile of 1216 x 1216 pixels fills a CPU: more at once ran no
faster in onnxruntime (2-Unet, 2 cores) and cost 120 MB each."""


class Source(Protocol):
    """Where voxels come from."""

    @property
    def shape(self) -> ZYX:
        """Voxels, zyx."""

    def read_box(self, box: Box) -> UInt8Array:
        """Voxels of `box`, (z, y, x) uint8; beyond the volume's faces the image is mirrored (edge voxel not repeated)."""


class Target(Protocol):
    """Where voxels go."""

    @property
    def shape(self) -> ZYX:
        """Voxels, zyx."""

    def write_box(self, box: Box, voxels: UInt8Array) -> None:
        """Store `voxels` (z, y, x) at `box`, which never leaves the volume; returns when they are written."""


class Engine(Protocol):
    """A network on some runtime."""

    def infer(self, tiles: UInt8Array) -> Float32Array:
        """Foreground probability (n, y, x) float32 of tiles (n, y, x) uint8; y and x multiples of the stride.

        `tiles` may be a view with gaps between its rows. Raises EngineInputError for tiles it cannot take, EngineError where
        the runtime fails.
        """

    def describe(self) -> str:
        """One line for reports: the runtime, its version, the device and the threads."""


@runtime_checkable
class WindowEngine(Engine, Protocol):
    """An engine that can leave out what only the halo would show. Optional: of any other engine the answer is cut."""

    @property
    def batch_size(self) -> int:
        """Tiles to hand over at once."""

    def infer_window(self, tiles: UInt8Array, rows: Range, columns: Range) -> Float32Array:
        """The part `rows`, `columns` of what `infer` would return, to the same bits."""

    def mask_window(self, tiles: UInt8Array, rows: Range, columns: Range, threshold: float) -> UInt8Array:
        """1 where that is at least `threshold` rounded to float32, else 0; 255 where it is NaN."""

    def working_bytes(self, tile_shape: tuple[int, int]) -> int:
        """Bytes that its buffers may take at most while tiles of up to that size (y, x) are run."""


def batch_size_of(engine: Engine) -> int:
    """Tiles to hand to `engine` at once where nobody says otherwise."""
    return engine.batch_size if isinstance(engine, WindowEngine) else DEFAULT_BATCH_SIZE


@dataclass(frozen=True, slots=True)
class BlockResult:
    """What one block writes; both arrays (z, y, x) uint8 of the shape of the block's `write_box`."""

    mask: UInt8Array
    """1 where the probability reaches the threshold, else 0."""
    probability: UInt8Array | None
    """round(255 p), where asked for."""


def segment_block(
    source: Source,
    engine: Engine,
    plan: Plan,
    block: Block,
    *,
    threshold: float,
    batch_size: int = DEFAULT_BATCH_SIZE,
    with_probability: bool = False,
) -> BlockResult:
    """Read and compute one block: the simple way, without overlap."""
    voxels = read_block(source, block)
    return compute_block(
        voxels, engine, plan, block, threshold=threshold, batch_size=batch_size, with_probability=with_probability
    )


def read_block(source: Source, block: Block) -> UInt8Array:
    """Voxels (z, y, x) uint8 of the block's `read_box`, in one read."""
    return source.read_box(block.read_box)


def compute_block(
    voxels: UInt8Array,
    engine: Engine,
    plan: Plan,
    block: Block,
    *,
    threshold: float,
    batch_size: int = DEFAULT_BATCH_SIZE,
    with_probability: bool = False,
) -> BlockResult:
    """Segment a block from the `voxels` (z, y, x) of its `read_box`.

    Probabilities are float32 for one batch of tiles at a time, and thresholded before they are rounded. Raises EngineError
    where the engine fails or returns NaN.
    """
    mask = np.empty(block.write_box.shape, np.uint8)
    probability = np.empty(block.write_box.shape, np.uint8) if with_probability else None
    for tile in plan.tiles(block, batch_size):
        tiles = voxels[tile.read_box.slices_in(block.read_box)]
        kept_box = tile.core_box.intersection(block.write_box)
        kept = kept_box.slices_in(block.write_box)
        _, rows, columns = ((part.start, part.stop) for part in kept_box.slices_in(tile.read_box))
        if probability is None and isinstance(engine, WindowEngine):
            mask[kept] = engine.mask_window(tiles, rows, columns, threshold)
            is_nan = mask[kept].max() > 1
        else:
            p = infer_window(engine, tiles, rows, columns)
            mask[kept] = p >= np.float32(threshold)
            is_nan = np.isnan(p.max())  # max carries a NaN
            if probability is not None and not is_nan:
                probability[kept] = np.rint(p * np.float32(255))
        if is_nan:  # else the voxel would pass for background
            raise EngineError(f"{engine.describe()} returned NaN within voxels {kept_box}; use an engine in float32.")
    return BlockResult(mask, probability)


def infer_window(engine: Engine, tiles: UInt8Array, rows: Range, columns: Range) -> Float32Array:
    """The part `rows`, `columns` (n, y, x) of what `engine.infer` returns for `tiles`; computed alone where the engine can.

    Raises as `Engine.infer` does.
    """
    if isinstance(engine, WindowEngine):
        return engine.infer_window(tiles, rows, columns)
    return engine.infer(tiles)[:, slice(*rows), slice(*columns)]
