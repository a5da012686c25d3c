"""Lengths as files state them, in nanometres. Knows no files."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kdunet_infer.volume.ome import Vector

_NANOMETRES = {
    "pm": 1e-3,
    "picometer": 1e-3,
    "å": 0.1,
    "a": 0.1,
    "angstrom": 0.1,
    "nm": 1.0,
    "nanometer": 1.0,
    "um": 1e3,
    "µm": 1e3,
    "micron": 1e3,
    "micrometer": 1e3,
    "mm": 1e6,
    "millimeter": 1e6,
    "cm": 1e7,
    "centimeter": 1e7,
    "inch": 2.54e7,
    "m": 1e9,
    "meter": 1e9,
}


def nanometres(size: Sequence[float | None], units: Sequence[str | None]) -> Vector | None:
    """A voxel size, zyx, in nanometres; None where a size or unit is missing, or is none that a voxel can have."""
    z, y, x = (_length(value, unit) for value, unit in zip(size, units, strict=True))
    return None if z is None or y is None or x is None else (z, y, x)


def _length(value: float | None, unit: str | None) -> float | None:
    factor = _NANOMETRES.get(_plain(unit)) if unit else None
    if value is None or factor is None:
        return None
    length = round(value * factor, 9)  # 0.004 µm shall be 4 nm, not 4.0000000000000001
    return length if 0 < length < math.inf else None


def _plain(unit: str) -> str:
    """One spelling of many: `Micrometres`, `\\u00B5m` as ImageJ escapes it, the Greek letter and the micro sign."""
    word = unit.strip().replace("\\u00B5", "µ").replace("\\u00C5", "å").lower().replace("μ", "µ").replace("å", "å")
    word = word.replace("metre", "meter").replace("ångstrom", "angstrom").replace("ångström", "angstrom")
    return word.removesuffix("s") if len(word) > 2 else word
