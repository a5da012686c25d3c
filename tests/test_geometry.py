from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdunet_infer.errors import GeometryError
from kdunet_infer.geometry import ZYX, Box

small = st.integers(-6, 6)
corners = st.tuples(small, small, small)
lengths = st.tuples(*[st.integers(0, 6)] * 3)
steps = st.tuples(*[st.integers(1, 4)] * 3)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    begin, shape = draw(corners), draw(lengths)
    return Box(begin, tuple(b + n for b, n in zip(begin, shape, strict=True)))


def voxels(box: Box) -> set[ZYX]:
    """The definition everything is compared with."""
    return set(itertools.product(*(range(b, e) for b, e in zip(box.begin, box.end, strict=True))))


@given(box=boxes())
def test_shape_and_count_are_those_of_the_voxels(box: Box) -> None:
    assert box.n_voxels == len(voxels(box))
    assert Box.of_shape(box.shape).n_voxels == box.n_voxels


@given(a=boxes(), b=boxes())
def test_intersection_holds_the_voxels_of_both(a: Box, b: Box) -> None:
    assert voxels(a.intersection(b)) == voxels(a) & voxels(b)


@given(a=boxes(), b=boxes())
def test_a_box_contains_another_if_its_voxels_do(a: Box, b: Box) -> None:
    if a.contains(b):
        assert voxels(b) <= voxels(a)
    elif b.n_voxels:
        assert not voxels(b) <= voxels(a)


@given(box=boxes(), grid=steps)
def test_snapped_is_the_smallest_box_on_the_grid(box: Box, grid: ZYX) -> None:
    snapped = box.snapped(grid)
    assert snapped.contains(box)
    for axis, step in enumerate(grid):
        assert snapped.begin[axis] % step == snapped.end[axis] % step == 0
        assert box.begin[axis] - snapped.begin[axis] < step
        assert snapped.end[axis] - box.end[axis] < step


def test_grown_adds_the_margin_on_both_sides() -> None:
    assert Box((0, 5, 6), (1, 7, 9)).grown((0, 2, 10)) == Box((0, 3, -4), (1, 9, 19))


@given(box=boxes(), shape=steps)
def test_split_holds_every_voxel_once(box: Box, shape: ZYX) -> None:
    if box.n_voxels:
        parts = list(box.split(shape))
        assert sum(part.n_voxels for part in parts) == box.n_voxels
        assert set().union(*map(voxels, parts)) == voxels(box)


def test_slices_cut_a_box_out_of_the_array_of_another() -> None:
    assert Box((1, 2, 3), (2, 4, 6)).slices_in(Box((1, 0, -1), (3, 9, 9))) == (slice(0, 1), slice(2, 4), slice(4, 7))


def test_slices_of_a_box_outside_the_frame_are_refused() -> None:
    with pytest.raises(GeometryError, match=r"1:2,2:4,3:6 is not inside 0:1,0:9,0:9"):
        Box((1, 2, 3), (2, 4, 6)).slices_in(Box.of_shape((1, 9, 9)))


def test_a_box_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(GeometryError, match="ends before it begins"):
        Box((0, 3, 0), (1, 2, 1))
