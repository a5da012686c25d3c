"""OME-Zarr 0.4 and 0.5 metadata as frozen values, out of a group's attributes and back into attributes. Touches no files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

from kdunet_infer.errors import VolumeError
from kdunet_infer.geometry import ZYX

Version = Literal["0.4", "0.5"]
Content = Literal["mask", "image"]
"""What a target holds. mask: uint8, 0 background and 1 foreground. image: uint8 grey values or probabilities."""
Vector = tuple[float, float, float]
Units = tuple[str | None, str | None, str | None]

AXES = "tczyx"
"""What the axes of an array can be: time, channel and space."""
UNKNOWN_AXIS = "-"
"""The letter of an axis whose meaning nobody said."""
_FOREGROUND_COLOR = {"label-value": 1, "rgba": [255, 64, 64, 255]}


@dataclass(frozen=True, slots=True)
class Dataset:
    """One level as an image lists it: the path of its array inside the group, and where its voxels lie."""

    path: str
    scale: tuple[float, ...]
    """Voxel size, one an axis as stored, in the image's units; the transform of the multiscale is folded in."""
    translation: tuple[float, ...]
    """Centre of the first voxel, one an axis as stored, in the image's units; folded as the scale is."""


@dataclass(frozen=True, slots=True)
class Multiscale:
    """An image's pyramid as its group describes it."""

    version: Version
    axes: str
    """One letter an axis as stored: of tczyx, or UNKNOWN_AXIS."""
    units: tuple[str | None, ...]
    """One an axis as stored."""
    datasets: tuple[Dataset, ...]
    """Finest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One array of an image: its size, how it is cut into files, and where its voxels lie."""

    shape: ZYX
    chunk_shape: ZYX
    shard_shape: ZYX | None = None
    scale: Vector = (1.0, 1.0, 1.0)
    translation: Vector = (0.0, 0.0, 0.0)

    @property
    def write_shape(self) -> ZYX:
        """Voxels of one file, zyx: a file must have one writer."""
        return self.shard_shape or self.chunk_shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All that an OME-Zarr image has besides voxels and a name; what an output like it repeats."""

    levels: tuple[Level, ...]
    """Finest first."""
    units: Units = (None, None, None)
    version: Version = "0.5"
    zarr_format: Literal[2, 3] = 3


@dataclass(frozen=True, slots=True)
class Step:
    """How a level samples the next finer one, zyx."""

    ratio: Vector
    """Finer voxels per coarser voxel."""
    picked_at: tuple[float | None, float | None, float | None]
    """Where every coarser voxel is one finer voxel, the index of the first; None along axes on which voxels are pooled."""


def is_multiscale(attributes: Mapping[str, Any]) -> bool:
    """Whether a group with these attributes is an OME-Zarr image (or label image)."""
    return "multiscales" in _ome(attributes)


def is_label(attributes: Mapping[str, Any]) -> bool:
    """Whether a group with these attributes is an OME-Zarr label image."""
    return "image-label" in _ome(attributes)


def label_names(attributes: Mapping[str, Any]) -> list[str]:
    """What the group `labels` of an image lists; empty for any other group."""
    names = _ome(attributes).get("labels", [])
    return [str(name) for name in names] if isinstance(names, list) else []


def parse_multiscale(attributes: Mapping[str, Any], where: Path) -> Multiscale:
    """Read the first multiscale of an image group; `where` is for messages.

    Raises VolumeError for versions other than 0.4 and 0.5, and metadata that breaks the format.
    """
    try:
        entry = _ome(attributes)["multiscales"][0]
        version = str(attributes["ome"]["version"] if "ome" in attributes else entry.get("version", "0.4"))
        if version not in ("0.4", "0.5"):
            raise VolumeError(f"{where} is OME-Zarr {version}; only 0.4 and 0.5 can be read, so convert it to 0.5.")
        axes = "".join(_letter(axis) for axis in entry["axes"])
        shared = entry.get("coordinateTransformations", [])
        units = tuple(_unit(axis) for axis in entry["axes"])
        datasets = tuple(_parse_dataset(dataset, shared, len(axes), where) for dataset in entry["datasets"])
        multiscale = Multiscale(cast("Version", version), axes, units, datasets)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as exc:
        raise VolumeError(f"{where} has OME-Zarr metadata that breaks the format ({exc!r}); repair its multiscales.") from exc
    if not multiscale.datasets:
        raise VolumeError(f"{where} lists no levels; repair its multiscales.")
    return multiscale


def step_between(fine: Level, coarse: Level) -> Step:
    """What the transforms of two levels say about how the coarser one was sampled.

    The centre of the first coarser voxel is that of the first finer one where every n-th voxel was picked, and (n-1)/2
    finer voxels further where n were pooled; labels made the other way would lie half a coarser voxel off their image.
    """
    ratio = [b / a for a, b in zip(fine.scale, coarse.scale, strict=True)]
    offset = [(b - a) / s for a, b, s in zip(fine.translation, coarse.translation, fine.scale, strict=True)]
    picked_at = (at if abs(at) < abs(at - (n - 1) / 2) else None for n, at in zip(ratio, offset, strict=True))
    return Step(cast("Vector", tuple(ratio)), cast("tuple[float | None, float | None, float | None]", tuple(picked_at)))


def image_attributes(layout: Layout, name: str, content: Content, *, image: str | None) -> dict[str, Any]:
    """Attributes of a group with the arrays 0, 1, ... of `layout`; `image` is the path from a label to its image."""
    entry: dict[str, Any] = {
        "name": name,
        "axes": [_axis(axis, unit) for axis, unit in zip("zyx", layout.units, strict=True)],
        "datasets": [
            {"path": str(index), "coordinateTransformations": _transforms(level)} for index, level in enumerate(layout.levels)
        ],
        "type": _sampling(layout.levels, content),
    }
    ome: dict[str, Any] = {"multiscales": [entry]}
    if content == "mask":
        # Without this key napari takes the group for an image, or does not show it at all.
        ome["image-label"] = {"version": layout.version, "colors": [_FOREGROUND_COLOR]}
        if image is not None:
            ome["image-label"]["source"] = {"image": image}
    if layout.version == "0.4":
        entry["version"] = "0.4"
        return ome
    return {"ome": {"version": layout.version, **ome}}


def array_attributes(layout: Layout) -> dict[str, Any]:
    """Attributes of a bare array of the finest level, which has no group; no convention has a place for all of them."""
    level = layout.levels[0]
    return {"units": list(layout.units), "voxel_size": list(level.scale), "translation": list(level.translation)}


def labels_attributes(attributes: Mapping[str, Any], version: Version, names: Sequence[str]) -> dict[str, Any]:
    """Attributes of a group `labels` that now lists `names`; all else that it has stays."""
    if version == "0.4":
        return {**attributes, "labels": list(names)}
    return {**attributes, "ome": {**attributes.get("ome", {}), "version": version, "labels": list(names)}}


def _ome(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """0.5 keeps its metadata under the key `ome`, 0.4 at the top."""
    found = attributes.get("ome", attributes)
    return found if isinstance(found, Mapping) else {}


def _letter(axis: Mapping[str, Any]) -> str:
    """Of an axis; channels and time may have any name."""
    letter = {"channel": "c", "time": "t"}.get(str(axis.get("type")), str(axis["name"]).lower())
    return letter if len(letter) == 1 and letter in AXES else UNKNOWN_AXIS


def _unit(axis: Mapping[str, Any]) -> str | None:
    unit = axis.get("unit")
    return None if unit is None else str(unit)


def _parse_dataset(dataset: Mapping[str, Any], shared: Iterable[Mapping[str, Any]], n_axes: int, where: Path) -> Dataset:
    scale, translation = [1.0] * n_axes, [0.0] * n_axes
    for step in (*dataset["coordinateTransformations"], *shared):  # those of the multiscale apply after the dataset's own
        match step["type"]:
            case "scale":
                scale = [a * b for a, b in zip(scale, step["scale"], strict=True)]
                translation = [a * b for a, b in zip(translation, step["scale"], strict=True)]
            case "translation":
                translation = [a + b for a, b in zip(translation, step["translation"], strict=True)]
            case "identity":
                pass
            case other:
                raise VolumeError(f"{where} has a transformation {other!r}; only scale and translation can be kept.")
    if not all(0 < s < math.inf for s in scale):
        raise VolumeError(f"{where} has the scale {scale} at level {dataset['path']!r}; voxel sizes must be above 0.")
    if not all(map(math.isfinite, translation)):
        raise VolumeError(f"{where} has the translation {translation} at level {dataset['path']!r}; it must be finite.")
    return Dataset(str(dataset["path"]), tuple(scale), tuple(translation))


def _sampling(levels: Sequence[Level], content: Content) -> str:
    steps = [step_between(fine, coarse) for fine, coarse in pairwise(levels)]
    if any(at is not None for step in steps for at in step.picked_at):
        return "stride"
    return "majority" if content == "mask" else "mean"


def _axis(name: str, unit: str | None) -> dict[str, str]:
    return {"name": name, "type": "space"} | ({"unit": unit} if unit is not None else {})


def _transforms(level: Level) -> list[dict[str, Any]]:
    scale: dict[str, Any] = {"type": "scale", "scale": list(level.scale)}
    if not any(level.translation):
        return [scale]
    return [scale, {"type": "translation", "translation": list(level.translation)}]
