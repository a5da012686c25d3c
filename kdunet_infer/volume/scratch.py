"""A mask on its way to a target: kept beside the target's records while it is needed, removed afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import zarr

from kdunet_infer.errors import VolumeError
from kdunet_infer.volume.arrays import zarr_voxels
from kdunet_infer.volume.targets import VolumeTarget

_RAW = ".kdunet/raw"


@contextmanager
def scratch(target: VolumeTarget) -> Iterator[VolumeTarget]:
    """A bare Zarr of the size and chunks of an unfinished target, in its folder, to be written and read; never finished.

    Raises VolumeError where the disk refuses.
    """
    path, level = target.store / _RAW, target.layout.levels[0]
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
            layout=replace(target.layout, levels=(level,), version="0.5", zarr_format=3),
            target_format="zarr",
            levels=(zarr_voxels(path, array),),
            is_label=False,
        )
    finally:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # not empty where a run keeps records
            path.parent.rmdir()
