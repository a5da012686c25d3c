"""OpenVINO on the CPU, in float32 or bfloat16. The only file that imports openvino."""

from __future__ import annotations

import ctypes
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kdunet_infer.blockwise import Float32Array, UInt8Array
from kdunet_infer.engines import available_cpus, check_tiles
from kdunet_infer.errors import EngineError, EngineUnavailable
from kdunet_infer.model import INPUT_NAME, OUTPUT_NAME, Model

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """`import openvino` imports its conversion tools, which report that to Google; without this package they do not."""
    name = "openvino_telemetry"
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


with _without_telemetry():
    import openvino


class _SignalStack(ctypes.Structure):
    """C's `stack_t`, as Linux lays it out."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def _own_signal_stack() -> Iterator[None]:
    """Give this thread back the stack that signal handlers run on.

    OpenVINO's threading puts one of its own there and puts back what it found when a compiled model goes. Where two models go
    in the order in which they came, that is the stack of the first, which is gone: the next Ctrl-C would end the process.
    """
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), _SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
"""Ours -> OpenVINO's."""
BF16_CAPABILITY = "BF16"


class OpenVinoEngine:
    """A model in OpenVINO on the CPU, on `n_threads` threads; None takes every CPU this process may use.

    `precision` bf16 keeps 8 bits of each weight and feature: faster, but probabilities move by up to 0.3. Raises EngineError
    for an unknown device or precision or a model OpenVINO cannot load, EngineUnavailable for bf16 on a CPU without it.
    """

    def __init__(self, model: Model, device: str = "cpu", n_threads: int | None = None, precision: str = "fp32") -> None:
        if device != "cpu":
            raise EngineError(f"engine 'openvino' has no device {device!r}; it runs on cpu.")
        if precision not in PRECISIONS:
            raise EngineError(f"engine 'openvino' has no precision {precision!r}; choose one of {', '.join(PRECISIONS)}.")
        self._stride_zyx = model.card.stride_zyx
        self._precision = precision
        with _own_signal_stack():
            self._compiled = _compile(model, n_threads or available_cpus(), precision)
            self._request = self._compiled.create_infer_request()
        self._one_at_a_time = threading.Lock()

    def infer(self, tiles: UInt8Array) -> Float32Array:
        """Foreground probability (n, y, x) float32 of tiles (n, y, x) uint8; y and x multiples of the stride.

        Raises EngineInputError for other tiles, EngineError where OpenVINO fails.
        """
        check_tiles(tiles, self._stride_zyx)
        try:
            with self._one_at_a_time, _own_signal_stack():
                # not `infer`: on one thread it swallows a failure and hands out the result before it (2026.4)
                self._request.start_async({INPUT_NAME: tiles[:, None]})
                self._request.wait()
                probability: Float32Array = self._request.get_tensor(OUTPUT_NAME).data[:, 0].copy()
        except Exception as exc:  # OpenVINO's errors share no base of their own
            n, y, x = tiles.shape
            raise EngineError(
                f"OpenVINO failed on {n} tiles of {y} x {x} pixels ({_one_line(exc)}); if memory ran out, take smaller tiles."
            ) from exc
        return probability

    def describe(self) -> str:
        """One line: OpenVINO, its version, the precision and the threads."""
        n_threads = self._compiled.get_property("INFERENCE_NUM_THREADS")  # never more than the process may use
        return f"openvino {_version()} on CPU in {self._precision}, {n_threads} thread{'s' * (n_threads != 1)}"


def _compile(model: Model, n_threads: int, precision: str) -> Any:
    core = openvino.Core()
    if precision == "bf16" and BF16_CAPABILITY not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise EngineUnavailable("this CPU does not multiply bfloat16 itself (AVX-512 BF16 or AMX); use precision fp32.")
    options = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": n_threads,
        "NUM_STREAMS": 1,
        # pinned, the threads of two workers would share the first CPUs and leave the others idle
        "ENABLE_CPU_PINNING": False,
    }
    try:
        # Sizes stay dynamic. Compiled for one size it was no faster (2-Unet, 960 x 1216 pixels, 2 threads: 29.5 Mpx/s against
        # 28.5, 1 thread: 15.4 against 15.7), and every new size would cost 0.1 s and its own copy.
        return core.compile_model(core.read_model(model.onnx_bytes), "CPU", options)
    except Exception as exc:  # OpenVINO's errors share no base of their own
        raise EngineError(f"OpenVINO cannot load {model.path} ({_one_line(exc)}); use --engine onnxruntime.") from exc


def _version() -> str:
    """`2026.4.1`, without the number of the build."""
    return str(openvino.__version__).split("-")[0]


def _one_line(exc: Exception) -> str:
    """What OpenVINO says in many lines, without those on where in its own sources it said it."""
    ours = (line.strip() for line in str(exc).splitlines())
    told = [line for line in ours if line and not any(mark in line for mark in ("Exception from", "FrontEnd API", " at src/"))]
    return " ".join(told) or type(exc).__name__
