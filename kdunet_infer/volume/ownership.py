"""Which folders and TIFF files are outputs of ours, finished or not, and what may be removed: only what carries our mark."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zarr

from kdunet_infer.errors import TargetExists
from kdunet_infer.volume.arrays import group_to_write, open_node, zarr_format_at
from kdunet_infer.volume.locking import LOCK_NAME
from kdunet_infer.volume.tiff_target import told_to

KEY = "kdunet"
_RECORDS = ".kdunet"
_STRAY = ".partial"
"""Ends the name of a file that zarr was writing when it was killed."""
_LABELS = "labels"
_CHUNKS = "c"
"""Of a bare Zarr array."""
_ATTRIBUTES, _GROUP = ".zattrs", ".zgroup"
_METADATA = (_ATTRIBUTES, _GROUP, "zarr.json")


def mark_unfinished() -> dict[str, Any]:
    """Attributes of an output from its creation until it is finished, under a key beside, never inside, OME-Zarr's."""
    return {KEY: {"state": "unfinished"}}


def mark_finished(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a finished output, with what its maker wants to say about it."""
    return {KEY: {**attributes, "state": "finished"}}


def state_of(attributes: Mapping[str, Any]) -> str | None:
    """`unfinished` or `finished` for an output of ours, None for anything else."""
    mark = attributes.get(KEY)
    return mark.get("state") if isinstance(mark, Mapping) else None


def is_finished(path: Path) -> bool:
    """Whether a finished output of ours is at `path`."""
    return _state_at(path) == "finished"


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuse a path that may not be written to: a finished output, unless it is to be overwritten, and what is not ours.

    Raises TargetExists.
    """
    state = _state_at(path)
    if state in ("nothing", "unfinished"):
        return
    if state is None:
        raise TargetExists(f"{path} exists and was not made by kdunet, so it is never replaced; choose another name.")
    if not overwrite:
        raise TargetExists(f"{path} holds a finished output; add --overwrite to replace it, or choose another name.")


def remove(path: Path) -> None:
    """Remove an output of ours, or what is left of it: interrupted, it leaves an unfinished one, never one that looks whole."""
    if path.is_file():
        path.unlink()
    if zarr_format_at(path) is None:
        return
    _to_write(path).attrs.put(mark_unfinished())
    for child in path.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
    shutil.rmtree(path)


def _to_write(path: Path) -> zarr.Group | zarr.Array[Any]:
    if isinstance(open_node(path), zarr.Group):
        return group_to_write(path)
    return zarr.open_array(str(path), mode="r+", zarr_format=zarr_format_at(path))


def _state_at(path: Path) -> str | None:
    """The state of the output at `path`, `nothing` where no voxel would be lost, None for what is not wholly ours."""
    if path.is_symlink():
        return None
    if path.is_file():
        return state_of(told_to(path))
    names = {child.name for child in path.iterdir()} if path.exists() else set()
    if _is_remains({name for name in names if not name.endswith(_STRAY)}, path):
        return "nothing"
    ours = (_may_be_ours(name) for name in names - {_LABELS})
    if not all(ours) or not _all_ours(path / _LABELS) or zarr_format_at(path) is None:
        return None
    return state_of(open_node(path).attrs.asdict())


def _is_remains(names: set[str], path: Path) -> bool:
    """Whether this is where creating or removing one of ours broke off: a Zarr v2 group is two files, one after the other."""
    if names != {_ATTRIBUTES}:
        return names <= {_GROUP}
    try:
        return state_of(json.loads((path / _ATTRIBUTES).read_bytes())) == "unfinished"
    except (ValueError, AttributeError):
        return False


def _may_be_ours(name: str) -> bool:
    return name.isdecimal() or name in (_RECORDS, _CHUNKS, *_METADATA) or name.endswith(_STRAY)


def _all_ours(labels: Path) -> bool:
    """Whether no label in the folder is anybody else's, such as an annotation made by hand; true where there is none."""
    if not labels.is_dir():
        return True
    return all(child.name in (LOCK_NAME, *_METADATA) or _state_at(child) is not None for child in labels.iterdir())
