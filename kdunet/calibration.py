"""Calibrated probabilities: of the voxels with probability p, a share p is foreground.

Training does not ask for that. Cross-entropy that weighs foreground w_f and background w_b is least at log odds too high by
log(w_f / w_b), Dice drives answers to 0 and 1, and augmentation shows the network what no slice holds. Platt scaling puts it
right on voxels that nothing was learned from: p = sigmoid(scale m + offset) of the margin m, the two numbers those of least
unweighted cross-entropy. The order of the voxels stays, so every mask has a threshold that gives it again.

Platt 1999, "Probabilistic outputs for support vector machines", with labels as they are instead of his smoothed ones; Guo et
al. 2017, arXiv:1706.04599, whose temperature is 1 / scale.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kdunet.data import Annotated
from kdunet.evaluate import slice_margin
from kdunet.losses import IGNORED
from kdunet.unet import UNet
from kdunet_infer.errors import ConfigError, TrainingError

Float64Array = npt.NDArray[np.float64]

SCALE_LIMITS = 0.25, 4.0
"""A scale beyond these tells more of too small a slab than of the network, and a large one magnifies rounding errors."""
N_MARGIN_BINS = 1 << 16
LARGEST_MARGIN = 64.0
"""Bins are 1/512 wide up to here; what lies beyond shares the outermost ones."""
N_PROBABILITY_BINS = 15
"""Of equal width, as in Guo et al. 2017."""
MAX_NEWTON_STEPS = 100
FLOAT32_LOG_ODDS = 15.0
"""Log odds that float32 probabilities still tell apart from those of 1."""


@dataclass(frozen=True, slots=True)
class Reliability:
    """What was predicted held against what was there; a row for each bin of the probability, each array (n,)."""

    predicted: Float64Array
    """Mean probability in the bin; NaN where it is empty."""
    observed: Float64Array
    """Share of foreground in the bin; NaN where it is empty."""
    count: Float64Array
    """Voxels."""

    @property
    def expected_error(self) -> float:
        """ECE: the mean distance of observed and predicted, weighted by voxels. Guo et al. 2017, eq. 3, of the foreground."""
        there = self.count > 0
        distance = np.abs(self.observed[there] - self.predicted[there])
        return float(np.average(distance, weights=self.count[there]))


@dataclass(frozen=True, slots=True)
class Calibration:
    """p = sigmoid(scale m + offset) of the margin m, and what that did on the voxels it was fitted to."""

    scale: float
    offset: float
    ece_before: float
    ece_after: float
    nll_before: float
    """Unweighted cross-entropy, nats a voxel."""
    nll_after: float
    remark: str = ""
    """Why the fit is not what it should be; empty where it is."""

    def threshold(self, uncalibrated: float) -> float:
        """The threshold that cuts the calibrated probability into the mask that `uncalibrated` gave before.

        Raises TrainingError where float32 could not hold it.
        """
        log_odds = self.scale * math.log(uncalibrated / (1 - uncalibrated)) + self.offset
        if not abs(log_odds) < FLOAT32_LOG_ODDS:
            raise TrainingError(
                f"the threshold {uncalibrated:g} becomes log odds of {log_odds:.3g} when calibrated, which float32 "
                "probabilities cannot tell from 0 or 1; export with --no-calibration."
            )
        return 1 / (1 + math.exp(-log_odds))


class MarginHistogram:
    """Counts of margins by class: all that a fit needs, in 2 MB whatever the volume. A bin stands for its mean margin."""

    def __init__(self) -> None:
        self._counts = np.zeros(2 * N_MARGIN_BINS, np.int64)
        self._sums = np.zeros(2 * N_MARGIN_BINS, np.float64)

    def add(self, margins: npt.NDArray[np.float32], truth: npt.NDArray[np.uint8]) -> None:
        """Count the annotated voxels of two arrays of one shape. Raises TrainingError for margins that are not finite."""
        annotated = truth != IGNORED
        margin, true = margins[annotated].astype(np.float64), truth[annotated] == 1
        if not np.isfinite(margin).all():
            raise TrainingError("the network answers with margins that are not finite; nothing can be fitted to them.")
        place = ((margin + LARGEST_MARGIN) * (N_MARGIN_BINS / (2 * LARGEST_MARGIN))).clip(0, N_MARGIN_BINS - 1)
        index = place.astype(np.intp) + N_MARGIN_BINS * true
        self._counts += np.bincount(index, minlength=len(self._counts))
        self._sums += np.bincount(index, margin, minlength=len(self._sums))

    @property
    def samples(self) -> tuple[Float64Array, Float64Array, Float64Array]:
        """Margins, labels 0.0 or 1.0, and the voxels that each pair stands for, (n,) each."""
        there = np.flatnonzero(self._counts)
        count = self._counts[there].astype(np.float64)
        return self._sums[there] / count, (there >= N_MARGIN_BINS).astype(np.float64), count

    def cross_entropy(self, scale: float = 1.0, offset: float = 0.0) -> float:
        """Of sigmoid(scale m + offset), in nats a voxel."""
        margin, label, count = self.samples
        return _cross_entropy(scale * margin + offset, label, count / count.sum())

    def reliability(self, scale: float = 1.0, offset: float = 0.0, *, n_bins: int = N_PROBABILITY_BINS) -> Reliability:
        """Of sigmoid(scale m + offset), in bins of equal width."""
        margin, label, count = self.samples
        probability = _sigmoid(scale * margin + offset)
        index = (probability * n_bins).astype(np.intp).clip(max=n_bins - 1)
        total, predicted, observed = (
            np.bincount(index, weights, minlength=n_bins).astype(np.float64)
            for weights in (count, count * probability, count * label)
        )
        with np.errstate(invalid="ignore"):  # 0 / 0 where a bin is empty
            return Reliability(predicted / total, observed / total, total)


def calibrate(
    network: UNet, slab: Annotated, *, device: torch.device | None = None, autocast: torch.dtype | None = None
) -> Calibration:
    """Fit to the annotated voxels of `slab`, of which `network` has learned nothing; whole mirrored slices.

    `network` is on `device` (None: the CPU) and in evaluation mode. Raises ConfigError where nothing is annotated,
    TrainingError for margins that are not finite.
    """
    histogram = MarginHistogram()
    for image, truth in zip(slab.images, slab.truth, strict=True):
        if (truth != IGNORED).any():
            histogram.add(slice_margin(network, image, device=device or torch.device("cpu"), autocast=autocast), truth)
    return fitted(histogram)


def fitted(histogram: MarginHistogram) -> Calibration:
    """The scale within SCALE_LIMITS and the offset of least cross-entropy, both to 4 digits, and its figures.

    Where one class is missing no offset is best, and the margins are left as they are. Raises ConfigError for no voxels.
    """
    margin, label, count = histogram.samples
    if not len(count):
        raise ConfigError("no voxel of the validation slices is annotated, so nothing can be calibrated; choose other slices.")
    scale, offset, remark = _least(margin, label, count / count.sum())
    scale, offset = (float(f"{value:.4g}") for value in (scale, offset))
    return Calibration(
        scale,
        offset,
        ece_before=histogram.reliability().expected_error,
        ece_after=histogram.reliability(scale, offset).expected_error,
        nll_before=histogram.cross_entropy(),
        nll_after=histogram.cross_entropy(scale, offset),
        remark=remark,
    )


def calibrated(network: UNet, calibration: Calibration) -> UNet:
    """A copy whose margin is scale m + offset: only the head's numbers change, so it costs nothing to run."""
    copied = copy.deepcopy(network)
    assert copied.head.bias is not None
    with torch.no_grad():
        copied.head.weight.mul_(calibration.scale)
        copied.head.bias.mul_(calibration.scale)
        copied.head.bias[1] += calibration.offset
    return copied


def to_json(calibration: Calibration) -> dict[str, float | str]:
    """For a card: figures to 4 digits, the remark only where there is one."""
    found = dataclasses.asdict(calibration)
    remark = found.pop("remark")
    return {**{name: float(f"{value:.4g}") for name, value in found.items()}, **({"remark": remark} if remark else {})}


def _least(margin: Float64Array, label: Float64Array, weight: Float64Array) -> tuple[float, float, str]:
    """Scale, offset and remark. Convex: where the best scale lies beyond a limit, the best within them is that limit."""
    share = float(weight @ label)
    if not 0 < share < 1:
        return 1.0, 0.0, f"not fitted: the validation slices are all {'foreground' if share else 'background'}"
    prior = math.log(share / (1 - share))
    design = np.stack([margin, np.ones_like(margin)], axis=1)
    scale, shift = _newton(design, np.full_like(margin, prior), label, weight)
    remark = ""
    if margin[label == 0].max() < margin[label == 1].min():
        remark = "the margins of the validation slices separate the classes, so any larger scale would fit as well"
    low, high = SCALE_LIMITS
    if not low <= scale <= high:
        remark = remark or f"the best scale is {scale:.3g}"
        scale = min(max(scale, low), high)
        (shift,) = _newton(design[:, 1:], scale * margin + prior, label, weight)
        remark += f"; {scale:g} is the limit"
    return float(scale), float(shift + prior), remark


def _newton(design: Float64Array, base: Float64Array, label: Float64Array, weight: Float64Array) -> Float64Array:
    """The coefficients c of least cross-entropy of base + design c: design (n, k), the others (n,), weights of sum 1.

    Newton steps, halved until none makes it worse. Where classes can be separated c grows without end, and this gives up.
    """
    c = np.zeros(design.shape[1])
    loss = _cross_entropy(base, label, weight)
    for _ in range(MAX_NEWTON_STEPS):
        probability = _sigmoid(base + design @ c)
        gradient = design.T @ (weight * (probability - label))
        curvature = (design * (weight * probability * (1 - probability))[:, None]).T @ design
        step = np.linalg.lstsq(curvature, gradient, rcond=None)[0]  # margins may be all alike
        better = _cross_entropy(base + design @ (c - step), label, weight)
        while better > loss and np.abs(step).max() > 1e-12:
            step /= 2
            better = _cross_entropy(base + design @ (c - step), label, weight)
        if not loss - better > 1e-14:
            break
        c, loss = c - step, better
    return c


def _cross_entropy(log_odds: Float64Array, label: Float64Array, weight: Float64Array) -> float:
    return float(weight @ (np.logaddexp(0, log_odds) - label * log_odds))


def _sigmoid(log_odds: Float64Array) -> Float64Array:
    return np.exp(-np.logaddexp(0, -log_odds))
