"""Drives the blocks of one run: the next block is read and the last one written while one is computed.

Memory is a function of the block, never of the volume: at most three blocks are held at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdunet_infer import __version__
from kdunet_infer.blockwise import BlockResult, Engine, Source, Target, UInt8Array, compute_block, read_block
from kdunet_infer.cleaning import clean
from kdunet_infer.geometry import Box, OpenBox, closed
from kdunet_infer.job import Job, prepare
from kdunet_infer.metrics import Scores, evaluate_volumes
from kdunet_infer.model import Model
from kdunet_infer.options import DEFAULT_MODEL, SegmentOptions
from kdunet_infer.plan import Block, Plan
from kdunet_infer.volume import VolumeTarget, open_labels
from kdunet_infer.volume.scratch import scratch

__all__ = ["Report", "SegmentOptions", "evaluate", "run_blocks", "segment"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run did."""

    output: str
    output_format: str
    model: str
    model_version: str
    model_sha256: str
    engine: str
    """Which engine ran, and why where it was chosen."""
    threshold: float
    plan: str
    roi: str | None
    """z0:z1,y0:y1,x0:x1; None: the whole volume."""
    voxel_size_nm: tuple[float, float, float] | None
    """zyx; None where it is not known."""
    intensity: dict[str, Any]
    """The mapping of raw grey values to uint8."""
    grey_sample: dict[str, Any]
    """How much of the volume was looked at for it."""
    n_missing_chunks: int
    """Chunk files of the source that do not exist, and were read as the fill value."""
    n_chunks: int
    """Chunk files that the source should have; 0 for formats without."""
    warnings: tuple[str, ...]
    """One sentence each."""
    n_voxels: int
    n_foreground: int
    """Of the finished mask."""
    seconds: float
    """From the first read to the last write of raw masks; engine start, cleaning and pyramid not counted."""
    waiting_for_read: float
    """Share of the time that nothing was computed because a block was still being read."""
    computing: float
    waiting_for_write: float
    cleaning: dict[str, Any] | None = None
    """How the mask was cleaned, what that did and the seconds it took; None where it was not."""
    iou: float | None = None
    """Against --ground-truth, where it was given."""

    @property
    def foreground_fraction(self) -> float:
        """Share of the voxels that became foreground."""
        return self.n_foreground / self.n_voxels

    @property
    def mvoxels_per_second(self) -> float:
        """Output voxels, halo not counted."""
        return self.n_voxels / self.seconds / 1e6

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        derived = {"foreground_fraction": self.foreground_fraction, "mvoxels_per_second": self.mvoxels_per_second}
        return asdict(self) | derived


def segment(
    source: str | Path,
    target: str | Path | None = None,
    model: str | Path | Model = DEFAULT_MODEL,
    options: SegmentOptions | None = None,
    *,
    ground_truth: str | Path | None = None,
    command: str = "",
    progress: Callable[[int, int], None] = lambda done, of: None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> Report:
    """Segment the volume at `source` into `target`, or into labels/<model name> of the source where that is None.

    A coarser level has no labels: it goes to <volume>-<model>-level<L>.zarr beside the volume. `progress` is called after each
    block with the voxels done and the voxels in all, over all passes where the mask is cleaned; `warn` with each warning as
    soon as it is known. The output counts for nothing until the run ends; a run that breaks off is started over by the same
    call.

    Raises ModelError, VolumeError, EngineError, GeometryError and ConfigError before anything is written for what cannot work,
    and CorruptChunk, EngineError or VolumeError with a note of the block for what fails on the way.
    """
    job = prepare(source, target, model, options or SegmentOptions(), ground_truth=ground_truth)
    for sentence in job.warnings:
        warn(sentence)
    mask, probability = job.create_targets()
    done = _segment_and_clean(job, mask, probability, progress)
    about = _about(job, command)
    cleaned = {"cleaning": job.options.cleaning.to_dict()} if job.options.cleaning else {}
    roi = job.plan.roi if job.options.roi else None
    mask.finish(about | cleaned, roi)
    if probability is not None:
        probability.finish(about, roi)
    none_warning = _none_warning(job, done["n_foreground"])
    for sentence in none_warning:
        warn(sentence)
    return Report(
        output=str(mask.path),
        output_format=mask.target_format,
        model=job.model.card.name,
        model_version=job.model.card.version,
        model_sha256=job.model.sha256,
        engine=job.engine_why,
        threshold=job.threshold,
        plan=job.plan.summary(),
        roi=about["roi"],
        voxel_size_nm=job.source.voxel_size_nm,
        intensity=about["intensity"],
        grey_sample=about["grey_sample"],
        n_missing_chunks=job.n_missing_chunks,
        n_chunks=job.n_chunks,
        warnings=(*job.warnings, *none_warning),
        n_voxels=job.plan.roi.n_voxels,
        iou=None if job.truth is None else evaluate_volumes(mask.result(), job.truth, roi=roi).confusion.iou,
        **done,
    )


def evaluate(
    prediction: str | Path,
    truth: str | Path,
    *,
    foreground: int | None = None,
    mask: str | Path | None = None,
    tolerance: int = 0,
    roi: Box | OpenBox | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score the labels at `prediction` against those at `truth`, block by block; each of any format that can be read.

    Only voxels within `roi` and where `mask` is not 0 count, and with a `tolerance` only those further than that many pixels
    from the other class of the truth (`evaluate_volumes` says exactly which).

    Raises VolumeError where one cannot be read as labels, shapes differ or no voxel counts, GeometryError for a roi that is not
    inside, ConfigError for a negative tolerance.
    """
    predicted = open_labels(prediction)
    return evaluate_volumes(
        predicted,
        open_labels(truth),
        foreground=foreground,
        mask=None if mask is None else open_labels(mask),
        tolerance=tolerance,
        roi=closed(roi, predicted.shape),
        progress=progress,
    )


def _segment_and_clean(
    job: Job, mask: VolumeTarget, probability: VolumeTarget | None, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Write all voxels; returns what is known then, as fields of `Report`."""
    cleaning = job.options.cleaning
    if not cleaning:
        return _run(job, mask, probability, progress)
    n_voxels = job.plan.roi.n_voxels
    of = n_voxels * (1 + cleaning.n_passes)
    with scratch(mask) as raw:  # read several times, so it is kept apart from the mask
        done = _run(job, raw, probability, lambda n_done, _: progress(n_done, of))
        began = time.perf_counter()
        cleaned = clean(
            raw.levels[0].read,
            mask.write_box,
            job.plan.roi,
            cleaning,
            block_shape=job.plan.block_shape,
            progress=lambda n_done, _: progress(n_voxels + n_done, of),
        )
    what = cleaning.to_dict() | asdict(cleaned)
    what |= {"n_foreground_before": done["n_foreground"], "seconds": time.perf_counter() - began}
    return done | {"n_foreground": cleaned.n_foreground, "cleaning": what}


def _run(
    job: Job, mask: VolumeTarget, probability: VolumeTarget | None, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    return run_blocks(
        job.image,
        job.engine,
        job.plan,
        mask,
        probability,
        threshold=job.threshold,
        batch_size=job.batch_size,
        progress=progress,
    )


def _about(job: Job, command: str) -> dict[str, Any]:
    """What a result says about how it was made."""
    return {
        "source": job.source.identity,
        "roi": str(job.plan.roi) if job.options.roi else None,
        "model": job.model.card.name,
        "model_version": job.model.card.version,
        "model_sha256": job.model.sha256,
        "threshold": job.threshold,
        "intensity": job.intensity.mapping.to_dict(),
        "grey_sample": job.intensity.sample.to_dict(),
        "engine": job.engine.describe(),
        "kdunet_version": __version__,
        "command": command,
    }


def _none_warning(job: Job, n_foreground: int) -> tuple[str, ...]:
    if n_foreground:
        return ()
    return (
        f"no voxel of {job.source.path} became foreground; check that the image looks like what {job.model.card.name} was "
        "trained on (`kdunet-infer info`): contrast, voxel size, stain.",
    )


def run_blocks(
    source: Source,
    engine: Engine,
    plan: Plan,
    mask: Target,
    probability: Target | None,
    *,
    threshold: float,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Segment every block of `plan`; returns the foreground count and where the time went, as fields of `Report`."""
    clock = _Clock()
    n_foreground = n_done = 0

    def write(block: Block, result: BlockResult) -> None:
        with _noting(block):
            mask.write_box(block.write_box, result.mask)
            if probability is not None and result.probability is not None:
                probability.write_box(block.write_box, result.probability)

    with _one_thread("write") as writer:
        written: Future[None] | None = None
        for block, voxels in clock.timed("read", _read_ahead(source, plan)):
            with clock.measured("compute"), _noting(block):
                result = compute_block(
                    voxels,
                    engine,
                    plan,
                    block,
                    threshold=threshold,
                    batch_size=batch_size,
                    with_probability=probability is not None,
                )
                n_foreground += int(result.mask.sum())
            with clock.measured("write"):
                if written is not None:
                    written.result()
            written = writer.submit(write, block, result)
            n_done += block.write_box.n_voxels
            progress(n_done, plan.roi.n_voxels)
        with clock.measured("write"):
            if written is not None:
                written.result()
    seconds = clock.elapsed()
    return {
        "n_foreground": n_foreground,
        "seconds": seconds,
        "waiting_for_read": clock.spent["read"] / seconds,
        "computing": clock.spent["compute"] / seconds,
        "waiting_for_write": clock.spent["write"] / seconds,
    }


def _read_ahead(source: Source, plan: Plan) -> Iterator[tuple[Block, UInt8Array]]:
    """Each block with its voxels, the next one being read while the caller works on this one."""

    def read(block: Block) -> UInt8Array:
        with _noting(block):
            return read_block(source, block)

    with _one_thread("read") as reader:
        pending: tuple[Block, Future[UInt8Array]] | None = None
        for block in plan.blocks:
            following = (block, reader.submit(read, block))
            if pending is not None:
                yield pending[0], pending[1].result()
            pending = following
        if pending is not None:
            yield pending[0], pending[1].result()


class _Clock:
    """Adds up what the computing thread does, by name."""

    def __init__(self) -> None:
        self.spent = {"read": 0.0, "compute": 0.0, "write": 0.0}
        self._began = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self._began

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent[name] += time.perf_counter() - began

    def timed(self, name: str, items: Iterable[Any]) -> Iterator[Any]:
        """The items, with the time each took to come counted."""
        iterator = iter(items)
        while True:
            with self.measured(name):
                item = next(iterator, None)
            if item is None:
                return
            yield item


@contextmanager
def _one_thread(name: str) -> Iterator[ThreadPoolExecutor]:
    executor = ThreadPoolExecutor(1, thread_name_prefix=name)
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _noting(block: Block) -> Iterator[None]:
    try:
        yield
    except Exception as exc:
        exc.add_note(f"while segmenting block {block.index}, voxels {block.write_box} (z,y,x)")
        raise
