"""Where viewers find a label: the list in the group `labels` around it, and copies of metadata in the groups around that.

Consolidated metadata are a copy of all metadata below a group, kept in the group. Readers that find one (zarr, xarray,
napari-ome-zarr) look no further, so a label that is missing there does not exist for them. Where a group has such a copy,
the label's part of it is brought up to date; where it has none, none is made, and the other nodes' parts stay as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from kdunet_infer.errors import VolumeError
from kdunet_infer.volume.arrays import zarr_format_at
from kdunet_infer.volume.locking import locked
from kdunet_infer.volume.ome import Layout, label_names, labels_attributes

Document = Mapping[str, Any]

_ATTRIBUTES = ".zattrs"
_V2_GROUP, _V2_COPY = ".zgroup", ".zmetadata"
_V2_NAMES = (_V2_GROUP, _ATTRIBUTES, ".zarray")
_V3_NAME, _V3_COPY = "zarr.json", "consolidated_metadata"
_V3_GROUP = {"zarr_format": 3, "node_type": "group"}
_NOTHING_BELOW = {"kind": "inline", "must_understand": False, "metadata": {}}


def list_label(label: Path, layout: Layout, attributes: Document) -> None:
    """Give a label that is whole its attributes, then add it to the list of its image's labels.

    Raises OSError where the disk refuses, VolumeError for a lock that does not come free and for a copy that cannot be read;
    where the disk is full, nothing has changed then.
    """
    with _changing(label.parent) as documents:
        documents.update_attributes(label, layout, attributes)
        names = _names(label.parent, documents, layout)
        if label.name not in names:
            _write_names(label.parent, documents, layout, [*names, label.name])
        levels = [label / str(index) for index in range(len(layout.levels))]
        _update_copies(label, documents, [label.parent, label, *levels])


def is_listed(label: Path, layout: Layout) -> bool:
    """Whether the list of its image's labels has a label."""
    return label.name in _names(label.parent, _Documents(ExitStack()), layout)


def unlist_label(label: Path, layout: Layout) -> None:
    """Take a label that is to be removed off the list; harmless where it is not on it. Raises as `list_label` does."""
    if zarr_format_at(label.parent) is None:
        return
    with _changing(label.parent) as documents:
        names = _names(label.parent, documents, layout)
        if label.name in names:
            _write_names(label.parent, documents, layout, [name for name in names if name != label.name])
        _update_copies(label, documents, [label.parent])


class _Documents:
    """Metadata documents as they are going to be, written beside their places until all of them are."""

    def __init__(self, locks: ExitStack) -> None:
        self.locks = locks
        self.beside: dict[Path, Path] = {}

    def __contains__(self, file: Path) -> bool:
        return file in self.beside or file.is_file()

    def read(self, file: Path) -> Document:
        try:
            return dict(json.loads(self.beside.get(file, file).read_bytes())) if file in self else {}
        except ValueError as exc:
            raise VolumeError(f"{file} is no JSON document ({exc}); restore it, or remove it if it is .zmetadata.") from exc

    def write(self, file: Path, document: Document) -> None:
        beside = self.beside.setdefault(file, file.with_name(f"{file.name}.{uuid4().hex}.partial"))
        beside.write_text(json.dumps(document, indent=2), encoding="utf-8")

    def attributes(self, group: Path, layout: Layout) -> Document:
        if layout.zarr_format == 2:
            return self.read(group / _ATTRIBUTES)
        return dict(self.read(group / _V3_NAME).get("attributes", {}))

    def update_attributes(self, group: Path, layout: Layout, attributes: Document) -> None:
        """By hand: zarr would drop a v3 group's consolidated metadata along with the change."""
        updated = {**self.attributes(group, layout), **attributes}
        if layout.zarr_format == 3:
            self.write(group / _V3_NAME, {**_V3_GROUP, **self.read(group / _V3_NAME), "attributes": updated})
            return
        if group / _V2_GROUP not in self:
            self.write(group / _V2_GROUP, {"zarr_format": 2})
        self.write(group / _ATTRIBUTES, updated)


@contextmanager
def _changing(labels: Path) -> Iterator[_Documents]:
    """The documents that the body writes take their places together, in that order, at its end; under the folder's lock."""
    with ExitStack() as locks:
        locks.enter_context(locked(labels))
        documents = _Documents(locks)
        try:
            yield documents
            for file, beside in documents.beside.items():
                os.replace(beside, file)
        finally:
            for beside in documents.beside.values():
                beside.unlink(missing_ok=True)


def _names(labels: Path, documents: _Documents, layout: Layout) -> list[str]:
    return label_names(documents.attributes(labels, layout))


def _write_names(labels: Path, documents: _Documents, layout: Layout, names: list[str]) -> None:
    attributes = labels_attributes(documents.attributes(labels, layout), layout.version, names)
    documents.update_attributes(labels, layout, attributes)


def _update_copies(label: Path, documents: _Documents, nodes: Sequence[Path]) -> None:
    """In each group around the label that has consolidated metadata, replace the label's part by what `nodes` say now."""
    for parent in label.parents:
        if (zarr_format := zarr_format_at(parent)) is None and parent != label.parent:
            return
        is_v3 = zarr_format == 3
        file = parent / (_V3_NAME if is_v3 else _V2_COPY)
        if file not in documents or (is_v3 and not documents.read(file).get(_V3_COPY)):
            continue
        if parent != label.parent:  # labels of other images may be on their way into the same copy
            documents.locks.enter_context(locked(parent))
        updated = _updated_v3 if is_v3 else _updated_v2
        documents.write(file, updated(documents, parent, label, nodes))


def _updated_v2(documents: _Documents, parent: Path, label: Path, nodes: Sequence[Path]) -> Document:
    copy = documents.read(parent / _V2_COPY)
    files = (node / name for node in nodes for name in _V2_NAMES if node / name in documents)
    fresh = {found.relative_to(parent).as_posix(): documents.read(found) for found in files}
    return {**copy, "metadata": {**_others(copy["metadata"], parent, label), **fresh}}


def _updated_v3(documents: _Documents, parent: Path, label: Path, nodes: Sequence[Path]) -> Document:
    document = documents.read(parent / _V3_NAME)
    copy = document[_V3_COPY]
    entries = {node.relative_to(parent).as_posix(): documents.read(node / _V3_NAME) for node in nodes if node != parent}
    fresh = {path: _v3_entry(entry) for path, entry in entries.items()}
    return {**document, _V3_COPY: {**copy, "metadata": {**_others(copy["metadata"], parent, label), **fresh}}}


def _v3_entry(document: Document) -> Document:
    """Every node has its own entry, so none is repeated inside another; a group says so with an empty copy."""
    return {**document, _V3_COPY: _NOTHING_BELOW} if document["node_type"] == "group" else document


def _others(entries: Document, parent: Path, label: Path) -> Document:
    """The entries of all nodes but the label."""
    name = label.relative_to(parent).as_posix()
    return {key: entry for key, entry in entries.items() if key != name and not key.startswith(f"{name}/")}
