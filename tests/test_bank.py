"""A bank holds crops and the teacher's answers to them; draws are pure functions of (seed, step); other banks are refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import tifffile
import torch
from click.testing import CliRunner
from torch import Tensor

import kdunet.cli
from kdunet.augment import changed_grey_values
from kdunet.bank import (
    BANK_FILE,
    CROP_STREAM,
    IMAGES_FILE,
    LABELS_FILE,
    MARGINS_FILE,
    BankDataset,
    flipped,
    make_bank,
    open_bank,
    training_batches,
)
from kdunet.checkpoint import save_network
from kdunet.config import AugmentConfig, RunConfig
from kdunet.data import Annotated, CropDataset, batches, load_annotated
from kdunet.unet import UNet
from kdunet_infer.errors import ConfigError, TrainingError

N_CROPS = 11  # no multiple of the batch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Bright discs on black, 8 slices of 80 x 96: an image says what its label is."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:80, :96]
    truth = np.stack([(y - cy) ** 2 + (x - cx) ** 2 < 400 for cy, cx in rng.integers(20, 60, (8, 2))])
    tifffile.imwrite(folder / "images.tif", truth.astype(np.uint8) * 200, photometric="minisblack")
    tifffile.imwrite(folder / "labels.tif", truth.astype(np.uint8) * 255, photometric="minisblack")
    tifffile.imwrite(folder / "probabilities.tif", 0.9 * truth.astype(np.float32), photometric="minisblack")
    torch.manual_seed(0)
    save_network(folder / "teacher.safetensors", UNet(2, n_levels=2, intensity=(100.0, 60.0)), {})
    return RunConfig(accelerator="cpu").replaced(
        {
            "data.images": str(folder / "images.tif"),
            "data.labels": str(folder / "labels.tif"),
            "data.train_slices": (0, 6),
            "data.validation_slices": (7, 8),
            "data.crop": 32,
            "data.batch": 4,
            "data.workers": 0,
            "augment.elastic_spacing_px": 16,
        }
    )


@pytest.fixture(scope="module")
def taught(config: RunConfig) -> RunConfig:
    return config.replaced({"teachers": (str(Path(config.data.images).with_name("teacher.safetensors")),)})


@pytest.fixture(scope="module")
def bank(taught: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bank") / "bank"
    make_bank(taught, path, n_crops=N_CROPS)
    return path


def slab(config: RunConfig) -> Annotated:
    return load_annotated(config.data)[0]


def opened(path: Path, config: RunConfig) -> BankDataset:
    return open_bank(path, slab(config), config)


def without_grey_changes(config: RunConfig) -> RunConfig:
    return config.replaced({f"augment.{name}": 0.0 for name in ("brightness", "contrast", "gamma", "noise")})


def brightness_less_100(images: Tensor) -> Tensor:
    return images[:, 0] - 100


def test_any_number_of_workers_writes_the_same_bytes(bank: Path, taught: RunConfig, tmp_path: Path) -> None:
    done: list[int] = []
    make_bank(taught.replaced({"data.workers": 1}), tmp_path / "helped", n_crops=N_CROPS, progress=done.append)
    assert done == [4, 8, 11]
    assert {path.name for path in bank.iterdir()} == {BANK_FILE, IMAGES_FILE, LABELS_FILE, MARGINS_FILE}
    for path in bank.iterdir():
        assert path.read_bytes() == (tmp_path / "helped" / path.name).read_bytes(), path.name


def test_it_holds_warped_crops_with_the_grey_values_as_they_are(bank: Path, taught: RunConfig) -> None:
    source = CropDataset(slab(taught), taught.data, taught.augment, seed=taught.seed)
    images, labels = np.load(bank / IMAGES_FILE), np.load(bank / LABELS_FILE)
    assert images.shape == labels.shape == (N_CROPS, 32, 32)
    for index in range(N_CROPS):
        image, label, _ = source.warped(np.random.default_rng((taught.seed, CROP_STREAM, index)))
        np.testing.assert_array_equal(images[index], np.rint(image.numpy()))
        np.testing.assert_array_equal(labels[index], label.numpy())
    assert 0.02 < labels.mean() < 0.9
    other = CropDataset(slab(taught), taught.data, taught.augment, seed=taught.seed + 1)
    assert not torch.equal(other.warped(np.random.default_rng((1, CROP_STREAM, 0)))[0].round(), torch.from_numpy(images[0]))


def test_a_student_is_taught_what_the_teacher_answers_to_that_very_crop(bank: Path, taught: RunConfig) -> None:
    plain = without_grey_changes(taught)
    dataset = opened(bank, plain)
    dataset.augment = dataclasses.replace(plain.augment, flip=False)
    torch.manual_seed(0)
    teacher = UNet(2, n_levels=2, intensity=(100.0, 60.0)).eval()
    for step in range(3):
        batch = dataset[step]
        with torch.inference_mode():
            logits = teacher(batch.images)
        assert batch.taught is not None
        assert batch.taught.dtype == torch.float32
        torch.testing.assert_close(batch.taught, logits[:, 1] - logits[:, 0], rtol=2**-10, atol=1e-4)


def test_labels_and_margins_follow_the_image_through_windows_flips_and_turns(config: RunConfig, tmp_path: Path) -> None:
    make_bank(config.replaced({"data.crop": 48}), tmp_path / "bank", n_crops=3, teacher=brightness_less_100)
    dataset = opened(tmp_path / "bank", without_grey_changes(config))
    stored = np.load(tmp_path / "bank" / IMAGES_FILE)
    seen = set()
    for step in range(40):
        batch = dataset[step]
        assert batch.images.shape == (4, 1, 32, 32)
        assert batch.taught is not None
        torch.testing.assert_close(batch.taught, batch.images[:, 0] - 100)
        assert torch.equal(batch.labels == 1, batch.images[:, 0] >= 100)
        seen.update(image.numpy().tobytes() for image in batch.images[:, 0])
    windows = np.lib.stride_tricks.sliding_window_view(stored, (32, 32), axis=(1, 2)).reshape(-1, 32, 32).astype(np.float32)
    possible = {np.rot90(w, k).tobytes() for window in windows for w in (window, window[:, ::-1]) for k in range(4)}
    assert seen <= possible
    assert len(seen) > 100  # of 160 draws


def test_the_eight_turns_are_those_of_numpy() -> None:
    plane = np.arange(12).reshape(3, 4)
    ours = {flipped(plane, turn).tobytes() + bytes(flipped(plane, turn).shape) for turn in range(8)}
    turned = [np.rot90(a, k) for a in (plane, plane[:, ::-1]) for k in range(4)]
    assert ours == {a.tobytes() + bytes(a.shape) for a in turned}
    assert len(ours) == 8
    np.testing.assert_array_equal(flipped(plane, 0), plane)


def test_a_batch_is_a_function_of_seed_and_step(bank: Path, taught: RunConfig) -> None:
    whole = list(batches(opened(bank, taught), range(4), workers=0))
    resumed = list(batches(opened(bank, taught), range(2, 4), workers=1))
    for ours, theirs in zip(whole[2:], resumed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(whole[0].images, whole[1].images)
    assert not torch.equal(whole[0].images, opened(bank, taught.replaced({"seed": 1}))[0].images)
    shares = [
        training_batches(taught.replaced({"data.bank": str(bank)}), slab(taught), rank=rank, n_ranks=2) for rank in (0, 1)
    ]
    assert torch.equal(torch.cat([share[1].images for share in shares]), whole[1].images)


def test_without_a_bank_crops_are_new(config: RunConfig) -> None:
    dataset = training_batches(config, slab(config))
    assert isinstance(dataset, CropDataset)
    assert torch.equal(dataset[0].images, CropDataset(slab(config), config.data, config.augment, seed=config.seed)[0].images)


def test_without_a_teacher_there_are_no_margins(config: RunConfig, taught: RunConfig, tmp_path: Path) -> None:
    make_bank(config, tmp_path / "bank", n_crops=2)
    assert not (tmp_path / "bank" / MARGINS_FILE).exists()
    assert opened(tmp_path / "bank", config)[0].taught is None
    assert opened(tmp_path / "bank", taught)[0].taught is None  # the run asks its own teacher


def test_stored_probabilities_are_a_teacher(config: RunConfig, tmp_path: Path) -> None:
    stored = config.replaced({"data.probabilities": config.data.images.replace("images", "probabilities")})
    make_bank(stored, tmp_path / "bank", n_crops=2)
    margins = np.load(tmp_path / "bank" / MARGINS_FILE)
    assert set(np.round(np.unique(margins)[[0, -1]], 3)) == {np.float16(-6.906), np.float16(2.197)}  # logits of 0.001 and 0.9
    assert opened(tmp_path / "bank", stored)[0].taught is not None
    make_bank(config, tmp_path / "untaught", n_crops=2)
    with pytest.raises(TrainingError, match=r"made with teacher probabilities none and this run has [0-9a-f]{12}\.\.\.; make"):
        opened(tmp_path / "untaught", stored)


def test_margins_that_float16_does_not_hold_are_cut(config: RunConfig, tmp_path: Path) -> None:
    make_bank(config, tmp_path / "bank", n_crops=2, teacher=lambda images: 1e6 * (images[:, 0] - 100))
    assert set(np.unique(np.load(tmp_path / "bank" / MARGINS_FILE))) >= {-65504.0, 65504.0}


def test_a_bank_that_is_not_whole_is_refused_and_can_be_made_again(config: RunConfig, tmp_path: Path) -> None:
    path = tmp_path / "bank"
    with pytest.raises(TrainingError, match=r"bank holds no bank, for there is no bank.json; make it with `kdunet bank --out"):
        opened(path, config)

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_bank(config, path, n_crops=8, teacher=brightness_less_100, progress=interrupted)
    with pytest.raises(TrainingError, match="bank holds an unfinished bank"):
        opened(path, config)
    make_bank(config, path, n_crops=8)
    with pytest.raises(TrainingError, match="bank holds a bank; give another --out, or remove it"):
        make_bank(config, path, n_crops=8)
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(TrainingError, match="exists and holds no unfinished bank; give another --out"):
        make_bank(config, tmp_path, n_crops=8)
    assert (tmp_path / "notes").read_text() == "mine"


def _edit(key: str, value: object) -> Callable[[Path], None]:
    def edit(bank: Path) -> None:
        about = json.loads((bank / BANK_FILE).read_text())
        (bank / BANK_FILE).write_text(json.dumps({**about, key: value}))

    return edit


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda bank: (bank / BANK_FILE).write_text("{"), r"bank.json is damaged \(JSONDecodeError"),
        (lambda bank: (bank / BANK_FILE).write_text("[]"), r"bank.json is damaged \(TypeError"),
        (lambda bank: (bank / BANK_FILE).write_text('{"format": 1}'), r"bank.json is damaged \(KeyError\('n_crops'\)"),
        (_edit("crop", "32"), r"bank.json is damaged \(TypeError\('crop'\)\); make the bank again"),
        (_edit("format", 2), "bank.json is of format 2, this version reads 1; make the bank again"),
        (_edit("n_crops", 12), r"images.npy is uint8 \(11, 32, 32\), not uint8 \(12, 32, 32\) as bank.json says"),
        (lambda bank: (bank / MARGINS_FILE).unlink(), r"margins.npy cannot be read \(.*No such file.*\); make the bank again"),
        (lambda bank: (bank / IMAGES_FILE).write_bytes(b""), "images.npy cannot be read"),
        (lambda bank: (bank / LABELS_FILE).write_bytes(pickle.dumps([1])), "labels.npy cannot be read"),
        (lambda bank: (bank / LABELS_FILE).write_bytes((bank / LABELS_FILE).read_bytes()[:-9]), "labels.npy cannot be read"),
        (lambda bank: (bank / MARGINS_FILE).write_bytes((bank / IMAGES_FILE).read_bytes()), "is uint8 .*, not float16"),
    ],
    ids=["json", "list", "keys", "type", "format", "number", "missing", "empty", "pickle", "short", "dtype"],
)
def test_a_damaged_bank_is_refused(
    bank: Path, taught: RunConfig, tmp_path: Path, harm: Callable[[Path], Any], says: str
) -> None:
    copy = tmp_path / "bank"
    copy.mkdir()
    for path in bank.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    opened(copy, taught)
    harm(copy)
    with pytest.raises(TrainingError, match=says):
        opened(copy, taught)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"data.crop": 48}, "has crops of 32 pixels and data.crop is 48; lower it"),
        (
            {"data.train_slices": (0, 5)},
            r"was made with data images [0-9a-f]{12}\.\.\. and this run has [0-9a-f]{12}\.\.\.; make",
        ),
        ({"data.foreground": 0}, "was made with data labels"),
        ({"augment.scale": 0.3}, "was made with augment scale 0.2 and this run has 0.3; make a bank for it with `kdunet bank`"),
        ({"augment.flip": False}, "augment flip True and this run has False"),
        ({"teacher_average": "flips"}, "teacher average none and this run has flips"),
        ({"data.probabilities": "probabilities.tif", "teachers": ()}, "teacher probabilities none and this run has"),
    ],
    ids=["crop", "images", "labels", "warp", "flip", "average", "probabilities"],
)
def test_a_bank_of_something_else_is_refused(bank: Path, taught: RunConfig, change: dict[str, Any], says: str) -> None:
    if "data.probabilities" in change:
        change = {**change, "data.probabilities": taught.data.images.replace("images", "probabilities")}
    with pytest.raises(TrainingError, match=says):
        opened(bank, taught.replaced(change))


def test_what_may_differ_between_a_bank_and_its_runs(bank: Path, taught: RunConfig, tmp_path: Path) -> None:
    for name in ("images.tif", "labels.tif", "teacher.safetensors"):
        (tmp_path / name).write_bytes(Path(taught.data.images).with_name(name).read_bytes())
    moved = {"data.images": str(tmp_path / "images.tif"), "data.labels": str(tmp_path / "labels.tif")}
    opened(bank, taught.replaced({**moved, "teachers": (str(tmp_path / "teacher.safetensors"),)}))
    changed = taught.replaced({"seed": 3, "data.crop": 16, "augment.noise": 1.0, "data.batch": 2, "teachers": ()})
    assert opened(bank, changed)[0].taught is not None
    torch.manual_seed(1)
    save_network(tmp_path / "other.safetensors", UNet(2, n_levels=2), {})
    with pytest.raises(
        TrainingError, match=r"made with teacher files [0-9a-f]{12}\.\.\. and this run has [0-9a-f]{12}\.\.\. and"
    ):
        opened(bank, taught.replaced({"teachers": (*taught.teachers, str(tmp_path / "other.safetensors"))}))


def test_a_bank_has_one_teacher(taught: RunConfig, tmp_path: Path) -> None:
    both = taught.replaced({"data.probabilities": taught.data.images.replace("images", "probabilities")})
    with pytest.raises(ConfigError, match=r"data.probabilities names .*probabilities.tif and there is a teacher beside"):
        make_bank(both, tmp_path / "bank", n_crops=1)


def test_a_teacher_of_no_use_is_refused(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the teacher answers images of shape \(2, 1, 32, 32\) with \(2, 1, 32, 32\)"):
        make_bank(config, tmp_path / "bank", n_crops=1, teacher=lambda images: images)
    assert not (tmp_path / "bank").exists()
    # finite on ramps, whose corner is black; not on black crops
    with pytest.raises(TrainingError, match="the teacher answers crops 0 to 3 with values that are not finite; choose another"):
        make_bank(
            config,
            tmp_path / "bank",
            n_crops=8,
            teacher=lambda images: images[:, 0] / images.amax(dim=(1, 2, 3)).sub(200)[:, None, None].relu(),
        )


def test_whole_grey_values_change_like_any(config: RunConfig) -> None:
    whole = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8))
    for seed in range(5):
        looked_up, computed = (
            changed_grey_values(image, config.augment, np.random.default_rng(seed)) for image in (whole, whole.float())
        )
        torch.testing.assert_close(looked_up, computed, atol=1e-3, rtol=0)


def test_noise_is_normal() -> None:
    noisy = AugmentConfig.none()
    grey = torch.full((256, 256), 128, dtype=torch.uint8)
    noise = changed_grey_values(grey, dataclasses.replace(noisy, noise=8.0), np.random.default_rng(1)).numpy().ravel() - 128
    sigma = np.random.default_rng(1).uniform(size=4)[3] * 8
    assert scipy.stats.kstest(noise / sigma, "norm").pvalue > 0.01
    assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.02


def test_the_commands_make_and_use_a_bank(config: RunConfig, taught: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(config.replaced({"width": 1, "optim.steps": 2, "validate_every": 2}).to_toml())
    teachers = [option for path in taught.teachers * 2 for option in ("--teacher", path)]
    options = ["--config", str(tmp_path / "config.toml"), *teachers, "--teacher-average", "flips"]

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(kdunet.cli.main, arguments)
        assert result.exit_code == 0, result.output
        return result.output

    said = run("bank", *options, "--crops", "5", "--out", str(tmp_path / "bank"))
    assert "wrote 5 crops of 32 x 32 pixels; train from them with --bank" in said
    about = json.loads((tmp_path / "bank" / BANK_FILE).read_text())
    assert (len(about["teacher"]["files"]), about["teacher"]["average"]) == (2, "flips")
    run("distill", *options, "--method", "soft", "--bank", str(tmp_path / "bank"), "--out", str(tmp_path / "run"))
    assert f'bank = "{tmp_path / "bank"}"' in (tmp_path / "run" / "config.toml").read_text()
