"""TIFF stacks as (z, y, x): classic, BigTIFF, ImageJ, OME-TIFF. What tifffile raises ends here."""

from __future__ import annotations

import logging
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr

from kdunet_infer.errors import VolumeError
from kdunet_infer.volume.arrays import Voxels, check_exists, first_line
from kdunet_infer.volume.ome import UNKNOWN_AXIS, Vector
from kdunet_infer.volume.selection import AS_STORED, Selection, choose
from kdunet_infer.volume.units import nanometres

# What tifffile logs about a damaged file, line by line, is said by us in one sentence: print it only where logging is set up.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


def open_tiff(path: Path, selection: Selection = AS_STORED) -> tuple[Voxels, Vector | None]:
    """A TIFF stack as zyx, and its voxel size in nm: memory-mapped where its voxels lie in the file as they are, decoded
    page by page, or tile by tile, otherwise.

    Raises VolumeNotFound where nothing is, VolumeError for files that are damaged or hold anything but one grey stack.
    """
    check_exists(path)
    try:
        with ExitStack() as on_failure:
            tiff = tifffile.TiffFile(path)
            on_failure.callback(tiff.close)
            if len(tiff.series) > 1:
                # tifffile takes a page that was written by a call of its own for an image of its own, unless told not to.
                tiff.close()
                tiff = tifffile.TiffFile(path, is_shaped=False)
                on_failure.callback(tiff.close)
            return _tiff_voxels(path, tiff, selection, on_failure), _voxel_size(tiff)
    except VolumeError:
        raise
    except Exception as exc:
        raise VolumeError(f"{path} cannot be read as TIFF ({first_line(exc)}); copy it again or save it anew.") from exc


def _tiff_voxels(path: Path, tiff: tifffile.TiffFile, selection: Selection, on_failure: ExitStack) -> Voxels:
    """The one stack in an open file, which stays open for as long as its voxels can be read from it."""
    series = _only_stack(path, tiff)
    view = choose(series.shape, _axes(series, selection), selection, path)
    if series.dataoffset is not None:
        dtype = np.dtype(tiff.byteorder + series.dtype.char)
        array = np.memmap(path, dtype, "r", series.dataoffset, series.shape)
        _, y, x = view.shape(series.shape)
        return Voxels(path, array, (1, y, x), None, view)
    # Strips of a few rows would be decoded one by one; a page at a time is faster and small enough.
    decoded = zarr.open_array(series.aszarr(chunkmode=None if series.keyframe.is_tiled else "page"), mode="r")
    weakref.finalize(decoded, on_failure.pop_all().close)
    return Voxels(path, decoded, view.shape(decoded.chunks), None, view)


def _only_stack(path: Path, tiff: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    _check_complete(path, tiff)
    if len(tiff.series) != 1:
        _check_pages_alike(path, tiff)
        shapes = ", ".join(str(series.shape) for series in tiff.series)
        raise VolumeError(f"{path} holds {len(tiff.series)} images of different kinds ({shapes}); save the stack alone.")
    (series,) = tiff.series
    sizes = dict(zip(series.axes, series.shape, strict=True))
    if sizes.get("S", 1) > 1 or not {"Y", "X"} <= set(sizes):
        raise VolumeError(f"{path} has the axes {series.axes} {series.shape}, not grey slices; save one channel as a stack.")
    return series


def _axes(series: tifffile.TiffPageSeries, selection: Selection) -> str | None:
    """The letters of a stack's axes; None where tifffile knows no more than that there are several.

    A file of one stack of pages is a volume whatever its writer calls the pages: tifffile and Fiji write slices as channels or
    as frames if not told better. That is, unless one of them is asked for.
    """
    letters = [
        # tifffile calls axes of size 1 what it likes, X twice too.
        letter.lower() if letter in "TCZYX" and letter not in series.axes[index + 1 :] else UNKNOWN_AXIS
        for index, letter in enumerate(series.axes)
    ]
    stacks = [index for index, size in enumerate(series.shape) if size > 1 and letters[index] not in "zyx"]
    unnamed = [index for index in stacks if letters[index] == UNKNOWN_AXIS]
    asked = {"c": selection.channel, "t": selection.timepoint}
    if "z" not in letters and len(unnamed or stacks) == 1:
        (index,) = unnamed or stacks
        if asked.get(letters[index]) is None:
            letters[index] = "z"
    return None if len(unnamed) > 1 else "".join(letters)


def _check_complete(path: Path, tiff: tifffile.TiffFile) -> None:
    """Refuse a file that was cut short: tifffile then gives the pages it finds, as if there were no more."""
    n_pages = len(tiff.pages)
    link_at = tiff.pages.next_page_offset
    assert link_at is not None, "only a page's sub-pages have no link"
    # The last page of a whole file links to nothing, and its voxels end before the file does.
    last = tiff.pages[n_pages - 1]
    tiff.filehandle.seek(link_at)
    ends = [begin + size for begin, size in zip(last.dataoffsets, last.databytecounts, strict=False)]
    # Without ends, it was cut within the page's own description, and tifffile would give zeros.
    if any(tiff.filehandle.read(tiff.tiff.offsetsize)) or not ends or max(ends) > tiff.filehandle.size:
        raise VolumeError(f"{path} breaks off after page {n_pages}; copy it again or save it anew.")


def _check_pages_alike(path: Path, tiff: tifffile.TiffFile) -> None:
    first = tiff.pages.first
    for index, page in enumerate(tiff.pages):
        if (page.shape, page.dtype) != (first.shape, first.dtype):
            raise VolumeError(
                f"page {index + 1} of {path} is {page.shape} {page.dtype} and the first {first.shape} {first.dtype}; "
                "save slices of one size and type alone."
            )


def _voxel_size(tiff: tifffile.TiffFile) -> Vector | None:
    if tiff.is_ome:
        return _ome_voxel_size(tifffile.xml2dict(tiff.ome_metadata or ""))
    if tiff.is_imagej and tiff.imagej_metadata:
        about, tags = tiff.imagej_metadata, tiff.pages.first.tags
        y, x = (_pixel_size(tags, f"{axis}Resolution") for axis in "YX")
        return nanometres((about.get("spacing"), y, x), (about.get("unit"),) * 3)
    return None


def _ome_voxel_size(document: dict[str, Any]) -> Vector | None:
    image = document.get("OME", {}).get("Image", {})
    pixels = (image[0] if isinstance(image, list) else image).get("Pixels", {})
    sizes = [pixels.get(f"PhysicalSize{axis}") for axis in "ZYX"]
    return nanometres(sizes, [pixels.get(f"PhysicalSize{axis}Unit", "µm") for axis in "ZYX"])


def _pixel_size(tags: tifffile.TiffTags, name: str) -> float | None:
    """The length of a pixel, out of the number of pixels per length."""
    n_pixels, length = tags[name].value if name in tags else (0, 1)
    return length / n_pixels if n_pixels else None
