"""What is said before a run: the dry run and the preview foretell what the run then does, and write nothing of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from volume_files import hashes, write_image

import kdunet_infer.preview
from kdunet_infer.engines import create_engine
from kdunet_infer.errors import ConfigError, KdunetError, TargetExists, VolumeError
from kdunet_infer.forecast import dry_run
from kdunet_infer.geometry import Box
from kdunet_infer.model import Model
from kdunet_infer.preview import preview, spread_slices
from kdunet_infer.run import SegmentOptions, segment
from kdunet_infer.testing import noise, segment_whole
from kdunet_infer.volume import create_volume, open_labels

SHAPE = (18, 61, 83)
WHOLE = Box.of_shape(SHAPE)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume.zarr"
    target = create_volume(path, SHAPE, chunk_shape=(16, 16, 32), voxel_size_nm=(40.0, 5.0, 5.0), n_levels=2)
    target.write_box(WHOLE, noise(SHAPE))
    target.finish({})
    return path


@pytest.fixture(scope="module")
def options(model: Model) -> SegmentOptions:
    whole = segment_whole(noise(SHAPE), create_engine("onnxruntime", model, n_threads=1), model.card)
    return SegmentOptions(threshold=float(np.median(whole)), engine="onnxruntime", device="cpu", n_threads=1)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, npt.NDArray[Any], npt.NDArray[Any]]]:
    """Path, image and mask of each picture that was drawn; it is drawn as well."""
    seen = []
    draw = kdunet_infer.preview.write_overlay_png

    def keep(path: str, image: Any, mask: Any, truth: Any) -> None:
        seen.append((path, image, mask))
        draw(path, image, mask, truth)

    monkeypatch.setattr(kdunet_infer.preview, "write_overlay_png", keep)
    return seen


def test_a_preview_shows_what_the_run_gives_and_writes_pictures_alone(
    volume: Path, model: Model, options: SegmentOptions, tmp_path: Path, drawn: list[Any]
) -> None:
    before = hashes(volume)
    found = preview(volume, None, model, options, n_slices=3, folder=tmp_path)
    assert hashes(volume) == before
    assert {path.name for path in tmp_path.iterdir()} - {"volume.zarr"} == {f"small-preview-z{z:04d}.png" for z in (3, 9, 15)}
    mask = open_labels(segment(volume, model=model, options=options).output).read(WHOLE)
    for (path, image, shown), z in zip(drawn, (3, 9, 15), strict=True):
        assert path.endswith(f"z{z:04d}.png")
        with Image.open(path) as picture:
            assert picture.size[0] > SHAPE[2]
        np.testing.assert_array_equal(image, noise(SHAPE)[z])
        np.testing.assert_array_equal(shown, mask[z])
    assert found.pictures == tuple(path for path, _, _ in drawn)
    assert found.foreground_fraction == pytest.approx(mask[[3, 9, 15]].mean())
    assert found.run_seconds > 0
    assert 0 < found.run_bytes < WHOLE.n_voxels
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["forecast"]["n_voxels"] == WHOLE.n_voxels


def test_a_preview_of_large_slices_shows_the_middle_of_the_region(
    volume: Path, model: Model, options: SegmentOptions, tmp_path: Path, drawn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kdunet_infer.preview, "WINDOW_SIDE", 20)
    chosen = replace(options, roi=Box((4, 10, 0), (9, 55, 83)), block_shape=(16, 16, 32))
    found = preview(volume, tmp_path / "o.zarr", model, chosen, n_slices=2, folder=tmp_path)
    assert found.window == "22:42,31:51"
    assert [Path(path).name for path, _, _ in drawn] == ["o-preview-z0005.png", "o-preview-z0007.png"]
    mask = open_labels(segment(volume, model=model, options=chosen).output).read(WHOLE)
    np.testing.assert_array_equal(np.stack([shown for _, _, shown in drawn]), mask[[5, 7], 22:42, 31:51])


def test_a_preview_needs_no_place_for_the_result(volume: Path, model: Model, options: SegmentOptions, tmp_path: Path) -> None:
    segment(volume, model=model, options=options)
    assert len(preview(volume, None, model, options, n_slices=1, folder=tmp_path).pictures) == 1
    tifffile.imwrite(tmp_path / "v.tif", noise(SHAPE).astype(np.uint16) * 9, photometric="minisblack")
    found = preview(tmp_path / "v.tif", None, model, options, n_slices=99, folder=tmp_path)
    assert len(found.pictures) == SHAPE[0]


def test_a_preview_warns_as_the_run_does(volume: Path, model: Model, options: SegmentOptions, tmp_path: Path) -> None:
    (volume / "0" / "c" / "1" / "2" / "1").unlink()
    told: list[str] = []
    preview(volume, None, model, options, folder=tmp_path, warn=told.append)
    assert tuple(told) == segment(volume, model=model, options=options).warnings


def test_a_preview_without_slices_or_place_is_refused(
    volume: Path, model: Model, options: SegmentOptions, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="0 slices cannot be previewed; give at least 1"):
        preview(volume, None, model, options, n_slices=0)
    with pytest.raises(KdunetError, match=r"cannot write .*give a file name in an existing folder"):
        preview(volume, None, model, options, folder=tmp_path / "none")


@given(begin=st.integers(0, 50), depth=st.integers(1, 60), n=st.integers(1, 70))
def test_slices_are_spread_evenly_over_the_depth(begin: int, depth: int, n: int) -> None:
    found = spread_slices(Box((begin, 0, 0), (begin + depth, 1, 1)), n)
    assert len(found) == min(n, depth)
    assert begin <= found[0] <= found[-1] < begin + depth
    steps = np.diff([begin - 1, *found, begin + depth])
    assert steps.min() >= 1
    assert np.ptp(np.diff(found)) <= 1 if len(found) > 2 else True


@pytest.mark.parametrize("suffix", [".zarr", ".tif"])
def test_a_dry_run_foretells_the_run_and_writes_nothing(
    volume: Path, model: Model, options: SegmentOptions, tmp_path: Path, suffix: str
) -> None:
    chosen = replace(options, probabilities=tmp_path / f"p{suffix}")
    before = hashes(tmp_path)
    found = dry_run(volume, tmp_path / f"m{suffix}", model, chosen)
    assert hashes(tmp_path) == before
    report = segment(volume, tmp_path / f"m{suffix}", model, chosen)
    for name in (
        "output",
        "output_format",
        "plan",
        "engine",
        "intensity",
        "threshold",
        "n_voxels",
        "warnings",
        "voxel_size_nm",
    ):
        assert getattr(found, name) == getattr(report, name), name
    assert (found.shape, found.dtype, found.roi) == (SHAPE, "uint8", str(WHOLE))
    levels = (18 * 61 * 83, 9 * 31 * 42) if suffix == ".zarr" else (18 * 61 * 83,)
    assert found.output_bytes == 2 * sum(levels)
    json.dumps(found.to_dict(), allow_nan=False)


def test_bytes_and_memory_of_a_region_are_foretold_smaller(volume: Path, model: Model, options: SegmentOptions) -> None:
    whole = dry_run(volume, None, model, options)
    part = dry_run(volume, None, model, replace(options, roi=Box((0, 0, 0), (9, 61, 83))))
    assert part.output_bytes == whole.output_bytes // 2
    assert part.memory_bytes < whole.memory_bytes


def test_memory_foretold_grows_with_block_dtype_batch_and_cleaning_not_with_the_volume(
    model: Model, options: SegmentOptions, tmp_path: Path
) -> None:
    def memory(path: Path, **changes: Any) -> int:
        return dry_run(path, tmp_path / "o.zarr", model, replace(options, **changes)).memory_bytes

    def empty(name: str, shape: tuple[int, int, int], dtype: str) -> Path:
        """Two grey values in its first chunks, and no others."""
        array = zarr.create_array(str(tmp_path / name), shape=shape, chunks=(32, 64, 64), dtype=dtype)
        array[:32, :64, :64] = np.broadcast_to(np.arange(64, dtype=dtype) * 4, (32, 64, 64))
        return tmp_path / name

    small = empty("small.zarr", (32, 512, 512), "uint8")
    block = (32, 256, 256)
    usual = memory(small, block_shape=block)
    assert memory(empty("large.zarr", (64, 1024, 1024), "uint8"), block_shape=block) == usual
    assert memory(small, block_shape=(32, 512, 512)) > usual
    assert memory(empty("wide.zarr", (32, 512, 512), "uint16"), block_shape=block) > usual
    assert memory(small, block_shape=block, batch_size=8) > usual
    assert memory(small, block_shape=block, tile_shape=(64, 64), min_size=9) >= memory(
        small, block_shape=block, tile_shape=(64, 64)
    )


def test_a_dry_run_refuses_what_the_run_refuses(volume: Path, model: Model, options: SegmentOptions, tmp_path: Path) -> None:
    segment(volume, model=model, options=options)
    with pytest.raises(TargetExists, match="--overwrite"):
        dry_run(volume, None, model, options)
    assert dry_run(volume, None, model, replace(options, overwrite=True)).n_blocks == 1
    with pytest.raises(VolumeError, match="label name 'a/b' cannot be"):
        dry_run(volume, None, replace(model, card=replace(model.card, name="a/b")), options)
    flat = write_image(tmp_path / "flat.zarr", [noise(SHAPE)], chunk=(16, 16, 32)) / "s0"
    tifffile.imwrite(tmp_path / "v.tif", noise(SHAPE), photometric="minisblack")
    with pytest.raises(VolumeError, match="takes no labels; write to a new volume with -o"):
        dry_run(tmp_path / "v.tif", None, model, options)
    tifffile.imwrite(tmp_path / "t.tif", noise((3, 61, 83)), photometric="minisblack")
    with pytest.raises(ConfigError, match="has shape"):
        dry_run(flat, tmp_path / "o.zarr", model, options, ground_truth=tmp_path / "t.tif")
