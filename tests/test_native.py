"""Engine `native`: right to float32, the same bits however it is tiled, and no row made, kept or read that should not be."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from onnx import helper, numpy_helper
from small_models import small_card, unet_onnx

from kdunet_infer.blockwise import Range, UInt8Array, WindowEngine, batch_size_of, compute_block, read_block
from kdunet_infer.card import METADATA_KEY
from kdunet_infer.engines import auto_engine, create_engine
from kdunet_infer.engines.native import NativeEngine
from kdunet_infer.engines.native.graph import Network, read_network
from kdunet_infer.engines.native.machine import NARROW, SMALL, WIDE, Machine
from kdunet_infer.engines.native.schedule import ROWS_PER_STEP, Kind, Task, make_schedule, rows_done, unet_layers
from kdunet_infer.engines.onnxruntime import OnnxRuntimeEngine
from kdunet_infer.errors import EngineError, EngineInputError, UnsupportedModel
from kdunet_infer.geometry import Box
from kdunet_infer.model import Model
from kdunet_infer.phantom import phantom_box
from kdunet_infer.plan import plan_segmentation
from kdunet_infer.testing import ArraySource, EngineContract, ProbeEngine, noise, segment_whole

MACHINES = {"wide": WIDE, "narrow": NARROW, "small": SMALL}
"""Registers of AVX-512, AVX2 and NEON. LLVM cuts wide ones where the host has narrower ones, so each runs anywhere."""


class TestNativeEngine(EngineContract):
    def make(self, model: Model) -> NativeEngine:
        return NativeEngine(model, n_threads=2)


class TestNativeEngineOnAvx2(EngineContract):
    def make(self, model: Model) -> NativeEngine:
        return NativeEngine(model, n_threads=1, machine=NARROW)


class TestNativeEngineOnNeon(EngineContract):
    def make(self, model: Model) -> NativeEngine:
        return NativeEngine(model, n_threads=1, machine=SMALL)


@pytest.fixture(scope="module")
def student() -> Model:
    return Model.load("phantom-2unet")


def exactly(network: Network, tiles: UInt8Array) -> npt.NDArray[np.float64]:
    """The network in float64, by scipy's correlation and einsum."""
    maps: list[npt.NDArray[np.float64]] = []
    for layer, own in zip(network.layers, network.parameters, strict=True):
        parameters = [parameter.astype(np.float64) for parameter in own]
        read = np.concatenate([maps[i] for i in layer.inputs], axis=1) if layer.inputs else tiles[:, None].astype(np.float64)
        n, _, y, x = read.shape
        if layer.kind is Kind.NORMALISE:
            made = (read - parameters[0]) / parameters[1]
        elif layer.kind is Kind.CONVOLVE:
            sums = [
                sum(scipy.ndimage.correlate(read[:, i], kernel[None], mode="constant") for i, kernel in enumerate(kernels))
                for kernels in parameters[0]
            ]
            made = np.maximum(np.stack(sums, axis=1) + parameters[1][:, None, None], 0)
        elif layer.kind is Kind.POOL:
            made = read.reshape(n, -1, y // 2, 2, x // 2, 2).max(axis=(3, 5))
        elif layer.kind is Kind.UPSAMPLE:
            quads = np.einsum("niyx,iodf->noydxf", read, parameters[0])
            made = quads.reshape(n, -1, 2 * y, 2 * x) + parameters[1][:, None, None]
        else:
            made = 1 / (1 + np.exp(-np.einsum("niyx,oi->noyx", read, parameters[0][:, :, 0, 0]) - parameters[1]))
        maps.append(made)
    return maps[-1][:, 0]


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@settings(max_examples=12)
@given(data=st.data(), n_levels=st.integers(1, 6), width=st.sampled_from([1, 2, 3, 4, 8]), seed=st.integers(0, 2**31))
def test_it_is_as_near_to_float64_as_onnxruntime(
    machine: Machine, data: st.DataObject, n_levels: int, width: int, seed: int
) -> None:
    """Also where a map is no whole number of registers wide, as with few levels most are."""
    stride = 2 ** (n_levels - 1)
    y, x = (stride * data.draw(st.integers(1, 400 // stride)) for _ in "yx")
    model = random_unet(width if n_levels < 6 else min(width, 2), n_levels, seed)
    tiles = noise((1, y, x), seed)
    want = exactly(read_network(model), tiles)
    found = NativeEngine(model, n_threads=1, machine=machine).infer(tiles)
    other = OnnxRuntimeEngine(model, n_threads=1).infer(tiles)
    # Two float32 sums of up to 1,152 terms in different orders; on noise, random networks amplify what trained ones do not.
    assert np.abs(found - want).max() <= 1e-6 + 3 * np.abs(other - want).max()
    assert np.abs(found - want).max() <= 5e-5


def random_unet(width: int, n_levels: int, seed: int) -> Model:
    """Random weights, scaled so that features keep their size as if batch normalisation had been folded in."""
    proto = unet_onnx(n_levels, width, small_card(n_levels, halo=96), seed=seed)
    return Model.from_bytes(proto.SerializeToString(), Path(f"random-{width}.onnx"))


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_a_released_student_agrees_with_onnxruntime(student: Model, machine: Machine) -> None:
    tiles = phantom_box(Box.of_shape((2, 192, 320)), seed=3)[0]
    found = NativeEngine(student, n_threads=2, machine=machine).infer(tiles)
    want = OnnxRuntimeEngine(student, n_threads=1).infer(tiles)
    assert np.abs(found - want).max() <= 1e-5
    threshold = student.card.threshold
    flipped = (found >= threshold) != (want >= threshold)
    assert np.abs(want[flipped] - threshold).max(initial=0) <= 1e-4
    assert 0.01 < want.mean() < 0.9, "there is something to see"


@settings(max_examples=15)
@given(data=st.data(), machine=st.sampled_from(list(MACHINES.values())))
def test_a_window_is_cut_out_of_the_whole_to_the_bit(student: Model, data: st.DataObject, machine: Machine) -> None:
    tiles = noise((2, 16 * data.draw(st.integers(1, 20)), 16 * data.draw(st.integers(1, 20))))
    rows, columns = (data.draw(ranges(size)) for size in tiles.shape[1:])
    engine = NativeEngine(student, n_threads=data.draw(st.integers(1, 3)), machine=machine)
    whole = NativeEngine(student, n_threads=1, machine=machine).infer(tiles)
    want = whole[:, slice(*rows), slice(*columns)]
    assert_array_equal(engine.infer_window(tiles, rows, columns), want)
    threshold = float(data.draw(st.sampled_from(want.ravel().tolist()))) or 0.5  # the hardest: exactly a probability
    assert_array_equal(engine.mask_window(tiles, rows, columns, threshold), want >= np.float32(threshold))


def ranges(size: int) -> st.SearchStrategy[Range]:
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(sorted).filter(lambda r: r[0] < r[1]).map(tuple)


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_tiled_is_whole_to_the_bit(student: Model, threshold: float | None) -> None:
    image = phantom_box(Box.of_shape((2, 300, 410)), seed=1)[0]
    engine = NativeEngine(student, n_threads=2)
    plan = plan_segmentation(image.shape, student.card, shard_shape=(1, 100, 90), tile_shape=(64, 112))
    want = segment_whole(image, engine, student.card)
    for block in plan.blocks:
        voxels = read_block(ArraySource(image), block)
        found = compute_block(voxels, engine, plan, block, threshold=0.5, batch_size=2, with_probability=threshold is None)
        inside = block.write_box.slices_in(Box.of_shape(image.shape))
        assert_array_equal(found.mask, want[inside] >= np.float32(0.5))
        if found.probability is not None:
            assert_array_equal(found.probability, np.rint(want[inside] * np.float32(255)))


@pytest.mark.parametrize("n_tiles", [1, 2, 3, 5])
@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_threads_do_not_change_a_bit(student: Model, n_tiles: int, n_threads: int) -> None:
    tiles = noise((n_tiles, 528, 48))
    assert_array_equal(NativeEngine(student, n_threads=n_threads).infer(tiles), NativeEngine(student, n_threads=1).infer(tiles))


def test_one_engine_serves_several_callers_at_once(student: Model) -> None:
    engine = NativeEngine(student, n_threads=2)
    tiles = [noise((2, 96, 16 * width), width) for width in range(3, 7)]
    want = [engine.infer(each) for each in tiles]
    found: list[list[npt.NDArray[np.float32]]] = [[] for _ in tiles]

    def call(i: int) -> None:
        found[i].extend(engine.infer(tiles[i]) for _ in range(20))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(tiles))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for answers, right in zip(found, want, strict=True):
        assert len(answers) == 20
        assert all(np.array_equal(answer, right) for answer in answers)


def test_what_is_kept_for_further_tiles_is_bounded(student: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    one = NativeEngine(student, n_threads=1)
    one.infer(noise((1, 16, 16)))
    monkeypatch.setattr("kdunet_infer.engines.native.KEPT_BYTES", 5 * one._workspaces.n_bytes)
    engine = NativeEngine(student, n_threads=1)
    for cells in (1, 2, 3, 1, 2, 3):
        engine.infer(noise((1, 16, 16 * cells)))
        assert 0 < engine._workspaces.n_bytes <= 5 * one._workspaces.n_bytes
    engine.infer(noise((1, 16, 16 * 40)))  # more than may be kept at all
    assert engine._workspaces.n_bytes == 0
    assert engine.working_bytes((16, 640)) > 5 * one._workspaces.n_bytes


def test_a_workspace_is_used_again(student: Model) -> None:
    engine = NativeEngine(student, n_threads=1)
    engine.infer(noise((1, 32, 32)))
    n_bytes = engine._workspaces.n_bytes
    engine.infer(noise((3, 32, 32)))
    assert engine._workspaces.n_bytes == n_bytes


@pytest.mark.parametrize(
    ("rows", "columns", "says"),
    [
        ((0, 64), (0, 96), "columns 0:96 are no window of tiles of 80 columns; give one within 0:80"),
        ((-16, 5), (0, 80), "rows -16:5 are no window of tiles of 64 rows"),
        ((9, 9), (0, 80), "rows 9:9 are no window"),
        ((9, 5), (0, 80), "rows 9:5 are no window"),
    ],
)
def test_a_window_outside_the_tiles_is_refused(student: Model, rows: Range, columns: Range, says: str) -> None:
    engine = NativeEngine(student, n_threads=1)
    with pytest.raises(EngineInputError, match=says):
        engine.infer_window(noise((1, 64, 80)), rows, columns)
    with pytest.raises(EngineInputError, match=says):
        engine.mask_window(noise((1, 64, 80)), rows, columns, 0.5)


def test_nothing_beyond_the_tile_is_touched() -> None:
    """A tile that ends where memory ends; were one byte more read or written, the process would die."""
    code = """
import ctypes, mmap, numpy as np
from kdunet_infer.engines.native import NativeEngine
from kdunet_infer.engines.native.machine import NARROW, SMALL, WIDE
from kdunet_infer.model import Model
page = mmap.PAGESIZE
def at_the_end(n_bytes, dtype, shape):
    pages = -(-n_bytes // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    keep.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages * page), page, 0) == 0
    return np.frombuffer(memory, dtype, offset=pages * page - n_bytes, count=n_bytes // dtype().itemsize).reshape(shape)
keep = []
model = Model.load("phantom-2unet")
for machine in (WIDE, NARROW, SMALL):
    engine = NativeEngine(model, n_threads=1, machine=machine)
    for y, x in ((16, 16), (48, 80)):
        tile = at_the_end(y * x, np.uint8, (y, x))
        tile[:] = np.random.default_rng(0).integers(0, 256, (y, x))
        for rows, columns in (((0, y), (0, x)), ((3, y), (5, x - 1))):
            shape = (rows[1] - rows[0], columns[1] - columns[0])
            for dtype in (np.float32, np.uint8):
                out = at_the_end(shape[0] * shape[1] * dtype().itemsize, dtype, shape)
                with engine._workspaces.one((y, x), (rows, columns)) as workspace:
                    workspace.run(engine._code.run, tile, out, 0.5)
                want = engine.infer_window(tile[None].copy(), rows, columns)[0]
                assert np.array_equal(out, want if dtype is np.float32 else want >= np.float32(0.5))
print("whole")
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.stdout == "whole\n", (finished.returncode, finished.stderr)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_it_works_after_a_fork(student: Model) -> None:
    engine = NativeEngine(student, n_threads=2)
    want = engine.infer(noise((2, 32, 32)))
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(engine.infer(noise((2, 32, 32))), want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_after_an_error_the_rest_is_not_run(student: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, n_runs = NativeEngine(student, n_threads=1), []

    def fail(*_: object) -> None:
        n_runs.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr("kdunet_infer.engines.native.Workspace.run", fail)
    with pytest.raises(KeyboardInterrupt):
        engine.infer(noise((50, 16, 16)))
    assert len(n_runs) < 50


def test_every_thread_gets_work(student: Model) -> None:
    engine = NativeEngine(student, n_threads=3)
    assert list(engine._parts(1, (0, 768))) == [(0, (0, 256)), (0, (256, 512)), (0, (512, 768))]
    assert list(engine._parts(4, (0, 768)))[:3] == [(i, (0, 768)) for i in range(3)]
    assert len(list(engine._parts(4, (0, 768)))) == 6
    assert list(engine._parts(1, (0, 100))) == [(0, (0, 100))], "too little to be cut"


def test_less_than_one_thread_is_refused(student: Model) -> None:
    for n_threads in (0, -1):
        with pytest.raises(EngineError, match=f"engine 'native' cannot run on {n_threads} threads; give at least 1"):
            NativeEngine(student, n_threads=n_threads)


def test_tiles_with_gaps_along_x_are_taken(student: Model) -> None:
    engine, wide = NativeEngine(student, n_threads=1), noise((1, 64, 128))
    assert_array_equal(engine.infer(wide[:, ::-1, ::2]), engine.infer(np.ascontiguousarray(wide[:, ::-1, ::2])))


def test_nan_is_not_hidden() -> None:
    """The first convolution overflows to infinity; the second one adds it with both signs."""
    model = with_weight("w2", np.full((2, 1, 3, 3), 3e38, np.float32), levels=1)
    engine = NativeEngine(model, n_threads=1)
    tiles = noise((1, 16, 16))
    assert np.isnan(engine.infer(tiles)).any()
    assert (engine.mask_window(tiles, (0, 16), (0, 16), 0.5) == 255).any()
    plan = plan_segmentation((1, 12, 12), model.card, shard_shape=(1, 12, 12))
    with pytest.raises(EngineError, match=r"native .* returned NaN within voxels 0:1,0:12,0:12; use an engine in float32"):
        compute_block(read_block(ArraySource(tiles[:, :12, :12]), plan.block(0)), engine, plan, plan.block(0), threshold=0.5)


@pytest.mark.parametrize(("bias", "weight"), [(1e-39, 1e37), (1e-25, 5e-16)], ids=["an operand is one", "a product is one"])
def test_denormal_numbers_are_taken_for_zero(bias: float, weight: float) -> None:
    """Below 1e-38, where each costs a hundred cycles on some CPUs; what they would become is made large again to be seen."""
    is_operand = bias < 1e-38
    values = {
        "w2": np.zeros((2, 1, 3, 3)), "w3": np.full(2, bias), "w4": np.full((2, 2, 3, 3), weight), "w5": np.zeros(2),
        "w6": np.full((1, 2, 1, 1), 1.0 if is_operand else 1e38), "w7": np.zeros(1),
    }  # fmt: skip
    proto = unet_onnx(1, 2)
    for name, value in values.items():
        replace_weight(proto, name, value.astype(np.float32))
    model = Model.from_bytes(proto.SerializeToString(), Path("tiny.onnx"))
    assert OnnxRuntimeEngine(model, n_threads=1).infer(noise((1, 16, 16))).max() > 0.501, "with denormals it moves"
    assert_array_equal(NativeEngine(model, n_threads=1).infer(noise((1, 16, 16))), np.full((1, 16, 16), 0.5, np.float32))


def test_the_caller_keeps_its_denormal_numbers(student: Model) -> None:
    engine, tile, size = NativeEngine(student, n_threads=1), noise((1, 16, 16)), ((0, 16), (0, 16))
    with engine._workspaces.one((16, 16), size) as workspace:
        workspace.run(engine._code.run, tile[0], np.empty((16, 16), np.float32))  # on this thread
    assert np.full(4, 1e-39, np.float32)[1:].sum() > 0


def test_the_logistic_function_is_right_along_the_way() -> None:
    """A network that gives back its image, stretched to logits -20 to 20 in 256 steps."""
    logits = ((np.arange(256, dtype=np.float32) - 128) / 64).astype(np.float32)
    values = {
        "w2": np.zeros((2, 1, 3, 3)), "w3": np.zeros(2), "w4": np.zeros((2, 2, 3, 3)), "w5": np.zeros(2),
        "w6": np.array([10.0, -10.0]).reshape(1, 2, 1, 1), "w7": np.zeros(1),
    }  # fmt: skip
    values["w2"][0, 0, 1, 1], values["w2"][1, 0, 1, 1] = 1, -1  # ReLU parts, put together again by the head
    values["w4"][0, 0, 1, 1] = values["w4"][1, 1, 1, 1] = 1
    proto = unet_onnx(1, 2)
    for name, value in values.items():
        replace_weight(proto, name, value.astype(np.float32))
    tiles = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    found = NativeEngine(Model.from_bytes(proto.SerializeToString(), Path("ramp.onnx")), n_threads=1).infer(tiles)
    want = 1 / (1 + np.exp(-10 * logits.astype(np.longdouble)))
    assert np.abs(found.ravel() / want - 1).max() <= 3 * 2**-24 + 2**-24 * 20, "rounding of the logit times its size"
    assert np.ptp(found) > 0.99


@pytest.mark.parametrize("logit", [-200.0, -88.0, -20.0, -1e-3, 0.0, 0.5, 17.0, 90.0, 1e30])
def test_the_logistic_function_is_right_far_and_near(logit: float) -> None:
    model = with_weight("w7", np.array([logit], np.float32), levels=1, others=0.0)
    want = 1 / (1 + np.exp(-np.longdouble(np.float32(logit))))
    found = NativeEngine(model, n_threads=1).infer(noise((1, 16, 16)))
    # relative where p is small; below exp(-87) float32 ends
    assert np.abs(found - want).max() <= 3e-7 * want + 2e-38


def with_weight(name: str, value: npt.NDArray[np.float32], *, levels: int, others: float | None = None) -> Model:
    proto = unet_onnx(levels, 2)
    if others is not None:
        for tensor in list(proto.graph.initializer)[2:]:
            replace_weight(proto, tensor.name, np.full(tuple(tensor.dims), others, np.float32))
    replace_weight(proto, name, value)
    return Model.from_bytes(proto.SerializeToString(), Path("changed.onnx"))


def replace_weight(proto: onnx.ModelProto, name: str, value: npt.NDArray[np.float32]) -> None:
    (tensor,) = (tensor for tensor in proto.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value, name))


# the schedule: integers alone


@settings(max_examples=40)
@given(data=st.data(), n_levels=st.integers(1, 6))
def test_every_needed_row_is_made_once_of_rows_that_are_there(data: st.DataObject, n_levels: int) -> None:
    layers = unet_layers(2, n_levels)
    size = 2 ** (n_levels - 1) * data.draw(st.integers(1, 40))
    window = data.draw(ranges(size))
    made = make_schedule(layers, (size, size), (window, window))
    rings: list[dict[int, int]] = [{} for _ in layers]  # slot -> the row in it
    rows_made: list[list[int]] = [[] for _ in layers]
    for step in range(*made.steps):
        for index, task in enumerate(made.tasks):
            for row in rows_of(task, step):
                for source, wanted in reads(task, row, size, made.tasks):
                    ring = made.tasks[source].n_buffer_rows
                    assert rings[source].get(wanted % ring) == wanted, f"step {step}: {task.layer} misses row {wanted}"
                rows_made[index].append(row)
                if task.n_buffer_rows:
                    rings[index][row % task.n_buffer_rows] = row
    for task, rows in zip(made.tasks, rows_made, strict=True):
        assert rows == list(range(*task.rows))
    assert made.tasks[-1].rows == window


def rows_of(task: Task, step: int) -> range:
    """The rows of its own level that a task makes in a step, as the compiled driver reckons them."""
    pair = 2 if task.layer.kind is Kind.UPSAMPLE else 1
    low, high = (row // pair for row in task.rows)
    begin, end = (min(max(rows_done(task, s), low), high) for s in (step - 1, step))
    return range(pair * begin, pair * end)


def reads(task: Task, row: int, size: int, tasks: tuple[Task, ...]) -> list[tuple[int, int]]:
    """(layer, row) of everything that a row is made of, but for the zeros beyond the map."""
    found = []
    for source in task.layer.inputs:
        rows = {
            Kind.CONVOLVE: range(row - 1, row + 2),
            Kind.POOL: range(2 * row, 2 * row + 2),
            Kind.UPSAMPLE: range(row // 2, row // 2 + 1),
        }.get(task.layer.kind, range(row, row + 1))
        found += [(source, r) for r in rows if 0 <= r < size >> tasks[source].layer.level]
    return found


def test_the_last_layer_lags_by_the_receptive_field() -> None:
    made = make_schedule(unet_layers(2, 5), (512, 512), ((200, 300), (200, 300)))
    assert made.tasks[-1].lag == 94
    image = made.tasks[0]
    assert image.rows[0] >= 200 - 94 - 16
    assert image.rows[1] <= 300 + 94 + 16


def test_a_ring_holds_a_few_rows_whatever_the_height() -> None:
    rows = [
        sum(t.n_buffer_rows for t in make_schedule(unet_layers(2, 5), (y, 64), ((0, y), (0, 64))).tasks) for y in (512, 4096)
    ]
    assert rows[0] == rows[1] < 400


# which graphs are taken


def changed(**attributes: object) -> onnx.ModelProto:
    """The first convolution with other attributes."""
    proto = unet_onnx(2, 2)
    node = next(node for node in proto.graph.node if node.op_type == "Conv")
    for name, value in attributes.items():
        for old in [old for old in node.attribute if old.name == name]:
            node.attribute.remove(old)
        node.attribute.append(helper.make_attribute(name, value))
    return proto


def without(kind: str, attribute: str) -> onnx.ModelProto:
    proto = unet_onnx(2, 2)
    node = next(node for node in proto.graph.node if node.op_type == kind)
    kept = [one for one in node.attribute if one.name != attribute]
    del node.attribute[:]
    node.attribute.extend(kept)
    return proto


def test_a_card_of_another_stride_is_refused() -> None:
    proto = unet_onnx(3, 2, small_card(2))
    model = Model.from_bytes(proto.SerializeToString(), Path("other.onnx"))
    with pytest.raises(UnsupportedModel, match=r"3 levels need a stride of 4, and the card says \(2, 2\)"):
        NativeEngine(model)


def renamed(old: str, new: str) -> onnx.ModelProto:
    proto = unet_onnx(2, 2)
    next(node for node in reversed(proto.graph.node) if node.op_type == old).op_type = new
    return proto


def reshaped(name: str, value: npt.NDArray[np.float32]) -> onnx.ModelProto:
    proto = unet_onnx(2, 2)
    replace_weight(proto, name, value)
    return proto


def swapped_concat() -> onnx.ModelProto:
    proto = unet_onnx(2, 2)
    node = next(node for node in proto.graph.node if node.op_type == "Concat")
    node.input[:] = list(reversed(node.input))
    return proto


@pytest.mark.parametrize(
    ("proto", "says"),
    [
        (changed(dilations=[2, 2], pads=[2] * 4), r"is a Conv whose dilations is \[2, 2\]"),
        (changed(pads=[0, 0, 2, 2]), r"is a Conv of \(3, 3\) with the padding \[0, 0, 2, 2\]"),
        (renamed("Relu", "LeakyRelu"), "is not followed by one Relu"),
        (renamed("MaxPool", "AveragePool"), "is not followed by one Conv of relu|is not followed by one "),
        (without("MaxPool", "strides"), r"is a MaxPool whose strides is \[1, 1\]"),
        (without("ConvTranspose", "strides"), r"is a ConvTranspose whose strides is \[1, 1\]"),
        (reshaped("w0", np.zeros(2, np.float32)), r"mean and deviation have the shapes \(2,\) and \(\)"),
        (renamed("Sigmoid", "Tanh"), "is not followed by one Sigmoid"),
        (swapped_concat(), "is not followed by one Concat of "),
        (reshaped("w2", np.zeros((3, 1, 3, 3), np.float32)), "stand where a k-Unet has"),
        (reshaped("w2", np.full((2, 1, 3, 3), np.nan, np.float32)), "'w2' holds NaN or infinity"),
    ],
    ids=["dilated", "padded", "leaky", "average", "pool", "up", "mean", "tanh", "concat", "shape", "nan"],
)
def test_another_graph_is_refused(proto: onnx.ModelProto, says: str) -> None:
    helper.set_model_props(proto, {METADATA_KEY: small_card(2).to_json()})
    model = Model.from_bytes(proto.SerializeToString(), Path("other.onnx"))
    with pytest.raises(
        UnsupportedModel, match=rf"^engine 'native' runs k-Unets .* in other\.onnx .*({says}).*; use --engine onnxruntime\.$"
    ):
        NativeEngine(model)


def test_auto_falls_back_where_the_network_is_another() -> None:
    proto = renamed("Relu", "Softplus")
    model = Model.from_bytes(proto.SerializeToString(), Path("other.onnx"))
    engine, why = auto_engine(model, device="cpu", n_threads=1)
    assert not isinstance(engine, NativeEngine)
    assert "not here: native on cpu" in why


def test_auto_takes_it_on_a_cpu(student: Model) -> None:
    engine, why = auto_engine(student, device="cpu", n_threads=1)
    assert isinstance(engine, NativeEngine)
    assert why.startswith("native (llvmlite ")
    assert "1 thread" in why


def test_there_is_no_other_device(student: Model) -> None:
    with pytest.raises(EngineError, match="engine 'native' has no device 'cuda'; it runs on cpu"):
        create_engine("native", student, device="cuda")


@pytest.mark.parametrize("engine", ["native", "onnxruntime"])
def test_there_is_no_other_precision(student: Model, engine: str) -> None:
    with pytest.raises(EngineError, match=f"engine '{engine}' has no precision 'bf16'; it computes in fp32"):
        create_engine(engine, student, precision="bf16")
    assert create_engine(engine, student, precision="fp32", n_threads=1)


def test_without_llvmlite_it_says_what_to_install(student: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def refuse(name: str) -> object:
        if name.startswith("kdunet_infer.engines.native"):
            raise ModuleNotFoundError("No module named 'llvmlite'", name="llvmlite")
        return real(name)

    monkeypatch.setattr("kdunet_infer.engines.importlib.import_module", refuse)
    with pytest.raises(EngineError, match=r"Engine 'native' needs 'llvmlite': pip install 'llvmlite>=0\.45'"):
        create_engine("native", student)


def test_the_batch_is_what_the_engine_likes(student: Model) -> None:
    assert batch_size_of(NativeEngine(student, n_threads=3)) == 12
    assert batch_size_of(ProbeEngine(1, 2)) == 1
    assert isinstance(NativeEngine(student, n_threads=1), WindowEngine)
    assert ROWS_PER_STEP % 16 == 0, "rows of a five-level network come in whole pairs"
