"""The phantom: a pure function of seed and coordinates that looks enough like electron microscopy to be worth segmenting."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdunet_infer.errors import GeometryError
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.phantom import SITE_REACH, _nearest_cells, _organelles, _Scene, _Sites, phantom_box

UInt8Array = npt.NDArray[np.uint8]
Volume = tuple[UInt8Array, UInt8Array]

SEEDS = (0, 1, 7)
MITOCHONDRION_BOX = Box((20, 120, 144), (28, 160, 208))  # seed 1 has one there, cut by the box's faces


@pytest.fixture(scope="module", params=SEEDS, ids=[f"seed-{seed}" for seed in SEEDS])
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def volume(seed: int) -> Volume:
    """Image and truth, 64 x 256 x 256: several cells and mitochondria."""
    return phantom_box(Box.of_shape((64, 256, 256)), seed)


def box_at(begin: ZYX, shape: ZYX) -> Box:
    z, y, x = (b + n for b, n in zip(begin, shape, strict=True))
    return Box(begin, (z, y, x))


def iou(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


@st.composite
def whole_and_part(draw: st.DrawFn) -> tuple[Box, Box]:
    """A small box anywhere from the origin to far away, and a box inside it."""
    far = st.sampled_from([0, 3, 250, 10_000, 2**31 - 5])
    begin = draw(st.tuples(far, far, far))
    shape = draw(st.tuples(st.integers(1, 24), st.integers(1, 48), st.integers(1, 48)))
    cuts = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    part = Box(*((begin[0] + cuts[0][k], begin[1] + cuts[1][k], begin[2] + cuts[2][k]) for k in (0, 1)))
    return box_at(begin, shape), part


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(boxes=whole_and_part(), seed=st.sampled_from([0, 1, 2**64 - 1]))
def test_a_part_is_cut_from_the_whole(boxes: tuple[Box, Box], seed: int) -> None:
    whole, part = boxes
    for all_voxels, voxels in zip(phantom_box(whole, seed), phantom_box(part, seed), strict=True):
        np.testing.assert_array_equal(voxels, all_voxels[part.slices_in(whole)])


def test_blocks_make_the_whole(volume: Volume, seed: int) -> None:
    """Large enough that organelles reach from block to block, which the small boxes above seldom see."""
    whole = Box.of_shape((64, 256, 256))
    for block in list(whole.split((24, 90, 110)))[::9]:
        for all_voxels, voxels in zip(volume, phantom_box(block, seed), strict=True):
            np.testing.assert_array_equal(voxels, all_voxels[block.slices_in(whole)])


@pytest.mark.parametrize("origin", [(0, 0, 0), (40, 10_000, 300)], ids=str)
def test_sites_left_out_change_nothing(origin: ZYX) -> None:
    """Alone, a point leaves out nearly all sites; in company, few: both must agree to the bit."""
    sites = _Sites.around(Box(origin, origin).grown((SITE_REACH,) * 3), seed=1)
    points = np.random.default_rng(0).uniform(-30, 30, (3, 500)).astype(np.float32)
    cells, depths = _nearest_cells(points, origin, sites)
    alone = [_nearest_cells(points[:, i : i + 1], origin, sites) for i in range(points.shape[1])]
    assert len(np.unique(cells)) > 3
    np.testing.assert_array_equal(cells, [cell[0] for cell, _ in alone])
    np.testing.assert_array_equal(depths, [depth[0] for _, depth in alone])


def test_a_small_scene_knows_every_organelle_that_reaches_into_it() -> None:
    small, large = (_Scene.of_box(MITOCHONDRION_BOX.grown((n, n, n)), seed=1) for n in (0, 50))
    known = {(o.kind.name, o.centre.tobytes()) for o in _organelles(small)}
    reaching = {(o.kind.name, o.centre.tobytes()) for o in _organelles(large) if o.part_of(small).n_voxels}
    assert len(reaching) > 2
    assert reaching <= known


def test_bytes_are_pinned() -> None:
    """Every operation is exactly rounded (see the module's docstring), so these bytes hold on every platform.

    Released models carry test tensors cut from the phantom: a change of these bytes makes them stale.
    """
    image, truth = phantom_box(MITOCHONDRION_BOX, 1)
    assert image.shape == truth.shape == MITOCHONDRION_BOX.shape
    assert image.dtype == truth.dtype == np.uint8
    assert image.flags.c_contiguous
    assert truth.flags.c_contiguous
    assert 0.1 < truth.mean() < 0.9
    digests = [hashlib.sha256(array.tobytes()).hexdigest()[:16] for array in (image, truth)]
    assert digests == ["06b6523634281b3b", "c7e64cf280070d8b"]


def test_seeds_differ() -> None:
    box = Box.of_shape((8, 64, 64))
    images = [phantom_box(box, seed)[0].astype(float) for seed in (0, 1, 2**63)]
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert abs(np.corrcoef(images[a].ravel(), images[b].ravel())[0, 1]) < 0.4


def test_an_empty_box_is_empty() -> None:
    image, truth = phantom_box(Box((5, 5, 5), (5, 9, 9)), 0)
    assert image.shape == truth.shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("box", "seed", "says"),
    [
        (Box.of_shape((1, 1, 1)), -1, r"seed is -1; give an integer from 0"),
        (Box.of_shape((1, 1, 1)), 2**64, r"seed is 18446744073709551616; give"),
        (Box((0, 0, 2**40), (1, 1, 2**40 + 1)), 0, r"coordinate beyond 1099511627776; choose a box nearer"),
    ],
    ids=["negative-seed", "huge-seed", "too-far"],
)
def test_refuses(box: Box, seed: int, says: str) -> None:
    with pytest.raises(GeometryError, match=says):
        phantom_box(box, seed)


def test_truth_is_binary_and_neither_rare_nor_common(volume: Volume) -> None:
    _, truth = volume
    assert set(np.unique(truth)) == {0, 1}
    assert 0.03 <= truth.mean() <= 0.15


def test_grey_levels_are_those_of_a_well_exposed_image(volume: Volume) -> None:
    image, _ = volume
    assert 115 < image.mean() < 165
    assert 30 < image.std() < 60
    darkest, lightest = np.percentile(image, [1, 99])
    assert 30 < darkest < 90
    assert 190 < lightest < 250
    assert ((image == 0) | (image == 255)).mean() < 1e-3  # hardly clipped


def test_mitochondria_are_darker_than_the_rest(volume: Volume) -> None:
    image, truth = volume
    assert image[truth == 1].mean() < image[truth == 0].mean() - 30


def test_a_threshold_does_not_find_them(volume: Volume) -> None:
    """Membranes, lysosomes and reticulum are as dark: the task needs shape and texture."""
    image, truth = volume
    best = max(iou(image <= level, truth == 1) for level in range(40, 200, 5))
    assert best < 0.5


def test_truth_goes_on_from_slice_to_slice(volume: Volume) -> None:
    _, truth = volume
    mask = truth == 1
    for axis in range(3):
        along = np.moveaxis(mask, axis, 0)
        assert iou(along[:-1], along[1:]) > 0.8


def test_neighbouring_voxels_get_independent_noise() -> None:
    """What a 5-voxel blur cannot explain must not be correlated, else the hash shows through as a pattern."""
    image = phantom_box(Box((0, 500, 500), (8, 628, 628)), 3)[0].astype(float)
    fine = image[:, :, 2:-2] * 6 - 4 * (image[:, :, 1:-3] + image[:, :, 3:-1]) + image[:, :, :-4] + image[:, :, 4:]
    for lag in [(1, 0, 0), (0, 1, 0), (0, 0, 8), (1, 1, 0)]:
        z, y, x = lag
        a, b = fine[z:, y:, x:].ravel(), fine[: fine.shape[0] - z, : fine.shape[1] - y, : fine.shape[2] - x].ravel()
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.1
