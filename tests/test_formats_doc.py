"""What other programs write is read, and what is written is read by other programs: the tables of docs/formats.md.

A row of the tables is a record here, and a record is a test; docs/formats.md says no more than what was tried.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import dask.array
import h5py
import imagecodecs
import mrcfile
import numpy as np
import numpy.typing as npt
import pytest
import skimage.io
import tifffile
import zarr
from generated import assert_documented, table
from ome_zarr.io import parse_url
from ome_zarr.reader import Label, Node, Reader
from PIL import Image
from test_volume_targets import MASK, finished_label, three_levels, validated, write_all
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ZstdCodec
from zarr.storage import ZipStore

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of its own classes, as it is imported
    import ome_zarr.format
    import ome_zarr.writer

from kdunet_infer.geometry import Box
from kdunet_infer.testing import noise
from kdunet_infer.volume import TargetFormat, create_image, open_source

Array = npt.NDArray[Any]
Write = Callable[[Array, Path], Path]
SHAPE = (6, 20, 18)
SIZE_NM = (40.0, 4.0, 5.0)
INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
NUMBERS = (*INTEGERS, "float16", "float32", "float64")


def grey_values(dtype: str) -> Array:
    """Voxels (z, y, x) that use the range of small types."""
    return (noise(SHAPE).astype("float64") - (100 if np.dtype(dtype).kind != "u" else 0)).astype(dtype)


# --- read


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """One row: a format as one program writes it."""

    path: str
    """How it is given on the command line."""
    writer: str
    variants: Mapping[str, Write]
    dtypes: tuple[str, ...] = NUMBERS
    voxel_size: str | None = None
    """Where it is found; every variant says that it is SIZE_NM."""


def _ome_zarr(version: str) -> Mapping[str, Write]:
    made = getattr(ome_zarr.format, f"FormatV{version.replace('.', '')}")()

    def write(voxels: Array, folder: Path, axes: str = "zyx", **options: Any) -> Path:
        lead = "tczyx"[: len(axes) - 3] if axes == "tczyx" else axes[:-3]
        scale = {**dict.fromkeys(lead, 1.0), **dict(zip("zyx", SIZE_NM, strict=True))}
        with warnings.catch_warnings(action="ignore"):
            ome_zarr.writer.write_image(
                voxels.reshape((1,) * len(lead) + voxels.shape),
                str(folder / "v.zarr"),
                scale_factors=[2],
                method=ome_zarr.scale.Methods.NEAREST,
                fmt=made,
                axes=axes,
                scale=scale,
                axes_units=dict.fromkeys("zyx", "nanometer"),
                storage_options={"chunks": (1,) * len(lead) + (4, 8, 8), **options},
            )
        return folder / "v.zarr"

    found: dict[str, Write] = {
        "axes zyx": write,
        "czyx": lambda v, p: write(v, p, "czyx"),
        "tczyx": lambda v, p: write(v, p, "tczyx"),
        "a level alone": lambda v, p: write(v, p) / "s0",
    }
    if version == "0.5":
        found["shards"] = lambda v, p: write(v, p, shards=(8, 16, 16))
    return found


def _zarr(**options: Any) -> Write:
    def write(voxels: Array, folder: Path) -> Path:
        zarr.create_array(str(folder / "v.zarr"), data=voxels, chunks=(4, 8, 8), **options)
        return folder / "v.zarr"

    return write


def _zip(zarr_format: Any) -> Write:
    def write(voxels: Array, folder: Path) -> Path:
        store = ZipStore(folder / "v.zip", mode="w")
        zarr.create_array(store, data=voxels, chunks=(4, 8, 8), zarr_format=zarr_format)
        store.close()
        return folder / "v.zip"

    return write


def _tiff(**options: Any) -> Write:
    def write(voxels: Array, folder: Path) -> Path:
        tifffile.imwrite(folder / "v.tif", voxels, **{"photometric": "minisblack", **options})
        return folder / "v.tif"

    return write


def _pillow_tiff(compression: str | None) -> Write:
    def write(voxels: Array, folder: Path) -> Path:
        first, *others = [Image.fromarray(plane) for plane in voxels]
        first.save(folder / "v.tif", save_all=True, append_images=others, compression=compression)
        return folder / "v.tif"

    return write


def _slices(write_one: Callable[[Path, Array], object], suffix: str) -> Write:
    def write(voxels: Array, folder: Path) -> Path:
        (folder / "slices").mkdir()
        for z, plane in enumerate(voxels, start=8):
            write_one(folder / "slices" / f"em_{z}{suffix}", plane)
        return folder / "slices"

    return write


def _hdf5(**options: Any) -> Write:
    def write(voxels: Array, folder: Path) -> Path:
        with h5py.File(folder / "v.h5", "w") as file:
            data = file.create_dataset("volumes/raw", data=voxels, **options)
            data.attrs["element_size_um"] = [nm / 1000 for nm in SIZE_NM]
        return Path(f"{folder / 'v.h5'}:/volumes/raw")

    return write


def _mrc(voxels: Array, folder: Path, suffix: str = ".mrc", **options: Any) -> Path:
    with mrcfile.new(folder / f"v{suffix}", **options) as file:
        file.set_data(voxels)
        file.voxel_size = tuple(nm * 10 for nm in SIZE_NM[::-1])
    return folder / f"v{suffix}"


_IMAGEJ = {
    "imagej": True,
    "resolution": (1 / SIZE_NM[2], 1 / SIZE_NM[1]),
    "metadata": {"axes": "ZYX", "spacing": SIZE_NM[0], "unit": "nm"},
}
_OME = {f"PhysicalSize{axis}": nm for axis, nm in zip("ZYX", SIZE_NM, strict=True)} | {
    f"PhysicalSize{axis}Unit": "nm" for axis in "ZYX"
}
_PACKED = {"tile": (16, 16), "compression": "zlib", "predictor": True}

READ: dict[str, Read] = {
    "OME-Zarr 0.4": Read(
        path="volume.zarr",
        writer="ome-zarr",
        variants=_ome_zarr("0.4"),
        dtypes=("uint8", "uint16", "int16", "float32"),
        voxel_size="scale and unit, of every level",
    ),
    "OME-Zarr 0.5": Read(
        path="volume.zarr",
        writer="ome-zarr",
        variants=_ome_zarr("0.5"),
        dtypes=("uint8", "uint16", "int16", "float32"),
        voxel_size="scale and unit, of every level",
    ),
    "Zarr v2": Read(
        path="array.zarr",
        writer="zarr",
        variants={
            "zstd": _zarr(zarr_format=2),
            "gzip": _zarr(zarr_format=2, compressors={"id": "gzip"}),
            "blosc": _zarr(zarr_format=2, compressors={"id": "blosc"}),
            "raw": _zarr(zarr_format=2, compressors=None),
            "Fortran order": _zarr(zarr_format=2, order="F"),
            "keys with /": _zarr(zarr_format=2, chunk_key_encoding={"name": "v2", "separator": "/"}),
        },
    ),
    "Zarr v3": Read(
        path="array.zarr",
        writer="zarr",
        variants={
            "zstd": _zarr(),
            "gzip": _zarr(compressors=GzipCodec()),
            "blosc": _zarr(compressors=BloscCodec()),
            "raw": _zarr(compressors=None),
            "checksums": _zarr(compressors=[ZstdCodec(), Crc32cCodec()]),
            "shards": _zarr(shards=(8, 16, 16)),
            "big endian": _zarr(serializer=BytesCodec(endian="big")),
        },
        dtypes=NUMBERS,
    ),
    "Zarr in a zip file": Read(path="array.zip", writer="zarr", variants={"v2": _zip(2), "v3": _zip(3)}),
    "TIFF": Read(
        path="stack.tif",
        writer="tifffile",
        variants={
            "classic": _tiff(),
            "BigTIFF": _tiff(bigtiff=True),
            "big endian": _tiff(byteorder=">"),
            "zlib": _tiff(compression="zlib"),
            "LZW": _tiff(compression="lzw"),
            "zstd": _tiff(compression="zstd"),
            "tiles": _tiff(tile=(16, 16)),
            "strips": _tiff(rowsperstrip=7, compression="zlib"),
        },
    ),
    "TIFF of ImageJ": Read(
        path="stack.tif",
        writer="tifffile",
        variants={"hyperstack": _tiff(**_IMAGEJ)},
        dtypes=("uint8", "uint16", "float32"),
        voxel_size="resolution, spacing and unit",
    ),
    "OME-TIFF": Read(
        path="stack.ome.tif",
        writer="tifffile",
        variants={
            "pages": _tiff(ome=True, metadata={"axes": "ZYX", **_OME}),
            "tiles, zlib, predictor": _tiff(ome=True, metadata={"axes": "ZYX", **_OME}, **_PACKED),
            "BigTIFF": _tiff(ome=True, bigtiff=True, metadata={"axes": "ZYX", **_OME}),
        },
        dtypes=("uint8", "uint16", "int16", "uint32"),
        voxel_size="PhysicalSize and its unit",
    ),
    "TIFF of Pillow": Read(
        path="stack.tif",
        writer="Pillow",
        variants={"raw": _pillow_tiff(None), "LZW": _pillow_tiff("tiff_lzw"), "zlib": _pillow_tiff("tiff_adobe_deflate")},
        dtypes=("uint8", "uint16", "float32"),
    ),
    "Folder of TIFF slices": Read(
        path="slices/",
        writer="tifffile, Pillow",
        variants={
            "tifffile": _slices(tifffile.imwrite, ".tif"),
            "Pillow": _slices(lambda path, plane: Image.fromarray(plane).save(path), ".tiff"),
        },
        dtypes=("uint8", "uint16", "float32"),
    ),
    "Folder of PNG slices": Read(
        path="slices/",
        writer="Pillow, imagecodecs",
        variants={
            "Pillow": _slices(lambda path, plane: Image.fromarray(plane).save(path), ".png"),
            "imagecodecs": _slices(lambda path, plane: path.write_bytes(imagecodecs.png_encode(plane)), ".png"),
        },
        dtypes=("uint8", "uint16"),
    ),
    "HDF5": Read(
        path="file.h5:/volumes/raw",
        writer="h5py",
        variants={
            "contiguous": _hdf5(),
            "gzip, shuffle": _hdf5(chunks=(4, 8, 8), compression="gzip", shuffle=True),
            "lzf": _hdf5(chunks=(4, 8, 8), compression="lzf"),
            "checksums": _hdf5(chunks=(4, 8, 8), fletcher32=True),
        },
        voxel_size="element_size_um, as Fiji writes it",
    ),
    "MRC": Read(
        path="volume.mrc, .rec, .st, .ali, .map",
        writer="mrcfile",
        variants={"mrc": _mrc, "rec": lambda v, p: _mrc(v, p, ".rec"), "map": lambda v, p: _mrc(v, p, ".map")},
        dtypes=("int8", "int16", "uint16", "float16", "float32"),
        voxel_size="cell and sampling",
    ),
}


@pytest.mark.parametrize(
    ("name", "variant"),
    [pytest.param(name, variant, id=f"{name}-{variant}") for name, row in READ.items() for variant in row.variants],
)
def test_what_others_write_is_read(tmp_path: Path, name: str, variant: str) -> None:
    row = READ[name]
    for dtype in row.dtypes:
        voxels = grey_values(dtype)
        (tmp_path / dtype).mkdir()
        source = open_source(row.variants[variant](voxels, tmp_path / dtype))
        assert source.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(source.read(Box.of_shape(SHAPE)), voxels)
        assert source.voxel_size_nm == (SIZE_NM if row.voxel_size else None)


# --- written


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One row: an output, and what other programs find in it."""

    write: Callable[[Path], Path]
    """Writes MASK, of voxels of SCALES nm; returns what is opened."""
    option: str
    readers: Mapping[str, Callable[[Path], None]]


def _label(version: Any, **options: Any) -> Callable[[Path], Path]:
    return lambda folder: finished_label(open_source(three_levels(folder / "v.zarr", version, **options)))


def _output(target_format: TargetFormat, name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        source = open_source(three_levels(folder / "v.zarr"))
        target = create_image(folder / name, like=source, content="mask", target_format=target_format)
        write_all(target)
        target.finish({})
        return target.path

    return write


def _node(path: Path) -> Node:
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        location = parse_url(str(path))
        assert location is not None
        (node,) = [node for node in Reader(location)() if node.data and node.zarr.basename() == path.name]
    return node


def _by_ome_zarr(path: Path) -> None:
    node = _node(path)
    assert any(isinstance(spec, Label) for spec in node.specs)
    np.testing.assert_array_equal(np.asarray(node.data[0]), MASK)
    steps = node.metadata["coordinateTransformations"]
    assert [level[0]["scale"] for level in steps] == [[40, 4, 4], [80, 8, 8], [160, 16, 16]]
    assert [level[1]["translation"] for level in steps] == [[7, 100, -3], [27, 102, -1], [67, 106, 3]]
    assert [axis["unit"] for axis in node.metadata["axes"]] == ["nanometer"] * 3


def _by_ome_zarr_from_the_image(path: Path) -> None:
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        location = parse_url(str(path.parent.parent))
        assert location is not None
        names = [node.zarr.basename() for node in Reader(location)() if node.data]
    assert names == ["v.zarr", path.name]
    _by_ome_zarr(path)


def _by_ome_zarr_models(path: Path) -> None:
    validated(path)


def _by_ome_zarr_models_from_the_image(path: Path) -> None:
    assert validated(path.parent.parent) == [path.name]


def _by_zarr(path: Path) -> None:
    node = zarr.open(str(path), mode="r")
    array = node["0"] if isinstance(node, zarr.Group) else node
    np.testing.assert_array_equal(cast("Any", array)[...], MASK)


def _by_dask(path: Path) -> None:
    inside = path / "0" if (path / "0").is_dir() else path
    np.testing.assert_array_equal(dask.array.from_zarr(str(inside)).compute(), MASK)


def _by_tifffile(path: Path) -> None:
    np.testing.assert_array_equal(tifffile.imread(path), MASK)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.series[0].axes == "ZYX"
        pixels = ElementTree.fromstring(cast("str", tiff.ome_metadata)).find(".//{*}Pixels")
    assert pixels is not None
    assert [float(pixels.attrib[f"PhysicalSize{axis}"]) for axis in "ZYX"] == [40, 4, 4]
    assert [pixels.attrib[f"PhysicalSize{axis}Unit"] for axis in "ZYX"] == ["nm"] * 3


def _by_pillow(path: Path) -> None:
    with Image.open(path) as image:
        for z, plane in enumerate(MASK):
            image.seek(z)
            np.testing.assert_array_equal(np.asarray(image), plane)


def _by_scikit_image(path: Path) -> None:
    np.testing.assert_array_equal(skimage.io.imread(path), MASK)


_OME_READERS: Mapping[str, Callable[[Path], None]] = {
    "ome-zarr: voxels, three levels with their scale, translation and units": _by_ome_zarr,
    "ome-zarr-models: valid": _by_ome_zarr_models,
    "zarr: voxels": _by_zarr,
    "dask: voxels": _by_dask,
}
_LABEL_READERS: Mapping[str, Callable[[Path], None]] = {
    "ome-zarr: found from its image, voxels, three levels with their scale, translation and units": _by_ome_zarr_from_the_image,
    "ome-zarr-models: valid, and listed by its image": _by_ome_zarr_models_from_the_image,
    "zarr: voxels": _by_zarr,
    "dask: voxels": _by_dask,
}
WRITTEN: dict[str, Written] = {
    "label in OME-Zarr 0.4": Written(write=_label("0.4"), option="by default", readers=_LABEL_READERS),
    "label in OME-Zarr 0.5": Written(write=_label("0.5"), option="by default", readers=_LABEL_READERS),
    "label in OME-Zarr 0.5 with shards": Written(
        write=_label("0.5", shard=(16, 32, 32)), option="by default", readers=_LABEL_READERS
    ),
    "OME-Zarr 0.5": Written(
        write=_output("ome-zarr-0.5", "out.zarr"), option="-o out.zarr --format ome-zarr-0.5", readers=_OME_READERS
    ),
    "OME-Zarr 0.4": Written(
        write=_output("ome-zarr-0.4", "out.zarr"), option="-o out.zarr --format ome-zarr-0.4", readers=_OME_READERS
    ),
    "Zarr v3 array": Written(
        write=_output("zarr", "out.zarr"),
        option="-o out.zarr --format zarr",
        readers={"zarr: voxels": _by_zarr, "dask: voxels": _by_dask},
    ),
    "TIFF": Written(
        write=_output("tiff", "out.tif"),
        option="-o out.tif",
        readers={
            "tifffile: voxels, axes, voxel size": _by_tifffile,
            "Pillow (libtiff): voxels": _by_pillow,
            "scikit-image: voxels": _by_scikit_image,
        },
    ),
}


@pytest.mark.parametrize(
    ("name", "reader"),
    [pytest.param(name, reader, id=f"{name}-{reader}") for name, row in WRITTEN.items() for reader in row.readers],
)
def test_what_is_written_is_read_by_others(tmp_path: Path, name: str, reader: str) -> None:
    WRITTEN[name].readers[reader](WRITTEN[name].write(tmp_path))


@pytest.mark.parametrize("name", WRITTEN)
def test_a_reader_tells_a_wrong_voxel(tmp_path: Path, name: str) -> None:
    path = WRITTEN[name].write(tmp_path)
    if path.is_dir():
        node = zarr.open(str(path), mode="r+")
        array = cast("Any", node["0"] if isinstance(node, zarr.Group) else node)
        array[0, 0, 0] = 1 - array[0, 0, 0]
    else:
        tifffile.imwrite(path, 1 - MASK)
    for reader, check in WRITTEN[name].readers.items():
        if "voxels" in reader:
            with pytest.raises(AssertionError):
                check(path)


# --- the page


def test_the_tables_are_those_of_these_tests() -> None:
    read = (
        (name, f"`{row.path}`", row.writer, ", ".join(row.variants), _shortened(row.dtypes), row.voxel_size or "`--voxel-size`")
        for name, row in READ.items()
    )
    head = ("Format", "Given as", "Written by", "Variants", "Voxels", "Voxel size from")
    assert_documented("formats.md", "what was read", table(head, read))
    written = ((name, f"`{row.option}`", "; ".join(row.readers)) for name, row in WRITTEN.items())
    assert_documented("formats.md", "what was written", table(("Output", "Option", "Read by"), written))


def _shortened(dtypes: tuple[str, ...]) -> str:
    words = {NUMBERS: "all integers, all floats", INTEGERS: "all integers"}
    return words.get(dtypes, ", ".join(dtypes))
