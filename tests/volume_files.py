"""Volumes on disk as other programs write them: made with zarr alone and metadata by hand, never with the code under test."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr

Zyx = tuple[int, int, int]
CHUNK = (4, 8, 8)


def write_image(
    path: Path,
    levels: Sequence[npt.NDArray[Any]],
    *,
    version: Literal["0.4", "0.5"] = "0.5",
    axes: str = "zyx",
    unit: str | None = "nanometer",
    scales: Sequence[Sequence[float]] = ((1, 1, 1),),
    translations: Sequence[Sequence[float]] | None = None,
    shared: Sequence[Mapping[str, Any]] | None = None,
    chunk: Zyx = CHUNK,
    shard: Zyx | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """An OME-Zarr image of arrays whose last axes are zyx; `shared` are the transformations of the multiscale."""
    is_v3 = version == "0.5"
    group = zarr.create_group(str(path), zarr_format=3 if is_v3 else 2)
    datasets = []
    for index, voxels in enumerate(levels):
        lead = (1,) * (voxels.ndim - 3)
        array = group.create_array(
            f"s{index}",
            shape=voxels.shape,
            dtype=voxels.dtype,
            chunks=(*lead, *chunk),
            shards=(*lead, *shard) if shard else None,
            dimension_names=list(axes) if is_v3 else None,
            chunk_key_encoding={"name": "default" if is_v3 else "v2", "separator": "/"},
        )
        array[...] = voxels
        transforms: list[dict[str, Any]] = [{"type": "scale", "scale": [*lead, *scales[index]]}]
        if translations is not None:
            transforms.append({"type": "translation", "translation": [*(0 for _ in lead), *translations[index]]})
        datasets.append({"path": f"s{index}", "coordinateTransformations": transforms})
    kinds = {"t": "time", "c": "channel"}
    described = [{"name": axis, "type": kinds.get(axis, "space")} for axis in axes]
    for axis in described[-3:]:
        axis.update({"unit": unit} if unit else {})
    entry: dict[str, Any] = {"name": "raw", "axes": described, "datasets": datasets}
    if shared is not None:
        entry["coordinateTransformations"] = list(shared)
    ome = {"multiscales": [entry if is_v3 else {**entry, "version": version}], **(extra or {})}
    group.update_attributes({"ome": {"version": version, **ome}} if is_v3 else ome)
    return path


def hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every file below `path`, by its path relative to it."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def halved(voxels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Every second voxel: a coarser level whose content does not matter."""
    return voxels[::2, ::2, ::2]
