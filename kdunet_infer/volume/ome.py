"""OME-Zarr 0.4 and 0.5 metadata as frozen values, out of a group's attributes and back into attributes. Touches no files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from kdunet_infer.errors import VolumeError
from kdunet_infer.geometry import ZYX

Version = Literal["0.4", "0.5"]
Content = Literal["mask", "image"]
"""What a target holds. mask: uint8, 0 background and 1 foreground. image: uint8 grey values or probabilities."""
Vector = tuple[float, float, float]
Units = tuple[str | None, str | None, str | None]

_FOREGROUND_COLOR = {"label-value": 1, "rgba": [255, 64, 64, 255]}


@dataclass(frozen=True, slots=True)
class Dataset:
    """One level as an image lists it: the path of its array inside the group, and where its voxels lie."""

    path: str
    scale: Vector
    """Voxel size, zyx, in the image's units; the transform of the multiscale is folded in."""
    translation: Vector
    """Centre of voxel (0, 0, 0), zyx, in the image's units; folded as the scale is."""


@dataclass(frozen=True, slots=True)
class Multiscale:
    """An image's pyramid as its group describes it."""

    version: Version
    n_axes: int
    """Axes of the arrays: z, y and x, after those of size 1 that are dropped."""
    units: Units
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

    Raises VolumeError for versions other than 0.4 and 0.5, axes that do not end in zyx, and metadata that breaks the format.
    """
    try:
        entry = _ome(attributes)["multiscales"][0]
        version = str(attributes["ome"]["version"] if "ome" in attributes else entry.get("version", "0.4"))
        if version not in ("0.4", "0.5"):
            raise VolumeError(f"{where} is OME-Zarr {version}; only 0.4 and 0.5 can be read, so convert it to 0.5.")
        axes = [axis["name"] for axis in entry["axes"]]
        if axes[-3:] != ["z", "y", "x"]:
            raise VolumeError(f"{where} has the axes {','.join(axes)}; they must end in z,y,x, so transpose the image first.")
        shared = entry.get("coordinateTransformations", [])
        units = (axis.get("unit") for axis in entry["axes"][-3:])
        datasets = (_parse_dataset(dataset, shared, len(axes), where) for dataset in entry["datasets"])
        multiscale = Multiscale(cast("Version", version), len(axes), cast("Units", tuple(units)), tuple(datasets))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as exc:
        raise VolumeError(f"{where} has OME-Zarr metadata that breaks the format ({exc!r}); repair its multiscales.") from exc
    if not multiscale.datasets:
        raise VolumeError(f"{where} lists no levels; repair its multiscales.")
    return multiscale


def image_attributes(layout: Layout, name: str, content: Content, *, image: str | None) -> dict[str, Any]:
    """Attributes of a group with the arrays 0, 1, ... of `layout`; `image` is the path from a label to its image."""
    entry: dict[str, Any] = {
        "name": name,
        "axes": [_axis(axis, unit) for axis, unit in zip("zyx", layout.units, strict=True)],
        "datasets": [
            {"path": str(index), "coordinateTransformations": _transforms(level)} for index, level in enumerate(layout.levels)
        ],
        "type": "majority" if content == "mask" else "mean",
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


def labels_attributes(attributes: Mapping[str, Any], version: Version, names: Sequence[str]) -> dict[str, Any]:
    """Attributes of a group `labels` that now lists `names`; all else that it has stays."""
    if version == "0.4":
        return {**attributes, "labels": list(names)}
    return {**attributes, "ome": {**attributes.get("ome", {}), "version": version, "labels": list(names)}}


def _ome(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """0.5 keeps its metadata under the key `ome`, 0.4 at the top."""
    found = attributes.get("ome", attributes)
    return found if isinstance(found, Mapping) else {}


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
    return Dataset(str(dataset["path"]), cast("Vector", tuple(scale[-3:])), cast("Vector", tuple(translation[-3:])))


def _axis(name: str, unit: str | None) -> dict[str, str]:
    return {"name": name, "type": "space"} | ({"unit": unit} if unit is not None else {})


def _transforms(level: Level) -> list[dict[str, Any]]:
    scale: dict[str, Any] = {"type": "scale", "scale": list(level.scale)}
    if not any(level.translation):
        return [scale]
    return [scale, {"type": "translation", "translation": list(level.translation)}]
