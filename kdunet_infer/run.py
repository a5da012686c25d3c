"""Drives the blocks of one run: the next block is read and the last one written while one is computed.

Memory is a function of the block, never of the volume: at most three blocks are held at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdunet_infer import __version__
from kdunet_infer.blockwise import DEFAULT_BATCH_SIZE, BlockResult, Engine, Source, UInt8Array, compute_block, read_block
from kdunet_infer.engines import auto_engine, create_engine
from kdunet_infer.errors import ConfigError
from kdunet_infer.geometry import ZYX
from kdunet_infer.metrics import Scores, evaluate_volumes
from kdunet_infer.model import Model
from kdunet_infer.plan import YX, Block, Plan, plan_segmentation
from kdunet_infer.volume import VolumeSource, VolumeTarget, check_image, create_image, create_label, open_labels, open_source


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentOptions:
    """How to segment; every default is the model's or the volume's own."""

    engine: str = "auto"
    device: str | None = None
    """cpu or cuda; None: what the engine prefers."""
    n_threads: int | None = None
    """None: every CPU this process may use."""
    threshold: float | None = None
    """Foreground = probability >= threshold; None: the model card's."""
    block_shape: ZYX | None = None
    """Voxels, a multiple of the target's shard or chunk."""
    tile_shape: YX | None = None
    """Longest core of a tile, a multiple of the stride."""
    batch_size: int = DEFAULT_BATCH_SIZE
    """Tiles handed to the engine at once."""
    probabilities: str | Path | None = None
    """A new volume for round(255 p)."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0.0 < self.threshold < 1.0:
            raise ConfigError(f"threshold is {self.threshold}; it must be between 0 and 1.")
        for name in ("batch_size", "n_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a run did."""

    output: str
    model: str
    model_version: str
    model_sha256: str
    engine: str
    """Which engine ran, and why where it was chosen."""
    threshold: float
    plan: str
    n_voxels: int
    n_foreground: int
    seconds: float
    """From the first read to the last write; pyramid and engine start not counted."""
    waiting_for_read: float
    """Share of the time that nothing was computed because a block was still being read."""
    computing: float
    waiting_for_write: float
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
    model: str | Path | Model = "mito-epfl-2unet",
    options: SegmentOptions | None = None,
    *,
    ground_truth: str | Path | None = None,
    command: str = "",
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Report:
    """Segment the volume at `source` into `target`, or into labels/<model name> of the source where that is None.

    `progress` is called after each block with the voxels done and the voxels in all. The output counts for nothing until
    the run ends; a run that breaks off is started over by the same call.

    Raises ModelError, VolumeError, EngineError and ConfigError before anything is written for what cannot work, and
    CorruptChunk, EngineError or VolumeError with a note of the block for what fails on the way.
    """
    options = options or SegmentOptions()
    model = model if isinstance(model, Model) else Model.load(model)
    volume = open_source(source)
    truth = None if ground_truth is None else open_labels(ground_truth)
    if truth is not None and truth.shape != volume.shape:
        raise ConfigError(
            f"ground truth {ground_truth} has shape {truth.shape} and {source} {volume.shape}; give its own truth."
        )
    engine, engine_why = _engine(model, options)
    threshold = model.card.threshold if options.threshold is None else options.threshold
    plan = plan_segmentation(
        volume.shape,
        model.card,
        shard_shape=volume.layout.levels[0].write_shape,  # every output is cut into files as its source is
        block_shape=options.block_shape,
        tile_shape=options.tile_shape,
    )
    mask, probability = _create_targets(volume, target, model, options)
    timeline = run_blocks(volume, engine, plan, mask, probability, threshold=threshold, options=options, progress=progress)
    about = {
        "model": model.card.name,
        "model_version": model.card.version,
        "model_sha256": model.sha256,
        "threshold": threshold,
        "engine": engine.describe(),
        "kdunet_version": __version__,
        "command": command,
    }
    for written in filter(None, (mask, probability)):
        written.finish(about)
    return Report(
        output=str(mask.path),
        model=model.card.name,
        model_version=model.card.version,
        model_sha256=model.sha256,
        engine=engine_why,
        threshold=threshold,
        plan=plan.summary(),
        n_voxels=plan.roi.n_voxels,
        iou=None if truth is None else evaluate_volumes(mask.levels[0], truth).confusion.iou,
        **timeline,
    )


def evaluate(
    prediction: str | Path,
    truth: str | Path,
    *,
    foreground: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score the labels at `prediction` against those at `truth`, block by block.

    Raises VolumeError where either cannot be read as labels or their shapes differ.
    """
    return evaluate_volumes(open_labels(prediction), open_labels(truth), foreground=foreground, progress=progress)


def run_blocks(
    source: Source,
    engine: Engine,
    plan: Plan,
    mask: VolumeTarget,
    probability: VolumeTarget | None,
    *,
    threshold: float,
    options: SegmentOptions,
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
                    batch_size=options.batch_size,
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


def _engine(model: Model, options: SegmentOptions) -> tuple[Engine, str]:
    chosen: Mapping[str, Any] = {"device": options.device, "n_threads": options.n_threads}
    given = {name: value for name, value in chosen.items() if value is not None}
    if options.engine == "auto":
        return auto_engine(model, **given)
    engine = create_engine(options.engine, model, **given)
    return engine, engine.describe()


def _create_targets(
    source: VolumeSource, target: str | Path | None, model: Model, options: SegmentOptions
) -> tuple[VolumeTarget, VolumeTarget | None]:
    """The mask and, where asked for, the probabilities; with `overwrite` nothing is removed before both may be written."""
    overwrite, probabilities = options.overwrite, options.probabilities
    if probabilities is not None:
        check_image(probabilities, like=source, overwrite=overwrite)
        if target is not None and _overlap(Path(target).resolve(), Path(probabilities).resolve()):
            raise ConfigError(f"mask {target} and probabilities {probabilities} overlap; choose two separate paths.")
    if target is None:
        mask = create_label(source, model.card.name, overwrite=overwrite)
    else:
        mask = create_image(target, like=source, content="mask", overwrite=overwrite)
    if probabilities is None:
        return mask, None
    return mask, create_image(probabilities, like=source, content="image", overwrite=overwrite)


def _overlap(a: Path, b: Path) -> bool:
    return a == b or a in b.parents or b in a.parents
