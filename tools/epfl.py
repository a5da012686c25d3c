"""Repeats the released student's figures on the EPFL test slices: TIFF -> OME-Zarr -> segment -> evaluate.

    python tools/epfl.py ../shared/data/epfl [--model mito-epfl-2unet] [--out runs/epfl]

Both steps go through the command `kdunet-infer`, as a user's would.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click

from kdunet_infer.geometry import Box
from kdunet_infer.volume import create_volume, open_source

CHUNK_SHAPE = (32, 128, 128)
VOXEL_SIZE_NM = (5.0, 5.0, 5.0)


def to_ome_zarr(stack: Path, out: Path) -> None:
    """Write a TIFF stack as OME-Zarr 0.5, slab by slab."""
    source = open_source(stack)
    target = create_volume(out, source.shape, chunk_shape=CHUNK_SHAPE, voxel_size_nm=VOXEL_SIZE_NM, n_levels=3, overwrite=True)
    whole = Box.of_shape(source.shape)
    for box in whole.split((CHUNK_SHAPE[0], *source.shape[1:])):
        target.write_box(box, source.read_box(box))
    target.finish({"source": stack.name})


def kdunet_infer(*arguments: str | Path) -> dict[str, object]:
    """Run the command with --json and return its object; its exit code ends this script where it is not 0."""
    command = [sys.executable, "-m", "kdunet_infer", *map(str, arguments), "--json"]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        sys.exit(finished.returncode)
    found: dict[str, object] = json.loads(finished.stdout)
    return found


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--model", default="mito-epfl-2unet", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="runs/epfl", show_default=True)
def main(data: Path, model: str, out: Path) -> None:
    """Segment DATA/testing.tif and score it against DATA/testing_groundtruth.tif."""
    out.mkdir(parents=True, exist_ok=True)
    volume, mask = out / "testing.zarr", out / "mask.zarr"
    to_ome_zarr(data / "testing.tif", volume)
    report = kdunet_infer("segment", volume, "-o", mask, "--model", model, "--overwrite")
    picture = out / "slices.png"
    truth = data / "testing_groundtruth.tif"
    scores = kdunet_infer("evaluate", mask, truth, "--png", picture, "--image", volume)
    for name in ("model", "model_version", "model_sha256", "threshold", "engine", "mvoxels_per_second"):
        click.echo(f"{name:20} {report[name]}")
    for name in ("iou", "dice", "precision", "recall"):
        click.echo(f"{name:20} {scores[name]:.4f}")
    click.echo(f"{'picture':20} {picture}")


if __name__ == "__main__":
    main()
