"""Both commands as a user types them: what is printed, exit codes, and one sentence for bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from click.testing import CliRunner, Result
from small_models import unet_onnx

import kdunet.cli
import kdunet.fit
import kdunet_infer.cli
import kdunet_infer.run
from kdunet.config import RunConfig
from kdunet.fit import CONFIG_FILE
from kdunet_infer.errors import VolumeError
from kdunet_infer.geometry import Box
from kdunet_infer.model import Model
from kdunet_infer.testing import noise
from kdunet_infer.volume import create_volume, open_labels

SHAPE = (5, 48, 64)


def infer(*arguments: object) -> Result:
    return CliRunner().invoke(kdunet_infer.cli.main, [str(argument) for argument in arguments])


def train(*arguments: object) -> Result:
    return CliRunner().invoke(kdunet.cli.main, [str(argument) for argument in arguments])


def assert_one_sentence(result: Result, *says: str) -> None:
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    for part in says:
        assert part in result.stderr, result.stderr


@pytest.fixture
def onnx_file(model: Model, tmp_path: Path) -> Path:
    path = tmp_path / "student.onnx"
    path.write_bytes(model.onnx_bytes)
    return path


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume.zarr"
    target = create_volume(path, SHAPE, chunk_shape=(5, 32, 32), voxel_size_nm=(5.0, 5.0, 5.0))
    target.write_box(Box.of_shape(SHAPE), noise(SHAPE))
    target.finish({})
    return path


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    path = tmp_path / "truth.tif"
    tifffile.imwrite(path, (noise(SHAPE) > 128).astype(np.uint8) * 255, photometric="minisblack")
    return path


def test_segment_prints_a_summary_and_writes_the_label(volume: Path, onnx_file: Path, truth: Path, model: Model) -> None:
    result = infer("segment", volume, "--model", onnx_file, "--ground-truth", truth)
    assert result.exit_code == 0, result.output
    for part in ("foreground", "Mvox/s", "waiting for reads", "IoU", model.sha256[:12], "halo overhead"):
        assert part in result.stdout
    assert open_labels(volume / "labels" / model.card.name).shape == SHAPE


def test_segment_json_is_one_object_and_nothing_else(volume: Path, onnx_file: Path, tmp_path: Path, model: Model) -> None:
    out = tmp_path / "out.zarr"
    result = infer("segment", volume, "-o", out, "--model", onnx_file, "--tile", "32,32", "--block", "5,32,64", "--json")
    found = json.loads(result.stdout)
    assert found["model_sha256"] == model.sha256
    assert found["output"] == str(out)
    assert set(found) >= {"n_voxels", "foreground_fraction", "mvoxels_per_second", "waiting_for_read", "computing"}


def test_all_background_warns(volume: Path, onnx_file: Path) -> None:
    result = infer("segment", volume, "--model", onnx_file, "--threshold", "0.999999")
    assert result.exit_code == 0
    assert "warning: no voxel of" in result.stderr


def test_the_volume_can_be_told_in_all_ways(onnx_file: Path, tmp_path: Path, model: Model) -> None:
    raw = noise((2, *SHAPE)).astype(np.int16)
    raw[0] -= 100
    array = zarr.create_array(str(tmp_path / "raw.zarr"), shape=raw.shape, chunks=(1, 5, 32, 32), dtype="int16")
    array[...] = raw
    out = tmp_path / "out.tif"
    result = infer(
        "segment", tmp_path / "raw.zarr", "--model", onnx_file, "-o", out, "--axes", "czyx", "--channel", "0", "--json",
        "--voxel-size", "40,4.5,4.5", "--roi", "1:,:,10:50", "--intensity-range", "-100,155", "--format", "tiff",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["roi"] == "1:5,0:48,10:50"
    assert found["voxel_size_nm"] == [40.0, 4.5, 4.5]
    assert (found["intensity"]["low"], found["intensity"]["high"]) == (-100, 155)
    plain = tmp_path / "plain.tif"
    tifffile.imwrite(plain, noise((2, *SHAPE))[0], photometric="minisblack")
    same = infer("segment", plain, "--model", onnx_file, "-o", tmp_path / "same.zarr", "--roi", "1:5,0:48,10:50")
    assert same.exit_code == 0, same.output
    np.testing.assert_array_equal(tifffile.imread(out), open_labels(tmp_path / "same.zarr").read(Box.of_shape(SHAPE)))


def test_a_level_is_written_where_the_output_line_says(onnx_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "pyramid.zarr"
    target = create_volume(path, SHAPE, chunk_shape=(5, 32, 32), n_levels=2)
    target.write_box(Box.of_shape(SHAPE), noise(SHAPE))
    target.finish({})
    result = infer("segment", path, "--model", onnx_file, "--level", "1")
    assert f"output     {tmp_path / 'pyramid-small-level1.zarr'} (ome-zarr-0.5)" in result.stdout
    assert open_labels(tmp_path / "pyramid-small-level1.zarr").shape == (3, 24, 32)


def test_cleaning_says_what_it_did(volume: Path, onnx_file: Path) -> None:
    result = infer("segment", volume, "--model", onnx_file, "--min-size", "5", "--fill-holes", "--smooth-z", "3")
    assert result.exit_code == 0, result.output
    for part in ("foreground voxels before", "holes filled", "objects removed"):
        assert part in result.stdout


def test_missing_chunks_are_a_warning(volume: Path, onnx_file: Path) -> None:
    (volume / "0" / "c" / "0" / "1" / "1").unlink()
    result = infer("segment", volume, "--model", onnx_file, "--json")
    assert result.exit_code == 0
    assert "warning: 1 of 4 chunk files" in result.stderr
    found = json.loads(result.stdout)
    assert (found["n_missing_chunks"], found["n_chunks"]) == (1, 4)
    assert "1 of 4 chunk files" in found["warnings"][0]


def test_dry_run_prints_the_plan_and_writes_nothing(volume: Path, onnx_file: Path) -> None:
    result = infer("segment", volume, "--model", onnx_file, "--dry-run")
    assert result.exit_code == 0, result.output
    for part in ("1 block", "halo overhead", "uint8 as it is", "5 x 5 x 5 nm", "labels/small", "at the peak", "15.4 kB"):
        assert part in result.stdout, result.stdout
    assert json.loads(infer("segment", volume, "--model", onnx_file, "--dry-run", "--json").stdout)["n_blocks"] == 1
    assert not (volume / "labels").exists()


def test_preview_prints_what_the_whole_would_take(volume: Path, onnx_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    result = infer("segment", volume, "--model", onnx_file, "--preview", "2")
    assert result.exit_code == 0, result.output
    for part in ("small-preview-z0001.png", "small-preview-z0003.png", "full run   about", "Mvox/s", "at the peak"):
        assert part in result.stdout, result.stdout
    assert Path("small-preview-z0003.png").read_bytes().startswith(b"\x89PNG")
    assert not (volume / "labels").exists()
    assert len(json.loads(infer("segment", volume, "--model", onnx_file, "--preview", "1", "--json").stdout)["pictures"]) == 1


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--roi", "1:2,3:4", "is not begin:end along z, y and x"),
        ("--roi", "1:2,3:4,-5:6", "is not begin:end along z, y and x"),
        ("--roi", "1,2,3", "is not begin:end along z, y and x"),
        ("--intensity-range", "7", "is not 2 numbers lo,hi, such as 0,4095"),
        ("--intensity-range", "a,b", "is not 2 numbers lo,hi"),
        ("--voxel-size", "5,5", "is not 3 numbers z,y,x"),
        ("--level", "-1", "not in the range"),
    ],
)
def test_values_that_are_none_are_a_usage_error(volume: Path, option: str, value: str, says: str) -> None:
    result = infer("segment", volume, option, value)
    assert result.exit_code == 2
    assert says in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--roi", "0:99,:,:"], "region of interest 0:99,0:48,0:64 leaves the volume"),
        (["--roi", "9:,:,:"], "ends before it begins"),
        (["--intensity-range", "nan,5"], "does not increase; give two finite numbers"),
        (["--intensity-range=5,-5"], "does not increase"),
        (["--level", "4"], "has 1 level, counted from 0, so there is no level 4"),
        (["--voxel-size", "0,5,5"], "give three lengths above 0"),
        (["--format", "png", "-o", "x.zarr"], "output format 'png' is unknown; choose one of ome-zarr-0.5"),
        (["--format", "zarr"], "labels are as their image is; give a path with -o"),
        (["--min-size", "-3"], "min_size is -3"),
        (["--smooth-z", "2"], "smooth_z is 2"),
        (["--preview", "0"], "0 slices cannot be previewed"),
    ],
)
def test_values_that_cannot_be_are_one_sentence(volume: Path, onnx_file: Path, arguments: list[str], says: str) -> None:
    assert_one_sentence(infer("segment", volume, "--model", onnx_file, *arguments), says)
    assert not (volume / "labels").exists()


def test_help_of_segment_fits_a_screen() -> None:
    lines = CliRunner().invoke(kdunet_infer.cli.main, ["segment", "--help"], terminal_width=110).stdout.splitlines()
    assert len(lines) <= 50
    for section in ("Volume:", "Model:", "Mask:", "Engine:", "Report:"):
        assert section in lines
    assert any("--intensity-range LO,HI" in line for line in lines)


def test_evaluate_takes_mask_roi_and_tolerance(truth: Path, tmp_path: Path) -> None:
    other, mask = tmp_path / "other.tif", tmp_path / "mask.tif"
    tifffile.imwrite(other, (noise(SHAPE, seed=9) > 128).astype(np.int32), photometric="minisblack")
    within = np.zeros(SHAPE, np.uint8)
    within[2:, 10:, :] = 1
    tifffile.imwrite(mask, within, photometric="minisblack")
    result = infer("evaluate", other, truth, "--mask", mask, "--roi", "1:,:,:32", "--json", "--png", tmp_path / "s.png")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["n_voxels"] == 3 * 38 * 32
    assert found["per_slice_iou"][0] is None
    assert found["roi"] == "1:5,0:48,0:32"
    text = infer("evaluate", other, truth, "--mask", mask)
    assert f"{3 * 38 * 64:,} in 5 slices, {5 * 48 * 64 - 3 * 38 * 64:,} more not counted" in text.stdout
    assert_one_sentence(infer("evaluate", other, truth, "--tolerance", 9), "within 9 voxels of a boundary of the truth")


def test_evaluate_draws_on_images_of_any_type(truth: Path, tmp_path: Path) -> None:
    image = tmp_path / "image.tif"
    tifffile.imwrite(image, noise(SHAPE).astype(np.float32) * 1e-3, photometric="minisblack")
    assert infer("evaluate", truth, truth, "--png", tmp_path / "s.png", "--image", image).exit_code == 0
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_json_has_the_agreed_keys(volume: Path, truth: Path, tmp_path: Path) -> None:
    picture = tmp_path / "slices.png"
    result = infer("evaluate", truth, truth, "--json", "--png", picture, "--image", volume)
    found = json.loads(result.stdout)
    assert set(found) >= {"iou", "dice", "precision", "recall", "per_slice_iou"}
    assert found["iou"] == 1.0
    assert len(found["per_slice_iou"]) == SHAPE[0]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_evaluate_prints_scores(truth: Path) -> None:
    result = infer("evaluate", truth, truth, "--foreground", "255")
    assert "iou        1.0000" in result.stdout


def test_info_of_a_volume_and_of_a_model(volume: Path, onnx_file: Path, truth: Path, model: Model) -> None:
    assert "(5.0, 5.0, 5.0)" in infer("info", volume).stdout
    assert json.loads(infer("info", onnx_file, "--json").stdout)["sha256"] == model.sha256
    assert "(5, 48, 64)" in infer("info", truth).stdout


def test_info_says_levels_and_whether_a_model_fits(tmp_path: Path, model: Model) -> None:
    path, coarse = tmp_path / "pyramid.zarr", dataclasses.replace(model.card, voxel_size_nm=(80.0, 10.0, 10.0))
    target = create_volume(path, SHAPE, chunk_shape=(5, 32, 32), voxel_size_nm=(40.0, 5.0, 5.0), n_levels=2)
    target.write_box(Box.of_shape(SHAPE), noise(SHAPE))
    target.finish({})
    student = tmp_path / "coarse.onnx"
    student.write_bytes(unet_onnx(2, 2, coarse).SerializeToString())
    result = infer("info", path, "--model", student)
    for part in ("axes zyx", "(3, 24, 32), scale (80.0, 10.0, 10.0)", "0 of 4", "segment --level 1"):
        assert part in result.stdout, result.stdout
    assert infer("info", path, "--level", "1", "--model", student).stdout.splitlines()[-1].endswith(" yes")
    assert json.loads(infer("info", path, "--json").stdout)["all levels (nm)"] == [[40, 5, 5], [80, 10, 10]]


def test_models_and_engines_are_listed() -> None:
    assert "phantom-2unet" in infer("models").stdout
    assert "30,902 parameters" in infer("models").stdout
    assert "works here" in infer("engines").stdout


def test_phantom_writes_image_and_truth(tmp_path: Path) -> None:
    result = infer("phantom", tmp_path / "p.zarr", "--shape", "8,64,64", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert open_labels(tmp_path / "p.zarr" / "labels" / "mitochondria").shape == (8, 64, 64)


def test_demo_makes_all_it_promises(tmp_path: Path) -> None:
    result = infer("demo", "-o", tmp_path / "demo", "--shape", "16,128,128")
    assert result.exit_code == 0, result.output
    for part in ("IoU", "Mvox/s", "self-test", "overlay.png"):
        assert part in result.stdout
    assert (tmp_path / "demo" / "overlay.png").read_bytes().startswith(b"\x89PNG")
    assert infer("demo", "-o", tmp_path / "demo", "--shape", "16,128,128").exit_code == 0  # again, in the same place


@pytest.mark.parametrize("shape", ["8,64", "8,64,0", "8x64x64", "a,b,c"])
def test_shapes_that_are_none_are_a_usage_error(tmp_path: Path, shape: str) -> None:
    result = infer("phantom", tmp_path / "p.zarr", "--shape", shape)
    assert result.exit_code == 2
    assert "is not 3 positive integers z,y,x" in result.stderr


def test_bad_input_of_segment_is_one_sentence(volume: Path, onnx_file: Path, truth: Path, tmp_path: Path, model: Model) -> None:
    def refused(*arguments: object, says: tuple[str, ...]) -> None:
        assert_one_sentence(infer("segment", *arguments), *says)

    (tmp_path / "cut.onnx").write_bytes(model.onnx_bytes[:-100])
    without_card = unet_onnx(levels=1, width=2)
    del without_card.metadata_props[:]
    (tmp_path / "plain.onnx").write_bytes(without_card.SerializeToString())
    (tmp_path / "notes.txt").write_text("no volume")
    refused(tmp_path / "none.zarr", "--model", onnx_file, says=("there is nothing at", "none.zarr"))
    refused(tmp_path / "notes.txt", "--model", onnx_file, says=("notes.txt", "neither"))
    refused(volume, "--model", "mito", says=("no model is called 'mito'", "phantom-2unet"))
    refused(volume, "--model", onnx_file, "--engine", "warp", says=("no engine is called 'warp'", "onnxruntime"))
    refused(volume, "--model", tmp_path / "cut.onnx", says=("cut.onnx", "cut short"))
    refused(volume, "--model", tmp_path / "plain.onnx", says=("plain.onnx", "no model card"))
    refused(volume, "-o", volume, "--model", onnx_file, says=("overlaps the source",))
    refused(volume, "-o", volume / "0", "--model", onnx_file, says=("volume.zarr",))
    refused(truth, "--model", onnx_file, says=("takes no labels", "-o OUT.zarr"))
    assert not (volume / "labels").exists()
    assert infer("segment", volume, "--model", onnx_file).exit_code == 0
    refused(volume, "--model", onnx_file, says=("finished output", "--overwrite"))


def test_corrupt_chunk_is_named(volume: Path, onnx_file: Path) -> None:
    (volume / "0" / "c" / "0" / "1" / "1").write_bytes(b"\x00")
    assert_one_sentence(infer("segment", volume, "--model", onnx_file), "chunk (0, 1, 1)", "restore it")


def test_truth_of_another_shape_is_one_sentence(truth: Path, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "other.tif", np.ones((5, 48, 48), np.uint8), photometric="minisblack")
    assert_one_sentence(infer("evaluate", truth, tmp_path / "other.tif"), "(5, 48, 64)", "(5, 48, 48)")


def test_the_command_runs_as_a_module_and_leaves_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kdunet_infer", "segment", str(tmp_path / "none.zarr"), "--model", "phantom-2unet"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    assert finished.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("stacks")
    images, labels = folder / "images.tif", folder / "labels.tif"
    tifffile.imwrite(images, noise((10, 48, 64)), photometric="minisblack")
    tifffile.imwrite(labels, (noise((10, 48, 64)) < 60).astype(np.uint8), photometric="minisblack")
    return images, labels


def test_train_distil_export_and_segment(stacks: tuple[Path, Path], tmp_path: Path, volume: Path) -> None:
    """The whole way, as the README tells it."""
    data = ["--images", stacks[0], "--labels", stacks[1], "--steps", 3, "--crop", 32, "--batch", 2, "--accelerator", "cpu"]
    result = train("train-teacher", *data, "--width", 2, "--out", tmp_path / "teacher")
    assert result.exit_code == 0, result.output
    assert "best on validation: IoU" in result.stdout
    distil = ["--method", "mixed", "--temperature", 3, "--width", 1, "--out", tmp_path / "student"]
    result = train("distill", "--teacher", tmp_path / "teacher", *data, *distil)
    assert result.exit_code == 0, result.output
    config = RunConfig.from_toml(tmp_path / "student" / CONFIG_FILE)
    assert (config.width, config.loss.temperature, config.loss.soft_weight, config.optim.steps) == (1, 3.0, 1.0, 3)
    told = ["--voxel-size", 5, 5, 5, "--about", "licence=CC0", "--grey-preparation", "CLAHE, then uint8"]
    result = train("export", tmp_path / "student", "-o", tmp_path / "s.onnx", *told)
    assert result.exit_code == 0, result.output
    assert "max |dp|" in result.stdout
    card = Model.load(tmp_path / "s.onnx").card
    assert (card.n_parameters, card.halo_zyx, card.voxel_size_nm) == (7878, (0, 96, 96), (5.0, 5.0, 5.0))
    assert card.provenance["licence"] == "CC0"
    assert (card.grey_preparation, len(card.grey_histogram)) == ("CLAHE, then uint8", 256)
    assert card.provenance["recipe"]["data"]["images"] == "images.tif"  # no folder of this machine
    assert infer("segment", volume, "--model", tmp_path / "s.onnx").exit_code == 0


def test_the_command_line_wins_over_the_file(stacks: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("width = 1\n[optim]\nsteps = 9\n[data]\ncrop = 32\nbatch = 2\nworkers = 0\n")
    result = train(
        "distill", "--config", path, "--images", stacks[0], "--labels", stacks[1], "--method", "vanilla", "--steps", 2,
        "--train-slices", "0:6", "--validation-slices", "8:10", "--out", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    config = RunConfig.from_toml(tmp_path / "run" / CONFIG_FILE)
    assert (config.width, config.optim.steps, config.data.workers, config.data.train_slices) == (1, 2, 0, (0, 6))


def test_stopped_by_the_clock_says_how_to_go_on(stacks: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ["distill", "--method", "vanilla", "--images", stacks[0], "--labels", stacks[1], "--crop", 32, "--steps", 2]
    result = train(*arguments, "--out", tmp_path / "run", "--max-minutes", 0)
    assert result.exit_code == 0
    assert "stopped at step 0 of 2; the same command goes on" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["distill", "--out", "run"], "no images are given"),
        (["train-teacher", "--out", "run", "--images", "none.tif", "--labels", "none.tif"], "there is no file none.tif"),
        (["distill", "--config", "none.toml", "--out", "run"], "there is no configuration file none.toml"),
        (["distill", "--width", "0", "--out", "run"], "width is 0"),
        (["export", "none", "-o", "x.onnx"], "there is no file none"),
    ],
)
def test_bad_input_of_training_is_one_sentence(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_sentence(train(*arguments), says)


def test_missing_training_extra_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["distill", "--out", str(tmp_path / "run")], ["export", "run", "-o", "x.onnx"]):
        absent = f"import sys; sys.modules['torch'] = None; from kdunet.cli import main; main({arguments})"
        finished = subprocess.run([sys.executable, "-c", absent], capture_output=True, text=True)
        assert finished.returncode == 1
        assert finished.stderr == "Error: this needs 'torch': pip install 'kdunet[train,cpu]'.\n"

    def lacking(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript")

    monkeypatch.setitem(sys.modules, "kdunet.export", SimpleNamespace(export_run=lambda *_, **__: lacking()))
    assert_one_sentence(train("export", "run", "-o", tmp_path / "x.onnx"), "this needs 'onnxscript': pip install")


def test_about_without_a_key_is_a_usage_error() -> None:
    result = train("export", "run", "-o", "x.onnx", "--about", "CC0")
    assert result.exit_code == 2
    assert "is not KEY=TEXT" in result.stderr


def test_slices_that_are_none_are_a_usage_error() -> None:
    result = train("distill", "--out", "run", "--train-slices", "0-135")
    assert result.exit_code == 2
    assert "is not begin:end" in result.stderr


def test_interrupting_a_segmentation_exits_with_130(
    volume: Path, onnx_file: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kdunet_infer.run, "compute_block", interrupt)
    result = infer("segment", volume, "--model", onnx_file)
    assert result.exit_code == 130
    assert "stopped" in result.stderr
    with pytest.raises(VolumeError, match="was not finished"):
        open_labels(volume / "labels" / model.card.name)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_interrupting_a_training_exits_by_its_signal(
    stacks: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    learned = kdunet.fit.loss_terms

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), getattr(signal, name))
        return learned(*args, **kwargs)

    monkeypatch.setattr(kdunet.fit, "loss_terms", interrupt)
    arguments = ["distill", "--method", "vanilla", "--images", stacks[0], "--labels", stacks[1], "--crop", 32, "--steps", 5]
    result = train(*arguments, "--out", tmp_path / "run")
    assert result.exit_code == code
    assert "stopped at step 1 of 5; the same command goes on" in result.stdout
