"""Data sets in HDF5 files, given as `file.h5:/path`. The only importer of h5py; what it raises ends here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdunet_infer.errors import VolumeError
from kdunet_infer.volume.arrays import Voxels, check_exists, check_numbers, first_line
from kdunet_infer.volume.ome import Vector
from kdunet_infer.volume.selection import Selection, choose, named_axes
from kdunet_infer.volume.units import nanometres

if TYPE_CHECKING:
    import h5py

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
_ADDRESS = re.compile(r"(.*?\.(?:h5|hdf5|hdf))(?::(.*))?", re.IGNORECASE | re.DOTALL)


def split_hdf5(path: Path) -> tuple[Path, str] | None:
    """The HDF5 file in `file.h5:/path` and the path inside, empty where there is none; None for other paths."""
    match = _ADDRESS.fullmatch(str(path))
    return (Path(match[1]), (match[2] or "").strip("/")) if match else None


def open_hdf5(path: Path, selection: Selection) -> tuple[Voxels, Vector | None]:
    """A data set as zyx, and its voxel size in nm after its attribute `element_size_um`, zyx, as Fiji writes it.

    The file stays open for as long as its voxels can be read; h5py lets one thread read at a time. Raises VolumeNotFound
    where there is no file, VolumeError for damaged files, for paths that lead to no data set (and says which do), and for
    filters that are not known here.
    """
    address = split_hdf5(path)
    assert address is not None, "the caller looked at the suffix"
    file_path, inside = address
    check_exists(file_path)
    try:
        import h5py
    except ModuleNotFoundError as exc:
        raise VolumeError(f"{file_path} is an HDF5 file, and h5py is not installed: pip install 'kdunet[hdf5]'.") from exc
    try:
        # Not in a `with`: the data set keeps its file open, and its end is the file's.
        data_set = _data_set(h5py.File(file_path, "r"), inside, file_path)
        if data_set.shape is None:
            raise VolumeError(f"{path} is a data set without voxels; give another one.")
        check_numbers(path, data_set.dtype)
        _check_filters(data_set, path)
        axes = named_axes([dimension.label for dimension in data_set.dims], data_set.ndim)
        view = choose(data_set.shape, axes, selection, path)
        _, y, x = view.shape(data_set.shape)
        chunk_shape = view.shape(data_set.chunks) if data_set.chunks else (1, y, x)
        return Voxels(path, data_set, chunk_shape, None, view), _voxel_size(data_set)
    except VolumeError:
        raise
    except Exception as exc:
        raise VolumeError(f"{file_path} cannot be read as HDF5 ({first_line(exc)}); copy it again or save it anew.") from exc


def _data_set(file: h5py.File, inside: str, path: Path) -> h5py.Dataset:
    import h5py

    found = file.get(inside) if inside else None
    if isinstance(found, h5py.Dataset):
        return found
    names: list[str] = []
    file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
    wrong = f"has no data set /{inside}" if inside else "is given without the path of a data set"
    shown = ", ".join(f"{path}:/{name}" for name in names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    raise VolumeError(f"{path} {wrong}; give one of: {shown or 'none is in it'}.")


def _check_filters(data_set: h5py.Dataset, path: Path) -> None:
    """Refuse a compression whose plug-in is not here: reading would fail at the first chunk."""
    import h5py

    properties = data_set.id.get_create_plist()
    for index in range(properties.get_nfilters()):
        code, _, _, name = properties.get_filter(index)
        if not h5py.h5z.filter_avail(code):
            called = f" {name.decode(errors='replace')!r}" if name else ""
            raise VolumeError(
                f"{path} needs the HDF5 filter{called} ({code}), which is not known here; pack it anew with h5repack -f GZIP=1."
            )


def _voxel_size(data_set: h5py.Dataset) -> Vector | None:
    sizes: Any = np.ravel(data_set.attrs.get("element_size_um", ()))
    if sizes.size != 3 or sizes.dtype.kind not in "iuf":
        return None
    return nanometres([float(size) for size in sizes], ("um",) * 3)
