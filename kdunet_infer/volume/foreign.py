"""Formats that are known and not read: what leads out of them, said before anything else is tried. Reads no voxels."""

from __future__ import annotations

import json
import os
from pathlib import Path

from kdunet_infer.errors import VolumeError

_CONVERT = (
    "copy it to Zarr with tensorstore (pip install tensorstore), from its driver {driver!r} to 'zarr3', and open that with "
    "--axes {axes}."
)


def refuse_foreign(path: Path) -> None:
    """Refuse a folder of N5 or neuroglancer precomputed. Raises VolumeError with the name of a conversion that works."""
    if path.suffix.lower() == ".n5" or os.path.isfile(path / "attributes.json"):
        raise VolumeError(f"{path} is N5, which is not read; {_CONVERT.format(driver='n5', axes='xyz')}")
    if _is_precomputed(path):
        how = _CONVERT.format(driver="neuroglancer_precomputed", axes="xyzc")
        raise VolumeError(f"{path} is a neuroglancer precomputed volume, which is not read; {how}")


def _is_precomputed(path: Path) -> bool:
    try:
        info = json.loads((path / "info").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(info, dict) and "scales" in info
