"""The training loop: exact resume, clean stops, refusals; on a tiny synthetic volume."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

import kdunet.fit
import kdunet.records
from kdunet.checkpoint import load_network, load_tensors, save_network
from kdunet.collapse import Collapse, CollapseWatch
from kdunet.config import METHODS, AugmentConfig, DataConfig, OptimConfig, RunConfig
from kdunet.data import CropDataset, batches, load_annotated, slabs
from kdunet.evaluate import slice_margin, validate
from kdunet.fit import CHECKPOINT_FILE, CONFIG_FILE, Progress, fit
from kdunet.losses import IGNORED
from kdunet.measures import RESULT_FILE, UnseenLog
from kdunet.schedule import learning_rate
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
    mixed = config.replaced({"teachers": (str(tmp_path / "teacher.safetensors"),), "loss.soft_weight": 1.0})
    fit(mixed, tmp_path / "whole")
    fit(mixed, tmp_path / "parts", progress=_stop_at(5))
    fit(mixed, tmp_path / "parts")
    _assert_same_bits(tmp_path / "whole", tmp_path / "parts")


def test_worker_processes_give_the_same_crops(data: DataConfig) -> None:
    slab, _ = load_annotated(data)
    alone = CropDataset(slab, data, AugmentConfig(), seed=3)
    for ours, theirs in zip(batches(alone, range(2, 5), workers=0), batches(alone, range(2, 5), workers=1), strict=True):
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
    monkeypatch.setattr(kdunet.fit.losses, "soft_dice_loss", lambda margins, labels, **_: margins.sum() * float("nan"))
    with pytest.raises(TrainingError, match="the loss is nan at step 4; the last checkpoint is untouched"):
        fit(config, tmp_path / "run")
    assert (tmp_path / "run" / CHECKPOINT_FILE).read_bytes() == before


def test_metrics_of_a_stopped_run_hold_each_step_once(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kdunet.records, "LOG_EVERY", 1)
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


def test_slice_margin_does_not_depend_on_what_is_beyond_the_slice(data: DataConfig) -> None:
    """Cut out of a larger mirrored picture, the same voxels come out."""
    torch.manual_seed(0)
    network = UNet(1, intensity=(128.0, 50.0)).eval()
    image = np.random.default_rng(0).integers(0, 256, (37, 52), dtype=np.uint8)
    device = torch.device("cpu")
    found = slice_margin(network, image, device=device)
    assert found.shape == image.shape
    larger = np.pad(image, 112, mode="reflect")
    np.testing.assert_allclose(slice_margin(network, larger, device=device)[112:149, 112:164], found, atol=1e-5)


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
        ({"unseen.images": "none.tif"}, VolumeNotFound, "there is no file none.tif"),
        ({"start": "none"}, TrainingError, "there is no file none"),
        ({"teachers": ("none",), "loss.soft_weight": 1.0}, TrainingError, "there is no teacher none; give a run's folder"),
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


def _learn_nothing(monkeypatch: pytest.MonkeyPatch, config: RunConfig, **changes: object) -> RunConfig:
    """A run whose network never becomes more than a constant, watched from its first step."""
    monkeypatch.setattr(kdunet.fit, "CollapseWatch", lambda weights, grace: CollapseWatch(weights, window=4, grace=1))
    return config.replaced({"optim.learning_rate": 1e-12, "optim.steps": 12, "batch_norm": "none", **changes})


def _flat_start(folder: Path) -> str:
    network = UNet(1, batch_norm="none")
    torch.nn.init.zeros_(network.head.weight)
    save_network(folder / "flat.safetensors", network, {})
    return str(folder / "flat.safetensors")


def test_a_constant_is_recognised_stops_the_run_and_is_in_its_result(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = _learn_nothing(monkeypatch, config, start=_flat_start(tmp_path))
    result = fit(flat, tmp_path / "run")
    assert (result.finished, result.stopped_by) == (False, "collapse")
    assert result.step < 12
    assert result.collapse is not None
    written = json.loads((tmp_path / "run" / RESULT_FILE).read_text())
    assert written["collapse"]["last_step"] == result.step
    with pytest.raises(TrainingError, match="holds a finished run"):
        fit(flat, tmp_path / "run")


def test_a_constant_can_be_ignored(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = fit(_learn_nothing(monkeypatch, config, start=_flat_start(tmp_path), on_collapse="ignore"), tmp_path / "run")
    assert (result.finished, result.step) == (True, 12)
    assert result.collapse is not None


def test_a_run_begins_again_with_other_weights_until_one_is_no_constant(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Once(CollapseWatch):
        """Sees a collapse at step 5 of the first two attempts."""

        attempts = 0

        def __init__(self, weights: tuple[float, float], *, grace: int) -> None:
            super().__init__(weights)
            Once.attempts += 1

        @property
        def collapsed(self) -> Collapse | None:
            seen = self.step == 5 and Once.attempts <= 2
            numbers = dict.fromkeys(("cross_entropy", "floor", "deviation", "perfect_deviation"), 0.1)
            return Collapse(**numbers, first_step=1, last_step=5) if seen else None

    monkeypatch.setattr(kdunet.fit, "CollapseWatch", Once)
    monkeypatch.setattr(kdunet.records, "LOG_EVERY", 1)
    result = fit(config.replaced({"on_collapse": "restart"}), tmp_path / "run")
    assert (result.finished, result.step, result.n_restarts, result.collapse) == (True, 8, 2, None)
    steps = [step for step, _ in UnseenLog.read(tmp_path / "run" / "examples.csv")]
    assert steps == [step for step in range(1, 9) for _ in range(config.data.batch)]
    plain = fit(config, tmp_path / "plain")
    assert plain.n_restarts == 0
    assert not torch.equal(_state(tmp_path / "run")["student.head.weight"], _state(tmp_path / "plain")["student.head.weight"])


def test_what_always_collapses_stops_after_the_last_restart(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kdunet.fit, "MAX_RESTARTS", 2)
    result = fit(_learn_nothing(monkeypatch, config, start=_flat_start(tmp_path), on_collapse="restart"), tmp_path / "run")
    assert (result.stopped_by, result.n_restarts) == ("collapse", 2)


def test_a_run_starts_from_a_network_and_keeps_it_where_nothing_is_better(config: RunConfig, tmp_path: Path) -> None:
    torch.manual_seed(5)
    start = UNet(1, intensity=(123.0, 45.0))
    save_network(tmp_path / "start.safetensors", start, {})
    still = config.replaced({"start": str(tmp_path / "start.safetensors"), "optim.learning_rate": 1e-30})
    fit(still, tmp_path / "run")
    network, about = load_network(tmp_path / "run")
    assert about["step"] == 0
    assert float(network.mean) == 123.0
    torch.testing.assert_close(dict(network.named_parameters()), dict(start.named_parameters()))
    with pytest.raises(TrainingError, match=r"holds \{.*'width': 1.*asks for \{.*'width': 2"):
        fit(still.replaced({"width": 2}), tmp_path / "wider")


def test_frozen_normalisation_keeps_its_statistics(config: RunConfig, tmp_path: Path) -> None:
    fit(config.replaced({"optim.freeze_batch_norm": True}), tmp_path / "frozen")
    fit(config, tmp_path / "plain")
    name = "student.encoder.0.1.running_mean"
    assert float(_state(tmp_path / "frozen")[name].abs().max()) == 0.0
    assert float(_state(tmp_path / "plain")[name].abs().max()) > 0.0


def test_sequential_learns_from_the_teacher_first_and_then_from_the_labels(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kdunet.records, "LOG_EVERY", 1)
    sequential = config.replaced({f"loss.{name}": value for name, value in METHODS["sequential"].items()})
    fit(sequential, tmp_path / "run", teacher=lambda images: images[:, 0] - 150.0)
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["name"] == "soft"] == ["1", "2", "3", "4"]
    assert [row["step"] for row in rows if row["name"] == "hard"] == ["5", "6", "7", "8"]
    assert [row["step"] for row in rows if row["name"] == "dice"] == ["5", "6", "7", "8"]


def test_the_test_curve_is_logged_and_steers_nothing(config: RunConfig, tmp_path: Path) -> None:
    watched = config.replaced(
        {"unseen.images": config.data.images, "unseen.labels": config.data.labels, "unseen.every": 2, "unseen.stride": 3}
    )
    fit(watched, tmp_path / "watched")
    fit(config, tmp_path / "plain")
    _assert_same_bits(tmp_path / "watched", tmp_path / "plain")
    rows = UnseenLog.read(tmp_path / "watched" / "unseen.csv")
    assert [step for step, _ in rows] == [2, 4, 6, 8]
    fit(watched, tmp_path / "parts", progress=_stop_at(5))
    fit(watched, tmp_path / "parts")
    assert UnseenLog.read(tmp_path / "parts" / "unseen.csv") == rows
    with pytest.raises(ConfigError, match=r"unseen.slices is 0 to 11"):
        fit(watched.replaced({"unseen.slices": (0, 11)}), tmp_path / "beyond")


def test_labels_of_several_values_need_a_foreground(config: RunConfig, tmp_path: Path) -> None:
    labels = np.zeros((10, 64, 80), np.uint8)
    labels[:, 20:40, 20:40], labels[:, 40:50, 20:40] = 3, 7
    tifffile.imwrite(tmp_path / "labels.tif", labels, photometric="minisblack")
    several = config.replaced({"data.labels": str(tmp_path / "labels.tif")})
    with pytest.raises(
        VolumeError, match="holds the values 3, 7 beside 0, so it is not binary; name the foreground with --foreg"
    ):
        fit(several, tmp_path / "run")
    slab, _ = load_annotated(several.replaced({"data.ignore": 7}).data)
    assert set(np.unique(slab.truth)) == {0, 1, IGNORED}
    assert slab.foreground_fraction == pytest.approx(400 / (64 * 80 - 200))
    _, _ = load_annotated(several.replaced({"data.foreground": 3}).data)


def test_stored_probabilities_teach_warped_with_their_crop(config: RunConfig, tmp_path: Path) -> None:
    truth = tifffile.imread(config.data.labels)
    tifffile.imwrite(tmp_path / "stored.tif", np.where(truth, 230, 20).astype(np.uint8), photometric="minisblack")
    taught = config.replaced({"data.probabilities": str(tmp_path / "stored.tif"), "loss.soft_weight": 1.0})
    slab, _ = load_annotated(taught.data)
    batch = CropDataset(slab, taught.data, AugmentConfig(), seed=1)[0]
    assert batch.taught is not None
    agree = (batch.taught > 0) == (batch.labels == 1)
    assert float(agree.float().mean()) > 0.995  # both are cut at one half of what is interpolated
    assert fit(taught, tmp_path / "run").finished
    tifffile.imwrite(tmp_path / "float.tif", truth.astype(np.float32), photometric="minisblack")
    with pytest.raises(VolumeError, match="holds values from 0 to 255; probabilities are 0 to 1, or uint8"):
        fit(taught.replaced({"data.probabilities": str(tmp_path / "float.tif")}), tmp_path / "other")
    tifffile.imwrite(tmp_path / "small.tif", truth[:, :10, :10], photometric="minisblack")
    with pytest.raises(VolumeError, match="give probabilities of the same slices"):
        fit(taught.replaced({"data.probabilities": str(tmp_path / "small.tif")}), tmp_path / "other")
