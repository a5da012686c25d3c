"""Components found block by block against scipy's of the whole volume, for objects that cross many blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from scipy.sparse import coo_array, csgraph

from kdunet_infer.components import Labelling, _join, grid_blocks, label_components
from kdunet_infer.errors import GeometryError, VolumeError
from kdunet_infer.geometry import Box

STRUCTURES = {6: ndimage.generate_binary_structure(3, 1), 26: np.ones((3, 3, 3), bool)}
CONNECTIVITIES = st.sampled_from([6, 26])
BLOCKS = st.tuples(*[st.integers(1, 6)] * 3)


@st.composite
def masks(draw, max_side=9):
    """Noise of any density: from single voxels to one object with holes."""
    shape = draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=max_side))
    density = draw(st.sampled_from([0.02, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9]))
    return np.random.default_rng(draw(st.integers(0, 2**32))).random(shape) < density


def boxes_inside(shape):
    """Boxes with at least one voxel inside a volume of `shape`."""
    ranges = st.tuples(*[st.tuples(st.integers(0, n - 1), st.integers(1, n)).filter(lambda r: r[0] < r[1]) for n in shape])
    return ranges.map(lambda r: Box(tuple(a for a, _ in r), tuple(b for _, b in r)))


def reader(voxels):
    return lambda box: voxels[box.slices_in(Box.of_shape(voxels.shape))]


def labelled(mask, block_shape, connectivity, roi=None) -> Labelling:
    return label_components(reader(mask), roi or Box.of_shape(mask.shape), block_shape=block_shape, connectivity=connectivity)


def put_together(labelling: Labelling):
    """The labels (z, y, x) of the whole roi."""
    roi = labelling.components.roi
    whole = np.full(roi.shape, -1, np.int64)
    for block in labelling.blocks:
        whole[block.slices_in(roi)] = labelling.labels(block)
    return whole


def assert_same_but_for_names(labels, want) -> None:
    assert_equal = np.testing.assert_array_equal
    assert_equal(labels > 0, want > 0)
    pairs = np.unique(np.stack([labels.ravel(), want.ravel()]), axis=1)
    assert len(set(pairs[0])) == len(set(pairs[1])) == pairs.shape[1]


@given(masks(), BLOCKS, CONNECTIVITIES)
def test_blocks_give_the_components_of_the_whole(mask, block_shape, connectivity) -> None:
    found = labelled(mask, block_shape, connectivity)
    want, n = ndimage.label(mask, STRUCTURES[connectivity])
    assert found.components.n == n
    assert_same_but_for_names(put_together(found), want)


@given(masks(max_side=5), CONNECTIVITIES)
def test_blocks_of_one_voxel_do(mask, connectivity) -> None:
    found = labelled(mask, (1, 1, 1), connectivity)
    assert_same_but_for_names(put_together(found), ndimage.label(mask, STRUCTURES[connectivity])[0])


@given(masks(), BLOCKS, CONNECTIVITIES)
def test_the_table_measures_every_component(mask, block_shape, connectivity) -> None:
    found = labelled(mask, block_shape, connectivity)
    labels, table = put_together(found), found.components
    index = range(1, table.n + 1)
    np.testing.assert_array_equal(table.sizes, np.bincount(labels.ravel(), minlength=table.n + 1)[1:])
    boxes = [[(s.start, s.stop) for s in box] for box in ndimage.find_objects(labels)]
    np.testing.assert_array_equal(np.stack([table.begins, table.ends], axis=2), np.array(boxes).reshape(table.n, 3, 2))
    for axis, coordinates in enumerate(np.indices(mask.shape)):
        np.testing.assert_array_equal(table.coordinate_sums[:, axis], ndimage.sum_labels(coordinates, labels, index))
    centres = np.array(ndimage.center_of_mass(mask, labels, index)).reshape(table.n, 3)
    np.testing.assert_allclose(table.centroids, centres, rtol=1e-12)
    assert {a.dtype for a in (table.sizes, table.begins, table.ends, table.coordinate_sums)} == {np.dtype(np.int64)}


@given(masks(), BLOCKS)
def test_touching_is_having_a_voxel_on_a_face(mask, block_shape) -> None:
    found = labelled(mask, block_shape, 26)
    labels = put_together(found)
    long_axes = [axis for axis in range(3) if mask.shape[axis] > 1] or [0, 1, 2]
    on_faces = {label for axis in long_axes for label in np.unique(labels.take([0, -1], axis)) if label}
    assert {i + 1 for i in np.flatnonzero(found.components.touches_faces)} == on_faces


def test_a_lone_slice_touches_at_its_border_only() -> None:
    image = np.zeros((1, 7, 7), bool)
    image[0, 3, 3] = image[0, 0, 5] = True
    assert sorted(labelled(image, (4, 4, 4), 6).components.touches_faces) == [False, True]


@given(st.data(), masks(), BLOCKS, CONNECTIVITIES)
def test_a_roi_is_a_volume_of_its_own(data, mask, block_shape, connectivity) -> None:
    roi = data.draw(boxes_inside(mask.shape))
    found = labelled(mask, block_shape, connectivity, roi)
    alone = labelled(mask[roi.slices_in(Box.of_shape(mask.shape))], mask.shape, connectivity)
    assert_same_but_for_names(put_together(found), put_together(alone))
    in_order = np.lexsort(found.components.begins.T), np.lexsort(alone.components.begins.T)
    shifted = alone.components.begins[in_order[1]] + roi.begin
    np.testing.assert_array_equal(found.components.begins[in_order[0]], shifted)


@given(st.data(), BLOCKS)
def test_blocks_lie_on_the_volumes_grid_and_make_up_the_roi(data, block_shape) -> None:
    roi = data.draw(boxes_inside((13, 11, 12)))
    covered = np.zeros(roi.shape, int)
    for block in grid_blocks(roi, block_shape):
        covered[block.slices_in(roi)] += 1
        assert block.snapped(block_shape).shape == block_shape
    assert (covered == 1).all()


def test_a_snake_through_every_block_is_one_object() -> None:
    """A path that turns at every block, so that hundreds of pieces are joined in a long chain."""
    snake = np.zeros((9, 21, 21), bool)
    for z in range(0, 9, 2):
        for y in range(0, 21, 2):
            snake[z, y] = True
            snake[z, y + 1 : y + 2, [0, -1][y // 2 % 2]] = True
        snake[z + 1 : z + 2, 20 if z // 2 % 2 == 0 else 0, 20 if z // 2 % 2 == 0 else 0] = True
    assert ndimage.label(snake)[1] == 1
    components = labelled(snake, (2, 3, 2), 6).components
    assert (components.n, components.sizes.tolist()) == (1, [np.count_nonzero(snake)])


@pytest.mark.parametrize("shape", [(1, 1, 9), (1, 9, 9), (9, 9, 1), (9, 9, 9)])
@pytest.mark.parametrize("block_shape", [(1, 1, 1), (1, 3, 3), (3, 3, 3), (9, 9, 9)])
def test_as_many_objects_as_can_be(shape, block_shape) -> None:
    lattice = (np.indices(shape) % 2 == 0).all(axis=0)
    components = labelled(lattice, block_shape, 26).components
    assert components.sizes.tolist() == [1] * np.count_nonzero(lattice)


def test_objects_that_meet_at_a_corner_of_four_blocks() -> None:
    corner = np.zeros((4, 4, 4), bool)
    corner[1, 2, 1] = corner[2, 1, 2] = True
    assert labelled(corner, (2, 2, 2), 26).components.n == 1
    assert labelled(corner, (2, 2, 2), 6).components.n == 2


def test_names_depend_on_neither_dtype_nor_memory_order() -> None:
    mask = np.random.default_rng(7).random((9, 8, 7)) < 0.05  # many small objects, so that there is an order
    want = put_together(labelled(mask, (4, 3, 5), 26))
    for same in (np.asfortranarray(mask), mask.astype(np.uint8) * 255, -mask.astype(np.int64)):
        np.testing.assert_array_equal(put_together(labelled(same, (4, 3, 5), 26)), want)


@given(st.integers(1, 60), st.integers(0, 80), st.booleans(), st.integers(0, 2**32))
def test_pieces_are_joined_as_scipy_joins_a_graph(n, n_pairs, is_chain, seed) -> None:
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, n, (n_pairs, 2))
    if is_chain:  # one long path through pieces in any order
        order = rng.permutation(n)
        pairs = np.stack([order[:-1], order[1:]], axis=1)
    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    _, labels = csgraph.connected_components(graph, directed=False)
    lowest = [np.flatnonzero(labels == label)[0] for label in labels]
    np.testing.assert_array_equal(_join(n, pairs), lowest)


@given(masks(), BLOCKS)
def test_select_keeps_the_chosen(mask, block_shape) -> None:
    found = labelled(mask, block_shape, 26)
    chosen = np.arange(found.components.n) % 3 == 1
    labels = put_together(found)
    for block in found.blocks:
        selected = found.select(block, chosen)
        assert selected.dtype == np.uint8
        np.testing.assert_array_equal(
            selected, np.isin(labels[block.slices_in(found.components.roi)], np.flatnonzero(chosen) + 1)
        )


def test_sums_are_exact_in_large_blocks() -> None:
    """Where a sum of float32, or of 32-bit integers, no longer is."""
    mask = np.ones((2, 1500, 1500), np.uint8)
    mask[1, 700, 3] = 0
    components = labelled(mask, (2, 1500, 1500), 6).components
    n = 1500 * 1500
    assert components.coordinate_sums.tolist() == [[n - 1, 2 * 750 * 1499 * 1500 - 700, 2 * 750 * 1499 * 1500 - 3]]


def test_each_block_is_read_once_and_nothing_else() -> None:
    mask = np.random.default_rng(7).random((6, 7, 8)) < 0.4
    boxes, calls = [], []
    roi = Box((1, 0, 2), (6, 7, 7))

    def read(box):
        boxes.append(box)
        return reader(mask)(box)

    label_components(read, roi, block_shape=(2, 4, 3), connectivity=26, progress=lambda *done: calls.append(done))
    assert boxes == list(grid_blocks(roi, (2, 4, 3)))
    assert [of for _, of in calls] == [roi.n_voxels] * len(boxes)
    assert calls[-1][0] == roi.n_voxels
    assert calls == sorted(calls)


def test_faces_kept_are_those_of_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdunet_infer import components

    kept = []
    add = components._Seams.add

    def counted(self, *args):
        add(self, *args)
        kept.append(len(self._faces))

    monkeypatch.setattr(components._Seams, "add", counted)
    labelled(np.ones((40, 6, 6), bool), (2, 2, 2), 26)
    assert max(kept) <= 9 + 3 * 9  # the layer below with one face each, this one with three


def test_a_mask_that_changes_is_refused() -> None:
    mask = np.zeros((4, 4, 4), np.uint8)
    found = labelled(mask, (2, 4, 4), 26)
    mask[3, 3, 3] = 1
    with pytest.raises(VolumeError, match=r"mask changed at voxels 2:4,0:4,0:4 \(z,y,x\) while .*; let nothing else write"):
        found.labels(Box((2, 0, 0), (4, 4, 4)))


def test_other_boxes_than_the_blocks_are_refused() -> None:
    found = labelled(np.zeros((4, 4, 4), bool), (2, 4, 4), 26)
    with pytest.raises(GeometryError, match=r"box 0:4,0:4,0:4 is none of the blocks that were labelled; ask for one"):
        found.labels(Box.of_shape((4, 4, 4)))
