"""Volume shape and model card -> blocks -> tiles. Integers only: prints, compares and tests without a file or an engine.

The axes are independent, so everything here is a product of three one-dimensional cuts:

    volume   |0                                            shape|       roi: any box inside
    blocks   |........|........|........|........|........|.....|       grid of block_shape from the origin, clipped to the roi
    cores             |<- tile ->|<- tile ->|                           a block snapped outward to the stride, cut evenly
    reads         |halo|<- tile ->|halo|                                may leave the volume: mirrored there
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from kdunet_infer.card import ModelCard
from kdunet_infer.errors import GeometryError, ModelCardError
from kdunet_infer.geometry import ZYX, Box, checked_roi

YX = tuple[int, int]

BLOCK_GOAL: ZYX = (32, 1024, 1024)
"""What a block grows towards by whole shards. In y and x because the halo costs compute, (1024 + 2 * 96)^2 / 1024^2 = 1.41
against 1.89 at 512; not further, because the gain fades (1.20 at 2048) while memory goes on growing. In z, where there is no
halo, only so far that scheduling costs nothing: a block is 47 MB to read and 34 MB to write, and a few are in flight at once.
"""
TILE_GOAL = 1024
"""Longest side of a default tile's core, rounded down to the stride."""


@dataclass(frozen=True, slots=True)
class Block:
    """The unit of scheduling, writing and resuming. Boxes in global voxels."""

    index: int
    """Place in the plan, 0 to n_blocks - 1, z slowest."""
    write_box: Box
    """What this block writes; inside the region of interest, shared with no other block."""
    core_box: Box
    """`write_box` snapped outward to the stride; may leave the volume."""
    read_box: Box
    """`core_box` grown by the halo; may leave the volume."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What the engine sees: an image, or the same window of several slices. Boxes in global voxels."""

    core_box: Box
    """What is trusted; corners on the stride grid; may leave the volume."""
    read_box: Box
    """`core_box` grown by the halo; may leave the volume."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a region of interest is cut into blocks, and these into tiles. Made and checked by `plan_segmentation`."""

    volume_shape: ZYX
    roi: Box
    """Which voxels are segmented; inside the volume."""
    block_shape: ZYX
    """Whole shards; blocks lie on this grid, anchored at the volume's origin, and are clipped to `roi`."""
    tile_shape: YX
    """Longest core of a tile, a multiple of the stride."""
    stride_zyx: ZYX
    halo_zyx: ZYX

    @property
    def n_blocks(self) -> int:
        """How many blocks there are."""
        return self._grid.n_voxels

    @property
    def blocks(self) -> Iterator[Block]:
        """Every block in order; made one at a time, as there may be millions."""
        return map(self.block, range(self.n_blocks))

    def block(self, index: int) -> Block:
        """Block `index` of 0 to n_blocks - 1, computed from the index alone. Raises IndexError for any other."""
        if not 0 <= index < self.n_blocks:
            raise IndexError(f"block {index} of a plan of {self.n_blocks} blocks")
        grid = self._grid
        _, n_y, n_x = grid.shape
        place = (index // (n_y * n_x), index // n_x % n_y, index % n_x)
        (z, z_end), (y, y_end), (x, x_end) = (self._write_range(axis, grid.begin[axis] + place[axis]) for axis in range(3))
        write_box = Box((z, y, x), (z_end, y_end, x_end))
        core_box = write_box.snapped(self.stride_zyx)
        return Block(index, write_box, core_box, core_box.grown(self.halo_zyx))

    def tiles(self, block: Block, batch_size: int = 1) -> Iterator[Tile]:
        """Tiles whose cores make up the block's `core_box` without overlap.

        Windows at the same place in up to `batch_size` consecutive slices come as one tile, for the engine to take at once.
        """
        (z, y, x), (z_end, y_end, x_end) = block.core_box.begin, block.core_box.end
        for y0, y1 in pairwise(self._tile_cuts(1, y, y_end)):
            for x0, x1 in pairwise(self._tile_cuts(2, x, x_end)):
                for z0 in range(z, z_end, batch_size):
                    core_box = Box((z0, y0, x0), (min(z0 + batch_size, z_end), y1, x1))
                    yield Tile(core_box, core_box.grown(self.halo_zyx))

    @property
    def n_tiles(self) -> int:
        """How many images the engine will see."""
        return self.roi.shape[0] * len(self._core_lengths(1)) * len(self._core_lengths(2))

    @property
    def halo_overhead(self) -> float:
        """Voxels that the engine computes for each voxel kept, at least 1."""
        overhead = 1.0
        for axis in (1, 2):
            computed = sum(core + 2 * self.halo_zyx[axis] for core in self._core_lengths(axis))
            overhead *= computed / self.roi.shape[axis]
        return overhead

    def summary(self) -> str:
        """One line to print before a run."""
        z, y, x = (min(block, n) for block, n in zip(self.block_shape, self.roi.shape, strict=True))
        tile_y, tile_x = (max(self._core_lengths(axis)) for axis in (1, 2))
        return (
            f"{self.n_blocks} block{'s' * (self.n_blocks != 1)} of {z} x {y} x {x} voxels, "
            f"{self.n_tiles} tile{'s' * (self.n_tiles != 1)} of {tile_y} x {tile_x} pixels with a halo of "
            f"{self.halo_zyx[1]} x {self.halo_zyx[2]}, halo overhead {self.halo_overhead:.2f}"
        )

    @property
    def _grid(self) -> Box:
        """The blocks as voxels: which cells of the block grid the roi touches."""
        (z, y, x), (z_end, y_end, x_end) = self.roi.begin, self.roi.end
        d, h, w = self.block_shape
        return Box((z // d, y // h, x // w), (-(-z_end // d), -(-y_end // h), -(-x_end // w)))

    def _write_range(self, axis: int, cell: int) -> tuple[int, int]:
        """Begin and end, along `axis`, of what blocks in `cell` of the block grid write."""
        length = self.block_shape[axis]
        return max(cell * length, self.roi.begin[axis]), min((cell + 1) * length, self.roi.end[axis])

    def _tile_cuts(self, axis: int, begin: int, end: int) -> list[int]:
        """Borders of the tiles from `begin` to `end`, both on the stride: as few as can be, and as equal."""
        stride, longest = self.stride_zyx[axis], self.tile_shape[axis - 1]
        n_cells = (end - begin) // stride
        n_tiles = -(-n_cells // (longest // stride))
        return [begin + n_cells * i // n_tiles * stride for i in range(n_tiles + 1)]

    def _core_lengths(self, axis: int) -> list[int]:
        """Length along `axis` of every tile's core, block after block."""
        stride, lengths = self.stride_zyx[axis], []
        for cell in range(self._grid.begin[axis], self._grid.end[axis]):
            begin, end = self._write_range(axis, cell)
            cuts = self._tile_cuts(axis, begin // stride * stride, -(-end // stride) * stride)
            lengths += [b - a for a, b in pairwise(cuts)]
        return lengths


def plan_segmentation(
    shape: ZYX,
    card: ModelCard,
    *,
    shard_shape: ZYX,
    block_shape: ZYX | None = None,
    tile_shape: YX | None = None,
    roi: Box | None = None,
) -> Plan:
    """Cut a volume of `shape`, or the box `roi` of it, into blocks and tiles for the model of `card`.

    `shard_shape` is the smallest piece of the target that may have one writer (its shard, or its chunk where there is none);
    `block_shape` must be a whole multiple of it, `tile_shape` (the longest core of a tile, y and x) one of the model's stride.
    Raises GeometryError for shapes or a roi that cannot be, ModelCardError for a model that is not two-dimensional.
    """
    if card.stride_zyx[0] != 1 or card.halo_zyx[0] != 0:
        raise ModelCardError(
            f"model {card.name} has stride {card.stride_zyx[0]} and halo {card.halo_zyx[0]} along z; "
            "only networks of single slices (stride 1, halo 0) can be run."
        )
    shape = _positive("volume", shape)
    shard_shape = _positive("shard", shard_shape)
    return Plan(
        volume_shape=shape,
        roi=checked_roi(Box.of_shape(shape) if roi is None else roi, shape),
        block_shape=_default_block(shape, shard_shape) if block_shape is None else _checked_block(block_shape, shard_shape),
        tile_shape=_default_tile(card.stride_zyx) if tile_shape is None else _checked_tile(tile_shape, card.stride_zyx),
        stride_zyx=card.stride_zyx,
        halo_zyx=card.halo_zyx,
    )


def _positive(what: str, shape: ZYX) -> ZYX:
    if min(shape) < 1:
        raise GeometryError(f"{what} shape {shape} has an axis without voxels; every axis needs at least one.")
    return shape


def _default_block(shape: ZYX, shard_shape: ZYX) -> ZYX:
    z, y, x = (
        shard * min(max(1, goal // shard), -(-size // shard))
        for size, shard, goal in zip(shape, shard_shape, BLOCK_GOAL, strict=True)
    )
    return z, y, x


def _checked_block(block_shape: ZYX, shard_shape: ZYX) -> ZYX:
    if any(block % shard for block, shard in zip(_positive("block", block_shape), shard_shape, strict=True)):
        z, y, x = (-(-block // shard) * shard for block, shard in zip(block_shape, shard_shape, strict=True))
        raise GeometryError(
            f"block shape {block_shape} is not a whole multiple of the target's shard {shard_shape}, so two blocks would write "
            f"to one file; use {z},{y},{x}."
        )
    return block_shape


def _default_tile(stride_zyx: ZYX) -> YX:
    y, x = (max(1, TILE_GOAL // stride) * stride for stride in stride_zyx[1:])
    return y, x


def _checked_tile(tile_shape: YX, stride_zyx: ZYX) -> YX:
    stride_yx = stride_zyx[1:]
    if any(tile < 1 or tile % stride for tile, stride in zip(tile_shape, stride_yx, strict=True)):
        y, x = (max(1, -(-tile // stride)) * stride for tile, stride in zip(tile_shape, stride_yx, strict=True))
        raise GeometryError(f"tile shape {tile_shape} is not a multiple of the network's stride {stride_yx}; use {y},{x}.")
    return tile_shape
