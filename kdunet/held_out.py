"""A few annotated slices -> what is learned from and what is held out, as the stacks of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile

from kdunet.config import DataConfig, Slab
from kdunet.data import Annotated
from kdunet.losses import IGNORED
from kdunet.unet import N_LEVELS, halo
from kdunet_infer.errors import ConfigError, VolumeError

HELD_OUT_SHARE = 0.2
"""Of the annotated slices."""
GAP_SHARE = 0.06
"""Of the annotated slices, between the others: neighbours are nearly copies. From nine slices on that is one or more."""
LEAST_SLICES = 3
"""Annotated ones, to hold out whole slices; of fewer the last rows are."""
HELD_OUT_ROWS = 0.25
"""Of the annotated voxels, where rows are held out."""
IMAGES_FILE, LABELS_FILE = "images.tif", "labels.tif"
STRIDE = 1 << (N_LEVELS - 1)

Slices = tuple[int, ...]
"""Indices into the volume, ascending."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Two slabs that share no annotated voxel, both of annotated slices alone and cut to the annotations' surroundings."""

    train: Annotated
    held_out: Annotated
    train_slices: Slices
    held_out_slices: Slices
    first_held_out_row: int | None
    """Of the volume, where rows of the same slices are held out instead of slices."""

    @property
    def place(self) -> str:
        """What is held out, in words."""
        rows = "" if self.first_held_out_row is None else f"rows {self.first_held_out_row} and on of "
        return f"{rows}slice{'s' * (len(self.held_out_slices) > 1)} {_ranges(self.held_out_slices)}"

    @property
    def n_slices(self) -> int:
        """Annotated slices that are learned from."""
        return len(self.train_slices)


def held_out_split(whole: Annotated, *, train: Slab | None = None, validation: Slab | None = None) -> Split:
    """Hold out what `validation` says or, by default, the last fifth of the annotated slices behind a gap.

    train: the slices that may be learned from; the default is all that are not held out. Of one or two annotated slices the
    last rows are held out, about a quarter of the annotated voxels. Slices that nobody annotated are left out, and so is what
    of the others no annotated voxel can depend on.

    Raises ConfigError for slabs that are not in the volume or overlap, VolumeError where either part has no annotated voxel or
    no foreground.
    """
    annotated = tuple(int(z) for z in np.flatnonzero((whole.truth != IGNORED).any(axis=(1, 2))))
    if not annotated:
        raise VolumeError("the labels hold no annotated voxel, only the value to ignore; annotate a slice or check --ignore.")
    if not (whole.truth == 1).any():
        raise VolumeError("no annotated voxel is foreground; annotate some objects, or name their value with --foreground.")
    learned, held_out = _chosen(annotated, len(whole.truth), train, validation)
    used = sorted({*learned, *held_out})
    if not used:
        raise VolumeError(f"no voxel is annotated in slices {_words(train)} and {_words(validation)}; choose others.")
    rows, columns = _window(whole.truth[used])
    part = Annotated(whole.images[:, rows, columns], whole.truth[:, rows, columns])
    row = None
    if learned == held_out:
        found, row = _split_rows(part, learned)
        row += rows.start
    else:
        found = _of_slices(part, learned), _of_slices(part, held_out)
    split = Split(train=found[0], held_out=found[1], train_slices=learned, held_out_slices=held_out, first_held_out_row=row)
    _check(split)
    return split


def write_split(split: Split, folder: Path) -> None:
    """Write the two stacks that `stacked` describes into `folder`: what is learned from, then what is held out.

    Labels are 0, 1 and IGNORED. Where rows are held out the same slices come twice, each time with the other rows ignored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, parts in (
        (IMAGES_FILE, (split.train.images, split.held_out.images)),
        (LABELS_FILE, (split.train.truth, split.held_out.truth)),
    ):
        tifffile.imwrite(folder / name, np.concatenate(parts), photometric="minisblack")


def stacked(split: Split, folder: Path, config: DataConfig) -> DataConfig:
    """`config` for a run on the stacks in `folder`; its crop is made smaller where the slices are.

    Raises VolumeError for slices too small for any crop.
    """
    n_train, height, width = split.train.images.shape
    crop = min(config.crop, min(height, width) // STRIDE * STRIDE)
    if not crop:
        raise VolumeError(
            f"slices of {height} x {width} pixels are smaller than the network's stride {STRIDE}; give larger images."
        )
    return dataclasses.replace(
        config,
        images=str(folder / IMAGES_FILE),
        labels=str(folder / LABELS_FILE),
        foreground=1,
        ignore=IGNORED,
        train_slices=(0, n_train),
        validation_slices=(n_train, n_train + len(split.held_out.images)),
        crop=crop,
    )


def _chosen(annotated: Slices, n_slices: int, train: Slab | None, validation: Slab | None) -> tuple[Slices, Slices]:
    """The annotated slices to learn from and to hold out; the same ones twice where rows are to be held out."""
    for option, slab in (("--train-slices", train), ("--validation-slices", validation)):
        if slab and not 0 <= slab[0] < slab[1] <= n_slices:
            raise ConfigError(f"{option} is {_words(slab)}; the volume has slices 0 to {n_slices} (end not included).")
    if train and validation and max(train[0], validation[0]) < min(train[1], validation[1]):
        raise ConfigError(
            f"--train-slices {_words(train)} and --validation-slices {_words(validation)} overlap; "
            "what is held out must be unseen."
        )
    allowed = tuple(z for z in annotated if not train or train[0] <= z < train[1])
    if validation:
        held_out = tuple(z for z in annotated if validation[0] <= z < validation[1])
        return tuple(z for z in allowed if z not in held_out), held_out
    if train and allowed != annotated:
        return allowed, tuple(z for z in annotated if z not in allowed)
    if len(allowed) < LEAST_SLICES:
        return allowed, allowed
    n_held_out, n_gap = max(1, round(HELD_OUT_SHARE * len(allowed))), round(GAP_SHARE * len(allowed))
    return allowed[: -n_held_out - n_gap], allowed[-n_held_out:]


def _window(truth: npt.NDArray[np.uint8]) -> tuple[slice, slice]:
    """Rows and columns that an answer to an annotated voxel can depend on, on the network's grid."""
    annotated = (truth != IGNORED).any(axis=0)
    return _reach(annotated.any(axis=1)), _reach(annotated.any(axis=0))


def _reach(annotated: npt.NDArray[np.bool_]) -> slice:
    places, margin = np.flatnonzero(annotated), halo()
    begin, end = int(places[0]) // STRIDE * STRIDE - margin, -(-(int(places[-1]) + 1) // STRIDE) * STRIDE + margin
    return slice(max(0, begin), min(len(annotated), end))


def _of_slices(part: Annotated, slices: Slices) -> Annotated:
    return Annotated(part.images[list(slices)], part.truth[list(slices)])


def _split_rows(part: Annotated, slices: Slices) -> tuple[tuple[Annotated, Annotated], int]:
    """The slices twice, once with the last rows ignored and once with the others; and the first row held out."""
    both = _of_slices(part, slices)
    so_far = np.cumsum((both.truth != IGNORED).sum(axis=(0, 2)))
    row = int(np.searchsorted(so_far, (1 - HELD_OUT_ROWS) * so_far[-1])) + 1
    above, below = both.truth.copy(), both.truth.copy()
    above[:, row:], below[:, :row] = IGNORED, IGNORED
    return (Annotated(both.images, above), Annotated(both.images, below)), row


def _check(split: Split) -> None:
    """Refuse a part that teaches or measures nothing."""
    learned = f"slice{'s' * (split.n_slices != 1)} {_ranges(split.train_slices)}"
    if split.first_held_out_row is not None:
        learned = f"the rows before {split.first_held_out_row} of {learned}"
    for part, place, purpose in (
        (split.train, learned, "to learn from"),
        (split.held_out, split.place, "to measure with"),
    ):
        if not (part.truth != IGNORED).any():
            raise VolumeError(
                f"no voxel is annotated in what is left {purpose}; choose other --train-slices or --validation-slices."
            )
        if not (part.truth == 1).any():
            raise VolumeError(
                f"no foreground is annotated {purpose} in {place}; annotate some there, or choose with --validation-slices."
            )


def _words(slab: Slab | None) -> str:
    return "(all)" if slab is None else f"{slab[0]}:{slab[1]}"


def _ranges(slices: Sequence[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    ends: list[list[int]] = []
    for z in slices:
        if ends and z == ends[-1][1] + 1:
            ends[-1][1] = z
        else:
            ends.append([z, z])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ends)
