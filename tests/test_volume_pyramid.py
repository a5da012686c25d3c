"""Pooling against the same thing said one voxel at a time, and level shapes as they come."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, cast

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
from kdunet_infer.volume.ome import Level, step_between
from kdunet_infer.volume.pyramid import Pooling, build_level, windows

POOLINGS: tuple[Pooling, ...] = ("majority", "mean")


def pooled_by_hand(voxels: UInt8Array, shape: ZYX, ratio: ZYX, pooling: Pooling) -> UInt8Array:
    """Voxel i of the coarser level is made of the voxels ratio*i to ratio*(i+1)-1 that there are."""
    coarser = np.empty(shape, np.uint8)
    for index in itertools.product(*(range(n) for n in shape)):
        window = voxels[tuple(slice(i * r, (i + 1) * r) for i, r in zip(index, ratio, strict=True))]
        if pooling == "majority":
            coarser[index] = 2 * np.count_nonzero(window) > window.size
        else:
            coarser[index] = int(np.floor(window.mean() + 0.5))
    return coarser


def built(
    voxels: UInt8Array, shape: ZYX, ratio: Any, pooling: Pooling, write_shape: ZYX, chunk_shape: ZYX, **more: Any
) -> ArrayTarget:
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
        **more,
    )
    assert (target.n_writes == 1).all() or "roi" in more, "each voxel written once"
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


@settings(max_examples=100)
@given(
    shape=st.tuples(sizes, sizes, sizes),
    ratio=st.tuples(ratios, ratios, ratios),
    is_picked=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    chunk=st.tuples(sizes, sizes, sizes),
    pooling=st.sampled_from(POOLINGS),
)
def test_picked_voxels_are_those_of_a_stride(
    shape: ZYX, ratio: ZYX, is_picked: tuple[bool, bool, bool], chunk: ZYX, pooling: Pooling
) -> None:
    voxels = noise(shape) * (noise(shape, seed=1) > 100)
    strides = tuple(slice(None, None, r) if picked else slice(None) for r, picked in zip(ratio, is_picked, strict=True))
    pooled_ratio = cast("ZYX", tuple(1 if picked else r for r, picked in zip(ratio, is_picked, strict=True)))
    z, y, x = (-(-n // r) for n, r in zip(shape, ratio, strict=True))
    picked_at = tuple(0.0 if picked else None for picked in is_picked)
    found = built(voxels, (z, y, x), ratio, pooling, chunk, chunk, picked_at=picked_at).voxels
    np.testing.assert_array_equal(found, pooled_by_hand(voxels[strides], (z, y, x), pooled_ratio, pooling))


@settings(max_examples=150)
@given(
    shape=st.tuples(sizes, sizes, sizes),
    ratio=st.tuples(ratios, ratios, ratios),
    picked_at=st.sampled_from([(None, None, None), (0.0, None, 1.0)]),
    chunk=st.tuples(sizes, sizes, sizes),
    corners=st.lists(st.tuples(sizes, sizes, sizes), min_size=2, max_size=2),
    pooling=st.sampled_from(POOLINGS),
)
def test_a_level_of_a_roi_is_that_of_the_whole(
    shape: ZYX, ratio: ZYX, picked_at: Any, chunk: ZYX, corners: list[ZYX], pooling: Pooling
) -> None:
    roi = Box(*(cast("ZYX", tuple(sorted(pair)[end] for pair in zip(*corners, strict=True))) for end in (0, 1)))
    roi = roi.intersection(Box.of_shape(shape))
    voxels = np.zeros(shape, np.uint8)
    if roi.n_voxels:
        voxels[roi.slices_in(Box.of_shape(shape))] = 1 + noise(roi.shape) % 255
    z, y, x = (-(-n // r) for n, r in zip(shape, ratio, strict=True))
    options = {"pooling": pooling, "write_shape": chunk, "chunk_shape": chunk, "picked_at": picked_at}
    whole = built(voxels, (z, y, x), ratio, **options)
    part = built(voxels, (z, y, x), ratio, roi=roi, **options)
    np.testing.assert_array_equal(part.voxels, whole.voxels)
    assert not part.n_writes.any() or roi.n_voxels


def test_only_files_in_reach_of_a_roi_are_written() -> None:
    source, target = ArraySource(noise((16, 40, 40))), ArrayTarget((8, 20, 20))
    reached = build_level(
        source.read_box,
        source.shape,
        target.write_box,
        target.shape,
        ratio=(2, 2, 2),
        write_shape=(4, 10, 10),
        chunk_shape=(2, 5, 5),
        pooling="mean",
        roi=Box((3, 9, 19), (5, 10, 21)),
    )
    assert reached == Box((1, 4, 9), (3, 5, 11)), "grown to whole coarser voxels"
    assert target.n_writes[:4, :10].all()
    assert target.n_writes.sum() == 4 * 10 * 20
    assert {box.begin for box in source.boxes} == {(z, 0, x) for z in (0, 4) for x in (10, 20)} | {(0, 0, 10)}


@pytest.mark.parametrize(
    ("ratio", "offset", "picked_at"),
    [
        ((2, 2, 2), (0.5, 0.5, 0.5), (None, None, None)),
        ((2, 2, 2), (0, 0, 0), (0, 0, 0)),
        ((1, 2, 4), (0, 0.5, 1.5), (None, None, None)),
        ((1, 2, 4), (0, 0, 0), (None, 0, 0)),
        ((4, 2, 2), (0, 0.5, 0.5), (0, None, None)),
        ((3, 3, 3), (1, 1, 0.4), (None, None, 0.4)),
        ((165 / 83, 2, 2), (0.494, 0.49, 0.01), (None, None, 0.01)),
    ],
    ids=["pooled", "picked", "anisotropic-pooled", "anisotropic-picked", "mixed", "odd", "rounded"],
)
def test_the_transforms_say_whether_voxels_were_picked_or_pooled(ratio: Any, offset: Any, picked_at: Any) -> None:
    fine = Level(shape=(9, 9, 9), chunk_shape=(9, 9, 9), scale=(40, 4, 5), translation=(7, 100, -3))
    scale = tuple(s * r for s, r in zip(fine.scale, ratio, strict=True))
    translation = tuple(t + s * o for t, s, o in zip(fine.translation, fine.scale, offset, strict=True))
    step = step_between(fine, replace(fine, scale=cast("Any", scale), translation=cast("Any", translation)))
    assert step.ratio == pytest.approx(ratio)
    assert [None if at is None else pytest.approx(at) for at in picked_at] == list(step.picked_at)


def test_a_tie_is_background_and_one_more_is_not() -> None:
    voxels = np.zeros((2, 2, 4), np.uint8)
    voxels[0, :, 0:2] = 1  # four of the first eight
    voxels[:, 1, 2:] = voxels[0, 0, 2] = 1  # five of the last eight
    assert built(voxels, (1, 1, 2), (2, 2, 2), "majority", (1, 1, 2), (1, 1, 2)).voxels.tolist() == [[[0, 1]]]


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
