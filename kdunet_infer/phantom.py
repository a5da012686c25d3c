"""Synthetic electron microscopy with ground truth: any box of an endless volume, a pure function of seed and coordinates.

    hashed lattices -> warp (bends space) -> cells (power diagram of jittered sites) -> cytoplasm and membranes
    -> tubules, lysosomes, vesicles, mitochondria (each only inside its own bounding box and cell) -> blur -> shot noise

Three rules make a box's bytes independent of how the volume is split, and of the platform. (1) Randomness is a hash of
global integer coordinates, never a stream. (2) Per voxel, floats meet only + - * / sqrt, min, max, floor and table
look-ups, each exactly rounded by IEEE 754, in a fixed order: no sin, exp, dot products or library sums. (3) What is
left out to save time (sites too far to matter) could not have changed a bit. Knows no Zarr, models or tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kdunet_infer.blockwise import Float32Array, UInt8Array
from kdunet_infer.errors import GeometryError
from kdunet_infer.geometry import ZYX, Box

UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]
Slices = tuple[slice, slice, slice]

# All lengths are voxels; think of 5 nm. Grey levels are those of 8-bit FIB-SEM: dark stain, light cytoplasm.

CELL_SPACING = 56  # pitch of the jittered sites: 280 nm, an ordinary neurite
CELL_JITTER = 0.95  # share of the pitch over which a site is drawn; 1 would let two sites touch and make slivers
CELL_WEIGHT = 2600.0  # voxels^2, largest power-diagram weight; most are far smaller: few cells swell, many are thin
CELL_RUN = 4  # sites in a row that may be one cell: elongated neurites, 4 x 56 long
LONELY = 0.25  # share of sites that are a cell of their own: boutons, spines
GIANT = 0.12  # share of CELL_RUN^3 cubes of sites that are one big cell: dendrites, somata

WARPS = ((84, 36.0), (32, 16.0), (14, 4.0))  # (lattice pitch, amplitude): bends of neurites, bulges, waves of membranes
WARP_REACH = 57  # no voxel is displaced by more: the amplitudes' sum and rounding
TILE = 20  # cells are found tile by tile (on a global grid), so that a tile has few sites to compare
ROUNDING = 3.0  # softness of cell corners, which opens a little space where three cells meet
SOFTNESS = 6.0  # softness of the edge along which an organelle is cut off by its cell's margin
REACH = 16.0  # distances to the cell's face are known up to here, and called REACH beyond
LIMIT = REACH + ROUNDING / 4  # the same before corners are rounded, which takes up to ROUNDING / 4
# A point has a site in its own grid cell, so within 95 voxels; hence the winner is within sqrt(95^2 + CELL_WEIGHT) = 108, and
# a site whose plane with it is less than LIMIT away is within 150.
CELL_REACH = 150
MARGIN = 4.0  # organelles keep this far from their cell's face, which the membrane fills

CYTOPLASM = (152.0, 48.0)  # lightest is the sum: cells differ
# Cytoplasm's grain: lattice pitch, grey levels; specks (ribosomes) where it exceeds 0.4, and their levels
GRAIN = (6, 24.0, 0.4, 70.0)
MOTTLE = (15, 18.0)  # lattice pitch, grey levels: the same, coarser; also folds the cristae
MEMBRANE = 58.0  # grey level of stained membrane

SHOT_NOISE = (4.0, 0.6)  # standard deviation in grey levels: constant, and per square root of grey level
BLUR = (6 / 16, 4 / 16, 1 / 16)  # binomial kernel, sigma 1 voxel: the microscope's point spread
BLUR_REACH = 2

FARTHEST = 2**40  # largest coordinate; far from where int64 arithmetic on coordinates could overflow


def phantom_box(box: Box, seed: int) -> tuple[UInt8Array, UInt8Array]:
    """Image and truth of `box`, both (z, y, x) uint8; truth is 1 inside mitochondria (outer membrane included), else 0.

    A pure function: phantom_box(whole, seed) cut to a box equals phantom_box(box, seed) bit for bit, and the volume
    has no faces. Works on about 60 bytes a voxel of the box grown by 2.

    Raises GeometryError for a seed outside 0..2**64-1 or coordinates beyond 2**40.
    """
    _check(box, seed)
    scene = _Scene.of_box(box.grown((BLUR_REACH,) * 3), seed)
    truth = np.zeros(scene.box.shape, np.uint8)
    for organelle in _organelles(scene):
        organelle.draw(scene, truth)
    image = _with_shot_noise(_blurred(scene.grey), box, seed)
    return image, np.ascontiguousarray(truth[box.slices_in(scene.box)])


def _check(box: Box, seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise GeometryError(f"phantom seed is {seed}; give an integer from 0 to 2**64 - 1.")
    if any(abs(c) > FARTHEST for c in box.begin + box.end):
        raise GeometryError(f"phantom box {box} has a coordinate beyond {FARTHEST}; choose a box nearer the origin.")


# ---- randomness: hashes of integers ----------------------------------------------------------------------------------


def _mixed(h: UInt64Array) -> UInt64Array:
    """Splitmix64's finaliser: every input bit reaches every output bit."""
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


def _hash(seed: int, purpose: str, *coordinates: Int64Array) -> UInt64Array:
    """Hash of seed, purpose and integer coordinates, which broadcast against each other; at least 1-D."""
    h = np.array([seed], np.uint64)
    for byte in purpose.encode():
        h = _mixed(h + np.uint64(byte))
    for coordinate in coordinates:
        h = _mixed(h * np.uint64(0x9E3779B97F4A7C15) + np.asarray(coordinate, np.int64).view(np.uint64))
    return h


def _uniform(seed: int, purpose: str, *coordinates: Int64Array) -> Float32Array:
    """Hashed numbers in [0, 1), 24 bits: exact in float32."""
    return (_hash(seed, purpose, *coordinates) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def _spline(begin: int, end: int, pitch: int) -> tuple[Int64Array, Float32Array]:
    """First lattice index (n,) and the weights (3, n) of the quadratic B-spline at voxels begin..end-1."""
    voxel = np.arange(begin, end, dtype=np.int64)
    f = ((voxel % pitch).astype(np.float32) + np.float32(0.5)) / np.float32(pitch)
    g = 1 - f
    return voxel // pitch, np.stack([g * g / 2, np.float32(0.5) + f * g, f * f / 2])


def _lattice_noise(box: Box, seed: int, purpose: str, pitch: int, out: Float32Array, amplitude: float) -> None:
    """Add smooth noise within +-amplitude to `out` (z, y, x): hashed lattice values, interpolated along x, then y, then z."""
    axes = [_spline(begin, end, pitch) for begin, end in zip(box.begin, box.end, strict=True)]
    z, y, x = (np.arange(index[0], index[-1] + 3) for index, _ in axes)
    values = (_uniform(seed, purpose, z[:, None, None], y[:, None], x) * 2 - 1) * np.float32(amplitude)
    (iz, wz), (iy, wy), (ix, wx) = axes
    ix, iy, iz = ix - ix[0], iy - iy[0], iz - iz[0]
    values = values[..., ix] * wx[0] + values[..., ix + 1] * wx[1] + values[..., ix + 2] * wx[2]
    wy = wy[..., None]
    values = values[:, iy] * wy[0] + values[:, iy + 1] * wy[1] + values[:, iy + 2] * wy[2]
    for k, i in enumerate(iz):  # plane by plane: stays in the cache
        out[k] += values[i] * wz[0, k] + values[i + 1] * wz[1, k] + values[i + 2] * wz[2, k]


# ---- cells: a power diagram of jittered sites in warped space -----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sites:
    """The points whose power diagram makes the cells: a block of their grid, of CELL_SPACING, (z, y, x) sites."""

    first: ZYX
    """Grid index of the first."""
    offset: Float32Array
    """(3, z, y, x) voxels from the grid cell's first corner."""
    weight: Float32Array
    """(z, y, x) voxels^2."""
    cell: UInt32Array
    """(z, y, x) which cell the site belongs to: a hash, so its bits also serve as the cell's random numbers."""
    along: Int64Array
    """(z, y, x) axis along which the cell may run."""

    @classmethod
    def around(cls, box: Box, seed: int) -> _Sites:
        """All sites of the grid cells that `box` touches."""
        cells = box.snapped((CELL_SPACING,) * 3)
        z, y, x = (np.arange(b // CELL_SPACING, e // CELL_SPACING) for b, e in zip(cells.begin, cells.end, strict=True))
        grid = z[:, None, None], y[:, None], x
        jitter = np.stack([_uniform(seed, f"site {axis}", *grid) for axis in "zyx"])
        offset = (np.float32((1 - CELL_JITTER) / 2) + jitter * np.float32(CELL_JITTER)) * np.float32(CELL_SPACING)
        u = _uniform(seed, "weight", *grid)
        weight = u * u * u * np.float32(CELL_WEIGHT)
        return cls((int(z[0]), int(y[0]), int(x[0])), offset, weight, *_cell_of_sites(grid, seed))

    def near(self, points: Float32Array, origin: ZYX) -> _Sites:
        """Those that can shape the cells at points (3, n) of warped space, which are seen from `origin`."""
        low = np.floor(points.min(axis=1)).astype(np.int64) + origin - CELL_REACH
        high = np.ceil(points.max(axis=1)).astype(np.int64) + origin + CELL_REACH
        begin = [int(c) // CELL_SPACING - f for c, f in zip(low, self.first, strict=True)]
        end = [int(c) // CELL_SPACING + 1 - f for c, f in zip(high, self.first, strict=True)]
        within = min(begin) >= 0 and all(e <= n for e, n in zip(end, self.weight.shape, strict=True))
        assert within, "the scene holds every site that its points can need"
        z, y, x = here = tuple(slice(b, e) for b, e in zip(begin, end, strict=True))
        first = self.first[0] + z.start, self.first[1] + y.start, self.first[2] + x.start
        return _Sites(first, self.offset[:, z, y, x], self.weight[here], self.cell[here], self.along[here])

    def corners(self) -> tuple[Int64Array, Int64Array, Int64Array]:
        """First corner of each site's grid cell, global voxels; broadcast to (z, y, x)."""
        z, y, x = (np.arange(f, f + n) * CELL_SPACING for f, n in zip(self.first, self.weight.shape, strict=True))
        return z[:, None, None], y[:, None], x

    def seen_from(self, origin: ZYX) -> Float32Array:
        """(3, n) flattened positions seen from a voxel: small numbers, so float32 holds them however far the voxel is."""
        position = np.stack([
            offset + (corner - o).astype(np.float32)
            for offset, corner, o in zip(self.offset, self.corners(), origin, strict=True)
        ])  # fmt: skip
        return position.reshape(3, -1)


def _cell_of_sites(grid: tuple[Int64Array, ...], seed: int) -> tuple[UInt32Array, Int64Array]:
    """Cell (z, y, x) of each site and the axis it runs along: rows of CELL_RUN sites merge, cubes sometimes, some sites never.

    `grid` holds the sites' grid indices along z, y, x and broadcasts.
    """
    cube = [index // CELL_RUN for index in grid]
    along = (_hash(seed, "axis", *cube) % np.uint64(3)).astype(np.int64)
    row = [np.where(along == axis, c + FARTHEST, g) for axis, (c, g) in enumerate(zip(cube, grid, strict=True))]
    lonely = _uniform(seed, "lonely", *grid) < LONELY  # + FARTHEST above: no row shares a lonely site's name
    giant = _uniform(seed, "giant", *cube) < GIANT
    cell = np.where(lonely, _hash(seed, "cell", *grid), _hash(seed, "cell", *row))
    cell = np.where(giant, _hash(seed, "giant cell", *cube), cell)
    return cell.astype(np.uint32), along


def _relevant(points: Float32Array, sites: Float32Array, weight: Float32Array) -> IntArray:
    """Indices of the sites (3, m) that can win, or come within LIMIT of the winner, in the bounding box of points (3, n).

    Exactly conservative: the difference of two sites' powers is affine, so its least value over a box is known.
    """
    low, high = points.min(axis=1), points.max(axis=1)
    middle, half = (low + high) / 2, (high - low) / 2
    power = _squares(sites - middle[:, None]) - weight
    winner = int(power.argmin())
    may_win = np.flatnonzero(power - power[winner] <= _swing(sites, sites[:, [winner]], half)[0] + 1)  # 1: rounding
    rivals = sites[:, may_win]
    apart = np.sqrt(_squares(sites[:, None, :] - rivals[:, :, None]))
    excess = power - power[may_win, None] - _swing(sites, rivals, half)
    return np.flatnonzero((excess <= 2 * np.float32(LIMIT) * apart + 1).any(axis=0))


def _swing(sites: Float32Array, rivals: Float32Array, half: Float32Array) -> Float32Array:
    """By how much the powers of sites (3, m) against rivals (3, k) change within half a box: (k, m)."""
    apart = np.abs(sites[:, None, :] - rivals[:, :, None])
    result: Float32Array = 2 * (apart[0] * half[0] + apart[1] * half[1] + apart[2] * half[2])
    return result


def _squares(vectors: Float32Array) -> Float32Array:
    """Squared lengths (...) of vectors (3, ...)."""
    result: Float32Array = vectors[0] * vectors[0] + vectors[1] * vectors[1] + vectors[2] * vectors[2]
    return result


def _nearest_cells(points: Float32Array, origin: ZYX, all_sites: _Sites) -> tuple[UInt32Array, Float32Array]:
    """Cell (n,) of each point (3, n), seen from `origin`, and its distance (n,) from that cell's face.

    The distance is at most REACH, and rounded at the cell's corners.
    """
    near = all_sites.near(points, origin)
    sites, weight, cell = near.seen_from(origin), near.weight.ravel(), near.cell.ravel()
    chosen = _relevant(points, sites, weight)
    sites, weight, cell = sites[:, chosen], weight[chosen], cell[chosen]
    if (cell == cell[0]).all():
        return np.full(points.shape[1], cell[0]), np.full(points.shape[1], REACH, np.float32)
    power = _powers(points, sites, weight)
    winner = power.argmin(axis=0)
    power -= power.min(axis=0)
    return cell[winner], _face_distance(power, winner, sites, cell)


def _powers(points: Float32Array, sites: Float32Array, weight: Float32Array) -> Float32Array:
    """|point - site|^2 - weight, less |point|^2 which all sites share: (sites, points)."""
    power = np.empty((sites.shape[1], points.shape[1]), np.float32)
    constant, slope = _squares(sites) - weight, -2 * sites
    for j, row in enumerate(power):
        np.multiply(points[0], slope[0, j], out=row)
        row += constant[j]
        row += points[1] * slope[1, j]
        row += points[2] * slope[2, j]
    return power


def _face_distance(excess: Float32Array, winner: IntArray, sites: Float32Array, cell: UInt32Array) -> Float32Array:
    """Distance (n,) to the nearest face towards another cell, from the power in excess of the winner's (sites, n).

    excess / (2 |site - winner|) is the exact distance to the plane between the two.
    """
    twice_apart = 2 * np.sqrt(_squares(sites[:, :, None] - sites[:, None, :]))
    same = cell[:, None] == cell[None, :]
    factor = 1 / np.where(same, np.float32(1), twice_apart)
    penalty = np.where(same, np.float32(2 * LIMIT), np.float32(0))
    beyond = np.float32(LIMIT) * twice_apart.max(axis=1) + 1  # 1: rounding
    first = np.full(winner.shape, LIMIT, np.float32)
    second = first.copy()
    for j, row in enumerate(excess):
        if row.min() > beyond[j]:
            continue  # beyond LIMIT everywhere: the minima below would not change
        row *= factor[j].take(winner)
        row += penalty[j].take(winner)
        np.minimum(second, np.maximum(first, row), out=second)
        np.minimum(first, row, out=first)
    corner = np.maximum(1 - (second - first) / np.float32(ROUNDING), 0)
    result: Float32Array = np.minimum(first - corner * corner * np.float32(ROUNDING / 4), np.float32(REACH))
    return result


# ---- the scene: everything known of a box before organelles ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tiles:
    """Where the box's tiles lie in warped space, so that an organelle visits few of them; n tiles."""

    begin: Int64Array
    """(n, 3) first voxel, global."""
    low: Float64Array
    """(n, 3) least warped position of its voxels, global."""
    high: Float64Array

    @classmethod
    def of_box(cls, box: Box, warp: Float32Array) -> _Tiles:
        """The tiles of the global grid that `box` touches."""
        begin, low, high = [], [], []
        for tile, here in _tiles(box):
            inside = tile.intersection(box)
            part = warp[(slice(None), *here)].reshape(3, -1)
            begin.append(tile.begin)
            low.append(part.min(axis=1) + np.array(inside.begin))
            high.append(part.max(axis=1) + np.array(inside.end))
        return cls(np.array(begin), np.array(low), np.array(high))

    def between(self, low: Float64Array, high: Float64Array) -> Box | None:
        """A box around all voxels that the warp may bring between two corners (3,) of warped space; None if there are none."""
        touched = ((self.low <= high) & (self.high >= low)).all(axis=1)
        if not touched.any():
            return None
        first, last = self.begin[touched].min(axis=0), self.begin[touched].max(axis=0) + TILE
        return Box((int(first[0]), int(first[1]), int(first[2])), (int(last[0]), int(last[1]), int(last[2])))


def _tiles(box: Box) -> Iterator[tuple[Box, Slices]]:
    """Tiles of the global grid that touch `box`, and the slices of `box` that each covers."""
    for tile in box.snapped((TILE,) * 3).split((TILE,) * 3):
        yield tile, tile.intersection(box).slices_in(box)


@dataclass(frozen=True, slots=True)
class _Scene:
    """Fields of a box, all (z, y, x) over `box`."""

    box: Box
    seed: int
    sites: _Sites
    """All that can matter in the box, organelles' included."""
    warp: Float32Array
    """(3, z, y, x) displacement: cells and organelles are plain shapes at voxel + warp."""
    tiles: _Tiles
    cell: UInt32Array
    depth: Float32Array
    """Distance from the cell's face, at most REACH."""
    grain: Float32Array
    mottle: Float32Array
    grey: Float32Array
    """Grey levels before blur and noise; organelles are drawn into it."""

    @classmethod
    def of_box(cls, box: Box, seed: int) -> _Scene:
        """Cells with cytoplasm and membranes."""
        sites = _Sites.around(box.grown((SITE_REACH,) * 3), seed)
        warp = np.zeros((3, *box.shape), np.float32)
        for axis, field in zip("zyx", warp, strict=True):
            for pitch, amplitude in WARPS:
                _lattice_noise(box, seed, f"warp {axis} {pitch}", pitch, field, amplitude)
        grain, mottle = np.zeros((2, *box.shape), np.float32)
        _lattice_noise(box, seed, "grain", GRAIN[0], grain, 3.0)  # 3: the spline averages most of the spread away
        _lattice_noise(box, seed, "mottle", MOTTLE[0], mottle, 3.0)
        cell, depth = _cells(box, warp, sites)
        grey = _cytoplasm(cell, depth, grain, mottle)
        return cls(box, seed, sites, warp, _Tiles.of_box(box, warp), cell, depth, grain, mottle, grey)


def _cells(box: Box, warp: Float32Array, sites: _Sites) -> tuple[UInt32Array, Float32Array]:
    """Cell and face distance of every voxel, tile by tile; tiles are anchored at the origin of the volume."""
    cell, depth = np.empty(box.shape, np.uint32), np.empty(box.shape, np.float32)
    for tile, here in _tiles(box):
        inside = tile.intersection(box)
        points = _points(inside, tile.begin, warp[(slice(None), *here)]).reshape(3, -1)
        labels, distances = _nearest_cells(points, tile.begin, sites)
        cell[here], depth[here] = labels.reshape(inside.shape), distances.reshape(inside.shape)
    return cell, depth


def _points(box: Box, origin: ZYX, warp: Float32Array) -> Float32Array:
    """Warped positions (3, z, y, x) of the voxels of `box`, seen from `origin`."""
    z, y, x = (np.arange(b - o, e - o, dtype=np.float32) for b, e, o in zip(box.begin, box.end, origin, strict=True))
    return np.stack([warp[0] + z[:, None, None], warp[1] + y[:, None], warp[2] + x])


def _cytoplasm(cell: UInt32Array, depth: Float32Array, grain: Float32Array, mottle: Float32Array) -> Float32Array:
    """Grey levels of cells without organelles: each cell its own level, textured, faces stained."""
    darkest, spread = CYTOPLASM
    _, levels, threshold, speck = GRAIN
    speckled = ((cell >> np.uint32(8)) & np.uint32(255)).astype(np.float32) * np.float32(speck / 255)
    grey = (cell & np.uint32(255)).astype(np.float32) * np.float32(spread / 255) + np.float32(darkest)
    grey += grain * np.float32(levels)
    grey -= np.maximum(grain - np.float32(threshold), 0) * speckled
    grey += mottle * np.float32(MOTTLE[1])
    grey += (np.float32(MEMBRANE) - grey) * _look_up(FACE, depth)
    return grey


# ---- profiles: tables over a distance, because a table is exact everywhere and sin or exp are not ------------------------

STEPS = 8  # table entries per voxel


def _profile(*knots: tuple[float, float]) -> Float32Array:
    """Table of the polyline through (distance, value) knots, whose first distance is 0."""
    distances = [k / STEPS for k in range(int(knots[-1][0] * STEPS) + 1)]
    return np.array([_on_polyline(d, knots) for d in distances], np.float32)


def _on_polyline(distance: float, knots: tuple[tuple[float, float], ...]) -> float:
    for (d0, v0), (d1, v1) in pairwise(knots):
        if distance <= d1:
            return v0 + (v1 - v0) * (distance - d0) / (d1 - d0)
    return knots[-1][1]


def _look_up(table: Float32Array, distance: Float32Array) -> Float32Array:
    """Table value at each distance; beyond its ends the last one."""
    index = (distance * np.float32(STEPS)).astype(np.int32)
    return table.take(index, mode="clip")


FACE = _profile((0, 0.72), (0.5, 0.78), (1.1, 1), (1.9, 1), (2.9, 0.15), (4, 0))  # staining: gap, membrane, cytoplasm
MITOCHONDRION = _profile((0, 62), (2.2, 60), (3.0, 80), (3.6, 82), (4.4, 72), (6, 102), (8, 102))  # two membranes, matrix
TUBULE = _profile((0, 75), (3, 80), (6, 128), (9, 135))  # reticulum: rim, lumen
LYSOSOME = _profile((0, 70), (2, 68), (4, 92), (9, 86))  # as dark as mitochondria, and no cristae
VESICLE = _profile((0, 185), (1.4, 178), (2.6, 95), (4.0, 88), (5, 160))  # over the distance from its centre


# ---- organelles ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Local:
    """Voxels of one organelle, n of them, in its own frame."""

    t: Float32Array
    """Along its axis."""
    u: Float32Array
    v: Float32Array
    depth: Float32Array
    """Below its surface."""
    grain: Float32Array
    mottle: Float32Array
    under: Float32Array
    """Grey levels before it is drawn."""


Paint = Callable[["_Organelle", "_Scene", "_Local"], Float32Array]


@dataclass(frozen=True, slots=True)
class _Kind:
    """What organelles of one kind have in common; ranges are drawn from evenly."""

    name: str
    per_site: float
    """Expected number for a site, of at most `slots`."""
    slots: int
    radius: tuple[float, float]
    half_length: tuple[float, float]
    """Of the straight axis: the whole is 2 (half_length + radius) long."""
    flatness: float
    """Width over thickness of the cross-section."""
    spread: float
    """Voxels by which the centre may lie off the site, along each axis."""
    room: float
    """Least distance of the centre from the cell's face."""
    straightness: float
    """0: any direction; large: along the cell's run."""
    paint: Paint
    is_truth: bool = False

    @property
    def reach(self) -> float:
        """Voxels from the site, along any axis, that no organelle of this kind reaches beyond."""
        end = self.half_length[1] + self.radius[1]
        return self.spread + end + BEND * end * end + self.radius[1] + 2


@dataclass(frozen=True, slots=True)
class _Organelle:
    """A bent capsule in warped space, cut off at the margin of its cell."""

    kind: _Kind
    cell: np.uint32
    origin: ZYX
    """Voxel that `centre` is seen from."""
    centre: Float32Array
    """(3,) zyx."""
    frame: Float32Array
    """(3, 3) unit vectors, zyx: along the axis, towards the bend, across."""
    radius: float
    half_length: float
    bend: float
    """Curvature: the axis leaves the straight line by bend * t^2."""
    draws: Float32Array
    """(4,) numbers in [0, 1) for its painter."""

    def part_of(self, scene: _Scene) -> Box:
        """A box around every voxel of the scene it can colour; may be empty."""
        end = self.half_length + self.radius
        axis, side = np.abs(self.frame[0]), np.abs(self.frame[1])
        extent = axis * end + side * (abs(self.bend) * end * end) + self.radius + 1  # 1: rounding
        centre = self.centre.astype(np.float64) + np.array(self.origin)
        part = scene.tiles.between(centre - extent, centre + extent)
        return Box(scene.box.begin, scene.box.begin) if part is None else part.intersection(scene.box)

    def draw(self, scene: _Scene, truth: UInt8Array) -> None:
        """Colour the scene's grey levels and, where this kind is sought, its truth; what is already sought stays."""
        part = self.part_of(scene)
        if part.n_voxels == 0:
            return
        here = part.slices_in(scene.box)
        where = np.nonzero((scene.cell[here] == self.cell) & (scene.depth[here] > MARGIN) & (truth[here] == 0))
        z, y, x = (i + s.start for i, s in zip(where, here, strict=True))
        voxels = (z * scene.box.shape[1] + y) * scene.box.shape[2] + x
        position = self._seen_from_centre(scene, voxels, (z, y, x))
        local, inside = self._local(scene, voxels, position)
        scene.grey.reshape(-1)[voxels[inside]] = self.kind.paint(self, scene, local)
        if self.kind.is_truth:
            truth.reshape(-1)[voxels[inside]] = 1

    def _seen_from_centre(self, scene: _Scene, voxels: IntArray, zyx: tuple[IntArray, ...]) -> list[Float32Array]:
        """Warped positions of voxels, given as flat indices (n,) and as indices along the scene's axes."""
        position = []
        for field, index, begin, origin, centre in zip(scene.warp, zyx, scene.box.begin, self.origin, self.centre, strict=True):
            p = field.reshape(-1)[voxels]
            p += (index + (begin - origin)).astype(np.float32)
            p -= centre
            position.append(p)
        return position

    def _local(self, scene: _Scene, voxels: IntArray, position: list[Float32Array]) -> tuple[_Local, npt.NDArray[np.bool_]]:
        """Those of the voxels that are inside it, in its own frame, and which (n,) those are."""
        t, u, v = (position[0] * row[0] + position[1] * row[1] + position[2] * row[2] for row in self.frame)
        u -= t * t * np.float32(self.bend)
        beyond = np.maximum(np.abs(t) - np.float32(self.half_length), 0)
        flat = v * np.float32(self.kind.flatness)
        own = np.float32(self.radius) - np.sqrt(u * u + flat * flat + beyond * beyond)
        depth = _smooth_minimum(own, scene.depth.reshape(-1)[voxels] - np.float32(MARGIN))
        inside = depth > 0
        fields = [field.reshape(-1)[voxels[inside]] for field in (scene.grain, scene.mottle, scene.grey)]
        return _Local(t[inside], u[inside], v[inside], depth[inside], *fields), inside


def _smooth_minimum(a: Float32Array, b: Float32Array) -> Float32Array:
    """The smaller of the two, rounded where they cross."""
    softness = np.float32(SOFTNESS)
    overlap = np.maximum(1 - np.abs(a - b) / softness, 0)
    result: Float32Array = np.minimum(a, b) - overlap * overlap * (softness / 4)
    return result


def _paint_mitochondrion(organelle: _Organelle, scene: _Scene, local: _Local) -> Float32Array:
    """Two membranes around a dark matrix with cristae: lamellae, folded by noise, along or across the axis."""
    tilt, period, phase, level = (float(d) for d in organelle.draws)
    along = 0.15 + 0.85 * tilt  # share of the axis in the direction that counts lamellae
    count = local.t * np.float32(along) + local.u * np.float32(1 - 0.6 * along) + local.v * np.float32(0.4)
    count = count / np.float32(8 + 5 * period) + local.mottle * np.float32(0.55) + np.float32(phase)
    wave = np.abs(count - np.floor(count) - np.float32(0.5)) * 4 - 1  # triangle, -1..1
    strength = np.clip((local.depth - 4) / 3, 0, 1) * np.float32(21)
    grey = _look_up(MITOCHONDRION, local.depth) + np.float32(14 * (level - 0.5))
    grey += np.clip(wave * np.float32(1.6), -1, 1) * strength + local.grain * np.float32(10)
    return grey


def _paint_tubule(organelle: _Organelle, scene: _Scene, local: _Local) -> Float32Array:
    """Dark rim, lighter lumen."""
    return _look_up(TUBULE, local.depth * np.float32(9 / organelle.radius)) + local.grain * np.float32(10)


def _paint_lysosome(organelle: _Organelle, scene: _Scene, local: _Local) -> Float32Array:
    """Dark and grainy, without cristae."""
    level = np.float32(30 * (organelle.draws[0] - np.float32(0.4)))
    return _look_up(LYSOSOME, local.depth) + local.grain * 9 + local.mottle * 9 + level


VESICLE_PITCH = 10.0  # of the cluster's own lattice, one vesicle to a lattice cell
VESICLE_JITTER = 1.6  # voxels to either side; pitch / 2 - jitter is left for the radius, about 4 = 40 nm across
VESICLE_SHARE = 0.75  # of lattice cells with a vesicle
VESICLES = 8  # lattice cells along each axis of a cluster


def _paint_vesicles(organelle: _Organelle, scene: _Scene, local: _Local) -> Float32Array:
    """A cluster of small dark-rimmed balls, none of them cut by a membrane."""
    centres, exists = _vesicles(organelle, scene)
    position = (local.t, local.u + local.t * local.t * np.float32(organelle.bend), local.v)
    steps = [np.floor(p / np.float32(VESICLE_PITCH)).astype(np.int32) + VESICLES // 2 for p in position]
    steps = [np.clip(s, 0, VESICLES - 1) for s in steps]
    index = (steps[0] * VESICLES + steps[1]) * VESICLES + steps[2]
    away = np.sqrt(_squares(np.stack([p - c.take(index) for p, c in zip(position, centres, strict=True)])))
    ball = (away < 5) & exists.take(index)
    return np.where(ball, _look_up(VESICLE, away) + local.grain * 5, local.under)


def _vesicles(organelle: _Organelle, scene: _Scene) -> tuple[Float32Array, npt.NDArray[np.bool_]]:
    """Centres (3, n) in the cluster's frame, and which exist (n,): those that fit into the cell."""
    steps = np.indices((VESICLES,) * 3).reshape(3, -1)
    key = np.array([int(organelle.draws[0] * 2**24)])
    jitter = np.stack([_uniform(scene.seed, f"vesicle {axis}", key, *steps) for axis in "tuv"]) * 2 - 1
    centres = (steps - VESICLES // 2 + np.float32(0.5)) * np.float32(VESICLE_PITCH) + jitter * np.float32(VESICLE_JITTER)
    centres = centres.astype(np.float32)
    points = _back(organelle.frame, centres) + organelle.centre[:, None]
    cell, depth = _nearest_cells(points, organelle.origin, scene.sites)
    exists = (cell == organelle.cell) & (depth > MARGIN + 4)
    exists &= _uniform(scene.seed, "vesicle", key, *steps) < VESICLE_SHARE
    exists &= _squares(centres) < np.float32((organelle.radius - 5) ** 2)
    return centres, exists


def _back(frame: Float32Array, local: Float32Array) -> Float32Array:
    """zyx vectors (3, n) of vectors (3, n) in the frame."""
    return np.stack([local[0] * frame[0, k] + local[1] * frame[1, k] + local[2] * frame[2, k] for k in range(3)])


KINDS = (  # in the order of drawing: what is sought comes last, and nothing covers it
    _Kind("tubule", 1.6, 3, (5.0, 9.0), (8.0, 34.0), 2.2, 24.0, 7.0, 0.6, _paint_tubule),
    _Kind("lysosome", 0.22, 1, (8.0, 15.0), (0.0, 5.0), 1.0, 16.0, 11.0, 0.0, _paint_lysosome),
    _Kind("vesicles", 0.3, 1, (26.0, 42.0), (0.0, 1.0), 1.0, 8.0, 11.0, 0.0, _paint_vesicles),
    _Kind("mitochondrion", 0.7, 1, (11.0, 20.0), (18.0, 58.0), 1.15, 10.0, 13.5, 1.4, _paint_mitochondrion, is_truth=True),
)
BEND = 0.006  # largest curvature per voxel: the tip of a long mitochondrion is 20 voxels off its straight axis

# A box's organelles have their site within WARP_REACH + the kinds' reach + a grid cell; what they are depends on the cell at
# points within 3 grid cells of that site, and those on sites within CELL_REACH.
SITE_REACH = WARP_REACH + int(max(kind.reach for kind in KINDS)) + 4 * CELL_SPACING + CELL_REACH


def _organelles(scene: _Scene) -> Iterator[_Organelle]:
    """All organelles that may reach into the scene, kind by kind, in the order of their sites."""
    for kind in KINDS:
        for slot in range(kind.slots):
            yield from _organelles_of_kind(scene, kind, slot)


def _organelles_of_kind(scene: _Scene, kind: _Kind, slot: int) -> Iterator[_Organelle]:
    """Those in one slot, one per site at most; sites too far to reach into the scene are left out."""
    low, high = scene.tiles.low.min(axis=0) - kind.reach, scene.tiles.high.max(axis=0) + kind.reach
    z, y, x = (
        np.arange((int(lo) - CELL_SPACING) // CELL_SPACING, int(hi) // CELL_SPACING + 1)
        for lo, hi in zip(low, high, strict=True)
    )
    grid = z[:, None, None], y[:, None], x
    draws = np.stack([_uniform(scene.seed, f"{kind.name} {slot} {k}", *grid) for k in range(17)], axis=-1)
    for i, j, k in np.argwhere(draws[..., 0] < kind.per_site / kind.slots):
        organelle = _organelle(scene, kind, (int(z[i]), int(y[j]), int(x[k])), draws[i, j, k])
        if organelle is not None:
            yield organelle


def _organelle(scene: _Scene, kind: _Kind, site: ZYX, draws: Float32Array) -> _Organelle | None:
    """The organelle of the site with a grid index, or None where its cell has no room for it."""
    here = tuple(i - f for i, f in zip(site, scene.sites.first, strict=True))
    z, y, x = (i * CELL_SPACING for i in site)
    centre = scene.sites.offset[:, here[0], here[1], here[2]] + (draws[1:4] * 2 - 1) * np.float32(kind.spread)
    cell, depth = _nearest_cells(centre[:, None], (z, y, x), scene.sites)
    if depth[0] < kind.room:
        return None
    (r0, r1), (l0, l1) = kind.radius, kind.half_length
    direction = draws[4:7] * 2 - 1
    direction[scene.sites.along[here]] += np.float32(kind.straightness if draws[7] < 0.5 else -kind.straightness)
    half_length = l0 + (l1 - l0) * float(draws[8])
    radius = r0 + (r1 - r0) * float(draws[9])
    if depth[0] < REACH:  # near a face: thinner, so that the face does not shape it too much
        radius = max(r0, min(radius, float(depth[0]) - MARGIN + 1))
    bend = BEND * float(draws[10] * 2 - 1)
    frame = _frame(direction, draws[11:14] * 2 - 1)
    return _Organelle(kind, cell[0], (z, y, x), centre, frame, radius, half_length, bend, draws[13:17])


def _frame(direction: Float32Array, hint: Float32Array) -> Float32Array:
    """(3, 3) unit vectors: along `direction`, and two across it."""
    a = direction / (np.sqrt(_squares(direction)) + np.float32(1e-6))
    n = np.stack([a[1] * hint[2] - a[2] * hint[1], a[2] * hint[0] - a[0] * hint[2], a[0] * hint[1] - a[1] * hint[0]])
    n = n / (np.sqrt(_squares(n)) + np.float32(1e-6))
    b = np.stack([n[1] * a[2] - n[2] * a[1], n[2] * a[0] - n[0] * a[2], n[0] * a[1] - n[1] * a[0]])
    return np.stack([a, b, n])


# ---- the microscope ------------------------------------------------------------------------------------------------


def _blurred(grey: Float32Array) -> Float32Array:
    """The array blurred along all three axes, smaller by BLUR_REACH on every side."""
    c0, c1, c2 = (np.float32(c) for c in BLUR)
    for axis in range(3):
        n = grey.shape[axis] - 2 * BLUR_REACH
        shifted = [grey[(slice(None),) * axis + (slice(k, k + n),)] for k in range(5)]
        out = shifted[2] * c0
        out += (shifted[1] + shifted[3]) * c1
        out += (shifted[0] + shifted[4]) * c2
        grey = out
    return grey


def _with_shot_noise(grey: Float32Array, box: Box, seed: int) -> UInt8Array:
    """Grey levels (z, y, x) as uint8 with noise that grows with the signal."""
    z, y, x = (np.arange(b, e, dtype=np.int64) for b, e in zip(box.begin, box.end, strict=True))
    rows = _hash(seed, "noise row", z[:, None], y).astype(np.uint32)
    columns = _hash(seed, "noise column", x).astype(np.uint32)
    image = np.empty(box.shape, np.uint8)
    constant, growing = (np.float32(s) for s in SHOT_NOISE)
    for k, plane in enumerate(grey):  # plane by plane: stays in the cache
        plane = np.maximum(plane, 0)
        noise = _normal(rows[k][:, None] + columns)
        image[k] = np.clip(np.rint(plane + noise * (constant + growing * np.sqrt(plane))), 0, 255)
    return image


def _normal(h: UInt32Array) -> Float32Array:
    """Nearly normal numbers, mean 0 and variance 1: the sum of the four bytes of a hash."""
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)
    h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
    h ^= h >> np.uint32(16)
    pairs = (h & np.uint32(0x00FF00FF)) + ((h >> np.uint32(8)) & np.uint32(0x00FF00FF))
    total = (pairs & np.uint32(0xFFFF)) + (pairs >> np.uint32(16))
    return (total.astype(np.float32) - 510) * np.float32(1 / 147.8)
