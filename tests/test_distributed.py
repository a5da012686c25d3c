"""Several processes learn what one does: the batch is shared, the losses are those of the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from kdunet.checkpoint import load_tensors, save_network
from kdunet.config import AugmentConfig, DataConfig, LossConfig, OptimConfig, RunConfig
from kdunet.fit import CHECKPOINT_FILE
from kdunet.unet import UNet
from kdunet_infer.errors import ConfigError

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A small mixed distillation from given weights, its batches of four crops."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    truth = rng.random((10, 64, 64)) < np.linspace(0.01, 0.6, 64)  # crops differ in how much foreground they have
    images = np.clip(rng.normal(170, 20, truth.shape) - 90 * truth, 0, 255).astype(np.uint8)
    tifffile.imwrite(folder / "images.tif", images, photometric="minisblack")
    tifffile.imwrite(folder / "labels.tif", truth.astype(np.uint8), photometric="minisblack")
    torch.manual_seed(0)
    student = UNet(1, intensity=(150.0, 40.0))
    with torch.no_grad():
        student.train()(torch.from_numpy(images[:, None]).float())  # running statistics of these images
    save_network(folder / "start.safetensors", student, {})
    save_network(folder / "teacher.safetensors", UNet(2, intensity=(150.0, 40.0)), {})
    return RunConfig(
        width=1,
        start=str(folder / "start.safetensors"),
        teachers=(str(folder / "teacher.safetensors"),),
        accelerator="cpu",
        validate_every=100,
        data=DataConfig(images=str(folder / "images.tif"), labels=str(folder / "labels.tif"), crop=32, batch=4, workers=0),
        augment=AugmentConfig.none(),
        loss=LossConfig(soft_weight=1.0, class_weights="inverse"),
        optim=OptimConfig(steps=4, learning_rate=1e-3, ema_decay=0.5),
    )


def _trained(config: RunConfig, folder: Path, *launcher: str) -> dict[str, torch.Tensor]:
    folder.mkdir()
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    command = [*(launcher or (sys.executable,)), "-m", "kdunet", "distill", "--config", str(folder / "config.toml")]
    ended = subprocess.run(
        [*command, "--out", str(folder / "run")], env=ONE_THREAD, capture_output=True, text=True, timeout=150
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("the network is in") == 1, "one process reports"
    tensors, about = load_tensors(folder / "run" / CHECKPOINT_FILE)
    assert about["step"] == config.optim.steps
    return {name.removeprefix("student."): tensor for name, tensor in tensors.items() if name.startswith("student.")}


def _furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


def test_two_processes_equal_one_with_the_same_batch_once_normalisation_is_frozen(config: RunConfig, tmp_path: Path) -> None:
    frozen = config.replaced({"optim.freeze_batch_norm": True})
    alone = _trained(frozen, tmp_path / "one")
    together = _trained(frozen.replaced({"devices": 2}), tmp_path / "two")
    started = UNet(1).state_dict()
    assert _furthest(alone, together) < 1e-6
    assert max(float((alone[name] - started[name]).abs().max()) for name in ("head.weight", "encoder.0.0.weight")) > 1e-3


def test_with_normalisation_by_batch_each_process_has_its_own_statistics(config: RunConfig, tmp_path: Path) -> None:
    alone = _trained(config, tmp_path / "one")
    together = _trained(
        config.replaced({"devices": 2}), tmp_path / "two", str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node=2"
    )
    assert 1e-6 < _furthest(alone, together) < 1.0


def test_a_batch_that_cannot_be_shared_equally_is_refused() -> None:
    from kdunet.data import BatchDataset

    with pytest.raises(ConfigError, match=r"data.batch is 5, which 2 devices cannot share equally"):
        BatchDataset(5, seed=0, n_ranks=2)
