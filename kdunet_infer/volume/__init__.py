"""Volumes on disk: what microscopes leave in, what viewers open out. The only importer of zarr and tifffile; knows no models.

sources.py  what a path holds: `open_source`, `open_labels`
selection.py  which axes, channel, timepoint and level of it: `Selection`
tiff.py, slices.py, hdf5.py, mrc.py  one format each as zyx arrays; foreign exceptions end there
foreign.py  formats that are known and refused
targets.py  where results go: `create_label`, `create_image`, `create_volume`
arrays.py   Zarr nodes as zyx arrays; foreign exceptions end there
chunk_files.py  the files of a Zarr array: which are missing, which cut short
archive.py  Zarr in zip files
ome.py      OME-Zarr metadata as values
units.py    lengths in nanometres
pyramid.py  coarser levels out of finer ones
formats.py  the formats of outputs, and how each is cut into chunks
tiff_target.py  a finished volume as one TIFF
ownership.py  what is an output of ours, and may be removed
listing.py, locking.py  where viewers find a label, and one writer at a time there
"""

from __future__ import annotations

from kdunet_infer.volume.arrays import Voxels
from kdunet_infer.volume.formats import TargetFormat
from kdunet_infer.volume.ome import Content, Layout, Level
from kdunet_infer.volume.selection import Selection
from kdunet_infer.volume.sources import VolumeSource, open_labels, open_source
from kdunet_infer.volume.targets import (
    VolumeTarget,
    check_image,
    check_label,
    create_image,
    create_label,
    create_volume,
    target_write_shape,
)

__all__ = [
    "Content",
    "Layout",
    "Level",
    "Selection",
    "TargetFormat",
    "VolumeSource",
    "VolumeTarget",
    "Voxels",
    "check_image",
    "check_label",
    "create_image",
    "create_label",
    "create_volume",
    "open_labels",
    "open_source",
    "target_write_shape",
]
