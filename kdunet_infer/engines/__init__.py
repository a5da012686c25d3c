"""Engines by name. One file per runtime, each importing exactly one, and none before it is asked for.

A new engine is a class with `__init__(model, **options)`, `infer` and `describe`, a line in ENGINES, and a subclass of
`kdunet_infer.testing.EngineContract` in the tests.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from kdunet_infer.errors import EngineError, EngineInputError, EngineUnavailable, UnsupportedModel
from kdunet_infer.geometry import ZYX

if TYPE_CHECKING:
    from kdunet_infer.blockwise import Engine
    from kdunet_infer.model import Model

logger = logging.getLogger(__name__)

ENGINES = {
    "native": ("kdunet_infer.engines.native:NativeEngine", "pip install 'llvmlite>=0.45'"),
    "onnxruntime": (
        "kdunet_infer.engines.onnxruntime:OnnxRuntimeEngine",
        "pip install 'kdunet[cpu]' (or 'kdunet[gpu]' on NVIDIA)",
    ),
    "openvino": ("kdunet_infer.engines.openvino:OpenVinoEngine", "pip install 'kdunet[openvino]'"),
}
"""Name -> where its class is, and how to install its runtime."""

FASTEST_FIRST: tuple[tuple[str, dict[str, Any]], ...] = (
    ("onnxruntime", {"device": "cuda"}),
    ("native", {"device": "cpu"}),
    ("openvino", {"device": "cpu"}),
    ("onnxruntime", {"device": "cpu"}),
)
"""What `auto` tries, with which options; in the order of docs/performance.md. All in float32, so that the answers agree."""


def engine_names() -> tuple[str, ...]:
    """What `create_engine` takes: `auto` and every engine in the table."""
    return ("auto", *ENGINES)


def create_engine(name: str, model: Model, **options: Any) -> Engine:
    """An engine that runs `model`; `options` are its own, such as `n_threads`.

    Raises EngineError for a name that is not in the table or a model the runtime cannot load, EngineUnavailable where the
    runtime or the device is not here.
    """
    if name == "auto":
        engine, why = auto_engine(model, **options)
        logger.info("engine: %s", why)
        return engine
    return _engine_class(name)(model, **options)


def auto_engine(model: Model, **options: Any) -> tuple[Engine, str]:
    """The fastest engine that starts here, and one line that says which and why.

    An option given here is kept: with device="cpu" no engine on CUDA is tried. Raises EngineUnavailable where none starts.
    """
    refusals: list[str] = []
    tried: list[str] = []
    for name, wanted in FASTEST_FIRST:
        if any(options.get(option, value) != value for option, value in wanted.items()):
            continue
        try:
            engine = create_engine(name, model, **{**wanted, **options})
        except (EngineUnavailable, UnsupportedModel) as exc:
            refusals.append(str(exc))
            tried.append(f"{name} on {wanted['device']}")
        else:
            return engine, f"{engine.describe()}, the fastest that works here" + (
                f" (not here: {', '.join(tried)})" if tried else ""
            )
    raise EngineUnavailable("No engine works here. " + " ".join(refusals or [f"None takes the options {options}."]))


def missing(name: str) -> str:
    """What keeps an engine of the table from starting here, with the remedy; empty where its runtime is installed.

    Raises EngineError for a name that is not in the table.
    """
    try:
        _engine_class(name)
    except EngineUnavailable as exc:
        return str(exc)
    return ""


def check_tiles(tiles: np.ndarray[Any, Any], stride_zyx: ZYX) -> None:
    """Raise EngineInputError unless `tiles` are (n, y, x) uint8, y and x positive multiples of the stride."""
    if tiles.dtype != np.uint8:
        raise EngineInputError(f"tiles are {tiles.dtype}; engines take uint8, so map the intensities first.")
    if tiles.ndim != 3:
        raise EngineInputError(f"tiles have shape {tiles.shape}; engines take (n, y, x).")
    stride_y, stride_x = stride_zyx[1:]
    n, y, x = tiles.shape
    if not (n and y and x) or y % stride_y or x % stride_x:
        raise EngineInputError(
            f"{n} tiles of {y} x {x} pixels cannot be run; give at least one, with sizes that are positive multiples of the "
            f"network's stride {stride_y} x {stride_x}."
        )


def check_window(tiles: np.ndarray[Any, Any], rows: tuple[int, int], columns: tuple[int, int]) -> None:
    """Raise EngineInputError unless `rows` and `columns` are a window, of at least one pixel, of `tiles` (n, y, x)."""
    for name, (begin, end), size in (("rows", rows, tiles.shape[1]), ("columns", columns, tiles.shape[2])):
        if not 0 <= begin < end <= size:
            raise EngineInputError(f"{name} {begin}:{end} are no window of tiles of {size} {name}; give one within 0:{size}.")


def check_precision(engine: str, precision: str) -> None:
    """Raise EngineError unless it is fp32, for engines that have no other."""
    if precision != "fp32":
        raise EngineError(f"engine {engine!r} has no precision {precision!r}; it computes in fp32.")


def available_cpus() -> int:
    """How many CPUs this process may use: fewer than the machine has in a batch job or container pinned to some."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _engine_class(name: str) -> Callable[..., Engine]:
    if name not in ENGINES:
        raise EngineError(f"no engine is called {name!r}; choose one of {', '.join(engine_names())}.")
    where, install = ENGINES[name]
    module, class_name = where.split(":")
    try:
        found: Callable[..., Engine] = getattr(importlib.import_module(module), class_name)
    except ImportError as exc:
        if (exc.name or "").startswith("kdunet"):
            raise  # a mistake of ours, not a missing runtime
        if isinstance(exc, ModuleNotFoundError):
            raise EngineUnavailable(f"Engine {name!r} needs {exc.name!r}: {install}.") from exc
        raise EngineUnavailable(f"Engine {name!r} is installed but does not load here ({exc}): {install} again.") from exc
    return found
