"""Where results go: labels inside the image they are about, and new OME-Zarr volumes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from kdunet_infer.blockwise import UInt8Array
from kdunet_infer.errors import GeometryError, KdunetError, VolumeError
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.volume.arrays import Voxels, group_to_write, zarr_format_at, zarr_voxels
from kdunet_infer.volume.ome import (
    Content,
    Layout,
    Level,
    Vector,
    image_attributes,
    label_names,
    labels_attributes,
)
from kdunet_infer.volume.ownership import check_free, mark_finished, mark_unfinished, remove
from kdunet_infer.volume.pyramid import build_level
from kdunet_infer.volume.sources import VolumeSource

_LABEL_NAME = re.compile(r"(?!zarr\.json$)[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeTarget:
    """A volume being written: implements `blockwise.Target`. It counts for nothing until it is finished."""

    path: Path
    """Of the OME-Zarr group."""
    name: str
    content: Content
    layout: Layout
    levels: tuple[Voxels, ...]
    """The arrays of the layout's levels."""
    is_label: bool
    """Whether it is a label of an image, to be listed in the group `labels` around it."""

    @property
    def shape(self) -> ZYX:
        """Voxels, zyx."""
        return self.layout.levels[0].shape

    @property
    def write_shape(self) -> ZYX:
        """Voxels of one file, zyx, on a grid anchored at voxel (0, 0, 0): two writers in one file lose voxels silently."""
        return self.layout.levels[0].write_shape

    def write_box(self, box: Box, voxels: UInt8Array) -> None:
        """Store `voxels` (z, y, x) uint8 at `box`; returns when they are written, each file at once or not at all.

        Raises GeometryError for a box that leaves the volume or does not fit the voxels, VolumeError for voxels that are
        not uint8 and where the disk refuses.
        """
        if voxels.shape != box.shape:
            raise GeometryError(f"voxels of shape {voxels.shape} do not fit the box {box} of shape {box.shape}.")
        self._write(0, box, voxels)

    def finish(self, attributes: Mapping[str, Any]) -> None:
        """Build the coarser levels, then write the metadata, with `attributes` (JSON) under `kdunet`, then list the label.

        Call it when all voxels are written; calling it again is harmless. Raises VolumeError where the disk refuses.
        """
        for finer, coarser in pairwise(range(len(self.levels))):
            self._build(finer, coarser)
        image = "../../" if self.is_label else None
        described = image_attributes(self.layout, self.name, self.content, image=image)
        with _writing(self.path):
            group_to_write(self.path).update_attributes({**described, **mark_finished(attributes)})
            if self.is_label:
                _list_label(self.path, self.layout)

    def _write(self, index: int, box: Box, voxels: UInt8Array) -> None:
        if voxels.dtype != np.uint8:
            raise VolumeError(f"{self.path} stores uint8 and got {voxels.dtype}; round to uint8 before writing.")
        slices = box.slices_in(Box.of_shape(self.layout.levels[index].shape))
        with _writing(self.path):
            self.levels[index].array[slices] = voxels

    def _build(self, finer: int, coarser: int) -> None:
        fine, coarse = self.layout.levels[finer], self.layout.levels[coarser]
        z, y, x = (b / a for a, b in zip(fine.scale, coarse.scale, strict=True))
        build_level(
            self.levels[finer].read,
            fine.shape,
            lambda box, voxels: self._write(coarser, box, voxels),
            coarse.shape,
            ratio=(z, y, x),
            write_shape=coarse.write_shape,
            chunk_shape=coarse.chunk_shape,
            pooling="majority" if self.content == "mask" else "mean",
        )


def create_label(source: VolumeSource, name: str, *, overwrite: bool = False) -> VolumeTarget:
    """Start a mask (uint8, 0 and 1) as `labels/<name>` of the source's image, with its levels, transforms, units, chunks
    and OME-Zarr version; axes that were dropped on reading are left out.

    Nothing else in the image is touched, but for the list of labels once the label is finished. An unfinished label of
    the same name is started over. Raises TargetExists for a finished one unless `overwrite`, and for anything that is
    not ours; VolumeError for a source that can have no labels, for a name that is no safe folder name, and where the
    disk refuses.
    """
    if source.group is None:
        raise VolumeError(
            f"{source.path} is not an OME-Zarr image at full resolution, so it takes no labels; "
            "write to a new volume with -o OUT.zarr."
        )
    if not _LABEL_NAME.fullmatch(name):
        raise VolumeError(f"label name {name!r} cannot be; use letters, digits, '_', '-' and '.', first a letter or digit.")
    path = source.group / "labels" / name
    return _create(path, name, source.layout, content="mask", is_label=True, overwrite=overwrite)


def create_image(path: str | Path, *, like: VolumeSource, content: Content, overwrite: bool = False) -> VolumeTarget:
    """Start a new OME-Zarr volume of the size, levels, transforms, units, chunks and OME-Zarr version of a source.

    An unfinished output at the path is started over. Raises TargetExists for a finished one unless `overwrite`, and for
    anything that is not ours; VolumeError for a path that is no `.zarr`, that overlaps the source, and where the disk refuses.
    """
    path = Path(path)
    check_image(path, like=like, overwrite=overwrite)
    return _create(path, path.stem, like.layout, content=content, is_label=False, overwrite=overwrite)


def check_image(path: str | Path, *, like: VolumeSource, overwrite: bool = False) -> None:
    """Refuse what `create_image` would refuse, before anything is removed or written."""
    path = Path(path)
    _check_apart(path, like.path)
    _check_name(path)
    check_free(path, overwrite=overwrite)


def create_volume(
    path: str | Path,
    shape: ZYX,
    *,
    chunk_shape: ZYX,
    shard_shape: ZYX | None = None,
    voxel_size_nm: Vector | None = None,
    n_levels: int = 1,
    name: str | None = None,
    overwrite: bool = False,
) -> VolumeTarget:
    """Start a new OME-Zarr 0.5 volume of grey values; each level is half of the one before, rounded up.

    Without a voxel size the scale is 1 and there is no unit. Raises as `create_image` does.
    """
    path = Path(path)
    size = voxel_size_nm or (1.0, 1.0, 1.0)
    levels = tuple(_halved(shape, chunk_shape, shard_shape, size, 2**level) for level in range(n_levels))
    unit = "nanometer" if voxel_size_nm else None
    layout = Layout(levels=levels, units=(unit, unit, unit))
    return _create(path, name or path.stem, layout, content="image", is_label=False, overwrite=overwrite)


def _halved(shape: ZYX, chunk_shape: ZYX, shard_shape: ZYX | None, size: Vector, factor: int) -> Level:
    z, y, x = (-(-n // factor) for n in shape)
    # The centre of the first coarser voxel is that of the finer voxels in it, half a voxel off per halving.
    t, u, v = ((factor - 1) / 2 * nm for nm in size)
    scale = (size[0] * factor, size[1] * factor, size[2] * factor)
    return Level(shape=(z, y, x), chunk_shape=chunk_shape, shard_shape=shard_shape, scale=scale, translation=(t, u, v))


def _create(path: Path, name: str, layout: Layout, *, content: Content, is_label: bool, overwrite: bool) -> VolumeTarget:
    if not is_label:
        _check_name(path)
    check_free(path, overwrite=overwrite)
    with _writing(path):
        if is_label:
            _unlist_label(path, layout)
        remove(path)
        zarr.create_group(str(path), zarr_format=layout.zarr_format, attributes=mark_unfinished())
        levels = tuple(_create_level(path, index, layout) for index in range(len(layout.levels)))
    return VolumeTarget(path=path, name=name, content=content, layout=layout, levels=levels, is_label=is_label)


def _create_level(group: Path, index: int, layout: Layout) -> Voxels:
    level = layout.levels[index]
    is_v3 = layout.zarr_format == 3
    array = zarr.create_array(
        str(group),
        name=str(index),
        shape=level.shape,
        dtype="uint8",
        chunks=level.chunk_shape,
        shards=level.shard_shape,
        fill_value=0,
        zarr_format=layout.zarr_format,
        dimension_names=("z", "y", "x") if is_v3 else None,
        chunk_key_encoding={"name": "default" if is_v3 else "v2", "separator": "/"},
    )
    return zarr_voxels(group / str(index), array)


def _check_name(path: Path) -> None:
    if path.suffix != ".zarr":
        raise VolumeError(f"{path} is no possible output; outputs are OME-Zarr volumes, so give a path that ends in .zarr.")


def _check_apart(path: Path, source: Path) -> None:
    """Refuse an output in, around or in place of the source."""
    output, taken = path.resolve(), source.resolve()
    for parent in taken.parents:
        if zarr_format_at(parent) is None:
            break
        taken = parent  # what the user calls the volume may be a part of a larger one
    if output == taken or output in taken.parents or taken in output.parents:
        raise VolumeError(f"the output {path} overlaps the source {taken}, which is never changed; choose a path outside it.")


def _list_label(label: Path, layout: Layout) -> None:
    """Add a label to the list of its image's labels, where viewers look for it."""
    if zarr_format_at(label.parent) is None:
        zarr.create_group(str(label.parent), zarr_format=layout.zarr_format)
    group = group_to_write(label.parent)
    names = label_names(group.attrs.asdict())
    if label.name not in names:
        group.update_attributes(labels_attributes(group.attrs.asdict(), layout.version, [*names, label.name]))


def _unlist_label(label: Path, layout: Layout) -> None:
    if zarr_format_at(label.parent) is None:
        return
    group = group_to_write(label.parent)
    names = label_names(group.attrs.asdict())
    if label.name in names:
        others = [name for name in names if name != label.name]
        group.update_attributes(labels_attributes(group.attrs.asdict(), layout.version, others))


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except KdunetError:  # some are OSErrors too, and have their sentence already
        raise
    except OSError as exc:
        raise VolumeError(f"{path} cannot be written ({exc}); check free space and permissions, then run again.") from exc
