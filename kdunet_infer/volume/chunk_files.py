"""The files of a Zarr array's chunks or shards: which are missing, which are cut short.

Reads names, sizes and heads of files; decodes nothing, and knows no axes.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr

from kdunet_infer.errors import VolumeError
from kdunet_infer.volume.archive import archive_of

_CELL = re.compile(r"0|[1-9][0-9]{0,18}")
"""A place along an axis as it stands in the key of a chunk."""
_BLOSC_HEAD = 16
"""Bytes, of which the last four are the length of all, little-endian."""


@dataclass(frozen=True, slots=True)
class ChunkFiles:
    """The files of an array in a folder, on disk or in a zip file."""

    path: Path
    """Of the array."""
    array: zarr.Array[Any]

    def missing(self, slices: Sequence[slice]) -> tuple[int, int]:
        """(files that do not exist, files expected) of a part of the array, slices along its axes as stored.

        Folders are listed, no file is opened, and memory and time are those of the files that do exist. Raises VolumeError
        for a folder that may not be listed.
        """
        grid = self._grid(slices)
        n_expected = math.prod(cells.stop - cells.start for cells in grid)  # len() ends at 2^63
        prefix, _, rest = self.array.metadata.encode_chunk_key((0,) * self.array.ndim).partition("0")
        return n_expected - _n_files(self.path, prefix, rest[0], grid), n_expected

    def check(self, slices: Sequence[slice]) -> None:
        """Refuse files of a part of the array that zarr reads without a word though they are cut short.

        An empty shard reads as the fill value, and Blosc decodes what lies in memory beyond the end of a chunk. Raises
        ValueError. In zip files every file has a checksum.
        """
        is_blosc = _is_blosc(self.array)
        if not (is_blosc or self.array.shards) or archive_of(self.path) is not None:
            return  # other decoders notice it themselves
        for cell in itertools.product(*self._grid(slices)):
            key = self.array.metadata.encode_chunk_key(cell)
            try:
                size = os.stat(self.path / key).st_size
            except (FileNotFoundError, NotADirectoryError):
                continue
            if not size:
                raise ValueError(f"the file {key} is empty")
            if is_blosc and (wanted := _blosc_size(self.path / key)) != size:
                raise ValueError(f"the file {key} has {size} bytes and says that it has {wanted}")

    def _grid(self, slices: Sequence[slice]) -> list[range]:
        """Which files the slices touch, one range an axis."""
        file_shape = self.array.shards or self.array.chunks
        return [range(part.start // size, -(-part.stop // size)) for part, size in zip(slices, file_shape, strict=True)]


def _n_files(path: Path, prefix: str, separator: str, grid: Sequence[range]) -> int:
    """How many files there are whose keys are `prefix` and then, for each axis, a cell of `grid`."""
    archive = archive_of(path)
    if archive is None and separator == "/":
        return _n_below(path / prefix, grid)
    keys = _names_in(path) if archive is None else archive.keys_below(path)
    return sum(key.startswith(prefix) and _is_in(key[len(prefix) :].split(separator), grid) for key in keys)


def _n_below(folder: Path, grid: Sequence[range]) -> int:
    first, *rest = grid
    names = [name for name in _names_in(folder) if _is_in([name], [first])]
    return sum(_n_below(folder / name, rest) for name in names) if rest else len(names)


def _is_in(names: Sequence[str], grid: Sequence[range]) -> bool:
    return len(names) == len(grid) and all(
        _CELL.fullmatch(name) is not None and int(name) in cells for name, cells in zip(names, grid, strict=True)
    )


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        raise VolumeError(f"{folder} cannot be looked into ({exc.strerror}); check its permissions.") from exc


def _is_blosc(array: zarr.Array[Any]) -> bool:
    """Whether a file is what Blosc made of a chunk, and nothing else."""
    if array.shards:
        return False
    document: Any = array.metadata.to_dict()
    codec = document["compressor"] if array.metadata.zarr_format == 2 else document["codecs"][-1]
    return isinstance(codec, dict) and "blosc" in (codec.get("id"), codec.get("name"))


def _blosc_size(file: Path) -> int:
    """Bytes that a chunk has by its own account; 0 for one that has no room for it."""
    with file.open("rb") as opened:
        head = opened.read(_BLOSC_HEAD)
    return int.from_bytes(head[12:], "little") if len(head) == _BLOSC_HEAD else 0
