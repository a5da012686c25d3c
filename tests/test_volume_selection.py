"""Axes, channels, timepoints, levels and voxel sizes: which part of what is stored is the volume, and how large it is."""

from __future__ import annotations

import json
import math
import os
import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from test_volume_sources import SHAPE, WHOLE
from volume_files import CHUNK, halved, write_image

from kdunet_infer.errors import VolumeError, VolumeNotFound
from kdunet_infer.geometry import Box
from kdunet_infer.testing import noise
from kdunet_infer.volume import Selection, open_labels, open_source
from kdunet_infer.volume.selection import choose
from kdunet_infer.volume.units import nanometres

VOXELS = noise(SHAPE)
SIZES = {"t": 2, "c": 3, "z": 6, "y": 20, "x": 18}


def hyperstack(axes: str) -> Any:
    """Noise with the axes in this order."""
    return np.random.default_rng(3).integers(0, 256, [SIZES[axis] for axis in axes], dtype=np.uint8)


def seen(array: Any, axes: str, t: int, c: int) -> Any:
    """What numpy says the volume in it is."""
    return np.einsum(f"{axes}->tczyx", array)[t, c]


def bare(path: Path, array: Any, **options: Any) -> Path:
    zarr.create_array(str(path), data=array, chunks=tuple(min(n, 7) for n in array.shape), **options)
    return path


def ome(path: Path, array: Any, axes: str, *, scale: Any = None, unit: str | None = "nanometer", types: bool = True) -> Path:
    """An OME-Zarr 0.5 image of one level with axes in any order, as a program that does not follow the letter writes it."""
    group = zarr.create_group(str(path))
    group.create_array("0", data=array, chunks=tuple(min(n, 7) for n in array.shape))
    kinds = {"t": "time", "c": "channel"}
    described: list[dict[str, Any]] = [{"name": axis} for axis in axes]
    for axis in described:
        axis.update({"type": kinds.get(axis["name"], "space")} if types else {})
        axis.update({"unit": unit} if axis["name"] in "zyx" and unit else {})
    transforms = [{"type": "scale", "scale": list(scale or [1] * len(axes))}]
    entry = {"axes": described, "datasets": [{"path": "0", "coordinateTransformations": transforms}]}
    group.update_attributes({"ome": {"version": "0.5", "multiscales": [entry]}})
    return path


# --- axes


@pytest.mark.parametrize(
    "axes", ["".join(p) for p in permutations("zyx")] + ["czyx", "xyzc", "zcyx", "tczyx", "xyzct", "tzcyx"]
)
def test_axes_in_any_order(tmp_path: Path, axes: str) -> None:
    array = hyperstack(axes)
    want = np.einsum(f"{axes}->{''.join(a for a in 'tczyx' if a in axes)}", array)
    chosen: dict[str, int] = {name: 1 for axis, name in (("t", "timepoint"), ("c", "channel")) if axis in axes}
    want = want[(1,) * len(chosen)]
    given_axes = bare(tmp_path / "given.zarr", array)
    named = bare(tmp_path / "named.zarr", array, dimension_names=list(axes))
    image = ome(tmp_path / "ome.zarr", array, axes, scale=["xyzct".index(axis) + 1 for axis in axes])
    for path, said in ((given_axes, axes), (named, None), (image, None), (image / "0", None)):
        source = open_source(path, Selection(axes=said, **chosen))
        assert source.shape == SHAPE
        np.testing.assert_array_equal(source.read(WHOLE), want)
        np.testing.assert_array_equal(source.read(Box((1, 2, 3), (4, 9, 17))), want[1:4, 2:9, 3:17])
        assert source.chunk_shape == (6, 7, 7)
    assert open_source(image, Selection(**chosen)).voxel_size_nm == (3, 2, 1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_box_of_any_axes_is_what_numpy_cuts(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    axes = "".join(data.draw(st.permutations("tczyx")))
    t, c = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 2))
    path = tmp_path_factory.getbasetemp() / f"any-{axes}.zarr"
    if not path.exists():
        bare(path, hyperstack(axes))
    source = open_source(path, Selection(axes=axes, timepoint=t, channel=c))
    begin = [data.draw(st.integers(0, n)) for n in SHAPE]
    end = [data.draw(st.integers(a, n)) for a, n in zip(begin, SHAPE, strict=True)]
    box = Box((begin[0], begin[1], begin[2]), (end[0], end[1], end[2]))
    found = source.read(box)
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, seen(hyperstack(axes), axes, t, c)[box.slices_in(WHOLE)])


@pytest.mark.parametrize("shape", [(1, 6, 20, 18), (1, 1, 6, 20, 18), (6, 20, 18, 1), (6, 1, 20, 18), (1, 6, 20, 18, 1)])
def test_axes_of_one_voxel_are_dropped(tmp_path: Path, shape: Any) -> None:
    np.testing.assert_array_equal(open_source(bare(tmp_path / "v.zarr", VOXELS.reshape(shape))).read(WHOLE), VOXELS)


@pytest.mark.parametrize("shape", [(20, 18), (1, 20, 18), (1, 1, 20, 18), (1, 20, 18, 1), (1, 1, 1, 20, 18)])
def test_a_flat_image_is_one_slice(tmp_path: Path, shape: Any) -> None:
    source = open_source(bare(tmp_path / "v.zarr", VOXELS[0].reshape(shape)))
    np.testing.assert_array_equal(source.read(Box((0, 0, 0), (1, 20, 18))), VOXELS[:1])


def test_a_flat_ome_image(tmp_path: Path) -> None:
    source = open_source(ome(tmp_path / "v.zarr", VOXELS[:3], "cyx", scale=(1, 4, 5)), Selection(channel=2))
    np.testing.assert_array_equal(source.read(Box((0, 0, 0), (1, 20, 18))), VOXELS[2:3])
    assert (source.layout.levels[0].scale, source.layout.units) == ((1, 4, 5), (None, "nanometer", "nanometer"))
    assert source.voxel_size_nm is None, "how thick the slice is nobody said"
    assert source.group is None


def test_names_that_are_no_axes_are_no_metadata(tmp_path: Path) -> None:
    array = bare(tmp_path / "v.zarr", VOXELS, dimension_names=["depth", "row", "column"])
    np.testing.assert_array_equal(open_source(array).read(WHOLE), VOXELS)
    words = bare(tmp_path / "w.zarr", VOXELS.T[..., None], dimension_names=["X", "Y", "Z", "channel"])
    np.testing.assert_array_equal(open_source(words).read(WHOLE), VOXELS)


def test_the_axes_given_win_over_the_metadata(tmp_path: Path) -> None:
    source = open_source(ome(tmp_path / "v.zarr", VOXELS.T, "zyx", scale=(4, 5, 30)), Selection(axes="xyz"))
    np.testing.assert_array_equal(source.read(WHOLE), VOXELS)
    assert source.voxel_size_nm == (30, 5, 4)


def test_a_label_lies_on_an_image_with_the_same_axes_only(tmp_path: Path) -> None:
    paths = {axes: ome(tmp_path / f"{axes}.zarr", hyperstack(axes), axes) for axes in ("zyx", "czyx", "xyz", "tzyx")}
    groups = {axes: open_source(path, Selection(channel=0, timepoint=0)).group for axes, path in paths.items()}
    assert groups == {"zyx": paths["zyx"], "czyx": paths["czyx"], "xyz": None, "tzyx": None}


# --- TIFF


def imagej(path: Path, axes: str, **options: Any) -> Path:
    tifffile.imwrite(
        path, hyperstack(axes), imagej=True, metadata={"axes": axes.upper(), **options.pop("metadata", {})}, **options
    )
    return path


@pytest.mark.parametrize("axes", ["zcyx", "tzcyx", "tzyx"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_hyperstacks_of_imagej(tmp_path: Path, axes: str, compression: str | None) -> None:
    chosen: dict[str, int] = {name: 1 for axis, name in (("t", "timepoint"), ("c", "channel")) if axis in axes}
    source = open_source(imagej(tmp_path / "v.tif", axes, compression=compression), Selection(**chosen))
    want = np.einsum(f"{axes}->{''.join(a for a in 'tczyx' if a in axes)}", hyperstack(axes))[(1,) * len(chosen)]
    np.testing.assert_array_equal(source.read(WHOLE), want)


@pytest.mark.parametrize("axes", ["cyx", "tyx"])
def test_a_stack_whose_pages_are_called_channels_or_frames_is_a_stack(tmp_path: Path, axes: str) -> None:
    array = hyperstack(axes)
    path = imagej(tmp_path / "v.tif", axes)
    assert open_source(path).shape == array.shape
    word = {"c": "channel", "t": "timepoint"}[axes[0]]
    one = open_source(path, Selection(**{word: 1}))  # type: ignore[arg-type]
    np.testing.assert_array_equal(one.read(Box((0, 0, 0), (1, 20, 18))), array[1:2])


@pytest.mark.parametrize(
    ("unit", "factor"), [("nm", 1), ("micron", 1000), ("um", 1000), ("\\u00B5m", 1000), ("Angstrom", 0.1), ("mm", 1e6)]
)
def test_voxel_size_of_imagej(tmp_path: Path, unit: str, factor: float) -> None:
    path = imagej(tmp_path / "v.tif", "zyx", resolution=(1 / 4, 1 / 5), metadata={"spacing": 30.0, "unit": unit})
    source = open_source(path)
    assert source.voxel_size_nm == pytest.approx((30 * factor, 5 * factor, 4 * factor))
    assert source.layout.levels[0].scale == source.voxel_size_nm
    assert source.layout.units == ("nanometer",) * 3


def test_voxel_size_of_ome_tiff(tmp_path: Path) -> None:
    said = {"axes": "ZYX", "PhysicalSizeX": 4, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 50, "PhysicalSizeYUnit": "Å"}
    tifffile.imwrite(tmp_path / "v.ome.tif", VOXELS, photometric="minisblack", metadata={**said, "PhysicalSizeZ": 0.03})
    assert open_source(tmp_path / "v.ome.tif").voxel_size_nm == (30, 5, 4)


@pytest.mark.parametrize("metadata", [{"spacing": 5.0}, {"unit": "nm"}, {"spacing": 5.0, "unit": "pixel"}])
def test_a_voxel_size_that_is_not_all_there_is_unknown(tmp_path: Path, metadata: dict[str, Any]) -> None:
    source = open_source(imagej(tmp_path / "v.tif", "zyx", resolution=(1, 1), metadata=metadata))
    assert source.voxel_size_nm is None
    assert source.level_voxel_sizes_nm == ()
    assert (source.layout.levels[0].scale, source.layout.units) == ((1, 1, 1), (None,) * 3)


def test_units() -> None:
    micro = [nanometres((2, 2, 2), (unit,) * 3) for unit in ("micrometer", "Micrometres", "um", "µm", "μm", "microns")]
    assert micro == [(2000, 2000, 2000)] * 6
    tiny = [nanometres((2, 2, 2), (unit,) * 3) for unit in ("angstrom", "Ångström", "Å", "\\u00C5", "A", "angstroms")]
    assert tiny == [(0.2, 0.2, 0.2)] * 6
    assert nanometres((1, 1, 1), ("m", "cm", "inch")) == (1e9, 1e7, 2.54e7)
    assert nanometres((0.004, 0.005, 0.03), ("um", "um", "um")) == (4, 5, 30)
    for size in (0, -1, math.inf, math.nan, None):
        assert nanometres((1, 1, size), ("nm", "nm", "nm")) is None
    for unit in ("parsec", "", None):
        assert nanometres((1, 1, 1), ("nm", "nm", unit)) is None


# --- levels and voxel sizes of OME-Zarr


@pytest.fixture
def pyramid(tmp_path: Path) -> Path:
    scales, moved = [(30, 4, 4), (60, 8, 8)], [(100, 10, 0), (115, 12, 2)]
    levels = [VOXELS, halved(VOXELS)]
    return write_image(tmp_path / "v.zarr", levels, scales=scales, translations=moved, unit="nanometer")


def test_a_level_is_the_array_and_those_coarser(pyramid: Path) -> None:
    fine, coarse = open_source(pyramid), open_source(pyramid, Selection(level=1))
    np.testing.assert_array_equal(coarse.read(Box.of_shape((3, 10, 9))), halved(VOXELS))
    assert coarse.layout == open_source(pyramid / "s1").layout
    assert coarse.layout.levels == fine.layout.levels[1:]
    assert (fine.voxel_size_nm, coarse.voxel_size_nm) == ((30, 4, 4), (60, 8, 8))
    assert fine.level_voxel_sizes_nm == coarse.level_voxel_sizes_nm == ((30, 4, 4), (60, 8, 8))
    assert (fine.group, coarse.group) == (pyramid, None)
    assert open_labels(pyramid, Selection(level=1)).shape == (3, 10, 9)


@pytest.mark.parametrize(("unit", "factor"), [("micrometer", 1000), ("angstrom", 0.1), ("millimeter", 1e6), ("meter", 1e9)])
def test_units_of_ome_zarr(tmp_path: Path, unit: str, factor: float) -> None:
    source = open_source(write_image(tmp_path / "v.zarr", [VOXELS], scales=[(30, 5, 4)], unit=unit))
    assert source.voxel_size_nm == pytest.approx((30 * factor, 5 * factor, 4 * factor))
    assert (source.layout.levels[0].scale, source.layout.units) == ((30, 5, 4), (unit,) * 3)


@pytest.mark.parametrize("unit", [None, "second"])
def test_a_unit_that_is_no_length_leaves_the_size_unknown(tmp_path: Path, unit: str | None) -> None:
    source = open_source(write_image(tmp_path / "v.zarr", [VOXELS], scales=[(30, 5, 4)], unit=unit))
    assert (source.voxel_size_nm, source.level_voxel_sizes_nm) == (None, ())


@pytest.mark.parametrize(("level", "given_nm"), [(0, (50, 5, 5)), (1, (100, 10, 10))])
def test_the_voxel_size_given_is_that_of_the_level_and_wins(pyramid: Path, level: int, given_nm: Any) -> None:
    source = open_source(pyramid, Selection(level=level, voxel_size_nm=given_nm))
    assert source.voxel_size_nm == given_nm
    assert source.level_voxel_sizes_nm == ((50, 5, 5), (100, 10, 10))
    assert source.layout.units == ("nanometer",) * 3
    assert source.layout.levels[-1].scale == (100, 10, 10)
    assert source.layout.levels[-1].translation == pytest.approx((115 * 5 / 3, 15, 2.5)), "the same place, counted in voxels"


def test_the_voxel_size_given_to_an_array_without_one(tmp_path: Path) -> None:
    source = open_source(bare(tmp_path / "v.zarr", VOXELS), Selection(voxel_size_nm=(30, 4, 4)))
    assert source.voxel_size_nm == source.layout.levels[0].scale == (30, 4, 4)
    assert source.layout.levels[0].chunk_shape == (6, 7, 7)


# --- identity, and files that are missing


def test_the_identity_is_of_the_array_not_of_the_path(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (pyramid.parent / "link").symlink_to(pyramid)
    monkeypatch.chdir(pyramid)
    ways = [pyramid, pyramid / "s0", pyramid.parent / "link", "../v.zarr/", ".", f"{pyramid}/../v.zarr"]
    assert {open_source(way).identity for way in ways} == {f"{os.path.realpath(pyramid)}/s0 (axes zyx)"}
    assert open_source(pyramid, Selection(level=1)).identity != open_source(pyramid).identity


def test_the_identity_names_channel_and_timepoint(tmp_path: Path) -> None:
    path = ome(tmp_path / "a\nb.zarr", hyperstack("tczyx"), "tczyx")
    identity = open_source(path, Selection(channel=2, timepoint=1)).identity
    assert identity.endswith("a\\nb.zarr/0 (axes tczyx, t 1, c 2)")
    assert "\n" not in identity


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("separator", [".", "/"])
def test_missing_chunks_are_counted(tmp_path: Path, zarr_format: Any, separator: Any) -> None:
    encoding = {"name": "v2" if zarr_format == 2 else "default", "separator": separator}
    path = tmp_path / "v.zarr"
    zarr.create_array(str(path), data=VOXELS + 1, chunks=CHUNK, zarr_format=zarr_format, chunk_key_encoding=encoding)
    assert open_source(path).missing_chunks() == (0, 18)
    chunks = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith((".", "zarr")))
    assert len(chunks) == 18
    for file in chunks[4:9]:
        file.unlink()
    for folder in {file.parent for file in chunks}:
        if not any(folder.iterdir()):
            folder.rmdir()
    source = open_source(path)
    assert source.missing_chunks() == (5, 18)
    found = source.read(WHOLE)
    assert ((found == VOXELS + 1) | (found == 0)).all(), "what is missing reads as the fill value"
    assert (found[4:, :8, :8] == VOXELS[4:, :8, :8] + 1).all()


def test_missing_files_of_shards_and_of_one_channel(tmp_path: Path) -> None:
    sharded = write_image(tmp_path / "s.zarr", [VOXELS], shard=(4, 16, 16))
    (sharded / "s0" / "c" / "1" / "0" / "1").unlink()
    assert open_source(sharded).missing_chunks() == (1, 8)
    array = tmp_path / "c.zarr"
    zarr.create_array(str(array), data=hyperstack("xyzc"), chunks=(9, 10, 6, 2))
    (array / "c/1/0/0/1").unlink()
    missing = [open_source(array, Selection(axes="xyzc", channel=channel)).missing_chunks() for channel in range(3)]
    assert missing == [(0, 4), (0, 4), (1, 4)]


@pytest.mark.parametrize("separator", [".", "/"])
def test_missing_chunks_of_a_volume_beyond_all_measure(tmp_path: Path, separator: Any) -> None:
    """Counting takes the time and memory of the files that there are: 2^96 chunks would take longer than the universe."""
    path = tmp_path / "v.zarr"
    encoding = {"name": "default", "separator": separator}
    array = zarr.create_array(str(path), shape=(2**40,) * 3, dtype="u1", chunks=(256,) * 3, chunk_key_encoding=encoding)
    array[300:301, :2, :2] = 1
    array[-1:, -1:, -1:] = 1
    for decoy in ("c/1/0/00", "c/1/0/x", "c/1/0/4294967296", "c/01/0/0", "c.1.0.00", "c.1.0", "c.1.0.0.0", "0.0.0", "d.0.0.0"):
        (path / decoy).parent.mkdir(parents=True, exist_ok=True)
        (path / decoy).write_bytes(b"")
    assert open_source(path).missing_chunks() == (2**96 - 2, 2**96)


def test_missing_chunks_in_a_zip(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path / "v.zarr"), data=VOXELS + 1, chunks=CHUNK)
    (tmp_path / "v.zarr" / "c/0/2/1").unlink()
    path = shutil.make_archive(str(tmp_path / "v"), "zip", tmp_path / "v.zarr")
    assert open_source(path).missing_chunks() == (1, 18)


def test_chunks_in_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(bare(tmp_path / "v.zarr", VOXELS))

    def refuse(folder: Any) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(VolumeError, match=r"v\.zarr/c cannot be looked into \(Permission denied\); check its permissions"):
        source.missing_chunks()


def test_other_formats_miss_nothing(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "v.tif", VOXELS, compression="zlib", photometric="minisblack")
    assert open_source(tmp_path / "v.tif").missing_chunks() == (0, 0)


# --- what is refused, and how it is said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"axes": "zyq"}, "axes 'zyq' have the letter 'q'; each must be one of tczyx, such as zyx or tczyx"),
        ({"axes": "ZYX"}, "axes 'ZYX' have the letter 'Z'"),
        ({"axes": "zzyx"}, "axes 'zzyx' name 'z' 2 times; give each axis its own letter"),
        ({"axes": "czy"}, "axes 'czy' lack y or x, and the network looks at slices of both"),
        ({"axes": ""}, "axes '' lack y or x"),
        ({"voxel_size_nm": (5, 0, 4)}, r"a voxel size of 5,0,4 nm \(z,y,x\) cannot be; give three lengths above 0"),
        ({"voxel_size_nm": (math.nan, 1, 4)}, "a voxel size of nan,1,4 nm"),
    ],
)
def test_a_selection_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(VolumeError, match=says):
        Selection(**options)


@pytest.mark.parametrize(
    ("shape", "stored", "options", "says"),
    [
        ((6, 20, 18), None, {"axes": "czyx"}, r"v has 3 axes \(6, 20, 18\), and 'czyx' names 4; give --axes a letter for each"),
        (
            (2, 3, 6, 20, 18),
            None,
            {},
            r"shape \(2, 3, 6, 20, 18\) and no metadata that name its axes; .*--axes, such as tczyx\.",
        ),
        ((3, 6, 20, 18), None, {}, r"name them with --axes, such as czyx\."),
        ((3, 6, 20, 18), "czyx", {}, r"v has 3 channels; choose one with --channel 0 to 2\."),
        ((3, 6, 20, 18), "tzyx", {}, r"v has 3 timepoints; choose one with --timepoint 0 to 2\."),
        (
            (3, 6, 20, 18),
            "czyx",
            {"channel": 3},
            r"v has 3 channels, counted from 0, so there is no channel 3; give another --ch",
        ),
        ((3, 6, 20, 18), "czyx", {"channel": -1}, r"there is no channel -1; give another --channel\."),
        ((6, 20, 18), None, {"channel": 1}, r"v has 1 channel, counted from 0, so there is no channel 1"),
        ((6, 20, 18), None, {"timepoint": 7}, r"v has 1 timepoint, counted from 0, so there is no timepoint 7"),
        ((2, 20, 18), "-yx", {}, r"v has the shape \(2, 20, 18\) with an axis that is none of tczyx; name them with --axes"),
        ((2, 20, 18), "zyy", {}, r"v has metadata that call its axes z,y,y; name them with --axes"),
        ((2, 20, 18), "tcz", {}, r"v has metadata that call its axes t,c,z; name them with --axes"),
        ((2, 0, 18), None, {}, r"v has the shape \(2, 0, 18\), so there are no voxels in it; give another volume"),
        ((), None, {}, r"v has the shape \(\), not \(z, y, x\); give a stack of slices"),
    ],
)
def test_a_selection_that_does_not_fit(shape: Any, stored: str | None, options: dict[str, Any], says: str) -> None:
    with pytest.raises(VolumeError, match=says):
        choose(shape, stored, Selection(**options), Path("v"))


def test_channel_0_of_an_array_without_channels(tmp_path: Path) -> None:
    source = open_source(bare(tmp_path / "v.zarr", VOXELS), Selection(channel=0, timepoint=0))
    np.testing.assert_array_equal(source.read(WHOLE), VOXELS)


def test_a_level_that_is_not_there(pyramid: Path) -> None:
    says = r"v\.zarr has 2 levels, counted from 0, so there is no level {}; give another --level\."
    for level in (2, -1):
        with pytest.raises(VolumeError, match=says.format(level)):
            open_source(pyramid, Selection(level=level))
    with pytest.raises(VolumeError, match=r"s1 is one array, so it has no level 1; give the OME-Zarr image that it is in"):
        open_source(pyramid / "s1", Selection(level=1))
    tifffile.imwrite(pyramid.parent / "v.tif", VOXELS)
    with pytest.raises(
        VolumeError, match=r"v\.tif has no levels, as an OME-Zarr image has, so there is no level 3; give --level 0"
    ):
        open_source(pyramid.parent / "v.tif", Selection(level=3))


def _edited(path: Path, **changes: Any) -> Path:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, **changes}))
    return path.parent


V2, V3 = {"zarr_format": 2}, {"zarr_format": 3}


@pytest.mark.parametrize(
    ("options", "file", "changes", "says"),
    [
        (
            V2,
            ".zarray",
            {"compressor": {"id": "jpegxl"}},
            r"v needs the codec 'jpegxl', which is not known here; write it anew",
        ),
        (V2, ".zarray", {"filters": [{"id": "wavelet"}]}, r"v needs the codec 'wavelet', which is not known here"),
        (
            V3,
            "zarr.json",
            {"codecs": [{"name": "bytes"}, {"name": "av1"}]},
            r"v needs the codec 'av1', which is not known here",
        ),
        (
            V2,
            ".zarray",
            {"dtype": "|O"},
            r"v holds voxels of the type '\|O', which are no grey values; save integers or floats",
        ),
        (V2, ".zarray", {"dtype": [["a", "<i4"]]}, r"v holds voxels of the type \[\['a', '<i4'\]\], which are no grey values"),
        (V2, ".zarray", {"dtype": "<M8[s]"}, r"v holds voxels of the type '<M8\[s\]', which"),
        (V3, "zarr.json", {"data_type": "string"}, r"v holds voxels of the type 'string', which are no grey values"),
        (V3, "zarr.json", {"data_type": {"name": "structured"}}, r"v holds voxels of the type 'structured', which"),
        (
            V3,
            "zarr.json",
            {"data_type": "complex64", "fill_value": [0, 0]},
            r"v holds complex64 voxels, and grey values are real",
        ),
        (V3, "zarr.json", {"shape": [-1, 4, 4]}, r"v has Zarr metadata that cannot be read \(ValueError.*repair or restore it"),
        (
            V2,
            ".zarray",
            {"chunks": [0, 2, 2]},
            r"v has Zarr metadata that cannot be read \(ValueError: chunks of \(0, 2, 2\)\)",
        ),
        (
            {"shards": (12, 28, 28)},
            "zarr.json",
            {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [12, 28, 0]}}},
            r"v has Zarr metadata that cannot be read \(ValueError: chunks of \(12, 28, 0\)\)",
        ),
        (V3, "zarr.json", {"attributes": [1]}, r"v has attributes in zarr\.json that are no JSON object; repair or restore it"),
    ],
)
def test_an_array_that_cannot_be_read(tmp_path: Path, options: Any, file: str, changes: Any, says: str) -> None:
    path = _edited(bare(tmp_path / "v", VOXELS, **options) / file, **changes)
    with pytest.raises(VolumeError, match=says):
        open_source(path)


@pytest.mark.parametrize("text", ["{", "[]", "", '"zarr"', "[" * 100000, "\xff"])
@pytest.mark.parametrize(
    ("version", "file"),
    [("0.5", "zarr.json"), ("0.5", "s0/zarr.json"), ("0.4", ".zattrs"), ("0.4", ".zgroup"), ("0.4", "s0/.zarray")],
)
def test_broken_json_names_its_file(tmp_path: Path, version: Any, file: str, text: str) -> None:
    path = write_image(tmp_path / "v.zarr", [VOXELS], version=version)
    (path / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(VolumeError, match=rf"has Zarr metadata that cannot be read \(\w+: .* in {file[-9:].split('/')[-1]}\)"):
        open_source(path)


@pytest.mark.parametrize("name", ["with space.zarr", "Möbius 中.zarr", "#a%20b?.zarr", "'quoted\".zarr"])
def test_any_name_is_a_path(tmp_path: Path, name: str) -> None:
    path = write_image(tmp_path / name, [VOXELS])
    for way in (f"{path}/", path / "s0"):
        np.testing.assert_array_equal(open_source(way).read(WHOLE), VOXELS)
    tifffile.imwrite(tmp_path / f"{name}.tif", VOXELS)
    assert open_source(tmp_path / f"{name}.tif").shape == SHAPE


def test_a_link_that_leads_to_itself(tmp_path: Path) -> None:
    for name in ("loop.zarr", "loop.tif", "loop.zip", "loop.h5"):
        (tmp_path / name).symlink_to(tmp_path / name)
        with pytest.raises(VolumeNotFound, match=rf"{name} is a link that leads to nothing, to itself or to where"):
            open_source(tmp_path / name)
