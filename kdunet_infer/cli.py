"""The command `kdunet-infer`: options -> dataclass -> one call -> exit code. Defaults live in the dataclasses alone."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from kdunet_infer.arguments import Integers, Numbers, Roi
from kdunet_infer.console import SectionCommand, SectionOption, SentenceGroup, voxel_bar
from kdunet_infer.errors import VolumeError

if TYPE_CHECKING:
    from kdunet_infer.volume import VolumeSource

_Command = TypeVar("_Command", bound=Callable[..., Any])

# Heavier modules are imported by the commands that need them: `kdunet-infer --help` must not wait for zarr.


@click.group(cls=SentenceGroup)
@click.version_option(package_name="kdunet")
def main() -> None:
    """Run a distilled student over electron-microscopy volumes of any size, without seams."""


_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout and nothing else.")


def _option(section: str, *names: str, **settings: Any) -> Callable[[_Command], _Command]:
    return click.option(*names, cls=SectionOption, section=section, **settings)


_SELECTION = (
    _option("Volume", "--level", type=click.IntRange(min=0), help="Of a pyramid, 0 finest. [default: 0]"),
    _option("Volume", "--channel", type=click.IntRange(min=0), help="Where there are several, counted from 0."),
    _option("Volume", "--timepoint", type=click.IntRange(min=0), help="Where there are several, counted from 0."),
    _option("Volume", "--axes", metavar="LETTERS", help="As stored, such as tczyx, where metadata are wrong."),
    _option("Volume", "--voxel-size", "voxel_size_nm", type=Numbers("z,y,x", "40,5,5"), help="In nm, likewise."),
)
_SEGMENT = (
    *_SELECTION,
    _option("Volume", "--roi", type=Roi(), help="What to segment, such as 0:64,:,512:."),
    _option("Volume", "--intensity-range", type=Numbers("lo,hi", "0,4095"), help="What becomes black and white."),
    _option("Model", "--model", help="A released name or an .onnx file. [default: mito-epfl-2unet]"),
    _option("Model", "--threshold", type=float, help="Foreground = probability >= this. [default: the model's]"),
    _option("Mask", "-o", "--out", type=click.Path(), help="A new .zarr or .tif. [default: labels/<model> in VOLUME]"),
    _option(
        "Mask",
        "--format",
        "target_format",
        metavar="FORMAT",
        help="ome-zarr-0.5, ome-zarr-0.4, zarr, tiff. [default: by suffix]",
    ),
    _option("Mask", "--min-size", type=int, metavar="N", help="Remove objects of fewer voxels."),
    _option("Mask", "--fill-holes", is_flag=True, help="Fill what objects enclose on all sides."),
    _option("Mask", "--smooth-z", type=int, metavar="N", help="Majority of N sections, against flicker."),
    _option("Mask", "--probabilities", type=click.Path(), help="Also write round(255 p) to this new volume."),
    _option("Mask", "--overwrite", is_flag=True, help="Replace a finished output of kdunet."),
    _option("Engine", "--engine", help="See `kdunet-infer engines`. [default: auto]"),
    _option("Engine", "--device", type=click.Choice(["cpu", "cuda"]), help="[default: the fastest that works]"),
    _option("Engine", "--precision", metavar="NAME", help="fp32; openvino also has bf16, faster and rougher. [default: fp32]"),
    _option("Engine", "--threads", "n_threads", type=int, help="[default: every CPU this process may use]"),
    _option("Engine", "--block", "block_shape", type=Integers("zyx"), help="Voxels read and written at once."),
    _option("Engine", "--tile", "tile_shape", type=Integers("yx"), help="Longest core of a tile, in pixels."),
    _option("Engine", "--batch", "batch_size", type=int, help="Tiles handed to the engine at once."),
    _option("Report", "--preview", "n_preview", type=int, metavar="N", help="Draw N slices here, foretell the rest, stop."),
    _option("Report", "--dry-run", is_flag=True, help="Say what would be done, and stop."),
    _option("Report", "--ground-truth", type=click.Path(), help="Report IoU against these labels."),
    _option("Report", "--json", "as_json", is_flag=True, help="Print one JSON object to stdout and nothing else."),
)


def _with(options: Sequence[Callable[[_Command], _Command]]) -> Callable[[_Command], _Command]:
    return lambda command: reduce(lambda decorated, option: option(decorated), reversed(options), command)


@main.command("segment", cls=SectionCommand)
@click.argument("volume", type=click.Path())
@_with(_SEGMENT)
def segment_command(
    volume: str,
    out: str | None,
    model: str | None,
    ground_truth: str | None,
    n_preview: int | None,
    dry_run: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Segment VOLUME: OME-Zarr, Zarr, TIFF, slices in a folder, HDF5 (file.h5:/path) or MRC."""
    from kdunet_infer import forecast, preview, run, summaries
    from kdunet_infer.options import DEFAULT_MODEL, SegmentOptions

    given = (volume, out, model or DEFAULT_MODEL, SegmentOptions(**_given(chosen)))
    if dry_run:
        foretold = forecast.dry_run(*given, ground_truth=ground_truth, warn=_warn)
        _say(foretold, summaries.of_forecast(foretold), as_json)
    elif n_preview is not None:
        seen = preview.preview(*given, n_slices=n_preview, warn=_warn)
        _say(seen, summaries.of_preview(seen), as_json)
    else:
        command = shlex.join(["kdunet-infer", *sys.argv[1:]])
        with voxel_bar("segmenting") as progress:
            report = run.segment(*given, ground_truth=ground_truth, command=command, progress=progress, warn=_warn)
        _say(report, summaries.of_report(report), as_json)


@main.command("evaluate")
@click.argument("prediction", type=click.Path())
@click.argument("truth", type=click.Path())
@click.option("--foreground", type=int, help="The truth's value that is foreground. [default: everything but 0]")
@click.option("--mask", type=click.Path(), help="Labels; only voxels where they are not 0 count.")
@click.option("--tolerance", type=int, help="Pixels; voxels this near to a boundary of the truth do not count. [default: 0]")
@click.option("--roi", type=Roi(), help="What to compare, such as 0:64,:,512:. [default: all]")
@click.option("--png", type=click.Path(), help="Draw the best, median and worst slices in confusion colours.")
@click.option("--image", type=click.Path(), help="The volume to draw them on.")
@_json_option
def evaluate_command(prediction: str, truth: str, png: str | None, image: str | None, as_json: bool, **chosen: Any) -> None:
    """Score the labels PREDICTION against the labels TRUTH: IoU, Dice, precision, recall of the foreground."""
    from kdunet_infer import summaries
    from kdunet_infer.intensity import for_pictures
    from kdunet_infer.report import write_slices_png
    from kdunet_infer.run import evaluate
    from kdunet_infer.volume import open_labels, open_source

    with voxel_bar("comparing") as progress:
        scores = evaluate(prediction, truth, progress=progress, **_given(chosen))
    if png is not None:
        source = None if image is None else for_pictures(open_source(image))
        write_slices_png(png, source, open_labels(prediction), open_labels(truth), scores)
    _say(scores, summaries.of_scores(scores), as_json)
    if png is not None and not as_json:
        click.echo(f"{'picture':10} {png}")


@main.command("info")
@click.argument("path", type=click.Path())
@_with(_SELECTION)
@click.option("--model", help="Also say whether the volume fits this model.")
@_json_option
def info_command(path: str, model: str | None, as_json: bool, **chosen: Any) -> None:
    """Tell what the volume or the model at PATH is."""
    from kdunet_infer.model import Model, released_models

    if path in released_models() or Path(path).suffix == ".onnx":
        about = Model.load(path)
        found: dict[str, Any] = {"sha256": about.sha256, **json.loads(about.card.to_json())}
    else:
        found = _volume_info(path, model, _given(chosen))
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        for i, line in enumerate(value if isinstance(value, list) else [value]):
            click.echo(f"{'' if i else name:18} {line}")


@main.command("models")
def models_command() -> None:
    """List the released models."""
    from kdunet_infer.model import Model, released_models

    for name in released_models():
        card = Model.load(name).card
        click.echo(f"{name:20} {card.version:6} {card.n_parameters:>8,} parameters, {card.provenance.get('description', '')}")


@main.command("engines")
@click.option("--bench", "model", metavar="MODEL", help="Measure how fast each runs this model here.")
@click.option("--threads", "n_threads", type=click.IntRange(min=1), help="Of each, with --bench. [default: every CPU]")
def engines_command(model: str | None, n_threads: int | None) -> None:
    """List the engines, and what is missing for those that cannot run here."""
    from kdunet_infer.engines import ENGINES, missing

    if model is not None:
        from kdunet_infer import speed
        from kdunet_infer.model import Model

        click.echo(speed.table(speed.measure(Model.load(model), list(speed.contenders()), n_threads=n_threads)))
        return
    if n_threads is not None:
        raise click.UsageError("--threads is for --bench MODEL; give both.")
    for name in ENGINES:
        click.echo(f"{name:20} {missing(name) or 'works here'}")


@main.command("phantom")
@click.argument("out", type=click.Path())
@click.option("--shape", type=Integers("zyx"), default="64,512,512", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace a volume that kdunet wrote.")
def phantom_command(out: str, shape: tuple[int, int, int], seed: int, overwrite: bool) -> None:
    """Write a synthetic EM volume with ground truth as OME-Zarr."""
    from kdunet_infer.demo import TRUTH_NAME, write_phantom

    with voxel_bar("writing") as progress:
        write_phantom(out, shape, seed=seed, overwrite=overwrite, progress=progress)
    click.echo(f"wrote {out}; its truth is {Path(out) / 'labels' / TRUTH_NAME}")


@main.command("demo")
@click.option("-o", "--out", type=click.Path(path_type=Path), default="demo", show_default=True, help="Folder to write to.")
@click.option("--shape", type=Integers("zyx"), help="Of the volume. [default: 64,512,512]")
def demo_command(out: Path, shape: tuple[int, int, int] | None) -> None:
    """Self-test: make a synthetic EM volume, segment it, score it, draw it."""
    from kdunet_infer.demo import DEMO_SHAPE, run_demo

    demo = run_demo(out, shape=shape or DEMO_SHAPE, say=click.echo)
    click.echo(f"engine     {demo.report.engine}")
    click.echo(
        f"IoU        {demo.scores.confusion.iou:.4f} (a self-test: the student was trained on other seeds of this phantom)"
    )
    click.echo(f"speed      {demo.report.mvoxels_per_second:.2f} Mvox/s")
    click.echo(f"volume     {demo.volume}")
    click.echo(f"picture    {demo.picture.resolve()}")


def _volume_info(path: str, model: str | None, chosen: dict[str, Any]) -> dict[str, Any]:
    from kdunet_infer.volume import Selection, open_labels, open_source

    selection = Selection(**chosen)
    try:
        source = open_source(path, selection)
    except VolumeError:
        voxels = open_labels(path, selection)  # masks may be of type bool
        return {"shape (z, y, x)": voxels.shape, "dtype": str(voxels.dtype), "chunk": voxels.chunk_shape}
    first = source.layout.levels[0]
    n_missing, n_chunks = source.missing_chunks()
    found = {
        "shape (z, y, x)": source.shape,
        "stored as": str(source.voxels.view),
        "dtype": str(source.dtype),
        "chunk": source.voxels.chunk_shape,
        "shard": source.voxels.shard_shape,
        "voxel size (nm)": source.voxel_size_nm,
        "scale": first.scale,
        "translation": first.translation,
        "units": source.layout.units,
        "levels from here": [f"{level.shape}, scale {level.scale}" for level in source.layout.levels],
        "all levels (nm)": list(source.level_voxel_sizes_nm),
        "missing chunks": f"{n_missing:,} of {n_chunks:,}",
        "OME-Zarr": source.layout.version if source.group else None,
    }
    return found if model is None else found | {f"fits {model}": _fit(source, model)}


def _fit(source: VolumeSource, model: str) -> list[str]:
    from kdunet_infer.job import intensity_of
    from kdunet_infer.model import Model

    return list(intensity_of(source, Model.load(model).card, None).warnings) or ["yes"]


class _Result(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


def _say(result: _Result, lines: Iterator[tuple[str, str]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result.to_dict()))
        return
    for name, text in lines:
        click.echo(f"{name:10} {text}")


def _warn(sentence: str) -> None:
    click.echo(f"warning: {sentence}", err=True)


def _given(chosen: dict[str, Any]) -> dict[str, Any]:
    """Without what the user left out: defaults live elsewhere."""
    return {name: value for name, value in chosen.items() if value is not None}
