"""Every engine passes the contract; the contract is shown to catch engines that do not; and every refusal says what to do."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import pytest
from small_models import small_card, small_model, unet_onnx

import kdunet_infer.engines
from kdunet_infer.blockwise import Float32Array, UInt8Array
from kdunet_infer.engines import auto_engine, available_cpus, create_engine, engine_names
from kdunet_infer.engines.onnxruntime import OnnxRuntimeEngine
from kdunet_infer.errors import EngineError, EngineUnavailable
from kdunet_infer.model import Model
from kdunet_infer.testing import EngineContract, ProbeEngine, noise


class TestOnnxRuntimeEngine(EngineContract):
    def make(self, model: Model) -> OnnxRuntimeEngine:
        return OnnxRuntimeEngine(model, n_threads=1)


class TestProbeEngine(EngineContract):
    def make(self, model: Model) -> ProbeEngine:
        return ProbeEngine(radius=3, stride=model.card.stride_zyx[1])


class Broken(ProbeEngine):
    """A probe whose answer is spoilt by `how`."""

    def __init__(self, how: Callable[[UInt8Array, Float32Array], np.ndarray]) -> None:
        super().__init__(radius=3, stride=2)
        self._how = how

    def infer(self, tiles: UInt8Array) -> Float32Array:
        return self._how(tiles, super().infer(tiles))


class Reusing(ProbeEngine):
    """Writes every answer into the same buffer."""

    _buffer: Float32Array | None = None

    def infer(self, tiles: UInt8Array) -> Float32Array:
        found = super().infer(tiles)
        if self._buffer is None or self._buffer.shape != found.shape:
            self._buffer = found
        self._buffer[:] = found
        return self._buffer


class Careless(ProbeEngine):
    """Takes anything."""

    def infer(self, tiles: UInt8Array) -> Float32Array:
        return np.zeros(tiles.shape, np.float32)

    def describe(self) -> str:
        return "two\nlines"


def overwrite(tiles: UInt8Array, found: Float32Array) -> Float32Array:
    tiles[:] = 0
    return found


@pytest.mark.parametrize(
    ("engine", "test"),
    [
        (Broken(lambda _, p: p[:, None]), "test_probability_has_the_shape_of_the_tiles"),
        (Broken(lambda _, p: p.astype(np.float64)), "test_probability_has_the_shape_of_the_tiles"),
        (Broken(lambda _, p: 2 * p), "test_probability_is_within_0_and_1_and_not_constant"),
        (Broken(lambda _, p: p * np.nan), "test_probability_is_within_0_and_1_and_not_constant"),
        (Broken(lambda _, p: p / len(p)), "test_a_batch_equals_its_tiles_one_by_one"),
        (
            Broken(lambda _, p: p + np.random.default_rng().random(p.shape, np.float32)),
            "test_the_same_tiles_give_the_same_bits",
        ),
        (Reusing(3, 2), "test_a_result_outlives_the_next_call"),
        (Broken(overwrite), "test_a_view_with_gaps_equals_its_copy_and_is_left_alone"),
        (Careless(3, 2), "test_sizes_off_the_stride_are_refused"),
        (Careless(3, 2), "test_other_dtypes_are_refused"),
        (Careless(3, 2), "test_other_ranks_are_refused"),
        (Careless(3, 2), "test_describe_is_one_line"),
    ],
)
def test_the_contract_catches(engine: ProbeEngine, test: str, model: Model) -> None:
    class Contract(EngineContract):
        def make(self, model: Model) -> ProbeEngine:
            return engine

    with pytest.raises(AssertionError):
        getattr(Contract(), test)(model)


def test_onnxruntime_computes_the_network() -> None:
    """Two 3x3 convolutions, one 1x1 and a sigmoid, against the sums written out."""
    model = small_model(levels=1)
    weights = {w.name: onnx_array(w) for w in unet_onnx(levels=1, width=2).graph.initializer}
    tiles = noise((2, 6, 7))
    x = ((tiles.astype(np.float64) - 128) / 64)[:, None]
    x = np.maximum(conv(x, weights["w2"], weights["w3"]), 0)
    x = np.maximum(conv(x, weights["w4"], weights["w5"]), 0)
    want = 1 / (1 + np.exp(-conv(x, weights["w6"], weights["w7"])[:, 0]))
    found = OnnxRuntimeEngine(model, n_threads=1).infer(tiles)
    assert np.abs(found - want).max() < 1e-6  # float32 sums of up to 18 terms


def onnx_array(tensor: Any) -> np.ndarray:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor).astype(np.float64)


def conv(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """(n, c_in, y, x) -> (n, c_out, y, x), zero padding."""
    reach = kernel.shape[2] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (reach, reach), (reach, reach)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[2:], axis=(2, 3))
    return np.einsum("ncyxij,ocij->noyx", windows, kernel) + bias[:, None, None]


def test_threads_do_not_change_the_bits(model: Model) -> None:
    tiles = noise((2, 64, 96))
    one, two = (OnnxRuntimeEngine(model, n_threads=n).infer(tiles) for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_describe_says_runtime_version_device_and_threads(model: Model) -> None:
    version = onnxruntime.__version__
    assert OnnxRuntimeEngine(model, n_threads=1).describe() == f"onnxruntime {version} on CPU, 1 thread"
    assert create_engine("onnxruntime", model, n_threads=2).describe() == f"onnxruntime {version} on CPU, 2 threads"
    assert OnnxRuntimeEngine(model).describe().startswith(f"onnxruntime {version} on CPU, {available_cpus()} thread")


def test_available_cpus_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert available_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cpus() == 1


def test_an_unknown_engine_lists_those_there_are(model: Model) -> None:
    assert engine_names()[0] == "auto"
    with pytest.raises(EngineError, match=r"no engine is called 'onnx'; choose one of auto, .*onnxruntime"):
        create_engine("onnx", model)


def test_a_missing_runtime_says_how_to_install_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_engine(monkeypatch)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    says = r"^Engine 'onnxruntime' needs 'onnxruntime': pip install 'kdunet\[cpu\]' \(or 'kdunet\[gpu\]' on NVIDIA\)\.$"
    with pytest.raises(EngineUnavailable, match=says):
        create_engine("onnxruntime", model)
    monkeypatch.setattr(kdunet_infer.engines, "FASTEST_FIRST", (("onnxruntime", {"device": "cpu"}),))
    with pytest.raises(EngineUnavailable, match=r"^No engine works here\. Engine 'onnxruntime' needs 'onnxruntime'"):
        create_engine("auto", model)


def test_a_runtime_that_does_not_load_says_why(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(module: str) -> None:
        raise ImportError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(kdunet_infer.engines.importlib, "import_module", refuse)
    with pytest.raises(
        EngineUnavailable, match=r"installed but does not load here \(libcudart.so.12: cannot open.*pip install"
    ):
        create_engine("onnxruntime", model)


def test_a_mistake_of_ours_is_not_a_missing_runtime(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kdunet_infer.engines.ENGINES, "typo", ("kdunet_infer.engines.typo:Engine", "pip install it"))
    with pytest.raises(ModuleNotFoundError, match=r"kdunet_infer\.engines\.typo"):
        create_engine("typo", model)


def forget_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the engine's module imported anew, and the one that the other tests know put back afterwards."""
    monkeypatch.delitem(sys.modules, "kdunet_infer.engines.onnxruntime")
    monkeypatch.delattr(kdunet_infer.engines, "onnxruntime")


def test_an_unknown_device_lists_those_there_are(model: Model) -> None:
    with pytest.raises(EngineError, match="'onnxruntime' has no device 'tpu'; choose one of cpu, cuda"):
        OnnxRuntimeEngine(model, device="tpu")


def test_cuda_without_its_provider_says_what_to_install(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        EngineUnavailable, match=r"built without CUDA: pip uninstall onnxruntime, then pip install 'kdunet\[gpu\]'"
    ):
        OnnxRuntimeEngine(model, device="cuda")


class _SilentlyOnCpu:
    def __init__(self, *args: object, **options: object) -> None:
        pass

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


class _DoesNotStart(_SilentlyOnCpu):
    def __init__(self, *args: object, **options: object) -> None:
        raise RuntimeError("CUDA failure 35")


@pytest.mark.parametrize(("session", "why"), [(_SilentlyOnCpu, ""), (_DoesNotStart, r" \(CUDA failure 35\)")])
def test_cuda_that_does_not_start_is_never_the_cpu(
    session: type, why: str, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(EngineUnavailable, match=rf"could not start CUDA here{why}; check the driver with nvidia-smi"):
        OnnxRuntimeEngine(model, device="cuda")


def test_auto_takes_the_cpu_and_says_why(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(kdunet_infer.engines, "FASTEST_FIRST", tuple(("onnxruntime", {"device": d}) for d in ("cuda", "cpu")))
    engine, why = auto_engine(model, n_threads=1)
    assert isinstance(engine, OnnxRuntimeEngine)
    assert why == f"{engine.describe()}, the fastest that works here (not here: onnxruntime on cuda)"
    with caplog.at_level(logging.INFO, logger="kdunet_infer"):
        create_engine("auto", model, n_threads=1)
    assert caplog.messages == [f"engine: {why}"]


def test_auto_keeps_the_device_asked_for(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "CUDA" not in auto_engine(model, device="cpu", n_threads=1)[1]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineUnavailable, match=r"^No engine works here\. onnxruntime .* was built without CUDA"):
        auto_engine(model, device="cuda")
    with pytest.raises(EngineUnavailable, match=r"^No engine works here\. None takes the options {'device': 'tpu'}"):
        auto_engine(model, device="tpu")


def test_a_graph_that_onnxruntime_cannot_load_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    proto = unet_onnx(levels=1, width=2)
    proto.graph.node[3].op_type = "NoSuchOperator"
    broken = Model(path=small_model(1).path, onnx_bytes=proto.SerializeToString(), sha256="", card=small_card(1))
    with pytest.raises(
        EngineError, match=r"onnxruntime cannot load unet-1-2\.onnx \(.*NoSuchOperator.*; export the model again"
    ):
        OnnxRuntimeEngine(broken)
    assert capfd.readouterr() == ("", "")


def test_a_failure_while_running_is_translated(capfd: pytest.CaptureFixture[str]) -> None:
    # a card that lies about the stride: sizes pass the check and the network cannot join its levels
    model = Model.from_bytes(unet_onnx(2, 2, small_card(levels=1)).SerializeToString(), small_model().path)
    engine = OnnxRuntimeEngine(model, n_threads=1)
    with pytest.raises(
        EngineError, match=r"onnxruntime failed on 1 tiles of 5 x 6 pixels \(.*\); if memory ran out, take smaller"
    ):
        engine.infer(noise((1, 5, 6)))
    assert "WARNING" not in capfd.readouterr().err.upper()
