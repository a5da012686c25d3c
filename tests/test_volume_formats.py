"""Stand-alone outputs in their four formats; ome-zarr-models, zarr, tifffile and Pillow (libtiff) say what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, cast
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_volume_targets import CHUNK, MASK, SHAPE, VOXELS, WHOLE, mark_of, ome_of, pixels, three_levels, validated, write_all
from volume_files import hashes, write_image

from kdunet_infer.blockwise import UInt8Array
from kdunet_infer.errors import TargetExists, VolumeError
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.testing import noise
from kdunet_infer.volume import (
    Layout,
    Level,
    Selection,
    TargetFormat,
    create_image,
    create_label,
    open_labels,
    open_source,
    target_write_shape,
)
from kdunet_infer.volume.formats import target_levels
from kdunet_infer.volume.tiff_target import write_tiff

FORMATS: tuple[TargetFormat, ...] = ("ome-zarr-0.5", "ome-zarr-0.4", "zarr", "tiff")
ABOUT = {"model": "m", "command": 'kdunet-infer "é\n" <&>'}


def a_source(path: Path, kind: str) -> Any:
    """0.4, 0.5, 0.5-sharded or plain."""
    if kind == "plain":
        zarr.create_array(str(path), data=VOXELS, chunks=CHUNK, zarr_format=2)
    else:
        three_levels(path, cast("Literal['0.4', '0.5']", kind[:3]), shard=(16, 32, 32) if "sharded" in kind else None)
    return open_source(path)


def out_path(folder: Path, target_format: TargetFormat) -> Path:
    return folder / ("out.tif" if target_format == "tiff" else "out.zarr")


# --- which format, and how it is cut


@pytest.mark.parametrize("kind", ["0.4", "0.5", "0.5-sharded", "plain"])
@pytest.mark.parametrize("target_format", FORMATS)
def test_every_format_of_every_source(tmp_path: Path, kind: str, target_format: TargetFormat) -> None:
    source = a_source(tmp_path / "v.zarr", kind)
    path = out_path(tmp_path, target_format)
    target = create_image(path, like=source, content="mask", target_format=target_format)
    assert target.write_shape == target_write_shape(source, target_format) == target_write_shape(source.layout, target_format)
    write_all(target)
    target.finish(ABOUT)
    np.testing.assert_array_equal(target.result().read(WHOLE), MASK)
    np.testing.assert_array_equal(open_source(path).read_box(WHOLE), MASK)
    assert sorted(child.name for child in tmp_path.iterdir()) == sorted(["v.zarr", path.name])
    if target_format.startswith("ome-zarr"):
        validated(path)
        layout = open_source(path).layout
        assert f"ome-zarr-{layout.version}" == target_format
        assert layout.zarr_format == (2 if target_format == "ome-zarr-0.4" else 3)
        transforms = [(level.shape, level.scale, level.translation) for level in layout.levels]
        assert transforms == [(level.shape, level.scale, level.translation) for level in source.layout.levels]
        assert {level.write_shape for level in layout.levels} == {target.write_shape}
        is_sharded = kind == "0.5-sharded" and target_format == "ome-zarr-0.5"
        assert target.write_shape == ((16, 32, 32) if is_sharded else CHUNK)


@pytest.mark.parametrize(
    ("kind", "name", "want"),
    [
        ("0.4", "o.zarr", "ome-zarr-0.4"),
        ("0.5", "o.ome.zarr", "ome-zarr-0.5"),
        ("plain", "o.zarr", "ome-zarr-0.5"),
        ("0.4", "o.TIF", "tiff"),
        ("0.5", "o.tiff", "tiff"),
    ],
)
def test_the_suffix_says_the_format(tmp_path: Path, kind: str, name: str, want: TargetFormat) -> None:
    assert create_image(tmp_path / name, like=a_source(tmp_path / "v.zarr", kind), content="mask").target_format == want


@pytest.mark.parametrize(
    ("name", "target_format", "says"),
    [
        ("o.tif", "zarr", r"o\.tif cannot be zarr; give a path that ends in \.zarr, or another format"),
        ("o.tiff", "ome-zarr-0.4", r"o\.tiff cannot be ome-zarr-0\.4; give a path that ends in \.zarr, or another format"),
        ("o.zarr", "tiff", r"o\.zarr cannot be tiff; give a path that ends in \.tif, or another format"),
        ("o.zarr", "n5", r"'n5' is unknown; choose one of ome-zarr-0\.5, ome-zarr-0\.4, zarr, tiff"),
    ],
)
def test_a_format_that_contradicts_its_path_is_refused(tmp_path: Path, name: str, target_format: Any, says: str) -> None:
    source = a_source(tmp_path / "v.zarr", "0.5")
    with pytest.raises(VolumeError, match=says):
        create_image(tmp_path / name, like=source, content="mask", target_format=target_format)
    assert [child.name for child in tmp_path.iterdir()] == ["v.zarr"]


@pytest.mark.parametrize(
    ("shape", "chunk", "shard", "want_chunk", "want_shard"),
    [
        ((500, 500, 500), (64, 64, 64), None, (64, 64, 64), None),
        ((500, 500, 500), (16, 256, 128), (32, 512, 512), (16, 256, 128), (32, 512, 512)),
        ((500, 2048, 2048), (1, 1024, 1024), None, (64, 64, 64), None),
        ((500, 2048, 2048), (15, 64, 64), None, (64, 64, 64), None),
        ((500, 2048, 2048), (64, 257, 64), None, (64, 64, 64), None),
        ((500, 2048, 2048), (1, 1024, 1024), (64, 1024, 1024), (64, 64, 64), (64, 1024, 1024)),
        ((500, 2048, 2048), (1, 1024, 1024), (32, 1024, 1024), (64, 64, 64), None),
        ((1, 200, 200), (1, 1024, 1024), None, (1, 1024, 1024), None),
        ((10, 200, 200), (10, 200, 200), None, (10, 200, 200), None),
        ((10, 200, 200), (5, 200, 200), None, (64, 64, 64), None),
    ],
    ids=["kept", "kept-sharded", "pages", "thin", "long", "shard-kept", "shard-dropped", "one-slice", "whole", "part"],
)
def test_chunks_suit_viewing_in_all_planes(
    shape: ZYX, chunk: ZYX, shard: ZYX | None, want_chunk: ZYX, want_shard: ZYX | None
) -> None:
    (level,) = target_levels(Layout(levels=(Level(shape=shape, chunk_shape=chunk, shard_shape=shard, scale=(3, 2, 1)),)))
    assert (level.chunk_shape, level.shard_shape) == (want_chunk, want_shard)
    assert (level.shape, level.scale) == (shape, (3, 2, 1))


sizes = st.tuples(*[st.integers(1, 2000)] * 3)


@given(shape=sizes, chunk=sizes, n_chunks=st.none() | st.tuples(*[st.integers(1, 4)] * 3))
def test_a_view_along_any_axis_never_decodes_much_more_than_it_shows(shape: ZYX, chunk: ZYX, n_chunks: ZYX | None) -> None:
    shard = cast("ZYX | None", n_chunks and tuple(n * size for n, size in zip(n_chunks, chunk, strict=True)))
    (level,) = target_levels(Layout(levels=(Level(shape=shape, chunk_shape=chunk, shard_shape=shard),)))
    for size, cut in zip(shape, level.chunk_shape, strict=True):
        assert min(size, cut) <= 256
        assert min(size, 16) <= cut
    assert level.shard_shape is None or not any(n % m for n, m in zip(level.shard_shape, level.chunk_shape, strict=True))


@pytest.mark.parametrize("shard", [None, (64, 64, 64)], ids=["unsharded", "sharded"])
def test_labels_of_pages_are_cut_into_cubes(tmp_path: Path, shard: ZYX | None) -> None:
    voxels = noise((40, 70, 70))
    image = write_image(tmp_path / "v.zarr", [voxels], chunk=(1, 64, 64), shard=shard)
    source = open_source(image)
    label = create_label(source, "mito")
    assert label.levels[0].chunk_shape == (64, 64, 64)
    assert label.levels[0].shard_shape == shard
    assert label.write_shape == target_write_shape(source, None)
    write_all(label, voxels)
    label.finish({})
    validated(image)
    np.testing.assert_array_equal(pixels(label.path / "0"), voxels)


def test_a_coarser_level_is_cut_by_its_own_size(tmp_path: Path) -> None:
    image = three_levels(tmp_path / "v.zarr")
    (image / "s2" / "zarr.json").unlink()
    zarr.create_array(str(image), name="s2", data=VOXELS[::4, ::4, ::4], chunks=(1, 10, 9), overwrite=True)
    label = create_label(open_source(image), "mito")
    assert [level.chunk_shape for level in label.layout.levels] == [CHUNK, CHUNK, (64, 64, 64)]


# --- a bare array


def test_a_bare_array_says_where_it_lies(tmp_path: Path) -> None:
    source = a_source(tmp_path / "v.zarr", "0.5")
    target = create_image(tmp_path / "out.zarr", like=source, content="image", target_format="zarr")
    assert zarr.open_array(str(target.path), mode="r").attrs.asdict() == {"kdunet": {"state": "unfinished"}}
    with pytest.raises(VolumeError, match=r"out\.zarr is an output of kdunet that was not finished"):
        open_labels(target.path)
    write_all(target, VOXELS)
    for _ in range(2):
        target.finish(ABOUT)
    array = zarr.open_array(str(target.path), mode="r")
    np.testing.assert_array_equal(array[...], VOXELS)
    assert array.metadata.dimension_names == ("z", "y", "x")
    assert array.attrs.asdict() == {
        "units": ["nanometer"] * 3,
        "voxel_size": [40, 4, 4],
        "translation": [7, 100, -3],
        "kdunet": {**ABOUT, "state": "finished"},
    }


def test_formats_replace_each_other_only_when_asked(tmp_path: Path) -> None:
    source = a_source(tmp_path / "v.zarr", "0.5")
    for target_format in ("zarr", "ome-zarr-0.4", "zarr", "ome-zarr-0.5"):
        target = create_image(
            tmp_path / "out.zarr", like=source, content="mask", target_format=cast("Any", target_format), overwrite=True
        )
        write_all(target)
        target.finish(ABOUT)
        with pytest.raises(TargetExists, match=r"out\.zarr holds a finished output"):
            create_image(target.path, like=source, content="mask")
    validated(target.path)


def test_an_array_of_others_is_never_replaced(tmp_path: Path) -> None:
    source = a_source(tmp_path / "v.zarr", "0.5")
    zarr.create_array(str(tmp_path / "out.zarr"), data=VOXELS)
    before = hashes(tmp_path)
    with pytest.raises(TargetExists, match="was not made by kdunet"):
        create_image(tmp_path / "out.zarr", like=source, content="mask", target_format="zarr", overwrite=True)
    assert hashes(tmp_path) == before


# --- TIFF


def a_tiff(folder: Path, source: Any = None, voxels: UInt8Array = MASK, **options: Any) -> Path:
    source = source or a_source(folder / "v.zarr", "0.5")
    target = create_image(folder / "out.tif", like=source, content="mask", **options)
    write_all(target, voxels)
    target.finish(ABOUT)
    return target.path


def libtiff(path: Path) -> npt.NDArray[np.uint8]:
    """All pages as Pillow reads them."""
    with Image.open(path) as image:
        pages = []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            pages.append(np.asarray(image))
    return np.stack(pages)


def ome_xml(path: Path) -> ElementTree.Element:
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_ome
        return ElementTree.fromstring(cast("str", tiff.ome_metadata))


def test_a_tiff_is_read_alike_by_others(tmp_path: Path) -> None:
    voxels = noise((19, 300, 530))  # several tiles, cut at the far sides
    image = write_image(tmp_path / "v.zarr", [voxels], chunk=(16, 64, 64))
    path = a_tiff(tmp_path, open_source(image), voxels)
    np.testing.assert_array_equal(tifffile.imread(path), voxels)
    np.testing.assert_array_equal(libtiff(path), voxels)
    with tifffile.TiffFile(path) as tiff:
        assert (tiff.series[0].axes, tiff.is_bigtiff) == ("ZYX", False)
        assert {(page.compression, page.tile) for page in tiff.pages} == {(tifffile.COMPRESSION.ADOBE_DEFLATE, (256, 256))}


def test_one_slice_is_one_page(tmp_path: Path) -> None:
    image = write_image(tmp_path / "v.zarr", [VOXELS[:1]], chunk=CHUNK)
    path = a_tiff(tmp_path, open_source(image), MASK[:1])
    np.testing.assert_array_equal(libtiff(path), MASK[:1])


@pytest.mark.parametrize(
    ("unit", "want"), [("nanometer", "nm"), ("micrometer", "µm"), ("angstrom", "Å"), (None, "reference frame")]
)
def test_a_tiff_says_where_it_lies(tmp_path: Path, unit: str | None, want: str) -> None:
    path = a_tiff(tmp_path, open_source(three_levels(tmp_path / "v.zarr", unit=unit)))
    (pixels_element,) = (element for element in ome_xml(path).iter() if element.tag.endswith("Pixels"))
    planes = [element for element in pixels_element if element.tag.endswith("Plane")]
    for axis, size in zip("ZYX", (40, 4, 4), strict=True):
        assert float(pixels_element.attrib[f"PhysicalSize{axis}"]) == size
        assert pixels_element.attrib[f"PhysicalSize{axis}Unit"] == want
        assert {plane.attrib[f"Position{axis}Unit"] for plane in planes} == {want}
    positions = [[float(plane.attrib[f"Position{axis}"]) for axis in "ZYX"] for plane in planes]
    assert positions == [[7 + 40 * z, 100, -3] for z in range(SHAPE[0])]


@pytest.mark.parametrize("target_format", FORMATS)
def test_a_coarser_level_alone_gives_an_output_that_lies_where_it_lies(tmp_path: Path, target_format: TargetFormat) -> None:
    three_levels(tmp_path / "v.zarr")
    source = open_source(tmp_path / "v.zarr", Selection(level=1))
    target = create_image(out_path(tmp_path, target_format), like=source, content="mask", target_format=target_format)
    write_all(target, MASK[::2, ::2, ::2])
    target.finish({})
    level = target.layout.levels[0]
    assert (level.shape, level.scale, level.translation) == ((10, 20, 18), (80, 8, 8), (27, 102, -1))
    written = open_source(target.path)
    assert written.shape == level.shape
    if target_format.startswith("ome-zarr"):
        validated(target.path)
        found = [(level.shape, level.scale, level.translation) for level in written.layout.levels]
        assert found == [((10, 20, 18), (80, 8, 8), (27, 102, -1)), ((5, 10, 9), (160, 16, 16), (67, 106, 3))]
    if target_format != "zarr":
        assert written.voxel_size_nm == (80, 8, 8)


def test_a_tiff_without_voxel_size_claims_none(tmp_path: Path) -> None:
    assert "PhysicalSize" not in ElementTree.tostring(
        ome_xml(a_tiff(tmp_path, a_source(tmp_path / "v.zarr", "plain"))), "unicode"
    )


def test_the_same_run_gives_the_same_tiff_and_says_what_it_was(tmp_path: Path) -> None:
    first = a_tiff(tmp_path).read_bytes()
    path = a_tiff(tmp_path, open_source(tmp_path / "v.zarr"), overwrite=True)
    assert path.read_bytes() == first
    (description,) = (element.text for element in ome_xml(path).iter() if element.tag.endswith("Description"))
    assert json.loads(description or "") == {"kdunet": {**ABOUT, "state": "finished"}}


def test_until_it_is_finished_there_is_no_tiff(tmp_path: Path) -> None:
    source = a_source(tmp_path / "v.zarr", "0.5")
    target = create_image(tmp_path / "out.tif", like=source, content="mask")
    write_all(target)
    assert not target.path.exists()
    assert target.store == tmp_path / ".out.tif.kdunet"
    assert mark_of(target.store) == {"state": "unfinished"}
    again = create_image(tmp_path / "out.tif", like=source, content="mask")  # as a run that was killed starts over
    assert not again.result().read(WHOLE).any()
    write_all(again)
    again.finish({})
    again.finish({})
    assert not again.store.exists()
    np.testing.assert_array_equal(again.result().read(WHOLE), MASK)


def test_a_finished_tiff_stays_unless_it_is_to_be_overwritten(tmp_path: Path) -> None:
    source = a_source(tmp_path / "v.zarr", "0.5")
    path = a_tiff(tmp_path, source)
    with pytest.raises(TargetExists, match=r"out\.tif holds a finished output; add --overwrite"):
        create_image(path, like=source, content="mask")
    assert path.exists()
    create_image(path, like=source, content="mask", overwrite=True)
    assert not path.exists()


def _imagej(path: Path) -> None:
    tifffile.imwrite(path, MASK, imagej=True)


def _saved_anew(path: Path) -> None:
    voxels, metadata = tifffile.imread(a_tiff(path.parent)), {"axes": "ZYX", "Description": '{"kdunet": {"state": "finished"}}'}
    tifffile.imwrite(path, voxels, ome=True, software="Fiji", photometric="minisblack", metadata=metadata)


def _garbage(path: Path) -> None:
    path.write_bytes(b"II*\0garbage")


@pytest.mark.parametrize("make", [_imagej, _saved_anew, _garbage])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_tiff_of_others_is_never_replaced(tmp_path: Path, make: Any, overwrite: bool) -> None:
    source = a_source(tmp_path / "v.zarr", "0.5") if make is not _saved_anew else None
    make(tmp_path / "out.tif")
    before = hashes(tmp_path)
    with pytest.raises(TargetExists, match=r"out\.tif exists and was not made by kdunet, so it is never replaced"):
        create_image(tmp_path / "out.tif", like=source or open_source(tmp_path / "v.zarr"), content="mask", overwrite=overwrite)
    assert hashes(tmp_path) == before


def test_a_folder_is_no_tiff(tmp_path: Path) -> None:
    source = a_source(tmp_path / "v.zarr", "0.5")
    (tmp_path / "out.tif").mkdir()
    with pytest.raises(TargetExists, match=r"out\.tif is a folder, and a TIFF is a file; choose another name"):
        create_image(tmp_path / "out.tif", like=source, content="mask")


def test_what_hides_beside_a_tiff_is_not_replaced_if_it_is_not_ours(tmp_path: Path) -> None:
    source = a_source(tmp_path / "v.zarr", "0.5")
    (tmp_path / ".out.tif.kdunet").mkdir()
    (tmp_path / ".out.tif.kdunet" / "notes.txt").write_text("notes")
    with pytest.raises(TargetExists, match=r"\.out\.tif\.kdunet exists and was not made by kdunet"):
        create_image(tmp_path / "out.tif", like=source, content="mask", overwrite=True)


def streamed(folder: Path, shape: ZYX) -> tuple[Path, list[Box]]:
    """A TIFF written of noise, and what was read of it at a time."""
    voxels, boxes = noise(shape), []

    def read(box: Box) -> UInt8Array:
        boxes.append(box)
        return voxels[box.slices_in(Box.of_shape(shape))]

    layout = Layout(levels=(Level(shape=shape, chunk_shape=(8, 512, 512)),))
    write_tiff(folder / "out.tif", folder / "beside", read, layout, name="out", about={})
    np.testing.assert_array_equal(tifffile.imread(folder / "out.tif"), voxels)
    return folder / "out.tif", boxes


@pytest.mark.parametrize(("most", "depth"), [(2**30, 8), (3000, 3), (10, 1)])
def test_a_tiff_is_read_in_slabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, depth: int) -> None:
    monkeypatch.setattr("kdunet_infer.volume.tiff_target._SLAB_BYTES", most)
    _, boxes = streamed(tmp_path, (20, 40, 25))
    assert [box.shape[0] for box in boxes] == [depth] * (20 // depth) + [20 % depth] * (20 % depth > 0)


def test_a_tiff_is_big_where_offsets_may_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for most, is_big in ((20 * 40 * 25, False), (20 * 40 * 25 - 1, True)):
        monkeypatch.setattr("kdunet_infer.volume.tiff_target._CLASSIC_BYTES", most)
        with tifffile.TiffFile(streamed(tmp_path, (20, 40, 25))[0]) as tiff:
            assert tiff.is_bigtiff == is_big


def test_an_interrupted_write_leaves_no_tiff(tmp_path: Path) -> None:
    def killed(box: Box) -> UInt8Array:
        if box.begin[0]:
            raise KeyboardInterrupt
        return np.zeros(box.shape, np.uint8)

    layout = Layout(levels=(Level(shape=(20, 40, 25), chunk_shape=(8, 512, 512)),))
    with pytest.raises(KeyboardInterrupt):
        write_tiff(tmp_path / "out.tif", tmp_path / "beside", killed, layout, name="out", about={})
    assert list(tmp_path.iterdir()) == []


def test_what_the_metadata_say_of_sampling(tmp_path: Path) -> None:
    source = a_source(tmp_path / "v.zarr", "0.5")
    contents: tuple[tuple[Literal["mask", "image"], str], ...] = (("mask", "majority"), ("image", "mean"))
    for content, method in contents:
        target = create_image(tmp_path / f"{content}.zarr", like=source, content=content)
        target.finish({})
        assert ome_of(target.path)["multiscales"][0]["type"] == method
