"""Zarr nodes and TIFF files as arrays with the axes zyx. What zarr, tifffile and the codecs raise ends here."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        if box.n_voxels == 0:
            return np.empty(box.shape, dtype=self.dtype)
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
    zarr_format = zarr_format_at(path)
    if zarr_format is None and not path.exists():
        raise VolumeNotFound(f"there is nothing at {path}; check the path.")
    if zarr_format is None:
        raise VolumeError(f"{path} is neither a Zarr array or group nor a TIFF file ({', '.join(TIFF_SUFFIXES)}); give one.")
    try:
        return zarr.open(str(path), mode="r", zarr_format=zarr_format)
    except Exception as exc:
        raise VolumeError(f"{path} has Zarr metadata that cannot be read ({_first_line(exc)}); repair or restore it.") from exc


def zarr_format_at(path: Path) -> int | None:
    """2 or 3 for a folder with Zarr metadata, None for anything else."""
    if (path / "zarr.json").is_file():
        return 3
    return 2 if any((path / name).is_file() for name in (".zarray", ".zgroup")) else None


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
    if not path.exists():
        raise VolumeNotFound(f"there is nothing at {path}; check the path.")
    try:
        tiff = tifffile.TiffFile(path)
        if len(tiff.series) > 1:  # tifffile calls each page its own series if it was written by a call of its own
            tiff.close()
            tiff = tifffile.TiffFile(path, is_shaped=False)
        return _tiff_voxels(path, tiff)
    except VolumeError:
        tiff.close()
        raise
    except Exception as exc:
        raise VolumeError(f"{path} cannot be read as TIFF ({_first_line(exc)}); copy it again or save it anew.") from exc


def _tiff_voxels(path: Path, tiff: tifffile.TiffFile) -> Voxels:
    _check_complete(path, tiff)
    if len(tiff.series) != 1:
        shapes = ", ".join(str(series.shape) for series in tiff.series)
        raise VolumeError(f"{path} holds {len(tiff.series)} images of different kinds ({shapes}); save the stack alone.")
    (series,) = tiff.series
    if not series.axes.endswith("YX"):
        raise VolumeError(f"{path} has the axes {series.axes} {series.shape}, not grey slices; save one channel as a stack.")
    _check_shape(path, series.shape)
    page = series.keyframe
    page_shape = _last_three(page.chunks if page.is_tiled else page.shape)
    if series.dataoffset is not None:
        tiff.close()
        return Voxels(path, tifffile.memmap(path, mode="r"), page_shape)
    # Strips of a few rows would be decoded one by one; a page at a time is faster and small enough.
    array = zarr.open_array(series.aszarr(chunkmode=None if page.is_tiled else "page"), mode="r")
    weakref.finalize(array, tiff.close)
    return Voxels(path, array, _last_three(array.chunks))


def _check_complete(path: Path, tiff: tifffile.TiffFile) -> None:
    """Refuse a file that was cut short: tifffile then gives the pages it finds, as if there were no more."""
    n_pages = len(tiff.pages)
    tiff.filehandle.seek(tiff.pages.next_page_offset)
    link = tiff.filehandle.read(tiff.tiff.offsetsize)
    if any(link):
        raise VolumeError(f"{path} breaks off after {n_pages} pages; copy it again or save it anew.")


def _check_shape(path: Path, shape: Sequence[int]) -> None:
    if len(shape) < 2 or any(size != 1 for size in shape[:-3]):
        raise VolumeError(f"{path} has the shape {tuple(shape)}, not (z, y, x); save one channel and time point as a volume.")
    if 0 in shape:
        raise VolumeError(f"{path} has the shape {tuple(shape)}, so there are no voxels in it; give another volume.")


def _last_three(sizes: Sequence[int]) -> ZYX:
    z, y, x = (1, 1, 1, *sizes)[-3:]
    return int(z), int(y), int(x)


def _first_line(exc: Exception) -> str:
    lines = str(exc).splitlines()
    return f"{type(exc).__name__}: {lines[0]}" if lines else type(exc).__name__
