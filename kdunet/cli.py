"""The command `kdunet`: options -> configuration -> one call -> exit code. Defaults live in `config.py` alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from kdunet.config import METHODS, RunConfig
from kdunet.finetune_config import FINETUNE
from kdunet.interrupts import EXIT_BY_SIGNAL
from kdunet_infer.console import SentenceGroup, progress_bar
from kdunet_infer.errors import ConfigError, TrainingError

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


def _given(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...] | None:
    return value or None  # an option that may be repeated is never None by itself


def _decorated(command: Callable[..., None], options: list[Callable[..., Any]]) -> Callable[..., None]:
    for option in reversed(options):
        command = option(command)
    return command


def _data_options(command: Callable[..., None]) -> Callable[..., None]:
    """Which crops: for training, and for a bank of them."""
    options: list[Callable[..., Any]] = [
        click.option("--config", "config_file", type=click.Path(path_type=Path), help="TOML file; the command line wins."),
        click.option("--images", "data__images", help="TIFF stack of uint8 slices."),
        click.option("--labels", "data__labels", help="TIFF stack of the same shape; foreground is everything but 0."),
        click.option("--foreground", "data__foreground", type=int, help="The label value that is foreground."),
        click.option("--ignore", "data__ignore", type=int, help="The label value of voxels that nobody annotated."),
        click.option(
            "--probabilities", "data__probabilities", help="TIFF stack of a teacher's stored foreground probabilities."
        ),
        click.option("--train-slices", "data__train_slices", callback=_slab, metavar="A:B", help="[default: the first 82 %]"),
        click.option(
            "--validation-slices", "data__validation_slices", callback=_slab, metavar="A:B", help="[default: last 12 %]"
        ),
        click.option("--batch", "data__batch", type=int, help=f"Crops a step. [default: {DEFAULTS.data.batch}]"),
        click.option("--crop", "data__crop", type=int, help=f"Side of a crop in pixels. [default: {DEFAULTS.data.crop}]"),
        click.option("--precision", "optim__precision", help=f"As in Lightning Fabric. [default: {DEFAULTS.optim.precision}]"),
        click.option("--seed", type=int, help=f"[default: {DEFAULTS.seed}]"),
        click.option("--accelerator", help=f"cpu, cuda, ... [default: {DEFAULTS.accelerator}]"),
    ]
    return _decorated(command, options)


def _teacher_options(command: Callable[..., None]) -> Callable[..., None]:
    options: list[Callable[..., Any]] = [
        click.option(
            "--teacher",
            "teachers",
            multiple=True,
            callback=_given,
            help="Folder of a run or of models/teachers, safetensors or ONNX file; several answer with their mean.",
        ),
        click.option(
            "--teacher-average",
            type=click.Choice(["none", "flips"]),
            help="flips: answers are means over the eight flips and quarter turns of a crop. [default: none]",
        ),
    ]
    return _decorated(command, options)


def _training_options(command: Callable[..., None]) -> Callable[..., None]:
    """What both training commands take beside their data; everything else is in the configuration file."""
    options: list[Callable[..., Any]] = [
        _data_options,
        click.option("--bank", "data__bank", help="Folder that `kdunet bank` wrote: crops that are warped and taught already."),
        click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the run; the same goes on."),
        click.option("--steps", "optim__steps", type=int, help=f"[default: {DEFAULTS.optim.steps}]"),
        click.option(
            "--learning-rate", "optim__learning_rate", type=float, help=f"The peak. [default: {DEFAULTS.optim.learning_rate:g}]"
        ),
        click.option("--devices", type=int, help=f"How many on each node. [default: {DEFAULTS.devices}]"),
        click.option("--num-nodes", type=int, help=f"How many machines. [default: {DEFAULTS.num_nodes}]"),
        click.option(
            "--on-collapse",
            type=click.Choice(["stop", "restart", "ignore"]),
            help=f"When the network became a constant. [default: {DEFAULTS.on_collapse}]",
        ),
        click.option("--max-minutes", type=click.FloatRange(min=0), help="Stop after this time; the same command goes on."),
    ]
    return _decorated(command, options)


@main.command("train-teacher")
@click.option("--width", type=int, help="k of the k-Unet. [default: 64, the published teacher]")
@_training_options
def train_teacher_command(
    config_file: Path | None, out: Path, max_minutes: float | None, width: int | None, **chosen: Any
) -> None:
    """Train a large network on labels alone."""
    base = _base_config(config_file)
    if base.teachers or base.loss.soft_weight:
        raise ConfigError("train-teacher learns from labels alone; use `kdunet distill` for a configuration with a teacher.")
    chosen["width"] = width if width is not None or config_file else 64
    _train(_merged(base, chosen), out, max_minutes)


@main.command("distill")
@_teacher_options
@click.option("--width", type=int, help=f"k of the k-Unet. [default: {DEFAULTS.width}]")
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    help="vanilla: labels; soft: teacher; mixed: both; sequential: teacher, then labels. [default: mixed]",
)
@click.option("--temperature", "loss__temperature", type=float, help=f"[default: {DEFAULTS.loss.temperature:g}]")
@_training_options
def distill_command(config_file: Path | None, out: Path, max_minutes: float | None, method: str | None, **chosen: Any) -> None:
    """Train a small network from a teacher's answers and the labels."""
    if method is not None or config_file is None:
        chosen |= {f"loss__{name}": value for name, value in METHODS[method or "mixed"].items()}
    _train(_merged(_base_config(config_file), chosen), out, max_minutes)


@main.command("bank")
@_data_options
@_teacher_options
@click.option("--crops", default=8192, show_default=True, type=click.IntRange(min=1), help="How many: 4 bytes a pixel on disk.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder to write, for the --bank of any number of runs."
)
def bank_command(config_file: Path | None, out: Path, crops: int, **chosen: Any) -> None:
    """Warp crops and ask the teacher once, for runs that draw them again and again."""
    from kdunet.bank import make_bank

    config = _merged(_base_config(config_file), chosen)
    with progress_bar(crops, "crops") as bar:
        make_bank(config, out, n_crops=crops, progress=lambda done: bar(done, ""))
    click.echo(f"wrote {crops} crops of {config.data.crop} x {config.data.crop} pixels; train from them with --bank {out}")


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
@click.option(
    "--calibration/--no-calibration",
    default=True,
    show_default=True,
    help="Probabilities that are shares of the validation voxels; masks are the same either way.",
)
def export_command(run: Path, out: Path, **about: Any) -> None:
    """Write the network of RUN as ONNX, once it is proven to answer as PyTorch does."""
    from kdunet.export import export_run

    exported = export_run(run, out, **{name: value for name, value in about.items() if value is not None})
    if (found := exported.calibration) is not None:
        errors, entropies = ((found.ece_before, found.ece_after), (found.nll_before, found.nll_after))
        click.echo(
            f"calibrated on validation: error of a probability {errors[0]:.4f} -> {errors[1]:.4f}, "
            f"cross-entropy {entropies[0]:.4f} -> {entropies[1]:.4f}{found.remark and f' ({found.remark})'}"
        )
    click.echo(f"parity with PyTorch on validation crops: max |dp| = {exported.max_difference:.2g}")
    click.echo(
        f"wrote {out} ({out.stat().st_size:,} bytes, sha256 {exported.sha256[:12]}..., threshold {exported.card.threshold})"
    )


@main.command("finetune")
@click.option("--model", required=True, help="The parent: name of a released student, or an ONNX file that kdunet exported.")
@click.option("--images", "data__images", required=True, help="TIFF stack of uint8 slices.")
@click.option("--labels", "data__labels", required=True, help="TIFF stack of the same shape.")
@click.option("--foreground", "data__foreground", type=int, help="The label value that is foreground.")
@click.option("--ignore", "data__ignore", type=int, help="The label value of voxels that nobody annotated.")
@click.option(
    "--train-slices", "data__train_slices", callback=_slab, metavar="A:B", help="[default: all annotated that are not held out]"
)
@click.option(
    "--validation-slices",
    "data__validation_slices",
    callback=_slab,
    metavar="A:B",
    help="Held out. [default: the last fifth of the annotated slices; of one or two the last quarter of the rows]",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for all of it; the same goes on.")
@click.option("--steps", "optim__steps", type=int, help=f"[default: {FINETUNE.optim.steps}]")
@click.option(
    "--learning-rate", "optim__learning_rate", type=float, help=f"The peak. [default: {FINETUNE.optim.learning_rate:g}]"
)
@click.option("--seed", type=int, help=f"[default: {FINETUNE.seed}]")
@click.option("--accelerator", help=f"cpu, cuda, ... [default: {FINETUNE.accelerator}]")
@click.option("--max-minutes", type=click.FloatRange(min=0), help="Stop after this time; the same command goes on.")
@click.option("--name", default="", help="Of the new model, in its card. [default: the folder's]")
@click.option("--voxel-size", "voxel_size_nm", type=float, nargs=3, help="Of the images: z y x in nm.")
def finetune_command(
    model: str,
    out: Path,
    name: str,
    voxel_size_nm: tuple[float, float, float] | None,
    max_minutes: float | None,
    **chosen: Any,
) -> None:
    """Adapt a released student to other images with a few annotated slices, and say whether it helped."""
    from kdunet.finetune import Finetuned, finetune
    from kdunet.fit import Progress
    from kdunet_infer.model import Model

    config = _merged(FINETUNE, chosen)
    with progress_bar(config.optim.steps, "fine-tuning") as bar:

        def show(progress: Progress) -> None:
            validated = f", IoU {progress.validation.iou:.4f}" if progress.validation else ""
            bar(progress.step, f"loss {progress.loss:.4f}{validated}")

        result = finetune(
            Model.load(model), config, out, name=name, voxel_size_nm=voxel_size_nm, max_minutes=max_minutes, progress=show
        )
    if not isinstance(result, Finetuned):
        click.echo(f"stopped at step {result.step} of {config.optim.steps}; the same command goes on from there.")
        sys.exit(EXIT_BY_SIGNAL.get(result.stopped_by, 0))
    click.echo(result.comparison)
    click.echo(f"wrote {result.exported.path}; segment with: kdunet-infer segment VOLUME --model {result.exported.path}")


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
    if not result.is_global_zero:  # one process of several reports
        return
    if result.best is not None:
        click.echo(f"best on validation: {result.best}")
    if result.n_restarts:
        click.echo(f"collapsed and began again with other weights: {result.n_restarts} times")
    if result.stopped_by == "collapse":
        raise TrainingError(str(result.collapse))
    if result.collapse:
        click.echo(f"seen on the way: {result.collapse}")
    if not result.finished:
        click.echo(f"stopped at step {result.step} of {config.optim.steps}; the same command goes on from there.")
        sys.exit(EXIT_BY_SIGNAL.get(result.stopped_by, 0))
    click.echo(f"the network is in {out}; export it with: kdunet export {out} -o student.onnx")
