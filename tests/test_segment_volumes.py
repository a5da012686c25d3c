"""Runs over volumes as labs have them: regions, grey values, levels, holes in the data, outputs of every format, cleaning."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage
import tifffile
import zarr
from small_models import small_card, unet_onnx
from volume_files import write_image

import kdunet_infer.run
import kdunet_infer.volume.scratch
from kdunet_infer.engines import create_engine
from kdunet_infer.errors import ConfigError, GeometryError, VolumeError
from kdunet_infer.geometry import Box, OpenBox, closed
from kdunet_infer.intensity import IntensityMap, for_pictures
from kdunet_infer.model import Model
from kdunet_infer.run import SegmentOptions, evaluate, segment
from kdunet_infer.testing import noise, segment_whole
from kdunet_infer.volume import create_volume, open_labels, open_source

SHAPE = (18, 61, 83)
CHUNK = (16, 16, 32)
WHOLE = Box.of_shape(SHAPE)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume.zarr"
    target = create_volume(path, SHAPE, chunk_shape=CHUNK, voxel_size_nm=(40.0, 5.0, 5.0), n_levels=2)
    target.write_box(WHOLE, noise(SHAPE))
    target.finish({})
    return path


@pytest.fixture(scope="module")
def probability(model: Model) -> npt.NDArray[np.float32]:
    return segment_whole(noise(SHAPE), create_engine("onnxruntime", model, n_threads=1), model.card)


@pytest.fixture(scope="module")
def threshold(probability: npt.NDArray[np.float32]) -> float:
    """One that splits the voxels in two halves, in the middle of the widest gap near by: no rounding crosses it."""
    near = np.sort(probability.ravel())[probability.size // 2 - 500 : probability.size // 2 + 500].astype(float)
    widest = int(np.diff(near).argmax())
    return float(near[widest : widest + 2].mean())


def voxels_of(path: str | Path) -> npt.NDArray[Any]:
    found = open_labels(path)
    return found.read(Box.of_shape(found.shape))


def attributes(path: str) -> dict[str, Any]:
    about = zarr.open_group(path, mode="r").attrs["kdunet"]
    assert isinstance(about, dict)
    return about


ROIS = {
    "one-voxel": Box((17, 60, 82), (18, 61, 83)),
    "off-every-grid": Box((3, 5, 7), (17, 42, 71)),
    "one-block": Box((0, 16, 32), (16, 32, 64)),
    "a-slice": Box((9, 0, 0), (10, 61, 83)),
    "open-ends": OpenBox((None, 33, None), (5, None, 50)),
}


@pytest.mark.parametrize("roi", ROIS.values(), ids=ROIS.keys())
def test_a_region_is_segmented_as_within_the_whole(
    volume: Path, model: Model, threshold: float, tmp_path: Path, roi: Box | OpenBox
) -> None:
    whole = voxels_of(segment(volume, tmp_path / "whole.zarr", model, SegmentOptions(threshold=threshold)).output)
    options = SegmentOptions(threshold=threshold, roi=roi, block_shape=(16, 16, 32), tile_shape=(16, 32))
    report = segment(volume, model=model, options=options)
    part = np.zeros_like(whole)
    box = roi.within(SHAPE) if isinstance(roi, OpenBox) else roi
    part[box.slices_in(WHOLE)] = whole[box.slices_in(WHOLE)]
    np.testing.assert_array_equal(voxels_of(report.output), part)
    assert (report.n_voxels, report.n_foreground) == (box.n_voxels, part.sum())
    assert report.roi == str(box) == attributes(report.output)["roi"]


def test_grey_values_of_a_region_are_mapped_as_those_of_the_whole(model: Model, tmp_path: Path) -> None:
    """A ramp along z: the percentiles of a region alone would be others."""
    ramp = noise(SHAPE).astype(np.uint16) + 300 * np.arange(SHAPE[0], dtype=np.uint16)[:, None, None]
    path = write_image(tmp_path / "ramp.zarr", [ramp], chunk=CHUNK)
    whole = segment(path, tmp_path / "whole.zarr", model)
    roi = Box((4, 0, 0), (9, 61, 83))
    part = segment(path, model=model, options=SegmentOptions(roi=roi))
    assert part.intensity == whole.intensity
    np.testing.assert_array_equal(voxels_of(part.output)[4:9], voxels_of(whole.output)[4:9])


def test_other_dtypes_come_to_the_model_by_the_mapping_that_is_stored(model: Model, threshold: float, tmp_path: Path) -> None:
    raw = noise(SHAPE).astype(np.float32) * 0.01 - 1
    path = write_image(tmp_path / "raw.zarr", [raw], chunk=CHUNK)
    report = segment(path, model=model, options=SegmentOptions(threshold=threshold))
    about = attributes(report.output)
    assert about["intensity"] == report.intensity
    assert about["grey_sample"]["n_read"] == WHOLE.n_voxels
    mapped = IntensityMap.from_dict(about["intensity"]).apply(raw, WHOLE)
    grey = write_image(tmp_path / "grey.zarr", [mapped], chunk=CHUNK)
    expected = segment(grey, model=model, options=SegmentOptions(threshold=threshold))
    assert expected.intensity["kind"] == "identity"
    np.testing.assert_array_equal(voxels_of(report.output), voxels_of(expected.output))
    assert 0.2 < report.foreground_fraction < 0.8


def test_a_given_range_maps_uint8_too(volume: Path, model: Model) -> None:
    report = segment(volume, model=model, options=SegmentOptions(intensity_range=(-10, 400)))
    assert report.intensity == {"kind": "range", "low": -10, "high": 400, "out_low": 0, "out_high": 255}


def test_a_volume_without_grey_values_is_refused_before_anything_is_written(model: Model, tmp_path: Path) -> None:
    path = write_image(tmp_path / "flat.zarr", [np.full(SHAPE, 7, np.uint16)], chunk=CHUNK)
    with pytest.raises(VolumeError, match="has the grey value 7 in every voxel"):
        segment(path, model=model)
    assert not (path / "labels").exists()


@pytest.mark.parametrize("target_format", ["ome-zarr-0.5", "ome-zarr-0.4", "zarr", "tiff"])
@pytest.mark.parametrize("roi", [None, Box((2, 5, 0), (17, 42, 71))], ids=["whole", "roi"])
def test_every_format_holds_the_same_mask(
    volume: Path, model: Model, threshold: float, tmp_path: Path, target_format: Any, roi: Box | None
) -> None:
    label = segment(volume, model=model, options=SegmentOptions(threshold=threshold, roi=roi)).output
    out = tmp_path / ("out.tif" if target_format == "tiff" else "out.zarr")
    truth = write_image(tmp_path / "truth.zarr", [noise(SHAPE, seed=3) % 2], chunk=CHUNK)
    options = SegmentOptions(threshold=threshold, target_format=target_format, roi=roi)
    report = segment(volume, out, model, options, ground_truth=truth / "s0")
    np.testing.assert_array_equal(voxels_of(out), voxels_of(label))
    assert report.output_format == target_format
    assert report.iou == evaluate(out, truth / "s0", roi=roi).confusion.iou
    if target_format == "tiff":
        np.testing.assert_array_equal(tifffile.imread(out), voxels_of(label))
    assert {path.name for path in tmp_path.iterdir()} == {"volume.zarr", "truth.zarr", out.name}


def test_probabilities_go_to_tiff_with_a_mask_in_tiff(
    volume: Path, model: Model, probability: npt.NDArray[np.float32], tmp_path: Path
) -> None:
    options = SegmentOptions(probabilities=tmp_path / "p.tif")
    segment(volume, tmp_path / "mask.tif", model, options)
    np.testing.assert_allclose(tifffile.imread(tmp_path / "p.tif"), 255 * probability, atol=0.51)


def test_a_coarser_level_goes_beside_the_volume_with_its_own_transform(
    volume: Path, model: Model, threshold: float, tmp_path: Path
) -> None:
    report = segment(volume, model=model, options=SegmentOptions(level=1, threshold=threshold))
    assert report.output == str(tmp_path / "volume-small-level1.zarr")
    assert report.voxel_size_nm == (80.0, 10.0, 10.0)
    coarse = open_source(volume / "1").read(Box.of_shape((9, 31, 42)))
    whole = segment_whole(coarse, create_engine("onnxruntime", model, n_threads=1), model.card)
    decided = np.abs(whole - threshold) > 1e-5
    np.testing.assert_array_equal(voxels_of(report.output)[decided], (whole >= np.float32(threshold))[decided])
    source, written = (open_source(path).layout.levels[0] for path in (volume / "1", report.output))
    assert (written.scale, written.translation) == (source.scale, source.translation)
    assert not (volume / "labels").exists()
    tiff = segment(volume, model=model, options=SegmentOptions(level=1, target_format="tiff"))
    assert tiff.output == str(tmp_path / "volume-small-level1.tif")


def test_the_level_that_is_meant_is_named_where_the_voxel_size_does_not_fit(volume: Path, threshold: float) -> None:
    card = dataclasses.replace(small_card(levels=2), voxel_size_nm=(80.0, 10.0, 10.0))
    model = Model.from_bytes(unet_onnx(2, 2, card).SerializeToString(), Path("coarse.onnx"))
    told: list[str] = []
    report = segment(volume, model=model, options=SegmentOptions(threshold=threshold), warn=told.append)
    assert len(told) == 1
    assert "5 x 5 nm (y, x) and the model was trained on 10 x 10 nm" in told[0]
    assert "segment --level 1" in told[0]
    assert report.warnings == tuple(told)
    other = SegmentOptions(threshold=threshold, overwrite=True, voxel_size_nm=(40, 10, 10))
    assert segment(volume, model=model, options=other).warnings == ()


def test_warnings_come_before_the_run(model: Model, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def stop(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(kdunet_infer.run, "compute_block", stop)
    (volume / "0" / "c" / "1" / "2" / "1").unlink()
    with pytest.raises(MemoryError):
        segment(volume, model=model, warn=told.append)
    assert len(told) == 1


def test_missing_chunks_are_counted_and_read_as_the_fill_value(volume: Path, model: Model) -> None:
    for name in ("0", "1"):
        (volume / "0" / "c" / "1" / "2" / name).unlink()
    report = segment(volume, model=model)
    assert (report.n_missing_chunks, report.n_chunks) == (2, 24)
    assert any("2 of 24 chunk files" in sentence and "8.3%" in sentence for sentence in report.warnings)
    assert any("fill value" in sentence for sentence in report.warnings)


def test_a_whole_volume_misses_nothing(volume: Path, model: Model) -> None:
    report = segment(volume, model=model)
    assert (report.n_missing_chunks, report.n_chunks, report.warnings) == (0, 24, ())


def cleaned_by_scipy(mask: npt.NDArray[Any], *, smooth_z: int, fill_holes: bool, min_size: int) -> npt.NDArray[Any]:
    if smooth_z:  # the mean over the window that is inside, ties to the voxel itself
        inside = scipy.ndimage.uniform_filter1d(np.ones(mask.shape), smooth_z, axis=0, mode="constant")
        share = scipy.ndimage.uniform_filter1d(mask.astype(float), smooth_z, axis=0, mode="constant") / inside
        mask = np.where(np.isclose(share, 0.5), mask, share > 0.5)
    if fill_holes:
        mask = scipy.ndimage.binary_fill_holes(mask)
    labels, _ = scipy.ndimage.label(mask, np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= max(1, min_size))[labels].astype(np.uint8)


@pytest.mark.parametrize(
    "cleaning",
    [
        {"smooth_z": 3, "fill_holes": True, "min_size": 40},
        {"smooth_z": 0, "fill_holes": False, "min_size": 9},
        {"smooth_z": 5, "fill_holes": False, "min_size": 0},
    ],
    ids=["all", "size", "smooth"],
)
@pytest.mark.parametrize("roi", [None, Box((1, 5, 0), (18, 52, 71))], ids=["whole", "roi"])
def test_cleaning_equals_cleaning_the_whole_mask(
    volume: Path, model: Model, threshold: float, tmp_path: Path, cleaning: dict[str, Any], roi: Box | None
) -> None:
    sparse = threshold + 0.02  # small objects among larger ones
    plain = SegmentOptions(threshold=sparse, probabilities=tmp_path / "p0.zarr")
    inside = (roi or WHOLE).slices_in(WHOLE)
    raw = voxels_of(segment(volume, tmp_path / "raw.zarr", model, plain).output)[inside]
    seen: list[tuple[int, int]] = []
    chosen = SegmentOptions(threshold=sparse, probabilities=tmp_path / "p1.zarr", block_shape=(16, 16, 32), roi=roi, **cleaning)
    report = segment(volume, model=model, options=chosen, progress=lambda done, of: seen.append((done, of)))
    expected = cleaned_by_scipy(raw, **cleaning)
    assert not np.array_equal(expected, raw), "there was nothing to clean"
    found = voxels_of(report.output)
    np.testing.assert_array_equal(found[inside], expected)
    assert report.n_foreground == expected.sum() == found.sum()
    assert report.cleaning is not None
    assert report.cleaning["n_foreground_before"] == raw.sum()
    assert attributes(report.output)["cleaning"] == cleaning
    before, after = (open_source(tmp_path / name).read(WHOLE)[inside] for name in ("p0.zarr", "p1.zarr"))
    np.testing.assert_array_equal(after, before)
    assert "cleaning" not in attributes(str(tmp_path / "p1.zarr"))
    assert not list(volume.rglob(".kdunet"))
    assert seen == sorted(set(seen))
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("target_format", ["ome-zarr-0.5", "ome-zarr-0.4", "zarr", "tiff"])
def test_cleaning_goes_with_every_format(
    volume: Path, model: Model, threshold: float, tmp_path: Path, target_format: Any
) -> None:
    options = SegmentOptions(threshold=threshold + 0.02, min_size=9)
    label = segment(volume, model=model, options=options).output
    out = tmp_path / ("out.tif" if target_format == "tiff" else "out.zarr")
    segment(volume, out, model, dataclasses.replace(options, target_format=target_format))
    np.testing.assert_array_equal(voxels_of(out), voxels_of(label))
    assert {path.name for path in tmp_path.iterdir()} == {"volume.zarr", out.name}
    assert not list(tmp_path.rglob(".kdunet"))


def test_a_full_disk_on_the_way_to_cleaning_is_one_sentence(
    volume: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        # the target's own arrays are created by then: its module has its own name for the function
        patched.setattr(kdunet_infer.volume.scratch, "create_level", refuse)
        with pytest.raises(VolumeError, match=r"raw cannot be written \(.*No space left.*\); check free space"):
            segment(volume, model=model, options=SegmentOptions(min_size=9))
    with pytest.raises(VolumeError, match="was not finished"):
        open_labels(volume / "labels" / model.card.name)


def test_a_run_that_breaks_off_in_cleaning_does_not_look_finished(
    volume: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise MemoryError

    options = SegmentOptions(min_size=9)
    monkeypatch.setattr(kdunet_infer.run, "clean", stop)
    with pytest.raises(MemoryError):
        segment(volume, model=model, options=options)
    monkeypatch.undo()
    with pytest.raises(VolumeError, match="was not finished"):
        open_labels(volume / "labels" / model.card.name)
    assert segment(volume, model=model, options=options).cleaning is not None


def test_the_report_is_json(volume: Path, model: Model) -> None:
    found = json.loads(json.dumps(segment(volume, model=model, options=SegmentOptions(min_size=5)).to_dict(), allow_nan=False))
    assert found["intensity"]["kind"] == "identity"
    assert found["voxel_size_nm"] == [40.0, 5.0, 5.0]
    assert found["cleaning"]["min_size"] == 5


def test_a_label_has_the_format_of_its_image(volume: Path, model: Model) -> None:
    with pytest.raises(ConfigError, match=r"format zarr is for a volume of its own.*give a path with -o"):
        segment(volume, model=model, options=SegmentOptions(target_format="zarr"))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"min_size": -1}, "min_size is -1"),
        ({"smooth_z": 4}, "smooth_z is 4"),
        ({"axes": "zyq"}, "the letter 'q'"),
        ({"voxel_size_nm": (0.0, 5.0, 5.0)}, "cannot be; give three lengths above 0"),
    ],
    ids=["min-size", "smooth-z", "axes", "voxel-size"],
)
def test_options_refuse_what_no_volume_can_have(values: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, VolumeError), match=says):
        SegmentOptions(**values)


def test_an_open_box_takes_its_ends_from_the_volume() -> None:
    assert OpenBox((None, 2, None), (4, None, None)).within((9, 8, 7)) == Box((0, 2, 0), (4, 8, 7))
    assert closed(OpenBox((None,) * 3, (None,) * 3), SHAPE) == WHOLE
    assert closed(WHOLE, (1, 1, 1)) == WHOLE
    assert closed(None, SHAPE) is None
    with pytest.raises(GeometryError, match="ends before it begins"):
        OpenBox((9, None, None), (None, None, None)).within((8, 1, 1))


def picture_of(folder: Path, voxels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    source = open_source(write_image(folder / f"{voxels.dtype}.zarr", [voxels], chunk=CHUNK))
    return for_pictures(source).read_box(WHOLE)


def test_pictures_are_drawn_of_grey_values_of_any_type(tmp_path: Path) -> None:
    grey = noise(SHAPE)
    np.testing.assert_array_equal(picture_of(tmp_path, grey), grey)
    two_values = np.where(grey > 0, 3000.0, -1000.0)
    np.testing.assert_array_equal(picture_of(tmp_path, two_values), np.where(grey > 0, 255, 0))
    few_bright = np.zeros(SHAPE, np.int16)
    few_bright[::16, ::16, ::32] = 7  # one voxel of each chunk, beyond both percentiles
    np.testing.assert_array_equal(picture_of(tmp_path, few_bright), np.where(few_bright, 255, 0))
    with pytest.raises(VolumeError, match="has the grey value 9 in every voxel"):
        picture_of(tmp_path, np.full(SHAPE, 9, np.int32))


def test_evaluation_is_narrowed_by_mask_roi_and_tolerance(tmp_path: Path) -> None:
    prediction, truth = (noise(SHAPE, seed=seed) % 2 for seed in (1, 2))
    mask = np.zeros(SHAPE, np.uint8)
    mask[5:, 10:50, :] = 9
    tifffile.imwrite(tmp_path / "prediction.tif", prediction, photometric="minisblack")
    truth_path = write_image(tmp_path / "truth.zarr", [truth.astype(np.int64)], chunk=CHUNK) / "s0"
    mask_path = write_image(tmp_path / "mask.zarr", [mask], chunk=CHUNK) / "s0"
    scores = evaluate(tmp_path / "prediction.tif", truth_path, mask=mask_path, roi=OpenBox((2, None, 30), (None, None, None)))
    counts = (mask != 0)[2:, :, 30:]
    p, t = prediction[2:, :, 30:][counts] != 0, truth[2:, :, 30:][counts] != 0
    assert scores.confusion.iou == pytest.approx((p & t).sum() / (p | t).sum())
    assert scores.confusion.n_voxels == counts.sum()
    assert scores.to_dict()["per_slice_iou"][:3] == [None] * 3
    assert evaluate(truth_path, truth_path, tolerance=0).n_excluded == 0
    with pytest.raises(ConfigError, match="tolerance is -1"):
        evaluate(truth_path, truth_path, tolerance=-1)
    with pytest.raises(GeometryError, match="leaves the volume"):
        evaluate(truth_path, truth_path, roi=Box((0, 0, 0), (19, 1, 1)))
