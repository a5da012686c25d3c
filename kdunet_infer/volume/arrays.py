"""An array on disk seen as (z, y, x), and the Zarr nodes that hold one. What zarr and the codecs raise ends here."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.sync import sync

from kdunet_infer.errors import CorruptChunk, KdunetError, VolumeError, VolumeNotFound
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.volume.archive import archive_of
from kdunet_infer.volume.chunk_files import ChunkFiles
from kdunet_infer.volume.selection import AS_STORED, AS_ZYX, Selection, View, choose, named_axes

VoxelArray = npt.NDArray[Any]

_LONGEST = 200
"""Letters of what a foreign exception says: some quote the file they cannot read."""
_NUMBERS_V2 = re.compile(r"[<>|=]?[bifuc]\d+")
_NUMBERS_V3 = re.compile(r"bool|u?int\d+|float\d+|complex\d+")


class Sliceable(Protocol):
    """What a file format's library gives: it reads when it is sliced."""

    @property
    def shape(self) -> tuple[int, ...]:
        """One size an axis."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of one voxel."""

    def __getitem__(self, index: tuple[slice, ...], /) -> Any:
        """A numpy array, or what turns into one, of as many axes."""


@dataclass(frozen=True, slots=True)
class Voxels:
    """An array on disk seen as (z, y, x), in its own dtype."""

    path: Path
    """Of the array, for messages."""
    array: zarr.Array[Any] | Sliceable
    """As stored."""
    chunk_shape: ZYX
    """Voxels that are decoded together: a chunk, a TIFF page or tile."""
    shard_shape: ZYX | None = None
    """Voxels of a file of several chunks, where the array has such files."""
    view: View = AS_ZYX
    """Which axes of the array are z, y and x, and where the others are cut."""
    files: ChunkFiles | None = None
    """Of a Zarr array."""

    @property
    def shape(self) -> ZYX:
        """Voxels, zyx."""
        return self.view.shape(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of one voxel as it is read: in the byte order of this machine, whatever that of the file."""
        return np.dtype(self.array.dtype).newbyteorder("=")

    def read(self, box: Box) -> VoxelArray:
        """Voxels (z, y, x) of `box`, contiguous, in the array's own dtype.

        Raises GeometryError for a box that leaves the volume, CorruptChunk for a chunk that cannot be read or decoded.
        """
        slices = self.view.slices(box.slices_in(Box.of_shape(self.shape)))
        if not box.n_voxels:
            return np.empty(box.shape, self.dtype)
        try:
            return self._cut(slices)
        except Exception:  # codecs raise anything; reading chunk by chunk tells which chunk it is
            return self._read_by_chunk(box)

    def missing_files(self) -> tuple[int, int]:
        """(files of a Zarr array that do not exist, files expected), of the volume alone; (0, 0) for other formats.

        Raises VolumeError for a folder that may not be listed.
        """
        whole = Box.of_shape(self.shape)
        return self.files.missing(self.view.slices(whole.slices_in(whole))) if self.files else (0, 0)

    def _cut(self, slices: tuple[slice, ...]) -> VoxelArray:
        """Of slices of the array as stored."""
        if self.files:
            self.files.check(slices)
        part = self.view.arranged(np.asarray(self.array[slices]))
        # A copy, so that a memory-mapped file is read here and not wherever its voxels are first touched.
        return np.array(part, self.dtype, order="C")

    def _read_by_chunk(self, box: Box) -> VoxelArray:
        voxels = np.empty(box.shape, dtype=self.dtype)
        file_shape = self.shard_shape or self.chunk_shape
        for file_box in box.snapped(file_shape).split(file_shape):
            part = file_box.intersection(box)
            try:
                voxels[part.slices_in(box)] = self._cut(self.view.slices(part.slices_in(Box.of_shape(self.shape))))
            except KdunetError:  # of a file within a folder: it is named already
                raise
            except Exception as exc:
                wait_for_zarr()
                index = tuple(begin // size for begin, size in zip(file_box.begin, file_shape, strict=True))
                raise CorruptChunk(
                    f"{'shard' if self.shard_shape else 'chunk'} {index} (z, y, x) of {self.path} cannot be read "
                    f"({first_line(exc)}); restore it from the original data, or mend the disk."
                ) from exc
        return voxels


def open_node(path: Path) -> zarr.Array[Any] | zarr.Group:
    """The Zarr array or group at `path`, a folder on disk or in a zip file, read-only.

    Raises VolumeNotFound where nothing is, VolumeError where there is something else, broken metadata, a codec that is not
    known here, or an array of anything but numbers.
    """
    check_exists(path)
    zarr_format = zarr_format_at(path)
    if zarr_format is None:
        raise VolumeError(f"{path} is neither a Zarr array nor a Zarr group; give one.")
    try:
        is_array = _check_documents(path, zarr_format)
        archive = archive_of(path)
        store, key = (str(path), "") if archive is None else (archive.store, archive.key(path))
        if is_array:
            array = zarr.open_array(store, path=key, mode="r", zarr_format=zarr_format)
            for sizes in filter(None, (array.chunks, array.shards)):
                if 0 in sizes:
                    raise ValueError(f"chunks of {sizes}")
            return array
        # Consolidated metadata is a copy at the time it was made; what counts is the node's own.
        return zarr.open_group(store, path=key, mode="r", zarr_format=zarr_format, use_consolidated=False)
    except VolumeError:
        raise
    except Exception as exc:
        if "UnknownCodec" in type(exc).__name__:  # zarr and numcodecs each have their own
            codec = str(exc).split(":")[-1].strip(" '\"")
            raise VolumeError(
                f"{path} needs the codec {codec!r}, which is not known here; write it anew with another, such as zstd."
            ) from exc
        raise VolumeError(f"{path} has Zarr metadata that cannot be read ({first_line(exc)}); repair or restore it.") from exc


def group_to_write(path: Path) -> zarr.Group:
    """The Zarr group in the folder `path`, its attributes writable."""
    # Consolidated metadata is a copy at the time it was made; what counts is the group's own.
    return zarr.open_group(str(path), mode="r+", zarr_format=zarr_format_at(path), use_consolidated=False)


def zarr_format_at(path: Path) -> Literal[2, 3] | None:
    """2 or 3 for a folder, on disk or in a zip file, with Zarr metadata; None for anything else."""
    archive = archive_of(path)
    # os.path, not Path: its answer is no where looking is forbidden, instead of a PermissionError.
    is_file: Callable[[Path], bool] = os.path.isfile if archive is None else archive.has_file
    if is_file(path / "zarr.json"):
        return 3
    return 2 if any(is_file(path / name) for name in (".zarray", ".zgroup")) else None


def zarr_voxels(path: Path, array: zarr.Array[Any], axes: str | None = None, selection: Selection = AS_STORED) -> Voxels:
    """An open Zarr array as zyx; `path` is for messages, `axes` what the image it is part of calls its axes.

    Raises VolumeError for arrays that are empty, or cannot be seen as zyx without being told more.
    """
    view = choose(array.shape, axes or _named_axes(array), selection, path)
    shard_shape = view.shape(array.shards) if array.shards else None
    return Voxels(path, array, view.shape(array.chunks), shard_shape, view, ChunkFiles(path, array))


def _named_axes(array: zarr.Array[Any]) -> str | None:
    """The axes as a Zarr v3 array names its dimensions."""
    return named_axes(getattr(array.metadata, "dimension_names", None) or (), array.ndim)


def _check_documents(path: Path, zarr_format: Literal[2, 3]) -> bool:
    """Whether the node is an array; refuses voxels that are no numbers before zarr stumbles over them."""
    if zarr_format == 2:
        document = _json(path, ".zarray")
        is_array = document is not None
        for name in (".zgroup", ".zattrs"):
            _json(path, name)
        stored, numbers = (document or {}).get("dtype"), _NUMBERS_V2
    else:
        document = _json(path, "zarr.json") or {}
        is_array = document.get("node_type") == "array"
        if not isinstance(document.get("attributes", {}), dict):  # zarr takes an array's as they are
            raise VolumeError(f"{path} has attributes in zarr.json that are no JSON object; repair or restore it.")
        stored, numbers = document.get("data_type"), _NUMBERS_V3
    if is_array and not (isinstance(stored, str) and numbers.fullmatch(stored)):
        shown = stored.get("name") if isinstance(stored, dict) else stored
        raise VolumeError(f"{path} holds voxels of the type {shown!r}, which are no grey values; save integers or floats.")
    return is_array


def _json(path: Path, name: str) -> dict[str, Any] | None:
    """A metadata document of a node; None where it does not exist."""
    archive = archive_of(path)
    try:
        content = (path / name).read_bytes() if archive is None else archive.read(path / name)
    except (FileNotFoundError, KeyError):
        return None
    try:
        document = json.loads(content)
        if not isinstance(document, dict):
            raise TypeError(f"it is a {type(document).__name__}")
    except Exception as exc:
        raise VolumeError(
            f"{path} has Zarr metadata that cannot be read ({first_line(exc)} in {name}); repair or restore it."
        ) from exc
    return document


def check_exists(path: Path) -> None:
    """Refuse a path with nothing at it. Raises VolumeNotFound."""
    archive = archive_of(path)
    if os.path.islink(path) and not os.path.exists(path):
        raise VolumeNotFound(f"{path} is a link that leads to nothing, to itself or to where you may not look; mend the link.")
    if not (os.path.exists(path) if archive is None else archive.has(path)):
        raise VolumeNotFound(f"there is nothing at {path}, or it may not be read; check the path.")


def check_numbers(path: Path, dtype: np.dtype[Any]) -> None:
    """Refuse voxels that are no numbers. Raises VolumeError."""
    if dtype.kind not in "biufc":
        raise VolumeError(f"{path} holds voxels of the type {str(dtype)!r}, which are no grey values; save integers or floats.")


def wait_for_zarr() -> None:
    """Wait for the chunks that zarr still reads or writes after the first one failed.

    The end of the process would cut them off, and Python then prints a traceback for each, below our sentence.
    """

    async def others_done() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    sync(others_done())


def first_line(exc: BaseException) -> str:
    """What a foreign exception says, fit to stand within a sentence."""
    lines = str(exc).splitlines()
    if not lines:
        return type(exc).__name__
    said = lines[0] if len(lines[0]) <= _LONGEST else f"{lines[0][:_LONGEST]}..."
    return f"{type(exc).__name__}: {said}"
