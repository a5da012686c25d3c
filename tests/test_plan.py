"""The plan's promise: the cores, cut to the blocks, cover the region of interest exactly once, all on the stride grid."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdunet_infer.card import ModelCard
from kdunet_infer.errors import GeometryError, ModelCardError
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.plan import Plan, plan_segmentation
from kdunet_infer.testing import probe_card

CARD = ModelCard(name="mito", version="1", stride_zyx=(1, 16, 16), halo_zyx=(0, 96, 96), threshold=0.5)
EPFL = (165, 768, 1024)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 30), st.integers(1, 30)))
    shard = draw(st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)))
    times = draw(st.none() | st.tuples(*[st.integers(1, 3)] * 3))
    stride = draw(st.sampled_from([1, 2, 3, 4]))
    tile = draw(st.none() | st.tuples(st.integers(1, 5), st.integers(1, 5)))
    return plan_segmentation(
        shape,
        probe_card(draw(st.integers(0, 5)), stride),
        shard_shape=shard,
        block_shape=None if times is None else (times[0] * shard[0], times[1] * shard[1], times[2] * shard[2]),
        tile_shape=None if tile is None else (tile[0] * stride, tile[1] * stride),
        roi=draw(st.none() | rois(shape)),
    )


@st.composite
def rois(draw: st.DrawFn, shape: ZYX) -> Box:
    begin = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return Box(begin, tuple(draw(st.integers(b + 1, n)) for b, n in zip(begin, shape, strict=True)))


def count(boxes: list[Box], shape: ZYX) -> np.ndarray:
    """How many of `boxes` hold each voxel of a volume of `shape`."""
    n = np.zeros(shape, int)
    for box in boxes:
        n[box.slices_in(Box.of_shape(shape))] += 1
    return n


@given(plan=plans(), batch_size=st.integers(1, 4))
def test_cores_cover_the_roi_exactly_once(plan: Plan, batch_size: int) -> None:
    kept = [tile.core_box.intersection(block.write_box) for block in plan.blocks for tile in plan.tiles(block, batch_size)]
    wanted = np.zeros(plan.volume_shape, int)
    wanted[plan.roi.slices_in(Box.of_shape(plan.volume_shape))] = 1
    assert all(box.n_voxels for box in kept), "a tile computed for nothing"
    np.testing.assert_array_equal(count(kept, plan.volume_shape), wanted)


@given(plan=plans())
def test_a_shard_has_one_block(plan: Plan) -> None:
    for block in plan.blocks:
        assert plan.roi.contains(block.write_box)
        cell = Box(
            *(tuple(c // b for c, b in zip(corner, plan.block_shape, strict=True)) for corner in corners(block.write_box))
        )
        assert cell.begin == cell.end, f"{block.write_box} reaches into two cells of the block grid"


def corners(box: Box) -> tuple[ZYX, ZYX]:
    """First and last voxel."""
    z, y, x = box.end
    return box.begin, (z - 1, y - 1, x - 1)


@given(plan=plans(), batch_size=st.integers(1, 4))
def test_tiles_lie_on_the_global_stride_grid_inside_the_block_read(plan: Plan, batch_size: int) -> None:
    for block in plan.blocks:
        for tile in plan.tiles(block, batch_size):
            assert tile.core_box == tile.core_box.snapped(plan.stride_zyx)
            assert tile.read_box == tile.core_box.grown(plan.halo_zyx)
            assert block.read_box.contains(tile.read_box)
            assert tile.core_box.shape[0] <= batch_size
            assert all(n <= longest for n, longest in zip(tile.core_box.shape[1:], plan.tile_shape, strict=True))


@given(plan=plans())
def test_sums_are_those_of_the_tiles(plan: Plan) -> None:
    tiles = [tile for block in plan.blocks for tile in plan.tiles(block)]
    assert plan.n_tiles == len(tiles)
    assert plan.halo_overhead == pytest.approx(sum(tile.read_box.n_voxels for tile in tiles) / plan.roi.n_voxels)


@given(plan=plans())
def test_blocks_are_numbered_and_made_from_their_index(plan: Plan) -> None:
    blocks = list(plan.blocks)
    assert [block.index for block in blocks] == list(range(plan.n_blocks))
    assert [plan.block(i) for i in range(plan.n_blocks)] == blocks
    assert blocks == sorted(blocks, key=lambda block: block.write_box.begin)
    for index in (-1, plan.n_blocks):
        with pytest.raises(IndexError, match=f"block {index} of a plan of {plan.n_blocks}"):
            plan.block(index)


def test_a_petavoxel_plan_is_made_at_once() -> None:
    plan = plan_segmentation((100_000, 100_000, 100_000), CARD, shard_shape=(64, 512, 512))
    assert plan.n_blocks == 1563 * 98 * 98
    assert plan.block(plan.n_blocks - 1).write_box.end == (100_000, 100_000, 100_000)
    assert plan.halo_overhead == pytest.approx(1.41, abs=0.01)


def test_blocks_of_a_roi_lie_on_the_grid_of_the_volume() -> None:
    plan = plan_segmentation(
        EPFL, CARD, shard_shape=(16, 256, 256), block_shape=(16, 256, 256), roi=Box((20, 200, 0), (40, 300, 9))
    )
    assert [str(block.write_box) for block in plan.blocks] == [
        "20:32,200:256,0:9",
        "20:32,256:300,0:9",
        "32:40,200:256,0:9",
        "32:40,256:300,0:9",
    ]
    assert str(plan.block(0).core_box) == "20:32,192:256,0:16"
    assert str(plan.block(0).read_box) == "20:32,96:352,-96:112"


@pytest.mark.parametrize(
    ("shape", "shard", "block"),
    [
        (EPFL, (64, 512, 512), (64, 1024, 1024)),
        (EPFL, (1, 64, 64), (32, 768, 1024)),
        (EPFL, (24, 100, 100), (24, 800, 1000)),
        (EPFL, (128, 4096, 4096), (128, 4096, 4096)),
        ((5, 70, 3000), (1, 64, 64), (5, 128, 1024)),
    ],
    ids=["shard-grows", "slices", "odd-chunks", "huge-shard", "small-volume"],
)
def test_default_blocks_are_whole_shards(shape: ZYX, shard: ZYX, block: ZYX) -> None:
    assert plan_segmentation(shape, CARD, shard_shape=shard).block_shape == block


@pytest.mark.parametrize(
    ("length", "cores"), [(768, [768]), (1024, [1024]), (1056, [528, 528]), (2060, [688, 688, 688]), (1025, [512, 528])]
)
def test_tiles_are_few_and_equal(length: int, cores: list[int]) -> None:
    plan = plan_segmentation((1, 16, length), CARD, shard_shape=(1, 16, length))
    assert [tile.core_box.shape[2] for tile in plan.tiles(plan.block(0))] == cores


def test_summary_is_one_line_with_the_cost_of_the_halo() -> None:
    plan = plan_segmentation((64, 2048, 2048), CARD, shard_shape=(64, 512, 512))
    assert plan.summary() == (
        "4 blocks of 64 x 1024 x 1024 voxels, 256 tiles of 1024 x 1024 pixels with a halo of 96 x 96, halo overhead 1.41"
    )
    one = plan_segmentation((1, 16, 16), CARD, shard_shape=(1, 64, 64))
    assert one.summary().startswith("1 block of 1 x 16 x 16 voxels, 1 tile of 16 x 16 pixels")


def test_a_plan_compares_and_pickles() -> None:
    plan = plan_segmentation(EPFL, CARD, shard_shape=(64, 512, 512))
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert pickle.loads(pickle.dumps(plan.block(1))) == plan.block(1)
    assert plan != plan_segmentation(EPFL, CARD, shard_shape=(64, 512, 512), roi=Box((0, 0, 0), (1, 1, 1)))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"roi": Box((0, 0, 0), (166, 768, 1024))},
            r"0:166,0:768,0:1024 leaves the volume of \(165, 768, 1024\) voxels; choose",
        ),
        ({"roi": Box((-1, 0, 0), (9, 9, 9))}, "leaves the volume"),
        ({"roi": Box((3, 4, 5), (3, 9, 9))}, r"3:3,4:9,5:9 holds no voxels; give begin:end with end > begin"),
        ({"block_shape": (64, 500, 512)}, r"\(64, 500, 512\) is not a whole multiple.*\(64, 512, 512\).*use 64,512,512"),
        ({"block_shape": (0, 512, 512)}, r"block shape \(0, 512, 512\) has an axis without voxels"),
        ({"shard_shape": (64, 0, 512)}, r"shard shape \(64, 0, 512\) has an axis without voxels"),
        ({"shape": (165, 768, 0)}, r"volume shape \(165, 768, 0\) has an axis without voxels"),
        (
            {"tile_shape": (500, 512)},
            r"tile shape \(500, 512\) is not a multiple of the network's stride \(16, 16\); use 512,512",
        ),
        ({"tile_shape": (512, 0)}, "use 512,16"),
    ],
    ids=["roi-end", "roi-begin", "roi-empty", "block", "block-0", "shard-0", "volume-0", "tile", "tile-0"],
)
def test_what_cannot_be_planned_is_refused(changes: dict, says: str) -> None:
    asked = {"shape": EPFL, "card": CARD, "shard_shape": (64, 512, 512), **changes}
    with pytest.raises(GeometryError, match=says):
        plan_segmentation(**asked)


def test_a_network_that_looks_along_z_is_refused() -> None:
    card = ModelCard(name="deep", version="1", stride_zyx=(2, 16, 16), halo_zyx=(4, 96, 96), threshold=0.5)
    with pytest.raises(ModelCardError, match="model deep has stride 2 and halo 4 along z; only networks of single slices"):
        plan_segmentation(EPFL, card, shard_shape=(64, 512, 512))
