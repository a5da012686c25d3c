"""Run a distilled student over electron-microscopy volumes of any size, without seams."""

from __future__ import annotations

__version__ = "0.1.0"
