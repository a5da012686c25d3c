"""Tiled = whole, exactly: for a probe that feels context and grid position, and for small networks to float rounding.

The second half proves the probe: every mistake that one could make in tiling must change its answer.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from small_models import small_model
from test_plan import rois

from kdunet_infer.blockwise import (
    BlockResult,
    Engine,
    Float32Array,
    Source,
    UInt8Array,
    compute_block,
    read_block,
    segment_block,
)
from kdunet_infer.card import ModelCard
from kdunet_infer.engines.onnxruntime import OnnxRuntimeEngine
from kdunet_infer.errors import EngineError
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.model import Model
from kdunet_infer.phantom import phantom_box
from kdunet_infer.plan import Plan, plan_segmentation
from kdunet_infer.testing import ArraySource, ArrayTarget, ProbeEngine, noise, probe_card, segment_whole


def probability_in_blocks(source: Source, engine: Engine, plan: Plan) -> Float32Array:
    """What `compute_block` sees before it thresholds: float32 (z, y, x), NaN where no tile wrote."""
    probability = np.full(plan.volume_shape, np.nan, np.float32)
    whole = Box.of_shape(plan.volume_shape)
    for block in plan.blocks:
        voxels = read_block(source, block)
        for tile in plan.tiles(block):
            found = engine.infer(voxels[tile.read_box.slices_in(block.read_box)])
            kept = tile.core_box.intersection(block.write_box)
            probability[kept.slices_in(whole)] = found[kept.slices_in(tile.read_box)]
    return probability


def segment_in_blocks(image: UInt8Array, engine: Engine, plan: Plan, **options: object) -> tuple[ArrayTarget, ArrayTarget]:
    """Mask and round(255 p) of every block of the plan, as targets that counted their writes."""
    source = ArraySource(image)
    mask, probability = ArrayTarget(plan.volume_shape), ArrayTarget(plan.volume_shape)
    for block in plan.blocks:
        result = segment_block(source, engine, plan, block, threshold=0.5, with_probability=True, **options)
        assert result.probability is not None
        mask.write_box(block.write_box, result.mask)
        probability.write_box(block.write_box, result.probability)
    assert len(source.boxes) == plan.n_blocks, "one read per block"
    return mask, probability


def assert_tiled_is_whole(plan: Plan, engine: ProbeEngine, batch_size: int) -> None:
    image = noise(plan.volume_shape)
    want = segment_whole(image, engine, engine.card)
    mask, probability = segment_in_blocks(image, engine, plan, batch_size=batch_size)
    inside = plan.roi.slices_in(Box.of_shape(plan.volume_shape))
    assert_array_equal(mask.voxels[inside], want[inside] >= np.float32(0.5))
    assert_array_equal(probability.voxels[inside], np.rint(want[inside] * np.float32(255)))
    once = np.zeros(plan.volume_shape, int)
    once[inside] = 1
    assert_array_equal(mask.n_writes, once)


shapes = st.tuples(st.integers(1, 4), st.integers(1, 37), st.integers(1, 37))


@given(
    data=st.data(),
    shape=shapes,
    shard=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)),
    tile=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    radius=st.integers(0, 7),
    stride=st.sampled_from([1, 2, 4]),
    batch_size=st.integers(1, 5),
)
def test_tiled_is_whole(
    data: st.DataObject, shape: ZYX, shard: ZYX, tile: tuple[int, int], radius: int, stride: int, batch_size: int
) -> None:
    engine = ProbeEngine(radius, stride)
    roi = data.draw(st.none() | rois(shape))
    tile_shape = (tile[0] * stride, tile[1] * stride)
    plan = plan_segmentation(shape, engine.card, shard_shape=shard, block_shape=shard, tile_shape=tile_shape, roi=roi)
    assert_tiled_is_whole(plan, engine, batch_size)


@pytest.mark.parametrize(
    ("shape", "shard", "tile", "roi"),
    [
        ((1, 1, 1), (1, 8, 8), (8, 8), None),
        ((2, 5, 3), (4, 16, 16), (16, 16), None),
        ((3, 31, 37), (2, 7, 11), (4, 8), None),
        ((2, 17, 33), (1, 16, 16), (16, 16), None),
        ((5, 40, 40), (2, 16, 12), (8, 16), Box((1, 5, 7), (4, 38, 23))),
    ],
    ids=["one-voxel", "volume-below-tile-and-halo", "primes", "one-voxel-remainder", "roi"],
)
def test_tiled_is_whole_in_awkward_shapes(shape: ZYX, shard: ZYX, tile: tuple[int, int], roi: Box | None) -> None:
    engine = ProbeEngine(radius=7, stride=4)
    plan = plan_segmentation(shape, engine.card, shard_shape=shard, block_shape=shard, tile_shape=tile, roi=roi)
    assert_tiled_is_whole(plan, engine, batch_size=2)


def test_tiled_is_whole_with_default_blocks_and_tiles() -> None:
    engine = ProbeEngine(radius=15, stride=16)
    assert_tiled_is_whole(plan_segmentation((3, 1100, 70), engine.card, shard_shape=(1, 64, 64)), engine, batch_size=4)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("shape", [(3, 61, 47), (2, 5, 4)], ids=["primes", "below-halo"])
def test_tiled_is_whole_for_a_network(levels: int, shape: ZYX) -> None:
    model = small_model(levels)
    engine = OnnxRuntimeEngine(model, n_threads=1)
    image = noise(shape)
    plan = plan_segmentation(shape, model.card, shard_shape=(2, 23, 20), block_shape=(2, 23, 20), tile_shape=(12, 16))
    tiled = probability_in_blocks(ArraySource(image), engine, plan)
    assert np.abs(tiled - segment_whole(image, engine, model.card)).max() <= 1e-6  # NaN, a hole, fails too


# What the probe and the networks must feel


@pytest.fixture(scope="module")
def released() -> tuple[Model, Engine]:
    model = Model.load("phantom-2unet")
    return model, OnnxRuntimeEngine(model, n_threads=1)


@settings(max_examples=12)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 150), st.integers(1, 150)),
    shard=st.tuples(st.integers(1, 2), st.integers(20, 90), st.integers(20, 90)),
    tile=st.tuples(*[st.integers(1, 9).map(lambda cells: 16 * cells)] * 2),
)
@example(shape=(1, 97, 113), shard=(1, 48, 56), tile=(16, 32))  # primes, with a one-voxel remainder
@example(shape=(2, 5, 149), shard=(1, 20, 37), tile=(16, 144))  # a halo far larger than the volume
def test_tiled_is_whole_for_a_released_student(
    released: tuple[Model, Engine], shape: ZYX, shard: ZYX, tile: tuple[int, int]
) -> None:
    model, engine = released
    image, _ = phantom_box(Box((40, 1000, 1000), (40 + shape[0], 1000 + shape[1], 1000 + shape[2])), seed=5)
    plan = plan_segmentation(shape, model.card, shard_shape=shard, block_shape=shard, tile_shape=tile)
    found = probability_in_blocks(ArraySource(image), engine, plan)
    np.testing.assert_allclose(found, segment_whole(image, engine, model.card), atol=1e-5, rtol=0)  # float32 sums, reordered


def gap(image: UInt8Array, engine: Engine, true_card: ModelCard, plan: Plan, source: Source | None = None) -> float:
    tiled = probability_in_blocks(source or ArraySource(image), engine, plan)
    return float(np.abs(tiled - segment_whole(image, engine, true_card)).max())


def cut(card: ModelCard, **changes: object) -> Plan:
    """A plan of 4 x 4 blocks for a volume of 2 x 48 x 48."""
    card = dataclasses.replace(card, **changes)
    return plan_segmentation((2, 48, 48), card, shard_shape=(1, 12, 12), block_shape=(1, 12, 12), tile_shape=(8, 8))


def test_the_right_plan_leaves_no_gap() -> None:
    engine = ProbeEngine(radius=7, stride=4)
    assert gap(noise((2, 48, 48)), engine, engine.card, cut(engine.card)) == 0


@pytest.mark.parametrize("halo", [(0, 4, 8), (0, 8, 4), (0, 0, 0)], ids=["y", "x", "none"])
def test_a_halo_too_small_is_felt(halo: ZYX) -> None:
    engine = ProbeEngine(radius=5, stride=4)
    assert gap(noise((2, 48, 48)), engine, engine.card, cut(engine.card, halo_zyx=halo)) > 0.1


def test_a_halo_too_small_for_a_network_is_felt() -> None:
    model = small_model(levels=2)
    assert (
        gap(noise((2, 48, 48)), OnnxRuntimeEngine(model, n_threads=1), model.card, cut(model.card, halo_zyx=(0, 6, 6))) > 1e-5
    )


@pytest.mark.parametrize("network", [False, True], ids=["probe", "network"])
def test_tiles_off_the_grid_are_felt(network: bool) -> None:
    model, image = small_model(levels=2), noise((2, 48, 48))
    engine = OnnxRuntimeEngine(model, n_threads=1) if network else ProbeEngine(radius=9, stride=2)
    want = segment_whole(image, engine, model.card)
    shifted = probability_in_blocks(_OneToTheRight(image), engine, cut(model.card))
    faces_left_out = (slice(None), slice(12, -12), slice(12, -12))
    assert np.abs(shifted[:, :, :-1] - want[:, :, 1:])[faces_left_out].max() > 1e-3


class _OneToTheRight(ArraySource):
    """The same voxels one place to the left: tiles on the grid of this source are off the grid of the image."""

    def read_box(self, box: Box) -> UInt8Array:
        (z, y, x), (z_end, y_end, x_end) = box.begin, box.end
        return super().read_box(Box((z, y, x + 1), (z_end, y_end, x_end + 1)))


class _MirrorsInside(ArraySource):
    """Reads the core only and mirrors it, as if every block were a volume of its own."""

    halo = 4

    def read_box(self, box: Box) -> UInt8Array:
        core = box.grown((0, -self.halo, -self.halo)).intersection(Box.of_shape(self.shape))
        margins = [(c - b, e - d) for b, c, d, e in zip(box.begin, core.begin, core.end, box.end, strict=True)]
        return np.pad(self.voxels[core.slices_in(Box.of_shape(self.shape))], margins, mode="reflect")


def test_mirroring_inside_the_volume_is_felt() -> None:
    engine, image = ProbeEngine(radius=4, stride=4), noise((2, 48, 48))
    assert gap(image, engine, engine.card, cut(engine.card), _MirrorsInside(image)) > 0.1


def test_a_mirror_that_repeats_the_edge_is_felt() -> None:
    engine, image = ProbeEngine(radius=1, stride=1), noise((1, 8, 8))
    symmetric = engine.infer(np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="symmetric"))[:, 1:-1, 1:-1]
    assert np.abs(symmetric - segment_whole(image, engine, engine.card)).max() > 0.1


@example(where=(-3, 3), change=128, corner=(6, 6))  # the change that an even weight would not feel
@given(
    where=st.tuples(st.integers(-3, 3), st.integers(-3, 3)),
    change=st.integers(1, 255),
    corner=st.tuples(*[st.integers(4, 8)] * 2),
)
def test_the_probe_feels_every_voxel_within_its_radius(where: tuple[int, int], change: int, corner: tuple[int, int]) -> None:
    engine = ProbeEngine(radius=3, stride=1)
    tile = noise((1, 13, 13))
    other = tile.copy()
    changed = (0, corner[0] + where[0], corner[1] + where[1])
    other[changed] = (int(tile[changed]) + change) % 256
    at = (0, *corner)
    assert engine.infer(tile)[at] != engine.infer(other)[at]


@pytest.mark.parametrize("axis", [1, 2])
def test_the_probe_knows_its_directions(axis: int) -> None:
    engine, tile = ProbeEngine(radius=3, stride=1), noise((1, 13, 13))
    assert (np.flip(engine.infer(np.flip(tile, axis)), axis) != engine.infer(tile)).any()


def test_a_target_counts_every_write() -> None:
    target = ArrayTarget((1, 2, 3))
    for box in (Box.of_shape((1, 2, 3)), Box((0, 0, 1), (1, 2, 2))):
        target.write_box(box, noise(box.shape))
    assert_array_equal(target.n_writes, [[[1, 2, 1], [1, 2, 1]]])


# Thresholds and stored probabilities


class Fixed:
    """An engine that answers with `probability` everywhere."""

    def __init__(self, probability: float) -> None:
        self._probability = np.float32(probability)

    def infer(self, tiles: UInt8Array) -> Float32Array:
        return np.full(tiles.shape, self._probability)

    def describe(self) -> str:
        return "fixed"


def segment_fixed(probability: float, threshold: float) -> BlockResult:
    plan = plan_segmentation((1, 2, 3), probe_card(0, 1), shard_shape=(1, 2, 3))
    voxels = noise((1, 2, 3))
    return compute_block(voxels, Fixed(probability), plan, plan.block(0), threshold=threshold, with_probability=True)


@pytest.mark.parametrize(
    ("probability", "threshold", "foreground"),
    [
        (0.5, 0.5, True),
        (np.nextafter(np.float32(0.5), np.float32(0)), 0.5, False),
        (0.3, 0.3, True),  # float32(0.3) > 0.3 > float32(0.7), float32(0.1): compared as float32, both are the same number
        (0.7, 0.7, True),
        (0.499, 0.5, False),  # would round to 127, and a threshold on the stored 127 / 255 = 0.498 would differ
        (0.501, 0.5001, True),
    ],
)
def test_the_mask_is_probability_against_threshold_before_rounding(
    probability: float, threshold: float, foreground: bool
) -> None:
    assert_array_equal(segment_fixed(probability, threshold).mask, np.full((1, 2, 3), foreground))


@pytest.mark.parametrize(
    ("probability", "stored"), [(0, 0), (1, 255), (0.501, 128), (0.499, 127), (1 + 1e-6, 255), (0.0019, 0)]
)
def test_stored_probabilities_are_rounded(probability: float, stored: int) -> None:
    found = segment_fixed(probability, 0.5).probability
    assert found is not None
    assert found.dtype == np.uint8
    assert_array_equal(found, np.full((1, 2, 3), stored))


def test_probabilities_are_not_kept_unless_asked_for() -> None:
    plan = plan_segmentation((1, 2, 3), probe_card(0, 1), shard_shape=(1, 2, 3))
    assert segment_block(ArraySource(noise((1, 2, 3))), Fixed(1), plan, plan.block(0), threshold=0.5).probability is None


def test_nan_is_an_error_and_not_background() -> None:
    with pytest.raises(EngineError, match=r"fixed returned NaN within voxels 0:1,0:2,0:3; use an engine in float32"):
        segment_fixed(np.nan, 0.5)


def test_tiles_are_batched_across_slices() -> None:
    class Counting(Fixed):
        shapes: list[tuple[int, ...]] = []  # noqa: RUF012

        def infer(self, tiles: UInt8Array) -> Float32Array:
            self.shapes.append(tiles.shape)
            return super().infer(tiles)

    plan = plan_segmentation((5, 4, 8), probe_card(1, 2), shard_shape=(5, 4, 8), tile_shape=(4, 4))
    segment_block(ArraySource(noise((5, 4, 8))), Counting(0), plan, plan.block(0), threshold=0.5, batch_size=2)
    assert Counting.shapes == [(2, 8, 8), (2, 8, 8), (1, 8, 8)] * 2
