"""Banks: crops warped and taught once, then drawn again and again by any number of runs.

Warping a crop and asking a large teacher cost more than a small student's own step. Thousands of crops, of which each draw
takes another window, flip, quarter turn and other grey values, are nearly as varied as new ones.

A folder with images.npy and labels.npy (n, side, side) uint8, margins.npy (n, side, side) float16 if there was a teacher, and
bank.json, which says what they are of and is written last: without it a bank is unfinished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdunet.augment import changed_grey_values
from kdunet.checkpoint import write_whole
from kdunet.config import RunConfig
from kdunet.data import Annotated, Batch, BatchDataset, CropDataset, batches, load_annotated
from kdunet.teachers import Teacher, check_teacher, load_teacher, teacher_sha256
from kdunet_infer.errors import ConfigError, TrainingError

try:
    from lightning_fabric import Fabric
except ModuleNotFoundError:  # some machines have the umbrella package only; the class is the same
    from lightning.fabric import Fabric  # type: ignore[no-redef]

BANK_FILE = "bank.json"
IMAGES_FILE, LABELS_FILE, MARGINS_FILE = "images.npy", "labels.npy", "margins.npy"
BANK_FORMAT = 1
CROP_STREAM = 0xBA2C0000
"""Crop i of a bank is drawn from (seed, this, i): a stream of its own, beyond the steps of any run."""
GEOMETRY = ("flip", "rotate_degrees", "scale", "elastic_px", "elastic_spacing_px")
"""What of the augmentation is in a bank's crops already; grey values change at each draw."""

# float16 rounds a margin m by at most 2^-11 |m|, which moves its probability by 2^-11 |m| p (1 - p) < 1.1e-4 at any temperature
STORED_MARGIN = np.float16


def make_bank(
    config: RunConfig,
    out: Path,
    *,
    n_crops: int,
    teacher: Teacher | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a bank of `n_crops` crops of data.crop pixels of the training slab to the folder `out`.

    Warped as `config.augment` says, grey values as they are, rounded; taught by the stored probabilities, by the teachers of
    `config`, or by `teacher` in their stead. The same configuration gives the same bytes with any number of workers.
    `progress` gets the number of crops that are done.

    Raises TrainingError where `out` holds something else or a teacher gives no margins, and what `load_annotated` and
    `load_teacher` raise.
    """
    _refuse_two_teachers(config, teacher)
    _refuse_occupied(out)
    slab, _ = load_annotated(config.data)
    fabric = Fabric(accelerator=config.accelerator, devices=1, precision=cast(Any, config.optim.precision))
    about = {**_about(config, slab, teacher), "n_crops": n_crops}
    if teacher is not None:
        check_teacher(teacher, "the teacher", crop=config.data.crop, device=fabric.device)
    asked = teacher or load_teacher(config, fabric.device)
    dataset = _BankCrops(slab, config, n_crops=n_crops)
    out.mkdir(parents=True, exist_ok=True)
    arrays = _created(out, about)
    begin = 0
    for batch in batches(dataset, range(dataset.n_batches), workers=config.data.workers):
        end = begin + len(batch.images)
        arrays[IMAGES_FILE][begin:end] = batch.images[:, 0].numpy()
        arrays[LABELS_FILE][begin:end] = batch.labels.numpy()
        if MARGINS_FILE in arrays:
            arrays[MARGINS_FILE][begin:end] = _storable(_taught(batch, asked, fabric), crops=(begin, end))
        progress(end)
        begin = end
    for array in arrays.values():
        array.flush()
    write_whole(out / BANK_FILE, (json.dumps(about, indent=1) + "\n").encode())


def training_batches(config: RunConfig, slab: Annotated, *, rank: int = 0, n_ranks: int = 1) -> BatchDataset:
    """What a run learns from: draws from its bank where it has one, new crops of `slab` where not.

    Raises ConfigError and TrainingError as `CropDataset` and `open_bank`.
    """
    if config.data.bank:
        return open_bank(Path(config.data.bank), slab, config, rank=rank, n_ranks=n_ranks)
    return CropDataset(slab, config.data, config.augment, seed=config.seed, rank=rank, n_ranks=n_ranks)


def open_bank(path: Path, slab: Annotated, config: RunConfig, *, rank: int = 0, n_ranks: int = 1) -> BankDataset:
    """The bank in the folder `path` for a run of `config` on the training slab `slab`.

    Raises TrainingError for a bank that is missing, unfinished or damaged, or of other crops than the run's: other data,
    another warp, a smaller side, another teacher than the run names. A run that names none takes any.
    """
    about = _read_about(path)
    if about["crop"] < config.data.crop:
        raise TrainingError(
            f"the bank {path} has crops of {about['crop']} pixels and data.crop is {config.data.crop}; lower it."
        )
    wanted = _about(config, slab, None)
    for key in ("data", "augment"):
        _refuse_others(path, about[key], wanted[key], section=key)
    if wanted["teacher"] is not None and (about["teacher"] is not None or config.data.probabilities):
        _refuse_others(path, about["teacher"] or {}, wanted["teacher"], section="teacher")
    return BankDataset(_opened(path, about), config, rank=rank, n_ranks=n_ranks)


class BankDataset(BatchDataset):
    """Draws from a bank: a window of data.crop pixels, flipped and turned, with changed grey values.

    arrays: (n, side, side) by file name: images and labels uint8, margins float16 where there are any; read as they are drawn.
    """

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], config: RunConfig, *, rank: int = 0, n_ranks: int = 1) -> None:
        super().__init__(config.data.batch, seed=config.seed, rank=rank, n_ranks=n_ranks)
        self.images, self.labels, self.margins = arrays[IMAGES_FILE], arrays[LABELS_FILE], arrays.get(MARGINS_FILE)
        self.size, self.augment = config.data.crop, config.augment

    @property
    def is_taught(self) -> bool:
        """Whether the bank has margins."""
        return self.margins is not None

    def crop(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """A window of one of the bank's crops; the margins are those of the crop as it was taught."""
        n_crops, side, _ = self.images.shape
        limits = (n_crops, side - self.size + 1, side - self.size + 1, 8 if self.augment.flip else 1)
        index, top, left, turn = (int(rng.integers(limit)) for limit in limits)
        window = index, slice(top, top + self.size), slice(left, left + self.size)
        image, labels = (torch.from_numpy(flipped(array[window], turn)) for array in (self.images, self.labels))
        margins = None if self.margins is None else torch.from_numpy(flipped(self.margins[window], turn)).float()
        return changed_grey_values(image, self.augment, rng), labels, margins


def flipped(plane: npt.NDArray[Any], turn: int) -> npt.NDArray[Any]:
    """A copy of a plane (y, x) in one of its eight flips and quarter turns; 0 is the plane as it is."""
    if turn & 4:
        plane = plane.T
    return np.array(plane[:: -1 if turn & 2 else 1, :: -1 if turn & 1 else 1], order="C")


class _BankCrops(CropDataset):
    """The crops of a bank to be: batch k is crops k * batch and on, images uint8."""

    def __init__(self, slab: Annotated, config: RunConfig, *, n_crops: int) -> None:
        super().__init__(slab, config.data, config.augment, seed=config.seed)
        self.n_crops = n_crops
        self.n_batches = -(-n_crops // config.data.batch)

    def __getitem__(self, step: int) -> Batch:
        size = self.config.batch
        indices = range(size * step, min(size * (step + 1), self.n_crops))
        crops = [self.warped(np.random.default_rng((self.seed, CROP_STREAM, index))) for index in indices]
        images, labels, taught = zip(*crops, strict=True)
        rounded = torch.stack(images).round_().clamp_(0, 255).byte()
        return Batch(rounded[:, None], torch.stack(labels), None if taught[0] is None else torch.stack(taught))


def _taught(batch: Batch, teacher: Teacher | None, fabric: Any) -> Tensor:
    if batch.taught is not None:
        return batch.taught
    assert teacher is not None, "margins are stored only where there is a teacher"
    with torch.no_grad(), fabric.autocast():  # of the very images that are stored
        return teacher(fabric.to_device(batch.images).float())


def _storable(margins: Tensor, *, crops: tuple[int, int]) -> npt.NDArray[np.float16]:
    if not torch.isfinite(margins).all():
        raise TrainingError(
            f"the teacher answers crops {crops[0]} to {crops[1] - 1} with values that are not finite; choose another teacher "
            "or precision."
        )
    limit = float(np.finfo(STORED_MARGIN).max)
    return margins.float().clamp(-limit, limit).cpu().numpy().astype(STORED_MARGIN)


def _refuse_two_teachers(config: RunConfig, teacher: Teacher | None) -> None:
    if config.data.probabilities and (teacher or config.teachers):
        raise ConfigError(
            f"data.probabilities names {config.data.probabilities} and there is a teacher beside; a bank holds the answers of "
            "one of them, so leave the other out."
        )


def _refuse_occupied(out: Path) -> None:
    if (out / BANK_FILE).exists():
        raise TrainingError(f"{out} holds a bank; give another --out, or remove it to make it again.")
    ours = {IMAGES_FILE, LABELS_FILE, MARGINS_FILE, BANK_FILE + ".partial"}
    if out.exists() and (not out.is_dir() or any(path.name not in ours for path in out.iterdir())):
        raise TrainingError(f"{out} exists and holds no unfinished bank; give another --out.")


def _about(config: RunConfig, slab: Annotated, teacher: Teacher | None) -> dict[str, Any]:
    """What a bank of `config` is of; data and teachers by their content, for paths differ between machines."""
    augment = dataclasses.asdict(config.augment)
    return {
        "format": BANK_FORMAT,
        "crop": config.data.crop,
        "seed": config.seed,
        "data": {"images": _sha256(slab.images), "labels": _sha256(slab.truth)},
        "augment": {key: augment[key] for key in GEOMETRY},
        "teacher": _about_teacher(config, slab, teacher),
        "files": {key: Path(getattr(config.data, key)).name for key in ("images", "labels", "probabilities")},
        "options": {key: getattr(config.data, key) for key in ("foreground", "ignore", "train_slices")},
    }


def _about_teacher(config: RunConfig, slab: Annotated, teacher: Teacher | None) -> dict[str, Any] | None:
    if teacher is not None:
        return {"function": getattr(teacher, "__qualname__", type(teacher).__qualname__)}
    if slab.probabilities is not None:
        return {"probabilities": _sha256(slab.probabilities)}
    if config.teachers:
        return {"files": sorted(map(teacher_sha256, config.teachers)), "average": config.teacher_average}
    return None


def _sha256(array: npt.NDArray[Any]) -> str:
    content = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()


def _created(out: Path, about: Mapping[str, Any]) -> dict[str, np.memmap[Any, Any]]:
    shape = about["n_crops"], about["crop"], about["crop"]
    return {name: np.lib.format.open_memmap(out / name, "w+", dtype, shape) for name, dtype in _files(about)}


def _files(about: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield IMAGES_FILE, np.uint8
    yield LABELS_FILE, np.uint8
    if about["teacher"] is not None:
        yield MARGINS_FILE, STORED_MARGIN


def _read_about(path: Path) -> dict[str, Any]:
    file = path / BANK_FILE
    if not file.is_file():
        state = "holds an unfinished bank" if (path / IMAGES_FILE).exists() else "holds no bank"
        raise TrainingError(f"{path} {state}, for there is no {BANK_FILE}; make it with `kdunet bank --out {path}`.")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        if about["format"] != BANK_FORMAT:
            raise TrainingError(
                f"{file} is of format {about['format']}, this version reads {BANK_FORMAT}; make the bank again."
            )
        for key, kind in (("n_crops", int), ("crop", int), ("data", dict), ("augment", dict), ("teacher", dict | None)):
            if not isinstance(about[key], kind):
                raise TypeError(key)
    except (ValueError, KeyError, TypeError) as exc:
        raise TrainingError(f"{file} is damaged ({exc!r}); make the bank again.") from exc
    return cast(dict[str, Any], about)


def _opened(path: Path, about: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    shape = about["n_crops"], about["crop"], about["crop"]
    arrays = {}
    for name, dtype in _files(about):
        try:
            array = np.load(path / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as exc:
            raise TrainingError(f"{path / name} cannot be read ({exc}); make the bank again.") from exc
        if array.shape != shape or array.dtype != dtype:
            raise TrainingError(
                f"{path / name} is {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape} as {BANK_FILE} says; "
                "make the bank again."
            )
        arrays[name] = array
    return arrays


def _refuse_others(path: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any], *, section: str) -> None:
    for key in {**theirs, **ours}:
        if ours.get(key) != theirs.get(key):
            bank, run = (_short(values.get(key)) for values in (ours, theirs))
            raise TrainingError(
                f"the bank {path} was made with {section} {key} {bank} and this run has {run}; make a bank for it with "
                "`kdunet bank`, or train with the bank's."
            )


def _short(value: Any) -> str:
    """A SHA-256 by its first 12 digits."""
    if isinstance(value, list):
        return " and ".join(map(_short, value))
    if value is None:
        return "none"
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)
