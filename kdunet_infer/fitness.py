"""Does a volume look like what the model was trained on? Sentences with the figure and the remedy, none where it fits.

The limits rest on the IoU of the released mito-epfl-2unet on three validation slices that were changed on purpose, 0.886 as
they are. Knows the card, a grey sample and the mapping; knows no files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kdunet_infer.card import N_GREY_VALUES, ModelCard
from kdunet_infer.grey_sample import Float64Array, GreySample
from kdunet_infer.intensity import TRAINED_PERMILLES, WHITE, IntensityMap, trained_quantile

NARROW = 2 / 3
"""Least part of the trained spread, 1 % to 99 %. IoU at 0.75 of the contrast: 0.878, at 0.6: 0.783, at 0.5: 0.547."""
MISFIT = 0.75
"""Largest grey distance in standard deviations of the training images. IoU at 0.54 (darker): 0.879, at 0.71 (gamma): 0.863, at
0.82 (contrast doubled): 0.794, at 0.94 (gamma): 0.795, at 1.5 (gamma): 0.525. Another animal's sections in another microscope
are at 0.2."""
INVERTED = 2.0
"""The inverted histogram must be so many times nearer. With D the distance of the training images to their own inverse, the
triangle inequality says: a volume nearer than 2/3 D to the training images is never called inverted, and an inverted one whose
inverse is nearer than 1/3 D always is."""
ASYMMETRY = 0.25
"""Least D in standard deviations. Below, nothing is said: with ends laid on the training images' by percentiles, D is 0.1 for
mito-epfl-2unet, and windows of its own data were called inverted as often as inverted ones."""
FAIR_VOXELS = 5_000_000
"""Fewer are too small a piece of tissue to be called inverted or a misfit: of 120 windows of 16 x 256 x 256 voxels of the EPFL
training sub-volume 3 were called inverted; of 33 windows of 6 to 25 million voxels none was, and each of their inverses."""
FLICKER = 1 / 3
"""Largest jump of slice means in within-slice deviations. Then one slice in 20 is off by 2/3 of a deviation, about 30 grey
levels, where the IoU begins to fall (0.871)."""
IN_PLANE = 1.25
"""Largest ratio of voxel sizes in y or x, either way: what training by default covers with its random scale of 20 %."""

VoxelSize = tuple[float, float, float]


def fit_warnings(
    card: ModelCard,
    sample: GreySample,
    mapping: IntensityMap,
    *,
    voxel_size_nm: VoxelSize | None,
    level_voxel_sizes_nm: Sequence[VoxelSize] = (),
) -> tuple[str, ...]:
    """What does not fit, one sentence each: contrast, range or grey values in general; flicker; voxel size.

    `voxel_size_nm` (zyx) is the volume's as it is to be segmented, None where it is not known; `level_voxel_sizes_nm` those of
    the levels of its pyramid, by `--level`. Without a histogram in the card, grey values are not judged, flicker is. A small
    piece of tissue is judged by its range alone, and an inversion that percentiles have mapped shows only where the training
    images' histogram is lopsided.
    """
    found = (
        _grey_warning(card, sample, mapping),
        _flicker_warning(sample, mapping),
        _voxel_size_warning(card.voxel_size_nm, voxel_size_nm, level_voxel_sizes_nm),
    )
    return tuple(sentence for sentence in found if sentence)


def mapped_histogram(sample: GreySample, mapping: IntensityMap) -> Float64Array:
    """(256,) share of the sampled voxels that get each uint8 value; the sample must not be empty."""
    return np.bincount(mapping.grey(sample.values), weights=sample.counts, minlength=N_GREY_VALUES) / sample.n_voxels


def grey_distance(a: Float64Array, b: Float64Array) -> float:
    """How far grey values must be moved on average to make one histogram (256,) the other: Wasserstein-1, in grey levels."""
    return float(np.abs(np.cumsum(a / a.sum()) - np.cumsum(b / b.sum())).sum())


def _grey_warning(card: ModelCard, sample: GreySample, mapping: IntensityMap) -> str | None:
    """The first that applies: a narrow range hides an inversion, and either is a misfit."""
    if not card.grey_histogram or not sample.n_voxels:
        return None
    narrow = _narrow_warning(card, sample, mapping)
    if narrow or sample.n_voxels < FAIR_VOXELS:
        return narrow
    return _inversion_warning(card, sample, mapping) or _misfit_warning(card, sample, mapping)


def _narrow_warning(card: ModelCard, sample: GreySample, mapping: IntensityMap) -> str | None:
    low, high = (float(mapping.grey(np.array(sample.quantile(permille)))) for permille in TRAINED_PERMILLES)
    trained_low, trained_high = (trained_quantile(card, permille) for permille in TRAINED_PERMILLES)
    if high - low >= NARROW * (trained_high - trained_low):
        return None
    fitting = _fitting_map(card, sample)
    remedy = f"spread them with {_as_option(fitting, sample)}" if fitting else "give a volume with more contrast"
    return (
        f"98 % of the voxels have grey values from {low:.0f} to {high:.0f} on the model's scale, those of its training images "
        f"go from {trained_low:.0f} to {trained_high:.0f}; {remedy}."
    )


def _inversion_warning(card: ModelCard, sample: GreySample, mapping: IntensityMap) -> str | None:
    trained, found = np.array(card.grey_histogram), mapped_histogram(sample, mapping)
    if grey_distance(trained, _inverted(trained, mapping)) < ASYMMETRY * _deviation(trained):
        return None
    distance, inverse = grey_distance(found, trained), grey_distance(_inverted(found, mapping), trained)
    if distance <= INVERTED * inverse:
        return None
    return (
        f"light and dark look inverted: the grey values are {distance:.1f} grey levels away from those of the training images, "
        f"and {inverse:.1f} once inverted; store the volume inverted (uint8: 255 - value) and segment that."
    )


def _misfit_warning(card: ModelCard, sample: GreySample, mapping: IntensityMap) -> str | None:
    trained = np.array(card.grey_histogram)
    distance, limit = grey_distance(mapped_histogram(sample, mapping), trained), MISFIT * _deviation(trained)
    if distance <= limit:
        return None
    fitting = _fitting_map(card, sample)
    helps = fitting and grey_distance(mapped_histogram(sample, fitting), trained) <= limit
    remedy = (
        f"map them with {_as_option(fitting, sample)}"
        if fitting and helps
        else "look at a preview of the mask before a long run, or use a model trained on such images"
    )
    return (
        f"the grey values are {distance:.1f} grey levels away from those of the training images, whose standard deviation is "
        f"{_deviation(trained):.1f}; {remedy}."
    )


def _inverted(histogram: Float64Array, mapping: IntensityMap) -> Float64Array:
    """(256,) what the same rule would make of the inverted volume: its ends change places."""
    values = np.clip(round(mapping.out_low + mapping.out_high) - np.arange(N_GREY_VALUES), 0, N_GREY_VALUES - 1)
    return np.bincount(values, weights=histogram, minlength=N_GREY_VALUES).astype(np.float64)


def _deviation(histogram: Float64Array) -> float:
    values = np.arange(N_GREY_VALUES)
    mean = np.average(values, weights=histogram)
    return float(np.sqrt(np.average((values - mean) ** 2, weights=histogram)))


def _fitting_map(card: ModelCard, sample: GreySample) -> IntensityMap | None:
    """The range to give so that the 1 % and 99 % quantiles go where the training images have theirs, if there is one."""
    low, high = (sample.quantile(permille) for permille in TRAINED_PERMILLES)
    trained_low, trained_high = (trained_quantile(card, permille) for permille in TRAINED_PERMILLES)
    if not (low < high and trained_low < trained_high):
        return None
    raw_per_grey = (high - low) / (trained_high - trained_low)
    begin = low - trained_low * raw_per_grey
    end = begin + WHITE * raw_per_grey
    if sample.is_integer:
        begin, end = float(round(begin)), float(round(end))
    return IntensityMap("range", begin, end, 0.0, WHITE) if begin < end else None


def _as_option(mapping: IntensityMap, sample: GreySample) -> str:
    low, high = (f"{end:.0f}" if sample.is_integer else f"{end:.6g}" for end in (mapping.low, mapping.high))
    return f"--intensity-range={low},{high}"  # with =, or a leading minus would be taken for an option


def _flicker_warning(sample: GreySample, mapping: IntensityMap) -> str | None:
    jumps = np.diff(sample.slice_means)[np.diff(sample.slice_z) == 1]
    if not jumps.size:
        return None
    # of independent slices the variances add; slow changes of the tissue hardly count
    jump = math.sqrt(float(np.mean(jumps**2)) / 2)
    deviation = math.sqrt(float(np.mean(sample.slice_deviations**2)))
    if jump <= FLICKER * deviation:
        return None
    share = f"{jump / deviation:.0%} of the deviation within a slice" if deviation else "and no slice varies within itself"
    return (
        f"the brightness flickers: slice means jump by {jump * mapping.slope:.1f} grey levels (standard deviation) from one "
        f"slice to the next, {share}; even the slices out, for example by matching their means, and segment that."
    )


def _voxel_size_warning(trained: VoxelSize | None, found: VoxelSize | None, levels: Sequence[VoxelSize]) -> str | None:
    """Of y and x alone: the network looks at one slice at a time, so the distance of slices is nothing to it."""
    if trained is None:
        return None
    if found is None:
        return (
            f"the voxel size of the volume is not known, and the model was trained on {_in_plane(trained)}; "
            "give it with --voxel-size to have it compared."
        )
    ratio = _ratio(found, trained)
    if ratio <= IN_PLANE:
        return None
    remedy = f"resample it to about {_in_plane(trained)}"
    if levels:
        nearest = min(range(len(levels)), key=lambda level: _ratio(levels[level], trained))
        if _ratio(levels[nearest], trained) < ratio:
            remedy = f"segment --level {nearest}, which has {_in_plane(levels[nearest])}"
            if _ratio(levels[nearest], trained) > IN_PLANE:
                remedy += f", or resample it to about {_in_plane(trained)}"
    return (
        f"the volume has voxels of {_in_plane(found)} and the model was trained on {_in_plane(trained)}, "
        f"{ratio:.2f} times apart; {remedy}."
    )


def _ratio(a: VoxelSize, b: VoxelSize) -> float:
    """How many times a voxel of one is larger than the other's in y or x, whichever differs more and either way."""
    return max(max(p / q, q / p) for p, q in zip(a[1:], b[1:], strict=True))


def _in_plane(voxel_size_nm: VoxelSize) -> str:
    return f"{voxel_size_nm[1]:g} x {voxel_size_nm[2]:g} nm (y, x)"
