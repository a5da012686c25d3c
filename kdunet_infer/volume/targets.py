"""Where results go: labels inside the image they are about, and new volumes in the formats of `formats.py`."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from kdunet_infer.blockwise import UInt8Array
from kdunet_infer.errors import GeometryError, KdunetError, TargetExists, VolumeError
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.volume.arrays import Voxels, group_to_write, wait_for_zarr, zarr_format_at, zarr_voxels
from kdunet_infer.volume.formats import TargetFormat, choose_format, own_format, target_layout
from kdunet_infer.volume.listing import is_listed, list_label, unlist_label
from kdunet_infer.volume.ome import Content, Layout, Level, Vector, array_attributes, image_attributes, step_between
from kdunet_infer.volume.ownership import check_free, is_finished, mark_finished, mark_unfinished, remove
from kdunet_infer.volume.pyramid import build_level
from kdunet_infer.volume.sources import VolumeSource, open_source
from kdunet_infer.volume.tiff_target import write_tiff

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)
_LABEL_NAME = re.compile(r"(?!zarr\.json$)[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeTarget:
    """A volume being written: implements `blockwise.Target`. It counts for nothing until it is finished."""

    path: Path
    """Of the OME-Zarr group, the Zarr array or the TIFF file."""
    store: Path
    """The folder of its voxels until it is finished, in which a run keeps its records: `path` itself, but for a TIFF."""
    name: str
    content: Content
    layout: Layout
    target_format: TargetFormat
    levels: tuple[Voxels, ...]
    """The arrays of the layout's levels; of a finished TIFF they are gone."""
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

    def finish(self, attributes: Mapping[str, Any], roi: Box | None = None) -> None:
        """Build the coarser levels, then write the metadata, with `attributes` (JSON) under `kdunet`, then list the label.

        Call it when all voxels are written; calling it again is harmless. With `roi`, outside which nothing was written,
        coarser levels are built only where it reaches. Raises VolumeError where the disk refuses; it is then not finished.
        """
        if self._is_written_tiff():
            return
        reached = Box.of_shape(self.shape).intersection(roi) if roi is not None else Box.of_shape(self.shape)
        for finer, coarser in pairwise(range(len(self.levels))):
            reached = self._build(finer, coarser, reached)
        with _writing(self.path):
            self._seal(mark_finished(attributes))

    def result(self) -> Voxels:
        """The finest level as it is on the disk now, also that of a finished TIFF."""
        return open_source(self.path).voxels if self._is_written_tiff() else self.levels[0]

    def _is_written_tiff(self) -> bool:
        return self.target_format == "tiff" and self.path.exists()

    def _seal(self, mark: Mapping[str, Any]) -> None:
        """Write what makes it look finished: all of it or nothing."""
        match self.target_format:
            case "tiff":
                beside = self.store / "stack.partial"
                write_tiff(self.path, beside, self.levels[0].read, self.layout, name=self.name, about=mark)
                shutil.rmtree(self.store, ignore_errors=True)  # all is well, and what is left is unfinished by its mark
            case "zarr":
                array = zarr.open_array(str(self.path), mode="r+", zarr_format=self.layout.zarr_format)
                array.update_attributes({**array_attributes(self.layout), **mark})
            case "ome-zarr-0.4" | "ome-zarr-0.5" if self.is_label:
                described = image_attributes(self.layout, self.name, self.content, image="../../")
                list_label(self.path, self.layout, {**described, **mark})
            case "ome-zarr-0.4" | "ome-zarr-0.5":
                described = image_attributes(self.layout, self.name, self.content, image=None)
                group_to_write(self.path).update_attributes({**described, **mark})

    def _write(self, index: int, box: Box, voxels: UInt8Array) -> None:
        if voxels.dtype != np.uint8:
            raise VolumeError(f"{self.path} stores uint8 and got {voxels.dtype}; round to uint8 before writing.")
        slices = box.slices_in(Box.of_shape(self.layout.levels[index].shape))
        array = self.levels[index].array
        assert isinstance(array, zarr.Array), "as created here"
        with _writing(self.path):
            array[slices] = voxels

    def _build(self, finer: int, coarser: int, roi: Box) -> Box:
        fine, coarse = self.layout.levels[finer], self.layout.levels[coarser]
        step = step_between(fine, coarse)
        return build_level(
            self.levels[finer].read,
            fine.shape,
            lambda box, voxels: self._write(coarser, box, voxels),
            coarse.shape,
            ratio=step.ratio,
            picked_at=step.picked_at,
            write_shape=coarse.write_shape,
            chunk_shape=coarse.chunk_shape,
            pooling="majority" if self.content == "mask" else "mean",
            roi=roi,
        )


def target_write_shape(like: VolumeSource | Layout, target_format: TargetFormat | None) -> ZYX:
    """The `write_shape` that an output like a source will have in a format; None: as a label, or in the source's own version.

    A run plans its blocks by it before anything is created.
    """
    layout = like if isinstance(like, Layout) else like.layout
    return target_layout(layout, target_format).levels[0].write_shape


def create_label(source: VolumeSource, name: str, *, overwrite: bool = False) -> VolumeTarget:
    """Start a mask (uint8, 0 and 1) as `labels/<name>` of the source's image, with its levels, transforms, units and
    OME-Zarr version, and its chunks where they suit viewing (`target_levels`); axes that were dropped on reading are left out.

    Nothing else in the image is touched, but for the list of labels, and consolidated metadata that there are, once the label
    is finished. An unfinished label of the same name is started over. Raises TargetExists for a finished one unless
    `overwrite`, and for anything that is not ours; VolumeError for a source that can have no labels, for a name that is no
    safe folder name, and where the disk refuses.
    """
    path = _label_path(source, name)
    target_format = own_format(source.layout)
    layout = target_layout(source.layout, target_format)
    if not overwrite:
        _mend_list(path, layout)
    return _create(path, name, layout, target_format, content="mask", is_label=True, overwrite=overwrite)


def check_label(source: VolumeSource, name: str, *, overwrite: bool = False) -> None:
    """Refuse what `create_label` would refuse, before anything is removed or written."""
    check_free(_label_path(source, name), overwrite=overwrite)


def create_image(
    path: str | Path,
    *,
    like: VolumeSource,
    content: Content,
    overwrite: bool = False,
    target_format: TargetFormat | None = None,
) -> VolumeTarget:
    """Start a new volume of the size, levels, transforms and units of a source; a TIFF and a bare Zarr array have one level.

    Without `target_format` the suffix says it: `.tif` and `.tiff` are TIFF, `.zarr` is OME-Zarr in the source's version. An
    unfinished output at the path is started over. Raises TargetExists for a finished one unless `overwrite`, and for
    anything that is not ours; VolumeError for a path that does not go with the format, that overlaps the source, and where
    the disk refuses.
    """
    path = Path(path)
    check_image(path, like=like, overwrite=overwrite, target_format=target_format)
    chosen = choose_format(path, target_format, like.layout)
    layout = target_layout(like.layout, chosen)
    return _create(path, path.stem, layout, chosen, content=content, is_label=False, overwrite=overwrite)


def check_image(
    path: str | Path, *, like: VolumeSource, overwrite: bool = False, target_format: TargetFormat | None = None
) -> None:
    """Refuse what `create_image` would refuse, before anything is removed or written."""
    path = Path(path)
    _check_apart(path, like.path)
    _check_free(path, _store_of(path, choose_format(path, target_format, like.layout)), overwrite=overwrite)


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
    target_format = choose_format(path, "ome-zarr-0.5", layout)
    return _create(path, name or path.stem, layout, target_format, content="image", is_label=False, overwrite=overwrite)


def _label_path(source: VolumeSource, name: str) -> Path:
    if source.group is None:
        raise VolumeError(
            f"{source.path} is not an OME-Zarr image at full resolution, so it takes no labels; "
            "write to a new volume with -o OUT.zarr."
        )
    if not _LABEL_NAME.fullmatch(name):
        raise VolumeError(f"label name {name!r} cannot be; use letters, digits, '_', '-' and '.', first a letter or digit.")
    return source.group / "labels" / name


def _halved(shape: ZYX, chunk_shape: ZYX, shard_shape: ZYX | None, size: Vector, factor: int) -> Level:
    z, y, x = (-(-n // factor) for n in shape)
    # The centre of the first coarser voxel is that of the finer voxels in it, half a voxel off per halving.
    t, u, v = ((factor - 1) / 2 * nm for nm in size)
    scale = (size[0] * factor, size[1] * factor, size[2] * factor)
    return Level(shape=(z, y, x), chunk_shape=chunk_shape, shard_shape=shard_shape, scale=scale, translation=(t, u, v))


def _create(
    path: Path, name: str, layout: Layout, target_format: TargetFormat, *, content: Content, is_label: bool, overwrite: bool
) -> VolumeTarget:
    store = _store_of(path, target_format)
    _check_free(path, store, overwrite=overwrite)
    with _writing(path):
        if is_label:
            unlist_label(path, layout)
        for old in (path, store):
            remove(old)
        if target_format == "zarr":
            levels: tuple[Voxels, ...] = (create_level(store, None, layout),)
        else:
            zarr.create_group(str(store), zarr_format=layout.zarr_format, attributes=mark_unfinished())
            levels = tuple(create_level(store, index, layout) for index in range(len(layout.levels)))
    return VolumeTarget(
        path=path,
        store=store,
        name=name,
        content=content,
        layout=layout,
        target_format=target_format,
        levels=levels,
        is_label=is_label,
    )


def create_level(store: Path, index: int | None, layout: Layout) -> Voxels:
    """A new array (uint8, zeros) of a level in the group at `store`; index None: of the finest, at `store`, marked unfinished.

    Raises OSError where the disk refuses.
    """
    level = layout.levels[index or 0]
    is_v3 = layout.zarr_format == 3
    array = zarr.create_array(
        str(store),
        name=None if index is None else str(index),
        shape=level.shape,
        dtype="uint8",
        chunks=level.chunk_shape,
        shards=level.shard_shape,
        fill_value=0,
        zarr_format=layout.zarr_format,
        attributes=mark_unfinished() if index is None else None,
        dimension_names=("z", "y", "x") if is_v3 else None,
        chunk_key_encoding={"name": "default" if is_v3 else "v2", "separator": "/"},
    )
    return zarr_voxels(store if index is None else store / str(index), array)


def _mend_list(label: Path, layout: Layout) -> None:
    """List a finished label that was not listed because its run was ended in the moment between."""
    if is_finished(label) and not is_listed(label, layout):
        with _writing(label):
            list_label(label, layout, {})


def _store_of(path: Path, target_format: TargetFormat) -> Path:
    return path.with_name(f".{path.name}.kdunet") if target_format == "tiff" else path


def _check_free(path: Path, store: Path, *, overwrite: bool) -> None:
    check_free(path, overwrite=overwrite)
    if store == path:
        return
    if path.is_dir():
        raise TargetExists(f"{path} is a folder, and a TIFF is a file; choose another name.")
    check_free(store, overwrite=overwrite)


def _check_apart(path: Path, source: Path) -> None:
    """Refuse an output in, around or in place of the source."""
    output, taken = path.resolve(), source.resolve()
    for parent in taken.parents:
        if zarr_format_at(parent) is None:
            break
        taken = parent  # what the user calls the volume may be a part of a larger one
    if output == taken or output in taken.parents or taken in output.parents:
        raise VolumeError(f"the output {path} overlaps the source {taken}, which is never changed; choose a path outside it.")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except KdunetError:  # some are OSErrors too, and have their sentence already
        raise
    except OSError as exc:
        wait_for_zarr()
        raise VolumeError(f"{path} cannot be written{_why(exc)}, then run the same command again.") from exc


def _why(exc: OSError) -> str:
    if exc.errno in _DISK_FULL:
        return f", for the disk is full ({exc}); free space there or choose another output"
    if exc.errno in _NOT_ALLOWED:
        return f", for that is not allowed there ({exc}); get permission or choose another output"
    return f" ({exc}); check free space and permissions"
