"""Reading what is neither a folder of Zarr nor a TIFF: zip, slices in files, HDF5, MRC; each written by its own library."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import imagecodecs
import mrcfile
import numpy as np
import pytest
import tifffile
import zarr
from test_layering import importers
from test_volume_sources import SHAPE, WHOLE, VolumeContract
from volume_files import CHUNK, write_image
from zarr.storage import ZipStore

from kdunet_infer.blockwise import Source, UInt8Array
from kdunet_infer.errors import CorruptChunk, VolumeError, VolumeNotFound
from kdunet_infer.geometry import Box
from kdunet_infer.testing import noise
from kdunet_infer.volume import Selection, open_labels, open_source

VOXELS = noise(SHAPE)
NUMBERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64"]


def zipped(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for part in sorted(folder.rglob("*")):
            if part.is_file():
                file.write(part, prefix + part.relative_to(folder).as_posix())
    return path


def png_files(voxels: Any, folder: Path, names: str = "slice{}.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for z, plane in enumerate(voxels):
        (folder / names.format(z)).write_bytes(imagecodecs.png_encode(plane))
    return folder


def tiff_files(voxels: Any, folder: Path, names: str = "s_{:03}.tif", **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for z, plane in enumerate(voxels):
        tifffile.imwrite(folder / names.format(z), plane, photometric="minisblack", **options)
    return folder


def hdf5(voxels: Any, path: Path, name: str = "volumes/raw", **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset(name, data=voxels, **options)
    return Path(f"{path}:/{name}")


def mrc(voxels: Any, path: Path, voxel_size: Any = None) -> Path:
    with mrcfile.new(path) as file:
        file.set_data(voxels)
        if voxel_size:
            file.voxel_size = voxel_size
    return path


class TestZippedOmeZarr(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        return open_source(zipped(write_image(folder / "v.zarr", [voxels]), folder / "v.zarr.zip"))


class TestZipWrittenByZarr(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        store = ZipStore(folder / "v.zip", mode="w")
        zarr.create_array(store, data=voxels, chunks=CHUNK, zarr_format=2)
        store.close()
        return open_source(folder / "v.zip")


class TestFolderOfTiff(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        return open_source(tiff_files(voxels, folder / "stack"))


class TestFolderOfCompressedTiff(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        return open_source(tiff_files(voxels, folder / "stack", compression="zlib"))


class TestFolderOfPng(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        return open_source(png_files(voxels, folder / "stack"))


class TestHdf5(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        return open_source(hdf5(voxels, folder / "v.h5"))


class TestHdf5Compressed(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        chunks = tuple(map(min, voxels.shape, CHUNK))
        return open_source(hdf5(voxels, folder / "v.hdf5", chunks=chunks, compression="gzip", shuffle=True))


class TestMrc(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        # mrcfile writes no uint8 without widening it, IMOD does: mode 0 and its stamp without the flag for signed
        return open_source(imod(mrc(voxels.view(np.int8), folder / "v.mrc"), flags=0))


def imod(path: Path, *, flags: int) -> Path:
    head = bytearray(path.read_bytes())
    head[152:160] = struct.pack("<ii", 1146047817, flags)
    path.write_bytes(head)
    return path


# --- dtypes: whatever was stored comes back, in the byte order of this machine


def as_zarr_v2(voxels: Any, folder: Path) -> Path:
    zarr.create_array(str(folder / "v2.zarr"), data=voxels, chunks=CHUNK, zarr_format=2)
    return folder / "v2.zarr"


def as_zarr_v3(voxels: Any, folder: Path) -> Path:
    zarr.create_array(str(folder / "v3.zarr"), data=voxels, chunks=CHUNK)
    return folder / "v3.zarr"


def as_tiff(voxels: Any, folder: Path) -> Path:
    tifffile.imwrite(
        folder / "v.tif", voxels, photometric="minisblack", byteorder=">" if voxels.dtype.byteorder == ">" else "<"
    )
    return folder / "v.tif"


def as_bigtiff(voxels: Any, folder: Path) -> Path:
    tifffile.imwrite(folder / "big.tif", voxels, photometric="minisblack", bigtiff=True, compression="zlib", tile=(16, 16))
    return folder / "big.tif"


def as_hdf5(voxels: Any, folder: Path) -> Path:
    return hdf5(voxels, folder / "v.h5")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("write", [as_zarr_v2, as_zarr_v3, as_tiff, as_bigtiff, as_hdf5])
def test_every_number_comes_back(tmp_path: Path, write: Callable[[Any, Path], Path], dtype: str, order: str) -> None:
    voxels = (VOXELS.astype("float64") - 100).astype(np.dtype(dtype)).astype(np.dtype(dtype).newbyteorder(order))
    source = open_source(write(voxels, tmp_path))
    assert source.dtype == np.dtype(dtype)
    assert source.dtype.isnative
    for found in (source.read(WHOLE), source.read_box(WHOLE.grown((1, 2, 3)))[1:-1, 2:-2, 3:-3]):
        assert found.dtype == np.dtype(dtype)
        assert found.dtype.isnative
        np.testing.assert_array_equal(found, voxels)


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", "float16", "float32", ">i2", ">f4"])
def test_mrc_modes(tmp_path: Path, dtype: str) -> None:
    voxels = (VOXELS.astype("float64") - 100).astype(dtype)
    source = open_source(mrc(voxels, tmp_path / "v.mrc"))
    assert source.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(source.read(WHOLE), voxels)


def test_mrc_bytes_are_signed_unless_imod_wrote_them_unsigned(tmp_path: Path) -> None:
    path = mrc(VOXELS.view(np.int8), tmp_path / "v.mrc")
    assert open_source(path).dtype == np.int8
    assert open_source(imod(path, flags=1)).dtype == np.int8
    assert open_source(imod(path, flags=0)).dtype == np.uint8


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_png_slices(tmp_path: Path, dtype: str) -> None:
    voxels = VOXELS.astype(dtype) * np.dtype(dtype).type(1 if dtype == "uint8" else 257)
    source = open_source(png_files(voxels, tmp_path))
    assert source.dtype == dtype
    np.testing.assert_array_equal(source.read(WHOLE), voxels)


def test_a_png_file_is_one_slice(tmp_path: Path) -> None:
    png_files(VOXELS[:1], tmp_path)
    source = open_source(tmp_path / "slice0.png")
    assert source.shape == (1, 20, 18)
    np.testing.assert_array_equal(source.read(Box((0, 3, 2), (1, 9, 18))), VOXELS[:1, 3:9, 2:])


@pytest.mark.parametrize("write", [as_zarr_v3, as_hdf5])
def test_bool_is_a_mask(tmp_path: Path, write: Callable[[Any, Path], Path]) -> None:
    path = write(VOXELS > 99, tmp_path)
    np.testing.assert_array_equal(open_labels(path).read(WHOLE), VOXELS > 99)
    with pytest.raises(VolumeError, match="holds bool voxels, a mask and not an image; give the image itself"):
        open_source(path)


# --- axes and voxel sizes of each format


def test_hdf5_voxel_size_and_axes(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "v.h5", "w") as file:
        raw = file.create_dataset("raw", data=VOXELS.T)
        raw.attrs["element_size_um"] = [0.03, 0.004, 0.005]
        for dimension, name in zip(raw.dims, "xyz", strict=True):
            dimension.label = name
        file["odd"] = VOXELS
        file["odd"].attrs["element_size_um"] = "unknown"
    source = open_source(f"{tmp_path / 'v.h5'}:raw")
    assert source.voxel_size_nm == (30, 4, 5)
    assert source.level_voxel_sizes_nm == ((30, 4, 5),)
    assert (source.layout.levels[0].scale, source.layout.units) == ((30, 4, 5), ("nanometer",) * 3)
    assert source.layout.levels[0].chunk_shape == (64, 128, 128)
    np.testing.assert_array_equal(source.read(WHOLE), VOXELS)
    assert open_source(f"{tmp_path / 'v.h5'}:/odd/").voxel_size_nm is None


def test_mrc_voxel_size_is_in_angstrom(tmp_path: Path) -> None:
    assert open_source(mrc(VOXELS.view(np.int8), tmp_path / "v.mrc", (41, 42, 50))).voxel_size_nm == (5.0, 4.2, 4.1)
    assert open_source(mrc(VOXELS.view(np.int8), tmp_path / "no.mrc")).voxel_size_nm is None


def test_mrc_with_sections_along_another_axis(tmp_path: Path) -> None:
    path = mrc(np.ascontiguousarray(VOXELS.transpose(1, 0, 2)).view(np.int8), tmp_path / "v.mrc")
    with mrcfile.open(path, "r+") as file:  # columns are x, rows z, sections y
        file.header.mapc, file.header.mapr, file.header.maps = 1, 3, 2
    np.testing.assert_array_equal(open_source(path).read(WHOLE), VOXELS.view(np.int8))


def test_mrc_slice_and_stack_of_volumes(tmp_path: Path) -> None:
    assert open_source(mrc(VOXELS[0].view(np.int8), tmp_path / "one.mrc")).shape == (1, 20, 18)
    with mrcfile.new(tmp_path / "many.mrc") as file:
        file.set_data(np.stack([VOXELS, VOXELS // 2]).view(np.int8))
    np.testing.assert_array_equal(
        open_source(tmp_path / "many.mrc", Selection(timepoint=1)).read(WHOLE), (VOXELS // 2).view(np.int8)
    )


@pytest.mark.parametrize("name", ["v.zarr.zip", "v.ZIP"])
def test_a_zip_of_a_folder_by_name_and_what_is_in_it(tmp_path: Path, name: str) -> None:
    image = write_image(tmp_path / "v.zarr", [VOXELS, VOXELS[::2, ::2, ::2]], scales=[(5, 4, 4), (10, 8, 8)])
    zarr.create_group(str(image / "labels"), attributes={"ome": {"version": "0.5", "labels": ["mito"]}})
    write_image(image / "labels" / "mito", [VOXELS // 100], extra={"image-label": {}})
    path = zipped(image, tmp_path / name, prefix="v.zarr/")
    for inside in (path, path / "v.zarr", path / "v.zarr" / "s0"):
        source = open_source(inside)
        np.testing.assert_array_equal(source.read(WHOLE), VOXELS)
        assert source.group is None, "a zip file takes no labels"
        assert source.layout.levels[0].scale == (5, 4, 4)
    assert open_source(path, Selection(level=1)).shape == (3, 10, 9)
    np.testing.assert_array_equal(open_labels(path / "v.zarr" / "labels" / "mito").read(WHOLE), VOXELS // 100)


def test_a_zip_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    path = zipped(as_zarr_v3(VOXELS, tmp_path), tmp_path / "v.zip")
    assert open_source(path).shape == SHAPE
    path.unlink()
    zarr.create_array(str(tmp_path / "other.zarr"), data=VOXELS[:, :, :7], chunks=CHUNK)
    zipped(tmp_path / "other.zarr", path)
    assert open_source(path).shape == (6, 20, 7)


@pytest.mark.parametrize("make", [png_files, tiff_files])
def test_slices_are_in_natural_order(tmp_path: Path, make: Callable[..., Path]) -> None:
    voxels = noise((12, 5, 7))
    suffix = "png" if make is png_files else "TIF"
    folder = make(voxels, tmp_path / "v", names=f"em2024_{{}}_x4.{suffix}")
    (folder / "notes.txt").write_text("not a slice")
    (folder / ".hidden.png").write_text("not a slice")
    np.testing.assert_array_equal(open_source(folder).read(Box.of_shape((12, 5, 7))), voxels)


def test_slices_with_a_second_number_are_ordered_by_the_one_that_runs(tmp_path: Path) -> None:
    for z, time in enumerate((930, 1100, 945, 1015)):
        (tmp_path / f"t{time}_z{z + 7}.png").write_bytes(imagecodecs.png_encode(VOXELS[z]))
    np.testing.assert_array_equal(open_source(tmp_path).read(Box.of_shape((4, 20, 18))), VOXELS[:4])


def test_hdf5_is_read_from_many_threads(tmp_path: Path) -> None:
    source = open_source(hdf5(VOXELS, tmp_path / "v.h5", chunks=(1, 8, 8), compression="gzip"))
    boxes = [Box((z, y, 0), (z + 1, y + 5, 18)) for z in range(6) for y in range(15)] * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(source.read, boxes))
    for box, voxels in zip(boxes, found, strict=True):
        np.testing.assert_array_equal(voxels, VOXELS[box.slices_in(WHOLE)])


# --- what is refused, and how it is said


def _written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _cut(path: Path, keep: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def _without(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


def _two_arrays(folder: Path) -> Path:
    as_zarr_v2(VOXELS, folder)
    return as_zarr_v3(VOXELS, folder).parent


def _many_sets(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        for n in range(23):
            file[f"g/{n:02}"] = [1]
    return path


def _rgb_among(folder: Path) -> Path:
    png_files(VOXELS, folder)
    (folder / "slice3.png").write_bytes(imagecodecs.png_encode(np.zeros((20, 18, 3), np.uint8)))
    return folder


def _other_among(folder: Path, plane: Any) -> Path:
    tiff_files(VOXELS, folder)
    tifffile.imwrite(folder / "s_002.tif", plane, photometric="minisblack")
    return folder


def _mode(path: Path, mode: int) -> Path:
    content = bytearray(path.read_bytes())
    content[12:16] = struct.pack("<i", mode)
    return _written(path, bytes(content))


def _unknown_filter(path: Path) -> Path:
    """A chunk whose filter has the number of one that is not here: the same bytes, but for the number of gzip."""
    with h5py.File(path, "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((6, 20, 18))
        properties.set_filter(32999, h5py.h5z.FLAG_OPTIONAL, ())
        h5py.h5d.create(file.id, b"raw", h5py.h5t.STD_U8LE, h5py.h5s.create_simple(SHAPE), properties)
    return Path(f"{path}:/raw")


REFUSED: dict[str, tuple[Callable[[Path], Path], type[VolumeError], str]] = {
    "no-such-file": (lambda p: p / "x.h5:/raw", VolumeNotFound, r"nothing at .*x\.h5, or it may not be read"),
    "no-such-mrc": (lambda p: p / "x.mrc", VolumeNotFound, r"nothing at .*x\.mrc"),
    "hdf5-without-path": (
        lambda p: hdf5(VOXELS, p / "x.h5") and p / "x.h5",
        VolumeError,
        r"x\.h5 is given without the path of a data set; give one of: .*x\.h5:/volumes/raw\.$",
    ),
    "hdf5-wrong-path": (
        lambda p: Path(f"{hdf5(VOXELS, p / 'x.h5')}/no"),
        VolumeError,
        r"x\.h5 has no data set /volumes/raw/no; give one of: .*x\.h5:/volumes/raw\.$",
    ),
    "hdf5-group": (lambda p: hdf5(VOXELS, p / "x.h5").parent, VolumeError, r"has no data set /volumes; give one of: "),
    "hdf5-many": (lambda p: _many_sets(p / "x.h5"), VolumeError, r"x\.h5:/g/00, .*x\.h5:/g/19 and 3 more\.$"),
    "hdf5-none": (
        lambda p: h5py.File(p / "x.h5", "w").close() or p / "x.h5",
        VolumeError,
        r"give one of: none is in it\.$",
    ),
    "hdf5-text": (
        lambda p: _written(p / "x.h5", b"hello"),
        VolumeError,
        r"x\.h5 cannot be read as HDF5 \(OSError.*copy it again",
    ),
    "hdf5-cut": (
        lambda p: _cut(hdf5(VOXELS, p / "x.h5") and p / "x.h5", 0.5),
        VolumeError,
        r"cannot be read as HDF5 \(OSError: .*truncated file",
    ),
    "hdf5-words": (
        lambda p: hdf5(["a", "b"], p / "x.h5"),
        VolumeError,
        r"raw holds voxels of the type 'object', which are no grey values; save integers or floats",
    ),
    "hdf5-structs": (
        lambda p: hdf5(np.zeros((2, 2, 2), [("a", "u1"), ("b", "f4")]), p / "x.h5"),
        VolumeError,
        r"holds voxels of the type .*'a'.*, which are no grey values",
    ),
    "hdf5-complex": (
        lambda p: hdf5(VOXELS.astype("complex64"), p / "x.h5"),
        VolumeError,
        r"holds complex64 voxels, and grey values are real; save the magnitude",
    ),
    "hdf5-null": (lambda p: hdf5(h5py.Empty("u1"), p / "x.h5"), VolumeError, r"is a data set without voxels; give another"),
    "hdf5-scalar": (lambda p: hdf5(3, p / "x.h5"), VolumeError, r"has the shape \(\), not \(z, y, x\); give a stack"),
    "hdf5-filter": (
        lambda p: _unknown_filter(p / "x.h5"),
        VolumeError,
        r"x\.h5:/raw needs the HDF5 filter .*\(32999\), which is not known here; pack it anew with h5repack -f GZIP=1",
    ),
    "mrc-text": (
        lambda p: _written(p / "x.mrc", b"hello" * 999),
        VolumeError,
        r"x\.mrc cannot be read as MRC \(ValueError: Map ID.*copy it again",
    ),
    "mrc-cut": (
        lambda p: _cut(mrc(VOXELS.view(np.int8), p / "x.mrc"), 0.5),
        VolumeError,
        r"cannot be read as MRC \(ValueError: mmap length",
    ),
    "mrc-head": (lambda p: _cut(mrc(VOXELS.view(np.int8), p / "x.mrc"), 0.1), VolumeError, r"enough bytes for MRC header"),
    "mrc-mode": (
        lambda p: _mode(mrc(VOXELS.view(np.int8), p / "x.mrc"), 3),
        VolumeError,
        r"cannot be read as MRC \(ValueError: Unrecognised mode",
    ),
    "mrc-complex": (
        lambda p: mrc(VOXELS.astype("complex64"), p / "x.mrc"),
        VolumeError,
        r"holds complex64 voxels, and grey values are real",
    ),
    "zip-text": (
        lambda p: _written(p / "x.zip", b"hello"),
        VolumeError,
        r"x\.zip cannot be read as a zip file \(File is not a zip file\); copy it again",
    ),
    "zip-empty": (
        lambda p: zipped(p, p.parent / f"{p.name}.zip"),
        VolumeError,
        r"is a zip file and no Zarr array or group itself; give one that is in it: none\.$",
    ),
    "zip-two": (
        lambda p: zipped(_two_arrays(p / "in"), p / "x.zip"),
        VolumeError,
        r"give one that is in it: .*x\.zip/v2\.zarr, .*x\.zip/v3\.zarr\.$",
    ),
    "zip-nothing": (
        lambda p: zipped(as_zarr_v3(VOXELS, p), p / "x.zip") / "s7",
        VolumeNotFound,
        r"nothing at .*x\.zip/s7, or it may not be read",
    ),
    "gap": (
        lambda p: _without(png_files(VOXELS, p / "v"), "slice2.png", "slice4.png"),
        VolumeError,
        r"v has no slice 2 after slice1\.png; put it there, or number the slices without a gap",
    ),
    "numbered-twice": (
        lambda p: _written(png_files(VOXELS, p / "v") / "slice01.png", b"").parent,
        VolumeError,
        r"v has slices such as slice0\.png whose names do not number them; rename them",
    ),
    "unnumbered": (
        lambda p: _written(_written(p / "a.png", b"").parent / "b.png", b"").parent,
        VolumeError,
        r"has b\.png among slices named like a\.png; move one kind elsewhere",
    ),
    "two-kinds": (
        lambda p: _written(png_files(VOXELS, p / "v") / "preview.png", b"").parent,
        VolumeError,
        r"v has preview\.png among slices named like slice0\.png; move one kind elsewhere",
    ),
    "other-shape": (
        lambda p: _other_among(p / "v", np.zeros((20, 17), np.uint8)),
        VolumeError,
        r"s_002\.tif is 20 x 17 uint8 and s_000\.tif 20 x 18 uint8; a folder must hold slices of one size and type",
    ),
    "other-dtype": (
        lambda p: _other_among(p / "v", np.zeros((20, 18), np.uint16)),
        VolumeError,
        r"s_002\.tif is 20 x 18 uint16 and s_000\.tif 20 x 18 uint8",
    ),
    "several-in-one": (
        lambda p: _other_among(p / "v", np.zeros((2, 20, 18), np.uint8)),
        VolumeError,
        r"s_002\.tif holds 2 slices; a folder must hold one a file",
    ),
    "rgb-png": (lambda p: _rgb_among(p / "v"), VolumeError, r"slice3\.png is a colour image.*; save one channel as grey"),
    "text-as-png": (lambda p: _written(p / "x.png", b"hello" * 9), VolumeError, r"x\.png cannot be read as PNG \(it does not"),
    "empty-png": (lambda p: _written(p / "x.png", b""), VolumeError, r"x\.png cannot be read as PNG \(error: unpack.*copy"),
    "n5": (
        lambda p: _written(p / "x.n5" / "raw" / "attributes.json", b"{}").parent,
        VolumeError,
        r"raw is N5, which is not read; copy it to Zarr with tensorstore .*driver 'n5' to 'zarr3', .*--axes xyz",
    ),
    "precomputed": (
        lambda p: _written(p / "x" / "info", json.dumps({"scales": []}).encode()).parent,
        VolumeError,
        r"x is a neuroglancer precomputed volume, which is not read; copy it .*'neuroglancer_precomputed' to 'zarr3'",
    ),
    "folder-info": (lambda p: _written(p / "info", b"{").parent, VolumeError, r"nor a folder of slices"),
    "other-suffix": (
        lambda p: _written(p / "x.czi", b""),
        VolumeError,
        r"x\.czi is neither a Zarr array or group nor a file of a format that is read \(\.tif, .*\.mrc.*\); give one",
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("make", "error", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_open_source_refuses(make: Callable[[Path], Path], error: type[VolumeError], says: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(VolumeError, match=says) as caught:
        open_source(path)
    assert caught.type is error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "extra"), [("h5py", "hdf5"), ("mrcfile", "mrc")])
def test_an_extra_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, extra: str) -> None:
    path = hdf5(VOXELS, tmp_path / "v.h5") if extra == "hdf5" else mrc(VOXELS.view(np.int8), tmp_path / "v.mrc")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(VolumeError, match=rf"v\..*, and {name} is not installed: pip install 'kdunet\[{extra}\]'\."):
        open_source(path)


def test_one_file_knows_each_library() -> None:
    assert importers("h5py") == {"volume/hdf5.py"}
    assert importers("mrcfile") == {"volume/mrc.py"}


def test_tiff_and_zarr_need_neither_h5py_nor_mrcfile(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "v.tif", VOXELS)
    as_zarr_v3(VOXELS, tmp_path)
    code = (
        "import sys; from kdunet_infer.volume import open_source as o; [o(path) for path in sys.argv[1:]]; print(*sys.modules)"
    )
    paths = [str(tmp_path / "v.tif"), str(tmp_path / "v3.zarr")]
    out = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True).stdout
    assert not {"h5py", "mrcfile", "PIL"} & set(out.split())


@pytest.mark.parametrize(
    ("write", "damage", "says"),
    [
        (lambda p: png_files(VOXELS, p), "slice3.png", r"slice3\.png cannot be read \(PngError"),
        (
            lambda p: tiff_files(VOXELS, p, compression="zlib"),
            "s_003.tif",
            r"(chunk \(0, 0, 0\) \(z, y, x\) of .*s_003\.tif cannot be read|s_003\.tif breaks off)",
        ),
    ],
    ids=["png", "tiff"],
)
def test_a_damaged_slice_is_named(tmp_path: Path, write: Callable[[Path], Path], damage: str, says: str) -> None:
    source = open_source(write(tmp_path))
    content = bytearray((tmp_path / damage).read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    (tmp_path / damage).write_bytes(content)
    with pytest.raises(VolumeError, match=says) as caught:
        source.read(WHOLE)
    assert str(caught.value).count(str(tmp_path)) == 1, "one sentence about the file, not another around it"
    np.testing.assert_array_equal(source.read(Box((4, 0, 0), (6, 20, 18))), VOXELS[4:])


def test_a_damaged_hdf5_chunk_is_named(tmp_path: Path) -> None:
    path = hdf5(VOXELS, tmp_path / "v.h5", chunks=CHUNK, compression="gzip")
    with h5py.File(tmp_path / "v.h5") as file:
        at = file["volumes/raw"].id.get_chunk_info_by_coord((4, 8, 16)).byte_offset
    content = bytearray((tmp_path / "v.h5").read_bytes())
    content[at : at + 9] = b"\xff" * 9
    (tmp_path / "v.h5").write_bytes(content)
    with pytest.raises(CorruptChunk, match=r"chunk \(1, 1, 2\) \(z, y, x\) of .*v\.h5:/volumes/raw cannot be read"):
        open_source(path).read(WHOLE)


def test_a_damaged_chunk_in_a_zip_is_named(tmp_path: Path) -> None:
    path = zipped(as_zarr_v3(VOXELS, tmp_path), tmp_path / "v.zip")
    with zipfile.ZipFile(path) as file:
        at = file.getinfo("c/1/0/2").header_offset + 60
    content = bytearray(path.read_bytes())
    content[at : at + 20] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(CorruptChunk, match=r"chunk \(1, 0, 2\) \(z, y, x\) of .*v\.zip cannot be read"):
        open_source(path).read(WHOLE)


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidding(path: Any) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", forbidding)
    with pytest.raises(VolumeError, match=r"cannot be looked into \(PermissionError.*check its permissions"):
        open_source(tmp_path)
