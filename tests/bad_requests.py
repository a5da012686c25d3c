"""Requests that cannot be met, of selections, models, outputs and evaluations; and volumes that do not fit, which warn."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import zarr
from bad_volumes import OUT, VOXELS, Bad, array, image, segmenting, tiff, without
from onnx import helper
from small_models import small_card, unet_onnx
from volume_files import write_image

from kdunet_infer.card import METADATA_KEY


def _student(path: Path, **card: Any) -> list[str]:
    """The option for a model with these fields in its card."""
    proto = unet_onnx(1, 2)
    helper.set_model_props(proto, {METADATA_KEY: json.dumps({**json.loads(small_card(1).to_json()), **card})})
    onnx.save(proto, path)
    return ["--model", path.name]


def _student_without_card(path: Path) -> list[str]:
    proto = unet_onnx(1, 2)
    del proto.metadata_props[:]
    onnx.save(proto, path)
    return ["--model", path.name]


def _no_student(path: Path) -> list[str]:
    path.write_bytes(b"PK\3\4 of PyTorch")
    return ["--model", path.name]


def _broken_student(path: Path) -> list[str]:
    """A network in which something reads what nothing writes."""
    proto = unet_onnx(1, 2)
    proto.graph.node[1].input[0] = "nothing"
    onnx.save(proto, path)
    return ["--model", path.name]


def _trained(path: Path, **card: Any) -> list[str]:
    """A student that was trained on grey values such as VOXELS."""
    shares = np.bincount(VOXELS.ravel(), minlength=256) / VOXELS.size
    return _student(path, grey_histogram=shares.tolist(), **card)


def twelve_bits(path: Path) -> Path:
    """A volume that uses 0 to 4080 of 65535."""
    return array(path, VOXELS.astype(np.uint16) * 16)


def _channels(path: Path) -> Path:
    return write_image(path, [np.stack([VOXELS, VOXELS])], axes="czyx")


def _labelled(path: Path) -> Path:
    image(path)
    zarr.create_group(str(path / "labels"), attributes={"ome": {"version": "0.5", "labels": ["mito"]}})
    write_image(path / "labels" / "mito", [VOXELS // 128], extra={"image-label": {}})
    return path


def _flickering() -> npt.NDArray[np.uint8]:
    return VOXELS // 4 + np.arange(6, dtype=np.uint8)[:, None, None] % 2 * 90


def _beside(path: Path) -> Path:
    """An array, beside one of somebody else where the output is to go."""
    array(path.parent / OUT, VOXELS)
    return array(path, VOXELS)


SELECTIONS: dict[str, Bad] = {
    "axes-unknown": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", VOXELS.reshape(2, 3, 20, 18)).name),
        says="em.zarr has the shape (2, 3, 20, 18) and no metadata that name its axes; name them with --axes, such as czyx.",
        means="Of four axes without names it cannot be guessed which is z, and which are channels.",
    ),
    "axes-odd": Bad(
        make=lambda p: segmenting(image(p / "em.zarr", axes="qyx").name),
        says="em.zarr/s0 has the shape (6, 20, 18) with an axis that is none of tczyx; name them with --axes, such as tczyx.",
        means="The metadata call an axis something that is neither time, channel nor space.",
    ),
    "axes-twice": Bad(
        make=lambda p: segmenting(image(p / "em.zarr", axes="zyy").name),
        says="em.zarr/s0 has metadata that call its axes z,y,y; name them with --axes, such as tczyx.",
        means="The metadata contradict themselves; `--axes` wins over them.",
    ),
    "axes-given": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", VOXELS).name, "--axes", "tczyx"),
        says="em.zarr has 3 axes (6, 20, 18), and 'tczyx' names 5; give --axes a letter for each.",
        means="`--axes` names each axis of the array as stored.",
    ),
    "axes-letter": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", VOXELS).name, "--axes", "abc"),
        says="axes 'abc' have the letter 'a'; each must be one of tczyx, such as zyx or tczyx.",
        means="Time, channel, z, y and x are all the axes that there can be.",
    ),
    "level": Bad(
        make=lambda p: segmenting(image(p / "em.zarr").name, "--level", "5"),
        says="em.zarr has 2 levels, counted from 0, so there is no level 5; give another --level.",
        means="`kdunet-infer info` lists the levels.",
    ),
    "level-of-array": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", VOXELS).name, "--level", "1"),
        says="em.zarr is one array, so it has no level 1; give the OME-Zarr image that it is in.",
        means="An array by itself has one resolution.",
    ),
    "level-of-tiff": Bad(
        make=lambda p: segmenting(tiff(p / "stack.tif", VOXELS, photometric="minisblack").name, "--level", "1"),
        says="stack.tif has no levels, as an OME-Zarr image has, so there is no level 1; give --level 0.",
        means="So has a TIFF, an HDF5 data set or an MRC file.",
    ),
    "channel": Bad(
        make=lambda p: segmenting(_channels(p / "em.zarr").name, "--channel", "2"),
        says="em.zarr/s0 has 2 channels, counted from 0, so there is no channel 2; give another --channel.",
        means="Channels are counted from 0.",
    ),
    "no-channel": Bad(
        make=lambda p: segmenting(_channels(p / "em.zarr").name),
        says="em.zarr/s0 has 2 channels; choose one with --channel 0 to 1.",
        means="One channel is segmented, and which one has to be said.",
    ),
    "timepoint": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", VOXELS).name, "--timepoint", "1"),
        says="em.zarr has 1 timepoint, counted from 0, so there is no timepoint 1; give another --timepoint.",
        means="The array has no time axis, or fewer timepoints.",
    ),
    "roi": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", VOXELS).name, "--roi", "0:9,:,:"),
        says="region of interest 0:9,0:20,0:18 leaves the volume of (6, 20, 18) voxels; choose one inside 0:6,0:20,0:18.",
        means="The region leaves the volume; an end that is left out is the volume's own.",
    ),
    "roi-backwards": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", VOXELS).name, "--roi", "4:2,:,:"),
        says="box (4, 0, 0) to (2, 20, 18) ends before it begins; give begin:end with end >= begin.",
        means="Begin and end are swapped.",
    ),
    "roi-empty": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", VOXELS).name, "--roi", "2:2,:,:"),
        says="region of interest 2:2,0:20,0:18 holds no voxels; give begin:end with end > begin along each axis.",
        means="The end is not included: slice 2 alone is 2:3.",
    ),
    "voxel-size": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", VOXELS).name, "--voxel-size", "40,0,4"),
        says="a voxel size of 40,0,4 nm (z,y,x) cannot be; give three lengths above 0.",
        means="Voxel sizes are lengths in nanometres.",
    ),
    "range": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", VOXELS.astype("uint16")).name, "--intensity-range", "4095,0"),
        says="the intensity range 4095,0 to 0,255 does not increase; give two finite numbers, the darker first.",
        means="The darker end comes first; a volume with inverted contrast has to be inverted before.",
    ),
}


MODELS: dict[str, Bad] = {
    "name": Bad(
        make=lambda p: [*segmenting(array(p / "em.zarr", VOXELS).name), "--model", "mito"],
        says="no model is called 'mito' and no file is there; released models: ....",
        means="A model is given by its name, as `kdunet-infer models` lists them, or by its file.",
    ),
    "not-onnx": Bad(
        make=lambda p: [*segmenting(array(p / "em.zarr", VOXELS).name), *_no_student(p / "student.pt")],
        says="student.pt is not an ONNX file, or is cut short (...); copy or export it again.",
        means="The file is another one, such as a checkpoint of PyTorch, or a download that broke off.",
    ),
    "no-card": Bad(
        make=lambda p: [*segmenting(array(p / "em.zarr", VOXELS).name), *_student_without_card(p / "net.onnx")],
        says="net.onnx has no model card ('kdunet' in its metadata); export it with `kdunet export`.",
        means="Without its card neither the halo nor the threshold of a network is known.",
    ),
    "graph": Bad(
        make=lambda p: [*segmenting(array(p / "em.zarr", VOXELS).name), *_broken_student(p / "net.onnx")],
        says="net.onnx holds a network that breaks the ONNX format (...); copy or export it again.",
        means="The file is damaged, or was edited.",
    ),
    "newer": Bad(
        make=lambda p: [*segmenting(array(p / "em.zarr", VOXELS).name), *_student(p / "new.onnx", format=3)],
        says="new.onnx: the model card is of format 3, newer than this kdunet, which reads up to 2; update kdunet.",
        means="A later version of kdunet exported the model, and may mean other things by the same fields.",
    ),
    "halo": Bad(
        make=lambda p: [
            *segmenting(array(p / "em.zarr", VOXELS).name),
            *_student(p / "odd.onnx", stride_zyx=[1, 16, 16], halo_zyx=[0, 90, 96]),
        ],
        says="odd.onnx: halo along y is 90 voxels, not a multiple of the network's stride 16; re-export the model "
        "with a halo of 96.",
        means="A card that cannot be, as after an edit by hand.",
    ),
    "engine": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", VOXELS).name, "--engine", "torch"),
        says="no engine is called 'torch'; choose one of auto, ....",
        means="`kdunet-infer engines` lists the engines, and what each of them needs here.",
    ),
}


OUTPUTS: dict[str, Bad] = {
    "no-place": Bad(
        make=lambda p: ["segment", tiff(p / "stack.tif", VOXELS, photometric="minisblack").name],
        says="stack.tif is not an OME-Zarr image at full resolution, so it takes no labels; write to a new volume "
        "with -o OUT.zarr.",
        means="Only an OME-Zarr image has a place for labels.",
    ),
    "theirs": Bad(
        make=lambda p: segmenting(_beside(p / "em.zarr").name, "--overwrite"),
        says="out.zarr exists and was not made by kdunet, so it is never replaced; choose another name.",
        means="What is there was made by something else; `--overwrite` replaces outputs of kdunet alone.",
    ),
    "source": Bad(
        make=lambda p: ["segment", image(p / "em.zarr").name, "-o", "em.zarr/mask.zarr"],
        says="the output em.zarr/mask.zarr overlaps the source .../em.zarr, which is never changed; choose a path outside it.",
        means="Nothing is written into raw data, but for `labels` inside an OME-Zarr image.",
    ),
    "suffix": Bad(
        make=lambda p: ["segment", array(p / "em.zarr", VOXELS).name, "-o", "mask"],
        says="mask is no possible output; give a path that ends in .zarr, or in .tif for a TIFF stack.",
        means="The suffix says which format is meant.",
    ),
    "format": Bad(
        make=lambda p: ["segment", array(p / "em.zarr", VOXELS).name, "-o", "mask.zarr", "--format", "tiff"],
        says="output mask.zarr cannot be tiff; give a path that ends in .tif, or another format.",
        means="Suffix and format contradict each other.",
    ),
    "unknown-format": Bad(
        make=lambda p: ["segment", array(p / "em.zarr", VOXELS).name, "-o", "mask.zarr", "--format", "n5"],
        says="output format 'n5' is unknown; choose one of ome-zarr-0.5, ome-zarr-0.4, zarr, tiff.",
        means="These are the formats that are written.",
    ),
    "full": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", VOXELS).name),
        disk=(4, errno.ENOSPC),
        says="out.zarr cannot be written, for the disk is full (...); free space there or choose another output, "
        "then run the same command again.",
        means="The disk is full, or a quota used up. What was written so far counts for nothing; the same command starts over.",
    ),
    "full-label": Bad(
        make=lambda p: ["segment", image(p / "em.zarr").name],
        disk=(12, errno.ENOSPC),
        says="em.zarr/labels/small cannot be written, for the disk is full (...); free space there or choose "
        "another output, then run the same command again.",
        means="The same inside the volume: it stays as it was, and no label is listed.",
    ),
    "read-only": Bad(
        make=lambda p: ["segment", image(p / "em.zarr").name],
        disk=(1, errno.EROFS),
        says="em.zarr/labels/small cannot be written, for that is not allowed there (...); get permission or "
        "choose another output, then run the same command again.",
        means="The volume lies where it may only be read; give an output elsewhere with `-o`.",
    ),
    "forbidden": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", VOXELS).name),
        disk=(1, errno.EACCES),
        says="out.zarr cannot be written, for that is not allowed there (...); get permission or choose another "
        "output, then run the same command again.",
        means="The folder belongs to somebody else.",
    ),
}


EVALUATIONS: dict[str, Bad] = {
    "image-as-truth": Bad(
        make=lambda p: ["evaluate", array(p / "mask.zarr", VOXELS // 128).name, _labelled(p / "em.zarr").name],
        says="em.zarr is an image, not a mask; it has the labels mito: give em.zarr/labels/mito.",
        means="An image was given where its labels belong.",
    ),
    "floats": Bad(
        make=lambda p: ["evaluate", array(p / "p.zarr", VOXELS / 255).name, array(p / "truth.zarr", VOXELS // 128).name],
        says="p.zarr holds float64 voxels, and labels are integers; threshold or convert it.",
        means="Probabilities are no mask.",
    ),
    "shapes": Bad(
        make=lambda p: ["evaluate", array(p / "mask.zarr", VOXELS // 128).name, array(p / "truth.zarr", VOXELS[1:]).name],
        says="prediction has shape (6, 20, 18) and truth (5, 20, 18), so their voxels do not correspond; compare "
        "the same region of both at the same resolution level.",
        means="Mask and truth are of different volumes, or of different levels or parts of one.",
    ),
}


WARNINGS: dict[str, Bad] = {
    "missing": Bad(
        make=lambda p: segmenting(without(array(p / "em.zarr", VOXELS), "c/0/1/1", "c/0/2/0").name),
        says="2 of 9 chunk files of em.zarr do not exist (22.2%) and are read as the fill value, as Zarr has it; "
        "that is right where the volume is empty, else restore them from the original data.",
        means="Zarr leaves out chunks that hold nothing but the fill value, so this is no error; a copy that lost files looks "
        "the same.",
    ),
    "12-bit": Bad(
        make=lambda p: [
            *segmenting(twelve_bits(p / "em.zarr").name, "--intensity-range", "0,65535"),
            *_trained(p / "s.onnx"),
        ],
        says="98 % of the voxels have grey values from 0 to 16 on the model's scale, those of its training images "
        "go from 3 to 251; spread them with --intensity-range=0,4080.",
        means="12 bits stored in 16: with the range of the type all voxels become nearly black. Without `--intensity-range` "
        "the range is found by percentiles.",
    ),
    "voxel-size": Bad(
        make=lambda p: [*segmenting(image(p / "em.zarr").name), *_trained(p / "s.onnx", voxel_size_nm=[40, 8, 8])],
        says="the volume has voxels of 4 x 4 nm (y, x) and the model was trained on 8 x 8 nm (y, x), 2.00 times "
        "apart; segment --level 1, which has 8 x 8 nm (y, x).",
        means="The network looks for what it was trained on at the size that it was trained on.",
    ),
    "no-voxel-size": Bad(
        make=lambda p: [*segmenting(array(p / "em.zarr", VOXELS).name), *_trained(p / "s.onnx", voxel_size_nm=[40, 4, 4])],
        says="the voxel size of the volume is not known, and the model was trained on 4 x 4 nm (y, x); give it "
        "with --voxel-size to have it compared.",
        means="Bare arrays, PNG and many TIFF files do not say how large a voxel is.",
    ),
    "flicker": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", _flickering()).name),
        says="the brightness flickers: slice means jump by 62.5 grey levels (standard deviation) from one slice to "
        "the next, 339% of the deviation within a slice; even the slices out, for example by matching their "
        "means, and segment that.",
        means="Sections were imaged or stained unevenly; those that are too dark or too bright are segmented worse.",
    ),
    "nothing-found": Bad(
        make=lambda p: segmenting(array(p / "em.zarr", VOXELS).name, "--threshold", "0.999999"),
        says="no voxel of em.zarr became foreground; check that the image looks like what small was trained on "
        "(`kdunet-infer info`): contrast, voxel size, stain.",
        means="Nothing was found, as is right in a volume of resin alone.",
    ),
}
