"""Pooling against the same thing said one voxel at a time, and level shapes as they come."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layering import imported

import kdunet_infer.volume.ome
import kdunet_infer.volume.pyramid
from kdunet_infer.blockwise import UInt8Array
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.testing import ArraySource, ArrayTarget, noise
from kdunet_infer.volume.pyramid import Pooling, build_level, windows

POOLINGS: tuple[Pooling, ...] = ("majority", "mean")


def pooled_by_hand(voxels: UInt8Array, shape: ZYX, ratio: ZYX, pooling: Pooling) -> UInt8Array:
    """Voxel i of the coarser level is made of the voxels ratio*i to ratio*(i+1)-1 that there are."""
    coarser = np.empty(shape, np.uint8)
    for index in itertools.product(*(range(n) for n in shape)):
        window = voxels[tuple(slice(i * r, (i + 1) * r) for i, r in zip(index, ratio, strict=True))]
        if pooling == "majority":
            coarser[index] = 2 * np.count_nonzero(window) >= window.size
        else:
            coarser[index] = int(np.floor(window.mean() + 0.5))
    return coarser


def built(voxels: UInt8Array, shape: ZYX, ratio: Any, pooling: Pooling, write_shape: ZYX, chunk_shape: ZYX) -> ArrayTarget:
    source, target = ArraySource(voxels), ArrayTarget(shape)
    build_level(
        source.read_box,
        source.shape,
        target.write_box,
        shape,
        ratio=ratio,
        write_shape=write_shape,
        chunk_shape=chunk_shape,
        pooling=pooling,
    )
    assert (target.n_writes == 1).all(), "each voxel written once"
    return target


sizes = st.integers(1, 9)
ratios = st.integers(1, 4)


@settings(max_examples=150)
@given(
    shape=st.tuples(sizes, sizes, sizes),
    ratio=st.tuples(ratios, ratios, ratios),
    chunk=st.tuples(sizes, sizes, sizes),
    chunks_per_file=st.integers(1, 2),
    is_rounded_up=st.booleans(),
    pooling=st.sampled_from(POOLINGS),
)
def test_levels_equal_pooling_by_hand(
    shape: ZYX, ratio: ZYX, chunk: ZYX, chunks_per_file: int, is_rounded_up: bool, pooling: Pooling
) -> None:
    z, y, x = (-(-n // r) if is_rounded_up else max(1, n // r) for n, r in zip(shape, ratio, strict=True))
    voxels = noise(shape) * (noise(shape, seed=1) > 100)
    file_shape = (chunk[0] * chunks_per_file, chunk[1], chunk[2])
    found = built(voxels, (z, y, x), ratio, pooling, file_shape, chunk).voxels
    np.testing.assert_array_equal(found, pooled_by_hand(voxels, (z, y, x), ratio, pooling))


def test_a_tie_is_foreground_and_one_less_is_not() -> None:
    voxels = np.zeros((2, 2, 4), np.uint8)
    voxels[0, :, 0:2] = 1  # four of the first eight
    voxels[0, 1, 2:] = voxels[1, 1, 2] = 1  # three of the last eight
    assert built(voxels, (1, 1, 2), (2, 2, 2), "majority", (1, 1, 2), (1, 1, 2)).voxels.tolist() == [[[1, 0]]]


def test_a_mean_is_rounded_half_up() -> None:
    voxels = np.array([[[0, 1, 254, 255, 3, 3]]], np.uint8)
    assert built(voxels, (1, 1, 3), (1, 1, 2), "mean", (1, 1, 3), (1, 1, 3)).voxels.tolist() == [[[1, 255, 3]]]


@pytest.mark.parametrize(
    ("n_finer", "n_coarser", "ratio", "begin", "end"),
    [
        (7, 4, 2.0, [0, 2, 4, 6], [2, 4, 6, 7]),
        (7, 3, 2.0, [0, 2, 4], [2, 4, 6]),
        (6, 4, 1.5, [0, 2, 3, 4], [2, 3, 4, 6]),
        (165, 83, 165 / 83, [*range(0, 84, 2)][:3], [2, 4, 6]),
        (4, 4, 2.0, [0, 2, 3, 3], [2, 4, 4, 4]),
    ],
    ids=["clipped", "left-over", "uneven", "ratio-of-sizes", "beyond"],
)
def test_windows_by_digits(n_finer: int, n_coarser: int, ratio: float, begin: list[int], end: list[int]) -> None:
    found = windows(n_finer, n_coarser, ratio)
    assert found.begin.tolist()[: len(begin)] == begin
    assert found.end.tolist()[: len(end)] == end
    assert len(found.begin) == n_coarser


def test_memory_is_bounded_by_chunks_not_by_the_volume() -> None:
    source, target = ArraySource(noise((16, 40, 40))), ArrayTarget((8, 20, 20))
    build_level(
        source.read_box,
        source.shape,
        target.write_box,
        target.shape,
        ratio=(2, 2, 2),
        write_shape=(8, 10, 10),
        chunk_shape=(4, 5, 5),
        pooling="mean",
    )
    assert {box.shape for box in source.boxes} == {(8, 10, 10)}
    assert sum(box.n_voxels for box in source.boxes) == Box.of_shape(source.shape).n_voxels, "each voxel read once"


@pytest.mark.parametrize("module", [kdunet_infer.volume.ome, kdunet_infer.volume.pyramid], ids=["ome", "pyramid"])
def test_values_know_no_files(module: Any) -> None:
    with open(module.__file__) as file:
        names = imported(file.read())
    assert not {"zarr", "tifffile", "os", "kdunet_infer.volume.arrays"} & names
