"""Reading volumes: zarr and tifffile write them here, numpy says what must be read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from volume_files import CHUNK, halved, write_image

from kdunet_infer.blockwise import Source, UInt8Array
from kdunet_infer.errors import CorruptChunk, GeometryError, VolumeError, VolumeNotFound
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.testing import SourceContract, noise
from kdunet_infer.volume import VolumeSource, open_labels, open_source

SHAPE: ZYX = (6, 20, 18)
WHOLE = Box.of_shape(SHAPE)


class VolumeContract(SourceContract):
    """What every volume on disk does beyond the contract."""

    def test_what_is_read_is_contiguous(self, tmp_path: Path) -> None:
        source = self.make(noise(SHAPE), tmp_path)
        for box in (Box((1, 0, 0), (4, 20, 18)), Box((1, 2, 3), (4, 9, 8)), Box((-1, 2, 3), (4, 9, 30))):
            found = source.read_box(box)
            assert found.flags.c_contiguous
            assert found.flags.writeable, "a view of a memory-mapped file is read later, by whoever touches it"

    def test_an_empty_box(self, tmp_path: Path) -> None:
        assert self.make(noise(SHAPE), tmp_path).read_box(Box((1, 2, 3), (1, 9, 8))).shape == (0, 7, 5)


class TestOmeZarr05(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        return open_source(write_image(folder / "v.zarr", [voxels]))


class TestOmeZarr05Sharded(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        return open_source(write_image(folder / "v.zarr", [voxels], shard=(8, 16, 16)))


class TestOmeZarr04WithLeadingAxes(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        return open_source(write_image(folder / "v.zarr", [voxels[None, None]], axes="tczyx", version="0.4"))


class TestPlainZarrV2(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        zarr.create_array(str(folder / "v.zarr"), data=voxels, chunks=CHUNK, zarr_format=2)
        return open_source(folder / "v.zarr")


class TestPlainZarrV3(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        zarr.create_array(str(folder / "v.zarr"), data=voxels, chunks=CHUNK)
        return open_source(folder / "v.zarr")


class TestTiffMemoryMapped(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        tifffile.imwrite(folder / "v.tif", voxels, photometric="minisblack")
        return open_source(folder / "v.tif")


class TestTiffCompressedStrips(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        tifffile.imwrite(folder / "v.tif", voxels, photometric="minisblack", compression="zlib", rowsperstrip=8)
        return open_source(folder / "v.tif")


class TestTiffCompressedTiles(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        tifffile.imwrite(folder / "v.tiff", voxels, photometric="minisblack", compression="lzw", tile=(16, 16))
        return open_source(folder / "v.tiff")


class TestTiffWrittenPageByPage(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        with tifffile.TiffWriter(folder / "V.TIF") as tiff:
            for page in voxels:
                tiff.write(page, contiguous=False, photometric="minisblack")
        return open_source(folder / "V.TIF")


class TestTiffOfImageJ(VolumeContract):
    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        tifffile.imwrite(folder / "v.tif", voxels, imagej=True)
        return open_source(folder / "v.tif")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> VolumeSource:
    path = tmp_path_factory.mktemp("sharded") / "v.zarr"
    return open_source(write_image(path, [noise(SHAPE)], shard=(4, 16, 16)))


axis = st.tuples(st.integers(-25, 30), st.integers(1, 25))


@settings(max_examples=25)
@given(z=axis, y=axis, x=axis)
def test_any_box_is_mirrored_as_by_np_pad(sharded: VolumeSource, z: Any, y: Any, x: Any) -> None:
    box = Box((z[0], y[0], x[0]), (sum(z), sum(y), sum(x)))
    frame = WHOLE.grown((50, 50, 50))
    padded = np.pad(noise(SHAPE), 50, mode="reflect")
    np.testing.assert_array_equal(sharded.read_box(box), padded[box.slices_in(frame)])


def test_a_flat_image_is_one_slice(tmp_path: Path) -> None:
    flat = noise((1, 20, 18))
    tifffile.imwrite(tmp_path / "v.tif", flat[0])
    zarr.create_array(str(tmp_path / "v.zarr"), data=flat[0], chunks=CHUNK[1:])
    for name in ("v.tif", "v.zarr"):
        source = open_source(tmp_path / name)
        assert source.shape == (1, 20, 18)
        np.testing.assert_array_equal(source.read_box(Box((0, 1, 2), (1, 9, 8))), flat[:, 1:9, 2:8])
        assert source.read_box(Box((1, 1, 2), (1, 9, 8))).shape == (0, 8, 6)


def test_chunks_are_files(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "v.tif", noise(SHAPE), photometric="minisblack", compression="zlib", rowsperstrip=4)
    assert open_source(tmp_path / "v.tif").chunk_shape == (1, 20, 18)
    assert open_source(write_image(tmp_path / "a.zarr", [noise(SHAPE)])).chunk_shape == CHUNK
    assert open_source(write_image(tmp_path / "b.zarr", [noise(SHAPE)], shard=(4, 16, 16))).chunk_shape == (4, 16, 16)


# --- metadata


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_transforms_are_folded_into_the_levels(tmp_path: Path, version: Any) -> None:
    voxels = noise(SHAPE)
    path = write_image(
        tmp_path / "v.zarr",
        [voxels[None], halved(voxels)[None]],
        version=version,
        axes="czyx",
        unit="micrometer",
        scales=[(5, 2, 3), (10, 4, 6)],
        translations=[(100, 10, 1), (102.5, 11, 2.5)],
        shared=[{"type": "scale", "scale": [1, 2, 3, 4]}, {"type": "translation", "translation": [0, 7, 8, 9]}],
    )
    layout = open_source(path).layout
    assert layout.units == ("micrometer",) * 3
    assert (layout.version, layout.zarr_format) == (version, 3 if version == "0.5" else 2)
    assert [level.shape for level in layout.levels] == [SHAPE, (3, 10, 9)]
    assert [level.scale for level in layout.levels] == [(10, 6, 12), (20, 12, 24)]
    assert [level.translation for level in layout.levels] == [(207, 38, 13), (212, 41, 19)]


def test_a_level_is_opened_with_its_own_voxel_size(tmp_path: Path) -> None:
    path = write_image(tmp_path / "v.zarr", [noise(SHAPE), halved(noise(SHAPE))], scales=[(5, 4, 4), (10, 8, 8)])
    finest, coarse = open_source(path / "s0"), open_source(path / "s1")
    assert finest.layout == open_source(path).layout
    assert finest.group == path
    assert coarse.shape == (3, 10, 9)
    assert [level.scale for level in coarse.layout.levels] == [(10, 8, 8)]
    assert coarse.group is None


# --- labels


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "uint64", ">u4"])
def test_labels_are_read_as_they_are(tmp_path: Path, dtype: str) -> None:
    voxels = (noise(SHAPE) // 100).astype(dtype)
    zarr.create_array(str(tmp_path / "plain.zarr"), data=voxels, chunks=CHUNK)
    paths = [tmp_path / "plain.zarr"]
    if dtype not in ("uint64", "bool"):
        tifffile.imwrite(tmp_path / "mask.tif", voxels, photometric="minisblack", compression="zlib")
        paths.append(tmp_path / "mask.tif")
    for path in paths:
        labels = open_labels(path)
        found = labels.read(Box((1, 2, 3), (4, 9, 8)))
        assert labels.shape == SHAPE
        assert found.dtype.newbyteorder("=") == np.dtype(dtype).newbyteorder("=")
        np.testing.assert_array_equal(found, voxels[1:4, 2:9, 3:8])


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """An image with the labels nuclei and mito."""
    path = write_image(tmp_path / "v.zarr", [noise(SHAPE)])
    zarr.create_group(str(path / "labels"), attributes={"ome": {"version": "0.5", "labels": ["nuclei", "mito"]}})
    for index, name in enumerate(("mito", "nuclei")):
        write_image(path / "labels" / name, [np.full(SHAPE, index, np.uint32)], extra={"image-label": {}})
    return path


def test_a_label_of_an_image(labelled: Path) -> None:
    for inside in ("labels/nuclei", "labels/nuclei/s0"):
        assert (open_labels(labelled / inside).read(WHOLE) == 1).all()


def test_labels_are_not_mirrored(labelled: Path) -> None:
    with pytest.raises(GeometryError, match="is not inside"):
        open_labels(labelled / "labels/mito").read(WHOLE.grown((0, 0, 1)))


# --- what is refused, and how it is said


def _tiff(path: Path, voxels: Any, **options: Any) -> Path:
    tifffile.imwrite(path, voxels, **options)
    return path


def _text(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def _array(path: Path, **options: Any) -> Path:
    zarr.create_array(str(path), **options)
    return path


def _group(path: Path, attributes: dict[str, Any]) -> Path:
    zarr.create_group(str(path), attributes=attributes)
    return path


def _two_stacks(path: Path) -> Path:
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(np.zeros((3, 8, 8), np.uint8), photometric="minisblack")
        tiff.write(np.zeros((4, 4), np.uint8))
    return path


def _cut_short(path: Path) -> Path:
    with tifffile.TiffWriter(path) as tiff:
        for page in noise(SHAPE):
            tiff.write(page, contiguous=False)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def _cut_slice(path: Path) -> Path:
    tifffile.imwrite(path, noise(SHAPE)[0])
    path.write_bytes(path.read_bytes()[:-9])
    return path


def _missing_level(path: Path) -> Path:
    write_image(path, [noise(SHAPE)])
    (path / "s0").rename(path / "elsewhere")
    return path


def _flat_level(path: Path) -> Path:
    write_image(path, [noise(SHAPE)])
    zarr.create_array(str(path / "s0"), shape=(8, 8), dtype="uint8", overwrite=True)
    return path


ENTRY = {"axes": [{"name": n, "type": "space"} for n in "zyx"]}
REFUSED: dict[str, tuple[Callable[[Path], Path], type[VolumeError], str]] = {
    "nothing": (lambda p: p / "x.zarr", VolumeNotFound, r"nothing at .*x\.zarr, or it may not be read; check the path"),
    "nothing-tiff": (lambda p: p / "x.tif", VolumeNotFound, r"nothing at .*x\.tif"),
    "folder": (
        lambda p: p,
        VolumeError,
        r"neither a Zarr array or group nor a folder of slices \(\.tif, \.tiff, \.png\); give a volume",
    ),
    "text": (lambda p: _text(p / "x.txt", "hello"), VolumeError, r"x\.txt is neither a Zarr array"),
    "text-as-tiff": (
        lambda p: _text(p / "x.tif", "hello"),
        VolumeError,
        r"x\.tif cannot be read as TIFF .*not a TIFF.*copy it again",
    ),
    "cut-short-tiff": (lambda p: _cut_short(p / "x.tif"), VolumeError, r"breaks off after page \d; copy it again"),
    "cut-short-slice": (
        lambda p: _cut_slice(p / "x.tif"),
        VolumeError,
        r"x\.tif breaks off after page 1; copy it again",
    ),
    "rgb-tiff": (
        lambda p: _tiff(p / "x.tif", np.zeros((2, 8, 8, 3), np.uint8), photometric="rgb"),
        VolumeError,
        r"axes .*S \(2, 8, 8, 3\), not grey slices; save one channel",
    ),
    "two-stacks": (
        lambda p: _two_stacks(p / "x.tif"),
        VolumeError,
        r"page 4 of .*x\.tif is \(4, 4\) uint8 and the first \(8, 8\) uint8; save slices of one size and type alone",
    ),
    "broken-metadata": (
        lambda p: _text(p / "x.zarr" / "zarr.json", "{").parent,
        VolumeError,
        r"x\.zarr has Zarr metadata that cannot be read \(JSONDecodeError.*repair or restore",
    ),
    "channels": (
        lambda p: _array(p / "x.zarr", shape=(2, *SHAPE), dtype="uint8"),
        VolumeError,
        r"shape \(2, 6, 20, 18\) and no metadata that name its axes; name them with --axes, such as czyx",
    ),
    "line": (lambda p: _array(p / "x.zarr", shape=(9,), dtype="uint8"), VolumeError, r"shape \(9,\), not \(z, y, x\)"),
    "empty": (
        lambda p: _array(p / "x.zarr", shape=(0, 4, 4), dtype="uint8"),
        VolumeError,
        r"shape \(0, 4, 4\), so there are no voxels",
    ),
    "group": (
        lambda p: write_image(p / "x.zarr" / "image", [noise(SHAPE)]) and _group(p / "x.zarr", {}),
        VolumeError,
        r"x\.zarr is a Zarr group without an image of its own; give one of its members: image\.",
    ),
    "unfinished": (
        lambda p: _group(p / "x.zarr", {"kdunet": {"state": "unfinished"}}),
        VolumeError,
        r"output of kdunet that was not finished; run the command that writes it again",
    ),
    "axes": (
        lambda p: write_image(p / "x.zarr", [noise(SHAPE)], axes="zyy"),
        VolumeError,
        r"metadata that call its axes z,y,y; name them with --axes",
    ),
    "version": (
        lambda p: _group(p / "x.zarr", {"ome": {"version": "0.6", "multiscales": [ENTRY]}}),
        VolumeError,
        r"is OME-Zarr 0\.6; only 0\.4 and 0\.5 can be read",
    ),
    "no-datasets": (
        lambda p: _group(p / "x.zarr", {"ome": {"version": "0.5", "multiscales": [ENTRY]}}),
        VolumeError,
        r"metadata that breaks the format \(KeyError\('datasets'\)\); repair its multiscales",
    ),
    "zero-levels": (
        lambda p: _group(p / "x.zarr", {"ome": {"version": "0.5", "multiscales": [{**ENTRY, "datasets": []}]}}),
        VolumeError,
        r"lists no levels; repair its multiscales",
    ),
    "zero-scale": (
        lambda p: write_image(p / "x.zarr", [noise(SHAPE)], scales=[(0, 1, 1)]),
        VolumeError,
        r"scale \[0\.0, 1\.0, 1\.0\] at level 's0'; voxel sizes must be above 0",
    ),
    "endless-translation": (
        lambda p: write_image(p / "x.zarr", [noise(SHAPE)], translations=[(0, float("inf"), 0)]),
        VolumeError,
        r"translation \[0\.0, inf, 0\.0\] at level 's0'; it must be finite",
    ),
    "rotation": (
        lambda p: write_image(p / "x.zarr", [noise(SHAPE)], shared=[{"type": "rotation"}]),
        VolumeError,
        r"transformation 'rotation'; only scale and translation",
    ),
    "missing-level": (lambda p: _missing_level(p / "x.zarr"), VolumeError, r"x\.zarr/s0 is no array with 3 axes"),
    "wrong-rank": (
        lambda p: _flat_level(p / "x.zarr"),
        VolumeError,
        r"x\.zarr/s0 is no array with 3 axes, as .*x\.zarr says it is; repair it",
    ),
}


@pytest.mark.parametrize(("make", "error", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_open_source_refuses(make: Callable[[Path], Path], error: type[VolumeError], says: str, tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match=says) as caught:
        open_source(make(tmp_path))
    assert caught.type is error


def test_open_labels_refuses_grey_values(tmp_path: Path) -> None:
    path = _array(tmp_path / "x.zarr", shape=SHAPE, dtype="float32")
    with pytest.raises(VolumeError, match="holds float32 voxels, and labels are integers; threshold or convert it"):
        open_labels(path)


def test_open_labels_names_the_labels_of_an_image(labelled: Path) -> None:
    with pytest.raises(
        VolumeError, match=r"is an image, not a mask; it has the labels nuclei, mito: give .*v\.zarr/labels/nuclei\."
    ):
        open_labels(labelled)
    with pytest.raises(VolumeError, match=r"without an image of its own; give one of its members: nuclei, mito\."):
        open_labels(labelled / "labels")


# --- damage


def _damage(file: Path, keep: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])


@pytest.mark.parametrize("keep", [0.0, 0.5], ids=["emptied", "halved"])
@pytest.mark.parametrize(
    ("shard", "word", "index"), [(None, "chunk", (1, 2, 0)), ((4, 16, 16), "shard", (1, 1, 0))], ids=["chunks", "shards"]
)
def test_a_damaged_chunk_is_named(tmp_path: Path, shard: ZYX | None, word: str, index: ZYX, keep: float) -> None:
    path = write_image(tmp_path / "v.zarr", [noise(SHAPE)], shard=shard)
    z, y, x = index
    _damage(path / "s0" / "c" / str(z) / str(y) / str(x), keep)
    source = open_source(path)
    with pytest.raises(
        CorruptChunk, match=rf"{word} \({z}, {y}, {x}\) \(z, y, x\) of .*v\.zarr/s0 cannot be read .*; restore it"
    ):
        source.read_box(WHOLE.grown((2, 2, 2)))
    above = Box((0, 0, 0), (4, 20, 18))
    np.testing.assert_array_equal(source.read_box(above), noise(SHAPE)[:4])


def test_a_damaged_tiff_page_is_named(tmp_path: Path) -> None:
    path = _tiff(tmp_path / "v.tif", noise(SHAPE), photometric="minisblack", compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        begin = tiff.pages[3].dataoffsets[0]
    content = bytearray(path.read_bytes())
    content[begin : begin + 20] = bytes(20)
    path.write_bytes(content)
    with pytest.raises(CorruptChunk, match=r"chunk \(3, 0, 0\) \(z, y, x\) of .*v\.tif cannot be read"):
        open_source(path).read_box(WHOLE)


def test_a_read_that_fails_once_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(write_image(tmp_path / "v.zarr", [noise(SHAPE)]))
    read, calls = zarr.Array.__getitem__, []

    def flaky(array: Any, index: Any) -> Any:
        calls.append(index)
        if len(calls) == 1:
            raise OSError("stale file handle")
        return read(array, index)

    monkeypatch.setattr(zarr.Array, "__getitem__", flaky)
    np.testing.assert_array_equal(source.read_box(Box((0, 3, 5), (6, 20, 18))), noise(SHAPE)[:, 3:, 5:])
    assert len(calls) == 1 + 2 * 3 * 3


def test_a_folder_that_may_not_be_looked_into_is_no_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = os.stat

    def forbidding(path: Any, **options: Any) -> Any:
        if str(path).startswith(f"{tmp_path}{os.sep}"):
            raise PermissionError(path)
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", forbidding)
    with pytest.raises(VolumeError, match="neither a Zarr array"):
        open_source(tmp_path)


def test_a_path_that_may_not_be_looked_at_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(VolumeNotFound):
        open_source(tmp_path / ("x" * 5000))  # refused by the operating system, as a folder without permission is
