"""How good a segmentation is, from counts that add up: pooled over voxels, streamed block by block. Knows no models.

Everything here is a sum over voxels, so a volume of any size is scored one block at a time, in any order.

    prediction != 0, truth != 0                 TP  both                FP  prediction only
    (or truth == foreground)                    FN  truth only          TN  neither

    IoU = TP / (TP + FP + FN)      Dice = 2 TP / (2 TP + FP + FN)      precision = TP / (TP + FP)      recall = TP / (TP + FN)

One rule decides every 0/0: finding nothing where there is nothing is perfect (1), any other 0/0 is worth nothing (0). So no
foreground in prediction and truth gives 1 four times, and foreground in only one of the two gives 0 four times.

Which voxels count can be narrowed: to a roi, to where a mask is not 0, and to those that lie far enough from the truth's
boundaries for annotators to agree on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kdunet_infer.boundary import near_boundary
from kdunet_infer.errors import ConfigError, EngineError, VolumeError
from kdunet_infer.geometry import ZYX, Box, checked_roi

LabelArray = npt.NDArray[Any]
"""Integers or booleans; foreground is every value but 0."""
ProbabilityArray = npt.NDArray[np.floating[Any]]
BoolArray = npt.NDArray[np.bool_]

BLOCK_VOXELS = 2**24
"""Voxels of each volume held at once: 16 MiB of masks, 128 MiB of 64-bit labels."""
PIECE_VOXELS = 2**20
"""Probabilities worked on at once, so that float64 and index copies stay at 8 MiB."""
N_LEVELS = 256
"""Thresholds k / 256. A power of two: p * 256 is then exact in any binary float, and so is the bin p falls into."""
CROSS_ENTROPY_EPS = 1e-7
"""Probabilities are clipped to eps..1-eps: one voxel costs 16.1 nats at most. Just above 2^-24, float32's step below 1."""


class Labels(Protocol):
    """A volume of labels that can be read box by box: a segmentation or its ground truth."""

    @property
    def shape(self) -> ZYX:
        """Voxels, zyx."""

    @property
    def chunk_shape(self) -> ZYX:
        """Voxels that are stored together, zyx; reading whole ones is cheapest."""

    def read(self, box: Box) -> LabelArray:
        """Labels of `box`, which lies inside the volume: (z, y, x), integers or booleans."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """Voxels by predicted and true class; adds up over blocks, slices and volumes. Python integers, so it never overflows."""

    tp: int = 0
    """Foreground in both."""
    fp: int = 0
    """Foreground in the prediction only."""
    fn: int = 0
    """Foreground in the truth only."""
    tn: int = 0
    """Foreground in neither."""

    def __add__(self, other: Confusion) -> Confusion:
        return Confusion(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn, self.tn + other.tn)

    @property
    def n_voxels(self) -> int:
        """All voxels counted."""
        return self.tp + self.fp + self.fn + self.tn

    @property
    def has_foreground(self) -> bool:
        """Whether any voxel is foreground in the prediction or in the truth."""
        return self.tp + self.fp + self.fn > 0

    @property
    def iou(self) -> float:
        """Intersection over union of the foreground (Jaccard 1901); 1 where both are empty."""
        return self._share(self.tp, self.tp + self.fp + self.fn)

    @property
    def dice(self) -> float:
        """Dice coefficient (Dice 1945), also F1; 1 where both are empty."""
        return self._share(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float:
        """Share of the predicted foreground that is true; where none is predicted 1 if none is true, else 0."""
        return self._share(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """Share of the true foreground that is predicted; where none is true 1 if none is predicted, else 0."""
        return self._share(self.tp, self.tp + self.fn)

    def _share(self, part: int, whole: int) -> float:
        return part / whole if whole else float(not self.has_foreground)


@dataclass(frozen=True, slots=True)
class Scores:
    """A prediction held against its truth: counts of the whole volume, or of a roi of it, and of each slice."""

    confusion: Confusion
    """Pooled over all voxels that count: the sum of `per_slice`."""
    per_slice: tuple[Confusion, ...]
    """One for each z of the volume, or of the roi, in order."""
    foreground: int | None = None
    """The truth's value that was taken for foreground; None: every value but 0."""
    n_excluded: int = 0
    """Voxels that did not count, by the mask or the tolerance."""
    tolerance: int = 0
    """Voxels; how near to a boundary of the truth a voxel did not count."""
    roi: Box | None = None
    """What was compared; None: all."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON. The four scores are pooled over all voxels that count.

        `per_slice_iou` has one IoU for each z, None where no voxel of the slice counts.
        """
        pooled = self.confusion
        return {
            "iou": pooled.iou,
            "dice": pooled.dice,
            "precision": pooled.precision,
            "recall": pooled.recall,
            "per_slice_iou": [counts.iou if counts.n_voxels else None for counts in self.per_slice],
            "n_voxels": pooled.n_voxels,
            "n_voxels_excluded": self.n_excluded,
            "foreground_fraction_prediction": (pooled.tp + pooled.fp) / max(1, pooled.n_voxels),
            "foreground_fraction_truth": (pooled.tp + pooled.fn) / max(1, pooled.n_voxels),
            "tolerance": self.tolerance,
            "roi": None if self.roi is None else str(self.roi),
        }


def foreground_mask(labels: LabelArray, foreground: int | None = None) -> BoolArray:
    """Where `labels`, integers or booleans of any shape, are foreground: != 0, or == `foreground` where it is given.

    Raises VolumeError for any other dtype: probabilities taken for labels would be foreground nearly everywhere.
    """
    _check_labels(labels)
    mask: BoolArray = labels != 0 if foreground is None else labels == foreground
    return mask


def confusion(prediction: LabelArray, truth: LabelArray, foreground: int | None = None) -> Confusion:
    """Count the voxels of two arrays of one shape, of any rank, held in memory.

    The prediction is foreground where it is not 0; the truth too, or where it equals `foreground`.
    Raises VolumeError where the shapes differ or the values are neither integers nor booleans.
    """
    _check_same_shape("prediction", prediction.shape, "truth", truth.shape)
    predicted, true = foreground_mask(prediction), foreground_mask(truth, foreground)
    tp, n_predicted, n_true = (int(np.count_nonzero(mask)) for mask in (predicted & true, predicted, true))
    fp, fn = n_predicted - tp, n_true - tp
    return Confusion(tp, fp, fn, prediction.size - tp - fp - fn)


def slice_confusions(prediction_block: LabelArray, truth_block: LabelArray, foreground: int | None = None) -> list[Confusion]:
    """Count two blocks (z, y, x) slice by slice: one Confusion for each z.

    Raises VolumeError as `confusion` does.
    """
    _check_same_shape("prediction", prediction_block.shape, "truth", truth_block.shape)
    # One slice at a time also keeps the boolean temporaries to a slice.
    return [confusion(predicted, true, foreground) for predicted, true in zip(prediction_block, truth_block, strict=True)]


def evaluate_volumes(
    prediction: Labels,
    truth: Labels,
    *,
    foreground: int | None = None,
    mask: Labels | None = None,
    tolerance: int = 0,
    roi: Box | None = None,
    progress: Callable[[int, int], None] | None = None,
    block_voxels: int = BLOCK_VOXELS,
) -> Scores:
    """Score a volume, or the box `roi` of it, holding at most `block_voxels` voxels of each volume at a time.

    Only voxels where `mask` is not 0 count. With a `tolerance` of 1 or more, voxels do not count that have a voxel of the other
    class of the truth in their slice within this distance, in pixels from centre to centre: a tolerance of 1 leaves out the
    pixels on both sides of every boundary. It is measured in each slice (y, x) alone, because sections are often thicker than
    pixels; in the whole truth, also outside roi and mask; and the volume's faces are no boundary. The truth is then read with
    as many voxels more around each block.

    `progress` is called after each block with the voxels done and the voxels in all.
    Raises VolumeError where the shapes differ, labels or mask are neither integers nor booleans, or no voxel is left to count,
    GeometryError for a roi that leaves the volume or is empty, ConfigError for a negative tolerance.
    """
    _check_same_shape("prediction", prediction.shape, "truth", truth.shape)
    if mask is not None:
        _check_same_shape("mask", mask.shape, "truth", truth.shape)
    if tolerance < 0:
        raise ConfigError(f"tolerance is {tolerance}; it must be 0 (every voxel counts) or a number of voxels.")
    whole = Box.of_shape(truth.shape)
    region = whole if roi is None else checked_roi(roi, truth.shape)
    per_slice = [Confusion()] * region.shape[0]
    n_done = 0
    chunk_shapes = [volume.chunk_shape for volume in (prediction, truth, mask) if volume is not None]
    for box in _blocks(region, whole, chunk_shapes, block_voxels):
        try:
            counts = _compare(prediction, truth, box, foreground, mask, tolerance)
        except Exception as exc:
            exc.add_note(f"while comparing prediction and truth at voxels {box} (z,y,x)")
            raise
        for i, slice_counts in enumerate(counts, start=box.begin[0] - region.begin[0]):
            per_slice[i] += slice_counts
        n_done += box.n_voxels
        if progress is not None:
            progress(n_done, region.n_voxels)
    pooled = sum(per_slice, Confusion())
    if not pooled.n_voxels and region.n_voxels:
        raise VolumeError(f"none of the {region.n_voxels} voxels {region} counts: {_why_none(mask is not None, tolerance)}.")
    return Scores(pooled, tuple(per_slice), foreground, region.n_voxels - pooled.n_voxels, tolerance, roi)


def agreement(a: LabelArray, b: LabelArray) -> float:
    """Share of voxels with equal values in two masks of one shape, as of two engines; 1 where there are no voxels.

    Background counts as much as foreground, so this is no IoU and is close to 1 for any sparse mask.
    Raises VolumeError where the shapes differ or the values are neither integers nor booleans.
    """
    _check_same_shape("one mask", a.shape, "the other", b.shape)
    _check_labels(a)
    _check_labels(b)
    return int(np.count_nonzero(a == b)) / a.size if a.size else 1.0


class ProbabilityHistogram:
    """Counts of foreground probabilities by class: the IoU of every threshold k / 256 after one pass over the voxels.

    Exact, not binned: p >= k / 256 holds if and only if floor(256 p) >= k, because 256 p is exact.
    """

    def __init__(self, foreground: int | None = None) -> None:
        self._foreground = foreground
        # [truth is foreground][floor(256 p)]; the last bin holds p = 1 alone.
        self._counts: npt.NDArray[np.int64] = np.zeros((2, N_LEVELS + 1), np.int64)

    def add(self, probability: ProbabilityArray, truth: LabelArray) -> None:
        """Count the voxels of two arrays of one shape, of any rank.

        Raises VolumeError where the shapes differ, `probability` is not floating point, or `truth` neither integers nor
        booleans; EngineError for probabilities that are NaN or outside 0..1.
        """
        for p, true in _pieces(probability, truth, self._foreground):
            # In the probability's own dtype: floor(256 p) fits, and a copy in float64 would only cost memory.
            level = (p * p.dtype.type(N_LEVELS)).astype(np.intp)
            counts = np.bincount(level + true * (N_LEVELS + 1), minlength=self._counts.size)
            self._counts += counts.reshape(self._counts.shape)

    def confusion_at(self, threshold: float) -> Confusion:
        """The counts of the mask p >= threshold.

        Raises ConfigError for a threshold that is not k / 256 for some k in 0..256: it would have to be guessed.
        """
        level = threshold * N_LEVELS
        if not (0 <= level <= N_LEVELS and level == int(level)):
            raise ConfigError(f"threshold {threshold} is not a multiple of 1/{N_LEVELS} in 0..1; choose one that is.")
        (tn, fp), (fn, tp) = ((int(row[: int(level)].sum()), int(row[int(level) :].sum())) for row in self._counts)
        return Confusion(tp, fp, fn, tn)

    def iou_at(self, thresholds: Sequence[float]) -> tuple[float, ...]:
        """IoU of the mask p >= t for each t of `thresholds`.

        Raises ConfigError for a threshold that is not k / 256 for some k in 0..256.
        """
        return tuple(self.confusion_at(threshold).iou for threshold in thresholds)

    def best_threshold(self) -> tuple[float, float]:
        """The threshold with the highest IoU, and that IoU; of equally good ones the closest to 0.5, the lower of two.

        0 and 1 are left out: a model card takes neither.
        Raises ConfigError where no voxels were added.
        """
        if not self._counts.any():
            raise ConfigError("no voxels were added, so no threshold can be chosen; give validation data that is not empty.")
        thresholds = [k / N_LEVELS for k in range(1, N_LEVELS)]
        # max keeps the first of equals: closest to 0.5 first, and sorted is stable, so the lower of two.
        by_distance = sorted(thresholds, key=lambda threshold: abs(threshold - 0.5))
        best = max(by_distance, key=lambda threshold: self.confusion_at(threshold).iou)
        return best, self.confusion_at(best).iou


class CrossEntropy:
    """Mean cross entropy of foreground probabilities: -log p over true foreground, -log(1 - p) over true background, in nats.

    p is clipped to eps..1-eps (eps = 1e-7), so that a saturated wrong voxel costs 16.1 nats, not infinity. Summed in float64.
    """

    def __init__(self, foreground: int | None = None) -> None:
        self._foreground = foreground
        self._sum = 0.0
        self._n_voxels = 0

    def add(self, probability: ProbabilityArray, truth: LabelArray) -> None:
        """Add the voxels of two arrays of one shape, of any rank.

        Raises as `ProbabilityHistogram.add` does.
        """
        for p, true in _pieces(probability, truth, self._foreground):
            wide = p.astype(np.float64)  # 1 - p would lose digits in float32
            of_truth = np.where(true, wide, 1 - wide).clip(CROSS_ENTROPY_EPS, 1 - CROSS_ENTROPY_EPS)
            self._sum -= float(np.log(of_truth).sum())
            self._n_voxels += p.size

    def mean(self) -> float:
        """Nats per voxel.

        Raises ConfigError where no voxels were added.
        """
        if not self._n_voxels:
            raise ConfigError("no voxels were added, so there is no cross entropy; give data that is not empty.")
        return self._sum / self._n_voxels


def _compare(
    prediction: Labels, truth: Labels, box: Box, foreground: int | None, mask: Labels | None, tolerance: int
) -> list[Confusion]:
    """Counts of each slice of `box`."""
    if mask is None and not tolerance:
        return slice_confusions(prediction.read(box), truth.read(box), foreground)
    around = box.grown((0, tolerance, tolerance)).intersection(Box.of_shape(truth.shape))
    true_around = foreground_mask(truth.read(around), foreground)
    inside = box.slices_in(around)
    counts = ~near_boundary(true_around, tolerance)[inside]
    if mask is not None:
        within = mask.read(box)
        _check_labels(within, "the mask has")
        counts &= within != 0
    slices = zip(prediction.read(box), true_around[inside], counts, strict=True)
    return [confusion(predicted[kept], true[kept]) for predicted, true, kept in slices]


def _why_none(has_mask: bool, tolerance: int) -> str:
    if not tolerance:
        return "the mask is 0 at all of them; give a mask that is not 0 where to compare"
    near = f"within {tolerance} voxel{'s' * (tolerance != 1)} of a boundary of the truth"
    if not has_mask:
        return f"all lie {near}; lower the tolerance"
    return f"all lie where the mask is 0 or {near}; give a larger mask or lower the tolerance"


def _check_labels(labels: LabelArray, subject: str = "labels have") -> None:
    if labels.dtype.kind not in "biu":
        raise VolumeError(
            f"{subject} dtype {labels.dtype}, but only integers and booleans say what is foreground; "
            "threshold probabilities first."
        )


def _check_same_shape(name_a: str, a: tuple[int, ...], name_b: str, b: tuple[int, ...]) -> None:
    # Before any arithmetic: numpy would broadcast (1, y, x) against (z, y, x) without a word.
    if tuple(a) != tuple(b):
        raise VolumeError(
            f"{name_a} has shape {tuple(a)} and {name_b} {tuple(b)}, so their voxels do not correspond; "
            "compare the same region of both at the same resolution level."
        )


def _blocks(region: Box, whole: Box, chunk_shapes: Sequence[ZYX], block_voxels: int) -> Iterator[Box]:
    """What to compare at once, in order; cut where chunks are cut, also when the region begins in the middle of one."""
    z, y, x = (max(1, *lengths) for lengths in zip(*chunk_shapes, strict=True))
    frame = region.snapped((z, y, x)).intersection(whole)
    for box in frame.split(_block_shape(frame.shape, (z, y, x), block_voxels)):
        block = box.intersection(region)
        if block.n_voxels:
            yield block


def _block_shape(shape: ZYX, chunk_shape: ZYX, block_voxels: int) -> ZYX:
    """Voxels to compare at once: whole chunks, as many as fit, x first and z last, so that small planes come as whole slabs.

    Chunks that do not fit are cut, thinner in z first: slower, since a chunk is then read more than once, but bounded.
    """
    block = [max(1, min(size, chunk)) for size, chunk in zip(shape, chunk_shape, strict=True)]
    for axis in (2, 1, 0):
        n_chunks = block_voxels // prod(block)
        block[axis] = min(max(1, shape[axis]), block[axis] * max(1, n_chunks))
    for axis in (0, 1, 2):
        fits = block_voxels * block[axis] // prod(block)
        block[axis] = max(1, min(block[axis], fits))
    return block[0], block[1], block[2]


def _pieces(
    probability: ProbabilityArray, truth: LabelArray, foreground: int | None
) -> Iterator[tuple[ProbabilityArray, BoolArray]]:
    """Probabilities and true classes, flat, PIECE_VOXELS at a time; all is checked before the first piece comes."""
    _check_same_shape("probability", probability.shape, "truth", truth.shape)
    if probability.dtype.kind != "f":
        raise VolumeError(
            f"probabilities have dtype {probability.dtype}, not floating point: stored ones are rounded, and the mask is "
            "cut before any rounding; pass the engine's float32 output."
        )
    lowest, highest = (float(extreme(probability, initial=0.5)) for extreme in (np.min, np.max))
    if not (lowest >= 0 and highest <= 1):  # NaN fails both
        raise EngineError(
            f"probabilities range from {lowest:g} to {highest:g}, not within 0..1; "
            "pass foreground probabilities, not logits, and check the model for NaN."
        )
    flat, true = probability.reshape(-1), foreground_mask(truth, foreground).reshape(-1)
    for begin in range(0, flat.size, PIECE_VOXELS):
        yield flat[begin : begin + PIECE_VOXELS], true[begin : begin + PIECE_VOXELS]
