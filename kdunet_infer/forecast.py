"""What a run would do and need, said before it runs: sizes, bytes, memory. Knows jobs and plans; computes no voxel.

Memory is counted from what is alive at once: the stages below, of which the largest counts.

    blocks      three read boxes, what reading one needs on the way, two results, the engine's feature maps
    cleaning    a block of the mask, its labels, and what labelling needs
    TIFF        the pages that are written at a time
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdunet_infer.blockwise import WindowEngine
from kdunet_infer.geometry import ZYX, Box
from kdunet_infer.job import Job, prepare
from kdunet_infer.model import Model
from kdunet_infer.options import DEFAULT_MODEL, SegmentOptions
from kdunet_infer.outputs import Output
from kdunet_infer.plan import Plan
from kdunet_infer.volume.formats import target_layout

PROGRAM_BYTES = 250 * 10**6
"""Interpreter, libraries and an engine at rest."""
MAPS_PER_WIDTH = 20
"""Float32 feature maps at full resolution that a runtime holds for a k-Unet, in multiples of k: onnxruntime held 17."""
WINDOW_MAPS = 3
"""Where the engine streams rows through its layers: the probabilities, and what rounding them takes."""
UNKNOWN_WIDTH = 16
"""Of a model whose card does not say what was built: rather too much memory than too little."""
LABELLING_BYTES = 14
"""For each voxel of a block, with its mask and the cleaned one."""
TIFF_SLAB_BYTES = 256 * 2**20
"""Pages of a TIFF that are read at a time, unless a single page is larger."""
SAMPLE_VOXELS = (2**19, 2**25)
"""Of what is looked at together for grey values: up to 16 chunks within these limits, unless one chunk alone is larger."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a run would do."""

    source: str
    shape: ZYX
    dtype: str
    voxel_size_nm: tuple[float, float, float] | None
    """zyx; None where it is not known."""
    roi: str
    n_voxels: int
    """That would be segmented."""
    output: str
    output_format: str
    probabilities: str | None
    model: str
    model_version: str
    threshold: float
    engine: str
    plan: str
    n_blocks: int
    n_tiles: int
    halo_overhead: float
    """Voxels computed for each voxel kept."""
    intensity: dict[str, Any]
    """The mapping of raw grey values to uint8."""
    output_bytes: int
    """Of all outputs and their levels, not compressed."""
    memory_bytes: int
    """At the peak."""
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def dry_run(
    source: str | Path,
    target: str | Path | None = None,
    model: str | Path | Model = DEFAULT_MODEL,
    options: SegmentOptions | None = None,
    *,
    ground_truth: str | Path | None = None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> Forecast:
    """Check and decide everything that `segment` does with the same arguments, and write nothing. Raises as it does."""
    job = prepare(source, target, model, options or SegmentOptions(), ground_truth=ground_truth)
    for sentence in job.warnings:
        warn(sentence)
    return forecast(job)


def forecast(job: Job) -> Forecast:
    """What `job` is going to do and to need."""
    plan = job.plan
    return Forecast(
        source=job.source.identity,
        shape=job.source.shape,
        dtype=str(job.source.dtype),
        voxel_size_nm=job.source.voxel_size_nm,
        roi=str(plan.roi),
        n_voxels=plan.roi.n_voxels,
        output=str(job.mask.path),
        output_format=job.mask.target_format,
        probabilities=None if job.probability is None else str(job.probability.path),
        model=job.model.card.name,
        model_version=job.model.card.version,
        threshold=job.threshold,
        engine=job.engine_why,
        plan=plan.summary(),
        n_blocks=plan.n_blocks,
        n_tiles=plan.n_tiles,
        halo_overhead=plan.halo_overhead,
        intensity=job.intensity.mapping.to_dict(),
        output_bytes=sum(_output_bytes(job, output) for output in (job.mask, job.probability) if output),
        memory_bytes=PROGRAM_BYTES + working_bytes(job),
        warnings=job.warnings,
    )


def working_bytes(job: Job) -> int:
    """The most memory that a run takes beside the program itself; a function of blocks, tiles and chunks alone."""
    stages = [_block_stage(job), _sample_stage(job)]
    block_voxels = math.prod(_clipped(job.plan.block_shape, job.plan.roi.shape))
    if job.options.cleaning:
        stages.append(LABELLING_BYTES * block_voxels)
    if "tiff" in (job.mask.target_format, job.probability and job.probability.target_format):
        z, y, x = job.source.shape
        stages.append(2 * min(z * y * x, max(TIFF_SLAB_BYTES, y * x)))
    return max(stages)


def _block_stage(job: Job) -> int:
    plan, itemsize = job.plan, job.source.dtype.itemsize
    read_voxels = math.prod(_read_shape(plan))
    write_voxels = math.prod(_clipped(plan.block_shape, plan.roi.shape))
    held = 3 * read_voxels  # of this block, of the next, and of the one after it, being read
    reading = (2 * itemsize + 1) * read_voxels  # as stored, its copy, and the copy that is mirrored
    n_results = 2 if job.probability else 1
    writing = 3 * n_results * write_voxels  # this block's, the last one's, and the last one's on its way to files
    tile_y, tile_x = (side + 2 * halo for side, halo in zip(plan.tile_shape, plan.halo_zyx[1:], strict=True))
    computing = 4 * _n_maps(job) * job.batch_size * tile_y * tile_x
    if isinstance(job.engine, WindowEngine):
        computing += job.engine.working_bytes((tile_y, tile_x))
    return held + reading + writing + computing


def _n_maps(job: Job) -> int:
    if isinstance(job.engine, WindowEngine):
        return WINDOW_MAPS
    return MAPS_PER_WIDTH * int(job.model.card.architecture.get("width", UNKNOWN_WIDTH))


def _sample_stage(job: Job) -> int:
    chunk, (least, most) = math.prod(job.source.voxels.chunk_shape), SAMPLE_VOXELS
    unit = max(chunk, min(most, max(least, 16 * chunk)))
    return 3 * job.source.dtype.itemsize * min(unit, Box.of_shape(job.source.shape).n_voxels)


def _read_shape(plan: Plan) -> ZYX:
    """Of the largest box that a block reads."""
    block = _clipped(plan.block_shape, plan.roi.shape)
    z, y, x = (
        side + 2 * (stride - 1) + 2 * halo for side, stride, halo in zip(block, plan.stride_zyx, plan.halo_zyx, strict=True)
    )
    return z, y, x


def _clipped(shape: ZYX, limit: ZYX) -> ZYX:
    z, y, x = map(min, shape, limit)
    return z, y, x


def _output_bytes(job: Job, output: Output) -> int:
    levels = target_layout(job.source.layout, output.target_format).levels
    share = job.plan.roi.n_voxels / Box.of_shape(job.source.shape).n_voxels
    return round(share * sum(math.prod(level.shape) for level in levels))
