"""What the command prints of a result, line by line: a name and what there is to say. Knows results; computes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kdunet_infer.metrics import Scores

if TYPE_CHECKING:
    from kdunet_infer.forecast import Forecast
    from kdunet_infer.preview import Preview
    from kdunet_infer.run import Report

Line = tuple[str, str]
_PREFIXES = ("", "k", "M", "G", "T", "P")


def of_report(report: Report) -> Iterator[Line]:
    """After a run."""
    yield "model", f"{_model(report)}, sha256 {report.model_sha256[:12]}, threshold {report.threshold:g}"
    yield "engine", report.engine
    yield "plan", report.plan
    if report.roi:
        yield "roi", report.roi
    yield "intensity", _intensity(report.intensity)
    yield "output", f"{report.output} ({report.output_format})"
    yield "voxels", f"{report.n_voxels:,}, {report.foreground_fraction:.2%} foreground"
    yield "speed", f"{report.mvoxels_per_second:.2f} Mvox/s, {report.seconds:.1f} s"
    yield (
        "time",
        f"waiting for reads {report.waiting_for_read:.0%}, computing {report.computing:.0%}, "
        f"waiting for writes {report.waiting_for_write:.0%}",
    )
    if report.cleaning is not None:
        yield "cleaning", _cleaning(report.cleaning)
    if report.iou is not None:
        yield "IoU", f"{report.iou:.4f}"


def of_forecast(forecast: Forecast) -> Iterator[Line]:
    """Before a run."""
    yield "volume", f"{_by(forecast.shape)} voxels (z, y, x), {forecast.dtype}, {_voxel_size(forecast.voxel_size_nm)}"
    yield "roi", f"{forecast.roi}, {forecast.n_voxels:,} voxels"
    yield "intensity", _intensity(forecast.intensity)
    yield "model", f"{_model(forecast)}, threshold {forecast.threshold:g}"
    yield "engine", forecast.engine
    yield "plan", forecast.plan
    yield "output", f"{forecast.output} ({forecast.output_format})"
    if forecast.probabilities:
        yield "also", f"{forecast.probabilities} (probabilities)"
    yield "bytes", f"{_bytes(forecast.output_bytes)} of outputs before compression"
    yield "memory", f"about {_bytes(forecast.memory_bytes)} at the peak"


def of_preview(preview: Preview) -> Iterator[Line]:
    """After a preview."""
    for picture in preview.pictures:
        yield "picture", picture
    yield "shown", f"y,x {preview.window}, {preview.foreground_fraction:.2%} foreground before cleaning"
    yield "plan", preview.forecast.plan
    yield "engine", preview.forecast.engine
    mvoxels_per_second = preview.forecast.n_voxels / preview.run_seconds / 1e6
    yield "full run", f"about {_time(preview.run_seconds)} at {mvoxels_per_second:.2f} Mvox/s"
    after = f"the mask about {_bytes(preview.run_bytes)} after"
    yield "bytes", f"{_bytes(preview.forecast.output_bytes)} of outputs before compression, {after}"
    yield "memory", f"about {_bytes(preview.forecast.memory_bytes)} at the peak"


def of_scores(scores: Scores) -> Iterator[Line]:
    """After an evaluation."""
    found = scores.to_dict()
    for name in ("iou", "dice", "precision", "recall"):
        yield name, f"{found[name]:.4f}"
    excluded = f", {scores.n_excluded:,} more not counted" if scores.n_excluded else ""
    yield "voxels", f"{found['n_voxels']:,} in {len(scores.per_slice)} slices{excluded}"


def _model(about: Report | Forecast) -> str:
    return f"{about.model} {about.model_version}"


def _intensity(mapping: dict[str, Any]) -> str:
    if mapping["kind"] == "identity":
        return "uint8 as it is"
    chosen = "as given" if mapping["kind"] == "range" else "by percentiles"
    return f"{mapping['low']:g} to {mapping['high']:g} become {mapping['out_low']:g} to {mapping['out_high']:g}, {chosen}"


def _cleaning(cleaning: dict[str, Any]) -> str:
    done = [f"{cleaning['n_foreground_before']:,} foreground voxels before"]
    if cleaning["fill_holes"]:
        done.append(f"{cleaning['n_holes_filled']:,} holes filled")
    if cleaning["n_objects"] is not None:
        done.append(f"{cleaning['n_objects_removed']:,} objects removed, {cleaning['n_objects']:,} left")
    return f"{', '.join(done)}, {cleaning['seconds']:.1f} s"


def _voxel_size(voxel_size_nm: tuple[float, float, float] | None) -> str:
    if voxel_size_nm is None:
        return "voxel size not known"
    return f"voxels of {_by(voxel_size_nm)} nm"


def _by(sizes: tuple[float, ...]) -> str:
    return " x ".join(f"{size:.6g}" if isinstance(size, float) else str(size) for size in sizes)


def _bytes(n_bytes: float) -> str:
    """In powers of 1000, as disks are sold."""
    power = min(len(_PREFIXES) - 1, max(0, len(str(round(n_bytes))) - 1) // 3)
    return f"{n_bytes / 1000**power:.3g} {_PREFIXES[power]}B"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
