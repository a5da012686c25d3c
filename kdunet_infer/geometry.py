"""Boxes of voxels: half-open, in integers, axes zyx. Knows no arrays, volumes or models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kdunet_infer.errors import GeometryError

ZYX = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Box:
    """A half-open box of voxels; may be empty and may leave the volume (negative coordinates)."""

    begin: ZYX
    """First voxel, inclusive."""
    end: ZYX
    """One past the last voxel, exclusive."""

    def __post_init__(self) -> None:
        if any(end < begin for begin, end in zip(self.begin, self.end, strict=True)):
            raise GeometryError(f"box {self.begin} to {self.end} ends before it begins; give begin:end with end >= begin.")

    @classmethod
    def of_shape(cls, shape: ZYX) -> Box:
        """The box of a whole volume: begins at the origin."""
        return cls((0, 0, 0), shape)

    @property
    def shape(self) -> ZYX:
        """Voxels along z, y and x."""
        z, y, x = (end - begin for begin, end in zip(self.begin, self.end, strict=True))
        return z, y, x

    @property
    def n_voxels(self) -> int:
        """How many voxels the box holds."""
        z, y, x = self.shape
        return z * y * x

    def contains(self, other: Box) -> bool:
        """Whether every voxel of `other` is one of this box's."""
        return all(a <= b for a, b in zip(self.begin, other.begin, strict=True)) and all(
            a >= b for a, b in zip(self.end, other.end, strict=True)
        )

    def intersection(self, other: Box) -> Box:
        """The voxels in both; empty (shape 0 along some axis) where there are none."""
        begin = _zyx(max(a, b) for a, b in zip(self.begin, other.begin, strict=True))
        end = _zyx(max(start, min(a, b)) for start, a, b in zip(begin, self.end, other.end, strict=True))
        return Box(begin, end)

    def grown(self, margin: ZYX) -> Box:
        """This box with `margin` voxels more on both sides of each axis."""
        begin = _zyx(a - m for a, m in zip(self.begin, margin, strict=True))
        return Box(begin, _zyx(a + m for a, m in zip(self.end, margin, strict=True)))

    def snapped(self, grid: ZYX) -> Box:
        """The smallest box around this one whose corners are multiples of `grid`."""
        begin = _zyx(a // g * g for a, g in zip(self.begin, grid, strict=True))
        return Box(begin, _zyx(-(-a // g) * g for a, g in zip(self.end, grid, strict=True)))

    def slices_in(self, frame: Box) -> tuple[slice, slice, slice]:
        """Slices that cut this box out of an array that holds `frame`; this box must lie inside it."""
        if not frame.contains(self):
            raise GeometryError(f"{self} is not inside {frame}, so it cannot be cut out of it.")
        z, y, x = (
            slice(begin - origin, end - origin) for begin, end, origin in zip(self.begin, self.end, frame.begin, strict=True)
        )
        return z, y, x

    def split(self, shape: ZYX) -> Iterator[Box]:
        """Boxes of a grid of `shape` anchored at this box's begin, clipped to it, z slowest."""
        for z in range(self.begin[0], self.end[0], shape[0]):
            for y in range(self.begin[1], self.end[1], shape[1]):
                for x in range(self.begin[2], self.end[2], shape[2]):
                    yield Box((z, y, x), (z + shape[0], y + shape[1], x + shape[2])).intersection(self)

    def __str__(self) -> str:
        return ",".join(f"{begin}:{end}" for begin, end in zip(self.begin, self.end, strict=True))


@dataclass(frozen=True, slots=True)
class OpenBox:
    """A box some of whose ends are those of a volume that is not known yet: `10:,:,0:512`."""

    begin: tuple[int | None, int | None, int | None]
    """First voxel, inclusive; None: the volume's first."""
    end: tuple[int | None, int | None, int | None]
    """One past the last voxel; None: the volume's end."""

    def within(self, shape: ZYX) -> Box:
        """The box it is of a volume of `shape`. Raises GeometryError where it ends before it begins."""
        begin = _zyx(0 if first is None else first for first in self.begin)
        return Box(begin, _zyx(size if end is None else end for size, end in zip(shape, self.end, strict=True)))


def closed(roi: Box | OpenBox | None, shape: ZYX) -> Box | None:
    """A region of interest as a box of a volume of `shape`; None where there is none."""
    return roi.within(shape) if isinstance(roi, OpenBox) else roi


def checked_roi(roi: Box, shape: ZYX) -> Box:
    """`roi` itself. Raises GeometryError where it leaves a volume of `shape` or holds no voxels."""
    whole = Box.of_shape(shape)
    if not whole.contains(roi):
        raise GeometryError(f"region of interest {roi} leaves the volume of {shape} voxels; choose one inside {whole}.")
    if roi.n_voxels == 0:
        raise GeometryError(f"region of interest {roi} holds no voxels; give begin:end with end > begin along each axis.")
    return roi


def _zyx(values: Iterator[int]) -> ZYX:
    z, y, x = values
    return z, y, x
