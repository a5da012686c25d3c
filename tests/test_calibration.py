"""Platt scaling against scipy's minimiser, reliability against voxels counted one by one, and slabs that fit nothing."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, log_expit, logit

from kdunet.calibration import SCALE_LIMITS, Calibration, MarginHistogram, calibrate, calibrated, fitted, to_json
from kdunet.data import Annotated
from kdunet.losses import IGNORED, margin
from kdunet.unet import UNet
from kdunet_infer.errors import ConfigError, TrainingError
from kdunet_infer.testing import noise


def drawn(scale: float, offset: float, *, n: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Margins and labels for which sigmoid(scale m + offset) is the truth."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(-2, 3, n).astype(np.float32)
    return margins, (rng.random(n) < expit(scale * margins + offset)).astype(np.uint8)


def histogram_of(margins: np.ndarray, truth: np.ndarray) -> MarginHistogram:
    histogram = MarginHistogram()
    for part in np.array_split(np.arange(len(margins)), 3):  # as slice by slice
        histogram.add(margins[part], truth[part])
    return histogram


def cross_entropy(margins: np.ndarray, truth: np.ndarray, scale: float, offset: float) -> float:
    z = scale * margins.astype(np.float64) + offset
    return float(-np.where(truth == 1, log_expit(z), log_expit(-z)).mean())


@given(scale=st.floats(0.3, 3.5), offset=st.floats(-3, 3), seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_the_fit_is_the_least_that_scipy_finds(scale: float, offset: float, seed: int) -> None:
    margins, truth = drawn(scale, offset, seed=seed)
    found = fitted(histogram_of(margins, truth))
    best = minimize(lambda c: cross_entropy(margins, truth, *c), (1.0, 0.0), method="BFGS").x
    if SCALE_LIMITS[0] < best[0] < SCALE_LIMITS[1]:
        assert (found.scale, found.offset) == pytest.approx(tuple(best), rel=2e-3, abs=2e-3)
    assert found.nll_after <= cross_entropy(margins, truth, *best) + 1e-5
    assert found.nll_before == pytest.approx(cross_entropy(margins, truth, 1, 0), abs=1e-5)
    assert found.nll_after == pytest.approx(cross_entropy(margins, truth, found.scale, found.offset), abs=1e-5)


def test_class_weights_are_undone() -> None:
    """The optimum of a loss weighted by (w_b, w_f) is log(w_f / w_b) too high; the fit finds that out from the voxels."""
    margins, truth = drawn(1, 0, n=400_000)
    weighted = margins + math.log(4.1 / 0.73)
    found = fitted(histogram_of(weighted.astype(np.float32), truth))
    assert found.scale == pytest.approx(1, abs=0.02)
    assert found.offset == pytest.approx(-math.log(4.1 / 0.73), abs=0.04)
    assert found.ece_after < 0.003 < 0.1 < found.ece_before
    assert found.nll_after < found.nll_before
    assert found.remark == ""


def test_reliability_counts_voxels() -> None:
    margins, truth = drawn(0.5, 1)
    p = expit(2 * margins.astype(np.float64) - 1)
    table = histogram_of(margins, truth).reliability(2, -1, n_bins=10)
    # a bin of margins falls into one bin of probabilities, so voxels within 1/512 of an edge may move
    edges = [p < 0.1, *((p >= k / 10) & (p < (k + 1) / 10) for k in range(1, 9)), p >= 0.9]
    np.testing.assert_allclose(table.count, [where.sum() for where in edges], atol=15)
    np.testing.assert_allclose(table.predicted, [p[where].mean() for where in edges], atol=2e-3)
    np.testing.assert_allclose(table.observed, [truth[where].mean() for where in edges], atol=2e-2)
    ece = sum(abs(p[where].mean() - truth[where].mean()) * where.mean() for where in edges)
    assert table.expected_error == pytest.approx(ece, abs=1e-3)
    assert table.count.sum() == len(margins)


def test_empty_bins_count_for_nothing() -> None:
    table = histogram_of(np.zeros(4, np.float32), np.array([0, 1, 1, 1], np.uint8)).reliability(n_bins=4)
    np.testing.assert_array_equal(table.count, [0, 0, 4, 0])
    np.testing.assert_array_equal(table.predicted, [np.nan, np.nan, 0.5, np.nan])
    assert table.expected_error == 0.25


def test_margins_beyond_the_bins_keep_their_mean() -> None:
    histogram = histogram_of(np.array([-300, -100, 100, 300, 500], np.float32), np.array([0, 0, 0, 1, 1], np.uint8))
    margins, labels, count = histogram.samples
    np.testing.assert_array_equal(np.stack([margins, labels, count]), [[-200, 100, 400], [0, 0, 1], [2, 1, 2]])


def test_one_class_alone_is_left_as_it_is_and_says_so() -> None:
    for value, name in ((0, "background"), (1, "foreground")):
        found = fitted(histogram_of(drawn(1, 0)[0], np.full(20_000, value, np.uint8)))
        assert (found.scale, found.offset, found.ece_after) == (1, 0, found.ece_before)
        assert found.remark == f"not fitted: the validation slices are all {name}"


def test_classes_that_a_margin_separates_get_the_largest_scale_and_say_so() -> None:
    margins = np.linspace(-1, 1, 1000, dtype=np.float32)
    truth = (margins > 0.3).astype(np.uint8)
    found = fitted(histogram_of(margins, truth))
    assert found.scale == SCALE_LIMITS[1]
    best = minimize(lambda c: cross_entropy(margins, truth, SCALE_LIMITS[1], c[0]), (0.0,), method="BFGS").x[0]
    assert found.offset == pytest.approx(best, abs=2e-3)
    assert found.remark.startswith("the margins of the validation slices separate the classes")
    assert found.remark.endswith("4 is the limit")


def test_margins_that_run_the_wrong_way_keep_their_order_and_say_so() -> None:
    margins, truth = drawn(-1, 0)
    found = fitted(histogram_of(margins, truth))
    assert found.scale == SCALE_LIMITS[0]
    assert found.remark.startswith("the best scale is -0.99")
    best = minimize(lambda c: cross_entropy(margins, truth, SCALE_LIMITS[0], c[0]), (0.0,), method="BFGS").x[0]
    assert found.offset == pytest.approx(best, abs=2e-3)


def test_margins_all_alike_give_the_share_of_foreground() -> None:
    found = fitted(histogram_of(np.full(8, 3, np.float32), np.array([1, 0, 0, 0, 0, 0, 0, 0], np.uint8)))
    assert expit(found.scale * 3 + found.offset) == pytest.approx(1 / 8, rel=1e-3)


def test_no_annotated_voxel_and_margins_that_are_no_numbers_are_refused() -> None:
    histogram = histogram_of(np.zeros(3, np.float32), np.full(3, IGNORED, np.uint8))
    with pytest.raises(ConfigError, match=r"no voxel of the validation slices is annotated.*choose other slices"):
        fitted(histogram)
    for value in (np.nan, np.inf):
        with pytest.raises(TrainingError, match="margins that are not finite"):
            histogram.add(np.array([0, value], np.float32), np.zeros(2, np.uint8))
    histogram.add(np.array([0, np.nan], np.float32), np.array([0, IGNORED], np.uint8))


@given(threshold=st.integers(1, 255).map(lambda k: k / 256), scale=st.floats(0.25, 2.0), offset=st.floats(-2, 2))
def test_the_threshold_gives_the_same_mask(threshold: float, scale: float, offset: float) -> None:
    calibration = Calibration(scale, offset, 0, 0, 0, 0)
    margins = np.concatenate([np.linspace(-8, 8, 999), logit(threshold) + np.array([-1e-4, 1e-4])])
    want = expit(margins) >= threshold
    found = expit(scale * margins + offset) >= calibration.threshold(threshold)
    away = np.abs(margins - logit(threshold)) > 1e-9
    np.testing.assert_array_equal(found[away], want[away])


def test_a_threshold_that_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"threshold 0\.98 becomes log odds of 15\.6.*--no-calibration"):
        Calibration(4, 0, 0, 0, 0, 0).threshold(0.98)


@pytest.fixture(scope="module")
def network() -> UNet:
    torch.manual_seed(0)
    network = UNet(1, n_levels=2, intensity=(120.0, 50.0))
    assert network.head.bias is not None
    torch.nn.init.normal_(network.head.bias)
    return network.eval()


def test_a_network_is_fitted_on_the_annotated_voxels_of_whole_slices(network: UNet) -> None:
    images, truth = noise((3, 24, 40)), (noise((3, 24, 40), seed=8) < 90).astype(np.uint8)
    partly = truth.copy()
    partly[0, :, 20:] = partly[2] = IGNORED
    want = [calibrate(network, Annotated(images[:2], partly[:2])), calibrate(network, Annotated(images, partly))]
    assert want[0] == want[1] != calibrate(network, Annotated(images, truth))
    assert want[0].nll_after < want[0].nll_before


def test_a_calibrated_network_is_a_copy_with_another_margin(network: UNet) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    image = torch.from_numpy(noise((2, 16, 32)))[:, None].float()
    with torch.inference_mode():
        found = margin(calibrated(network, Calibration(1.5, -0.7, 0, 0, 0, 0))(image))
        torch.testing.assert_close(found, 1.5 * margin(network(image)) - 0.7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_json_says_a_remark_only_where_there_is_one() -> None:
    plain = Calibration(1.25, -0.5, 0.0123456, 0.001, 0.2, 0.1)
    assert to_json(plain) == {
        "scale": 1.25, "offset": -0.5, "ece_before": 0.01235, "ece_after": 0.001, "nll_before": 0.2, "nll_after": 0.1,
    }  # fmt: skip
    assert to_json(dataclasses.replace(plain, remark="so"))["remark"] == "so"
