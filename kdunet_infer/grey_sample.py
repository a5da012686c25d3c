"""Which grey values a volume has: a bounded, seeded sample of its chunks, streamed. Knows no models, mappings or file formats.

Padding is not counted: the voxels around a tilted or cropped specimen have one exact value, fill whole chunks with it, and
would move every percentile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kdunet_infer.errors import VolumeError
from kdunet_infer.geometry import ZYX, Box

VoxelArray = npt.NDArray[Any]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

EXACT_VOXELS = 2**30
"""Volumes up to this size are read whole where percentiles are wanted, larger ones sampled: 4 to 10 s at 100 to 260 MB/s."""
CHECKED_VOXELS = 2**24
"""Enough to compare grey values with the training images: percentiles then are good to far less than a grey level."""
UNIT_VOXELS = 2**18
"""Chunks smaller than this are read several at a time; still hundreds of units in the smallest sample."""
UNIT_SLICES = 8
"""A unit is this deep where its chunks are small enough, so that neighbouring slices can be compared."""
DEEP_VOXELS = 2**24
"""Chunks larger than this are not stacked: one of them is memory enough."""
PADDING_VOXELS = 2**12
"""A smaller constant piece is no proof of padding: the last chunk of an axis may hold a single voxel."""
RUN_VOXELS = 2**20
"""Voxels counted at a time: counting widens them to 8 bytes each."""
N_BINS = 2**16
LARGEST = float(np.finfo(np.float32).max)
FLICKER_ROWS, FLICKER_COLUMNS = 4, 16
"""Units along z, and across each of these, from which slices are compared."""


class GreyVolume(Protocol):
    """A volume to sample: `VolumeSource`, or `Voxels` where a source's files hold many chunks."""

    @property
    def path(self) -> Path:
        """For messages."""

    @property
    def shape(self) -> ZYX:
        """Voxels, zyx."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Integers or floats."""

    @property
    def chunk_shape(self) -> ZYX:
        """Voxels that are read together, zyx."""

    def read(self, box: Box) -> VoxelArray:
        """Voxels (z, y, x) of a box inside the volume."""


@dataclass(frozen=True, slots=True, eq=False)
class GreySample:
    """Grey values of a volume and how many voxels have each, padding left out.

    Integers of up to 16 bits: exact counts of each value. Wider integers and floats: 65,536 equal bins from the 0.1 % to the
    99.9 % quantile (widened to a float of 8 significant bits beyond each), so that a quantile between these two is off by half
    a bin at most, and is exact for integers whose bins are one value wide; voxels beyond count in the outermost bins. What is
    beyond the range of float32 counts as its end.
    """

    values: Float64Array
    """(n,) raw grey values or the bins' centres, increasing; only those that were seen."""
    counts: Int64Array
    """(n,) voxels with each."""
    is_integer: bool
    n_total: int
    """Voxels of the volume."""
    n_read: int
    """Voxels looked at, padding among them."""
    padding: tuple[float, ...]
    """Values that filled whole chunks; no voxel of such a value is counted."""
    slice_z: Int64Array
    """(m,) global indices of the slices that were compared, increasing."""
    slice_means: Float64Array
    """(m,) mean raw grey value of each, over the same columns of chunks in every slice."""
    slice_deviations: Float64Array
    """(m,) standard deviation within each."""

    @classmethod
    def of_volume(cls, volume: GreyVolume, *, max_voxels: int = EXACT_VOXELS, seed: int = 0) -> GreySample:
        """Read the whole volume where it has at most `max_voxels`, else chunks spread over it by `seed` up to that bound.

        Holds one chunk (or a few small ones) at a time; wider types than 16 bits are read twice. Raises VolumeError for floats
        that are not finite, naming the first, and what the volume raises.
        """
        units = _Units.of_volume(volume)
        chosen = units.chosen(max_voxels, seed)
        narrow = volume.dtype.kind in "iu" and volume.dtype.itemsize <= 2
        values, counts, padding = (_counted if narrow else _binned)(volume, units, chosen)
        seen = counts > 0
        return cls(
            values[seen],
            counts[seen],
            volume.dtype.kind in "iu",
            Box.of_shape(volume.shape).n_voxels,
            sum(units.box(index).n_voxels for index in chosen),
            tuple(sorted(padding)),
            *_slices(volume, units, sorted(padding), seed),
        )

    @property
    def n_voxels(self) -> int:
        """Voxels counted."""
        return int(self.counts.sum())

    def quantile(self, permille: int) -> float:
        """The smallest grey value that at least `permille` of the voxels do not exceed (numpy's `inverted_cdf`)."""
        rank = max(1, -(-self.n_voxels * permille // 1000))  # in integers: no rounding decides between two values
        return float(self.values[np.searchsorted(np.cumsum(self.counts), rank)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: how much of the volume was looked at."""
        return {
            "n_total": self.n_total,
            "n_read": self.n_read,
            "n_counted": self.n_voxels,
            "padding": list(self.padding),
        }


def check_finite(voxels: VoxelArray, where: Box) -> None:
    """Refuse floats that are not finite. Raises VolumeError naming the first; `where` is the box of `voxels`, global."""
    if voxels.dtype.kind != "f":
        return
    for z, plane in enumerate(voxels, start=where.begin[0]):
        finite = np.isfinite(plane)
        if not finite.all():
            y, x = np.unravel_index(int(finite.argmin()), plane.shape)
            raise VolumeError(
                f"voxel ({z}, {where.begin[1] + int(y)}, {where.begin[2] + int(x)}) (z, y, x) of the volume is {plane[y, x]}; "
                "replace NaN and infinite voxels by a grey value, such as 0, and run again."
            )


@dataclass(frozen=True, slots=True)
class _Units:
    """A volume cut into units of whole chunks, numbered along x, then y, then z."""

    volume_shape: ZYX
    chunk_shape: ZYX
    shape: ZYX

    @classmethod
    def of_volume(cls, volume: GreyVolume) -> _Units:
        limits = volume.shape
        unit = [min(chunk, size) for chunk, size in zip(volume.chunk_shape, limits, strict=True)]
        while unit[0] < min(UNIT_SLICES, limits[0]) and math.prod(unit) < DEEP_VOXELS:
            unit[0] *= 2
        for axis in (2, 1, 0):
            while unit[axis] < limits[axis] and math.prod(unit) < UNIT_VOXELS:
                unit[axis] *= 2
        z, y, x = unit
        return cls(limits, volume.chunk_shape, (z, y, x))

    @property
    def grid(self) -> ZYX:
        z, y, x = (-(-size // unit) for size, unit in zip(self.volume_shape, self.shape, strict=True))
        return z, y, x

    def box(self, index: int) -> Box:
        z, y, x = (int(i) * size for i, size in zip(np.unravel_index(index, self.grid), self.shape, strict=True))
        box = Box((z, y, x), (z + self.shape[0], y + self.shape[1], x + self.shape[2]))
        return box.intersection(Box.of_shape(self.volume_shape))

    def chosen(self, max_voxels: int, seed: int) -> list[int]:
        """Every unit where they fit in `max_voxels`, else one from each of as many equal runs of units as fit, at least one."""
        n_units = math.prod(self.grid)
        if Box.of_shape(self.volume_shape).n_voxels <= max_voxels:
            return list(range(n_units))
        return _spread(n_units, max(1, max_voxels // math.prod(self.shape)), seed)

    def parts(self, box: Box) -> Iterator[Box]:
        """The pieces of a unit that are padding where they are constant: its chunks, or itself where those are tiny."""
        if Box.of_shape(self.chunk_shape).n_voxels < PADDING_VOXELS:
            yield box
        else:
            yield from box.split(self.chunk_shape)


def _unpadded_runs(volume: GreyVolume, units: _Units, chosen: list[int], padding: set[float]) -> Iterator[VoxelArray]:
    """All voxels but those of chunks that are padding, flat, so many at a time; `padding` gains the values of those."""
    least = min(PADDING_VOXELS, math.prod(volume.shape))
    for index in chosen:
        box = units.box(index)
        voxels = _read(volume, box)
        for part in units.parts(box):
            piece = voxels[part.slices_in(box)]
            first = piece[0, 0, 0]
            if piece.size >= least and piece[-1, -1, -1] == first and (piece == first).all():
                padding.add(float(first))
            else:
                yield from _runs(piece)


def _counted(volume: GreyVolume, units: _Units, chosen: list[int]) -> tuple[Float64Array, Int64Array, set[float]]:
    """Every value of an integer type of up to 16 bits, its count, and the values of padding."""
    info = np.iinfo(volume.dtype)
    counts = np.zeros(2**info.bits, np.int64)
    padding: set[float] = set()
    for run in _unpadded_runs(volume, units, chosen, padding):
        counts += np.bincount(run.astype(np.intp) - info.min, minlength=counts.size)
    counts[[int(value) - info.min for value in padding]] = 0  # in the chunks that padding fills only in part
    return np.arange(counts.size, dtype=np.float64) + info.min, counts, padding


def _binned(volume: GreyVolume, units: _Units, chosen: list[int]) -> tuple[Float64Array, Int64Array, set[float]]:
    """Centres of equal bins of a wider type, their counts, and the values of padding: a coarse pass, then a fine one."""
    coarse = np.zeros(N_BINS, np.int64)
    padding: set[float] = set()
    for run in _unpadded_runs(volume, units, chosen, padding):
        coarse += np.bincount(_ordered_codes(run), minlength=N_BINS)
    if not coarse.any():
        return np.zeros(0), np.zeros(0, np.int64), padding
    low, width, half = _fine_bins(coarse, is_integer=volume.dtype.kind in "iu")
    counts = np.zeros(N_BINS, np.int64)
    for index in chosen:
        for run in _runs(_read(volume, units.box(index))):
            bins = np.clip((_kept(run, sorted(padding)) - low) // width, 0, N_BINS - 1)
            counts += np.bincount(bins.astype(np.intp), minlength=N_BINS)
    return np.arange(N_BINS, dtype=np.float64) * width + (low + half), counts, padding


def _fine_bins(coarse: Int64Array, *, is_integer: bool) -> tuple[float, float, float]:
    """Begin of the first bin, width of each, and what leads from its begin to its centre."""
    cumulative = np.cumsum(coarse)
    first, last = (int(np.searchsorted(cumulative, -(-cumulative[-1] * permille // 1000))) for permille in (1, 999))
    # one code more on both sides: rounding to float32 may have carried a voxel over an edge
    low, high = _smallest_of_code(first - 1), _smallest_of_code(last + 2)
    if not is_integer:
        width = (high - low) / N_BINS
        return low, width, width / 2
    width = float(max(1, math.ceil((math.ceil(high) - math.floor(low)) / N_BINS)))
    return float(math.floor(low)), width, (width - 1) / 2


def _ordered_codes(values: VoxelArray) -> npt.NDArray[np.uint32]:
    """The first 16 bits of each value as float32, changed so that larger values have larger codes."""
    bits = _kept(values, []).astype(np.float32).view(np.uint32)
    codes: npt.NDArray[np.uint32] = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000)) >> np.uint32(16)
    return codes


def _smallest_of_code(code: int) -> float:
    """The smallest value whose code this is; the largest finite one for codes beyond."""
    bits = np.uint32(min(max(code, 0), N_BINS - 1) << 16)
    value = float((bits ^ np.uint32(0x80000000) if bits >> 31 else ~bits).view(np.float32))
    return value if math.isfinite(value) else math.copysign(LARGEST, code - N_BINS / 2)


def _slices(
    volume: GreyVolume, units: _Units, padding: list[float], seed: int
) -> tuple[Int64Array, Float64Array, Float64Array]:
    """Index, mean and standard deviation of slices: a few rows of units, in each the same columns."""
    n_z, n_y, n_x = units.grid
    rows, columns = _spread(n_z, FLICKER_ROWS, seed), _spread(n_y * n_x, FLICKER_COLUMNS, seed)
    # number, sum and sum of squares of the voxels of each slice
    sums = [
        np.sum([_moments(_read(volume, units.box(row * n_y * n_x + column)), padding) for column in columns], axis=0)
        for row in rows
    ]
    z = np.concatenate([row * units.shape[0] + np.arange(len(found)) for row, found in zip(rows, sums, strict=True)])
    n, total, squares = np.concatenate(sums).T
    kept = n > n.max() / 4  # the mean of a slice that is mostly padding says little
    means = total[kept] / n[kept]
    return z[kept], means, np.sqrt(np.maximum(squares[kept] / n[kept] - means**2, 0))


def _moments(voxels: VoxelArray, padding: list[float]) -> Float64Array:
    """(z, 3): number, sum and sum of squares of the voxels of each slice that are not padding."""
    kept = (_kept(plane.ravel(), padding) for plane in voxels)
    return np.array([(values.size, values.sum(), (values**2).sum()) for values in kept])


def _read(volume: GreyVolume, box: Box) -> VoxelArray:
    voxels = volume.read(box)
    check_finite(voxels, box)
    return voxels


def _runs(voxels: VoxelArray) -> Iterator[VoxelArray]:
    """All voxels, flat, so many at a time."""
    flat = voxels.ravel()
    return (flat[begin : begin + RUN_VOXELS] for begin in range(0, flat.size, RUN_VOXELS))


def _kept(values: VoxelArray, padding: list[float]) -> Float64Array:
    """The values (n,) that are not padding, cut to the range of float32, so that no sum or ratio of them overflows."""
    kept = values[~np.isin(values, padding)] if padding else values
    return np.clip(kept.astype(np.float64), -LARGEST, LARGEST)


def _spread(n_things: int, n_wanted: int, seed: int) -> list[int]:
    """All indices below `n_things`, or one drawn from each of `n_wanted` equal runs of them."""
    if n_things <= n_wanted:
        return list(range(n_things))
    edges = [i * n_things // n_wanted for i in range(n_wanted + 1)]
    chosen: list[int] = np.random.default_rng(seed).integers(edges[:-1], edges[1:]).tolist()
    return chosen
