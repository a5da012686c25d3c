"""To test engines and sources with: the dumb oracle, a probe engine, arrays as volumes, and the contracts.

Shipped, so that others can test their own. Contracts are base classes for pytest; nothing here imports it.
"""
# ruff: noqa: D102  the name of a test says what it promises

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdunet_infer.blockwise import Engine, Float32Array, Source, UInt8Array
from kdunet_infer.card import ModelCard
from kdunet_infer.engines import check_tiles
from kdunet_infer.errors import EngineInputError
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.mirror import read_mirrored
from kdunet_infer.model import Model


def noise(shape: ZYX, seed: int = 7) -> UInt8Array:
    """Uniform noise (z, y, x) uint8: no two places look alike, so that nothing wrong can hide."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def segment_whole(image: UInt8Array, engine: Engine, card: ModelCard) -> Float32Array:
    """The oracle: probability (z, y, x) float32 of `image` (z, y, x) uint8, each slice mirrored and run whole."""
    halo_y, halo_x = card.halo_zyx[1:]
    n_y, n_x = image.shape[1:]
    fill_y, fill_x = (-n % stride for n, stride in zip((n_y, n_x), card.stride_zyx[1:], strict=True))
    margins = ((halo_y, halo_y + fill_y), (halo_x, halo_x + fill_x))
    whole = [engine.infer(np.pad(image_slice, margins, mode="reflect")[None])[0] for image_slice in image]
    return np.stack(whole)[:, halo_y : halo_y + n_y, halo_x : halo_x + n_x]


class ProbeEngine:
    """A cheap stand-in for a network that feels its context and its place, exactly.

    A stencil of `radius` voxels in y and x (zero beyond the tile, as a network pads) is followed by a sum over each cell of the
    `stride` grid of the tile, both with weights that differ from place to place. All of it is arithmetic of uint8, which wraps
    around 256: as the weights are odd, one voxel that differs within the stencil always changes the answer.
    """

    def __init__(self, radius: int, stride: int) -> None:
        self.card = probe_card(radius, stride)
        self._radius = radius
        self._stride = stride

    def infer(self, tiles: UInt8Array) -> Float32Array:
        """A number in [0, 1] for each pixel: (n, y, x) float32 of tiles (n, y, x) uint8."""
        check_tiles(tiles, self.card.stride_zyx)
        felt = _stencil(_stencil(tiles, self._radius, axis=1, first=3), self._radius, axis=2, first=11)
        n, y, x = tiles.shape
        s = self._stride
        cells = felt.reshape(n, y // s, s, x // s, s)
        place = (2 * np.arange(s * s, dtype=np.uint8) + 1).reshape(s, 1, s)  # odd; differs within a cell
        pooled = (cells * place).sum(axis=(2, 4), keepdims=True, dtype=np.uint8)
        code: UInt8Array = (cells + np.uint8(2) * pooled) * place + place
        return code.reshape(n, y, x).astype(np.float32) / np.float32(255)

    def describe(self) -> str:
        """One line for reports."""
        return f"probe of radius {self._radius} and stride {self._stride}"


def probe_card(radius: int, stride: int) -> ModelCard:
    """A card of stride (1, stride, stride) whose halo is `radius` rounded up to it."""
    halo = -(-radius // stride) * stride
    return ModelCard(name="probe", version="0", stride_zyx=(1, stride, stride), halo_zyx=(0, halo, halo), threshold=0.5)


def _stencil(tiles: UInt8Array, radius: int, axis: int, first: int) -> UInt8Array:
    """Sum modulo 256 of each voxel's neighbours along `axis`, weighted first, first + 2, ...; zero beyond the tile."""
    margins = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
    padded = np.pad(tiles, margins)
    length = tiles.shape[axis]
    felt = np.zeros_like(tiles)
    for shift in range(2 * radius + 1):
        neighbours = padded.take(range(shift, shift + length), axis=axis)
        felt += neighbours * np.uint8((first + 2 * shift) % 256)
    return felt


class ArraySource:
    """An array (z, y, x) uint8 as a Source; `boxes` are the reads asked for, in order."""

    def __init__(self, voxels: UInt8Array) -> None:
        self.voxels = voxels
        self.boxes: list[Box] = []

    @property
    def shape(self) -> ZYX:
        """Voxels, zyx."""
        z, y, x = self.voxels.shape
        return z, y, x

    def read_box(self, box: Box) -> UInt8Array:
        """Voxels (z, y, x) of `box`, mirrored beyond the faces."""
        self.boxes.append(box)
        whole = Box.of_shape(self.shape)
        return read_mirrored(lambda inside: self.voxels[inside.slices_in(whole)], self.shape, box)


class ArrayTarget:
    """An array (z, y, x) uint8 as a Target; `n_writes` counts the writes of each voxel."""

    def __init__(self, shape: ZYX) -> None:
        self.shape = shape
        self.voxels: UInt8Array = np.zeros(shape, np.uint8)
        self.n_writes: npt.NDArray[np.int64] = np.zeros(shape, np.int64)

    def write_box(self, box: Box, voxels: UInt8Array) -> None:
        """Store `voxels` at `box`; a box that leaves the volume or has another shape is refused."""
        assert voxels.shape == box.shape, f"{voxels.shape} voxels for {box}"
        where = box.slices_in(Box.of_shape(self.shape))
        self.voxels[where] = voxels
        self.n_writes[where] += 1


class EngineContract:
    """What every engine does. Subclass it as `Test...`, say how to make one, and give pytest a fixture `model` (a Model)."""

    def make(self, model: Model) -> Engine:
        """The engine under test, running `model`."""
        raise NotImplementedError

    def test_probability_has_the_shape_of_the_tiles(self, model: Model) -> None:
        found = self.make(model).infer(_tiles(model))
        assert found.shape == _tiles(model).shape, f"shape {found.shape}, expected {_tiles(model).shape}"
        assert found.dtype == np.float32, f"dtype {found.dtype}, expected float32"

    def test_probability_is_within_0_and_1_and_not_constant(self, model: Model) -> None:
        found = self.make(model).infer(_tiles(model))
        assert 0 <= found.min() < found.max() <= 1, f"values from {found.min()} to {found.max()}"

    def test_a_batch_equals_its_tiles_one_by_one(self, model: Model) -> None:
        engine = self.make(model)
        one_by_one = [engine.infer(tile[None])[0] for tile in _tiles(model)]
        assert np.array_equal(engine.infer(_tiles(model)), np.stack(one_by_one))

    def test_the_same_tiles_give_the_same_bits(self, model: Model) -> None:
        engine = self.make(model)
        first = engine.infer(_tiles(model)).copy()  # an engine may not hand out the buffer that it writes next
        engine.infer(255 - _tiles(model))
        assert np.array_equal(engine.infer(_tiles(model)), first)

    def test_a_result_outlives_the_next_call(self, model: Model) -> None:
        engine = self.make(model)
        found = engine.infer(_tiles(model))
        kept = found.copy()
        engine.infer(255 - _tiles(model))
        assert np.array_equal(found, kept)

    def test_a_view_with_gaps_equals_its_copy_and_is_left_alone(self, model: Model) -> None:
        stride_y, stride_x = model.card.stride_zyx[1:]
        wide = noise((2, 7 * stride_y, 9 * stride_x))
        before = wide.copy()
        view = wide[:, stride_y : 5 * stride_y, stride_x : 7 * stride_x]
        engine = self.make(model)
        assert np.array_equal(engine.infer(view), engine.infer(view.copy()))
        assert np.array_equal(wide, before)

    def test_sizes_may_change_from_call_to_call(self, model: Model) -> None:
        engine = self.make(model)
        engine.infer(_tiles(model)[:, : model.card.stride_zyx[1]])
        assert np.array_equal(engine.infer(_tiles(model)), self.make(model).infer(_tiles(model)))

    def test_sizes_off_the_stride_are_refused(self, model: Model) -> None:
        for axis in (1, 2):
            if model.card.stride_zyx[axis] > 1:
                self._assert_refused(model, np.delete(_tiles(model), -1, axis=axis), "stride")
            self._assert_refused(model, _tiles(model).take([], axis=axis), "stride")

    def test_other_dtypes_are_refused(self, model: Model) -> None:
        self._assert_refused(model, _tiles(model).astype(np.float32), "uint8")

    def test_other_ranks_are_refused(self, model: Model) -> None:
        self._assert_refused(model, _tiles(model)[0], "(n, y, x)")
        self._assert_refused(model, _tiles(model)[:, None], "(n, y, x)")

    def test_describe_is_one_line(self, model: Model) -> None:
        line = self.make(model).describe()
        assert line, "an empty description"
        assert "\n" not in line, f"more than one line: {line!r}"

    def _assert_refused(self, model: Model, tiles: npt.NDArray[np.generic], says: str) -> None:
        engine = self.make(model)
        message = _message(EngineInputError, lambda: engine.infer(tiles))  # type: ignore[arg-type]
        assert says in message, f"{message!r} does not say {says!r}"


class SourceContract:
    """What every source does. Subclass it as `Test...` and say how to make one."""

    def make(self, voxels: UInt8Array, folder: Path) -> Source:
        """The source under test, holding `voxels` (z, y, x); `folder` is empty and its own."""
        raise NotImplementedError

    def test_shape(self, tmp_path: Path) -> None:
        assert self.make(noise((5, 13, 17)), tmp_path).shape == (5, 13, 17)

    def test_a_box_inside_equals_slicing(self, tmp_path: Path) -> None:
        voxels = noise((5, 13, 17))
        source = self.make(voxels, tmp_path)
        for box in (Box.of_shape((5, 13, 17)), Box((1, 2, 3), (2, 13, 9)), Box((4, 12, 16), (5, 13, 17))):
            found = source.read_box(box)
            assert found.dtype == np.uint8, f"dtype {found.dtype}, expected uint8"
            assert np.array_equal(found, voxels[box.slices_in(Box.of_shape((5, 13, 17)))]), f"box {box}"

    def test_beyond_the_faces_it_is_mirrored_as_by_np_pad(self, tmp_path: Path) -> None:
        voxels = noise((3, 4, 6))
        source = self.make(voxels, tmp_path)
        frame = Box.of_shape((3, 4, 6)).grown((2, 9, 15))  # further than the volume is long
        padded = np.pad(voxels, ((2, 2), (9, 9), (15, 15)), mode="reflect")
        for box in (frame, Box((0, -9, 2), (1, 3, 21)), Box((-1, 0, 7), (2, 4, 9))):
            assert np.array_equal(source.read_box(box), padded[box.slices_in(frame)]), f"box {box}"

    def test_one_voxel_is_mirrored_without_end(self, tmp_path: Path) -> None:
        source = self.make(noise((1, 1, 1)), tmp_path)
        assert np.array_equal(source.read_box(Box((-1, -3, -2), (2, 5, 4))), np.full((3, 8, 6), noise((1, 1, 1))[0, 0, 0]))


def _tiles(model: Model) -> UInt8Array:
    stride_y, stride_x = model.card.stride_zyx[1:]
    return noise((3, 4 * stride_y, 6 * stride_x))


def _message(error: type[Exception], call: Callable[[], object]) -> str:
    try:
        call()
    except error as exc:
        return str(exc)
    raise AssertionError(f"no {error.__name__} was raised")
