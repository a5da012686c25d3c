"""MRC files, memory-mapped. The only importer of mrcfile; what it raises ends here."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from kdunet_infer.errors import VolumeError
from kdunet_infer.volume.arrays import Voxels, check_exists, check_numbers, first_line
from kdunet_infer.volume.ome import Vector
from kdunet_infer.volume.selection import Selection, choose
from kdunet_infer.volume.units import nanometres

MRC_SUFFIXES = (".mrc", ".mrcs", ".map", ".rec", ".st", ".ali")
_IMOD_STAMP = 1146047817
_IMOD_SIGNED = 1


def open_mrc(path: Path, selection: Selection) -> tuple[Voxels, Vector | None]:
    """An MRC volume as zyx, and its voxel size in nm after the cell in its header.

    Raises VolumeNotFound where nothing is, VolumeError for files that are damaged or of a mode that is no grey value.
    """
    check_exists(path)
    try:
        import mrcfile
    except ModuleNotFoundError as exc:
        raise VolumeError(f"{path} is an MRC file, and mrcfile is not installed: pip install 'kdunet[mrc]'.") from exc
    try:
        # What it warns of (bytes beyond the last voxel, a cell of size 0) is no obstacle to reading.
        with warnings.catch_warnings(action="ignore"), mrcfile.mmap(path, mode="r") as mrc:
            array, header, size = mrc.data, mrc.header, mrc.voxel_size
            if array is None:
                raise ValueError("it has no voxels")
            if array.dtype == np.int8 and _is_unsigned(header):
                array = array.view(np.uint8)
            check_numbers(path, array.dtype)
            view = choose(array.shape, _axes(header, array.ndim), selection, path)
            _, y, x = view.shape(array.shape)
            voxel_size = nanometres([float(size[axis]) for axis in "zyx"], ("angstrom",) * 3)
            return Voxels(path, array, (1, y, x), None, view), voxel_size
    except VolumeError:
        raise
    except Exception as exc:
        raise VolumeError(f"{path} cannot be read as MRC ({first_line(exc)}); copy it again or save it anew.") from exc


def _axes(header: Any, n_axes: int) -> str:
    """Sections, rows and columns by their names; a stack of volumes is one of timepoints."""
    order = [int(header.maps), int(header.mapr), int(header.mapc)]
    names = "".join("xyz"[axis - 1] for axis in order) if sorted(order) == [1, 2, 3] else "zyx"
    return ("t" + names)[-n_axes:]


def _is_unsigned(header: Any) -> bool:
    """Whether mode 0 is unsigned: the standard says signed, and IMOD, which wrote it unsigned for years, leaves a stamp."""
    order = "<" if header.nx.dtype.newbyteorder("=") == header.nx.dtype else ">"
    stamp, flags = struct.unpack(f"{order}ii", bytes(header.extra2)[40:48])
    return bool(stamp == _IMOD_STAMP and not flags & _IMOD_SIGNED)
