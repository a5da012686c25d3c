"""A run from volume to label: the same voxels however it is cut, provenance, timeline, and what breaks off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import kdunet_infer.run
from kdunet_infer import __version__
from kdunet_infer.engines import create_engine
from kdunet_infer.errors import ConfigError, CorruptChunk, KdunetError, TargetExists
from kdunet_infer.geometry import Box, OpenBox
from kdunet_infer.model import Model
from kdunet_infer.run import SegmentOptions, evaluate, segment
from kdunet_infer.testing import noise, segment_whole
from kdunet_infer.volume import create_volume, open_labels, open_source

SHAPE = (18, 61, 83)
CHUNK = (16, 16, 32)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume.zarr"
    target = create_volume(path, SHAPE, chunk_shape=CHUNK, voxel_size_nm=(40.0, 5.0, 5.0))
    target.write_box(Box.of_shape(SHAPE), noise(SHAPE))
    target.finish({})
    return path


def _median(model: Model) -> float:
    """A threshold that splits the voxels in two halves."""
    engine = create_engine("onnxruntime", model, n_threads=1)
    return float(np.median(segment_whole(noise(SHAPE), engine, model.card)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_shape": (16, 16, 32), "batch_size": 1},
        {"block_shape": (32, 48, 32), "tile_shape": (16, 16), "batch_size": 5},
        {"n_threads": 1, "tile_shape": (32, 64), "engine": "onnxruntime", "device": "cpu"},
    ],
    ids=["defaults", "block-is-chunk", "small-tiles", "named-engine"],
)
def test_mask_and_probabilities_are_those_of_the_whole(
    volume: Path, model: Model, tmp_path: Path, options: dict[str, object]
) -> None:
    threshold = _median(model)
    chosen = SegmentOptions(threshold=threshold, probabilities=tmp_path / "p.zarr", **options)  # type: ignore[arg-type]
    report = segment(volume, model=model, options=chosen)
    whole = segment_whole(noise(SHAPE), create_engine("onnxruntime", model, n_threads=1), model.card)
    box = Box.of_shape(SHAPE)
    mask = open_labels(report.output).read(box)
    decided = np.abs(whole - threshold) > 1e-5
    np.testing.assert_array_equal(mask[decided], (whole >= np.float32(threshold))[decided])
    assert decided.mean() > 0.99
    np.testing.assert_allclose(open_source(tmp_path / "p.zarr").read_box(box), 255 * whole, atol=0.51)
    assert report.n_voxels == box.n_voxels
    assert report.n_foreground == int(mask.sum())


def test_probabilities_are_not_scored_as_a_mask(volume: Path, model: Model, tmp_path: Path) -> None:
    segment(volume, model=model, options=SegmentOptions(probabilities=tmp_path / "p.zarr"))
    with pytest.raises(KdunetError, match="as an image or as probabilities, not as a mask; give the mask"):
        evaluate(tmp_path / "p.zarr", volume / "labels" / model.card.name)


def test_provenance_lies_in_the_attributes(volume: Path, model: Model) -> None:
    report = segment(volume, model=model, command="kdunet-infer segment volume.zarr")
    about = zarr.open_group(report.output, mode="r").attrs["kdunet"]
    assert isinstance(about, dict)
    assert about["model"] == model.card.name
    assert about["model_version"] == model.card.version
    assert about["model_sha256"] == model.sha256
    assert about["threshold"] == model.card.threshold
    assert about["kdunet_version"] == __version__
    assert about["command"] == "kdunet-infer segment volume.zarr"
    assert report.output == str(volume / "labels" / model.card.name)


def test_times_are_shares_of_the_whole(volume: Path, model: Model) -> None:
    report = segment(volume, model=model)
    shares = (report.waiting_for_read, report.computing, report.waiting_for_write)
    assert min(shares) >= 0
    assert 0 < sum(shares) <= 1
    assert report.to_dict()["mvoxels_per_second"] == pytest.approx(report.n_voxels / report.seconds / 1e6)


def test_progress_counts_every_voxel_once(volume: Path, model: Model) -> None:
    seen: list[tuple[int, int]] = []
    segment(volume, model=model, options=SegmentOptions(block_shape=CHUNK), progress=lambda done, of: seen.append((done, of)))
    n_voxels = Box.of_shape(SHAPE).n_voxels
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (n_voxels, n_voxels)


def test_ground_truth_gives_the_iou_that_evaluate_gives(volume: Path, model: Model, tmp_path: Path) -> None:
    first = segment(volume, tmp_path / "truth.zarr", model, SegmentOptions(threshold=_median(model) + 0.01))
    report = segment(volume, model=model, options=SegmentOptions(threshold=_median(model)), ground_truth=first.output)
    assert report.iou == evaluate(report.output, first.output).confusion.iou
    assert 0 < report.iou < 1


def test_a_run_that_breaks_off_does_not_look_finished_and_is_started_over(
    volume: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_labels(segment(volume, model=model).output).read(Box.of_shape(SHAPE))
    compute, calls = kdunet_infer.run.compute_block, []

    def fail_at_the_third(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        return compute(*args, **kwargs)  # type: ignore[arg-type]

    options = SegmentOptions(block_shape=CHUNK, overwrite=True)
    monkeypatch.setattr(kdunet_infer.run, "compute_block", fail_at_the_third)
    with pytest.raises(MemoryError):
        segment(volume, model=model, options=options)
    monkeypatch.undo()
    label = volume / "labels" / model.card.name
    with pytest.raises(KdunetError, match="was not finished"):
        open_labels(label)
    report = segment(volume, model=model)  # no --overwrite needed for what was never finished
    np.testing.assert_array_equal(open_labels(report.output).read(Box.of_shape(SHAPE)), whole)


def test_a_corrupt_chunk_is_named_and_nothing_is_written(volume: Path, model: Model) -> None:
    (volume / "0" / "c" / "1" / "2" / "1").write_bytes(b"\x00\x01\x02")
    with pytest.raises(CorruptChunk, match=r"chunk \(1, 2, 1\).*volume.zarr.0"):
        segment(volume, model=model)
    assert not (volume / "labels").exists()


def test_a_chunk_that_goes_bad_on_the_way_is_named_with_its_block(volume: Path, model: Model) -> None:
    def spoil(done: int, of: int) -> None:
        (volume / "0" / "c" / "1" / "2" / "1").write_bytes(b"\x00\x01\x02")

    with pytest.raises(CorruptChunk, match=r"chunk \(1, 2, 1\).*volume.zarr.0") as caught:
        segment(volume, model=model, options=SegmentOptions(block_shape=CHUNK), progress=spoil)
    assert any("while segmenting block" in note for note in caught.value.__notes__)


def test_finished_output_is_refused_without_overwrite(volume: Path, model: Model) -> None:
    segment(volume, model=model)
    with pytest.raises(TargetExists, match="--overwrite"):
        segment(volume, model=model)
    assert segment(volume, model=model, options=SegmentOptions(overwrite=True)).n_voxels


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"block_shape": (16, 20, 32)}, "not a whole multiple"),
        ({"tile_shape": (15, 16)}, "not a multiple of the network's stride"),
        ({"probabilities": "p.png"}, "ends in .zarr"),
        ({"probabilities": "p.tif"}, r"mask mask.zarr \(ome-zarr-0.5\) and .* p.tif \(tiff\) are cut into different files"),
        ({"target_format": "tiff"}, "mask.zarr cannot be tiff; give a path that ends in .tif"),
        ({"roi": Box((0, 0, 0), (18, 61, 84))}, "leaves the volume"),
        ({"roi": OpenBox((None, 5, None), (None, 5, None))}, "holds no voxels"),
        ({"level": 1}, "has 1 level, counted from 0, so there is no level 1"),
        ({"channel": 3}, "no channel 3"),
        ({"axes": "zy"}, "lack y or x"),
        ({"intensity_range": (7.0, 7.0)}, "does not increase"),
        ({"probabilities": "foreign.zarr"}, "not made by kdunet"),
        ({"probabilities": "mask.zarr"}, "overlap; choose two separate paths"),
        ({"probabilities": "mask.zarr/p.zarr"}, "overlap; choose two separate paths"),
    ],
    ids=[
        *("block", "tile", "suffix", "files", "format", "roi", "empty-roi", "level", "channel", "axes", "range"),
        *("foreign", "same", "inside"),
    ],
)
def test_what_is_refused_leaves_the_old_output_as_it_was(
    volume: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("foreign.zarr").mkdir()
    Path("foreign.zarr/thesis.txt").touch()
    segment(volume, "mask.zarr", model)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(KdunetError, match=says):
        segment(volume, "mask.zarr", model, SegmentOptions(overwrite=True, **changes))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_truth_of_another_shape_is_refused_before_anything_is_written(volume: Path, model: Model, tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path / "other.zarr"), shape=(18, 61, 84), chunks=CHUNK, dtype="uint8")
    with pytest.raises(ConfigError, match=r"has shape \(18, 61, 84\) and .* \(18, 61, 83\)"):
        segment(volume, model=model, ground_truth=tmp_path / "other.zarr")
    assert not (volume / "labels").exists()


@pytest.mark.parametrize(
    ("values", "says"),
    [({"threshold": 1.5}, "threshold is 1.5"), ({"batch_size": 0}, "batch_size is 0"), ({"n_threads": 0}, "n_threads is 0")],
    ids=["threshold", "batch", "threads"],
)
def test_options_refuse(values: dict[str, float], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SegmentOptions(**values)  # type: ignore[arg-type]
