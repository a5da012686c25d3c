"""Volumes on disk: OME-Zarr, plain Zarr and TIFF in, OME-Zarr out. The only importer of zarr and tifffile; knows no models.

sources.py  what a path holds: `open_source`, `open_labels`
targets.py  where results go: `create_label`, `create_image`, `create_volume`
arrays.py   Zarr nodes and TIFF files as zyx arrays; foreign exceptions end there
ome.py      OME-Zarr metadata as values
pyramid.py  coarser levels out of finer ones
"""

from __future__ import annotations

from kdunet_infer.volume.arrays import Voxels
from kdunet_infer.volume.ome import Content, Layout, Level
from kdunet_infer.volume.sources import VolumeSource, open_labels, open_source
from kdunet_infer.volume.targets import VolumeTarget, check_image, create_image, create_label, create_volume

__all__ = [
    "Content",
    "Layout",
    "Level",
    "VolumeSource",
    "VolumeTarget",
    "Voxels",
    "check_image",
    "create_image",
    "create_label",
    "create_volume",
    "open_labels",
    "open_source",
]
