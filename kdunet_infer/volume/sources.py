"""What a path holds: images to read and segment, masks and labels to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr

from kdunet_infer.blockwise import UInt8Array
from kdunet_infer.errors import VolumeError
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.mirror import read_mirrored
from kdunet_infer.volume.arrays import TIFF_SUFFIXES, Voxels, open_node, open_tiff, zarr_format_at, zarr_voxels
from kdunet_infer.volume.ome import Dataset, Layout, Level, Multiscale, is_label, is_multiscale, label_names, parse_multiscale
from kdunet_infer.volume.ownership import state_of

DEFAULT_CHUNK_SHAPE = (64, 128, 128)
"""Of targets whose source has no chunks of its own: 1 MiB, good for slices along any axis."""


@dataclass(frozen=True, slots=True)
class VolumeSource:
    """A volume to read: implements `blockwise.Source`."""

    path: Path
    """As it was opened."""
    voxels: Voxels
    """The array, uint8."""
    layout: Layout
    """What an output like this volume repeats; its first level is this volume."""
    group: Path | None
    """The OME-Zarr image whose finest level this is, with a place for labels; None for plain arrays and TIFF."""

    @property
    def shape(self) -> ZYX:
        """Voxels, zyx."""
        return self.voxels.shape

    @property
    def chunk_shape(self) -> ZYX:
        """Voxels of one file (shard, chunk or TIFF page), zyx."""
        return self.voxels.shard_shape or self.voxels.chunk_shape

    def read_box(self, box: Box) -> UInt8Array:
        """Voxels (z, y, x) of `box`, uint8, contiguous; mirrored beyond the volume's faces (edge voxel not repeated).

        Raises CorruptChunk for a chunk that cannot be read or decoded.
        """
        return read_mirrored(self.voxels.read, self.shape, box)


def open_source(path: str | Path) -> VolumeSource:
    """Open an image: an OME-Zarr 0.4 or 0.5 group, one level of it, a plain Zarr array, or a TIFF stack; uint8.

    Raises VolumeNotFound where nothing is, VolumeError for anything that is no such image.
    """
    found = _open(Path(path))
    if found.voxels.dtype != np.uint8:
        raise VolumeError(f"{path} holds {found.voxels.dtype} voxels, and only uint8 can be read; convert it to uint8.")
    return VolumeSource(Path(path), found.voxels, found.layout(), found.labelled_group())


def open_labels(path: str | Path) -> Voxels:
    """Open a mask or label image as it is: an OME-Zarr label group, a plain Zarr array, or a TIFF; integers or bool.

    Raises VolumeNotFound where nothing is, VolumeError for other voxels and for an image that only contains labels.
    """
    path = Path(path)
    found = _open(path)
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

    def voxels(self, index: int) -> Voxels:
        path = self.path / self.multiscale.datasets[index].path
        array = open_node(path) if zarr_format_at(path) else None
        if not isinstance(array, zarr.Array) or array.ndim != self.multiscale.n_axes:
            raise VolumeError(f"{path} is no array with {self.multiscale.n_axes} axes, as {self.path} says it is; repair it.")
        return zarr_voxels(path, array)


@dataclass(frozen=True, slots=True)
class _Found:
    """What is at a path: an array, and the image of which it is level `index`, if it is part of one."""

    voxels: Voxels
    image: _Image | None = None
    index: int = 0

    def labelled_group(self) -> Path | None:
        """The group that takes labels of this array's extent."""
        return self.image.path if self.image and self.index == 0 and not is_label(self.image.attributes) else None

    def layout(self) -> Layout:
        """Of the array and the coarser levels of its image."""
        if self.image is None:
            return Layout(levels=(_plain_level(self.voxels),))
        multiscale = self.image.multiscale
        levels = tuple(
            _level(self.image.voxels(index), dataset)
            for index, dataset in enumerate(multiscale.datasets)
            if index >= self.index
        )
        return Layout(levels=levels, units=multiscale.units, version=multiscale.version, zarr_format=self.image.zarr_format)


def _open(path: Path) -> _Found:
    if path.suffix.lower() in TIFF_SUFFIXES:
        return _Found(open_tiff(path))
    node = open_node(path)
    if isinstance(node, zarr.Group):
        image = _image(path, node)
        return _Found(image.voxels(0), image)
    voxels = zarr_voxels(path, node)
    parent = open_node(path.parent) if zarr_format_at(path.parent) else None
    if isinstance(parent, zarr.Group) and is_multiscale(parent.attrs.asdict()):
        image = _image(path.parent, parent)
        for index, dataset in enumerate(image.multiscale.datasets):
            if dataset.path == path.name:
                return _Found(voxels, image, index)
    return _Found(voxels)


def _image(path: Path, group: zarr.Group) -> _Image:
    attributes = group.attrs.asdict()
    if is_multiscale(attributes):
        return _Image(path, attributes, parse_multiscale(attributes, path), group.metadata.zarr_format)
    if state_of(attributes) == "unfinished":
        raise VolumeError(f"{path} is an output of kdunet that was not finished; run the command that writes it again.")
    names = label_names(attributes) or sorted(child.name for child in path.iterdir() if zarr_format_at(child))
    raise VolumeError(
        f"{path} is a Zarr group without an image of its own; give one of its members: {', '.join(names) or 'none'}."
    )


def _check_has_no_labels(path: Path) -> None:
    if zarr_format_at(path / "labels") and (names := label_names(open_node(path / "labels").attrs.asdict())):
        raise VolumeError(
            f"{path} is an image, not a mask; it has the labels {', '.join(names)}: give {path / 'labels' / names[0]}."
        )


def _level(voxels: Voxels, dataset: Dataset) -> Level:
    return Level(
        shape=voxels.shape,
        chunk_shape=voxels.chunk_shape,
        shard_shape=voxels.shard_shape,
        scale=dataset.scale,
        translation=dataset.translation,
    )


def _plain_level(voxels: Voxels) -> Level:
    """Of an array without metadata; the pages of a TIFF say nothing about how a Zarr volume should be cut."""
    if voxels.path.suffix.lower() in TIFF_SUFFIXES:
        return Level(shape=voxels.shape, chunk_shape=DEFAULT_CHUNK_SHAPE)
    return Level(shape=voxels.shape, chunk_shape=voxels.chunk_shape, shard_shape=voxels.shard_shape)
