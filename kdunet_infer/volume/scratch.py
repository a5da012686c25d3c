"""A mask on its way to a target: kept beside the target's records while it is needed, removed afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from kdunet_infer.errors import VolumeError
from kdunet_infer.volume.targets import VolumeTarget, create_level

_RAW = ".kdunet/raw"


@contextmanager
def scratch(target: VolumeTarget) -> Iterator[VolumeTarget]:
    """A bare Zarr of the size and chunks of an unfinished target, in its folder, to be written and read; never finished.

    Raises VolumeError where the disk refuses.
    """
    path = target.store / _RAW
    layout = replace(target.layout, levels=target.layout.levels[:1], version="0.5", zarr_format=3)
    try:
        try:
            voxels = create_level(path, None, layout)
        except OSError as exc:
            raise VolumeError(f"{path} cannot be written ({exc}); check free space and permissions, then run again.") from exc
        yield VolumeTarget(
            path=path,
            store=path,
            name=target.name,
            content="mask",
            layout=layout,
            target_format="zarr",
            levels=(voxels,),
            is_label=False,
        )
    finally:
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):  # not empty where a run keeps records
            path.parent.rmdir()
