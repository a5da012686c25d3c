"""Volumes that cannot be segmented: how each is made, and what is said about it. A table for tests and documentation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import tifffile
import zarr
from test_volume_readers import hdf5, mrc, png_files, tiff_files
from volume_files import halved, write_image

from kdunet_infer.testing import noise

SHAPE = (6, 20, 18)
VOXELS = noise(SHAPE)
OUT = "out.zarr"
Arguments = list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """A command that ends with a sentence, or warns."""

    make: Callable[[Path], Arguments]
    """Makes the files in a folder, which is the current one then; returns the command, `--model` where it matters."""
    says: str
    """The sentence; `...` stands for words of other libraries and for lists that grow."""
    means: str
    """For the documentation."""
    disk: tuple[int, int] | None = None
    """From which write on the disk refuses, and with which error."""


def segmenting(path: Path | str, *options: str) -> Arguments:
    return ["segment", str(path), "-o", OUT, *options]


def image(path: Path, **options: Any) -> Path:
    return write_image(path, [VOXELS, halved(VOXELS)], scales=[(40, 4, 4), (80, 8, 8)], **options)


def array(path: Path, voxels: npt.NDArray[Any], chunk: tuple[int, ...] | None = None, **options: Any) -> Path:
    zarr.create_array(str(path), data=voxels, chunks=chunk or tuple(min(n, 8) for n in voxels.shape), **options)
    return path


def tiff(path: Path, voxels: npt.NDArray[Any], **options: Any) -> Path:
    tifffile.imwrite(path, voxels, **options)
    return path


def without(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


def _written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def _edited(path: Path, name: str, change: Callable[[Any], None]) -> Path:
    document = json.loads((path / name).read_text())
    change(document)
    (path / name).write_text(json.dumps(document))
    return path


def _cut(path: Path, file: str, n_left: int) -> Path:
    """The file in the folder, or the path itself, cut short."""
    cut = path / file
    cut.write_bytes(cut.read_bytes()[:n_left])
    return path


def _loop(folder: Path) -> Path:
    (folder / "em.zarr").symlink_to("data.zarr")
    (folder / "data.zarr").symlink_to("em.zarr")
    return folder / "em.zarr"


def _group(path: Path) -> Path:
    zarr.create_group(str(path))
    image(path / "em")
    return path


def _moved_level(path: Path) -> Path:
    (path / "s1").rename(path / "moved")
    return path


def _unknown_filter(path: Path) -> Path:
    """A data set whose filter has a number that no plug-in here has."""
    with h5py.File(path, "w") as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk(SHAPE)
        properties.set_filter(32999, h5py.h5z.FLAG_OPTIONAL, ())
        h5py.h5d.create(file.id, b"raw", h5py.h5t.STD_U8LE, h5py.h5s.create_simple(SHAPE), properties)
    return path


def _hdf5(path: Path) -> Path:
    hdf5(VOXELS, path)
    return path


def _pages(path: Path, *shapes: tuple[int, int]) -> Path:
    with tifffile.TiffWriter(path) as file:
        for shape in shapes:
            file.write(np.zeros(shape, np.uint8), contiguous=False)
    return path


def _other_slice(folder: Path) -> Path:
    tiff(tiff_files(VOXELS, folder) / "s_002.tif", VOXELS[0, :, :9])
    return folder


def _with(value: float) -> npt.NDArray[np.float32]:
    voxels = VOXELS.astype(np.float32)
    voxels[3, 7, 5] = value
    return voxels


def _empty(path: Path) -> Path:
    zarr.create_array(str(path), shape=(0, 20, 18), dtype="uint8")
    return path


VOLUMES: dict[str, Bad] = {
    "nothing": Bad(
        make=lambda p: segmenting("em.zarr"),
        says="there is nothing at em.zarr, or it may not be read; check the path.",
        means="The path does not exist, seen from the current folder, or a folder on the way may not be entered.",
    ),
    "loop": Bad(
        make=lambda p: segmenting(_loop(p).name),
        says="em.zarr is a link that leads to nothing, to itself or to where you may not look; mend the link.",
        means="A symbolic link whose end was moved or removed, or links that lead to each other.",
    ),
    "other": Bad(
        make=lambda p: segmenting(_written(p / "em.czi", b"ZISRAWFILE").name),
        says="em.czi is neither a Zarr array or group nor a file of a format that is read (.tif, .tiff, .png, .h5, "
        ".hdf5, .hdf, .mrc, .mrcs, .map, .rec, .st, .ali); give one.",
        means="A microscope's own format; `bioformats2raw` converts most of them to OME-Zarr.",
    ),
    "group": Bad(
        make=lambda p: segmenting(_group(p / "all.zarr").name),
        says="all.zarr is a Zarr group without an image of its own; give one of its members: em.",
        means="A Zarr group without `multiscales` is a folder of images, not an image.",
    ),
    "json": Bad(
        make=lambda p: segmenting(_cut(image(p / "em.zarr"), "zarr.json", 300).name),
        says="em.zarr has Zarr metadata that cannot be read (... in zarr.json); repair or restore it.",
        means="A metadata file was cut short, or edited by hand; the sentence names the file.",
    ),
    "ome": Bad(
        make=lambda p: segmenting(
            _edited(image(p / "em.zarr"), "zarr.json", lambda d: d["attributes"]["ome"]["multiscales"][0].pop("axes")).name
        ),
        says="em.zarr has OME-Zarr metadata that breaks the format (KeyError('axes')); repair its multiscales.",
        means="The group says that it is an OME-Zarr image and lacks what such an image must say.",
    ),
    "version": Bad(
        make=lambda p: segmenting(
            _edited(image(p / "em.zarr"), "zarr.json", lambda d: d["attributes"]["ome"].update(version="0.6")).name
        ),
        says="em.zarr is OME-Zarr 0.6; only 0.4 and 0.5 can be read, so convert it to 0.5.",
        means="A newer version may mean other things by the same words.",
    ),
    "level": Bad(
        make=lambda p: segmenting(_moved_level(image(p / "em.zarr")).name),
        says="em.zarr/s1 is no array with 3 axes, as em.zarr says it is; repair it.",
        means="The image lists a level that was moved or removed, or never written.",
    ),
    "codec-v3": Bad(
        make=lambda p: segmenting(
            _edited(array(p / "em.zarr", VOXELS), "zarr.json", lambda d: d["codecs"][-1].update(name="jpegxl")).name
        ),
        says="em.zarr needs the codec 'jpegxl', which is not known here; write it anew with another, such as zstd.",
        means="The chunks are compressed by something that the installed zarr does not know.",
    ),
    "codec-v2": Bad(
        make=lambda p: segmenting(
            _edited(array(p / "em.zarr", VOXELS, zarr_format=2), ".zarray", lambda d: d["compressor"].update(id="jpegls")).name
        ),
        says="em.zarr needs the codec 'jpegls', which is not known here; write it anew with another, such as zstd.",
        means="The same in a Zarr v2 array.",
    ),
    "filter": Bad(
        make=lambda p: segmenting(f"{_unknown_filter(p / 'em.h5').name}:/raw"),
        says="em.h5:/raw needs the HDF5 filter (32999), which is not known here; pack it anew with h5repack -f GZIP=1.",
        means="The same in an HDF5 file.",
    ),
    "chunk": Bad(
        make=lambda p: segmenting(_cut(array(p / "em.zarr", VOXELS), "c/0/1/1", 20).name),
        says="chunk (0, 1, 1) (z, y, x) of em.zarr cannot be read (...); restore it from the original data, or mend the disk.",
        means="A chunk file is cut short, or its bytes have changed: a failing disk, or a copy that broke off.",
    ),
    "shard": Bad(
        make=lambda p: segmenting(_cut(image(p / "em.zarr", shard=(8, 16, 16)), "s0/c/0/0/0", 99).name),
        says="shard (0, 0, 0) (z, y, x) of em.zarr/s0 cannot be read (...); restore it from the original data, or "
        "mend the disk.",
        means="The same in an image with shards, which are several chunks in a file.",
    ),
    "empty-shard": Bad(
        make=lambda p: segmenting(_cut(image(p / "em.zarr", shard=(8, 16, 16)), "s0/c/0/0/1", 0).name),
        says="shard (0, 0, 1) (z, y, x) of em.zarr/s0 cannot be read (...); restore it from the original data, or "
        "mend the disk.",
        means="A file without content, as a power cut leaves them; zarr alone would read zeros there and say nothing.",
    ),
    "not-tiff": Bad(
        make=lambda p: segmenting(_written(p / "stack.tif", b"<html>not found</html>").name),
        says="stack.tif cannot be read as TIFF (...); copy it again or save it anew.",
        means="The file is something else than its suffix says, such as the web page of a download that failed.",
    ),
    "cut-tiff": Bad(
        make=lambda p: segmenting(_cut(tiff(p / "stack.tif", VOXELS, photometric="minisblack"), "", 1500).name),
        says="stack.tif breaks off after page 1; copy it again or save it anew.",
        means="The file is shorter than its pages: a copy that broke off. Other programs may show what is there.",
    ),
    "pages": Bad(
        make=lambda p: segmenting(_pages(p / "stack.tif", (20, 18), (20, 18), (10, 9)).name),
        says="page 3 of stack.tif is (10, 9) uint8 and the first (20, 18) uint8; save slices of one size and type alone.",
        means="The file holds more than the stack, such as a thumbnail.",
    ),
    "rgb-tiff": Bad(
        make=lambda p: segmenting(tiff(p / "stack.tif", np.zeros((6, 20, 18, 3), np.uint8), photometric="rgb").name),
        says="stack.tif has the axes QYXS (6, 20, 18, 3), not grey slices; save one channel as a stack.",
        means="A colour image, as screenshots and exported figures are, even if it looks grey.",
    ),
    "rgb-png": Bad(
        make=lambda p: segmenting(png_files(np.zeros((3, 20, 18, 3), np.uint8), p / "slices", "em_{}.png").name),
        says="slices/em_0.png is a colour image or has transparency; save one channel as grey.",
        means="The same in a folder of slices.",
    ),
    "gap": Bad(
        make=lambda p: segmenting(without(tiff_files(VOXELS, p / "slices"), "s_003.tif").name),
        says="slices has no slice 3 after s_002.tif; put it there, or number the slices without a gap.",
        means="A slice is missing from the folder; those on both sides of it would become neighbours.",
    ),
    "sizes": Bad(
        make=lambda p: segmenting(_other_slice(p / "slices").name),
        says="slices/s_002.tif is 20 x 9 uint8 and s_000.tif 20 x 18 uint8; a folder must hold slices of one size and type.",
        means="One of the slices is of another size or type than the first.",
    ),
    "cut-hdf5": Bad(
        make=lambda p: segmenting(f"{_cut(_hdf5(p / 'em.h5'), '', 900).name}:/volumes/raw"),
        says="em.h5 cannot be read as HDF5 (...); copy it again or save it anew.",
        means="A copy that broke off, or a file that was never closed by the program that wrote it.",
    ),
    "no-path": Bad(
        make=lambda p: segmenting(_hdf5(p / "em.h5").name),
        says="em.h5 is given without the path of a data set; give one of: em.h5:/volumes/raw.",
        means="An HDF5 file is a tree, and which data set in it is the volume has to be said.",
    ),
    "cut-mrc": Bad(
        make=lambda p: segmenting(_cut(mrc(VOXELS.view(np.int8), p / "em.mrc"), "", 2000).name),
        says="em.mrc cannot be read as MRC (...); copy it again or save it anew.",
        means="A copy that broke off.",
    ),
    "n5": Bad(
        make=lambda p: segmenting(_written(p / "em.n5" / "attributes.json", b"{}").parent.name),
        says="em.n5 is N5, which is not read; copy it to Zarr with tensorstore (pip install tensorstore), from its "
        "driver 'n5' to 'zarr3', and open that with --axes xyz.",
        means="N5 is converted first; [formats.md](formats.md) says how.",
    ),
    "precomputed": Bad(
        make=lambda p: segmenting(_written(p / "em" / "info", b'{"scales": []}').parent.name),
        says="em is a neuroglancer precomputed volume, which is not read; copy it to Zarr with tensorstore (pip "
        "install tensorstore), from its driver 'neuroglancer_precomputed' to 'zarr3', and open that with --axes xyzc.",
        means="The same for the format of neuroglancer.",
    ),
    "complex": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", VOXELS.astype("complex64")).name),
        says="em.zarr holds complex64 voxels, and grey values are real; save the magnitude or a part of them.",
        means="Fourier transforms and phase images are no grey values.",
    ),
    "bool": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", VOXELS > 99).name),
        says="em.zarr holds bool voxels, a mask and not an image; give the image itself.",
        means="A mask was given where the image belongs.",
    ),
    "empty": Bad(
        make=lambda p: segmenting(_empty(p / "em.zarr").name),
        says="em.zarr has the shape (0, 20, 18), so there are no voxels in it; give another volume.",
        means="The array was created and has no slices.",
    ),
    "nan": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", _with(np.nan)).name),
        says="voxel (3, 7, 5) (z, y, x) of the volume is nan; replace NaN and infinite voxels by a grey value, "
        "such as 0, and run again.",
        means="A filter divided by zero, or holes were marked by NaN; which grey value they should have cannot be guessed.",
    ),
    "inf": Bad(
        make=lambda p: segmenting(tiff(p / "stack.tif", _with(np.inf)).name),
        says="voxel (3, 7, 5) (z, y, x) of the volume is inf; replace NaN and infinite voxels by a grey value, "
        "such as 0, and run again.",
        means="The same.",
    ),
    "constant": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", np.full(SHAPE, 7, np.uint16)).name),
        says="em.zarr has the grey value 7 in every voxel, so there is nothing to segment; give another volume, or "
        "--intensity-range lo,hi if the rest of it differs.",
        means="The volume was allocated and never filled, or another channel is meant.",
    ),
}
