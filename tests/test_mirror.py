"""Mirrored reads against np.pad(mode="reflect"), including halos larger than the volume."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from kdunet_infer.errors import GeometryError
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.mirror import mirror_indices, read_mirrored

sizes = st.integers(1, 9)
shapes = st.tuples(sizes, sizes, sizes)
margins = st.tuples(*[st.integers(0, 25)] * 3)


class CountedVolume:
    """An array that remembers which boxes were read, and refuses to be read outside itself."""

    def __init__(self, shape: ZYX, dtype: type = np.uint8) -> None:
        self.voxels = np.random.default_rng(7).integers(0, 256, shape).astype(dtype)
        self.boxes: list[Box] = []

    def read(self, box: Box) -> np.ndarray:
        self.boxes.append(box)
        return self.voxels[box.slices_in(Box.of_shape(self.voxels.shape))]


@given(size=st.integers(1, 12), before=st.integers(0, 50), after=st.integers(0, 50))
def test_indices_are_those_of_np_pad(size: int, before: int, after: int) -> None:
    assert_array_equal(mirror_indices(-before, size + after, size), np.pad(np.arange(size), (before, after), mode="reflect"))


def test_an_axis_without_voxels_is_refused() -> None:
    with pytest.raises(GeometryError, match="0 voxels cannot be mirrored"):
        mirror_indices(-1, 1, 0)


@given(shape=shapes, before=margins, after=margins, corner=st.tuples(*[st.floats(0, 1)] * 6))
def test_any_box_equals_np_pad_and_is_read_once(shape: ZYX, before: ZYX, after: ZYX, corner: tuple[float, ...]) -> None:
    volume = CountedVolume(shape)
    padded = np.pad(volume.voxels, tuple(zip(before, after, strict=True)), mode="reflect")
    frame = Box(tuple(-b for b in before), tuple(n + a for n, a in zip(shape, after, strict=True)))
    ends = [sorted((round(a * n), round(b * n))) for a, b, n in zip(corner[:3], corner[3:], frame.shape, strict=True)]
    box = Box(*(tuple(o + e[i] for o, e in zip(frame.begin, ends, strict=True)) for i in (0, 1)))

    got = read_mirrored(volume.read, shape, box)

    assert_array_equal(got, padded[box.slices_in(frame)])
    assert got.dtype == np.uint8
    assert len(volume.boxes) == 1


def test_only_the_needed_voxels_are_read() -> None:
    volume = CountedVolume((10, 100, 100))
    read_mirrored(volume.read, (10, 100, 100), Box((-1, 60, 10), (2, 110, 20)))
    assert volume.boxes == [Box((0, 60, 10), (2, 100, 20))]


def test_a_box_inside_the_volume_is_not_copied() -> None:
    volume = CountedVolume((4, 5, 6))
    assert np.shares_memory(read_mirrored(volume.read, (4, 5, 6), Box((1, 0, 2), (4, 5, 6))), volume.voxels)


def test_any_dtype_is_kept() -> None:
    volume = CountedVolume((2, 3, 4), np.uint16)
    assert read_mirrored(volume.read, (2, 3, 4), Box((0, -2, 0), (2, 3, 4))).dtype == np.uint16
