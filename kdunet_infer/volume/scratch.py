"""A mask on its way to a target: kept beside the target's records while it is needed, removed afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import zarr

from kdunet_infer.errors import VolumeError
from kdunet_infer.volume.arrays import zarr_voxels
from kdunet_infer.volume.formats import target_layout
from kdunet_infer.volume.targets import VolumeTarget

_RAW = ".kdunet/raw"


@contextmanager
def scratch(target: VolumeTarget) -> Iterator[VolumeTarget]:
    """A bare Zarr of the size and chunks of an unfinished target, in its folder, to be written and read; never finished.

    Raises VolumeError where the disk refuses.
    """
    path = target.store / _RAW
    layout = target_layout(target.layout, "zarr")
    level = layout.levels[0]
    try:
        try:
            array = zarr.create_array(
                str(path),
                shape=level.shape,
                dtype="uint8",
                chunks=level.chunk_shape,
                shards=level.shard_shape,
                fill_value=0,
            )
        except OSError as exc:
            raise VolumeError(f"{path} cannot be written ({exc}); check free space and permissions, then run again.") from exc
        yield VolumeTarget(
            path=path,
            store=path,
            name=target.name,
            content="mask",
            layout=layout,
            target_format="zarr",
            levels=(zarr_voxels(path, array),),
            is_label=False,
        )
    finally:
        shutil.rmtree(path.parent, ignore_errors=True)  # unlike the target it carries no mark, and nothing refers to it
