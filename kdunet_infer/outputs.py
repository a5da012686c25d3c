"""Where the results of a run are going to lie, decided and checked before anything is written. Knows no blocks or engines."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kdunet_infer.errors import ConfigError
from kdunet_infer.geometry import ZYX
from kdunet_infer.options import SegmentOptions
from kdunet_infer.volume import (
    Content,
    TargetFormat,
    VolumeSource,
    VolumeTarget,
    check_image,
    check_label,
    create_image,
    create_label,
)
from kdunet_infer.volume import target_write_shape as write_shape_like
from kdunet_infer.volume.formats import choose_format, own_format


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """A volume that a run is going to write."""

    path: Path
    content: Content
    target_format: TargetFormat
    label: str | None = None
    """Its name among the labels of the source; None: a volume of its own."""

    def write_shape(self, source: VolumeSource) -> ZYX:
        """Voxels of one of its files, zyx."""
        return write_shape_like(source, self.target_format)

    def check(self, source: VolumeSource, *, overwrite: bool) -> None:
        """Refuse what `create` would refuse, before anything is removed. Raises VolumeError."""
        if self.label is None:
            check_image(self.path, like=source, overwrite=overwrite, target_format=self.target_format)
        else:
            check_label(source, self.label, overwrite=overwrite)

    def create(self, source: VolumeSource, *, overwrite: bool) -> VolumeTarget:
        """Start it; raises as `create_label` and `create_image` do."""
        if self.label is not None:
            return create_label(source, self.label, overwrite=overwrite)
        return create_image(self.path, like=source, content=self.content, overwrite=overwrite, target_format=self.target_format)


def mask_output(source: VolumeSource, target: str | Path | None, model_name: str, options: SegmentOptions) -> Output:
    """The mask: at `target`, else a label of the source, else (of a coarser level, which has no labels) beside the source.

    Raises ConfigError for a format that a label cannot have, VolumeError for a path that does not go with the format.
    """
    if target is None and options.level:
        suffix = ".tif" if options.target_format == "tiff" else ".zarr"
        beside = Path(os.path.abspath(source.path))
        target = beside.with_name(f"{beside.stem.removesuffix('.zarr')}-{model_name}-level{options.level}{suffix}")
    if target is not None:
        return _volume(Path(target), source, "mask", options)
    if options.target_format is not None:
        raise ConfigError(
            f"format {options.target_format} is for a volume of its own, and labels are as their image is; give a path with -o."
        )
    path = (source.group or source.path) / "labels" / model_name
    return Output(path=path, content="mask", target_format=own_format(source.layout), label=model_name)


def probability_output(source: VolumeSource, mask: Output, options: SegmentOptions) -> Output | None:
    """The probabilities, where they are asked for.

    Raises ConfigError where they overlap the mask or are cut into other files, VolumeError as `mask_output` does.
    """
    if options.probabilities is None:
        return None
    found = _volume(Path(options.probabilities), source, "image", options)
    if _overlap(mask.path.resolve(), found.path.resolve()):
        raise ConfigError(f"mask {mask.path} and probabilities {found.path} overlap; choose two separate paths.")
    if found.write_shape(source) != mask.write_shape(source):
        raise ConfigError(
            f"mask {mask.path} ({mask.target_format}) and probabilities {found.path} ({found.target_format}) are cut into "
            "different files, so one block would not be whole files of both; give both the same format."
        )
    return found


def _volume(path: Path, source: VolumeSource, content: Content, options: SegmentOptions) -> Output:
    return Output(path=path, content=content, target_format=choose_format(path, options.target_format, source.layout))


def _overlap(a: Path, b: Path) -> bool:
    return a == b or a in b.parents or b in a.parents
