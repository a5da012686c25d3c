"""One linear mapping for a whole volume: the same for every type, block and resumption."""

from __future__ import annotations

import json
from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from grey_volumes import ArrayVolume, card_of
from hypothesis import given
from hypothesis import strategies as st

from kdunet_infer.errors import ConfigError, VolumeError
from kdunet_infer.geometry import Box
from kdunet_infer.grey_sample import CHECKED_VOXELS, EXACT_VOXELS, GreySample
from kdunet_infer.intensity import IDENTITY, IntensityMap, MappedSource, intensity_map, voxels_to_sample
from kdunet_infer.testing import SourceContract, noise

TRAINING = np.random.default_rng(1).normal(130, 40, (8, 64, 64)).clip(0, 255).round().astype(np.uint8)


def bell(dtype: str = "uint16", mean: float = 3000, sd: float = 500) -> npt.NDArray[Any]:
    return np.random.default_rng(2).normal(mean, sd, (16, 80, 90)).round().astype(dtype)


def mapping_of(array: npt.NDArray[Any], given: tuple[float, float] | None = None, *, trained: bool = True) -> IntensityMap:
    volume = ArrayVolume(array)
    card = card_of(TRAINING if trained else None)
    return intensity_map(volume, card, given=given, sample=GreySample.of_volume(volume))


def applied(mapping: IntensityMap, voxels: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    z, y, x = voxels.shape
    return mapping.apply(voxels, Box.of_shape((z, y, x)))


@given(
    value=st.integers(-300, 300),
    low=st.integers(-64, 63),
    span_exponent=st.integers(0, 8),
    ends=st.tuples(st.integers(0, 128), st.integers(129, 255)),
)
def test_halves_round_up_and_what_is_beyond_is_clipped(value: int, low: int, span_exponent: int, ends: tuple[int, int]) -> None:
    """Spans that are powers of two are exact in floats, so fractions must agree to the last half."""
    span = 2**span_exponent
    exact = ends[0] + Fraction((value - low) * (ends[1] - ends[0]), span)
    want = min(255, max(0, floor(exact + Fraction(1, 2))))
    mapping = IntensityMap("range", low, low + span, *ends)
    for dtype in ("int16", "int32", "int64", "float16", "float32", "float64"):
        assert applied(mapping, np.array([[[value]]], dtype)) == want, dtype


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", ">u2", ">i2"])
def test_small_integers_are_mapped_as_their_floats_are(dtype: str) -> None:
    info = np.iinfo(dtype)
    every = np.arange(info.min, info.max + 1).astype(dtype).reshape(1, 16, -1)
    mapping = IntensityMap("percentiles", info.max / 7 - 40.3, info.max / 2 + 1.7, 51.0, 219.0)
    np.testing.assert_array_equal(applied(mapping, every), applied(mapping, every.astype(np.float64)))
    assert len(np.unique(applied(mapping, every))) > 40


def test_values_far_out_of_a_narrow_range_are_clipped() -> None:
    mapping = IntensityMap("range", 0.0, 1e-300, 0.0, 255.0)
    np.testing.assert_array_equal(applied(mapping, np.array([[[-1e300, 0.0, 1e300]]])), [[[0, 0, 255]]])


def test_identity_is_the_very_array() -> None:
    voxels = noise((2, 3, 4))
    assert applied(IDENTITY, voxels) is voxels


def test_identity_maps_grey_values_to_themselves() -> None:
    values = np.arange(256.0)
    np.testing.assert_array_equal(IDENTITY.grey(values), values)


@pytest.mark.parametrize("mapping", [IDENTITY, IntensityMap("percentiles", -0.1, 1 / 3, 51.0, 219.0)])
def test_a_mapping_survives_json(mapping: IntensityMap) -> None:
    assert IntensityMap.from_dict(json.loads(json.dumps(mapping.to_dict(), allow_nan=False))) == mapping


@pytest.mark.parametrize(
    "changes", [{"kind": "gamma"}, {"kind": ["range"]}, {"low": None}, {"low": "x"}, {"high": 0.0}, {"more": 1}]
)
def test_what_is_no_stored_mapping_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"the stored intensity mapping cannot be read .*; run again with --overwrite"):
        IntensityMap.from_dict({**IDENTITY.to_dict(), **changes})


def test_a_stored_mapping_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        IntensityMap.from_dict({"kind": "range", "low": 0.0})


@pytest.mark.parametrize(
    "ends", [(5.0, 5.0), (5.0, 4.0), (float("nan"), 1.0), (0.0, float("nan")), (float("-inf"), 0.0), (-1.7e308, 1.7e308)]
)
def test_a_range_that_does_not_increase_is_refused(ends: tuple[float, float]) -> None:
    with pytest.raises(
        ConfigError, match=r"the intensity range .* does not increase; give two finite numbers, the darker first"
    ):
        mapping_of(bell(), ends)


def test_uint8_is_left_alone_unless_a_range_is_given() -> None:
    assert mapping_of(noise((4, 32, 32))) == IDENTITY
    assert mapping_of(noise((4, 32, 32)), (10, 20)) == IntensityMap("range", 10.0, 20.0, 0.0, 255.0)
    assert mapping_of(np.full((4, 32, 32), 9, np.uint8)) == IDENTITY  # an empty region is segmented as any other


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int8", "int32"])
def test_percentiles_go_to_those_of_the_training_images(dtype: str) -> None:
    array = bell(dtype, *((0, 25) if dtype == "int8" else (3000, 500)))
    found = mapping_of(array)
    want = [np.quantile(part, q, method="inverted_cdf") for part in (array, TRAINING) for q in (0.01, 0.99)]
    assert found == IntensityMap("percentiles", *(float(value) for value in want))
    mapped = applied(found, array)
    assert [np.quantile(mapped, q, method="inverted_cdf") for q in (0.01, 0.99)] == want[2:]


def test_percentiles_go_to_black_and_white_where_the_training_images_are_not_known() -> None:
    array = bell()
    low, high = (float(np.quantile(array, q, method="inverted_cdf")) for q in (0.001, 0.999))
    assert mapping_of(array, trained=False) == IntensityMap("percentiles", low, high, 0.0, 255.0)


def test_a_given_range_wins_over_percentiles() -> None:
    assert mapping_of(bell(), (0, 4095)) == IntensityMap("range", 0.0, 4095.0, 0.0, 255.0)


def test_how_much_is_looked_at_depends_on_what_it_decides() -> None:
    assert voxels_to_sample(np.dtype(np.uint16), None) == EXACT_VOXELS
    assert voxels_to_sample(np.dtype(np.uint16), (0, 1)) == CHECKED_VOXELS
    assert voxels_to_sample(np.dtype(np.uint8), None) == CHECKED_VOXELS


@pytest.mark.parametrize("value", [7, 0])
@pytest.mark.parametrize("shape", [(32, 80, 80), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_a_constant_volume_is_refused(value: int, shape: tuple[int, int, int], dtype: str) -> None:
    says = f"volume.zarr has the grey value {value} in every voxel, so there is nothing to segment; give another volume"
    with pytest.raises(VolumeError, match=says):
        mapping_of(np.full(shape, value, dtype))


def test_a_sample_that_is_constant_is_refused_with_how_much_it_was() -> None:
    volume = ArrayVolume(np.zeros((64, 128, 64), np.uint16))
    sample = GreySample.of_volume(volume, max_voxels=2**18)
    with pytest.raises(VolumeError, match=r"grey value 0 in every one of the 262,144 voxels looked at.*or --intensity-range"):
        intensity_map(volume, card_of(TRAINING), given=None, sample=sample)


def test_a_volume_of_constant_chunks_is_refused() -> None:
    array = np.zeros((32, 64, 64), np.uint16)
    array[16:] = 9
    with pytest.raises(VolumeError, match=r"volume.zarr holds constant chunks alone, every voxel in one; check how"):
        mapping_of(array)


def test_a_volume_that_is_nearly_constant_is_refused() -> None:
    array = np.zeros((32, 64, 64), np.uint16)
    array[::2, 0, 0] = 9
    with pytest.raises(VolumeError, match=r"has the grey value 0 in nearly every voxel, .*; give one with --intensity-range"):
        mapping_of(array)


def test_training_images_that_are_nearly_constant_are_refused() -> None:
    volume = ArrayVolume(bell())
    card = card_of(np.full((1, 8, 8), 3, np.uint8))
    with pytest.raises(
        ConfigError, match=r"training images of mito have the grey value 3 in nearly .*; give --intensity-range"
    ):
        intensity_map(volume, card, given=None, sample=GreySample.of_volume(volume))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_voxel_that_is_no_number_is_named_where_it_is_in_the_volume(bad: float) -> None:
    array = bell("float32")
    array[5, 6, 7] = bad
    source = MappedSource(ArrayVolume(array), IntensityMap("range", 0.0, 1.0, 0.0, 255.0))
    with pytest.raises(VolumeError, match=rf"voxel \(5, 6, 7\) \(z, y, x\) of the volume is {bad}; replace NaN and infinite"):
        source.read_box(Box((5, -20, -20), (6, 4, 4)))  # the voxel is reached through the mirror alone


class TestMappedSource(SourceContract):
    """The contract of sources, on uint16 that is mapped back to what the contract stores."""

    def make(self, image: npt.NDArray[np.uint8], folder: object) -> MappedSource:
        raw = image.astype(np.uint16) * 100 + 7
        return MappedSource(ArrayVolume(raw), IntensityMap("range", 7.0, 25507.0, 0.0, 255.0))
