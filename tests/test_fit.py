"""The training loop: exact resume, clean stops, refusals; on a tiny synthetic volume."""

from __future__ import annotations

import csv
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

import kdunet.fit
from kdunet.checkpoint import load_network, load_tensors, save_network
from kdunet.config import AugmentConfig, DataConfig, OptimConfig, RunConfig
from kdunet.data import CropDataset, batches, load_annotated, slabs
from kdunet.evaluate import slice_probability, validate
from kdunet.fit import CHECKPOINT_FILE, CONFIG_FILE, RESULT_FILE, Progress, fit, learning_rate
from kdunet.unet import UNet
from kdunet_infer.errors import ConfigError, TrainingError, VolumeError, VolumeNotFound


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For networks this small a second thread costs more than it gives, and on a busy machine far more."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Dark discs on noise: 10 slices of 64 x 80."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :80]
    truth = np.stack([(y - cy) ** 2 + (x - cx) ** 2 < 150 for cy, cx in rng.integers(16, 50, (10, 2))])
    images = np.clip(rng.normal(170, 20, truth.shape) - 90 * truth, 0, 255).astype(np.uint8)
    tifffile.imwrite(folder / "images.tif", images, photometric="minisblack")
    tifffile.imwrite(folder / "labels.tif", truth.astype(np.uint8) * 255, photometric="minisblack")
    return DataConfig(images=str(folder / "images.tif"), labels=str(folder / "labels.tif"), crop=32, batch=2, workers=0)


@pytest.fixture
def config(data: DataConfig) -> RunConfig:
    return RunConfig(
        width=1, validate_every=4, accelerator="cpu", data=data, optim=OptimConfig(steps=8, learning_rate=3e-3, ema_decay=0.5)
    )


def _state(run: Path) -> dict[str, torch.Tensor]:
    return load_tensors(run / CHECKPOINT_FILE)[0]


def _assert_same_bits(a: Path, b: Path) -> None:
    ours, theirs = _state(a), _state(b)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 100
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def _stop_at(step: int) -> Callable[[Progress], None]:
    return lambda progress: os.kill(os.getpid(), signal.SIGINT) if progress.step == step else None


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_stopped_and_resumed_run_ends_in_the_same_bits(config: RunConfig, tmp_path: Path, stop: int) -> None:
    assert fit(config, tmp_path / "whole").finished
    stopped = fit(config, tmp_path / "parts", progress=_stop_at(stop))
    assert (stopped.finished, stopped.step, stopped.stopped_by) == (False, stop, "SIGINT")
    assert not (tmp_path / "parts" / RESULT_FILE).exists()
    resumed = fit(config, tmp_path / "parts")
    assert resumed.finished
    _assert_same_bits(tmp_path / "whole", tmp_path / "parts")
    assert resumed.best == fit_best(tmp_path / "whole")


def fit_best(run: Path) -> object:
    _, about = load_tensors(run / CHECKPOINT_FILE)
    return kdunet.fit.Validation(**about["best"])


def test_distillation_resumes_to_the_same_bits(config: RunConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_network(tmp_path / "teacher.safetensors", UNet(2, intensity=(170.0, 30.0)), {})
    mixed = config.replaced({"teacher": str(tmp_path / "teacher.safetensors"), "loss.soft_weight": 1.0})
    fit(mixed, tmp_path / "whole")
    fit(mixed, tmp_path / "parts", progress=_stop_at(5))
    fit(mixed, tmp_path / "parts")
    _assert_same_bits(tmp_path / "whole", tmp_path / "parts")


def test_worker_processes_give_the_same_crops(data: DataConfig) -> None:
    slab, _ = load_annotated(data)
    alone = CropDataset(slab, data, AugmentConfig(), seed=3)
    helped = CropDataset(slab, dataclasses.replace(data, workers=1), AugmentConfig(), seed=3)
    for ours, theirs in zip(batches(alone, range(2, 5)), batches(helped, range(2, 5)), strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
    assert not torch.equal(alone[2].images, alone[3].images)
    assert not torch.equal(alone[2].images, CropDataset(slab, data, AugmentConfig(), seed=4)[2].images)


def test_it_learns_and_the_saved_network_scores_what_was_reported(config: RunConfig, tmp_path: Path) -> None:
    longer = config.replaced(
        {"width": 2, "optim.steps": 150, "validate_every": 50, "optim.learning_rate": 1e-2, "optim.ema_decay": 0.9}
    )
    result = fit(longer, tmp_path / "run")
    assert result.best is not None
    assert result.best.iou > 0.6
    network, about = load_network(tmp_path / "run")
    assert about["validation"] == dataclasses.asdict(result.best)
    _, validation = load_annotated(config.data)
    again = validate(network, validation, device=torch.device("cpu"))
    assert (again.iou, again.cross_entropy) == pytest.approx((result.best.iou, result.best.cross_entropy), abs=1e-3)
    assert again.threshold == result.best.threshold


def test_the_best_network_is_kept_not_the_last(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.7, 0.6])
    monkeypatch.setattr(kdunet.fit, "validate", lambda *_, **__: kdunet.fit.Validation(next(scores), 0.5, 1.0))
    result = fit(config, tmp_path / "run")
    assert result.best is not None
    assert result.best.iou == 0.7
    assert load_network(tmp_path / "run")[1]["step"] == 4


def test_max_minutes_stops_and_saves(config: RunConfig, tmp_path: Path) -> None:
    result = fit(config, tmp_path / "run", max_minutes=0)
    assert (result.step, result.finished, result.stopped_by) == (0, False, "time")
    assert fit(config, tmp_path / "run").finished


def test_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(config, tmp_path / "run", progress=_stop_at(4))
    before = (tmp_path / "run" / CHECKPOINT_FILE).read_bytes()
    monkeypatch.setattr(kdunet.fit.losses, "soft_dice_loss", lambda logits, labels: logits.sum() * float("nan"))
    with pytest.raises(TrainingError, match="the loss is nan at step 4; the last checkpoint is untouched"):
        fit(config, tmp_path / "run")
    assert (tmp_path / "run" / CHECKPOINT_FILE).read_bytes() == before


def test_metrics_of_a_stopped_run_hold_each_step_once(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kdunet.fit, "LOG_EVERY", 1)
    fit(config, tmp_path / "run", progress=_stop_at(3))
    with (tmp_path / "run" / "metrics.csv").open("a") as file:
        file.write("4,loss,0.5\r\n")  # killed after this row and before the next checkpoint
    fit(config, tmp_path / "run")
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["value"]) for row in rows if row["name"] == "learning_rate"]
    assert rates == pytest.approx([learning_rate(step, config.optim) for step in range(8)], rel=1e-4)
    assert [row["step"] for row in rows if row["name"] == "loss"] == [str(step) for step in range(1, 9)]
    assert [row["step"] for row in rows if row["name"] == "iou"] == ["4", "8"]
    assert {row["name"] for row in rows} >= {"hard", "dice", "gradient_norm", "data_wait", "threshold", "cross_entropy"}


def test_merged_configuration_lies_beside_the_result(config: RunConfig, tmp_path: Path) -> None:
    fit(config, tmp_path / "run")
    assert RunConfig.from_toml(tmp_path / "run" / CONFIG_FILE) == config


def test_learning_rate_is_one_cycle() -> None:
    optim = OptimConfig(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(step, optim) for step in range(100)]
    assert rates[0] == pytest.approx(0.04)
    assert rates[10] == max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.001)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_slice_probability_does_not_depend_on_what_is_beyond_the_slice(data: DataConfig) -> None:
    """Cut out of a larger mirrored picture, the same voxels come out."""
    torch.manual_seed(0)
    network = UNet(1, intensity=(128.0, 50.0)).eval()
    image = np.random.default_rng(0).integers(0, 256, (37, 52), dtype=np.uint8)
    device = torch.device("cpu")
    found = slice_probability(network, image, device=device)
    assert found.shape == image.shape
    larger = np.pad(image, 112, mode="reflect")
    np.testing.assert_allclose(slice_probability(network, larger, device=device)[112:149, 112:164], found, atol=1e-5)


def test_default_slabs_leave_a_gap() -> None:
    (_, train_end), (validation_begin, validation_end) = slabs(DataConfig(), n_slices=165)
    assert train_end < validation_begin < validation_end == 165


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"data.images": "none.tif"}, VolumeNotFound, "there is no file none.tif; check the path given to --images"),
        ({"data.images": ""}, ConfigError, "no images are given; name a TIFF stack with --images"),
        ({"data.labels": __file__}, VolumeError, "cannot be read as TIFF"),
        ({"data.train_slices": (0, 11)}, ConfigError, "train_slices is 0 to 11; the volume has slices 0 to 10"),
        ({"data.train_slices": (0, 10)}, ConfigError, "overlap; validation must be unseen"),
        ({"data.foreground": 7}, VolumeError, "has no foreground in slices 0 to 7"),
        ({"data.crop": 128}, ConfigError, r"crop is 128 and a slice \(64, 80\)"),
        ({"loss.soft_weight": 1.0}, TrainingError, "soft_weight is 1.0 and there is no teacher"),
        ({"teacher": "none"}, TrainingError, "there is no file none"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_fit_refuses(config: RunConfig, tmp_path: Path, changes: dict[str, object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        fit(config.replaced(changes), tmp_path / "run")


def test_labels_of_another_shape_are_refused(config: RunConfig, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "labels.tif", np.ones((10, 64, 64), np.uint8), photometric="minisblack")
    with pytest.raises(VolumeError, match=r"has shape \(10, 64, 80\) and .* \(10, 64, 64\)"):
        fit(config.replaced({"data.labels": str(tmp_path / "labels.tif")}), tmp_path / "run")


def test_images_of_another_type_are_refused(config: RunConfig, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "images.tif", np.ones((10, 64, 80), np.uint16), photometric="minisblack")
    with pytest.raises(VolumeError, match="is uint16; training reads uint8"):
        fit(config.replaced({"data.images": str(tmp_path / "images.tif")}), tmp_path / "run")


def test_finished_changed_and_foreign_folders_are_refused(config: RunConfig, tmp_path: Path) -> None:
    fit(config, tmp_path / "done")
    with pytest.raises(TrainingError, match="holds a finished run"):
        fit(config, tmp_path / "done")
    fit(config, tmp_path / "half", progress=_stop_at(4))
    with pytest.raises(TrainingError, match=r"another configuration \(optim.steps: 8 -> 9\)"):
        fit(config.replaced({"optim.steps": 9}), tmp_path / "half")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").touch()
    with pytest.raises(TrainingError, match="exists and holds no training run"):
        fit(config, tmp_path / "foreign")


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"], ids=["empty", "garbage"])
def test_damaged_checkpoint_is_refused(config: RunConfig, tmp_path: Path, content: bytes) -> None:
    fit(config, tmp_path / "run", progress=_stop_at(4))
    (tmp_path / "run" / CHECKPOINT_FILE).write_bytes(content)
    with pytest.raises(TrainingError, match="is damaged or was not written by kdunet"):
        fit(config, tmp_path / "run")


def test_network_survives_half_precision_storage(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = UNet(2, intensity=(140.5, 42.0)).eval()
    save_network(tmp_path / "network.safetensors", network, {"note": "x"}, dtype=torch.float16)
    loaded, about = load_network(tmp_path)
    assert about["note"] == "x"
    assert next(loaded.parameters()).dtype == torch.float32
    image = torch.rand(1, 1, 32, 32) * 255
    torch.testing.assert_close(loaded(image), network(image), atol=0.05, rtol=0.05)
