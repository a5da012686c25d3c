"""The command `kdunet-infer`: options -> dataclass -> one call -> exit code. Defaults live in the dataclasses alone."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from kdunet_infer.console import SentenceGroup, voxel_bar
from kdunet_infer.errors import VolumeError

# Heavier modules are imported by the commands that need them: `kdunet-infer --help` must not wait for zarr.


@click.group(cls=SentenceGroup)
@click.version_option(package_name="kdunet")
def main() -> None:
    """Run a distilled student over electron-microscopy volumes of any size, without seams."""


class _Integers(click.ParamType[Any]):
    """Comma-separated positive integers, as many as `axes` has letters."""

    def __init__(self, axes: str) -> None:
        self.axes = axes
        self.name = ",".join(axes)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """`64,512,512` -> (64, 512, 512)."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if len(parts) != len(self.axes) or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not {len(self.axes)} positive integers {self.name}, such as 64,512,512.", param, ctx)
        return tuple(map(int, parts))


_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object to stdout and nothing else.")


@main.command("segment")
@click.argument("volume", type=click.Path())
@click.option("-o", "--out", type=click.Path(), help="A new OME-Zarr. [default: labels/<model> inside VOLUME]")
@click.option("--model", help="Name of a released model, or an .onnx file. [default: mito-epfl-2unet]")
@click.option("--engine", help="See `kdunet-infer engines`. [default: auto]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: the fastest that works]")
@click.option("--threads", "n_threads", type=int, help="[default: every CPU this process may use]")
@click.option("--threshold", type=float, help="Foreground = probability >= this. [default: the model card's]")
@click.option("--block", "block_shape", type=_Integers("zyx"), help="Voxels read and written at once.")
@click.option("--tile", "tile_shape", type=_Integers("yx"), help="Longest core of a tile, in pixels.")
@click.option("--batch", "batch_size", type=int, help="Tiles handed to the engine at once.")
@click.option("--probabilities", type=click.Path(), help="Also write round(255 p) to this new OME-Zarr.")
@click.option("--ground-truth", type=click.Path(), help="Report IoU against these labels.")
@click.option("--overwrite", is_flag=True, help="Replace a finished output of kdunet.")
@_json_option
def segment_command(
    volume: str, out: str | None, model: str | None, ground_truth: str | None, as_json: bool, **chosen: Any
) -> None:
    """Segment VOLUME: OME-Zarr 0.4 or 0.5, plain Zarr, or a TIFF stack; uint8."""
    from kdunet_infer.run import SegmentOptions, segment

    options = SegmentOptions(**{name: value for name, value in chosen.items() if value is not None})
    given = {} if model is None else {"model": model}
    command = shlex.join(["kdunet-infer", *sys.argv[1:]])
    with voxel_bar("segmenting") as progress:
        report = segment(volume, out, options=options, ground_truth=ground_truth, command=command, progress=progress, **given)
    if report.n_foreground == 0:
        click.echo(
            f"warning: no voxel of {volume} became foreground; check that the image looks like what {report.model} was "
            "trained on (`kdunet-infer info`): contrast, voxel size, stain.",
            err=True,
        )
    if as_json:
        click.echo(json.dumps(report.to_dict()))
        return
    click.echo(
        f"model      {report.model} {report.model_version}, sha256 {report.model_sha256[:12]}, threshold {report.threshold:g}"
    )
    click.echo(f"engine     {report.engine}")
    click.echo(f"plan       {report.plan}")
    click.echo(f"output     {report.output}")
    click.echo(f"voxels     {report.n_voxels:,}, {report.foreground_fraction:.2%} foreground")
    click.echo(f"speed      {report.mvoxels_per_second:.2f} Mvox/s, {report.seconds:.1f} s")
    click.echo(
        f"time       waiting for reads {report.waiting_for_read:.0%}, computing {report.computing:.0%}, "
        f"waiting for writes {report.waiting_for_write:.0%}"
    )
    if report.iou is not None:
        click.echo(f"IoU        {report.iou:.4f} against {ground_truth}")


@main.command("evaluate")
@click.argument("prediction", type=click.Path())
@click.argument("truth", type=click.Path())
@click.option("--foreground", type=int, help="The truth's value that is foreground. [default: everything but 0]")
@click.option("--png", type=click.Path(), help="Draw the best, median and worst slices in confusion colours.")
@click.option("--image", type=click.Path(), help="The volume to draw them on.")
@_json_option
def evaluate_command(
    prediction: str, truth: str, foreground: int | None, png: str | None, image: str | None, as_json: bool
) -> None:
    """Score the labels PREDICTION against the labels TRUTH: IoU, Dice, precision, recall of the foreground."""
    from kdunet_infer.report import write_slices_png
    from kdunet_infer.run import evaluate
    from kdunet_infer.volume import open_labels, open_source

    with voxel_bar("comparing") as progress:
        scores = evaluate(prediction, truth, foreground=foreground, progress=progress)
    if png is not None:
        source = None if image is None else open_source(image)
        write_slices_png(png, source, open_labels(prediction), open_labels(truth), scores)
    found = scores.to_dict()
    if as_json:
        click.echo(json.dumps(found))
        return
    for name in ("iou", "dice", "precision", "recall"):
        click.echo(f"{name:10} {found[name]:.4f}")
    click.echo(f"{'voxels':10} {found['n_voxels']:,} in {len(scores.per_slice)} slices")
    if png is not None:
        click.echo(f"{'picture':10} {png}")


@main.command("info")
@click.argument("path", type=click.Path())
@_json_option
def info_command(path: str, as_json: bool) -> None:
    """Tell what the volume or the model at PATH is."""
    from kdunet_infer.model import Model, released_models

    if path in released_models() or Path(path).suffix == ".onnx":
        model = Model.load(path)
        found: dict[str, Any] = {"sha256": model.sha256, **json.loads(model.card.to_json())}
    else:
        found = _volume_info(path)
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        click.echo(f"{name:18} {value}")


@main.command("models")
def models_command() -> None:
    """List the released models."""
    from kdunet_infer.model import Model, released_models

    for name in released_models():
        card = Model.load(name).card
        click.echo(f"{name:20} {card.version:6} {card.n_parameters:>8,} parameters, {card.provenance.get('description', '')}")


@main.command("engines")
def engines_command() -> None:
    """List the engines, and what is missing for those that cannot run here."""
    from kdunet_infer.engines import ENGINES, missing

    for name in ENGINES:
        click.echo(f"{name:20} {missing(name) or 'works here'}")


@main.command("phantom")
@click.argument("out", type=click.Path())
@click.option("--shape", type=_Integers("zyx"), default="64,512,512", show_default=True)
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
@click.option("--shape", type=_Integers("zyx"), help="Of the volume. [default: 64,512,512]")
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


def _volume_info(path: str) -> dict[str, Any]:
    from kdunet_infer.volume import open_labels, open_source

    try:
        source = open_source(path)
    except VolumeError:
        voxels = open_labels(path)  # labels may be of any integer type
        return {"shape (z, y, x)": voxels.shape, "dtype": str(voxels.dtype), "chunk": voxels.chunk_shape}
    first = source.layout.levels[0]
    return {
        "shape (z, y, x)": source.shape,
        "dtype": str(source.voxels.dtype),
        "chunk": first.chunk_shape,
        "shard": first.shard_shape,
        "levels": len(source.layout.levels),
        "scale": first.scale,
        "translation": first.translation,
        "units": source.layout.units,
        "OME-Zarr": source.layout.version if source.group else None,
    }
