"""Annotated volumes -> crops. A batch is a pure function of (seed, step), so a resumed run sees the very same crops."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tifffile
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdunet.augment import changed_grey_values, warped_crop
from kdunet.config import AugmentConfig, DataConfig, Slab
from kdunet_infer.errors import ConfigError, VolumeError, VolumeNotFound

UInt8Array = npt.NDArray[np.uint8]


class Batch(NamedTuple):
    """What one step learns from."""

    images: Tensor
    """(n, 1, y, x) float32, 0 to 255."""
    labels: Tensor
    """(n, y, x) int64, 0 or 1."""


@dataclass(frozen=True, slots=True)
class Annotated:
    """A slab of slices with its truth, both (z, y, x) uint8; truth 0 or 1."""

    images: UInt8Array
    truth: UInt8Array

    @property
    def foreground_fraction(self) -> float:
        """Share of the voxels that are foreground."""
        return float(self.truth.mean(dtype=np.float64))

    @property
    def intensity(self) -> tuple[float, float]:
        """Mean and standard deviation of the grey values, 0 to 255; a deviation of 0 counts as 1."""
        return float(self.images.mean(dtype=np.float64)), float(self.images.std(dtype=np.float64)) or 1.0


def load_annotated(config: DataConfig) -> tuple[Annotated, Annotated]:
    """The training and the validation slab.

    Raises VolumeError for files that cannot be read or do not fit each other, ConfigError for slabs that are not in the
    volume or overlap.
    """
    images: npt.NDArray[Any] = _read_stack(config.images, "--images")
    labels = _read_stack(config.labels, "--labels")
    if images.shape != labels.shape:
        raise VolumeError(
            f"{config.images} has shape {images.shape} and {config.labels} {labels.shape}; give labels of the same slices."
        )
    if images.dtype != np.uint8:
        raise VolumeError(f"{config.images} is {images.dtype}; training reads uint8, so convert it first.")
    truth = (labels != 0 if config.foreground is None else labels == config.foreground).astype(np.uint8)
    train, validation = slabs(config, n_slices=len(images))
    slab = Annotated(images[slice(*train)], truth[slice(*train)])
    if not slab.truth.any():
        raise VolumeError(f"{config.labels} has no foreground in slices {train[0]} to {train[1] - 1}; check the labels.")
    return slab, Annotated(images[slice(*validation)], truth[slice(*validation)])


def slabs(config: DataConfig, *, n_slices: int) -> tuple[Slab, Slab]:
    """The slices to train on and to validate on, half-open.

    Raises ConfigError where a slab is empty or leaves the volume, or where the two overlap.
    """
    train = config.train_slices or (0, max(1, round(0.82 * n_slices)))
    validation = config.validation_slices or (min(round(0.88 * n_slices), n_slices - 1), n_slices)
    for name, (begin, end) in (("train_slices", train), ("validation_slices", validation)):
        if not 0 <= begin < end <= n_slices:
            raise ConfigError(f"data.{name} is {begin} to {end}; the volume has slices 0 to {n_slices} (end not included).")
    if max(train[0], validation[0]) < min(train[1], validation[1]):
        raise ConfigError(f"train_slices {train} and validation_slices {validation} overlap; validation must be unseen.")
    return train, validation


class CropDataset(Dataset[Batch]):
    """Batches by step: `dataset[step]` is the same whenever and wherever it is asked for."""

    def __init__(self, slab: Annotated, config: DataConfig, augment: AugmentConfig, *, seed: int, rank: int = 0) -> None:
        if min(slab.images.shape[1:]) < config.crop:
            raise ConfigError(f"data.crop is {config.crop} and a slice {slab.images.shape[1:]}; choose a smaller crop.")
        self.images, self.truth = torch.from_numpy(slab.images), torch.from_numpy(slab.truth)
        self.config, self.augment, self.seed, self.rank = config, augment, seed, rank

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng((self.seed, self.rank, step))
        crops = [self._crop(rng) for _ in range(self.config.batch)]
        images, labels = zip(*crops, strict=True)
        return Batch(torch.stack(images)[:, None], torch.stack(labels))

    def _crop(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        n_slices, height, width = self.images.shape
        size = self.config.crop
        z, y, x = (int(rng.integers(0, limit)) for limit in (n_slices, height - size + 1, width - size + 1))
        image, mask = warped_crop(self.images[z], self.truth[z], (y, x), size, self.augment, rng)
        return changed_grey_values(image, self.augment, rng), mask


def batches(dataset: CropDataset, steps: Iterable[int]) -> Iterator[Batch]:
    """Batches of the given steps in order, prepared ahead by worker processes so that the network never waits for data."""
    workers = dataset.config.workers
    loader: DataLoader[Batch] = DataLoader(
        dataset,
        batch_size=None,
        sampler=list(steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_interrupts_to_the_loop,
    )
    yield from loader


def _leave_interrupts_to_the_loop(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the loop still wants its batch


def _read_stack(path: str, option: str) -> npt.NDArray[np.generic]:
    if not path:
        raise ConfigError(f"no {option.removeprefix('--')} are given; name a TIFF stack with {option}.")
    if not Path(path).is_file():
        raise VolumeNotFound(f"there is no file {path}; check the path given to {option}.")
    try:
        stack: npt.NDArray[np.generic] = tifffile.imread(path)
    except Exception as exc:  # tifffile raises many kinds, down to struct.error and IndexError
        raise VolumeError(f"{path} cannot be read as TIFF ({exc}); give {option} an intact TIFF stack.") from exc
    if stack.ndim not in (2, 3):
        raise VolumeError(f"{path} has shape {stack.shape}; {option} needs slices (z, y, x) or one slice (y, x).")
    return stack if stack.ndim == 3 else stack[None]
