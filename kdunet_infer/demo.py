"""The self-test that a newcomer runs first: a synthetic volume, segmented, scored and drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.metrics import Scores
from kdunet_infer.phantom import phantom_box
from kdunet_infer.report import write_slices_png
from kdunet_infer.run import Report, SegmentOptions, evaluate, segment
from kdunet_infer.volume import VolumeSource, create_label, create_volume, open_labels, open_source

DEMO_SHAPE: ZYX = (64, 512, 512)
DEMO_SEED = 1000
"""A seed that phantom-2unet was not trained on."""
DEMO_MODEL = "phantom-2unet"
PHANTOM_CHUNK_SHAPE: ZYX = (32, 128, 128)
PHANTOM_BLOCK_SHAPE: ZYX = (32, 256, 256)
"""Whole chunks; large enough that the margin each block computes beyond itself is small."""
PHANTOM_VOXEL_SIZE_NM = (5.0, 5.0, 5.0)
TRUTH_NAME = "mitochondria"


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo made."""

    volume: Path
    picture: Path
    report: Report
    scores: Scores


def write_phantom(
    path: str | Path,
    shape: ZYX,
    *,
    seed: int,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> None:
    """Write a synthetic EM volume as OME-Zarr 0.5 with its truth as the label `mitochondria`, block by block.

    `progress` is called after each block with the voxels done and the voxels in all. Raises as `create_volume` does, and
    GeometryError for a seed that cannot be.
    """
    image = create_volume(
        path, shape, chunk_shape=PHANTOM_CHUNK_SHAPE, voxel_size_nm=PHANTOM_VOXEL_SIZE_NM, overwrite=overwrite
    )
    # not open_source: the image is not finished yet, and shall not look so until truth and image are whole
    truth = create_label(VolumeSource(image.path, image.levels[0], image.layout, image.path), TRUTH_NAME)
    n_done = 0
    for box in Box.of_shape(shape).split(PHANTOM_BLOCK_SHAPE):
        voxels, mask = phantom_box(box, seed)
        image.write_box(box, voxels)
        truth.write_box(box, mask)
        n_done += box.n_voxels
        progress(n_done, Box.of_shape(shape).n_voxels)
    truth.finish({"phantom_seed": seed})
    image.finish({"phantom_seed": seed})


def run_demo(folder: Path, *, shape: ZYX = DEMO_SHAPE, seed: int = DEMO_SEED, say: Callable[[str], None]) -> Demo:
    """Make the synthetic volume in `folder`, segment it, score it, draw it; `say` gets a line before each step."""
    volume, picture = folder / "phantom.zarr", folder / "overlay.png"
    folder.mkdir(parents=True, exist_ok=True)
    say(f"writing a synthetic EM volume of {shape[0]} x {shape[1]} x {shape[2]} voxels to {volume}")
    write_phantom(volume, shape, seed=seed, overwrite=True)
    say(f"segmenting it with {DEMO_MODEL}")
    report = segment(volume, model=DEMO_MODEL, options=SegmentOptions(overwrite=True), command="kdunet-infer demo")
    truth = volume / "labels" / TRUTH_NAME
    scores = evaluate(report.output, truth)
    write_slices_png(picture, open_source(volume), open_labels(report.output), open_labels(truth), scores)
    return Demo(volume, picture, report, scores)
