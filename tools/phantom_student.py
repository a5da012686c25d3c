"""Makes the released student of the synthetic volume again: models/phantom-2unet.

    python tools/phantom_student.py runs/phantom-2unet

Slices of many seeds become a TIFF stack; a 2-Unet learns from its labels. The demo runs on a seed that is not among them.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import tifffile

from kdunet.config import DataConfig, OptimConfig, RunConfig
from kdunet.export import export_run
from kdunet.fit import fit
from kdunet_infer.demo import DEMO_SEED
from kdunet_infer.geometry import Box
from kdunet_infer.phantom import phantom_box

SEEDS = range(24)
SLICES_OF_A_SEED = range(0, 48, 8)
SIDE = 384
VALIDATION_SEEDS = 3
STEPS = 3000


def write_stacks(folder: Path) -> tuple[Path, Path]:
    """Write images.tif and labels.tif: for each seed the same few slices, far enough apart to differ."""
    assert DEMO_SEED not in SEEDS
    pairs = [phantom_box(Box((z, 0, 0), (z + 1, SIDE, SIDE)), seed) for seed in SEEDS for z in SLICES_OF_A_SEED]
    paths = folder / "images.tif", folder / "labels.tif"
    for path, stack in zip(paths, zip(*pairs, strict=True), strict=True):
        tifffile.imwrite(path, np.concatenate(stack), photometric="minisblack")
    return paths


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), default="models/phantom-2unet/model.onnx", show_default=True)
def main(run: Path, out: Path) -> None:
    """Train into RUN, go on if it was stopped, and export."""
    run.parent.mkdir(parents=True, exist_ok=True)
    data = run.with_name(run.name + "-data")
    data.mkdir(exist_ok=True)
    images, labels = write_stacks(data)
    n_slices, n_validation = (n * len(SLICES_OF_A_SEED) for n in (len(SEEDS), VALIDATION_SEEDS))
    config = RunConfig(
        width=2,
        data=DataConfig(
            images=str(images),
            labels=str(labels),
            train_slices=(0, n_slices - n_validation),
            validation_slices=(n_slices - n_validation, n_slices),
            crop=192,
        ),
        optim=OptimConfig(steps=STEPS, precision="bf16-mixed"),
    )
    click.echo(fit(config, run, progress=lambda p: click.echo(p) if p.step % 500 == 0 else None))
    click.echo(export_run(run, out, name="phantom-2unet", told={"description": "mitochondria of kdunet's synthetic EM volume"}))


if __name__ == "__main__":
    main()
