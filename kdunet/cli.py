"""The command `kdunet`: options -> configuration -> one call -> exit code. Defaults live in `config.py` alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kdunet.config import METHODS, RunConfig
from kdunet_infer.console import SentenceGroup, progress_bar
from kdunet_infer.errors import ConfigError

EXIT_BY_SIGNAL = {"SIGINT": 130, "SIGTERM": 143}
DEFAULTS = RunConfig()


@click.group(cls=SentenceGroup)
@click.version_option(package_name="kdunet")
def main() -> None:
    """Train a teacher, distil a student 1,000 times smaller, export it for kdunet-infer."""


def _slab(_: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    begin, separator, end = value.partition(":")
    if not (separator and begin.isdigit() and end.isdigit()):
        raise click.BadParameter(f"{value!r} is not begin:end, such as 0:135 (the end is not included).", param=param)
    return int(begin), int(end)


def _pairs(_: click.Context, param: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    pairs = [text.partition("=") for text in value]
    if wrong := [key for key, separator, _ in pairs if not (key and separator)]:
        raise click.BadParameter(f"{wrong[0]!r} is not KEY=TEXT, such as licence='CC BY 4.0'.", param=param)
    return {key: text for key, _, text in pairs}


def _training_options(command: Callable[..., None]) -> Callable[..., None]:
    """What both training commands take; everything else is in the configuration file."""
    options = [
        click.option("--config", "config_file", type=click.Path(path_type=Path), help="TOML file; the command line wins."),
        click.option("--images", "data__images", help="TIFF stack of uint8 slices."),
        click.option("--labels", "data__labels", help="TIFF stack of the same shape; foreground is everything but 0."),
        click.option("--foreground", "data__foreground", type=int, help="The label value that is foreground."),
        click.option("--train-slices", "data__train_slices", callback=_slab, metavar="A:B", help="[default: the first 82 %]"),
        click.option(
            "--validation-slices", "data__validation_slices", callback=_slab, metavar="A:B", help="[default: last 12 %]"
        ),
        click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the run; the same goes on."),
        click.option("--steps", "optim__steps", type=int, help=f"[default: {DEFAULTS.optim.steps}]"),
        click.option("--batch", "data__batch", type=int, help=f"Crops a step. [default: {DEFAULTS.data.batch}]"),
        click.option("--crop", "data__crop", type=int, help=f"Side of a crop in pixels. [default: {DEFAULTS.data.crop}]"),
        click.option(
            "--learning-rate", "optim__learning_rate", type=float, help=f"The peak. [default: {DEFAULTS.optim.learning_rate:g}]"
        ),
        click.option("--precision", "optim__precision", help=f"As in Lightning Fabric. [default: {DEFAULTS.optim.precision}]"),
        click.option("--seed", type=int, help=f"[default: {DEFAULTS.seed}]"),
        click.option("--accelerator", help=f"cpu, cuda, ... [default: {DEFAULTS.accelerator}]"),
        click.option("--devices", type=int, help=f"How many. [default: {DEFAULTS.devices}]"),
        click.option("--max-minutes", type=click.FloatRange(min=0), help="Stop after this time; the same command goes on."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@main.command("train-teacher")
@click.option("--width", type=int, help="k of the k-Unet. [default: 64, the published teacher]")
@_training_options
def train_teacher_command(
    config_file: Path | None, out: Path, max_minutes: float | None, width: int | None, **chosen: Any
) -> None:
    """Train a large network on labels alone."""
    base = _base_config(config_file)
    if base.teacher or base.loss.soft_weight:
        raise ConfigError("train-teacher learns from labels alone; use `kdunet distill` for a configuration with a teacher.")
    chosen["width"] = width if width is not None or config_file else 64
    _train(_merged(base, chosen), out, max_minutes)


@main.command("distill")
@click.option("--teacher", help="Folder of the teacher's run, or of models/teachers.")
@click.option("--width", type=int, help=f"k of the k-Unet. [default: {DEFAULTS.width}]")
@click.option(
    "--method", type=click.Choice(list(METHODS)), help="vanilla: labels; soft: teacher; mixed: both. [default: mixed]"
)
@click.option("--temperature", "loss__temperature", type=float, help=f"[default: {DEFAULTS.loss.temperature:g}]")
@_training_options
def distill_command(config_file: Path | None, out: Path, max_minutes: float | None, method: str | None, **chosen: Any) -> None:
    """Train a small network from a teacher's answers and the labels."""
    if method is not None or config_file is None:
        chosen["loss__hard_weight"], chosen["loss__soft_weight"] = METHODS[method or "mixed"]
    _train(_merged(_base_config(config_file), chosen), out, max_minutes)


@main.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The ONNX file to write.")
@click.option("--name", help="Of the model, in its card. [default: the file's stem]")
@click.option("--version", default="1.0", show_default=True, help="Of the model, in its card.")
@click.option(
    "--about",
    "told",
    multiple=True,
    metavar="KEY=TEXT",
    callback=_pairs,
    help="For its card: description=..., licence=..., citation=...; may be repeated.",
)
@click.option("--voxel-size", "voxel_size_nm", type=float, nargs=3, help="Of the training images: z y x in nm.")
@click.option(
    "--grey-preparation", metavar="TEXT", help="How the training images came to uint8, for its card. [default: uint8 as stored]"
)
def export_command(run: Path, out: Path, **about: Any) -> None:
    """Write the network of RUN as ONNX, once it is proven to answer as PyTorch does."""
    from kdunet.export import export_run

    exported = export_run(run, out, **{name: value for name, value in about.items() if value is not None})
    click.echo(f"parity with PyTorch on validation crops: max |dp| = {exported.max_difference:.2g}")
    click.echo(
        f"wrote {out} ({out.stat().st_size:,} bytes, sha256 {exported.sha256[:12]}..., threshold {exported.card.threshold})"
    )


def _base_config(config_file: Path | None) -> RunConfig:
    return RunConfig.from_toml(config_file) if config_file else DEFAULTS


def _merged(config: RunConfig, chosen: dict[str, Any]) -> RunConfig:
    """The configuration with what the command line gave; click's names cannot hold the dot of `optim.steps`."""
    return config.replaced({name.replace("__", "."): value for name, value in chosen.items()})


def _train(config: RunConfig, out: Path, max_minutes: float | None) -> None:
    from kdunet.fit import Progress, fit  # torch and Fabric load in seconds; --help need not wait

    with progress_bar(config.optim.steps, f"{config.width}-Unet") as bar:

        def show(progress: Progress) -> None:
            validated = f", IoU {progress.validation.iou:.4f}" if progress.validation else ""
            bar(progress.step, f"loss {progress.loss:.4f}{validated}")

        result = fit(config, out, max_minutes=max_minutes, progress=show)
    if result.best is not None:
        click.echo(f"best on validation: {result.best}")
    if not result.finished:
        click.echo(f"stopped at step {result.step} of {config.optim.steps}; the same command goes on from there.")
        sys.exit(EXIT_BY_SIGNAL.get(result.stopped_by, 0))
    click.echo(f"the network is in {out}; export it with: kdunet export {out} -o student.onnx")
