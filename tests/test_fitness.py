"""Silent where a volume fits; where it does not, one sentence with the figure and the remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from grey_volumes import ArrayVolume, card_of
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import wasserstein_distance

from kdunet_infer.card import ModelCard
from kdunet_infer.fitness import FAIR_VOXELS, fit_warnings, grey_distance, mapped_histogram
from kdunet_infer.geometry import Box
from kdunet_infer.grey_sample import GreySample
from kdunet_infer.intensity import IntensityMap, intensity_map
from kdunet_infer.phantom import phantom_box

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "epfl"
VOXEL_SIZE = (5.0, 5.0, 5.0)
UInt8Array = npt.NDArray[np.uint8]


def warnings_for(
    array: npt.NDArray[Any],
    card: ModelCard,
    given: tuple[float, float] | None = None,
    chunk: tuple[int, int, int] = (32, 64, 64),
) -> tuple[str, ...]:
    volume = ArrayVolume(array, chunk)
    sample = GreySample.of_volume(volume)
    mapping = intensity_map(volume, card, given=given, sample=sample)
    return fit_warnings(card, sample, mapping, voxel_size_nm=VOXEL_SIZE)


def the_warning(array: npt.NDArray[Any], card: ModelCard, given: tuple[float, float] | None = None) -> str:
    (sentence,) = warnings_for(array, card, given)
    return sentence


@pytest.fixture(scope="module")
def card() -> ModelCard:
    """Trained on slices of several seeds of the phantom."""
    slices = [phantom_box(Box((0, 0, 0), (1, 256, 256)), seed)[0] for seed in range(4)]
    return card_of(np.concatenate(slices), voxel_size_nm=VOXEL_SIZE)


@pytest.fixture(scope="module")
def volume() -> UInt8Array:
    """Unseen seeds, tiled to a fair number of voxels: as many different ones would take too long to make."""
    seen = np.concatenate([phantom_box(Box((0, 0, 0), (4, 192, 256)), seed)[0] for seed in (1000, 1001)], axis=1)
    tiled = np.tile(np.concatenate([seen, seen[::-1]]), (2, 2, 2))
    assert tiled.size >= FAIR_VOXELS
    return tiled


@given(hnp.arrays(np.int64, (2, 256), elements=st.integers(0, 1000)).filter(lambda a: a.sum(axis=1).all()))
def test_grey_distance_is_scipys(histograms: npt.NDArray[np.int64]) -> None:
    a, b = histograms.astype(np.float64)
    values = np.arange(256)
    assert grey_distance(a, b) == pytest.approx(wasserstein_distance(values, values, a, b), abs=1e-9)


def test_mapped_histogram_is_that_of_the_mapped_voxels() -> None:
    array = np.random.default_rng(0).normal(2000, 300, (8, 50, 60)).astype(np.uint16)
    mapping = IntensityMap("range", 1000.0, 2800.0, 0.0, 255.0)
    mapped = mapping.apply(array, Box.of_shape((8, 50, 60)))
    want, _ = np.histogram(mapped, bins=np.arange(257), density=True)
    np.testing.assert_allclose(mapped_histogram(GreySample.of_volume(ArrayVolume(array)), mapping), want)


@pytest.mark.parametrize("chunk", [(32, 64, 64), (1, 768, 512), (8, 128, 128)])
def test_silent_on_unseen_volumes_of_the_same_making(card: ModelCard, volume: UInt8Array, chunk: tuple[int, int, int]) -> None:
    assert warnings_for(volume, card, chunk=chunk) == ()


@pytest.mark.parametrize("seed", [3, 1000])
def test_silent_on_small_cut_outs(card: ModelCard, seed: int) -> None:
    assert warnings_for(phantom_box(Box((0, 0, 0), (8, 96, 96)), seed)[0], card) == ()


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "int32"])
def test_silent_on_other_types_that_percentiles_map(card: ModelCard, volume: UInt8Array, dtype: str) -> None:
    assert warnings_for((volume.astype(np.float32) * 16 + 1000).astype(dtype), card) == ()


def test_silent_on_padding(card: ModelCard, volume: UInt8Array) -> None:
    assert warnings_for(np.pad(volume, ((0, 16), (128, 64), (0, 128))), card) == ()


def test_inverted_contrast_is_told_with_both_distances(card: ModelCard, volume: UInt8Array) -> None:
    found = the_warning(255 - volume, card)
    away, inverse = map(float, re.findall(r"(\d+\.\d) grey levels away from .*, and (\d+\.\d) once inverted", found)[0])
    values = np.arange(256)
    for distance, image in ((away, 255 - volume), (inverse, volume)):
        shares = np.bincount(image.ravel(), minlength=256)
        assert distance == pytest.approx(wasserstein_distance(values, values, shares, card.grey_histogram), abs=0.051)
    assert found.startswith("light and dark look inverted")
    assert found.endswith("store the volume inverted (uint8: 255 - value) and segment that.")


def test_inverted_contrast_is_told_under_a_given_range_too(card: ModelCard, volume: UInt8Array) -> None:
    assert the_warning((255 - volume).astype(np.uint16) * 16, card, (0, 255 * 16)).startswith("light and dark look inverted")


def test_inverted_contrast_is_told_after_percentiles_where_the_histogram_is_lopsided() -> None:
    grey = np.random.default_rng(0).gamma(2.0, 30.0, (16, 600, 600)).clip(0, 250)
    lopsided = card_of(grey.astype(np.uint8))
    assert warnings_for((grey * 100).astype(np.uint16), lopsided) == ()
    assert the_warning(((250 - grey) * 100).astype(np.uint16), lopsided).startswith("light and dark look inverted")


def test_a_symmetrical_histogram_cannot_tell_an_inversion() -> None:
    grey = np.random.default_rng(0).normal(128, 40, (16, 600, 600)).clip(0, 255).astype(np.uint8)
    assert warnings_for(255 - grey, card_of(grey)) == ()


def test_a_small_piece_of_tissue_is_not_called_inverted(card: ModelCard, volume: UInt8Array) -> None:
    assert warnings_for(255 - volume[:8, :128, :128], card) == ()


@pytest.mark.parametrize(
    ("dtype", "scale", "given"), [("uint8", 1 / 8, None), ("uint16", 16, (0, 65535)), ("float32", 1 / 255, (0, 255))]
)
def test_the_range_named_for_narrow_grey_values_makes_them_fit(
    card: ModelCard, volume: UInt8Array, dtype: str, scale: float, given: tuple[float, float] | None
) -> None:
    array = (volume * np.float32(scale)).astype(dtype)
    found = the_warning(array, card, given)
    low, high = np.quantile(card_values(card), (0.01, 0.99), method="inverted_cdf")
    assert re.match(
        rf"98 % of the voxels have grey values from \d+ to \d+ on the model's scale, those of its training images go from "
        rf"{low} to {high}; spread them with --intensity-range=\S+\.$",
        found,
    )
    assert warnings_for(array, card, named_range(found)) == ()


def test_a_volume_of_two_values_is_narrow_without_a_range_to_name(card: ModelCard) -> None:
    array = np.full((8, 64, 64), 100, np.uint8)
    array[:, 0, 0] = 90
    assert the_warning(array, card).endswith("; give a volume with more contrast.")


def test_the_range_named_for_a_brighter_volume_makes_it_fit(card: ModelCard, volume: UInt8Array) -> None:
    bright = np.minimum(volume, 215) + np.uint8(40)
    found = the_warning(bright, card)
    assert re.match(
        r"the grey values are \d+\.\d grey levels away from .*, whose standard deviation is \d+\.\d; map them", found
    )
    assert warnings_for(bright, card, named_range(found)) == ()


def test_a_misfit_that_no_range_mends_is_told(card: ModelCard, volume: UInt8Array) -> None:
    two_valued = np.where(volume > 90, np.uint8(255), np.uint8(0))
    two_valued[:, 0, 0] = 0
    found = the_warning(two_valued, card)
    assert found.endswith("; look at a preview of the mask before a long run, or use a model trained on such images.")


def test_flicker_is_told_with_its_figure(card: ModelCard, volume: UInt8Array) -> None:
    offsets = np.where(np.arange(16) % 2, 20, -20)[:, None, None]
    found = the_warning(np.clip(volume + offsets, 0, 255).astype(np.uint8), card)
    assert re.match(r"the brightness flickers: slice means jump by 2\d\.\d grey levels .*, 6\d% of the deviation within", found)
    assert found.endswith("even the slices out, for example by matching their means, and segment that.")


def test_flicker_is_told_in_grey_levels_of_the_model() -> None:
    array = np.random.default_rng(0).normal(3000, 100, (16, 64, 64)) + np.where(np.arange(16) % 2, 50, -50)[:, None, None]
    assert "slice means jump by 10.0 grey levels" in the_flicker(array, IntensityMap("range", 2000.0, 3804.0, 0.0, 255.0))


def the_flicker(array: npt.NDArray[Any], mapping: IntensityMap) -> str:
    sample = GreySample.of_volume(ArrayVolume(array.astype(np.uint16), (16, 64, 64)))
    (sentence,) = fit_warnings(card_of(None), sample, mapping, voxel_size_nm=None)
    return sentence


def test_slow_drift_is_no_flicker(card: ModelCard, volume: UInt8Array) -> None:
    drift = np.linspace(-15, 15, 16)[:, None, None]
    assert warnings_for(np.clip(volume + drift, 0, 255).astype(np.uint8), card) == ()


def test_slices_far_apart_may_differ() -> None:
    z, means = np.array([0, 1, 300, 301]), np.array([100.0, 100.5, 160.0, 160.5])
    one = np.ones(1)
    sample = GreySample(one, one.astype(np.int64), True, 1, 1, (), z, means, np.full(4, 20.0))
    assert fit_warnings(card_of(None), sample, IntensityMap("range", 0.0, 255.0, 0.0, 255.0), voxel_size_nm=None) == ()


def test_one_slice_cannot_flicker(card: ModelCard, volume: UInt8Array) -> None:
    assert warnings_for(volume[:1], card) == ()


def test_grey_values_are_not_judged_by_a_card_that_does_not_know_them(volume: UInt8Array) -> None:
    assert warnings_for(volume // 8, card_of(None)) == ()


def test_an_empty_region_is_not_judged(card: ModelCard) -> None:
    assert warnings_for(np.zeros((32, 64, 64), np.uint8), card) == ()


@pytest.mark.parametrize(
    ("found", "levels", "says"),
    [
        ((5.0, 5.0, 5.0), (), None),
        ((90.0, 6.2, 4.1), (), None),  # z is nothing to the network
        ((5.0, 6.3, 5.0), (), "6.3 x 5 nm .* trained on 5 x 5 nm .*, 1.26 times apart; resample it to about 5 x 5 nm"),
        ((5.0, 5.0, 3.9), (), "5 x 3.9 nm .*, 1.28 times apart; resample it"),
        (
            (5.0, 2.5, 2.5),
            ((5.0, 2.5, 2.5), (5.0, 5.0, 5.0), (5.0, 10.0, 10.0)),
            r"2.00 times apart; segment --level 1, which has",
        ),
        ((5.0, 2.0, 2.0), ((5.0, 2.0, 2.0), (5.0, 4.0, 4.0)), r"segment --level 1, which has 4 x 4 nm \(y, x\)\.$"),
        (
            (8.0, 1.0, 1.0),
            ((8.0, 1.0, 1.0), (8.0, 2.0, 2.0)),
            r"--level 1, which has 2 x 2 nm \(y, x\), or resample it to about 5",
        ),
        ((5.0, 10.0, 10.0), ((5.0, 10.0, 10.0), (5.0, 20.0, 20.0)), "2.00 times apart; resample it"),
        (None, (), r"voxel size of the volume is not known, .* trained on 5 x 5 nm \(y, x\); give it with --voxel-size"),
    ],
)
def test_voxel_size(
    card: ModelCard, found: tuple[float, float, float] | None, levels: tuple[tuple[float, float, float], ...], says: str | None
) -> None:
    sample = GreySample.of_volume(ArrayVolume(np.zeros((1, 64, 64), np.uint8)))
    mapping = IntensityMap("range", 0.0, 255.0, 0.0, 255.0)
    sentences = fit_warnings(card, sample, mapping, voxel_size_nm=found, level_voxel_sizes_nm=levels)
    assert len(sentences) == (says is not None)
    assert not says or re.search(says, sentences[0])


def test_voxel_size_is_not_asked_for_where_the_card_has_none() -> None:
    sample = GreySample.of_volume(ArrayVolume(np.zeros((1, 64, 64), np.uint8)))
    assert fit_warnings(card_of(None), sample, IntensityMap("range", 0.0, 255.0, 0.0, 255.0), voxel_size_nm=None) == ()


@pytest.fixture(scope="module")
def epfl_card() -> ModelCard:
    """Trained on slices 0 to 134 of the EPFL training sub-volume, of which every fifth is looked at."""
    if not DATA.is_dir():
        pytest.skip("the annotated EPFL volume (../shared/data) is not here")
    return card_of(tifffile.imread(DATA / "training.tif", key=range(0, 135, 5)), voxel_size_nm=VOXEL_SIZE)


@pytest.fixture(scope="module")
def epfl_volume(epfl_card: ModelCard) -> UInt8Array:
    """Slices it has not seen, of the testing sub-volume."""
    slices: UInt8Array = tifffile.imread(DATA / "testing.tif", key=range(16))
    return slices


def test_silent_on_unseen_real_slices(epfl_card: ModelCard, epfl_volume: UInt8Array) -> None:
    assert warnings_for(epfl_volume, epfl_card) == ()
    assert warnings_for(epfl_volume.astype(np.uint16) * 100, epfl_card) == ()


def test_told_what_was_done_to_real_slices(epfl_card: ModelCard, epfl_volume: UInt8Array) -> None:
    assert the_warning(255 - epfl_volume, epfl_card).startswith("light and dark look inverted")
    assert the_warning(epfl_volume // 8, epfl_card).startswith("98 % of the voxels have grey values from")
    offsets = np.random.default_rng(0).normal(0, 25, (len(epfl_volume), 1, 1))
    flickering = np.clip(epfl_volume + offsets, 0, 255).astype(np.uint8)
    assert the_warning(flickering, epfl_card).startswith("the brightness flickers")


def card_values(card: ModelCard) -> npt.NDArray[np.int64]:
    """Grey values as often as the card says, of a million."""
    return np.repeat(np.arange(256), np.rint(np.array(card.grey_histogram) * 1e6).astype(np.int64))


def named_range(sentence: str) -> tuple[float, float]:
    low, high = re.search(r"--intensity-range=([^,]+),(\S+)\.$", sentence).groups()  # type: ignore[union-attr]
    return float(low), float(high)
