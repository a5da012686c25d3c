"""Annotated volumes -> crops. A batch is a pure function of (seed, step), so a resumed run sees the very same crops."""

from __future__ import annotations

import dataclasses
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
from kdunet.losses import IGNORED
from kdunet_infer.card import N_GREY_VALUES
from kdunet_infer.errors import ConfigError, VolumeError, VolumeNotFound

UInt8Array = npt.NDArray[np.uint8]

PROBABILITY_LIMITS = 1e-3, 1 - 1e-3
"""Stored probabilities are cut to these before their margin is taken: 8 bits know no better, and 0 has no margin."""


class Batch(NamedTuple):
    """What one step learns from."""

    images: Tensor
    """(n, 1, y, x) float32, 0 to 255."""
    labels: Tensor
    """(n, y, x) uint8: 0, 1, or IGNORED."""
    taught: Tensor | None
    """A teacher's stored margins for these very crops, (n, y, x) float32; None where there are none."""


@dataclass(frozen=True, slots=True)
class Annotated:
    """A slab of slices with its truth, both (z, y, x) uint8; truth 0, 1, or IGNORED where nobody annotated."""

    images: UInt8Array
    truth: UInt8Array
    probabilities: npt.NDArray[np.float32] | None = None
    """A teacher's stored foreground probabilities, (z, y, x), 0 to 1."""

    @property
    def foreground_fraction(self) -> float:
        """Share of the annotated voxels that are foreground."""
        background, foreground = (int(count) for count in value_counts(self.truth)[:2])
        return foreground / max(1, background + foreground)

    def slab(self, slices: Slab) -> Annotated:
        """The slices begin to end of it, half-open."""
        cut = slice(*slices)
        probabilities = None if self.probabilities is None else self.probabilities[cut]
        return Annotated(self.images[cut], self.truth[cut], probabilities)

    @property
    def intensity(self) -> tuple[float, float]:
        """Mean and standard deviation of the grey values, 0 to 255; a deviation of 0 counts as 1."""
        counts, grey = value_counts(self.images), np.arange(N_GREY_VALUES)
        mean = float(np.average(grey, weights=counts))
        return mean, float(np.average((grey - mean) ** 2, weights=counts)) ** 0.5 or 1.0


def load_annotated(config: DataConfig) -> tuple[Annotated, Annotated]:
    """The training and the validation slab.

    Raises VolumeError for files that cannot be read or do not fit each other and for labels that are not binary, ConfigError
    for slabs that are not in the volume or overlap.
    """
    whole = read_annotated(config.images, config.labels, foreground=config.foreground, ignore=config.ignore)
    if config.probabilities:
        whole = dataclasses.replace(whole, probabilities=_read_probabilities(config.probabilities, whole.images.shape))
    train, validation = slabs(config, n_slices=len(whole.images))
    if not (whole.truth[slice(*train)] == 1).any():
        raise VolumeError(f"{config.labels} has no foreground in slices {train[0]} to {train[1] - 1}; check the labels.")
    return whole.slab(train), whole.slab(validation)


def read_annotated(
    images_path: str, labels_path: str, *, foreground: int | None = None, ignore: int | None = None
) -> Annotated:
    """A volume and its truth. Raises VolumeError and ConfigError as `load_annotated`."""
    images: npt.NDArray[Any] = _read_stack(images_path, "--images")
    labels = _read_stack(labels_path, "--labels")
    if images.shape != labels.shape:
        raise VolumeError(
            f"{images_path} has shape {images.shape} and {labels_path} {labels.shape}; give labels of the same slices."
        )
    if images.dtype != np.uint8:
        raise VolumeError(f"{images_path} is {images.dtype}; training reads uint8, so convert it first.")
    if foreground is None:
        foreground = _only_foreground(labels, labels_path, ignore)
    truth = (labels == foreground).astype(np.uint8)
    if ignore is not None:
        truth[labels == ignore] = IGNORED
    return Annotated(images, truth)


def _only_foreground(labels: npt.NDArray[np.generic], path: str, ignore: int | None) -> int:
    values = np.flatnonzero(value_counts(labels)) if labels.dtype == np.uint8 else np.unique(labels)
    found = [int(value) for value in values if value not in (0, ignore)]
    if len(found) > 1:
        some = ", ".join(str(value) for value in found[:5]) + (", ..." if len(found) > 5 else "")
        raise VolumeError(
            f"{path} holds the values {some} beside 0, so it is not binary; name the foreground with --foreground VALUE "
            "or the voxels nobody annotated with --ignore VALUE."
        )
    return found[0] if found else 1


def _read_probabilities(path: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    stored = _read_stack(path, "--probabilities")
    if stored.shape != shape:
        raise VolumeError(f"{path} has shape {stored.shape} and the images {shape}; give probabilities of the same slices.")
    if stored.dtype == np.uint8:
        return stored.astype(np.float32) / np.float32(255)
    probabilities = stored.astype(np.float32)
    if not (probabilities.min() >= 0 and probabilities.max() <= 1):
        raise VolumeError(
            f"{path} holds values from {probabilities.min():g} to {probabilities.max():g}; probabilities are 0 to 1, or uint8."
        )
    return probabilities


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


def value_counts(voxels: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """How often each value 0 to 255 is in `voxels` (z, y, x) uint8: (256,)."""
    counts = np.zeros(N_GREY_VALUES, np.int64)
    for plane in voxels:  # counting widens its input to 8 bytes a voxel: a slice at a time
        counts += np.bincount(plane.ravel(), minlength=N_GREY_VALUES)
    return counts


class BatchDataset(Dataset[Batch]):
    """Batches by step: `dataset[step]` is the same whenever and wherever it is asked for.

    Crop i of a step's whole batch depends on (seed, step, i) alone; of `n_ranks` processes each makes its own share.
    """

    def __init__(self, batch: int, *, seed: int, rank: int = 0, n_ranks: int = 1) -> None:
        if batch % n_ranks:
            raise ConfigError(f"data.batch is {batch}, which {n_ranks} devices cannot share equally; choose a multiple.")
        share = batch // n_ranks
        self.seed, self.share = seed, range(rank * share, (rank + 1) * share)

    @property
    def is_taught(self) -> bool:
        """Whether a teacher's answers come with the crops."""
        raise NotImplementedError

    def __getitem__(self, step: int) -> Batch:
        crops = [self.crop(np.random.default_rng((self.seed, step, index))) for index in self.share]
        images, labels, taught = zip(*crops, strict=True)
        return Batch(torch.stack(images)[:, None], torch.stack(labels), None if taught[0] is None else torch.stack(taught))

    def crop(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """A random crop: image (y, x) float32, labels (y, x) uint8, taught margins (y, x) float32 or None."""
        raise NotImplementedError


class CropDataset(BatchDataset):
    """New crops of a slab at every step, warped and with changed grey values."""

    def __init__(
        self, slab: Annotated, config: DataConfig, augment: AugmentConfig, *, seed: int, rank: int = 0, n_ranks: int = 1
    ) -> None:
        super().__init__(config.batch, seed=seed, rank=rank, n_ranks=n_ranks)
        if min(slab.images.shape[1:]) < config.crop:
            raise ConfigError(f"data.crop is {config.crop} and a slice {slab.images.shape[1:]}; choose a smaller crop.")
        self.images, self.truth = torch.from_numpy(slab.images), torch.from_numpy(slab.truth)
        self.probabilities = None if slab.probabilities is None else torch.from_numpy(slab.probabilities)
        self.config, self.augment = config, augment

    @property
    def is_taught(self) -> bool:
        """Whether the slab has stored probabilities."""
        return self.probabilities is not None

    def crop(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """A crop anywhere in the slab."""
        image, labels, taught = self.warped(rng)
        return changed_grey_values(image, self.augment, rng), labels, taught

    def warped(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same with the grey values as they are."""
        n_slices, height, width = self.images.shape
        size = self.config.crop
        z, y, x = (int(rng.integers(0, limit)) for limit in (n_slices, height - size + 1, width - size + 1))
        planes = [self.images[z], self.truth[z] == 1, self.truth[z] == IGNORED]
        if self.probabilities is not None:
            planes.append(self.probabilities[z])
        image, foreground, ignored, *stored = warped_crop(planes, (y, x), size, self.augment, rng)
        labels = (foreground >= 0.5).byte()
        labels[ignored >= 0.5] = IGNORED
        return image, labels, stored[0].clamp(*PROBABILITY_LIMITS).logit() if stored else None


def batches(dataset: BatchDataset, steps: Iterable[int], *, workers: int) -> Iterator[Batch]:
    """Batches of the given steps in order, prepared ahead by worker processes so that the network never waits for data."""
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
