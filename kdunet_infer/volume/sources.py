"""What a path holds: images to read and segment, masks and labels to compare with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import zarr

from kdunet_infer.errors import VolumeError
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.mirror import read_mirrored
from kdunet_infer.volume.archive import archive_of
from kdunet_infer.volume.arrays import VoxelArray, Voxels, check_exists, open_node, zarr_format_at, zarr_voxels
from kdunet_infer.volume.foreign import refuse_foreign
from kdunet_infer.volume.formats import TIFF_SUFFIXES
from kdunet_infer.volume.hdf5 import HDF5_SUFFIXES, open_hdf5, split_hdf5
from kdunet_infer.volume.mrc import MRC_SUFFIXES, open_mrc
from kdunet_infer.volume.ome import (
    Layout,
    Level,
    Multiscale,
    Units,
    Vector,
    is_label,
    is_multiscale,
    label_names,
    parse_multiscale,
)
from kdunet_infer.volume.ownership import state_of
from kdunet_infer.volume.selection import AS_STORED, Selection
from kdunet_infer.volume.slices import PNG_SUFFIX, open_slices
from kdunet_infer.volume.tiff import open_tiff
from kdunet_infer.volume.units import nanometres

DEFAULT_CHUNK_SHAPE = (64, 128, 128)
"""Of targets whose source has no chunks of its own: 1 MiB, good for slices along any axis."""
_SUFFIXES = (*TIFF_SUFFIXES, PNG_SUFFIX, *HDF5_SUFFIXES, *MRC_SUFFIXES)
_NANOMETER: Units = ("nanometer", "nanometer", "nanometer")
_NO_UNITS: Units = (None, None, None)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class VolumeSource:
    """A volume to read, in its own dtype; where that is uint8, it implements `blockwise.Source`."""

    path: Path
    """As it was opened."""
    voxels: Voxels
    """The array."""
    layout: Layout
    """What an output like this volume repeats; its first level is this volume."""
    group: Path | None
    """The OME-Zarr image whose finest level this is, with a place for labels; None for anything that takes none."""
    voxel_size_nm: Vector | None = None
    """zyx, of this volume; None where neither the metadata nor the user say it."""
    level_voxel_sizes_nm: tuple[Vector, ...] = ()
    """Of every level of the pyramid that this volume is in, finest first; empty where unknown."""

    @property
    def shape(self) -> ZYX:
        """Voxels, zyx."""
        return self.voxels.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of one voxel: integers or floats."""
        return self.voxels.dtype

    @property
    def chunk_shape(self) -> ZYX:
        """Voxels of one file (shard, chunk or TIFF page), zyx."""
        return self.voxels.shard_shape or self.voxels.chunk_shape

    @property
    def identity(self) -> str:
        """One line for records that says which array this is, and which part: the same however the path was written."""
        return f"{_real(self.voxels.path)} ({self.voxels.view})"

    def read(self, box: Box) -> VoxelArray:
        """Voxels (z, y, x) of `box`, in the volume's own dtype, contiguous.

        Raises GeometryError for a box that leaves the volume, CorruptChunk for a chunk that cannot be read or decoded.
        """
        return self.voxels.read(box)

    def read_box(self, box: Box) -> VoxelArray:
        """Voxels (z, y, x) of `box`, in the volume's own dtype, contiguous; mirrored beyond the volume's faces (edge voxel
        not repeated).

        Raises CorruptChunk for a chunk that cannot be read or decoded.
        """
        return read_mirrored(self.voxels.read, self.shape, box)

    def missing_chunks(self) -> tuple[int, int]:
        """(chunk or shard files that do not exist, files expected) of a Zarr array; (0, 0) for other formats.

        A chunk that does not exist reads as the fill value, as Zarr has it, whether it was never written or was lost. Raises
        VolumeError for a folder that may not be listed.
        """
        return self.voxels.missing_files()


def open_source(path: str | Path, selection: Selection = AS_STORED) -> VolumeSource:
    """Open an image: OME-Zarr 0.4 or 0.5 (a group or one level of it), a plain Zarr array, either of them in a zip file too,
    a TIFF stack, a folder of TIFF or PNG slices, HDF5 (`file.h5:/path`) or MRC; integers or floats.

    Raises VolumeNotFound where nothing is, VolumeError for anything that is no such image, and for a `selection` that the
    image does not have or that it needs.
    """
    path = Path(path)
    found = _open(path, selection)
    dtype = found.voxels.dtype
    if dtype == np.bool_:
        raise VolumeError(f"{path} holds bool voxels, a mask and not an image; give the image itself.")
    if dtype.kind == "c":
        raise VolumeError(f"{path} holds {dtype} voxels, and grey values are real; save the magnitude or a part of them.")
    sizes = found.voxel_sizes_nm(selection.voxel_size_nm)
    layout = found.layout(selection)
    return VolumeSource(path, found.voxels, layout, found.labelled_group(), sizes[found.index] if sizes else None, sizes)


def open_labels(path: str | Path, selection: Selection = AS_STORED) -> Voxels:
    """Open a mask or label image as it is, in any format that `open_source` reads; integers or bool.

    Raises VolumeNotFound where nothing is, VolumeError for other voxels, for an image that only contains labels, and for a
    `selection` as `open_source` does.
    """
    path = Path(path)
    found = _open(path, selection)
    if found.image is not None and found.image.path == path and not is_label(found.image.attributes):
        _check_has_no_labels(path)
        if state_of(found.image.attributes) is not None:  # our masks are label images: this one holds grey values
            raise VolumeError(f"{path} was written by kdunet as an image or as probabilities, not as a mask; give the mask.")
    if found.voxels.dtype.kind not in "biu":
        raise VolumeError(f"{path} holds {found.voxels.dtype} voxels, and labels are integers; threshold or convert it.")
    return found.voxels


@dataclass(frozen=True, slots=True)
class _Image:
    """An OME-Zarr image or label group, its metadata parsed."""

    path: Path
    attributes: Mapping[str, Any]
    multiscale: Multiscale
    zarr_format: Literal[2, 3]

    def voxels(self, index: int, selection: Selection) -> Voxels:
        path = self.path / self.multiscale.datasets[index].path
        array = open_node(path) if zarr_format_at(path) else None
        axes = self.multiscale.axes
        if not isinstance(array, zarr.Array) or array.ndim != len(axes):
            raise VolumeError(f"{path} is no array with {len(axes)} axes, as {self.path} says it is; repair it.")
        return zarr_voxels(path, array, axes, selection)


@dataclass(frozen=True, slots=True)
class _Found:
    """What is at a path: an array, and the image of which it is level `index`, if it is part of one."""

    voxels: Voxels
    image: _Image | None = None
    index: int = 0
    stated_nm: Vector | None = None
    """The voxel size in the metadata of an array that is no part of an image."""

    def labelled_group(self) -> Path | None:
        """The group that takes (z, y, x) labels of this array's extent and shows them where the image is."""
        if self.image is None or self.index or is_label(self.image.attributes) or archive_of(self.image.path):
            return None
        axes = self.voxels.view.axes
        is_zyx = "".join(axis for axis in axes if axis in "zyx") == "zyx"
        n_timepoints = self.voxels.array.shape[axes.index("t")] if "t" in axes else 1
        return self.image.path if is_zyx and n_timepoints == 1 else None

    def voxel_sizes_nm(self, given: Vector | None) -> tuple[Vector, ...]:
        """Of every level of the image; `given` is that of the array itself and wins. Empty where one is unknown."""
        if self.image is None:
            size = given or self.stated_nm
            return (size,) if size else ()
        scales = [self._zyx(dataset.scale, 1.0) for dataset in self.image.multiscale.datasets]
        if given:
            return tuple(_times(scale, _ratio(given, scales[self.index])) for scale in scales)
        units = self._zyx(self.image.multiscale.units, None)
        sizes = [nanometres(scale, units) for scale in scales]
        return tuple(size for size in sizes if size) if all(sizes) else ()

    def layout(self, selection: Selection) -> Layout:
        """Of the array and the coarser levels of its image."""
        given = selection.voxel_size_nm
        if self.image is None:
            size = given or self.stated_nm
            return Layout(levels=(self._level(self.voxels, size or (1.0, 1.0, 1.0)),), units=_NANOMETER if size else _NO_UNITS)
        multiscale = self.image.multiscale
        factor = _ratio(given, self._zyx(multiscale.datasets[self.index].scale, 1.0)) if given else (1.0, 1.0, 1.0)
        levels = tuple(
            self._level(
                self.voxels if index == self.index else self.image.voxels(index, selection),
                _times(self._zyx(dataset.scale, 1.0), factor),
                _times(self._zyx(dataset.translation, 0.0), factor),
            )
            for index, dataset in enumerate(multiscale.datasets)
            if index >= self.index
        )
        units = _NANOMETER if given else self._zyx(multiscale.units, None)
        return Layout(levels=levels, units=units, version=multiscale.version, zarr_format=self.image.zarr_format)

    def _zyx(self, values: Sequence[_T], default: _T) -> tuple[_T, _T, _T]:
        return self.voxels.view.zyx(values, default)

    def _level(self, voxels: Voxels, scale: Vector, translation: Vector = (0.0, 0.0, 0.0)) -> Level:
        """The pages of a TIFF and the chunks of other formats say nothing about how a Zarr volume should be cut."""
        is_zarr = zarr_format_at(voxels.path) is not None
        return Level(
            shape=voxels.shape,
            chunk_shape=voxels.chunk_shape if is_zarr else DEFAULT_CHUNK_SHAPE,
            shard_shape=voxels.shard_shape if is_zarr else None,
            scale=scale,
            translation=translation,
        )


def _open(path: Path, selection: Selection) -> _Found:
    check_exists(_file(path))
    node_path = path if zarr_format_at(path) else _only_node(path)
    if node_path is not None:
        return _open_zarr(node_path, selection)
    if selection.level:
        raise VolumeError(
            f"{path} has no levels, as an OME-Zarr image has, so there is no level {selection.level}; give --level 0."
        )
    if os.path.isdir(path):
        refuse_foreign(path)
        return _Found(open_slices(path, selection))
    suffix = path.suffix.lower()
    if split_hdf5(path) is not None:
        voxels, size = open_hdf5(path, selection)
    elif suffix in TIFF_SUFFIXES:
        voxels, size = open_tiff(path, selection)
    elif suffix in MRC_SUFFIXES:
        voxels, size = open_mrc(path, selection)
    elif suffix == PNG_SUFFIX:
        voxels, size = open_slices(path, selection), None
    else:
        raise VolumeError(
            f"{path} is neither a Zarr array or group nor a file of a format that is read ({', '.join(_SUFFIXES)}); give one."
        )
    return _Found(voxels, stated_nm=size)


def _open_zarr(path: Path, selection: Selection) -> _Found:
    node = open_node(path)
    if isinstance(node, zarr.Group):
        image = _image(path, node)
        n_levels = len(image.multiscale.datasets)
        if not 0 <= selection.level < n_levels:
            has = f"{n_levels} level{'s' if n_levels > 1 else ''}"
            raise VolumeError(
                f"{path} has {has}, counted from 0, so there is no level {selection.level}; give another --level."
            )
        return _Found(image.voxels(selection.level, selection), image, selection.level)
    if selection.level:
        raise VolumeError(f"{path} is one array, so it has no level {selection.level}; give the OME-Zarr image that it is in.")
    parent = open_node(path.parent) if zarr_format_at(path.parent) else None
    if isinstance(parent, zarr.Group) and is_multiscale(parent.attrs.asdict()):
        image = _image(path.parent, parent)
        for index, dataset in enumerate(image.multiscale.datasets):
            if dataset.path == path.name:
                return _Found(image.voxels(index, selection), image, index)
    for part in (node, parent):
        if part is not None:
            _check_finished(path, part.attrs.asdict())
    return _Found(zarr_voxels(path, node, None, selection))


def _only_node(path: Path) -> Path | None:
    """The one Zarr node at the top of a zip file, for those that were packed with the name of their folder."""
    archive = archive_of(path)
    if archive is None:
        return None
    nodes = [path / name for name in sorted(archive.names_in(path)) if zarr_format_at(path / name)]
    if len(nodes) != 1:
        among = ", ".join(str(node) for node in nodes) or "none"
        raise VolumeError(f"{path} is a zip file and no Zarr array or group itself; give one that is in it: {among}.")
    return nodes[0]


def _image(path: Path, group: zarr.Group) -> _Image:
    attributes = group.attrs.asdict()
    if is_multiscale(attributes):
        return _Image(path, attributes, parse_multiscale(attributes, path), group.metadata.zarr_format)
    _check_finished(path, attributes)
    archive = archive_of(path)
    children = os.listdir(path) if archive is None else archive.names_in(path)
    names = label_names(attributes) or sorted(name for name in children if zarr_format_at(path / name))
    raise VolumeError(
        f"{path} is a Zarr group without an image of its own; give one of its members: {', '.join(names) or 'none'}."
    )


def _check_finished(path: Path, attributes: Mapping[str, Any]) -> None:
    if state_of(attributes) == "unfinished":
        raise VolumeError(f"{path} is an output of kdunet that was not finished; run the command that writes it again.")


def _check_has_no_labels(path: Path) -> None:
    if zarr_format_at(path / "labels") and (names := label_names(open_node(path / "labels").attrs.asdict())):
        raise VolumeError(
            f"{path} is an image, not a mask; it has the labels {', '.join(names)}: give {path / 'labels' / names[0]}."
        )


def _file(path: Path) -> Path:
    """What must exist for `path` to: itself, or the HDF5 file before its colon."""
    address = None if os.path.exists(path) else split_hdf5(path)
    return address[0] if address else path


def _real(path: Path) -> str:
    """One way to write a path, on one line."""
    address = split_hdf5(path)
    real = os.path.realpath(_file(path)) + (f":/{address[1]}" if address and address[1] else "")
    return real.replace("\n", "\\n")


def _ratio(a: Vector, b: Vector) -> Vector:
    return a[0] / b[0], a[1] / b[1], a[2] / b[2]


def _times(a: Vector, b: Vector) -> Vector:
    return a[0] * b[0], a[1] * b[1], a[2] * b[2]
