"""Which formats outputs have, and how each is cut into chunks. Knows layouts and suffixes; touches no files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from kdunet_infer.errors import VolumeError
from kdunet_infer.volume.ome import Layout, Level

TargetFormat = Literal["ome-zarr-0.5", "ome-zarr-0.4", "zarr", "tiff"]
"""Of a stand-alone output. zarr: a bare Zarr v3 array; ome-zarr-0.4 is Zarr v2 and the only format without shards."""

TARGET_CHUNK_SHAPE = (64, 64, 64)
"""Where the source's own chunks suit no viewer: 256 KiB, as quick to show along x as along z."""
TIFF_CHUNK_SHAPE = (8, 512, 512)
"""Of the array that collects a TIFF's voxels until they are written page by page."""
TIFF_SUFFIXES = (".tif", ".tiff")
_SHORTEST, _LONGEST = 16, 256


def choose_format(path: Path, target_format: TargetFormat | None, like: Layout) -> TargetFormat:
    """The format of an output at `path`: `target_format`, or what the suffix says; OME-Zarr is of the version of its source.

    Raises VolumeError for a suffix that no format has, and for a format that contradicts it.
    """
    is_tiff = path.suffix.lower() in TIFF_SUFFIXES
    if not is_tiff and path.suffix != ".zarr":
        raise VolumeError(f"{path} is no possible output; give a path that ends in .zarr, or in .tif for a TIFF stack.")
    if target_format is None:
        return "tiff" if is_tiff else own_format(like)
    if target_format not in get_args(TargetFormat):
        raise VolumeError(f"output format {target_format!r} is unknown; choose one of {', '.join(get_args(TargetFormat))}.")
    if is_tiff != (target_format == "tiff"):
        wanted = ".tif" if target_format == "tiff" else ".zarr"
        raise VolumeError(f"output {path} cannot be {target_format}; give a path that ends in {wanted}, or another format.")
    return target_format


def target_layout(like: Layout, target_format: TargetFormat | None) -> Layout:
    """The layout of an output in a format; None: of the source's own version, as a label of it has."""
    levels = target_levels(like)
    match target_format or own_format(like):
        case "ome-zarr-0.4":
            levels = tuple(replace(level, shard_shape=None) for level in levels)  # Zarr v2 has none
            return Layout(levels=levels, units=like.units, version="0.4", zarr_format=2)
        case "ome-zarr-0.5":
            return Layout(levels=levels, units=like.units)
        case "zarr":
            return Layout(levels=levels[:1], units=like.units)
        case "tiff":
            level = replace(levels[0], chunk_shape=TIFF_CHUNK_SHAPE, shard_shape=None)
            return Layout(levels=(level,), units=like.units)


def target_levels(layout: Layout) -> tuple[Level, ...]:
    """The levels of an OME-Zarr output like a source: its shapes and transforms, and chunks that suit viewing in all planes.

    A level keeps its source's chunks and shards unless a chunk is longer than 256 voxels along an axis, or shorter than 16
    where the volume is longer, as pages are: a view across those decodes far more than it shows. Such a level gets chunks
    of 64 x 64 x 64, and keeps its shards if they are whole multiples of them.
    """
    return tuple(level if _suits_viewing(level) else _recut(level) for level in layout.levels)


def _suits_viewing(level: Level) -> bool:
    sizes = zip(level.chunk_shape, level.shape, strict=True)
    return all(min(chunk, n) <= _LONGEST and (chunk >= _SHORTEST or chunk >= n) for chunk, n in sizes)


def _recut(level: Level) -> Level:
    shard = level.shard_shape
    keeps_shard = shard is not None and not any(n % m for n, m in zip(shard, TARGET_CHUNK_SHAPE, strict=True))
    return replace(level, chunk_shape=TARGET_CHUNK_SHAPE, shard_shape=shard if keeps_shard else None)


def own_format(like: Layout) -> TargetFormat:
    """OME-Zarr of the version of a source, 0.5 for a source that is none."""
    return "ome-zarr-0.4" if like.version == "0.4" else "ome-zarr-0.5"
