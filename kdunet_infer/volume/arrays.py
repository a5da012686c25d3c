"""Zarr nodes and TIFF files as arrays with the axes zyx. What zarr, tifffile and the codecs raise ends here."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import tifffile
import zarr

from kdunet_infer.errors import CorruptChunk, VolumeError, VolumeNotFound
from kdunet_infer.geometry import ZYX, Box

VoxelArray = npt.NDArray[Any]

TIFF_SUFFIXES = (".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class Voxels:
    """An array on disk seen as (z, y, x): axes of size 1 before z are dropped, and two axes are one slice."""

    path: Path
    """Of the array, for messages."""
    array: zarr.Array[Any] | VoxelArray
    chunk_shape: ZYX
    """Voxels that are decoded together: a chunk, a TIFF page or tile."""
    shard_shape: ZYX | None = None
    """Voxels of a file of several chunks, where the array has such files."""

    @property
    def shape(self) -> ZYX:
        """Voxels, zyx."""
        return _last_three(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of one voxel."""
        return np.dtype(self.array.dtype)

    def read(self, box: Box) -> VoxelArray:
        """Voxels (z, y, x) of `box`, contiguous, in the array's own dtype.

        Raises GeometryError for a box that leaves the volume, CorruptChunk for a chunk that cannot be read or decoded.
        """
        slices = box.slices_in(Box.of_shape(self.shape))
        try:
            return self._cut(slices, box.shape)
        except Exception:  # codecs raise anything; reading chunk by chunk tells which chunk it is
            return self._read_by_chunk(box)

    def _cut(self, slices: Sequence[slice], shape: ZYX) -> VoxelArray:
        index = (*[slice(0, 1)] * (self.array.ndim - 3), *slices)[-self.array.ndim :]
        # A copy, so that a memory-mapped file is read here and not wherever its voxels are first touched.
        return np.array(self.array[index]).reshape(shape)

    def _read_by_chunk(self, box: Box) -> VoxelArray:
        voxels = np.empty(box.shape, dtype=self.dtype)
        file_shape = self.shard_shape or self.chunk_shape
        for file_box in box.snapped(file_shape).split(file_shape):
            part = file_box.intersection(box)
            try:
                voxels[part.slices_in(box)] = self._cut(part.slices_in(Box.of_shape(self.shape)), part.shape)
            except Exception as exc:
                index = tuple(begin // size for begin, size in zip(file_box.begin, file_shape, strict=True))
                raise CorruptChunk(
                    f"{'shard' if self.shard_shape else 'chunk'} {index} (z, y, x) of {self.path} cannot be read "
                    f"({_first_line(exc)}); restore it from the original data, or mend the disk."
                ) from exc
        return voxels


def open_node(path: Path) -> zarr.Array[Any] | zarr.Group:
    """The Zarr array or group in the folder `path`, read-only.

    Raises VolumeNotFound where nothing is, VolumeError where there is something else or broken metadata.
    """
    _check_exists(path)
    zarr_format = zarr_format_at(path)
    if zarr_format is None:
        raise VolumeError(f"{path} is neither a Zarr array or group nor a TIFF file ({', '.join(TIFF_SUFFIXES)}); give one.")
    try:
        return zarr.open(str(path), mode="r", zarr_format=zarr_format)
    except Exception as exc:
        raise VolumeError(f"{path} has Zarr metadata that cannot be read ({_first_line(exc)}); repair or restore it.") from exc


def group_to_write(path: Path) -> zarr.Group:
    """The Zarr group in the folder `path`, its attributes writable."""
    # Consolidated metadata is a copy at the time it was made; what counts is the group's own.
    return zarr.open_group(str(path), mode="r+", zarr_format=zarr_format_at(path), use_consolidated=False)


def zarr_format_at(path: Path) -> Literal[2, 3] | None:
    """2 or 3 for a folder with Zarr metadata, None for anything else."""
    # os.path, not Path: its answer is no where looking is forbidden, instead of a PermissionError.
    if os.path.isfile(path / "zarr.json"):
        return 3
    return 2 if any(os.path.isfile(path / name) for name in (".zarray", ".zgroup")) else None


def zarr_voxels(path: Path, array: zarr.Array[Any]) -> Voxels:
    """An open Zarr array as zyx; `path` is for messages.

    Raises VolumeError for arrays that are not three-dimensional, or empty.
    """
    _check_shape(path, array.shape)
    return Voxels(path, array, _last_three(array.chunks), _last_three(array.shards) if array.shards else None)


def open_tiff(path: Path) -> Voxels:
    """A TIFF stack as zyx: memory-mapped where its voxels lie in the file as they are, decoded page by page otherwise.

    Raises VolumeNotFound where nothing is, VolumeError for files that are damaged or hold anything but one grey stack.
    """
    _check_exists(path)
    try:
        with tifffile.TiffFile(path) as tiff:
            # tifffile takes a page that was written by a call of its own for an image of its own, unless told not to.
            is_shaped = False if len(tiff.series) > 1 else None
        return _tiff_voxels(path, tifffile.TiffFile(path, is_shaped=is_shaped))
    except VolumeError:
        raise
    except Exception as exc:
        raise VolumeError(f"{path} cannot be read as TIFF ({_first_line(exc)}); copy it again or save it anew.") from exc


def _tiff_voxels(path: Path, tiff: tifffile.TiffFile) -> Voxels:
    """The one stack in an open file, which stays open for as long as its voxels can be read."""
    with ExitStack() as on_failure:
        on_failure.callback(tiff.close)
        series = _only_stack(path, tiff)
        page = series.keyframe
        if series.dataoffset is not None:
            dtype = np.dtype(tiff.byteorder + series.dtype.char)
            return Voxels(path, np.memmap(path, dtype, "r", series.dataoffset, series.shape), _last_three(page.shape))
        # Strips of a few rows would be decoded one by one; a page at a time is faster and small enough.
        array = zarr.open_array(series.aszarr(chunkmode=None if page.is_tiled else "page"), mode="r")
        weakref.finalize(array, on_failure.pop_all().close)
        return Voxels(path, array, _last_three(array.chunks))


def _only_stack(path: Path, tiff: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    _check_complete(path, tiff)
    if len(tiff.series) != 1:
        shapes = ", ".join(str(series.shape) for series in tiff.series)
        raise VolumeError(f"{path} holds {len(tiff.series)} images of different kinds ({shapes}); save the stack alone.")
    (series,) = tiff.series
    if not series.axes.endswith("YX"):
        raise VolumeError(f"{path} has the axes {series.axes} {series.shape}, not grey slices; save one channel as a stack.")
    _check_shape(path, series.shape)
    return series


def _check_complete(path: Path, tiff: tifffile.TiffFile) -> None:
    """Refuse a file that was cut short: tifffile then gives the pages it finds, as if there were no more."""
    n_pages = len(tiff.pages)
    link_at = tiff.pages.next_page_offset
    assert link_at is not None, "only a page's sub-pages have no link"
    tiff.filehandle.seek(link_at)
    if any(tiff.filehandle.read(tiff.tiff.offsetsize)):  # the last page of a whole file links to nothing
        raise VolumeError(f"{path} breaks off after page {n_pages}; copy it again or save it anew.")


def _check_exists(path: Path) -> None:
    if not os.path.exists(path):
        raise VolumeNotFound(f"there is nothing at {path}, or it may not be read; check the path.")


def _check_shape(path: Path, shape: Sequence[int]) -> None:
    if len(shape) < 2 or any(size != 1 for size in shape[:-3]):
        raise VolumeError(f"{path} has the shape {tuple(shape)}, not (z, y, x); save one channel and time point as a volume.")
    if 0 in shape:
        raise VolumeError(f"{path} has the shape {tuple(shape)}, so there are no voxels in it; give another volume.")


def _last_three(sizes: Sequence[int]) -> ZYX:
    z, y, x = (1, *sizes)[-3:]
    return int(z), int(y), int(x)


def _first_line(exc: Exception) -> str:
    lines = str(exc).splitlines()
    return f"{type(exc).__name__}: {lines[0]}" if lines else type(exc).__name__
