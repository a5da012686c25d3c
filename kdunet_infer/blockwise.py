"""One block from source to target, over three protocols. Knows no Zarr, dask, click or paths."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from kdunet_infer.geometry import ZYX, Box

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]


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
        """Foreground probability (n, y, x) float32 of tiles (n, y, x) uint8; y and x multiples of the stride."""
