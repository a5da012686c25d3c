"""Slices in files of their own: a folder of TIFF or PNG files in natural order, or one PNG file, as (z, y, x)."""

from __future__ import annotations

import os
import re
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdunet_infer.errors import CorruptChunk, VolumeError
from kdunet_infer.geometry import Box
from kdunet_infer.volume.arrays import VoxelArray, Voxels, check_exists, first_line
from kdunet_infer.volume.formats import TIFF_SUFFIXES
from kdunet_infer.volume.selection import Selection, choose
from kdunet_infer.volume.tiff import open_tiff

PNG_SUFFIX = ".png"
_SUFFIXES = (*TIFF_SUFFIXES, PNG_SUFFIX)
_PNG_HEAD = struct.Struct(">8s4x4sIIBB")
_NUMBER = re.compile(r"(\d+)")


@dataclass(frozen=True, slots=True)
class SliceFiles:
    """Files of one slice each as one array (z, y, x), opened when they are read."""

    files: tuple[Path, ...]
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]

    def __getitem__(self, index: tuple[slice, ...]) -> VoxelArray:
        """Voxels (z, y, x) of three slices, none of them open-ended. Raises CorruptChunk for a file that cannot be read."""
        z, y, x = index
        part = np.empty((z.stop - z.start, y.stop - y.start, x.stop - x.start), self.dtype)
        for voxels, file in zip(part, self.files[z], strict=True):
            voxels[...] = _read(file, y, x)
        return part


def open_slices(path: Path, selection: Selection) -> Voxels:
    """The slices in a folder, or in one PNG file, as zyx; a file is a chunk.

    Every file's head is read: raises VolumeError for a folder without slices, for names that do not number them one after
    the other, naming the first number that is missing, and for files that differ in shape or type, naming the first.
    """
    check_exists(path)
    files = _in_order(path, _slices_in(path)) if os.path.isdir(path) else [path]
    (shape, dtype), *others = heads = [_head(file) for file in files]
    for file, head in zip(files[1:], others, strict=True):
        if head != heads[0]:
            y, x = head[0]
            raise VolumeError(
                f"{file} is {y} x {x} {head[1]} and {files[0].name} {shape[0]} x {shape[1]} {dtype}; "
                "a folder must hold slices of one size and type."
            )
    array = SliceFiles(tuple(files), (len(files), *shape), dtype)
    view = choose(array.shape, "zyx", selection, path)
    return Voxels(path, array, view.shape((1, *shape)), None, view)


def _slices_in(folder: Path) -> list[Path]:
    try:
        names = os.listdir(folder)
    except OSError as exc:
        raise VolumeError(f"{folder} cannot be looked into ({first_line(exc)}); check its permissions.") from exc
    files = sorted(folder / name for name in names if not name.startswith(".") and Path(name).suffix.lower() in _SUFFIXES)
    if not files:
        raise VolumeError(
            f"{folder} is neither a Zarr array or group nor a folder of slices ({', '.join(_SUFFIXES)}); give a volume."
        )
    return files


def _in_order(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Files sorted by the number in their names; where names have several, by the one that runs without gaps."""
    patterns = {file: _NUMBER.sub("#", file.name) for file in files}
    ((usual, _),) = Counter(patterns.values()).most_common(1)
    for file, pattern in patterns.items():
        if pattern != usual:
            like = next(other.name for other in files if patterns[other] == usual)
            raise VolumeError(f"{folder} has {file.name} among slices named like {like}; move one kind elsewhere.")
    columns = list(zip(*(map(int, _NUMBER.findall(file.name)) for file in files), strict=True))
    running = [column for column in columns if len(set(column)) == len(files)]
    if len(files) > 1 and not running:
        raise VolumeError(f"{folder} has slices such as {files[0].name} whose names do not number them; rename them 1, 2, 3...")
    numbers = min(running, key=lambda column: max(column) - min(column), default=(0,))
    known = set(numbers)
    for number in range(min(known), max(known)):
        if number not in known:
            before = files[numbers.index(number - 1)].name
            raise VolumeError(
                f"{folder} has no slice {number} after {before}; put it there, or number the slices without a gap."
            )
    return [file for _, file in sorted(zip(numbers, files, strict=True))]


def _head(file: Path) -> tuple[tuple[int, int], np.dtype[Any]]:
    """Shape (y, x) and dtype of the one slice in a file."""
    if file.suffix.lower() == PNG_SUFFIX:
        return _png_head(file)
    voxels, _ = open_tiff(file)
    n_slices, y, x = voxels.shape
    if n_slices > 1:
        raise VolumeError(f"{file} holds {n_slices} slices; a folder must hold one a file, so move it or give it alone.")
    return (y, x), voxels.dtype


def _png_head(file: Path) -> tuple[tuple[int, int], np.dtype[Any]]:
    try:
        with file.open("rb") as opened:
            magic, name, x, y, n_bits, color = _PNG_HEAD.unpack(opened.read(_PNG_HEAD.size))
    except (OSError, struct.error) as exc:
        raise VolumeError(f"{file} cannot be read as PNG ({first_line(exc)}); copy it again or save it anew.") from exc
    if magic != b"\x89PNG\r\n\x1a\n" or name != b"IHDR":
        raise VolumeError(f"{file} cannot be read as PNG (it does not begin as one); copy it again or save it anew.")
    if color != 0:
        raise VolumeError(f"{file} is a colour image or has transparency; save one channel as grey.")
    return (y, x), np.dtype(np.uint16 if n_bits == 16 else np.uint8)


def _read(file: Path, y: slice, x: slice) -> VoxelArray:
    if file.suffix.lower() != PNG_SUFFIX:
        voxels, _ = open_tiff(file)
        part = voxels.read(Box((0, y.start, x.start), (1, y.stop, x.stop)))
        return part.reshape(part.shape[1:])
    from imagecodecs import png_decode  # Pillow refuses slices of 180 million pixels and more

    try:
        decoded = png_decode(file.read_bytes())
    except Exception as exc:
        raise CorruptChunk(
            f"{file} cannot be read ({first_line(exc)}); restore it from the original data, or mend the disk."
        ) from exc
    return np.asarray(decoded[y, x])
