"""Run a distilled student over electron-microscopy volumes of any size, without seams.

Importing this package is cheap: what it offers is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdunet_infer.engines import create_engine
    from kdunet_infer.metrics import Scores
    from kdunet_infer.model import Model
    from kdunet_infer.run import Report, SegmentOptions, evaluate, segment

__version__ = "0.1.0"
__all__ = ["Model", "Report", "Scores", "SegmentOptions", "create_engine", "evaluate", "segment"]

_HOME = {
    "Model": "model",
    "Report": "run",
    "Scores": "metrics",
    "SegmentOptions": "run",
    "create_engine": "engines",
    "evaluate": "run",
    "segment": "run",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
