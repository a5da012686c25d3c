"""Cleaning block by block against scipy on the whole volume at once."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from kdunet_infer.cleaning import Cleaned, Cleaning, clean
from kdunet_infer.components import grid_blocks
from kdunet_infer.errors import ConfigError, VolumeError
from kdunet_infer.geometry import Box

BLOCKS = st.tuples(*[st.integers(1, 6)] * 3)
WINDOWS = st.sampled_from([3, 5, 7, 21])


@st.composite
def masks(draw):
    """Noise of any density, and smooth objects with holes."""
    shape = draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=9))
    noise = np.random.default_rng(draw(st.integers(0, 2**32))).random(shape)
    if draw(st.booleans()):
        return noise < draw(st.sampled_from([0.05, 0.2, 0.4, 0.6, 0.8, 0.9]))
    return ndimage.gaussian_filter(noise, 1) < np.quantile(ndimage.gaussian_filter(noise, 1), draw(st.sampled_from([0.3, 0.7])))


CLEANINGS = st.builds(
    Cleaning, min_size=st.sampled_from([0, 2, 5, 20]), fill_holes=st.booleans(), smooth_z=st.sampled_from([0, 3, 5])
)


def whole_smooth(mask, window):
    """Each voxel's window counted anew: the reference."""
    smoothed = np.empty_like(mask)
    for z in range(len(mask)):
        around = mask[max(0, z - window // 2) : z + window // 2 + 1]
        share = around.mean(axis=0)
        smoothed[z] = np.where(share == 0.5, mask[z], share > 0.5)
    return smoothed


def whole_fill(mask):
    squeezed = mask.squeeze()
    return ndimage.binary_fill_holes(squeezed).reshape(mask.shape) if squeezed.ndim else mask


def whole_without_small(mask, min_size):
    labels, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    return mask & (np.bincount(labels.ravel()) >= min_size)[labels]


def whole_clean(mask, cleaning):
    mask = whole_smooth(mask, cleaning.smooth_z) if cleaning.smooth_z else mask
    mask = whole_fill(mask) if cleaning.fill_holes else mask
    return whole_without_small(mask, cleaning.min_size)


class Target:
    """Where a cleaned mask goes; remembers which voxels were written."""

    def __init__(self, shape):
        self.voxels = np.full(shape, 9, np.uint8)
        self.n_writes = np.zeros(shape, int)

    def write(self, box, voxels):
        assert voxels.dtype == np.uint8
        self.voxels[box.slices_in(Box.of_shape(self.voxels.shape))] = voxels
        self.n_writes[box.slices_in(Box.of_shape(self.voxels.shape))] += 1


def reader(mask):
    def read(box):
        voxels = mask[box.slices_in(Box.of_shape(mask.shape))].astype(np.uint8)
        voxels.flags.writeable = False
        return voxels

    return read


def cleaned(mask, cleaning, block_shape, roi=None):
    """The cleaned roi and what was said about it; all writing is checked."""
    roi = roi or Box.of_shape(mask.shape)
    target = Target(mask.shape)
    about = clean(reader(mask), target.write, roi, cleaning, block_shape=block_shape)
    want_writes = np.zeros(mask.shape, int)
    want_writes[roi.slices_in(Box.of_shape(mask.shape))] = 1
    np.testing.assert_array_equal(target.n_writes, want_writes)
    return target.voxels[roi.slices_in(Box.of_shape(mask.shape))], about


@given(masks(), BLOCKS, WINDOWS)
def test_smoothing_is_the_majority_of_the_sections_around(mask, block_shape, window) -> None:
    found, _ = cleaned(mask, Cleaning(smooth_z=window), block_shape)
    np.testing.assert_array_equal(found, whole_smooth(mask, window))


def test_smoothing_is_the_median_away_from_the_faces() -> None:
    mask = np.random.default_rng(7).random((20, 9, 9)) < 0.5
    found, _ = cleaned(mask, Cleaning(smooth_z=5), (3, 4, 4))
    np.testing.assert_array_equal(found[2:-2], ndimage.median_filter(mask.astype(np.uint8), (5, 1, 1))[2:-2])


@pytest.mark.parametrize(
    ("column", "smoothed"),
    [("01000", "00000"), ("10111", "11111"), ("10", "10"), ("01", "01"), ("100", "100"), ("1", "1")],
    ids=["flash", "gap", "tie-keeps", "tie-keeps-background", "tie-at-the-face", "one-section"],
)
def test_smoothing_by_digits(column, smoothed) -> None:
    mask = np.array(list(column)).astype(np.uint8).reshape(-1, 1, 1)
    found, _ = cleaned(mask, Cleaning(smooth_z=3), (2, 2, 2))
    assert "".join(map(str, found.ravel())) == smoothed


@given(masks(), BLOCKS)
def test_holes_are_those_that_scipy_fills(mask, block_shape) -> None:
    found, about = cleaned(mask, Cleaning(fill_holes=True), block_shape)
    want = whole_fill(mask)
    np.testing.assert_array_equal(found, want)
    assert about.n_holes_filled == ndimage.label(want & ~mask)[1]


def test_a_ring_that_is_open_along_z_keeps_what_it_encloses() -> None:
    ring = np.zeros((5, 9, 9), bool)
    ring[:, 2:7, 2:7] = True
    ring[:, 4, 4] = False
    found, _ = cleaned(ring, Cleaning(fill_holes=True), (2, 4, 4))
    np.testing.assert_array_equal(found, ring)
    ring[0, 4, 4] = ring[4, 4, 4] = True
    found, about = cleaned(ring, Cleaning(fill_holes=True), (2, 4, 4))
    assert found[:, 4, 4].all()
    assert about.n_holes_filled == 1


def test_a_lone_slice_is_filled_as_an_image() -> None:
    image = np.zeros((1, 9, 9), bool)
    image[0, 2:7, 2:7] = True
    image[0, 4, 4] = False
    found, _ = cleaned(image, Cleaning(fill_holes=True), (4, 4, 4))
    np.testing.assert_array_equal(found[0], ndimage.binary_fill_holes(image[0]))
    assert found[0, 4, 4] == 1
    thick = np.repeat(image, 3, axis=0)
    roi = Box((1, 0, 0), (2, 9, 9))  # one slice of a thicker volume, cleaned as if it were all
    np.testing.assert_array_equal(cleaned(thick, Cleaning(fill_holes=True), (4, 4, 4), roi)[0], found)


@given(masks(), BLOCKS, st.integers(2, 30))
def test_objects_below_the_smallest_size_go(mask, block_shape, min_size) -> None:
    found, about = cleaned(mask, Cleaning(min_size=min_size), block_shape)
    want = whole_without_small(mask, min_size)
    np.testing.assert_array_equal(found, want)
    n_before, n_after = (ndimage.label(m, np.ones((3, 3, 3)))[1] for m in (mask, want))
    assert (about.n_objects, about.n_objects_removed) == (n_after, n_before - n_after)


def test_an_object_of_the_smallest_size_stays() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[0, 0, :3] = True
    assert cleaned(mask, Cleaning(min_size=3), (2, 2, 2))[0].sum() == 3
    assert cleaned(mask, Cleaning(min_size=4), (2, 2, 2))[0].sum() == 0


@given(masks(), BLOCKS, CLEANINGS)
def test_all_steps_together_equal_the_whole_volume(mask, block_shape, cleaning) -> None:
    found, about = cleaned(mask, cleaning, block_shape)
    np.testing.assert_array_equal(found, whole_clean(mask, cleaning))
    assert about.n_foreground == np.count_nonzero(found)


@given(st.data(), masks(), BLOCKS, CLEANINGS)
def test_a_roi_is_cleaned_as_if_it_were_the_volume(data, mask, block_shape, cleaning) -> None:
    ranges = [data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)).filter(lambda r: r[0] < r[1])) for n in mask.shape]
    roi = Box(tuple(a for a, _ in ranges), tuple(b for _, b in ranges))
    found, _ = cleaned(mask, cleaning, block_shape, roi)
    np.testing.assert_array_equal(found, whole_clean(mask[roi.slices_in(Box.of_shape(mask.shape))], cleaning))


def test_any_value_but_zero_is_foreground() -> None:
    mask = np.zeros((3, 5, 5), np.uint8)
    mask[1, 1:4, 1:4] = [[255, 2, 255], [7, 0, 7], [1, 1, 1]]
    found, _ = cleaned(mask, Cleaning(), (2, 2, 2))
    np.testing.assert_array_equal(found, mask != 0)


def test_only_the_roi_and_only_a_halo_of_sections_is_read() -> None:
    mask = np.random.default_rng(7).random((12, 8, 8)) < 0.5
    roi, boxes = Box((1, 1, 0), (12, 8, 7)), []

    def read(box):
        boxes.append(box)
        return reader(mask)(box)

    every = Cleaning(smooth_z=5, fill_holes=True, min_size=3)
    clean(read, Target(mask.shape).write, roi, every, block_shape=(4, 4, 4))
    blocks = [block.grown((2, 0, 0)).intersection(roi) for block in grid_blocks(roi, (4, 4, 4))]
    assert boxes == blocks * 3


def test_progress_goes_through_all_passes() -> None:
    mask, calls = np.zeros((4, 4, 4), bool), []
    clean(
        reader(mask),
        Target(mask.shape).write,
        Box.of_shape(mask.shape),
        Cleaning(fill_holes=True, min_size=2),
        block_shape=(2, 4, 4),
        progress=lambda done, of: calls.append((done, of)),
    )
    assert calls == [(done, 3 * 64) for done in range(32, 3 * 64 + 1, 32)]


def test_memory_does_not_grow_with_the_volume() -> None:
    """Blocks made as they are asked for; ten times as many take hardly more."""
    block = np.zeros((16, 64, 64), np.uint8)
    block[2:9, 3:40, 5:30] = 1
    block[5, 9, 9] = 0

    def peak(n_blocks):
        tracemalloc.start()
        roi = Box.of_shape((16 * n_blocks, 64, 64))
        every = Cleaning(smooth_z=3, fill_holes=True, min_size=9)
        about = clean(
            lambda box: block[np.arange(box.begin[0], box.end[0]) % 16], lambda *_: None, roi, every, block_shape=block.shape
        )
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert about.n_foreground > 0
        return peak_bytes

    peak(1)  # what is made once
    assert peak(40) < 1.2 * peak(4)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"min_size": -1}, "min_size is -1; it must be 0 .off. or a number of voxels"),
        ({"smooth_z": 4}, "smooth_z is 4; it must be 0 .off. or an odd number of sections, such as 3"),
        ({"smooth_z": -3}, "smooth_z is -3; it must be 0 .off. or an odd number"),
    ],
)
def test_what_cannot_be_cleaned_is_refused(fields, says) -> None:
    with pytest.raises(ConfigError, match=says):
        Cleaning(**fields)


@pytest.mark.parametrize(
    ("cleaning", "does_something"),
    [
        (Cleaning(), False),
        (Cleaning(min_size=1, smooth_z=1), False),
        (Cleaning(min_size=2), True),
        (Cleaning(fill_holes=True), True),
        (Cleaning(smooth_z=3), True),
    ],
)
def test_a_cleaning_is_true_where_it_changes_something(cleaning, does_something) -> None:
    assert bool(cleaning) is does_something
    mask = np.random.default_rng(7).random((9, 9, 9)) < 0.8  # with holes and flicker
    mask[:3, :3, :3] = False
    mask[0, 0, 0] = True  # and a small object
    found, _ = cleaned(mask, cleaning, (4, 4, 4))
    assert (found != mask).any() == does_something


def test_a_cleaning_as_a_record() -> None:
    record = json.loads(json.dumps(Cleaning(min_size=20, smooth_z=3).to_dict()))
    assert record == {"min_size": 20, "fill_holes": False, "smooth_z": 3}
    assert Cleaning(**record) == Cleaning(min_size=20, smooth_z=3)


def test_without_a_smallest_size_objects_are_not_counted() -> None:
    mask = np.ones((2, 2, 2), bool)
    _, about = cleaned(mask, Cleaning(), (2, 2, 2))
    assert about == Cleaned(n_foreground=8, n_holes_filled=0, n_objects=None, n_objects_removed=0)


def test_a_mask_that_changes_on_the_way_is_refused() -> None:
    mask = np.zeros((4, 4, 4), np.uint8)

    def write(box, voxels):
        mask[3, 3, 3] = 1

    with pytest.raises(VolumeError, match=r"mask changed at voxels 2:4,0:4,0:4 .*; let nothing else write to it and run again"):
        clean(reader(mask), write, Box.of_shape(mask.shape), Cleaning(min_size=2), block_shape=(2, 4, 4))
