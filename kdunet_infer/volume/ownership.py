"""Which folders are outputs of ours, finished or not, and what may be removed: only what carries our mark."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zarr

from kdunet_infer.errors import TargetExists
from kdunet_infer.volume.arrays import group_to_write, open_node, zarr_format_at

KEY = "kdunet"
"""Of the group attribute that says an output is ours; beside, never inside, the OME-Zarr metadata."""
_RECORDS = ".kdunet"
_STRAY = ".partial"
"""Ends the name of a file that zarr was writing when it was killed."""
_LABELS = "labels"
_METADATA = (".zattrs", ".zgroup", "zarr.json")


def mark_unfinished() -> dict[str, Any]:
    """Attributes of an output from its creation until it is finished."""
    return {KEY: {"state": "unfinished"}}


def mark_finished(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a finished output, with what its maker wants to say about it."""
    return {KEY: {**attributes, "state": "finished"}}


def state_of(attributes: Mapping[str, Any]) -> str | None:
    """`unfinished` or `finished` for an output of ours, None for anything else."""
    mark = attributes.get(KEY)
    return mark.get("state") if isinstance(mark, Mapping) else None


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
    if zarr_format_at(path) is None:
        return
    group_to_write(path).attrs.put(mark_unfinished())
    for child in path.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
    shutil.rmtree(path)


def _state_at(path: Path) -> str | None:
    """The state of the output in the folder, `nothing` where no file would be lost, None for what is not wholly ours."""
    if path.is_symlink() or path.is_file():
        return None
    names = {child.name for child in path.iterdir()} if path.exists() else set()
    if not names:
        return "nothing"
    ours = (name.isdecimal() or name in (_RECORDS, *_METADATA) or name.endswith(_STRAY) for name in names - {_LABELS})
    if not all(ours) or not _all_ours(path / _LABELS) or zarr_format_at(path) is None:
        return None
    node = open_node(path)
    return state_of(node.attrs.asdict()) if isinstance(node, zarr.Group) else None


def _all_ours(labels: Path) -> bool:
    """Whether no label in the folder is anybody else's, such as an annotation made by hand; true where there is none."""
    if not labels.is_dir():
        return True
    return all(child.name in _METADATA or _state_at(child) is not None for child in labels.iterdir())
