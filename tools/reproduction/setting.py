"""What the experiments share: where files lie, how much is computed, the report's setting and ours.

Nothing here touches a file or imports torch: the parent process of many runs stays small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdunet.config import METHODS, DataConfig, RunConfig, UnseenConfig
from kdunet_infer.errors import VolumeNotFound

Published = float | int | str


@dataclass(frozen=True, slots=True)
class Places:
    """Folders, relative to where the command runs."""

    data: Path = Path("../shared/data")
    """Holds `epfl` and `vnc`."""
    runs: Path = Path("runs/reproduce")
    """Of unfinished runs, trained teachers and banks."""
    teacher: Path = Path("models/teachers/epfl-16unet")
    """Teaches the final experiments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much is computed."""

    name: str
    steps: int
    final_steps: int
    """Of our recipe, where it is shown as it is meant."""
    teacher_steps: int
    """Of the teachers that are trained here: the report's had 300,000 iterations where its students had 9,000 to 50,000."""
    batch: int
    crop: int
    widest: int
    """The widest k-Unet that is trained."""
    bank: tuple[int, int] | None
    """How many crops of what side, in pixels, are warped and taught once; None: each crop is new, and taught in the loop."""
    accelerator: str
    one_thread: bool
    """Each run computes with a single thread."""
    workers: int
    n_validations: int
    """A run."""
    n_unseen: int
    """Evaluations of the test set a run, for the report's L*_test."""
    unseen_stride: int
    test_stride: int
    """Every how many slices of the test set one is scored once a run has ended."""


BUDGETS: Mapping[str, Budget] = {
    budget.name: budget
    for budget in (
        Budget(
            name="small",
            steps=600,
            final_steps=800,
            teacher_steps=1500,
            batch=4,
            crop=256,
            widest=16,
            bank=(2048, 256),
            accelerator="cpu",
            one_thread=True,
            workers=0,
            n_validations=4,
            n_unseen=12,
            unseen_stride=16,
            test_stride=8,
        ),
        Budget(
            name="full",
            steps=300_000,
            final_steps=300_000,
            teacher_steps=300_000,
            batch=8,
            crop=256,
            widest=128,
            bank=None,
            accelerator="auto",
            one_thread=False,
            workers=8,
            n_validations=60,
            n_unseen=600,
            unseen_stride=1,
            test_stride=1,
        ),
        Budget(
            name="quick",
            steps=4,
            final_steps=4,
            teacher_steps=4,
            batch=8,
            crop=32,
            widest=2,
            bank=(8, 48),
            accelerator="cpu",
            one_thread=True,
            workers=0,
            n_validations=2,
            n_unseen=2,
            unseen_stride=64,
            test_stride=32,
        ),
    )
}
"""small: two CPU cores; full: the report's, a GPU; quick: shows that everything works, not how well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One run of an experiment."""

    experiment: str
    label: str
    """Of its row."""
    seed: int
    config: RunConfig
    published: Mapping[str, Published]
    test_stride: int
    """As in `Budget`."""

    @property
    def fingerprint(self) -> str:
        """Of all that decides the result, the same wherever the files lie."""
        return fingerprint(self.config, self.test_stride)


def fingerprint(config: RunConfig, test_stride: int) -> str:
    """The sha-256 of the configuration as TOML, paths cut to names, and of how it is tested."""
    named = config.replaced(
        {
            **{f"data.{key}": Path(getattr(config.data, key)).name for key in ("images", "labels", "probabilities", "bank")},
            **{f"unseen.{key}": Path(getattr(config.unseen, key)).name for key in ("images", "labels")},
            "start": Path(config.start).name,
            "teachers": tuple(Path(teacher).name for teacher in config.teachers),
        }
    )
    return hashlib.sha256(f"{named.to_toml()}test_stride = {test_stride}\n".encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A data set with its split, that of the folder's README."""

    name: str
    images: str
    labels: str
    train_slices: tuple[int, int]
    validation_slices: tuple[int, int]
    test_images: str = ""
    test_labels: str = ""


EPFL = Volume(
    name="epfl",
    images="epfl/training.tif",
    labels="epfl/training_groundtruth.tif",
    train_slices=(0, 135),
    validation_slices=(145, 165),
    test_images="epfl/testing.tif",
    test_labels="epfl/testing_groundtruth.tif",
)
VNC_SLABS: Mapping[str, Any] = {"images": "vnc/raw.tif", "train_slices": (0, 9), "validation_slices": (10, 14)}
MITOCHONDRIA = Volume(name="vnc-mitochondria", labels="vnc/mitochondria.tif", **VNC_SLABS)
SYNAPSES = Volume(name="vnc-synapses", labels="vnc/synapses.tif", **VNC_SLABS)


def refuse_missing(configs: Sequence[RunConfig]) -> None:
    """Raise VolumeNotFound for the first volume that a configuration names and that is not there."""
    names = dict.fromkeys(
        name
        for config in configs
        for name in (config.data.images, config.data.labels, config.unseen.images, config.unseen.labels)
        if name
    )
    for name in names:
        if not Path(name).is_file():
            raise VolumeNotFound(f"there is no file {name}; name the folder that holds epfl and vnc with --data.")


@dataclass(frozen=True, slots=True)
class Setting:
    """Makes configurations of one budget in one place."""

    budget: Budget
    places: Places

    def as_reported(self, *, width: int, method: str = "vanilla", teacher: str = "", **changes: Any) -> RunConfig:
        """The report's setting of its tables 1 to 6: no batch normalisation, no class weights, cross-entropy alone.

        What it does not say is chosen: Adam at 3e-3 with a cosine, no clipping, no average of weights, He-normal weights.
        Keys of `changes` have `__` for the dot.
        """
        fixed = {
            "batch_norm": "none",
            "on_collapse": "ignore",
            "loss.class_weights": "none",
            "loss.dice_weight": 0.0,
            "optim.learning_rate": 3e-3,
            "optim.precision": "bf16-mixed" if width >= 16 else "32-true",  # what is faster on a CPU
            "optim.warmup": 0.0,
            "optim.weight_decay": 0.0,
            "optim.clip_norm": 1e6,
            "optim.ema_decay": 0.0,
        }
        return self._run(EPFL, width=width, teacher=teacher, method=method).replaced({**fixed, **_dotted(changes)})

    def ours(self, *, width: int, method: str, volume: Volume = EPFL, teacher: str = "", **changes: Any) -> RunConfig:
        """The defaults of `kdunet.config`, inverse class weights, and the average of the weights over a tenth of the steps.

        Inverse weights, because short runs of tiny networks get off the constant with them and not always with the default's
        square roots: with seed 2 a validation IoU of 0.77 against 0.52 after 1,000 steps.
        """
        config = self._run(volume, width=width, teacher=teacher, method=method)
        config = config.replaced({"on_collapse": "ignore", "loss.class_weights": "inverse", **_dotted(changes)})
        return config.replaced({"optim.ema_decay": max(0.0, 1 - 10 / config.optim.steps)})

    def teacher_folder(self, name: str) -> Path:
        """Where a teacher that is trained here ends up."""
        return self.places.runs / "teachers" / f"{self.budget.name}-{name}"

    def bank_folder(self, volume: Volume, teacher: str) -> Path:
        """Where the crops of a volume, taught by `teacher`, lie."""
        return self.places.runs / "banks" / f"{self.budget.name}-{volume.name}-by-{Path(teacher).name}"

    def paced(self, config: RunConfig, steps: int) -> RunConfig:
        """The configuration for another number of steps, validated and tested as often."""
        return config.replaced(
            {
                "optim.steps": steps,
                "validate_every": max(1, steps // self.budget.n_validations),
                "unseen.every": max(1, steps // self.budget.n_unseen),
            }
        )

    def _run(self, volume: Volume, *, width: int, teacher: str, method: str) -> RunConfig:
        budget, data = self.budget, self.places.data
        teacher = teacher or str(self.places.teacher)
        unseen = UnseenConfig()
        if volume.test_images:
            unseen = UnseenConfig(
                images=str(data / volume.test_images), labels=str(data / volume.test_labels), stride=budget.unseen_stride
            )
        loss = {f"loss.{key}": value for key, value in METHODS[method].items()}
        config = RunConfig(
            width=width,
            accelerator=budget.accelerator,
            teachers=() if budget.bank or not loss["loss.soft_weight"] else (teacher,),
            data=DataConfig(
                images=str(data / volume.images),
                labels=str(data / volume.labels),
                train_slices=volume.train_slices,
                validation_slices=volume.validation_slices,
                crop=budget.crop,
                batch=budget.batch,
                bank=str(self.bank_folder(volume, teacher)) if budget.bank else "",
                workers=budget.workers,
            ),
            unseen=unseen,
        )
        return self.paced(config.replaced(loss), budget.steps)


def _dotted(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in changes.items()}
