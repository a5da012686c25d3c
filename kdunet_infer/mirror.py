"""Mirroring beyond a volume's faces, as np.pad(mode="reflect") does it. Knows no Zarr, tiles or engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kdunet_infer.errors import GeometryError
from kdunet_infer.geometry import ZYX, Box

IntArray = npt.NDArray[np.intp]
Voxel = TypeVar("Voxel", bound=np.generic)


def mirror_indices(begin: int, end: int, size: int) -> IntArray:
    """Indices of voxels begin..end-1 of an axis mirrored without end, edge voxel not repeated: ...32|1234|32...

    Raises GeometryError for an axis without voxels.
    """
    if size < 1:
        raise GeometryError(
            f"an axis of {size} voxels cannot be mirrored; give a volume with at least one voxel along each axis."
        )
    if size == 1:
        return np.zeros(end - begin, dtype=np.intp)
    period = 2 * (size - 1)
    i = np.arange(begin, end, dtype=np.intp) % period
    return np.minimum(i, period - i)


def read_mirrored(read: Callable[[Box], npt.NDArray[Voxel]], shape: ZYX, box: Box) -> npt.NDArray[Voxel]:
    """Voxels (z, y, x) of `box`, which may leave the volume of `shape`, mirrored beyond its faces.

    Calls `read` once, on the smallest box inside the volume that holds every voxel needed; where `box` lies inside, what
    `read` gave is returned as it is, without a copy. Raises GeometryError for a volume without voxels.
    """
    indices = [mirror_indices(begin, end, size) for begin, end, size in zip(box.begin, box.end, shape, strict=True)]
    needed = _hull(indices)
    voxels = read(needed)
    for axis in (2, 1, 0):  # x first: its gather is the slow one, and the array is still small
        outside_before = max(0, -box.begin[axis])
        outside_after = max(0, box.end[axis] - shape[axis])
        if outside_before or outside_after:
            voxels = _gather(voxels, indices[axis] - needed.begin[axis], outside_before, outside_after, axis)
    return voxels


def _hull(indices: list[IntArray]) -> Box:
    z, y, x = ((int(i.min()), int(i.max()) + 1) if i.size else (0, 0) for i in indices)
    return Box((z[0], y[0], x[0]), (z[1], y[1], x[1]))


def _gather(
    voxels: npt.NDArray[Voxel], indices: IntArray, outside_before: int, outside_after: int, axis: int
) -> npt.NDArray[Voxel]:
    """`voxels.take(indices, axis)`, with the run inside the volume copied as a slice: several times faster along x."""
    n_before = min(outside_before, indices.size)
    n_after = min(outside_after, indices.size)
    inside = indices[n_before : indices.size - n_after]
    kept = slice(int(inside[0]), int(inside[-1]) + 1) if inside.size else slice(0, 0)
    parts = (
        voxels.take(indices[:n_before], axis=axis),
        voxels[(slice(None),) * axis + (kept,)],
        voxels.take(indices[indices.size - n_after :], axis=axis),
    )
    return np.concatenate(parts, axis=axis)
