"""What is counted is what is there: percentiles are numpy's, padding is left out, and a bound is a bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from grey_volumes import ArrayVolume
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kdunet_infer import grey_sample
from kdunet_infer.errors import VolumeError
from kdunet_infer.geometry import Box
from kdunet_infer.grey_sample import GreySample, check_finite

PERMILLES = (1, 10, 500, 990, 999)
INTEGERS = ("uint8", "int8", "uint16", "int16")


def normal(shape: tuple[int, int, int] = (16, 40, 50), mean: float = 0.0, sd: float = 1.0) -> npt.NDArray[np.float64]:
    return np.random.default_rng(0).normal(mean, sd, shape)


def numpys(values: npt.NDArray[Any], permille: int) -> float:
    return float(np.quantile(values.ravel(), permille / 1000, method="inverted_cdf"))


@given(
    array=st.sampled_from(INTEGERS).flatmap(lambda t: hnp.arrays(t, st.tuples(*[st.integers(1, 9)] * 3))),
    chunk=st.integers(1, 5),
)
def test_every_voxel_of_a_small_integer_type_is_counted(array: npt.NDArray[Any], chunk: int) -> None:
    found = GreySample.of_volume(ArrayVolume(array, (chunk, chunk + 1, chunk)))
    values, counts = np.unique(array, return_counts=True)
    if values.size == 1:  # all of it is padding, as far as can be told
        assert (found.n_voxels, found.padding) == (0, (float(values[0]),))
        return
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_array_equal(found.counts, counts)
    assert (found.n_total, found.n_read, found.padding) == (array.size, array.size, ())


@pytest.mark.parametrize("dtype", [*INTEGERS, "int32", "uint32", "int64", "uint64"])
def test_integer_quantiles_are_exactly_numpys(dtype: str) -> None:
    signed = np.dtype(dtype).kind == "i"
    array = normal(mean=0 if signed else 120, sd=25).round().astype(dtype)
    found = GreySample.of_volume(ArrayVolume(array))
    assert found.is_integer
    assert [found.quantile(p) for p in PERMILLES] == [numpys(array, p) for p in PERMILLES]


@pytest.mark.parametrize(
    ("dtype", "mean", "sd"),
    [
        ("float32", 0, 1),
        ("float32", 1e6, 3),
        ("float16", 100, 20),
        ("float64", -7, 1e-9),
        ("float64", 0, 1e200),
        ("int32", -9e8, 4e7),
    ],
)
def test_quantiles_of_wide_types_are_off_by_half_a_bin_at_most(dtype: str, mean: float, sd: float) -> None:
    array = normal(mean=mean, sd=sd).astype(dtype)
    array[3, 4, 5] = np.float64(1e4) if dtype == "float16" else 2e9  # a hot pixel must not widen the bins
    largest = np.float64(np.finfo(np.float32).max)
    kept = np.clip(array.astype(np.float64), -largest, largest)
    low, high = numpys(kept, 1), numpys(kept, 999)
    # widened beyond both ends by two floats of 8 significant bits, next to zero by what is there
    span = (high - low) + 4 * 2**-7 * max(abs(low), abs(high))
    found = GreySample.of_volume(ArrayVolume(array))
    assert found.n_voxels == array.size
    for permille in PERMILLES:
        assert abs(found.quantile(permille) - numpys(kept, permille)) <= span / 2**16 / 2 * 1.001 + (found.is_integer)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32"])
def test_padding_is_not_counted_also_where_it_fills_a_chunk_in_part(dtype: str) -> None:
    inner = normal((16, 100, 100), mean=100, sd=20).round().astype(dtype)
    array = np.zeros((32, 192, 192), dtype)
    array[:16, 40:140, 40:140] = inner
    found = GreySample.of_volume(ArrayVolume(array, (16, 32, 32)))
    assert found.padding == (0.0,)
    assert found.n_voxels == np.count_nonzero(inner)
    assert found.quantile(500) == pytest.approx(numpys(inner[inner != 0], 500), abs=0.01)
    np.testing.assert_allclose(found.slice_means, inner.mean(axis=(1, 2), where=inner != 0), rtol=1e-5)


def test_a_value_that_fills_no_chunk_is_no_padding() -> None:
    array = normal((16, 64, 64), mean=100, sd=20).round().astype(np.uint8)
    array[:, :, :32] = 0
    array[:, 0, 0] = 1
    found = GreySample.of_volume(ArrayVolume(array))
    assert found.padding == ()
    assert found.counts[found.values == 0] == np.count_nonzero(array == 0)


def test_a_last_chunk_of_one_voxel_is_no_padding() -> None:
    array = np.arange(17 * 65 * 65, dtype=np.uint16).reshape(17, 65, 65) % 251
    assert GreySample.of_volume(ArrayVolume(array)).padding == ()


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_a_large_volume_is_sampled_within_the_bound_over_its_whole_depth(dtype: str) -> None:
    array = np.broadcast_to(np.arange(640, dtype=dtype)[:, None, None], (640, 640, 640))
    volume = ArrayVolume(array, (64, 64, 64))
    found = GreySample.of_volume(volume, max_voxels=2**24)
    assert found.n_total == 640**3
    assert 2**23 < found.n_read <= 2**24
    assert found.quantile(500) == pytest.approx(320, abs=64)
    assert max(box.n_voxels for box in volume.boxes) <= 2 * grey_sample.UNIT_VOXELS
    assert found.to_dict() == {"n_total": 640**3, "n_read": found.n_read, "n_counted": found.n_voxels, "padding": []}


def test_the_seed_alone_decides_what_is_sampled() -> None:
    array = normal((64, 256, 256)).astype(np.float32)
    reads = []
    for seed in (0, 0, 1):
        volume = ArrayVolume(array, (16, 64, 64))
        GreySample.of_volume(volume, max_voxels=2**20, seed=seed)
        reads.append(volume.boxes)
    assert reads[0] == reads[1] != reads[2]


def test_one_chunk_is_read_even_where_it_exceeds_the_bound() -> None:
    assert GreySample.of_volume(ArrayVolume(normal()), max_voxels=1).n_read == normal().size


def test_slices_are_numpys_over_pages_and_chunks_alike() -> None:
    array = normal((40, 200, 300), mean=1000, sd=50).astype(np.uint16)
    for chunk_shape in ((1, 200, 300), (16, 64, 64), (40, 200, 300)):
        found = GreySample.of_volume(ArrayVolume(array, chunk_shape))
        assert found.slice_z.size >= 32
        np.testing.assert_allclose(found.slice_means, array[found.slice_z].mean(axis=(1, 2)), rtol=1e-9)
        np.testing.assert_allclose(found.slice_deviations, array[found.slice_z].std(axis=(1, 2)), rtol=1e-6)


def test_neighbouring_pages_are_compared_also_where_each_is_large() -> None:
    array = np.broadcast_to(np.add.outer(np.arange(40), np.arange(600))[:, None].astype(np.uint16), (40, 600, 600))
    found = GreySample.of_volume(ArrayVolume(array, (1, 600, 600)), max_voxels=2**21)
    assert np.count_nonzero(np.diff(found.slice_z) == 1) >= 28


def test_slices_of_a_large_volume_are_compared_over_the_same_columns() -> None:
    """Where brightness depends on y and x alone, slice means do not differ, whichever chunks were sampled."""
    array = np.broadcast_to(np.arange(1024, dtype=np.uint16)[:, None], (64, 1024, 1024))
    found = GreySample.of_volume(ArrayVolume(array, (8, 64, 64)), max_voxels=2**22)
    assert found.slice_z.size == 32
    assert np.ptp(found.slice_means) == 0


def test_slices_that_are_mostly_padding_are_left_out() -> None:
    array = normal((32, 64, 64), mean=100, sd=10).round().astype(np.uint8)
    array[16:] = 0
    array[20, 3, 4] = 200
    found = GreySample.of_volume(ArrayVolume(array, (1, 64, 64)))
    np.testing.assert_array_equal(found.slice_z, np.arange(16))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_voxel_that_is_no_number_is_named(bad: float) -> None:
    array = normal((40, 70, 80)).astype(np.float32)
    array[33, 66, 5] = array[33, 66, 70] = bad
    with pytest.raises(VolumeError, match=rf"voxel \(33, 66, 5\) \(z, y, x\) of the volume is {bad}; replace NaN and infinite"):
        GreySample.of_volume(ArrayVolume(array))
    with pytest.raises(VolumeError, match=r"voxel \(33, 66, 5\)"):
        check_finite(array[30:, 60:, 3:], Box((30, 60, 3), (40, 70, 80)))
