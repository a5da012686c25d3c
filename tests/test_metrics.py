"""Counts against numpy and scipy at once; streamed against at once; thresholds against the masks themselves."""

from __future__ import annotations

import math
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from scipy.spatial.distance import dice, jaccard

from kdunet_infer import metrics
from kdunet_infer.errors import ConfigError, EngineError, GeometryError, VolumeError
from kdunet_infer.geometry import Box
from kdunet_infer.metrics import (
    Confusion,
    CrossEntropy,
    ProbabilityHistogram,
    agreement,
    confusion,
    evaluate_volumes,
    slice_confusions,
)

MASKS = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=3, max_dims=3, max_side=7))
CHUNKS = st.tuples(*[st.integers(1, 9)] * 3)


class ArrayLabels:
    """Labels in memory that remember what was read of them."""

    def __init__(self, voxels, chunk_shape=(2, 3, 4)):
        self.voxels, self.shape, self.chunk_shape, self.boxes = voxels, voxels.shape, chunk_shape, []

    def read(self, box):
        self.boxes.append(box)
        return self.voxels[box.slices_in(Box.of_shape(self.shape))]


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def brute_confusion(prediction, truth):
    """One voxel after the other: the reference."""
    kinds = [(bool(p), bool(t)) for p, t in zip(prediction.ravel(), truth.ravel(), strict=True)]
    return Confusion(*(kinds.count(kind) for kind in [(True, True), (True, False), (False, True), (False, False)]))


# Confusion


@given(MASKS, st.randoms(use_true_random=False))
def test_confusion_counts_every_voxel(prediction, random) -> None:
    truth = np.array([random.random() < 0.5 for _ in range(prediction.size)]).reshape(prediction.shape)
    assert confusion(prediction, truth) == brute_confusion(prediction, truth)


def test_scores_equal_scipy(rng: np.random.Generator) -> None:
    truth = rng.random((5, 40, 30)) < 0.3
    prediction = truth ^ (rng.random(truth.shape) < 0.1)
    counts = confusion(prediction, truth)
    assert counts.iou == pytest.approx(1 - jaccard(prediction.ravel(), truth.ravel()), abs=1e-12)
    assert counts.dice == pytest.approx(1 - dice(prediction.ravel(), truth.ravel()), abs=1e-12)
    assert counts.precision == pytest.approx(truth[prediction].mean(), abs=1e-12)
    assert counts.recall == pytest.approx(prediction[truth].mean(), abs=1e-12)


@pytest.mark.parametrize(
    ("counts", "scores"),
    [
        (Confusion(), (1, 1, 1, 1)),
        (Confusion(tn=9), (1, 1, 1, 1)),
        (Confusion(fp=2, tn=7), (0, 0, 0, 0)),
        (Confusion(fn=2, tn=7), (0, 0, 0, 0)),
        (Confusion(fp=2, fn=3), (0, 0, 0, 0)),
        (Confusion(tp=4), (1, 1, 1, 1)),
        (Confusion(tp=3, fp=1, fn=2), (3 / 6, 6 / 9, 3 / 4, 3 / 5)),
    ],
    ids=["no-voxels", "both-empty", "truth-empty", "prediction-empty", "disjoint", "perfect", "mixed"],
)
def test_scores_where_something_is_empty(counts, scores) -> None:
    assert (counts.iou, counts.dice, counts.precision, counts.recall) == scores


def test_confusion_adds_up_without_overflow() -> None:
    huge = Confusion(2**62, 2**62, 0, 2**62)
    total = sum([huge] * 4, Confusion(1, 2, 3, 4))
    assert total == Confusion(2**64 + 1, 2**64 + 2, 3, 2**64 + 4)
    assert total.n_voxels == 3 * 2**64 + 10


def test_confusion_holds_python_integers(rng: np.random.Generator) -> None:
    counts = confusion(rng.random((4, 5)) < 0.5, rng.random((4, 5)) < 0.5)
    assert {type(n) for n in (counts.tp, counts.fp, counts.fn, counts.tn)} == {int}


def test_any_value_but_zero_is_foreground() -> None:
    assert confusion(np.array([0, 1, 255, 7], np.uint8), np.array([0, -4, 0, 9], np.int64)) == Confusion(2, 1, 0, 1)


def test_foreground_picks_one_value_of_the_truth_only() -> None:
    prediction, truth = np.array([1, 1, 0, 5], np.uint8), np.array([5, 2, 5, 0], np.uint8)
    assert confusion(prediction, truth, foreground=5) == Confusion(1, 2, 1, 0)
    assert confusion(prediction, truth, foreground=300) == Confusion(0, 3, 0, 1)  # beyond uint8: nowhere


@given(MASKS)
def test_slices_are_counted_one_by_one(prediction) -> None:
    truth = np.roll(prediction, 1)
    assert slice_confusions(prediction, truth) == [brute_confusion(p, t) for p, t in zip(prediction, truth, strict=True)]


def test_slices_take_foreground() -> None:
    truth = np.array([[[2]], [[3]]])
    assert slice_confusions(np.ones_like(truth), truth, 3) == [Confusion(fp=1), Confusion(tp=1)]


@pytest.mark.parametrize("count", [confusion, slice_confusions, agreement])
def test_arrays_of_different_shape_are_refused(count) -> None:
    with pytest.raises(
        VolumeError, match=r"shape \(2, 3, 4\) and .* \(1, 3, 4\), so .* do not correspond; compare the same region"
    ):
        count(np.ones((2, 3, 4), bool), np.ones((1, 3, 4), bool))


@pytest.mark.parametrize("count", [confusion, agreement])
@pytest.mark.parametrize("float_first", [True, False])
def test_probabilities_are_no_labels(count, float_first) -> None:
    arrays = [np.ones(3, np.float32), np.ones(3, np.uint8)]
    with pytest.raises(VolumeError, match=r"dtype float32, but only integers and booleans .*; threshold probabilities first"):
        count(*(arrays if float_first else reversed(arrays)))


# Volumes


@given(MASKS, CHUNKS, CHUNKS, st.integers(1, 400), st.randoms(use_true_random=False))
def test_streamed_equals_at_once(prediction, chunks_a, chunks_b, block_voxels, random) -> None:
    truth = np.array([random.randrange(3) for _ in range(prediction.size)], np.uint8).reshape(prediction.shape)
    scores = evaluate_volumes(
        ArrayLabels(prediction, chunks_a), ArrayLabels(truth, chunks_b), foreground=2, block_voxels=block_voxels
    )
    assert scores.confusion == confusion(prediction, truth, foreground=2)
    assert scores.per_slice == tuple(slice_confusions(prediction, truth, foreground=2))
    assert scores.foreground == 2


@given(st.tuples(*[st.integers(0, 9)] * 3), CHUNKS, CHUNKS, st.integers(1, 400))
def test_memory_is_bounded(shape, chunks_a, chunks_b, block_voxels) -> None:
    prediction, truth = ArrayLabels(np.zeros(shape, bool), chunks_a), ArrayLabels(np.zeros(shape, bool), chunks_b)
    evaluate_volumes(prediction, truth, block_voxels=block_voxels)
    assert prediction.boxes == truth.boxes
    assert all(box.n_voxels <= block_voxels for box in prediction.boxes)


@pytest.mark.parametrize(
    ("block_voxels", "first"),
    [
        (10_000, (8, 16, 16)),
        (1_999, (4, 16, 16)),
        (1_023, (4, 8, 16)),
        (511, (4, 8, 8)),
        (255, (3, 8, 8)),
        (63, (1, 7, 8)),
        (5, (1, 1, 5)),
    ],
    ids=["all", "slab", "rows", "chunk", "cut-in-z", "cut-in-y", "cut-in-x"],
)
def test_blocks_are_whole_chunks_while_these_fit(block_voxels, first) -> None:
    coarse, fine = ArrayLabels(np.zeros((8, 16, 16), bool), (4, 8, 8)), ArrayLabels(np.zeros((8, 16, 16), bool), (2, 4, 8))
    evaluate_volumes(coarse, fine, block_voxels=block_voxels)
    evaluate_volumes(fine, coarse, block_voxels=block_voxels)
    assert coarse.boxes[0].shape == coarse.boxes[len(coarse.boxes) // 2].shape == first


def test_progress_counts_voxels_up_to_all(rng: np.random.Generator) -> None:
    calls = []
    mask = ArrayLabels(rng.random((6, 6, 6)) < 0.5)
    evaluate_volumes(mask, mask, progress=lambda done, total: calls.append((done, total)), block_voxels=50)
    assert len(calls) == len(mask.boxes) // 2 > 4
    assert calls[-1] == (216, 216)
    assert calls == sorted(calls)


def test_volumes_of_different_shape_are_refused_unread() -> None:
    prediction, truth = ArrayLabels(np.zeros((2, 4, 4), bool)), ArrayLabels(np.zeros((2, 4, 5), bool))
    with pytest.raises(VolumeError, match=r"prediction has shape \(2, 4, 4\) and truth \(2, 4, 5\).*same region"):
        evaluate_volumes(prediction, truth)
    assert prediction.boxes == truth.boxes == []


def test_an_error_says_in_which_block() -> None:
    with pytest.raises(VolumeError) as caught:
        evaluate_volumes(ArrayLabels(np.zeros((2, 4, 4))), ArrayLabels(np.zeros((2, 4, 4), bool)))
    assert caught.value.__notes__ == ["while comparing prediction and truth at voxels 0:2,0:4,0:4 (z,y,x)"]


def test_scores_as_a_dictionary() -> None:
    prediction = np.array([[[1, 1, 0, 0]], [[0, 0, 0, 0]]], np.uint8)
    truth = np.array([[[1, 0, 1, 1]], [[0, 0, 0, 0]]], np.uint8)
    assert evaluate_volumes(ArrayLabels(prediction), ArrayLabels(truth)).to_dict() == {
        "iou": 0.25,
        "dice": 0.4,
        "precision": 0.5,
        "recall": 1 / 3,
        "per_slice_iou": [0.25, 1.0],
        "n_voxels": 8,
        "n_voxels_excluded": 0,
        "foreground_fraction_prediction": 0.25,
        "foreground_fraction_truth": 0.375,
        "tolerance": 0,
        "roi": None,
    }
    narrowed = evaluate_volumes(
        ArrayLabels(prediction), ArrayLabels(truth), mask=ArrayLabels(truth), tolerance=1, roi=Box((0, 0, 1), (2, 1, 4))
    )
    assert narrowed.to_dict() == {
        "iou": 0.0,
        "dice": 0.0,
        "precision": 0.0,
        "recall": 0.0,
        "per_slice_iou": [0.0, None],  # no voxel of the second slice counts
        "n_voxels": 1,
        "n_voxels_excluded": 5,
        "foreground_fraction_prediction": 0.0,
        "foreground_fraction_truth": 1.0,
        "tolerance": 1,
        "roi": "0:2,0:1,1:4",
    }


def test_a_volume_without_voxels_has_scores() -> None:
    empty = ArrayLabels(np.zeros((0, 4, 4), bool))
    found = evaluate_volumes(empty, empty).to_dict()
    assert (found["iou"], found["n_voxels"], found["foreground_fraction_truth"]) == (1, 0, 0)


# What counts


def far_from_boundaries(true, tolerance):
    """Slice by slice by scipy: where the nearest pixel of the other class is further than the tolerance."""
    if not tolerance:
        return np.ones_like(true)
    far = np.ones_like(true)
    for kept, truth_slice in zip(far, true, strict=True):
        for one_class in (truth_slice, ~truth_slice):
            if not one_class.all():  # else there is no other class to be near to
                kept &= ~one_class | (ndimage.distance_transform_edt(one_class) > tolerance)
    return far


@st.composite
def volumes_to_compare(draw):
    """Prediction, truth of the labels 0 to 2 in patches, and mask: of one shape."""
    shape = draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    patches = ndimage.zoom(rng.integers(0, 3, shape), (1, 3, 3), order=0)[:, : shape[1], : shape[2]].astype(np.uint8)
    mask = rng.random(shape) < draw(st.sampled_from([0.1, 0.9]))
    mask.flat[rng.integers(mask.size)] = True
    return rng.random(shape) < 0.5, patches, mask


@given(volumes_to_compare(), CHUNKS, CHUNKS, CHUNKS, st.integers(1, 400))
def test_only_voxels_of_the_mask_count(volumes, chunks_a, chunks_b, chunks_c, block_voxels) -> None:
    prediction, truth, mask = volumes
    scores = evaluate_volumes(
        ArrayLabels(prediction, chunks_a),
        ArrayLabels(truth, chunks_b),
        mask=ArrayLabels(mask * np.int16(-3), chunks_c),
        block_voxels=block_voxels,
    )
    assert scores.confusion == confusion(prediction[mask], truth[mask])
    assert scores.per_slice == tuple(confusion(p[m], t[m]) for p, t, m in zip(prediction, truth, mask, strict=True))
    assert scores.n_excluded == np.count_nonzero(~mask)


@given(volumes_to_compare(), st.integers(0, 9), CHUNKS, st.integers(1, 400), st.sampled_from([None, 2]))
def test_voxels_near_a_boundary_of_the_truth_do_not_count(volumes, tolerance, chunks, block_voxels, foreground) -> None:
    prediction, truth, mask = volumes
    true = truth != 0 if foreground is None else truth == foreground
    counts = far_from_boundaries(true, tolerance) & mask
    arrays = ArrayLabels(prediction), ArrayLabels(truth, chunks)
    given_all = {"foreground": foreground, "mask": ArrayLabels(mask), "tolerance": tolerance, "block_voxels": block_voxels}
    if not counts.any():
        with pytest.raises(VolumeError, match=r"none of the .* counts"):
            evaluate_volumes(*arrays, **given_all)
        return
    scores = evaluate_volumes(*arrays, **given_all)
    assert scores.confusion == confusion(prediction[counts], true[counts])
    assert scores.per_slice == tuple(confusion(p[c], t[c]) for p, t, c in zip(prediction, true, counts, strict=True))
    assert (scores.n_excluded, scores.tolerance) == (np.count_nonzero(~counts), tolerance)


@given(st.data(), volumes_to_compare(), st.integers(0, 3), CHUNKS, st.integers(1, 400))
def test_a_roi_is_scored_within_its_true_surroundings(data, volumes, tolerance, chunks, block_voxels) -> None:
    prediction, truth, _ = volumes
    ranges = [data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)).filter(lambda r: r[0] < r[1])) for n in truth.shape]
    roi = Box(tuple(a for a, _ in ranges), tuple(b for _, b in ranges))
    within = tuple(slice(a, b) for a, b in ranges)
    counts = far_from_boundaries(truth != 0, tolerance)[within]
    hypothesis.assume(counts.any())
    volumes = ArrayLabels(prediction, chunks), ArrayLabels(truth)
    scores = evaluate_volumes(*volumes, tolerance=tolerance, roi=roi, block_voxels=block_voxels)
    assert scores.confusion == confusion(prediction[within][counts], truth[within][counts])
    assert len(scores.per_slice) == roi.shape[0]
    assert sum(scores.per_slice, Confusion()) == scores.confusion
    assert scores.n_excluded == np.count_nonzero(~counts)
    assert scores.roi == roi
    assert all(roi.contains(box) for box in volumes[0].boxes)


def test_blocks_of_a_roi_are_cut_where_chunks_are() -> None:
    labels = ArrayLabels(np.zeros((8, 16, 16), bool), (4, 8, 8))
    evaluate_volumes(labels, labels, roi=Box((1, 3, 0), (8, 16, 10)), block_voxels=4 * 8 * 8)
    assert [box.begin for box in labels.boxes[::4]] == [(1, 3, 0), (1, 8, 0), (4, 3, 0), (4, 8, 0)]
    assert {box.n_voxels for box in labels.boxes} <= set(range(4 * 8 * 8 + 1))


def test_chunks_of_the_mask_are_not_cut_either() -> None:
    labels, mask = (ArrayLabels(np.ones((8, 16, 16), bool), chunks) for chunks in ((2, 4, 4), (4, 8, 8)))
    evaluate_volumes(labels, labels, mask=mask, block_voxels=4 * 8 * 8)
    assert {box.shape for box in mask.boxes} == {(4, 8, 8)}


def test_progress_of_a_roi_counts_its_voxels() -> None:
    calls, labels = [], ArrayLabels(np.zeros((6, 6, 6), bool))
    roi = Box((1, 1, 1), (4, 5, 6))
    evaluate_volumes(labels, labels, roi=roi, progress=lambda *done: calls.append(done), block_voxels=9)
    assert calls[-1] == (roi.n_voxels, roi.n_voxels)


@pytest.mark.parametrize(
    ("narrowed", "error", "says"),
    [
        (
            {"mask": np.ones((2, 4, 3), bool)},
            VolumeError,
            r"mask has shape \(2, 4, 3\) and truth \(2, 4, 4\), so .*; compare the same region",
        ),
        (
            {"mask": np.zeros((2, 4, 4), bool)},
            VolumeError,
            "none of the 32 voxels 0:2,0:4,0:4 counts: the mask is 0 at all of them; give a mask that is not 0 where",
        ),
        (
            {"tolerance": 1},
            VolumeError,
            "none of the 32 voxels 0:2,0:4,0:4 counts: all lie within 1 voxel of a boundary of the truth; lower the tolerance",
        ),
        (
            {"tolerance": 2, "mask": np.ones((2, 4, 4), bool), "roi": Box((0, 0, 0), (2, 4, 3))},
            VolumeError,
            r"none of the 24 voxels .* counts: all lie where the mask is 0 or within 2 voxels of a boundary of the truth; "
            "give a larger mask or lower the tolerance",
        ),
        ({"tolerance": -1}, ConfigError, r"tolerance is -1; it must be 0 \(every voxel counts\) or a number of voxels"),
        (
            {"roi": Box((0, 0, 0), (2, 4, 5))},
            GeometryError,
            r"region of interest 0:2,0:4,0:5 leaves the volume of \(2, 4, 4\) voxels; choose one inside 0:2,0:4,0:4",
        ),
        (
            {"roi": Box((0, 1, 0), (2, 1, 4))},
            GeometryError,
            "region of interest 0:2,1:1,0:4 holds no voxels; give begin:end with end > begin along each axis",
        ),
        (
            {"mask": np.ones((2, 4, 4))},
            VolumeError,
            "the mask has dtype float64, but only integers and booleans say what is foreground; threshold",
        ),
    ],
    ids=["mask-shape", "mask-empty", "tolerance-all", "both", "negative", "roi-outside", "roi-empty", "mask-float"],
)
def test_what_leaves_nothing_to_compare_is_refused(narrowed, error, says) -> None:
    checkers = ArrayLabels(np.indices((2, 4, 4)).sum(axis=0) % 2)
    if "mask" in narrowed:
        narrowed = narrowed | {"mask": ArrayLabels(narrowed["mask"])}
    with pytest.raises(error, match=says):
        evaluate_volumes(checkers, checkers, **narrowed)


def test_probabilities_are_no_labels_under_a_mask_either() -> None:
    floats, mask = ArrayLabels(np.ones((2, 4, 4), np.float32)), ArrayLabels(np.ones((2, 4, 4), bool))
    for volumes in ((floats, mask), (mask, floats)):
        with pytest.raises(VolumeError, match="labels have dtype float32"):
            evaluate_volumes(*volumes, mask=mask)


# Agreement


def test_agreement_is_the_share_of_equal_voxels() -> None:
    assert agreement(np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])) == 0.75
    assert agreement(np.zeros((0, 3), bool), np.zeros((0, 3), bool)) == 1


# Thresholds


GRID = [k / 256 for k in range(257)]


def probabilities(rng, shape):
    """Float32, many of them exactly on a threshold or one step beside it."""
    p = rng.random(shape, np.float32)
    on_grid = np.round(p * 256).astype(np.float32) / np.float32(256)
    beside = np.nextafter(on_grid, rng.choice(np.array([0, 1], np.float32), shape))
    return np.choose(rng.integers(0, 3, shape), [p, on_grid, beside]).astype(np.float32)


def test_every_threshold_counts_exactly_its_mask(rng: np.random.Generator) -> None:
    p, truth = probabilities(rng, (3, 50, 40)), rng.random((3, 50, 40)) < 0.4
    histogram = ProbabilityHistogram()
    histogram.add(p, truth)
    for threshold in GRID:
        assert histogram.confusion_at(threshold) == confusion(p >= threshold, truth), threshold
    assert histogram.iou_at([0.25, 0.5]) == (confusion(p >= 0.25, truth).iou, confusion(p >= 0.5, truth).iou)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_thresholds_are_exact_in_every_float(rng: np.random.Generator, dtype) -> None:
    p, truth = probabilities(rng, (40, 50)).astype(dtype), rng.random((40, 50)) < 0.4
    histogram = ProbabilityHistogram()
    histogram.add(p, truth)
    assert histogram.iou_at(GRID) == tuple(confusion(p >= dtype(t), truth).iou for t in GRID)


def test_pieces_and_calls_add_up(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    p, truth = probabilities(rng, (4, 30, 30)), rng.integers(0, 3, (4, 30, 30))
    whole = [ProbabilityHistogram(foreground=2), CrossEntropy(foreground=2)]
    for measure in whole:
        measure.add(p, truth)
    monkeypatch.setattr(metrics, "PIECE_VOXELS", 7)
    parts = [ProbabilityHistogram(foreground=2), CrossEntropy(foreground=2)]
    for measure in parts:
        measure.add(p[:1], truth[:1])
        measure.add(np.asfortranarray(p[1:]), np.asfortranarray(truth[1:]))
    assert parts[0].iou_at(GRID) == whole[0].iou_at(GRID) == tuple(confusion(p >= t, truth, 2).iou for t in GRID)
    assert parts[1].mean() == pytest.approx(whole[1].mean(), rel=1e-12)


def test_best_threshold_is_the_best_of_all_masks(rng: np.random.Generator) -> None:
    truth = rng.random((60, 60)) < 0.3
    p = np.clip(0.35 + 0.2 * truth + 0.1 * rng.standard_normal(truth.shape), 0, 1).astype(np.float32)
    histogram = ProbabilityHistogram()
    histogram.add(p, truth)
    threshold, iou = histogram.best_threshold()
    assert 0.35 < threshold < 0.55
    assert iou == confusion(p >= threshold, truth).iou == max(confusion(p >= t, truth).iou for t in GRID[1:-1])


@pytest.mark.parametrize(
    ("p", "truth", "best"),
    [
        ([0.125, 0.875], [0, 1], 0.5),  # all of (0.125, 0.875] are perfect
        ([0.625, 0.875], [0, 1], 161 / 256),  # (0.625, 0.875]
        ([0.125, 0.25], [0, 1], 0.25),
        ([1.0, 0.0], [1, 1], 0.5),  # every threshold but 0, which would be better, and which no card takes
        ([0.1, 0.2], [0, 0], 0.5),  # both empty at 0.5
        ([127 / 256, 128 / 256, 130 / 256], [1, 0, 1], 127 / 256),  # 127: 2/3; 128: 1/3; 129, 130: 1/2
    ],
    ids=["plateau", "above", "below", "not-0", "empty-truth", "maximum"],
)
def test_best_of_equal_thresholds_is_the_closest_to_half(p, truth, best) -> None:
    histogram = ProbabilityHistogram()
    histogram.add(np.array(p, np.float32), np.array(truth))
    assert histogram.best_threshold()[0] == best


def test_lower_of_two_equally_close_thresholds() -> None:
    # One step below 0.5 and one above it are equally good (2 of 4, 1 of 2), 0.5 itself is worse (1 of 3).
    p = np.array([127, 127 + 0.5, 128, 129], np.float32) / np.float32(256)
    histogram = ProbabilityHistogram()
    histogram.add(p, np.array([1, 0, 0, 1]))
    assert [Fraction(iou).limit_denominator(9) for iou in histogram.iou_at([127 / 256, 128 / 256, 129 / 256])] == [
        Fraction(1, 2),
        Fraction(1, 3),
        Fraction(1, 2),
    ]
    assert histogram.best_threshold() == (127 / 256, 0.5)


@pytest.mark.parametrize("threshold", [0.3, -1 / 256, 257 / 256, math.nan, math.inf])
def test_thresholds_off_the_grid_are_refused(threshold) -> None:
    with pytest.raises(ConfigError, match=rf"threshold {threshold} is not a multiple of 1/256 in 0..1; choose one that is"):
        ProbabilityHistogram().iou_at([0.5, threshold])


def test_no_voxels_give_no_threshold_and_no_cross_entropy() -> None:
    with pytest.raises(ConfigError, match=r"no voxels were added, so no threshold .*; give validation data"):
        ProbabilityHistogram().best_threshold()
    with pytest.raises(ConfigError, match="no voxels were added, so there is no cross entropy; give data"):
        CrossEntropy().mean()


@pytest.mark.parametrize("measure", [ProbabilityHistogram, CrossEntropy])
@pytest.mark.parametrize(
    ("p", "error", "says"),
    [
        (np.array([0.5, np.nan], np.float32), EngineError, "from nan to nan, not within 0..1; pass foreground probabilities"),
        (np.array([0.5, 1.5], np.float32), EngineError, "from 0.5 to 1.5, not within 0..1;.*not logits"),
        (np.array([-2, 0.5], np.float32), EngineError, "from -2 to 0.5, not within 0..1;.*check the model for NaN"),
        (np.array([0, 255], np.uint8), VolumeError, "dtype uint8, not floating point.*pass the engine's float32 output"),
        (np.zeros((1, 2), np.float32), VolumeError, r"probability has shape \(1, 2\) and truth \(2,\)"),
    ],
    ids=["nan", "above", "below", "stored", "shape"],
)
def test_what_is_no_probability_is_refused(measure, p, error, says) -> None:
    added = measure()
    with pytest.raises(error, match=says):
        added.add(p, np.array([0, 1]))


@pytest.mark.parametrize("measure", [ProbabilityHistogram, CrossEntropy])
def test_truth_of_probabilities_is_refused(measure) -> None:
    with pytest.raises(VolumeError, match="labels have dtype float64"):
        measure().add(np.array([0.5], np.float32), np.array([0.5]))


# Cross entropy


def test_cross_entropy_is_the_mean_log_of_the_truth(rng: np.random.Generator) -> None:
    p, truth = rng.random((3, 20, 20), np.float32), rng.random((3, 20, 20)) < 0.5
    of_truth = [float(q) if t else 1 - float(q) for q, t in zip(p.ravel(), truth.ravel(), strict=True)]
    measure = CrossEntropy()
    measure.add(p, truth)
    assert measure.mean() == pytest.approx(-math.fsum(map(math.log, of_truth)) / p.size, rel=1e-12)


def test_cross_entropy_of_saturated_voxels_is_finite() -> None:
    measure = CrossEntropy()
    measure.add(np.array([0, 1, 0, 1], np.float32), np.array([1, 0, 0, 1]))
    assert measure.mean() == pytest.approx(-(math.log(1e-7) + math.log1p(-1e-7)) / 2, rel=1e-9)
