"""A look at what a run would give before it is started: a few slices as pictures, and what the whole would take.

    slices spread over the depth, the middle window of each -> read, map, segment as the run would -> PNG
    a slab as deep as a batch -> time of reading and computing alone -> time of the whole

Writes pictures; never touches an output.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdunet_infer.blockwise import UInt8Array, compute_block, read_block
from kdunet_infer.errors import ConfigError
from kdunet_infer.forecast import Forecast, forecast
from kdunet_infer.geometry import Box
from kdunet_infer.job import Job, prepare
from kdunet_infer.model import Model
from kdunet_infer.options import DEFAULT_MODEL, SegmentOptions
from kdunet_infer.report import write_overlay_png

WINDOW_SIDE = 2048
"""Pixels of a slice that are shown at most, along y and x: more fits no screen at full resolution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What was seen, and what the whole would take."""

    pictures: tuple[str, ...]
    window: str
    """What of each slice is shown: y0:y1,x0:x1."""
    foreground_fraction: float
    """Of the slices shown, before any cleaning."""
    run_seconds: float
    """Of the whole run, from the first read to the last write; cleaning not counted."""
    run_bytes: int
    """Of the finest mask, compressed as well as the slices shown compress."""
    forecast: Forecast
    """Everything else about the run."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def preview(
    source: str | Path,
    target: str | Path | None = None,
    model: str | Path | Model = DEFAULT_MODEL,
    options: SegmentOptions | None = None,
    *,
    n_slices: int = 3,
    folder: str | Path = ".",
    warn: Callable[[str], None] = lambda sentence: None,
) -> Preview:
    """Segment the middle of `n_slices` slices spread over the depth, draw them into `folder`, and foretell the whole run.

    Takes what `segment` takes; whether the outputs may be written is not checked. Pictures of an earlier preview are replaced.
    Raises ConfigError for less than one slice, KdunetError where pictures cannot be written, and what `segment` raises.
    """
    if n_slices < 1:
        raise ConfigError(f"{n_slices} slices cannot be previewed; give at least 1.")
    job = prepare(source, target, model, options or SegmentOptions(), writes=False)
    for sentence in job.warnings:
        warn(sentence)
    window = _window(job.plan.roi)
    name = job.model.card.name if target is None else Path(target).stem
    pictures, n_foreground, n_voxels, n_compressed = [], 0, 0, 0
    for z in spread_slices(window, n_slices):
        box = Box((z, *window.begin[1:]), (z + 1, *window.end[1:]))
        mask = _segmented(job, box)[0]
        pictures.append(str(Path(folder) / f"{name}-preview-z{z:04d}.png"))
        write_overlay_png(pictures[-1], job.image.read_box(box)[0], mask, None)
        n_foreground += int(np.count_nonzero(mask))
        n_voxels += mask.size
        n_compressed += len(zlib.compress(mask.tobytes(), 1))
    (_, y, x), (_, y_end, x_end) = window.begin, window.end
    return Preview(
        pictures=tuple(pictures),
        window=f"{y}:{y_end},{x}:{x_end}",
        foreground_fraction=n_foreground / n_voxels,
        run_seconds=_run_seconds(job, window),
        run_bytes=round(job.plan.roi.n_voxels * n_compressed / n_voxels),
        forecast=forecast(job),
    )


def spread_slices(window: Box, n_slices: int) -> list[int]:
    """The middles of `n_slices` equal parts of the window's depth, as global z; every slice where there are no more."""
    begin, depth = window.begin[0], window.shape[0]
    n_slices = min(n_slices, depth)
    return [begin + (2 * i + 1) * depth // (2 * n_slices) for i in range(n_slices)]


def _window(roi: Box) -> Box:
    """The roi, or the middle of it where its slices are too large to be shown."""
    y, x = (
        (begin + max(0, end - begin - WINDOW_SIDE) // 2, min(end - begin, WINDOW_SIDE))
        for begin, end in zip(roi.begin[1:], roi.end[1:], strict=True)
    )
    return Box((roi.begin[0], y[0], x[0]), (roi.end[0], y[0] + y[1], x[0] + x[1]))


def _segmented(job: Job, box: Box) -> UInt8Array:
    """The mask (z, y, x) of `box`, the same as the run's."""
    mask = np.empty(box.shape, np.uint8)
    plan = replace(job.plan, roi=box)
    for block in plan.blocks:
        result = compute_block(read_block(job.image, block), job.engine, plan, block, threshold=job.threshold)
        mask[block.write_box.slices_in(box)] = result.mask
    return mask


def _run_seconds(job: Job, window: Box) -> float:
    """Reading and computing overlap in a run, so it takes as long as the slower of the two."""
    z, depth = window.begin[0], min(job.batch_size, window.shape[0])
    slab = Box(window.begin, (z + depth, *window.end[1:]))
    plan, n_decoded, read_seconds, compute_seconds = replace(job.plan, roi=slab), 0, 0.0, 0.0
    for block in plan.blocks:
        began = time.perf_counter()
        voxels = read_block(job.image, block)
        read_seconds += time.perf_counter() - began
        inside = block.read_box.snapped(job.source.voxels.chunk_shape).intersection(Box.of_shape(job.source.shape))
        n_decoded += inside.n_voxels
        for is_warm in (False, True):  # the first time engines prepare themselves for tiles of this size
            began = time.perf_counter()
            compute_block(
                voxels, job.engine, plan, block, threshold=job.threshold, batch_size=job.batch_size,
                with_probability=job.probability is not None,
            )  # fmt: skip
            compute_seconds += is_warm * (time.perf_counter() - began)
    n_run = job.plan.roi.n_voxels * job.plan.halo_overhead
    return n_run * max(compute_seconds / (slab.n_voxels * plan.halo_overhead), read_seconds / n_decoded)
