"""OpenVINO: the contract, how near it is to onnxruntime, and every refusal."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from small_models import small_card, small_model, unet_onnx

import kdunet_infer.engines
import kdunet_infer.engines.openvino as engine_file
from kdunet_infer.engines import available_cpus, create_engine
from kdunet_infer.engines.onnxruntime import OnnxRuntimeEngine
from kdunet_infer.engines.openvino import OpenVinoEngine
from kdunet_infer.errors import EngineError, EngineUnavailable
from kdunet_infer.geometry import Box
from kdunet_infer.model import Model
from kdunet_infer.phantom import phantom_box
from kdunet_infer.testing import EngineContract, noise

RELEASED = "mito-epfl-2unet"


class TestOpenVinoEngine(EngineContract):
    def make(self, model: Model) -> OpenVinoEngine:
        return OpenVinoEngine(model, n_threads=1)


@pytest.fixture(scope="module")
def released() -> Model:
    return Model.load(RELEASED)


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    return phantom_box(Box((0, 0, 0), (1, 256, 320)), seed=3)[0]


@pytest.mark.skipif(sys.platform != "linux", reason="signal stacks are OpenVINO's matter there")
def test_signals_find_their_stack_when_engines_have_come_and_gone() -> None:
    """In the order in which they came: OpenVINO alone would leave the address of a stack that is gone."""
    code = """
import faulthandler, gc, os, signal
faulthandler.enable()  # signal handlers then run on a stack of their own
import numpy as np
from kdunet_infer.engines import create_engine
from kdunet_infer.model import Model
model = Model.load("phantom-2unet")
engines = [create_engine("openvino", model, n_threads=1) for _ in range(3)]
for engine in engines:
    engine.infer(np.zeros((1, 16, 16), np.uint8))
while engines:
    del engines[0]
    gc.collect()
del engine
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("caught"))
os.kill(os.getpid(), signal.SIGUSR1)
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (finished.returncode, finished.stdout) == (0, "caught\n"), finished.stderr


def test_float32_is_within_1e_5_of_onnxruntime(released: Model, tiles: np.ndarray) -> None:
    """Sums of up to 288 float32 terms in another order; 4.8e-6 on EPFL slices."""
    want = OnnxRuntimeEngine(released, n_threads=1).infer(tiles)
    assert want.std() > 0.1  # the network sees something
    assert np.abs(OpenVinoEngine(released, n_threads=2).infer(tiles) - want).max() <= 1e-5


def test_bf16_is_float32_but_for_its_rounding(released: Model, tiles: np.ndarray) -> None:
    if not multiplies_bf16():
        pytest.skip("this CPU does not multiply bfloat16")
    want = OpenVinoEngine(released, n_threads=1).infer(tiles)
    found = OpenVinoEngine(released, n_threads=1, precision="bf16").infer(tiles)
    assert 1e-4 < np.abs(found - want).max() < 0.5
    assert ((found >= 0.5) != (want >= 0.5)).mean() < 0.003


def multiplies_bf16() -> bool:
    return "BF16" in engine_file.openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_threads_do_not_change_the_bits(released: Model, tiles: np.ndarray) -> None:
    one, two = (OpenVinoEngine(released, n_threads=n).infer(tiles) for n in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_describe_says_runtime_version_precision_and_threads(model: Model) -> None:
    version = engine_file.openvino.__version__.split("-")[0]
    assert OpenVinoEngine(model, n_threads=1).describe() == f"openvino {version} on CPU in fp32, 1 thread"
    found = create_engine("openvino", model).describe()
    assert found.startswith(f"openvino {version} on CPU in fp32, {available_cpus()} thread")


def test_the_threads_asked_for_reach_openvino(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []

    class Core:
        def read_model(self, onnx_bytes: bytes) -> bytes:
            return onnx_bytes

        def compile_model(self, graph: bytes, device: str, options: dict[str, object]) -> object:
            seen.append(options)
            return SimpleNamespace(create_infer_request=lambda: None)

    monkeypatch.setattr(engine_file.openvino, "Core", Core)
    OpenVinoEngine(model, n_threads=3)
    monkeypatch.setattr(engine_file, "available_cpus", lambda: 5)
    OpenVinoEngine(model)
    assert [options["INFERENCE_NUM_THREADS"] for options in seen] == [3, 5]
    assert not any(options["ENABLE_CPU_PINNING"] for options in seen)


def test_an_unknown_device_or_precision_is_refused(model: Model) -> None:
    with pytest.raises(EngineError, match=r"^engine 'openvino' has no device 'cuda'; it runs on cpu\.$"):
        OpenVinoEngine(model, device="cuda")
    with pytest.raises(EngineError, match=r"^engine 'openvino' has no precision 'int8'; choose one of fp32, bf16\.$"):
        OpenVinoEngine(model, precision="int8")


def test_bf16_is_refused_where_the_cpu_has_none(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    core = SimpleNamespace(get_property=lambda device, name: ["FP32", "INT8"])
    monkeypatch.setattr(engine_file.openvino, "Core", lambda: core)
    with pytest.raises(EngineUnavailable, match=r"does not multiply bfloat16 itself .*; use precision fp32\.$"):
        OpenVinoEngine(model, precision="bf16")


def test_a_missing_runtime_says_how_to_install_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "kdunet_infer.engines.openvino")
    monkeypatch.delattr(kdunet_infer.engines, "openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineUnavailable, match=r"^Engine 'openvino' needs 'openvino': pip install 'kdunet\[openvino\]'\.$"):
        create_engine("openvino", model)


def test_a_graph_that_openvino_cannot_load_is_refused() -> None:
    proto = unet_onnx(levels=1, width=2)
    proto.graph.node[3].op_type = "NoSuchOperator"
    broken = Model(path=Path("broken.onnx"), onnx_bytes=proto.SerializeToString(), sha256="", card=small_card(1))
    with pytest.raises(EngineError, match=r"^OpenVINO cannot load broken\.onnx \(.*NoSuchOperator.*; use --engine") as caught:
        OpenVinoEngine(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_failure_while_running_is_translated(n_threads: int) -> None:
    # a card that lies about the stride: sizes pass the check and the network cannot join its levels
    model = Model.from_bytes(unet_onnx(2, 2, small_card(levels=1)).SerializeToString(), small_model().path)
    engine = OpenVinoEngine(model, n_threads=n_threads)
    assert engine.infer(noise((1, 6, 6))).shape == (1, 6, 6)  # a result that must not be handed out again
    says = r"^OpenVINO failed on 1 tiles of 5 x 6 pixels \(.*inconsistent.*\); if memory ran out, take smaller tiles\.$"
    with pytest.raises(EngineError, match=says):
        engine.infer(noise((1, 5, 6)))


def test_importing_the_engine_sends_nothing() -> None:
    """OpenVINO's own telemetry is not even loaded, and is there again for whoever wants it."""
    code = """
        import importlib.util, sys
        import kdunet_infer.engines.openvino
        print(any(name.split('.')[0] == 'openvino_telemetry' for name in sys.modules))
        from openvino.tools.ovc.telemetry_utils import init_ovc_telemetry
        print(type(init_ovc_telemetry()).__module__)
    """
    script = "\n".join(line.strip() for line in code.splitlines())
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == ["False", "openvino.tools.ovc.telemetry_stub"]


def test_a_telemetry_module_that_was_there_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = importlib.import_module("types")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", theirs)
    with engine_file._without_telemetry():
        assert sys.modules["openvino_telemetry"] is None
    assert sys.modules["openvino_telemetry"] is theirs


def test_no_other_file_knows_openvino() -> None:
    package = Path(kdunet_infer.__file__).parent
    found = [path.name for path in package.rglob("*.py") if "import openvino" in path.read_text()]
    assert found == ["openvino.py"]
