"""ONNX Runtime, on CPU and CUDA. The only file that imports onnxruntime."""

from __future__ import annotations

from typing import Any

import onnxruntime

from kdunet_infer.blockwise import Float32Array, UInt8Array
from kdunet_infer.engines import available_cpus, check_precision, check_tiles
from kdunet_infer.errors import EngineError, EngineUnavailable
from kdunet_infer.model import INPUT_NAME, OUTPUT_NAME, Model

PROVIDERS: dict[str, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    # TF32 rounds the inputs of every product to 10 bits, which would move probabilities by 1e-3.
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
}
ERRORS_ONLY = 3
"""onnxruntime's log severity: its warnings are about its own graph rewriting."""


class OnnxRuntimeEngine:
    """A model in ONNX Runtime in float32, on `device` cpu or cuda; never on another one than asked for.

    `n_threads` None takes every CPU this process may use. Raises EngineError for an unknown device or precision or a model
    onnxruntime cannot load, EngineUnavailable where the device is not here.
    """

    def __init__(self, model: Model, device: str = "cpu", n_threads: int | None = None, precision: str = "fp32") -> None:
        if device not in PROVIDERS:
            raise EngineError(f"engine 'onnxruntime' has no device {device!r}; choose one of {', '.join(PROVIDERS)}.")
        check_precision("onnxruntime", precision)
        self._stride_zyx = model.card.stride_zyx
        self._device = device
        self._n_threads = n_threads or available_cpus()
        self._session = _start(model, device, self._n_threads)

    def infer(self, tiles: UInt8Array) -> Float32Array:
        """Foreground probability (n, y, x) float32 of tiles (n, y, x) uint8; y and x multiples of the stride.

        Raises EngineInputError for other tiles, EngineError where onnxruntime fails.
        """
        check_tiles(tiles, self._stride_zyx)
        try:
            (foreground,) = self._session.run([OUTPUT_NAME], {INPUT_NAME: tiles[:, None]})
        except Exception as exc:  # onnxruntime's errors share no base of their own
            n, y, x = tiles.shape
            raise EngineError(
                f"onnxruntime failed on {n} tiles of {y} x {x} pixels ({exc}); if memory ran out, take smaller tiles."
            ) from exc
        probability: Float32Array = foreground[:, 0]
        return probability

    def describe(self) -> str:
        """One line: onnxruntime, its version, the device and the threads."""
        where = (
            f"CPU, {self._n_threads} thread{'s' * (self._n_threads != 1)}" if self._device == "cpu" else self._device.upper()
        )
        return f"onnxruntime {onnxruntime.__version__} on {where}"


def _start(model: Model, device: str, n_threads: int) -> Any:
    provider, provider_options = PROVIDERS[device]
    if provider not in onnxruntime.get_available_providers():
        raise EngineUnavailable(
            f"onnxruntime {onnxruntime.__version__} here was built without {device.upper()}: "
            f"pip uninstall onnxruntime, then pip install 'kdunet[gpu]'."
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = n_threads
    try:
        session = onnxruntime.InferenceSession(
            model.onnx_bytes, options, providers=[(provider, provider_options)], enable_fallback=0
        )
    except Exception as exc:  # onnxruntime's errors share no base of their own
        if device != "cpu":
            raise EngineUnavailable(_not_started(device, f" ({exc})")) from exc
        raise EngineError(f"onnxruntime cannot load {model.path} ({exc}); export the model again.") from exc
    # where a provider's own libraries are missing, onnxruntime goes on with the CPU and says so only in a log line
    if provider not in session.get_providers():
        raise EngineUnavailable(_not_started(device))
    return session


def _not_started(device: str, why: str = "") -> str:
    return (
        f"onnxruntime {onnxruntime.__version__} could not start {device.upper()} here{why}; check the driver with nvidia-smi, "
        "and that the CUDA and cuDNN libraries are those this onnxruntime was built for."
    )
