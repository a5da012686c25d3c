"""Connected components of a mask, block by block, as one pass over the whole volume would find them. Knows no files or models.

    first pass   each block is labelled alone; its pieces are measured, and pieces that meet across a seam are noted
    then         noted pieces are joined to components, and their measures added up
    later        a block is labelled again, which gives the same pieces, and these are looked up

A **piece** is what a component has in one block. Held at a time: one block and its labels (4 bytes a voxel), some 200 bytes for
each piece, and the far faces of one layer of blocks, compressed (a face of an EM mask shrinks some hundredfold).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import cc3d
import numpy as np
import numpy.typing as npt

from kdunet_infer.errors import GeometryError, VolumeError
from kdunet_infer.geometry import ZYX, Box

UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
LocalLabels = npt.NDArray[np.unsignedinteger[Any]]
"""(z, y, x) of a block: its pieces numbered from 1, elsewhere 0."""

ReadMask = Callable[[Box], npt.NDArray[Any]]
"""Voxels (z, y, x) of a box; foreground is every value but 0."""
Progress = Callable[[int, int], None]
"""Called with the voxels done and the voxels in all."""

Connectivity = Literal[6, 26]
"""Which neighbours are connected: those that share a face, or a corner too."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Components:
    """The components of a mask in `roi`, measured; row i is the component with label i + 1. Coordinates are global, zyx.

    Numbered by where they are first met, block after block, so the same mask and blocks give the same numbers.
    """

    roi: Box
    sizes: Int64Array
    """(n,) voxels."""
    begins: Int64Array
    """(n, 3) first voxel of the smallest box around each."""
    ends: Int64Array
    """(n, 3) one past its last voxel."""
    coordinate_sums: Int64Array
    """(n, 3) coordinates added up over the voxels; exact below 2^63, which is a component of 10^14 voxels at 9 * 10^4."""

    @property
    def n(self) -> int:
        """How many components there are."""
        return len(self.sizes)

    @property
    def centroids(self) -> Float64Array:
        """(n, 3) mean coordinates, in voxels."""
        means: Float64Array = self.coordinate_sums / self.sizes[:, None]
        return means

    @property
    def touches_faces(self) -> BoolArray:
        """(n,) whether any voxel lies on a face of the roi. An axis of one voxel has no faces: a lone slice is an image."""
        faces = [axis for axis, length in enumerate(self.roi.shape) if length > 1] or [0, 1, 2]
        on_face = (self.begins == self.roi.begin) | (self.ends == self.roi.end)
        touches: BoolArray = on_face[:, faces].any(axis=1)
        return touches


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Labelling:
    """The components of a mask, and for each block which voxels are whose. Made by `label_components`."""

    components: Components
    _read: ReadMask
    _connectivity: Connectivity
    _pieces: dict[Box, slice]
    """The rows of each block in `_component_of`."""
    _component_of: Int64Array
    """(n_pieces,) the row in `components`."""

    @property
    def blocks(self) -> Iterator[Box]:
        """The blocks that can be asked for, in order."""
        return iter(self._pieces)

    def labels(self, block: Box) -> Int64Array:
        """Labels (z, y, x) of one of the `blocks`: 1 to `components.n`, background 0.

        Raises GeometryError for a box that is none of the blocks, VolumeError where the mask has changed.
        """
        labels, rows = self._label_again(block)
        return np.concatenate([[0], rows + 1])[labels]

    def select(self, block: Box, chosen: BoolArray) -> UInt8Array:
        """Mask (z, y, x) of one of the `blocks`: 1 in components whose row of `chosen` (n,) is true, elsewhere 0.

        Raises as `labels` does.
        """
        labels, rows = self._label_again(block)
        return np.concatenate([[False], chosen[rows]]).view(np.uint8)[labels]

    def _label_again(self, block: Box) -> tuple[LocalLabels, Int64Array]:
        """The pieces of a block, and the row in `components` of each."""
        if block not in self._pieces:
            raise GeometryError(f"box {block} is none of the blocks that were labelled; ask for one of these.")
        rows = self._component_of[self._pieces[block]]
        labels, n_pieces = _label_alone(self._read(block), self._connectivity)
        if n_pieces != len(rows):
            raise VolumeError(
                f"the mask changed at voxels {block} (z,y,x) while its components were counted; "
                "let nothing else write to it and run again."
            )
        return labels, rows


def grid_blocks(roi: Box, block_shape: ZYX) -> Iterator[Box]:
    """Blocks on a grid of `block_shape` from the volume's origin, clipped to `roi`, z slowest: as a plan cuts them."""
    for cell in roi.snapped(block_shape).split(block_shape):
        block = cell.intersection(roi)
        if block.n_voxels:
            yield block


def label_components(
    read: ReadMask, roi: Box, *, block_shape: ZYX, connectivity: Connectivity, progress: Progress | None = None
) -> Labelling:
    """Find the components of the mask in `roi`, reading each of the `grid_blocks` once and nothing else.

    `read` must give the same voxels whenever it is asked for the same block, now and by the `Labelling`. What lies outside the
    roi connects nothing.
    """
    seams = _Seams(connectivity)
    pieces: dict[Box, slice] = {}
    measures = [np.empty((0, _N_MEASURES), np.int64)]
    n_pieces = n_done = 0
    for block in grid_blocks(roi, block_shape):
        labels, n_found = _label_alone(read(block), connectivity)
        z, y, x = (begin // size for begin, size in zip(block.begin, block_shape, strict=True))
        seams.add((z, y, x), labels, n_pieces)
        measures.append(_measure(labels, block))
        pieces[block] = slice(n_pieces, n_pieces + n_found)
        n_pieces += n_found
        n_done += block.n_voxels
        if progress is not None:
            progress(n_done, roi.n_voxels)
    first_pieces, component_of = np.unique(_join(n_pieces, seams.pairs()), return_inverse=True)
    components = _add_up(np.concatenate(measures), component_of, len(first_pieces), roi)
    return Labelling(components=components, _read=read, _connectivity=connectivity, _pieces=pieces, _component_of=component_of)


def _label_alone(mask: npt.NDArray[Any], connectivity: Connectivity) -> tuple[LocalLabels, int]:
    """Pieces of one block, and how many there are."""
    # In C order: another order of the axes in memory would number the pieces in another way. As integers: for booleans cc3d
    # 4.1.1 sets aside too few labels, and fails on flat blocks full of single voxels with 26 neighbours; it is no faster.
    foreground = np.ascontiguousarray(mask != 0).view(np.uint8)
    labels, n_pieces = cc3d.connected_components(foreground, connectivity=connectivity, return_N=True)
    return labels, int(n_pieces)


# Columns of a piece's measures.
_SIZE, _BEGIN, _END, _SUM = slice(0, 1), slice(1, 4), slice(4, 7), slice(7, 10)
_N_MEASURES = 10


def _measure(labels: LocalLabels, block: Box) -> Int64Array:
    """(n_pieces, 10) int64: size, box and sums of coordinates of each piece, in global coordinates."""
    found = cc3d.statistics(labels, no_slice_conversion=True)
    sizes = found["voxel_counts"][1:, None].astype(np.int64)
    bounds = np.asarray(found["bounding_boxes"])[1:].astype(np.int64)  # z first, z last, y first, ...
    # The library gives means: times the size, they are whole again below 2^50, which no block in memory reaches.
    sums = np.rint(found["centroids"][1:] * sizes).astype(np.int64)
    begin = np.array(block.begin, np.int64)
    return np.hstack([sizes, bounds[:, 0::2] + begin, bounds[:, 1::2] + 1 + begin, sums + sizes * begin])


def _add_up(measures: Int64Array, component_of: Int64Array, n: int, roi: Box) -> Components:
    sizes, sums = np.zeros((n, 1), np.int64), np.zeros((n, 3), np.int64)
    begins, ends = np.full((n, 3), roi.end, np.int64), np.full((n, 3), roi.begin, np.int64)
    np.add.at(sizes, component_of, measures[:, _SIZE])
    np.add.at(sums, component_of, measures[:, _SUM])
    np.minimum.at(begins, component_of, measures[:, _BEGIN])
    np.maximum.at(ends, component_of, measures[:, _END])
    return Components(roi=roi, sizes=sizes[:, 0], begins=begins, ends=ends, coordinate_sums=sums)


def _join(n_pieces: int, pairs: Int64Array) -> Int64Array:
    """(n_pieces,) for each piece the lowest piece it is connected to by `pairs` (n_pairs, 2)."""
    parent = np.arange(n_pieces, dtype=np.int64)
    while True:
        low, high = np.sort(parent[pairs], axis=1).T
        apart = low < high
        if not apart.any():
            return parent
        # A parent only ever falls to a lower piece of the same component. A link that is lost on the way is found again, since
        # its pair is then apart; and as paths halve with each round, a chain of 10^6 pieces takes about 20.
        np.minimum.at(parent, high[apart], low[apart])
        parent = parent[parent]


@dataclass(frozen=True, slots=True)
class _Face:
    """The last plane of a block along one axis, compressed: a layer of them is as wide as the volume."""

    packed: bytes
    shape: ZYX
    dtype: np.dtype[Any]
    first_piece: int

    @classmethod
    def of(cls, labels: LocalLabels, first_piece: int) -> _Face:
        z, y, x = labels.shape
        return cls(zlib.compress(labels.tobytes(), level=1), (z, y, x), labels.dtype, first_piece)

    def pieces(self) -> npt.NDArray[np.uint64]:
        """Pieces of the whole roi, numbered from 1."""
        return _globally(np.frombuffer(zlib.decompress(self.packed), self.dtype).reshape(self.shape), self.first_piece)


def _globally(labels: LocalLabels, first_piece: int) -> npt.NDArray[np.uint64]:
    return np.where(labels == 0, np.uint64(0), labels + np.uint64(first_piece))


class _Seams:
    """Which pieces of different blocks are neighbours. Blocks come z slowest, so those with a lower cell are there already."""

    def __init__(self, connectivity: Connectivity) -> None:
        self._connectivity = connectivity
        steps = (-1, 0, 1)
        before = [offset for offset in product(steps, steps, steps) if offset < (0, 0, 0)]
        self._before = [offset for offset in before if connectivity == 26 or np.count_nonzero(offset) == 1]
        self._faces: dict[tuple[ZYX, int], _Face] = {}
        self._layer = 0
        self._pairs = [np.empty((0, 2), np.int64)]

    def add(self, cell: ZYX, labels: LocalLabels, first_piece: int) -> None:
        """Compare the block at `cell` of the block grid with those before it, and keep its far faces for those after it."""
        if cell[0] != self._layer:
            self._layer = cell[0]
            self._faces = {key: face for key, face in self._faces.items() if key[0][0] == cell[0] - 1 and key[1] == 0}
        for offset in self._before:
            axis = offset.index(-1)  # the first that is not 0
            z, y, x = (c + o for c, o in zip(cell, offset, strict=True))
            face = self._faces.get(((z, y, x), axis))
            if face is not None:
                self._compare(
                    offset, _border(face.pieces(), offset), _globally(_border(labels, _opposite(offset)), first_piece)
                )
        for axis in range(3):
            far = labels[(slice(None),) * axis + (slice(-1, None),)]
            self._faces[cell, axis] = _Face.of(far, first_piece)

    def pairs(self) -> Int64Array:
        """(n_pairs, 2) pieces, numbered from 0, that belong to one component."""
        return np.concatenate(self._pairs)

    def _compare(self, offset: ZYX, theirs: npt.NDArray[np.uint64], ours: npt.NDArray[np.uint64]) -> None:
        # Both laid in an array two voxels thick across the seam, as they lie in the volume.
        z, y, x = (2 if step else length for step, length in zip(offset, ours.shape, strict=True))
        seam = np.zeros((z, y, x), np.uint64)
        seam[tuple(_place(step, lower=step < 0) for step in offset)] = theirs
        seam[tuple(_place(step, lower=step > 0) for step in offset)] = ours
        touching = cc3d.region_graph(seam, connectivity=self._connectivity)
        if touching:
            self._pairs.append(np.array(list(touching), np.int64) - 1)


def _border(labels: npt.NDArray[Any], offset: ZYX) -> npt.NDArray[Any]:
    """Of a block that lies at `offset`, the voxels that lie next to the block seen from there."""
    near = {-1: slice(-1, None), 0: slice(None), 1: slice(0, 1)}
    return labels[tuple(near[step] for step in offset)]


def _opposite(offset: ZYX) -> ZYX:
    return -offset[0], -offset[1], -offset[2]


def _place(step: int, *, lower: bool) -> slice:
    """Where along one axis of a seam: everywhere if it does not cross this axis, else one of its two voxels."""
    return slice(None) if step == 0 else slice(0, 1) if lower else slice(1, 2)
