"""Pixels near a boundary against scipy's exact distances, and by digits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from kdunet_infer.boundary import near_boundary


def distance_to_other_class(image):
    """In pixels, of each pixel of one slice; infinite where there is only one class."""
    if image.all() or not image.any():
        return np.full(image.shape, np.inf)
    return np.where(image, ndimage.distance_transform_edt(image), ndimage.distance_transform_edt(~image))


@given(hnp.arrays(np.bool_, hnp.array_shapes(min_dims=3, max_dims=3, max_side=9)), st.integers(0, 12))
def test_near_is_a_distance_of_scipy(mask, radius) -> None:
    want = np.stack([distance_to_other_class(image) <= radius for image in mask])
    np.testing.assert_array_equal(near_boundary(mask, radius), want)


@pytest.mark.parametrize("radius", [1, 2, 3, 5, 10])
def test_near_around_blobs_is_a_distance_of_scipy(radius) -> None:
    noise = np.random.default_rng(7).standard_normal((3, 90, 80))
    mask = ndimage.gaussian_filter(noise, (0, 6, 6)) > 0.02
    want = np.stack([distance_to_other_class(image) <= radius for image in mask])
    assert 0.05 < want.mean() < 0.999
    np.testing.assert_array_equal(near_boundary(mask, radius), want)


@pytest.mark.parametrize(
    ("radius", "near"), [(0, "0000000"), (1, "0011000"), (2, "0111100"), (9, "1111111")], ids=["0", "1", "2", "9"]
)
def test_near_by_digits(radius, near) -> None:
    row = np.array([[[0, 0, 0, 1, 1, 1, 1]]], bool)
    assert "".join(map(str, near_boundary(row, radius).ravel().astype(int))) == near


def test_other_slices_and_faces_are_no_boundary() -> None:
    mask = np.zeros((3, 5, 5), bool)
    mask[1] = True
    assert not near_boundary(mask, 9).any()


def test_the_mask_itself_is_left_alone() -> None:
    mask = np.random.default_rng(7).random((2, 9, 9)) < 0.5
    before = mask.copy()
    near_boundary(mask, 3)
    np.testing.assert_array_equal(mask, before)
