"""Volumes of every format to damage, and how: a case is a name, from which the same damage comes again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import tifffile
import zarr
from test_volume_readers import png_files, tiff_files, zipped
from volume_files import halved, write_image
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ZstdCodec

from kdunet_infer.testing import noise

SHAPE = (6, 20, 18)
CHUNK = (4, 8, 8)
VOXELS = noise(SHAPE)

_VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 3.5, 1e308, float("nan"), float("inf"), 2**31, 2**70),
    *("", "x", "\n", "\0", "😀", "../..", [], [1], ["z"] * 9, {}, {"a": 1}),
]
"""What a field of a document becomes: of another type, out of range, or no JSON that others write."""


@dataclass(frozen=True, slots=True)
class Specimen:
    """A whole volume that was written by another program, and which of its files say what, and which hold voxels."""

    path: Path
    documents: tuple[Path, ...] = ()
    """JSON."""
    heads: tuple[Path, ...] = ()
    """Binary files that say what they hold."""
    chunks: tuple[Path, ...] = ()
    """Files of voxels alone."""
    has_checksums: bool = False
    """Whether a changed byte of a voxel cannot go unnoticed by who reads it."""


def specimens(folder: Path) -> dict[str, Specimen]:
    """One of each kind, all of `VOXELS`; by name."""
    v05 = write_image(folder / "v05.zarr", [VOXELS, halved(VOXELS)], scales=[(40, 4, 4), (80, 8, 8)])
    v04 = write_image(folder / "v04.zarr", [VOXELS[None]], version="0.4", axes="czyx")
    sharded = write_image(folder / "sharded.zarr", [VOXELS], shard=(8, 16, 16))
    return {
        "ome-zarr-0.5": _zarr(v05, folder=v05 / "s0"),
        "ome-zarr-0.4": _zarr(v04, folder=v04 / "s0"),
        "sharded": _zarr(sharded, folder=sharded / "s0"),
        "checksums": _zarr(_array(folder / "checksums.zarr", 3, compressors=[ZstdCodec(), Crc32cCodec()]), has_checksums=True),
        "zarr-v2-gzip": _zarr(_array(folder / "gzip.zarr", 2, compressors={"id": "gzip"}), has_checksums=True),
        "zarr-v3-blosc": _zarr(_array(folder / "blosc.zarr", 3, compressors=BloscCodec())),
        "raw": _zarr(_array(folder / "raw.zarr", 3, compressors=None, serializer=BytesCodec())),
        "zip": _file(zipped(_array(folder / "zipped.zarr", 3), folder / "v.zip"), has_checksums=True),
        "tiff-imagej": _file(_tiff(folder / "imagej.tif", imagej=True)),
        "tiff-zlib": _file(_tiff(folder / "zlib.tif", compression="zlib", photometric="minisblack")),
        "tiff-tiled": _file(_tiff(folder / "ome.tif", ome=True, tile=(16, 16), compression="lzw", metadata={"axes": "ZYX"})),
        "tiff-folder": _files(tiff_files(VOXELS, folder / "tiffs")),
        "png-folder": _files(png_files(VOXELS, folder / "pngs"), has_checksums=True),
        "hdf5": _file(_hdf5(folder / "v.h5"), inside=":/raw"),
        "mrc": _file(_mrc(folder / "v.mrc")),
    }


def _zarr(path: Path, *, folder: Path | None = None, has_checksums: bool = False) -> Specimen:
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    documents = [file for file in files if file.suffix == ".json" or file.name.startswith(".z")]
    chunks = [file for file in files if file not in documents and file.is_relative_to(folder or path)]
    return Specimen(path, documents=tuple(documents), chunks=tuple(chunks), has_checksums=has_checksums)


def _file(path: Path, *, inside: str = "", has_checksums: bool = False) -> Specimen:
    return Specimen(Path(f"{path}{inside}"), heads=(path,), has_checksums=has_checksums)


def _files(folder: Path, *, has_checksums: bool = False) -> Specimen:
    return Specimen(folder, heads=tuple(sorted(folder.iterdir())), has_checksums=has_checksums)


def _array(path: Path, zarr_format: Any, **options: Any) -> Path:
    zarr.create_array(str(path), data=VOXELS, chunks=CHUNK, zarr_format=zarr_format, **options)
    return path


def _tiff(path: Path, **options: Any) -> Path:
    tifffile.imwrite(path, VOXELS, **options)
    return path


def _hdf5(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("raw", data=VOXELS, chunks=CHUNK, compression="gzip", fletcher32=True)
    return path


def _mrc(path: Path) -> Path:
    with mrcfile.new(path) as file:
        file.set_data(VOXELS.view(np.int8))
    return path


# --- damage: each takes the bytes of a file and says what it did


@dataclass(frozen=True, slots=True)
class Damage:
    content: bytes | None
    """Of the file now; None: it is gone."""
    said: str


def document_damage(content: bytes, rng: random.Random) -> Damage:
    """A JSON document with a field that is gone, doubled or of another value; or one that is no JSON any more."""
    document = json.loads(content)
    places = [place for place in _places(document) if place]
    if not places or rng.random() < 0.15:
        return bytes_damage(content, rng)
    *way, last = rng.choice(places)
    parent = document
    for key in way:
        parent = parent[key]
    name = ".".join(map(str, (*way, last)))
    match rng.choice(["remove", "replace", "replace", "double"]):
        case "remove":
            del parent[last]
            return Damage(json.dumps(document).encode(), f"removed {name}")
        case "replace":
            parent[last] = rng.choice(_VALUES)
        case "double":
            parent[last] = [parent[last]] * 2
    return Damage(json.dumps(document).encode(), f"{name} = {parent[last]!r}")


def _places(node: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield before
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield from _places(node[key], (*before, key))


def bytes_damage(content: bytes, rng: random.Random) -> Damage:
    """Bytes that are others, most of them in the head, or that are not there any more."""
    if rng.random() < 0.25:
        n_left = rng.randrange(len(content))
        return Damage(content[:n_left], f"cut to {n_left} of {len(content)} bytes")
    damaged = bytearray(content)
    places = [rng.randrange(rng.choice([len(content), min(600, len(content))])) for _ in range(rng.randint(1, 5))]
    for place in places:
        damaged[place] = rng.choice([0, 255, rng.randrange(256), damaged[place] ^ 1 << rng.randrange(8)])
    return Damage(bytes(damaged), f"bytes {places} changed")


def chunk_damage(content: bytes, rng: random.Random) -> Damage:
    """As `bytes_damage`, and files that are gone, empty, too long or full of zeros, as disks leave them."""
    match rng.randrange(10):
        case 0:
            return Damage(None, "removed")
        case 1:
            return Damage(b"", "emptied")
        case 2:
            return Damage(content + rng.randbytes(rng.randint(1, 99)), "made longer")
        case 3:
            begin = rng.randrange(len(content))
            return Damage(content[:begin] + bytes(len(content) - begin), f"zeros from {begin} on")
    return bytes_damage(content, rng)


@contextmanager
def damaged(file: Path, how: Callable[[bytes, random.Random], Damage], rng: random.Random) -> Iterator[str]:
    """A file damaged for a while; gives what was done to it."""
    content = file.read_bytes()
    damage = how(content, rng)
    try:
        if damage.content is None:
            file.unlink()
        else:
            file.write_bytes(damage.content)
        yield f"{file}: {damage.said}"
    finally:
        file.write_bytes(content)
