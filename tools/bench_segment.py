"""End to end for tools/bench.py: `segment` from one OME-Zarr to another, and MONAI with a plain read and write."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from bench_contenders import MONAI_OPTIONS, MONAI_ROI, TEACHERS, UInt8Array, laid_out

from kdunet.checkpoint import load_network
from kdunet_infer.geometry import Box
from kdunet_infer.model import Model
from kdunet_infer.run import SegmentOptions, segment
from kdunet_infer.volume import create_volume

STUDENT = "mito-epfl-2unet"
CHUNK, SHARD = (64, 64, 64), (64, 512, 512)


def write_volume(path: Path, slices: UInt8Array, n_slices: int) -> None:
    """An OME-Zarr of `n_slices`, `slices` (n, y, x) there and back again; compressed as zarr does by default."""
    y, x = slices.shape[1:]
    target = create_volume(path, (n_slices, y, x), chunk_shape=CHUNK, shard_shape=SHARD, voxel_size_nm=(5.0, 5.0, 5.0))
    there_and_back = np.concatenate([slices, slices[::-1]])
    for z in range(0, n_slices, SHARD[0]):
        end = min(z + SHARD[0], n_slices)
        target.write_box(Box((z, 0, 0), (end, y, x)), there_and_back[np.arange(z, end) % len(there_and_back)])
    target.finish({})


def measure_segment(folder: Path, volume: Path, engines: tuple[str, ...], n_threads: int, *, n_rounds: int) -> dict[str, Any]:
    """Mvox/s of each contender, medians of rounds in turns: the whole call, from opening the volume to the finished output."""
    model = Model.load(STUDENT)
    n_voxels = {name: int(np.prod(zarr.open_array(volume / "0", mode="r").shape)) for name in engines}
    runs: dict[str, Callable[[], None]] = {name: _segment_run(folder, volume, model, name, n_threads) for name in engines}
    n_voxels["MONAI"], runs["MONAI"] = _monai_run(folder, volume, model.card.threshold, n_threads)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(n_rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: n_voxels[name] / statistics.median(took) / 1e6 for name, took in times.items()}


def _segment_run(folder: Path, volume: Path, model: Model, engine: str, n_threads: int) -> Callable[[], None]:
    out, options = folder / f"{engine}.zarr", SegmentOptions(engine=engine, n_threads=n_threads, overwrite=True)
    return lambda: print(f"  {segment(volume, out, model, options).mvoxels_per_second:.1f} Mvox/s while blocks ran ({engine})")


def _monai_run(folder: Path, volume: Path, threshold: float, n_threads: int) -> tuple[int, Callable[[], None]]:
    """The baseline in its better layout, slice by slice; on a few slices, as it is slow."""
    from monai.inferers import SlidingWindowInferer

    network = laid_out(load_network(TEACHERS / STUDENT)[0], torch.channels_last)
    inferer = SlidingWindowInferer(MONAI_ROI, **MONAI_OPTIONS)
    source = zarr.open_array(volume / "0", mode="r")
    n_slices, out = 8, folder / "monai.zarr"

    def run() -> None:
        torch.set_num_threads(n_threads)
        shutil.rmtree(out, ignore_errors=True)
        mask = zarr.create_array(out, shape=source.shape, dtype="uint8", chunks=(1, *source.shape[1:]))
        slices = np.asarray(source[:n_slices])  # in one read: slice by slice it would decode each shard 64 times
        for z, image in enumerate(slices):
            with torch.inference_mode():
                tensor = torch.from_numpy(image).float()[None, None].contiguous(memory_format=torch.channels_last)
                mask[z] = (inferer(tensor, network).softmax(1)[0, 1] >= threshold).numpy()

    return n_slices * source.shape[1] * source.shape[2], run
