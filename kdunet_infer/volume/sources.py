"""What a path holds: images to read and segment, masks and labels to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr

from kdunet_infer.blockwise import UInt8Array
from kdunet_infer.errors import VolumeError
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.mirror import read_mirrored
from kdunet_infer.volume.arrays import TIFF_SUFFIXES, Voxels, open_node, open_tiff, zarr_voxels
from kdunet_infer.volume.ome import (
    Layout,
    Level,
    Multiscale,
    is_label,
    is_multiscale,
    label_names,
    parse_multiscale,
)
from kdunet_infer.volume.state import is_unfinished

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
        return np.ascontiguousarray(read_mirrored(self.voxels.read, self.shape, box))


@dataclass(frozen=True, slots=True)
class _Image:
    """An OME-Zarr image or label group, its metadata parsed."""

    path: Path
    attributes: Mapping[str, Any]
    multiscale: Multiscale
    zarr_format: int

    def voxels(self, index: int) -> Voxels:
        path = self.path / self.multiscale.datasets[index].path
        array = open_node(path)
        if not isinstance(array, zarr.Array) or array.ndim != self.multiscale.n_axes:
            raise VolumeError(f"{path} is no array with {self.multiscale.n_axes} axes, though {self.path} lists it; repair it.")
        return zarr_voxels(path, array)

    def layout(self, first: int) -> Layout:
        """Of the levels from `first` on."""
        levels = []
        for index, dataset in enumerate(self.multiscale.datasets[first:], start=first):
            voxels = self.voxels(index)
            levels.append(
                Level(
                    shape=voxels.shape,
                    chunk_shape=voxels.chunk_shape,
                    shard_shape=voxels.shard_shape,
                    scale=dataset.scale,
                    translation=dataset.translation,
                )
            )
        version, units = self.multiscale.version, self.multiscale.units
        return Layout(levels=tuple(levels), units=units, version=version, zarr_format=cast("Any", self.zarr_format))


def open_source(path: str | Path) -> VolumeSource:
    """Open an image: an OME-Zarr 0.4 or 0.5 group, one level of it, a plain Zarr array, or a TIFF stack; uint8.

    Raises VolumeNotFound where nothing is, VolumeError for anything that is no such image.
    """
    path = Path(path)
    image, index = _find_image(path)
    if image is None:
        voxels = _open_plain(path)
        layout = _plain_layout(voxels)
    else:
        voxels = image.voxels(index)
        layout = image.layout(index)
    if voxels.dtype != np.uint8:
        raise VolumeError(f"{path} holds {voxels.dtype} voxels, and only uint8 can be read; convert it to uint8.")
    has_labels = image is not None and index == 0 and not is_label(image.attributes)
    return VolumeSource(path, voxels, layout, image.path if image is not None and has_labels else None)


def open_labels(path: str | Path) -> Voxels:
    """Open a mask or label image as it is: an OME-Zarr label group, a plain Zarr array, or a TIFF; integers or bool.

    Raises VolumeNotFound where nothing is, VolumeError for other voxels and for an image that only contains labels.
    """
    path = Path(path)
    image, index = _find_image(path)
    if image is not None and image.path == path and not is_label(image.attributes) and (names := _labels_of(path)):
        raise VolumeError(f"{path} is an image, not a mask; its labels are {', '.join(names)}: give {path / 'labels' / names[0]}.")
    voxels = _open_plain(path) if image is None else image.voxels(index)
    if voxels.dtype.kind not in "biu":
        raise VolumeError(f"{path} holds {voxels.dtype} voxels, and labels are integers; threshold or convert it.")
    return voxels
