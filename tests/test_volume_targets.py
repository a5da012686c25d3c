"""Writing volumes: ome-zarr-models and plain zarr say whether what is on disk is right, hashes what was left alone."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import ome_zarr_models
import pytest
import tifffile
import zarr
from ome_zarr_models.exceptions import ValidationWarning
from volume_files import halved, hashes, write_image

from kdunet_infer.blockwise import UInt8Array
from kdunet_infer.errors import GeometryError, KdunetError, TargetExists, VolumeError
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.testing import noise
from kdunet_infer.volume import (
    Content,
    VolumeSource,
    VolumeTarget,
    check_label,
    create_image,
    create_label,
    create_volume,
    open_labels,
    open_source,
)
from kdunet_infer.volume.ome import label_names
from kdunet_infer.volume.ownership import remove

Version = Literal["0.4", "0.5"]
CHUNK: ZYX = (16, 16, 16)
"""The shortest that outputs keep: tests of many files need no large volume then."""
SHAPE: ZYX = (20, 40, 36)
WHOLE = Box.of_shape(SHAPE)
VOXELS = noise(SHAPE)
MASK = (VOXELS > 128).astype(np.uint8)


def validated(path: Path) -> list[str]:
    """Names of the labels listed at `path`, with all metadata read by ome-zarr-models; what is invalid raises."""
    with warnings.catch_warnings(action="error", category=ValidationWarning):
        labels = getattr(ome_zarr_models.open_ome_zarr(str(path)), "labels", None)
        names = labels.attributes.model_dump().get("ome", labels.attributes.model_dump())["labels"] if labels else []
        for name in names:  # for 0.4, it does not descend by itself
            ome_zarr_models.open_ome_zarr(str(path / "labels" / name))
    return cast("list[str]", names)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_the_validator_looks_into_labels(tmp_path: Path, version: Version) -> None:
    image = three_levels(tmp_path / "v.zarr", version)
    shutil.rmtree(finished_label(open_source(image)) / "2")
    with pytest.raises(Exception, match="2"):
        validated(image)


def ome_of(path: Path) -> dict[str, Any]:
    """The OME-Zarr metadata of a group, as the file says it."""
    if (path / "zarr.json").exists():
        return cast("dict[str, Any]", json.loads((path / "zarr.json").read_text())["attributes"].get("ome", {}))
    return cast("dict[str, Any]", json.loads((path / ".zattrs").read_text()))


def mark_of(path: Path) -> Any:
    """What the group says about kdunet."""
    return zarr.open_group(str(path), mode="r").attrs["kdunet"]


def pixels(path: Path) -> npt.NDArray[Any]:
    array = zarr.open_array(str(path), mode="r")
    return np.asarray(array[...])


def three_levels(path: Path, version: Version = "0.5", **options: Any) -> Path:
    """An anisotropic image of three levels, off the origin."""
    coarse = halved(VOXELS)
    return write_image(
        path,
        [VOXELS, coarse, halved(coarse)],
        version=version,
        chunk=CHUNK,
        scales=[(40, 4, 4), (80, 8, 8), (160, 16, 16)],
        translations=[(7, 100, -3), (27, 102, -1), (67, 106, 3)],
        **options,
    )


def write_all(target: VolumeTarget, voxels: UInt8Array = MASK) -> None:
    """Block by block, as a run does."""
    whole = Box.of_shape(target.shape)
    for box in whole.split(target.write_shape):
        target.write_box(box, voxels[box.slices_in(whole)])


def finished_label(source: VolumeSource, name: str = "mito", **options: Any) -> Path:
    target = create_label(source, name, **options)
    write_all(target)
    target.finish({"model": "m", "version": 1})
    return target.path


# --- labels


def test_finishing_twice_lists_a_label_once(tmp_path: Path) -> None:
    target = create_label(open_source(three_levels(tmp_path / "v.zarr")), "mito")
    write_all(target)
    for _ in range(2):
        target.finish({})
    group = zarr.open_group(str(tmp_path / "v.zarr" / "labels"), mode="r")
    assert label_names(group.attrs.asdict()) == ["mito"]


KINDS: dict[str, Callable[[Path], Path]] = {
    "0.4": lambda p: three_levels(p, "0.4"),
    "0.5": lambda p: three_levels(p),
    "0.5-sharded": lambda p: three_levels(p, shard=(16, 32, 32)),
    "0.5-one-level-no-unit": lambda p: write_image(p, [VOXELS], unit=None, chunk=CHUNK),
    "0.4-tczyx": lambda p: write_image(p, [VOXELS[None, None]], version="0.4", axes="tczyx", chunk=CHUNK),
    "0.5-shared-transform": lambda p: three_levels(
        p, shared=[{"type": "scale", "scale": [2, 3, 4]}, {"type": "translation", "translation": [1, 2, 3]}]
    ),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An image of each kind."""
    return cast("Path", request.param(tmp_path / "v.zarr"))


def test_a_label_is_valid_listed_and_holds_what_was_written(image: Path) -> None:
    validated(image)
    label = finished_label(open_source(image))
    assert label == image / "labels" / "mito"
    assert validated(image) == ["mito"]
    np.testing.assert_array_equal(pixels(label / "0"), MASK)
    np.testing.assert_array_equal(open_labels(label).read(WHOLE), MASK)
    assert mark_of(label) == {"model": "m", "version": 1, "state": "finished"}


def test_a_label_lies_where_its_image_lies(image: Path) -> None:
    source = open_source(image)
    written = open_source(finished_label(source))
    assert written.layout == source.layout
    assert written.chunk_shape == source.chunk_shape
    assert ome_of(written.path)["image-label"]["source"] == {"image": "../../"}
    assert [color["label-value"] for color in ome_of(written.path)["image-label"]["colors"]] == [1]


def test_transforms_are_written_by_digits(tmp_path: Path) -> None:
    shared = [{"type": "scale", "scale": [2, 3, 4]}, {"type": "translation", "translation": [1, 2, 3]}]
    label = finished_label(open_source(three_levels(tmp_path / "v.zarr", shared=shared)))
    (entry,) = ome_of(label)["multiscales"]
    assert entry["axes"] == [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    assert [dataset["coordinateTransformations"] for dataset in entry["datasets"][:2]] == [
        [{"type": "scale", "scale": [80, 12, 16]}, {"type": "translation", "translation": [15, 302, -9]}],
        [{"type": "scale", "scale": [160, 24, 32]}, {"type": "translation", "translation": [55, 308, -1]}],
    ]


def test_zarr_format_and_separator_are_those_of_the_image(image: Path) -> None:
    label = finished_label(open_source(image))
    is_v3 = (image / "zarr.json").exists()
    array = zarr.open_array(str(label / "0"), mode="r")
    assert array.metadata.zarr_format == (3 if is_v3 else 2)
    assert (label / "0" / ("c/0/0/0" if is_v3 else "0/0/0")).is_file()
    if is_v3:
        assert array.metadata.dimension_names == ("z", "y", "x")
    for file in (".zgroup", ".zattrs", "zarr.json"):
        assert (label / file).exists() == (image / file).exists()


def test_nothing_else_in_the_image_changes(image: Path) -> None:
    before = hashes(image)
    finished_label(open_source(image), "mito")
    finished_label(open_source(image), "nuclei")
    mito = hashes(image / "labels" / "mito")
    finished_label(open_source(image), "nuclei", overwrite=True)
    after = hashes(image)
    assert {name: after[name] for name in before} == before
    assert hashes(image / "labels" / "mito") == mito
    assert all(name.startswith("labels/") for name in after.keys() - before.keys())


def test_labels_of_others_stay_listed(tmp_path: Path) -> None:
    image = three_levels(tmp_path / "v.zarr")
    listed = {"version": "0.5", "labels": ["theirs"], "other": 1}
    zarr.create_group(str(image / "labels"), attributes={"ome": listed, "note": "keep"})
    three_levels(image / "labels" / "theirs", extra={"image-label": {}})
    before = hashes(image / "labels" / "theirs")
    finished_label(open_source(image))
    finished_label(open_source(image), overwrite=True)
    attributes = zarr.open_group(str(image / "labels"), mode="r").attrs.asdict()
    assert attributes == {"note": "keep", "ome": {**listed, "labels": ["theirs", "mito"]}}
    assert hashes(image / "labels" / "theirs") == before
    validated(image)


def test_records_of_a_run_do_not_make_a_label_invalid(image: Path) -> None:
    target = create_label(open_source(image), "mito")
    (target.path / ".kdunet").mkdir()
    (target.path / ".kdunet" / "ledger").write_text("1")
    write_all(target)
    target.finish({})
    validated(image)
    create_label(open_source(image), "mito", overwrite=True)
    assert not (target.path / ".kdunet").exists()


# --- pyramids


def halves(voxels: UInt8Array) -> npt.NDArray[np.float64]:
    """Means over 2 x 2 x 2 voxels, fewer at the far faces."""
    padded = np.pad(voxels.astype(float), [(0, n % 2) for n in voxels.shape], constant_values=np.nan)
    z, y, x = (n // 2 for n in padded.shape)
    return cast("npt.NDArray[np.float64]", np.nanmean(padded.reshape(z, 2, y, 2, x, 2), axis=(1, 3, 5)))


def test_a_mask_is_halved_by_majority_and_an_image_by_the_mean(image: Path, tmp_path: Path) -> None:
    source = open_source(image)
    label = finished_label(source)
    probabilities = create_image(tmp_path / "p.zarr", like=source, content="image")
    write_all(probabilities, VOXELS)
    probabilities.finish({})
    mask, mean = MASK, VOXELS
    for index in range(1, len(source.layout.levels)):
        mask = (halves(mask) > 0.5).astype(np.uint8)
        mean = np.floor(halves(mean) + 0.5).astype(np.uint8)
        np.testing.assert_array_equal(pixels(label / str(index)), mask)
        np.testing.assert_array_equal(pixels(tmp_path / "p.zarr" / str(index)), mean)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_pyramid_of_picked_voxels_gets_labels_of_picked_voxels(tmp_path: Path, version: Version) -> None:
    """Every second voxel along y and x, no offset between the levels: averaging would move labels by half a voxel."""
    levels = [VOXELS[:, ::step, ::step] for step in (1, 2, 4, 8, 16)]
    scales = [(40, 4 * step, 4 * step) for step in (1, 2, 4, 8, 16)]
    image = write_image(
        tmp_path / "v.zarr", levels, version=version, chunk=CHUNK, scales=scales, translations=[(7, 100, -3)] * 5
    )
    source = open_source(image)
    label = finished_label(source)
    validated(image)
    for index, step in enumerate((1, 2, 4, 8, 16)):
        np.testing.assert_array_equal(pixels(label / str(index)), MASK[:, ::step, ::step])
    assert open_source(label).layout == source.layout
    assert ome_of(label)["multiscales"][0]["type"] == "stride"


@pytest.mark.parametrize("roi", [Box((3, 17, 5), (9, 30, 21)), Box((19, 39, 35), (20, 40, 36)), Box((0, 0, 0), (99, 99, 99))])
def test_levels_of_a_roi_are_those_of_the_whole(tmp_path: Path, roi: Box) -> None:
    source = open_source(three_levels(tmp_path / "v.zarr", shard=(16, 32, 32)))
    inside = roi.intersection(WHOLE)
    for name, finish in (("whole", {}), ("part", {"roi": roi})):
        target = create_label(source, name)
        target.write_box(inside, MASK[inside.slices_in(WHOLE)])
        target.finish({}, **finish)
    whole, part = (hashes(tmp_path / "v.zarr" / "labels" / name) for name in ("whole", "part"))
    assert {name: whole[name] for name in part if name != "zarr.json"} == {k: v for k, v in part.items() if k != "zarr.json"}
    for index in range(3):
        whole_voxels, part_voxels = (pixels(tmp_path / "v.zarr/labels" / name / str(index)) for name in ("whole", "part"))
        np.testing.assert_array_equal(whole_voxels, part_voxels)
    validated(tmp_path / "v.zarr")


# --- stand-alone volumes


@pytest.mark.parametrize("content", ["mask", "image"])
def test_an_image_is_valid_and_like_its_source(image: Path, tmp_path: Path, content: Content) -> None:
    source = open_source(image)
    before = hashes(image)
    target = create_image(tmp_path / "new" / "out.zarr", like=source, content=content)
    write_all(target)
    target.finish({"threshold": 0.5})
    validated(target.path)
    written = open_source(target.path)
    assert written.layout == source.layout
    np.testing.assert_array_equal(written.read_box(WHOLE), MASK)
    assert ("image-label" in ome_of(target.path)) == (content == "mask")
    assert mark_of(target.path) == {"threshold": 0.5, "state": "finished"}
    assert hashes(image) == before


@pytest.mark.parametrize("suffix", [".tif", ".zarr"])
def test_a_source_without_metadata_gives_ome_zarr_05(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"raw{suffix}"
    if suffix == ".tif":
        tifffile.imwrite(path, VOXELS, photometric="minisblack")
    else:
        zarr.create_array(str(path), data=VOXELS, chunks=CHUNK, zarr_format=2)
    target = create_image(tmp_path / "out.zarr", like=open_source(path), content="mask")
    write_all(target)
    target.finish({})
    validated(target.path)
    layout = open_source(target.path).layout
    assert (layout.version, layout.zarr_format, layout.units) == ("0.5", 3, (None, None, None))
    assert [(level.shape, level.scale, level.translation) for level in layout.levels] == [(SHAPE, (1, 1, 1), (0, 0, 0))]
    assert target.write_shape == ((64, 128, 128) if suffix == ".tif" else CHUNK)


def test_a_new_volume(tmp_path: Path) -> None:
    target = create_volume(
        tmp_path / "new.zarr",
        SHAPE,
        chunk_shape=CHUNK,
        shard_shape=(16, 32, 32),
        voxel_size_nm=(50, 4.6, 4.6),
        n_levels=3,
        name="phantom",
    )
    assert target.write_shape == (16, 32, 32)
    write_all(target, VOXELS)
    target.finish({"seed": 7})
    validated(target.path)
    source = open_source(target.path)
    np.testing.assert_array_equal(source.read_box(WHOLE), VOXELS)
    assert source.group == target.path, "it can take labels"
    assert ome_of(target.path)["multiscales"][0]["name"] == "phantom"
    assert source.layout.units == ("nanometer",) * 3
    assert [level.shape for level in source.layout.levels] == [SHAPE, (10, 20, 18), (5, 10, 9)]
    assert [level.scale for level in source.layout.levels] == [(50, 4.6, 4.6), (100, 9.2, 9.2), (200, 18.4, 18.4)]
    # The centre of a coarser voxel is the mean of the centres of its finer ones.
    assert source.layout.levels[1].translation == pytest.approx((25, 2.3, 2.3))
    assert source.layout.levels[2].translation == pytest.approx((75, 6.9, 6.9))


def test_a_new_volume_without_voxel_size(tmp_path: Path) -> None:
    target = create_volume(tmp_path / "new.zarr", SHAPE, chunk_shape=CHUNK)
    target.finish({})
    validated(target.path)
    layout = open_source(target.path).layout
    assert (layout.units, layout.levels[0].scale) == ((None, None, None), (1, 1, 1))
    assert ome_of(target.path)["multiscales"][0]["name"] == "new"
    assert not pixels(target.path / "0").any()


def test_a_box_off_the_grid_of_files_keeps_its_neighbours(tmp_path: Path) -> None:
    target = create_volume(tmp_path / "new.zarr", SHAPE, chunk_shape=CHUNK, shard_shape=(16, 32, 32))
    want = np.zeros(SHAPE, np.uint8)
    for box in (Box((1, 2, 3), (17, 19, 35)), Box((0, 19, 1), (20, 40, 36))):
        target.write_box(box, VOXELS[box.slices_in(WHOLE)])
        want[box.slices_in(WHOLE)] = VOXELS[box.slices_in(WHOLE)]
    np.testing.assert_array_equal(pixels(target.path / "0"), want)


# --- interrupted, finished, and not ours


def test_until_it_is_finished_it_looks_like_nothing(image: Path, tmp_path: Path) -> None:
    source = open_source(image)
    label, out = create_label(source, "mito"), create_image(tmp_path / "o.zarr", like=source, content="mask")
    for target in (label, out):
        write_all(target)
        assert mark_of(target.path) == {"state": "unfinished"}
        assert "multiscales" not in ome_of(target.path)
        with pytest.raises(VolumeError, match="was not finished"):
            open_labels(target.path)
    assert not (image / "labels" / "zarr.json").exists()
    assert not (image / "labels" / ".zattrs").exists()
    validated(image)


def test_the_label_is_listed_after_all_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = three_levels(tmp_path / "v.zarr")
    target = create_label(open_source(image), "mito")
    write_all(target)
    seen = []
    really = os.replace

    def stop(beside: Path, file: Path) -> None:
        if Path(file).parent.name == "labels":
            label = target.path
            seen.append((mark_of(label)["state"], "multiscales" in ome_of(label), pixels(label / "2").shape))
            raise KeyboardInterrupt
        really(beside, file)

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        target.finish({})
    assert seen == [("finished", True, (5, 10, 9))]
    monkeypatch.undo()
    target.finish({})
    validated(image)
    assert ome_of(image / "labels")["labels"] == ["mito"]


def test_an_unfinished_output_is_started_over(image: Path) -> None:
    source = open_source(image)
    write_all(create_label(source, "mito"))
    again = create_label(source, "mito")
    (again.path / "zarr.json.0123.partial").write_text("")  # what zarr leaves when it is killed
    again = create_label(source, "mito")
    assert not pixels(again.path / "0").any()
    assert not (again.path / "zarr.json.0123.partial").exists()


def test_a_finished_output_stays_unless_it_is_to_be_overwritten(image: Path, tmp_path: Path) -> None:
    source = open_source(image)
    label = finished_label(source)
    with pytest.raises(TargetExists, match=r"v\.zarr/labels/mito holds a finished output; add --overwrite to replace it"):
        create_label(source, "mito")
    np.testing.assert_array_equal(pixels(label / "0"), MASK)
    create_label(source, "mito", overwrite=True)
    assert ome_of(image / "labels")["labels"] == [], "what is unfinished is not listed"
    assert not pixels(label / "0").any()

    create_image(tmp_path / "o.zarr", like=source, content="mask").finish({})
    with pytest.raises(TargetExists, match=r"o\.zarr holds a finished output"):
        create_image(tmp_path / "o.zarr", like=source, content="mask")
    create_image(tmp_path / "o.zarr", like=source, content="image", overwrite=True)


def test_an_interrupted_removal_leaves_nothing_that_looks_finished(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    label = finished_label(open_source(image))

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(label)
    monkeypatch.undo()
    assert mark_of(label) == {"state": "unfinished"}
    create_label(open_source(image), "mito")


def _foreign_label(image: Path) -> Path:
    return write_image(image / "labels" / "mito", [MASK], extra={"image-label": {}})


def _file(image: Path) -> Path:
    (image / "labels").mkdir()
    (image / "labels" / "mito").write_text("notes")
    return image / "labels" / "mito"


def _folder_of_files(image: Path) -> Path:
    (image / "labels" / "mito").mkdir(parents=True)
    (image / "labels" / "mito" / "notes.txt").write_text("notes")
    return image / "labels" / "mito"


def _ours_with_something_added(image: Path) -> Path:
    label = finished_label(open_source(image))
    (label / "notes.txt").write_text("notes")
    return label


def _link_to_ours(image: Path) -> Path:
    label = finished_label(open_source(image))
    label.rename(image.parent / "moved")
    label.symlink_to(image.parent / "moved")
    return label


@pytest.mark.parametrize(
    "make",
    [_foreign_label, _file, _folder_of_files, _ours_with_something_added, _link_to_ours],
    ids=["label-of-others", "file", "folder", "ours-with-more", "link"],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_not_ours_is_never_replaced(tmp_path: Path, make: Callable[[Path], Path], overwrite: bool) -> None:
    image = three_levels(tmp_path / "v.zarr")
    label = make(image)
    before = hashes(tmp_path)
    with pytest.raises(TargetExists, match=r"labels/mito exists and was not made by kdunet, so it is never replaced; choose"):
        create_label(open_source(image), "mito", overwrite=overwrite)
    assert label.exists()
    assert hashes(tmp_path) == before


def test_a_volume_of_ours_is_replaced_with_its_labels_only_if_all_of_them_are_ours(tmp_path: Path) -> None:
    target = create_volume(tmp_path / "new.zarr", SHAPE, chunk_shape=CHUNK)
    target.finish({})
    finished_label(open_source(target.path))
    create_volume(target.path, SHAPE, chunk_shape=CHUNK, overwrite=True).finish({})
    assert not (target.path / "labels").exists()
    finished_label(open_source(target.path))
    zarr.create_group(str(target.path / "labels" / "by-hand"), zarr_format=3)
    before = hashes(tmp_path)
    with pytest.raises(TargetExists, match="never replaced"):
        create_volume(target.path, SHAPE, chunk_shape=CHUNK, overwrite=True)
    assert hashes(tmp_path) == before


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    (tmp_path / "new.zarr").mkdir()
    create_volume(tmp_path / "new.zarr", SHAPE, chunk_shape=CHUNK).finish({})
    validated(tmp_path / "new.zarr")


# --- what is refused, and how it is said


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../v", "a\\b", "a b", "zarr.json", "mito\n", "é"])
def test_label_names_are_safe(tmp_path: Path, name: str) -> None:
    image = three_levels(tmp_path / "v.zarr")
    before = hashes(tmp_path)
    with pytest.raises(VolumeError, match=r"cannot be; use letters, digits, '_', '-' and '\.', first a letter or digit"):
        create_label(open_source(image), name)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize(("name", "says"), [("a/b", "cannot be; use letters"), ("mito", "add --overwrite"), ("other", None)])
def test_what_a_label_would_be_refused_for_is_known_before(tmp_path: Path, name: str, says: str | None) -> None:
    source = open_source(three_levels(tmp_path / "v.zarr"))
    finished_label(source)
    before = hashes(tmp_path)
    with pytest.raises(KdunetError, match=says) if says else nullcontext():
        check_label(source, name)
    assert hashes(tmp_path) == before


def test_labels_need_an_image_at_full_resolution(tmp_path: Path) -> None:
    image = three_levels(tmp_path / "v.zarr")
    tifffile.imwrite(tmp_path / "raw.tif", VOXELS, photometric="minisblack")
    label = finished_label(open_source(image))
    for path in (tmp_path / "raw.tif", image / "s1", label):
        with pytest.raises(VolumeError, match=r"not an OME-Zarr image at full resolution.*new volume with -o OUT\.zarr"):
            create_label(open_source(path), "mito")


def test_an_output_never_overlaps_its_source_by_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = three_levels(tmp_path / "folder" / "v.zarr")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    before = hashes(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "link" / "v.zarr" / "x.zarr", Path("folder/v.zarr/x.zarr"), Path("folder/../folder/v.zarr")):
        with pytest.raises(VolumeError, match="overlaps the source"):
            create_image(path, like=open_source(image), content="mask", overwrite=True)
    assert hashes(tmp_path / "folder") == before


@pytest.mark.parametrize("source", ["", "s0", "labels/mito"], ids=["image", "level", "label"])
@pytest.mark.parametrize("inside", [".", "..", "s0/x.zarr", "labels/x.zarr", "x.zarr"])
def test_an_output_never_overlaps_its_source(tmp_path: Path, source: str, inside: str) -> None:
    image = three_levels(tmp_path / "parent.zarr" / "v.zarr")
    finished_label(open_source(image))
    before = hashes(tmp_path)
    for path in (image / inside, (image / inside).resolve()):
        with pytest.raises(VolumeError, match=r"overlaps the source .*v\.zarr, which is never changed; choose a path outside"):
            create_image(path, like=open_source(image / source), content="mask", overwrite=True)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("name", ["out", "out.h5"])
def test_outputs_are_zarr_or_tiff(tmp_path: Path, name: str) -> None:
    source = open_source(three_levels(tmp_path / "v.zarr"))
    with pytest.raises(VolumeError, match=r"no possible output; give a path that ends in \.zarr, or in \.tif for a TIFF stack"):
        create_image(tmp_path / name, like=source, content="mask")
    with pytest.raises(VolumeError, match=r"ends in \.zarr"):
        create_volume(tmp_path / name, SHAPE, chunk_shape=CHUNK)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize(
    ("box", "voxels", "error", "says"),
    [
        (Box((0, 0, 0), (20, 40, 37)), np.zeros((20, 40, 37), np.uint8), GeometryError, "is not inside"),
        (Box((0, 0, -1), (20, 40, 1)), np.zeros((20, 40, 2), np.uint8), GeometryError, "is not inside"),
        (WHOLE, np.zeros((1, 1, 1), np.uint8), GeometryError, r"shape \(1, 1, 1\) do not fit the box 0:20,0:40,0:36"),
        (WHOLE, np.zeros(SHAPE, np.float32), VolumeError, r"new\.zarr stores uint8 and got float32; round to uint8"),
    ],
    ids=["beyond", "before", "broadcast", "float"],
)
def test_write_box_refuses(tmp_path: Path, box: Box, voxels: Any, error: type[Exception], says: str) -> None:
    target = create_volume(tmp_path / "new.zarr", SHAPE, chunk_shape=CHUNK)
    with pytest.raises(error, match=says):
        target.write_box(box, voxels)
    assert not pixels(target.path / "0").any()


def test_a_disk_that_refuses_is_reported(tmp_path: Path) -> None:
    says = r"cannot be written \(.*Not a directory.*\); check free space and permissions, then run the same command again"
    (tmp_path / "file").write_text("")
    with pytest.raises(VolumeError, match=says):
        create_volume(tmp_path / "file" / "new.zarr", SHAPE, chunk_shape=CHUNK)

    target = create_volume(tmp_path / "new.zarr", SHAPE, chunk_shape=CHUNK, n_levels=2)
    (target.path / "0" / "c").write_text("in the way of the chunks")
    with pytest.raises(VolumeError, match=says):
        write_all(target)

    (target.path / "0" / "c").unlink()
    write_all(target)
    (target.path / "1" / "c").write_text("in the way of the coarser level")
    with pytest.raises(VolumeError, match=says):
        target.finish({})
    assert mark_of(target.path) == {"state": "unfinished"}
