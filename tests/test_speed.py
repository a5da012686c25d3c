"""What is measured, in which turns, and how it is told; how fast anything is, no test says."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

import kdunet_infer.cli
from kdunet_infer import speed
from kdunet_infer.blockwise import Float32Array, UInt8Array
from kdunet_infer.engines import ENGINES
from kdunet_infer.errors import EngineError
from kdunet_infer.geometry import Box
from kdunet_infer.model import Model
from kdunet_infer.phantom import phantom_box
from kdunet_infer.speed import Contender, Speed, core_run, measure, mirrored, race, synthetic_slices, table
from kdunet_infer.testing import ProbeEngine, noise, segment_whole


class Clock:
    """Time that passes only where a run says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return clock


class Fake:
    """An engine whose every tile takes as long as it has pixels, in microseconds."""

    def __init__(self, model: Model, clock: Clock, n_threads: int | None = None, precision: str = "fp32") -> None:
        if precision == "none":
            raise EngineError("no such precision; take another.")
        self._clock, self._precision, self._n_threads = clock, precision, n_threads

    def infer(self, tiles: UInt8Array) -> Float32Array:
        if self._precision == "broken":
            raise EngineError("memory ran out; take smaller tiles.")
        self._clock.now += tiles.size * 1e-6
        return np.zeros(tiles.shape, np.float32)

    def describe(self) -> str:
        return f"fake on {self._n_threads} threads"


@pytest.fixture
def fake(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("fake")
    module.Engine = functools.partial(Fake, clock=clock)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake", module)
    monkeypatch.setitem(ENGINES, "fake", ("fake:Engine", "pip install fake"))


def test_every_engine_of_the_table_is_measured() -> None:
    found = list(speed.contenders())
    assert {contender.engine for contender in found} == set(ENGINES)
    assert len({contender.name for contender in found}) == len(found)
    assert {"onnxruntime", "onnxruntime cuda", "openvino", "openvino bf16"} <= {contender.name for contender in found}


def test_output_pixels_count_and_the_halo_does_not(model: Model, fake: None) -> None:
    """31 x 50 becomes 32 x 50 on the stride of 2, and each tile is 52 x 70 with its halo of 10."""
    (found,) = measure(model, [Contender("fake")], size=(31, 50), n_threads=3, seconds=0)
    assert found.pixels_per_second == pytest.approx(1e6 * 32 * 50 / (52 * 70))
    assert (found.name, found.description, found.refusal) == ("fake", "fake on 3 threads", "")


def test_what_cannot_run_is_told_and_the_others_are_measured(model: Model, fake: None) -> None:
    options = [{"precision": "none"}, {"precision": "broken"}, {}]
    refused, broken, good = measure(model, [Contender("fake", o) for o in options], size=(32, 32), seconds=0)
    assert refused == Speed("fake none", refusal="no such precision; take another.")
    assert broken == Speed("fake broken", refusal="memory ran out; take smaller tiles.")
    assert good.pixels_per_second > 0
    (unknown,) = measure(model, [Contender("warp")], size=(32, 32), seconds=0)
    assert "no engine is called 'warp'" in unknown.refusal


def test_engines_take_turns_round_by_round(clock: Clock) -> None:
    calls: list[str] = []

    def run(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            clock.sleep(seconds)

        return call

    times = race({"slow": run("slow", 5.0), "fast": run("fast", 0.75)}, seconds=6.0, n_rounds=3)
    assert "".join(name[0] for name in calls) == 3 * "sfff"  # two seconds a turn, and never less than a call
    assert times == {"slow": pytest.approx([5.0] * 3), "fast": pytest.approx([0.75] * 3)}


def test_the_core_is_what_segment_computes() -> None:
    engine, slices = ProbeEngine(radius=3, stride=2), noise((2, 32, 48))
    run, n_at_once = core_run(engine, mirrored(slices, engine.card.halo_zyx[1:]), engine.card.halo_zyx[1:])
    assert n_at_once == 1
    found = [run()[0] for _ in range(3)]
    want = segment_whole(slices, engine, engine.card)
    np.testing.assert_array_equal(np.stack(found), want[[0, 1, 0]])  # tile after tile, and again from the first


class Windows(ProbeEngine):
    """A probe that computes windows, three tiles at once."""

    batch_size = 3

    def infer(self, tiles: UInt8Array) -> Float32Array:
        raise AssertionError("a whole tile was computed")

    def infer_window(self, tiles: UInt8Array, rows: tuple[int, int], columns: tuple[int, int]) -> Float32Array:
        return super().infer(tiles)[:, slice(*rows), slice(*columns)]

    def mask_window(self, tiles: UInt8Array, rows: object, columns: object, threshold: float) -> UInt8Array:
        raise AssertionError("probabilities are compared")

    def working_bytes(self, tile_shape: tuple[int, int]) -> int:
        return 0


def test_an_engine_that_computes_windows_is_asked_for_the_cores_alone() -> None:
    engine, slices = Windows(radius=3, stride=2), noise((2, 32, 48))
    run, n_at_once = core_run(engine, mirrored(slices, engine.card.halo_zyx[1:]), engine.card.halo_zyx[1:])
    assert n_at_once == 3
    want = segment_whole(slices, ProbeEngine(radius=3, stride=2), engine.card)
    for places in ([0, 1, 0], [1, 0, 1], [0, 1, 0]):
        np.testing.assert_array_equal(run(), want[places])


def test_the_halo_is_mirrored_without_repeating_the_edge() -> None:
    assert mirrored(np.array([[[1, 2, 3]]], np.uint8), (0, 2)).tolist() == [[[3, 2, 1, 2, 3, 2, 1]]]


@pytest.mark.parametrize("size", [(48, 400), (300, 32)])
def test_synthetic_slices_are_the_phantom_mirrored_on(size: tuple[int, int]) -> None:
    found = synthetic_slices(2, size)
    assert found.shape == (2, *size)
    assert found.dtype == np.uint8
    patch, _ = phantom_box(Box((0, 0, 0), (2, 128, 128)), seed=0)
    np.testing.assert_array_equal(found[:, :128, :128], patch[:, : size[0], : size[1]])
    for axis in (1, 2):
        if size[axis - 1] > 128:
            np.testing.assert_array_equal(found.take(128, axis), found.take(126, axis))


def test_the_table_has_the_fastest_first_and_reasons_last() -> None:
    speeds = [
        Speed("onnxruntime", 10e6, "onnxruntime 1 on CPU"),
        Speed("native", refusal="No compiler is here."),
        Speed("openvino", 24.96e6, "openvino 2 on CPU"),
    ]
    assert table(speeds).splitlines() == [
        "engine                  Mpx/s  x onnxruntime",
        "openvino                 25.0           2.50  openvino 2 on CPU",
        "onnxruntime              10.0           1.00  onnxruntime 1 on CPU",
        "native                      -              -  No compiler is here.",
    ]


def test_without_the_reference_there_is_no_ratio() -> None:
    assert table([Speed("openvino", 25e6, "openvino 2")]).splitlines()[1].split() == ["openvino", "25.0", "-", "openvino", "2"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure", functools.partial(measure, size=(32, 32), seconds=0))


def test_the_command_measures_every_engine(model: Model, tmp_path: Path, quick: None) -> None:
    path = tmp_path / "student.onnx"
    path.write_bytes(model.onnx_bytes)
    result = CliRunner().invoke(kdunet_infer.cli.main, ["engines", "--bench", str(path), "--threads", "1"])
    assert result.exit_code == 0, result.output
    names = [line[:20].strip() for line in result.stdout.splitlines()]
    assert names[0] == "engine"
    assert set(names[1:]) == {contender.name for contender in speed.contenders()}
    assert "1 thread" in result.stdout


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    def refused(*arguments: str) -> str:
        result = CliRunner().invoke(kdunet_infer.cli.main, ["engines", *arguments])
        assert result.exit_code in (1, 2)
        assert result.stdout == ""
        return result.stderr

    assert "no model is called 'mito'" in refused("--bench", "mito")
    assert "--threads is for --bench MODEL; give both." in refused("--threads", "2")
    assert "0 is not in the range x>=1" in refused("--bench", "phantom-2unet", "--threads", "0")
