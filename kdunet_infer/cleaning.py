"""Cleaning of a finished mask, block by block, exactly as over the whole volume at once. Knows no files, models or tiles.

    raw mask -> smooth_z -> fill_holes -> min_size -> cleaned mask

In this order because each step mends what would mislead the next: flicker opens holes and cuts objects into small ones.

No volume lies between the steps. `smooth_z` looks at a few sections around a block; the other two first go once over all blocks
for a table of components, and then decide about each block from it. So the raw mask is read up to three times, and must be kept
apart from the cleaned one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdunet_infer.components import Progress, ReadMask, UInt8Array, grid_blocks, label_components
from kdunet_infer.errors import ConfigError
from kdunet_infer.geometry import ZYX, Box

WriteMask = Callable[[Box, UInt8Array], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaning:
    """What to clean; everything is off by default.

    Objects are connected by 26 neighbours and background by 6. The two must differ, or an object and a gap could cross each
    other in one corner. Objects get the wider one, since a mitochondrion that shifts by a voxel from section to section is one.
    """

    min_size: int = 0
    """Objects in 3-D of fewer voxels are removed; 0 and 1 remove none."""
    fill_holes: bool = False
    """Background that cannot reach the volume's faces becomes foreground.

    In 3-D, not slice by slice: a mitochondrion bent to a ring or a cup encloses cytoplasm in single slices, and that is not its
    own; what is closed on all sides is. So holes in the first and the last section stay. A lone slice is filled as an image.
    """
    smooth_z: int = 0
    """Odd: each voxel becomes what most of this many sections around it are at its place; 0 and 1 change nothing.

    The window is cut off at the volume's faces, and where it is then even and undecided the voxel stays as it is.
    """

    def __post_init__(self) -> None:
        if self.min_size < 0:
            raise ConfigError(f"min_size is {self.min_size}; it must be 0 (off) or a number of voxels.")
        if self.smooth_z < 0 or (self.smooth_z and self.smooth_z % 2 == 0):
            raise ConfigError(f"smooth_z is {self.smooth_z}; it must be 0 (off) or an odd number of sections, such as 3.")

    def __bool__(self) -> bool:
        """Whether anything is cleaned."""
        return self.min_size > 1 or self.fill_holes or self.smooth_z > 1

    @property
    def n_passes(self) -> int:
        """How often it goes over the mask."""
        return 1 + self.fill_holes + (self.min_size > 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaned:
    """What a cleaning did."""

    n_foreground: int
    """Voxels of the cleaned mask."""
    n_holes_filled: int
    n_objects: int | None
    """What is left; None where they were not counted, since no smallest size was given."""
    n_objects_removed: int


def clean(
    read: ReadMask, write: WriteMask, roi: Box, cleaning: Cleaning, *, block_shape: ZYX, progress: Progress | None = None
) -> Cleaned:
    """Clean the mask in `roi`: read the raw one, write the cleaned one (0 and 1) once for each block.

    Blocks lie on a grid of `block_shape` from the volume's origin, clipped to `roi`, as those of a plan. The roi is cleaned as
    if it were the volume: its faces are the faces, and nothing outside it is read. `read` takes any box inside the roi and must
    give the same voxels until the end. Memory is a function of the block, and of how many components there are.

    `progress` is called with the voxels done and the voxels in all, over all passes.
    Raises VolumeError where the raw mask changes on the way.
    """
    n_passes, begun = cleaning.n_passes, 0

    def next_pass() -> Progress:
        nonlocal begun
        n_before, begun = begun * roi.n_voxels, begun + 1
        return lambda done, _of: None if progress is None else progress(n_before + done, n_passes * roi.n_voxels)

    n_holes = n_removed = 0
    n_objects = None
    if cleaning.smooth_z > 1:
        read = _smoothed(read, roi, cleaning.smooth_z)
    if cleaning.fill_holes:
        read, n_holes = _filled(read, roi, block_shape, next_pass())
    if cleaning.min_size > 1:
        read, n_objects, n_removed = _without_small(read, roi, block_shape, cleaning.min_size, next_pass())
    report, n_done, n_foreground = next_pass(), 0, 0
    for block in grid_blocks(roi, block_shape):
        mask = (read(block) != 0).astype(np.uint8)
        write(block, mask)
        n_foreground += int(np.count_nonzero(mask))
        n_done += block.n_voxels
        report(n_done, roi.n_voxels)
    return Cleaned(n_foreground=n_foreground, n_holes_filled=n_holes, n_objects=n_objects, n_objects_removed=n_removed)


def _smoothed(read: ReadMask, roi: Box, n_sections: int) -> ReadMask:
    reach = n_sections // 2

    def read_smoothed(box: Box) -> UInt8Array:
        around = box.grown((reach, 0, 0)).intersection(roi)
        return _majority(read(around) != 0, reach, box.begin[0] - around.begin[0], box.shape[0])

    return read_smoothed


def _majority(mask: npt.NDArray[np.bool_], reach: int, first: int, n_slices: int) -> UInt8Array:
    """Of `mask` (z, y, x), slices `first` to `first + n_slices`, each the majority of those within `reach` of it."""
    smoothed = np.empty((n_slices, *mask.shape[1:]), np.uint8)
    count = np.zeros(mask.shape[1:], np.int32)  # foreground in the window, which slides: its length costs nothing
    begin = end = 0
    for i, z in enumerate(range(first, first + n_slices)):
        while end < min(z + reach + 1, len(mask)):
            count += mask[end]
            end += 1
        while begin < z - reach:
            count -= mask[begin]
            begin += 1
        # One more for a voxel that is foreground itself: that decides a tie, and nothing else.
        smoothed[i] = 2 * count + mask[z] > end - begin
    return smoothed


def _filled(read: ReadMask, roi: Box, block_shape: ZYX, progress: Progress) -> tuple[ReadMask, int]:
    """The mask without its holes, block by block, and how many holes these are."""
    background = label_components(lambda box: read(box) == 0, roi, block_shape=block_shape, connectivity=6, progress=progress)
    is_open = background.components.touches_faces
    return lambda block: 1 - background.select(block, is_open), int(np.count_nonzero(~is_open))


def _without_small(read: ReadMask, roi: Box, block_shape: ZYX, min_size: int, progress: Progress) -> tuple[ReadMask, int, int]:
    """The mask without small objects, block by block, how many there are, and how many were removed."""
    objects = label_components(read, roi, block_shape=block_shape, connectivity=26, progress=progress)
    is_kept = objects.components.sizes >= min_size
    n_kept = int(np.count_nonzero(is_kept))
    return lambda block: objects.select(block, is_kept), n_kept, objects.components.n - n_kept
