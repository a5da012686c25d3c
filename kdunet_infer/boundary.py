"""Where the two classes of a mask meet, slice by slice. Knows no files, volumes or scores.

Between slices nothing is measured: sections of electron microscopy are often several times as thick as a pixel is wide, so one
number of voxels would mean two distances.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]


def near_boundary(mask: BoolArray, radius: int) -> BoolArray:
    """Pixels (z, y, x) of `mask` that have a pixel of the other class in their slice within `radius`, centre to centre.

    So a radius of 1 finds the pixels on both sides of each boundary, and 0 none. The faces of the array are no boundary.
    """
    # A pixel is within the radius of itself, so those near both classes are those near the other one.
    near: BoolArray = _within(mask, radius) & _within(~mask, radius)
    return near


def _within(mask: BoolArray, radius: int) -> BoolArray:
    """Pixels with a pixel of `mask` within `radius`, in 4 ORs per unit of radius: the disk itself has 3 radius^2 pixels."""
    n_y, n_x = mask.shape[1:]
    widened = mask.copy()  # along x, by dx so far
    reached = np.zeros_like(mask)
    for dx in range(radius + 1):
        if 0 < dx < n_x:
            widened[..., dx:] |= mask[..., :-dx]
            widened[..., :-dx] |= mask[..., dx:]
        for dy in range(min(radius + 1, n_y)):
            if isqrt(radius**2 - dy**2) == dx:  # the half-width of the disk, dy rows off its middle
                reached[:, dy:] |= widened[:, : n_y - dy]
                reached[:, : n_y - dy] |= widened[:, dy:]
    return reached
