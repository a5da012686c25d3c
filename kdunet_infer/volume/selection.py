"""Which part of a stored array is the volume: the axes seen as (z, y, x), one channel, one timepoint. Touches no files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy.typing as npt

from kdunet_infer.errors import VolumeError
from kdunet_infer.geometry import ZYX
from kdunet_infer.volume.ome import AXES, UNKNOWN_AXIS, Vector

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What the user says about a path beyond the path itself.

    Raises VolumeError for values that no volume can have.
    """

    level: int = 0
    """Of an OME-Zarr pyramid, 0 finest."""
    channel: int | None = None
    """Needed where there are several."""
    timepoint: int | None = None
    """Needed where there are several."""
    axes: str | None = None
    """One letter an axis of the array as stored, such as tczyx; None: what the metadata say."""
    voxel_size_nm: Vector | None = None
    """Of the array that is opened, zyx; where metadata lack it (wins over metadata)."""

    def __post_init__(self) -> None:
        if self.axes is not None:
            _check_letters(self.axes)
        if self.voxel_size_nm is not None and not all(0 < nm < math.inf for nm in self.voxel_size_nm):
            size = ",".join(f"{nm:g}" for nm in self.voxel_size_nm)
            raise VolumeError(f"a voxel size of {size} nm (z,y,x) cannot be; give three lengths above 0.")


AS_STORED = Selection()
"""The finest level, with what the metadata say."""


@dataclass(frozen=True, slots=True)
class View:
    """How an array is seen as (z, y, x): what each of its axes is, and where the others are cut."""

    axes: str = "zyx"
    """One letter an axis as stored: of tczyx, or UNKNOWN_AXIS."""
    index: tuple[int, ...] = (0, 0, 0)
    """One an axis as stored; of z, y and x it says nothing."""

    def zyx(self, values: Sequence[_T], default: _T) -> tuple[_T, _T, _T]:
        """Those of `values`, one an axis as stored, that belong to z, y and x; `default` for an axis that is not there."""
        z, y, x = (values[self.axes.index(axis)] if axis in self.axes else default for axis in "zyx")
        return z, y, x

    def shape(self, sizes: Sequence[int]) -> ZYX:
        """Sizes, one an axis as stored, as zyx; 1 for an axis that is not there."""
        z, y, x = (int(size) for size in self.zyx(sizes, 1))
        return z, y, x

    def slices(self, slices: Sequence[slice]) -> tuple[slice, ...]:
        """Slices along z, y and x as slices of the array as stored, which keep all its axes."""
        return tuple(
            slices["zyx".index(axis)] if axis in "zyx" else slice(index, index + 1)
            for axis, index in zip(self.axes, self.index, strict=True)
        )

    def arranged(self, part: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """What those slices gave, as (z, y, x); a view."""
        order = [self.axes.index(axis) for axis in "zyx" if axis in self.axes]
        dropped = [axis for axis in range(part.ndim) if axis not in order]
        return part.transpose(dropped + order).reshape(self.shape(part.shape))

    def __str__(self) -> str:
        chosen = (f"{axis} {self.index[self.axes.index(axis)]}" for axis in "tc" if axis in self.axes)
        return ", ".join((f"axes {self.axes}", *chosen))


AS_ZYX = View()
"""Of an array whose axes are z, y and x."""


def choose(shape: Sequence[int], stored: str | None, selection: Selection, where: Path) -> View:
    """The volume in an array of `shape`, whose axes the metadata call `stored` (None where they say nothing).

    Raises VolumeError, `where` in its sentence, for arrays without voxels, axes that are not known, and for a channel or
    timepoint that is missing or not there.
    """
    axes = selection.axes or stored or _guessed(shape, where)
    if len(axes) != len(shape):
        raise VolumeError(
            f"{where} has {len(shape)} axes {tuple(shape)}, and {axes!r} names {len(axes)}; give --axes a letter for each."
        )
    if 0 in shape:
        raise VolumeError(f"{where} has the shape {tuple(shape)}, so there are no voxels in it; give another volume.")
    if any(axis == UNKNOWN_AXIS and size > 1 for axis, size in zip(axes, shape, strict=True)):
        raise VolumeError(
            f"{where} has the shape {tuple(shape)} with an axis that is none of {AXES}; name them with --axes, such as tczyx."
        )
    if not {"y", "x"} <= set(axes) or any(axes.count(axis) > 1 for axis in AXES):
        raise VolumeError(f"{where} has metadata that call its axes {','.join(axes)}; name them with --axes, such as tczyx.")
    sizes = dict(zip(axes, shape, strict=True))
    cuts = {
        "t": _chosen(sizes.get("t", 1), selection.timepoint, "timepoint", where),
        "c": _chosen(sizes.get("c", 1), selection.channel, "channel", where),
    }
    return View(axes, tuple(cuts.get(axis, 0) for axis in axes))


def named_axes(names: Sequence[object], n_axes: int) -> str | None:
    """The letters of axes that have names, such as z or channel; None unless all are known, and y and x among them."""
    words = {"channel": "c", "time": "t"}
    letters = [words.get(str(name).lower(), str(name).lower()) for name in names]
    is_known = len(letters) == n_axes == len(set(letters)) and {"y", "x"} <= set(letters) <= set(AXES)
    return "".join(letters) if is_known else None


def _guessed(shape: Sequence[int], where: Path) -> str:
    """The axes of an array without metadata: zyx, or yx, between axes of size 1."""
    if len(shape) < 2:
        raise VolumeError(f"{where} has the shape {tuple(shape)}, not (z, y, x); give a stack of slices.")
    kept = list(range(len(shape)))
    if len(kept) > 3 and shape[-1] == 1:  # channels last
        kept.pop()
    while len(kept) > 3 and any(shape[axis] == 1 for axis in kept):
        kept.remove(next(axis for axis in kept if shape[axis] == 1))
    if len(kept) > 3:
        raise VolumeError(
            f"{where} has the shape {tuple(shape)} and no metadata that name its axes; name them with --axes, such as "
            f"{AXES[-len(shape) :]}."
        )
    letters = dict(zip(kept, "zyx"[-len(kept) :], strict=True))
    return "".join(letters.get(axis, UNKNOWN_AXIS) for axis in range(len(shape)))


def _chosen(size: int, index: int | None, word: str, where: Path) -> int:
    if index is None and size == 1:
        return 0
    if index is None:
        raise VolumeError(f"{where} has {size} {word}s; choose one with --{word} 0 to {size - 1}.")
    if not 0 <= index < size:
        has = f"{size} {word}{'s' if size > 1 else ''}"
        raise VolumeError(f"{where} has {has}, counted from 0, so there is no {word} {index}; give another --{word}.")
    return index


def _check_letters(axes: str) -> None:
    strange = [letter for letter in axes if letter not in AXES]
    if strange:
        raise VolumeError(f"axes {axes!r} have the letter {strange[0]!r}; each must be one of {AXES}, such as zyx or tczyx.")
    repeated = [letter for letter in axes if axes.count(letter) > 1]
    if repeated:
        raise VolumeError(f"axes {axes!r} name {repeated[0]!r} {axes.count(repeated[0])} times; give each axis its own letter.")
    if not {"y", "x"} <= set(axes):
        raise VolumeError(f"axes {axes!r} lack y or x, and the network looks at slices of both; name them, such as zyx.")
