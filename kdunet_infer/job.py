"""A run before it runs: all inputs opened and checked, all choices made, nothing written.

    path, model, options -> source, engine, plan, outputs, intensity mapping, warnings

Knows volumes, models and engines; drives no blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdunet_infer.blockwise import Engine, batch_size_of
from kdunet_infer.card import ModelCard
from kdunet_infer.engines import auto_engine, create_engine
from kdunet_infer.errors import ConfigError
from kdunet_infer.fitness import fit_warnings
from kdunet_infer.geometry import closed
from kdunet_infer.grey_sample import GreySample
from kdunet_infer.intensity import IntensityMap, MappedSource, intensity_map, voxels_to_sample
from kdunet_infer.model import Model
from kdunet_infer.options import SegmentOptions
from kdunet_infer.outputs import Output, mask_output, probability_output
from kdunet_infer.plan import Plan, plan_segmentation
from kdunet_infer.volume import VolumeSource, VolumeTarget, Voxels, open_labels, open_source


@dataclass(frozen=True, slots=True, kw_only=True)
class Intensity:
    """How the grey values of a volume come to the model, and what does not fit it."""

    sample: GreySample
    mapping: IntensityMap
    warnings: tuple[str, ...]
    """One sentence each; of grey values, flicker and voxel size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that a run needs. Made by `prepare`."""

    source: VolumeSource
    truth: Voxels | None
    model: Model
    engine: Engine
    engine_why: str
    """Which engine runs, and why where it was chosen."""
    threshold: float
    batch_size: int
    plan: Plan
    mask: Output
    probability: Output | None
    intensity: Intensity
    n_missing_chunks: int
    n_chunks: int
    """Chunk or shard files that the source should have; 0 where it has none."""
    warnings: tuple[str, ...]
    """One sentence each; all that is known before the run."""
    options: SegmentOptions

    @property
    def image(self) -> MappedSource:
        """The source as the model sees it."""
        return MappedSource(self.source, self.intensity.mapping)

    def create_targets(self) -> tuple[VolumeTarget, VolumeTarget | None]:
        """The mask and, where asked for, the probabilities, to be written; removes old ones if it may."""
        mask = self.mask.create(self.source, overwrite=self.options.overwrite)
        if self.probability is None:
            return mask, None
        return mask, self.probability.create(self.source, overwrite=self.options.overwrite)


def prepare(
    source: str | Path,
    target: str | Path | None,
    model: str | Path | Model,
    options: SegmentOptions,
    *,
    ground_truth: str | Path | None = None,
    writes: bool = True,
) -> Job:
    """Open and check everything; with `writes`, also that the outputs may be written.

    What is quick comes first: grey values are sampled when nothing else can go wrong. Raises ModelError, VolumeError,
    EngineError, GeometryError and ConfigError.
    """
    model = model if isinstance(model, Model) else Model.load(model)
    volume = open_source(source, options.selection)
    truth = None if ground_truth is None else open_labels(ground_truth)
    if truth is not None and truth.shape != volume.shape:
        raise ConfigError(
            f"ground truth {ground_truth} has shape {truth.shape} and {source} {volume.shape}; give its own truth."
        )
    engine, engine_why = _engine(model, options)
    mask = mask_output(volume, target, model.card.name, options)
    plan = plan_segmentation(
        volume.shape,
        model.card,
        shard_shape=mask.write_shape(volume),
        block_shape=options.block_shape,
        tile_shape=options.tile_shape,
        roi=closed(options.roi, volume.shape),
    )
    probability = probability_output(volume, mask, options)
    if writes:
        for output in filter(None, (mask, probability)):
            output.check(volume, overwrite=options.overwrite)
    n_missing, n_chunks = volume.missing_chunks()
    intensity = intensity_of(volume, model.card, options.intensity_range)
    return Job(
        source=volume,
        truth=truth,
        model=model,
        engine=engine,
        engine_why=engine_why,
        threshold=model.card.threshold if options.threshold is None else options.threshold,
        batch_size=options.batch_size or batch_size_of(engine),
        plan=plan,
        mask=mask,
        probability=probability,
        intensity=intensity,
        n_missing_chunks=n_missing,
        n_chunks=n_chunks,
        warnings=(*_missing_warning(volume, n_missing, n_chunks), *intensity.warnings),
        options=options,
    )


def intensity_of(volume: VolumeSource, card: ModelCard, given: tuple[float, float] | None) -> Intensity:
    """Look at a bounded sample of the volume: the whole volume's mapping, whatever part of it is segmented.

    Raises ConfigError for a range that cannot be, VolumeError for grey values that cannot be mapped.
    """
    sample = GreySample.of_volume(volume.voxels, max_voxels=voxels_to_sample(volume.dtype, given))
    mapping = intensity_map(volume.voxels, card, given=given, sample=sample)
    warnings = fit_warnings(
        card,
        sample,
        mapping,
        voxel_size_nm=volume.voxel_size_nm,
        level_voxel_sizes_nm=volume.level_voxel_sizes_nm,
    )
    return Intensity(sample=sample, mapping=mapping, warnings=warnings)


def _missing_warning(volume: VolumeSource, n_missing: int, n_chunks: int) -> tuple[str, ...]:
    """Zarr leaves out chunks that hold the fill value alone, so this is no error."""
    if not n_missing:
        return ()
    return (
        f"{n_missing:,} of {n_chunks:,} chunk files of {volume.path} do not exist ({n_missing / n_chunks:.1%}) and are read "
        "as the fill value, as Zarr has it; that is right where the volume is empty, else restore them from the original data.",
    )


def _engine(model: Model, options: SegmentOptions) -> tuple[Engine, str]:
    chosen: Mapping[str, Any] = {"device": options.device, "precision": options.precision, "n_threads": options.n_threads}
    given = {name: value for name, value in chosen.items() if value is not None}
    if options.engine == "auto":
        return auto_engine(model, **given)
    engine = create_engine(options.engine, model, **given)
    return engine, engine.describe()
