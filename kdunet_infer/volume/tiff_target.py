"""Writes a finished volume as one TIFF: OME-XML, tiled, zlib, big where it must be. Knows pages and metadata; no Zarr.

OME-XML is what Fiji (Bio-Formats) and tifffile both take voxel sizes from, in their unit and per axis, in big files too;
ImageJ's own metadata know neither tiles nor BigTIFF.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import tifffile

from kdunet_infer.blockwise import UInt8Array
from kdunet_infer.geometry import Box
from kdunet_infer.volume.ome import Layout, Level, Units

_SOFTWARE = "kdunet"
_TILE = 256
"""Pixels along y and x."""
_SLAB_BYTES = 256 * 2**20
"""Of the pages that are read at a time, unless a single page is larger."""
_CLASSIC_BYTES = 2**32 - 2**26
"""Offsets in a classic TIFF have 32 bits; how well the voxels compress is not known beforehand."""
_UNITS = {
    "angstrom": "Å",
    "picometer": "pm",
    "nanometer": "nm",
    "micrometer": "µm",
    "millimeter": "mm",
    "centimeter": "cm",
    "meter": "m",
    "inch": "in",
}
"""OME-Zarr's names to OME-XML's."""


def write_tiff(
    path: Path, beside: Path, read: Callable[[Box], UInt8Array], layout: Layout, *, name: str, about: Mapping[str, Any]
) -> None:
    """Write the finest level that `read` reads, (z, y, x) uint8, to `path` by way of the file `beside`: all of it or nothing.

    Voxel size, translation and units go into the OME-XML, `about` (JSON) into its description, where `told_to` finds it.
    Memory: the pages of one chunk's depth, 256 MiB of them at most. Raises OSError where the disk refuses.
    """
    level = layout.levels[0]
    try:
        with tifffile.TiffWriter(beside, bigtiff=Box.of_shape(level.shape).n_voxels > _CLASSIC_BYTES, ome=True) as tiff:
            tiff.write(
                _tiles(read, level),
                shape=level.shape,
                dtype="uint8",
                tile=(_TILE, _TILE),
                compression="zlib",
                photometric="minisblack",
                software=_SOFTWARE,
                metadata=_metadata(level, layout.units, name, about),
            )
        _flush(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def told_to(path: Path) -> dict[str, Any]:
    """The `about` of a TIFF that `write_tiff` wrote and nobody has saved anew; empty for any other file."""
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            description = tifffile.xml2dict(page.description)["OME"]["Image"]["Description"]
            return dict(json.loads(description)) if page.software == _SOFTWARE else {}
    except Exception:  # anything else has other tags, other XML or none, in any mixture
        return {}


def _tiles(read: Callable[[Box], UInt8Array], level: Level) -> Iterator[UInt8Array]:
    """The tiles of all pages, row by row."""
    _, y, x = level.shape
    depth = max(1, min(level.chunk_shape[0], _SLAB_BYTES // (y * x)))
    for slab in Box.of_shape(level.shape).split((depth, y, x)):
        for page in read(slab):
            for row in range(0, y, _TILE):
                for column in range(0, x, _TILE):
                    yield page[row : row + _TILE, column : column + _TILE]


def _metadata(level: Level, units: Units, name: str, about: Mapping[str, Any]) -> dict[str, Any]:
    described = json.dumps(about)
    metadata: dict[str, Any] = {
        "axes": "ZYX",
        "Name": name,
        "Creator": _SOFTWARE,
        "Description": described,
        "UUID": str(uuid5(NAMESPACE_URL, f"{name} {described}")),  # the same run gives the same bytes
    }
    if units == (None, None, None) and level.scale == (1.0, 1.0, 1.0) and not any(level.translation):
        return metadata
    for axis, size, unit in zip("ZYX", level.scale, units, strict=True):
        metadata |= {f"PhysicalSize{axis}": size, f"PhysicalSize{axis}Unit": _unit(unit)}
    if any(level.translation):
        metadata["Plane"] = _positions(level, units)
    return metadata


def _positions(level: Level, units: Units) -> dict[str, list[Any]]:
    n_planes = level.shape[0]
    z, y, x = level.translation
    found: dict[str, list[Any]] = {
        "PositionX": [x] * n_planes,
        "PositionY": [y] * n_planes,
        "PositionZ": [z + plane * level.scale[0] for plane in range(n_planes)],
    }
    return found | {f"Position{axis}Unit": [_unit(unit)] * n_planes for axis, unit in zip("ZYX", units, strict=True)}


def _unit(unit: str | None) -> str:
    """OME-XML's name; lengths without a unit, or with one that it lacks, are in its `reference frame`."""
    return _UNITS.get(unit or "", "reference frame")


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
