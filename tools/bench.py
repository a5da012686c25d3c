"""Measures every engine on networks of every width, in one run, and writes what docs/performance.md shows.

    python tools/bench.py engines --out docs/results/engines.json     some minutes on two idle cores; --resume goes on
    python tools/bench.py report docs/results/engines.json            the plot beside it, and the tables of docs/performance.md
    python tools/bench.py segment                                     end to end, from one OME-Zarr to another
    python tools/bench.py training                                    a training step, in torch's ways and ours, and its memory
    python tools/bench.py instructions                                what each engine executes a pixel, where valgrind is

Needs pip install '.[cpu,openvino,train,bench]'. A contender that cannot run here is listed with the reason.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
import tifffile
from bench_contenders import NAMES, Entry, Subject, UInt8Array, entry, multiply_adds, subject
from bench_report import write_plot, write_tables
from bench_segment import measure_segment, write_volume
from bench_training import as_table, measure_training
from fma_peak import peak_run

from kdunet_infer.speed import REFERENCE, SLICE_SHAPE, race, synthetic_slices

REPOSITORY = Path(__file__).resolve().parents[1]
EPFL = REPOSITORY.parent / "shared" / "data" / "epfl" / "testing.tif"
WIDTHS = (1, 2, 4, 8, 16)
THREADS = (1, 2)
N_SLICES = 2
PEAK = "peak"
PACKAGES = ("numpy", "llvmlite", "onnxruntime", "openvino", "torch", "monai")

QUICK_SHAPE = (64, 96)
QUICK_WIDTHS = (1, 2)  # one with random weights, one with trained ones
QUICK_THREADS = (1,)


@click.group()
def main() -> None:
    """Benchmarks of the engines."""


@main.command("training")
@click.option("--width", "widths", type=int, multiple=True, default=WIDTHS, show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--crop", default=256, show_default=True)
@click.option("--threads", "threads", type=int, multiple=True, default=THREADS, show_default=True)
@click.option("--rounds", "n_rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON of all rows.")
def training_command(
    widths: tuple[int, ...], batch: int, crop: int, threads: tuple[int, ...], n_rounds: int, out: Path | None
) -> None:
    """Measure a training step of each width in several ways, part by part, and print a table."""
    rows = []
    for width in widths:
        for n_threads in threads:
            rows += measure_training(width, batch=batch, crop=crop, n_threads=n_threads, n_rounds=n_rounds)
    click.echo(as_table(rows))
    if out:
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


@main.command("engines")
@click.option("--out", type=click.Path(path_type=Path), default="docs/results/engines.json", show_default=True)
@click.option("--seconds", type=float, default=1.0, show_default=True, help="Each contender in all, and at least once a round.")
@click.option("--rounds", "n_rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--resume", is_flag=True, help="Keep what OUT has from this machine and these versions.")
@click.option("--quick", is_flag=True, help="Tiny slices and two widths: shows that it works, not how fast.")
def engines_command(out: Path, seconds: float, n_rounds: int, resume: bool, quick: bool) -> None:
    """Measure all contenders, width by width and thread by thread, and write OUT (JSON) after each."""
    slices, source = _slices(QUICK_SHAPE if quick else SLICE_SHAPE, real=not quick)
    about = _about(slices, source) | {"rounds": n_rounds, "seconds": seconds}
    found: dict[str, Any] = {"about": about, "date": datetime.now(UTC).date().isoformat(), "results": []}
    if resume and out.exists():
        before = json.loads(out.read_text(encoding="utf-8"))
        if before["about"] == about:
            found = before
        else:
            click.echo(f"{out} is from another machine or other versions: starting over")
    done = {(row["width"], row["threads"]) for row in found["results"]}
    threads = QUICK_THREADS if quick else THREADS
    for width in QUICK_WIDTHS if quick else WIDTHS:
        if all((width, n_threads) in done for n_threads in threads):
            continue
        of = subject(width, slices)
        for n_threads in threads:
            if (width, n_threads) not in done:
                found["results"] += _measured(of, slices, n_threads, seconds=seconds, n_rounds=n_rounds)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _measured(of: Subject, slices: UInt8Array, n_threads: int, *, seconds: float, n_rounds: int) -> list[dict[str, Any]]:
    """A row for each contender; the multiply-adds of the CPU are measured in the same rounds."""
    spin, n_spun = peak_run(n_threads)
    spin()
    entries: dict[str, Entry] = {}
    refusals: dict[str, str] = {}
    for name in NAMES:
        try:
            made = entry(name, of, slices, n_threads)
            made.run()
        except ModuleNotFoundError as exc:
            refusals[name] = f"needs {exc.name!r}: pip install 'kdunet[bench]'."
        except Exception as exc:  # whatever one runtime does, the others are measured
            refusals[name] = f"{type(exc).__name__}: {exc}"
        else:
            entries[name] = made
    runs: dict[str, Callable[[], object]] = {name: made.run for name, made in entries.items()}
    times = race({**runs, PEAK: spin}, seconds=seconds, n_rounds=n_rounds)
    peak = n_spun / statistics.median(times.pop(PEAK))
    reference = entries[REFERENCE].n_pixels / statistics.median(times[REFERENCE]) if REFERENCE in times else None
    rows = []
    for name in NAMES:
        row: dict[str, Any] = {"width": of.width, "threads": n_threads, "weights": of.weights, "contender": name}
        if name in refusals:
            row["refusal"] = refusals[name]
        else:
            n_pixels, median = entries[name].n_pixels, statistics.median(times[name])
            row |= {
                "description": entries[name].description,
                "mpx_per_s": _rounded(n_pixels / median / 1e6),
                "mpx_per_s_rounds": [_rounded(n_pixels / t / 1e6) for t in times[name]],
                "ratio": _rounded(n_pixels / median / reference) if reference else None,
                "multiply_adds_needed": multiply_adds(of.width),
                "multiply_adds_done": _rounded(entries[name].multiply_adds / n_pixels),
                "share_of_peak_needed": _rounded(multiply_adds(of.width) * n_pixels / median / peak),
                "share_of_peak_done": _rounded(entries[name].multiply_adds / median / peak),
                "peak_gmac_per_s": _rounded(peak / 1e9),
            }
        rows.append(row)
        click.echo(f"{of.width:2}-Unet {n_threads} {name:22} {row.get('mpx_per_s', row.get('refusal'))}")
    return rows


def _slices(size: tuple[int, int], *, real: bool, n: int = N_SLICES) -> tuple[UInt8Array, str]:
    """Slices (n, y, x) of `size`, and what they are of."""
    if real and EPFL.exists():
        stack: UInt8Array = tifffile.imread(EPFL, key=range(n))
        return np.ascontiguousarray(stack[:, : size[0], : size[1]]), "EPFL hippocampus, testing sub-volume"
    return synthetic_slices(n, size), "phantom"


def _about(slices: UInt8Array, source: str) -> dict[str, Any]:
    """All that must be equal for two figures to be comparable."""
    return {
        "cpu": _cpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "slices": source,
        "slice_shape": list(slices.shape[1:]),
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    return found[1] if found else platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


@main.command("report")
@click.argument("results", type=click.Path(path_type=Path))
@click.option("--docs", type=click.Path(path_type=Path), default="docs/performance.md", show_default=True)
def report_command(results: Path, docs: Path) -> None:
    """Draw RESULTS as a PNG beside it, and put its tables between the markers of DOCS."""
    found = json.loads(results.read_text(encoding="utf-8"))
    write_tables(found, docs)
    write_plot(found, results.with_suffix(".png"))
    click.echo(f"wrote {docs} and {results.with_suffix('.png')}")


@main.command("segment")
@click.option("--engine", "engines", multiple=True, default=("native",), show_default=True)
@click.option("--threads", "n_threads", type=int, default=2, show_default=True)
@click.option("--slices", "n_slices", type=int, default=512, show_default=True, help="Of the volume, 768 x 1024 pixels each.")
@click.option("--rounds", "n_rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--quick", is_flag=True, help="A tiny volume: shows that it works, not how fast.")
def segment_command(engines: tuple[str, ...], n_threads: int, n_slices: int, n_rounds: int, quick: bool) -> None:
    """Segment an OME-Zarr of EPFL slices into another, beside MONAI's sliding windows with a plain read and write."""
    if quick:
        slices, n_slices = synthetic_slices(2, QUICK_SHAPE), 8
    else:
        slices, _ = _slices(SLICE_SHAPE, real=True, n=64)
    with tempfile.TemporaryDirectory() as folder:
        write_volume(Path(folder) / "volume.zarr", slices, n_slices)
        found = measure_segment(Path(folder), Path(folder) / "volume.zarr", engines, n_threads, n_rounds=n_rounds)
    for name, speed in found.items():
        click.echo(f"{name:20} {speed:8.1f} Mvox/s {speed / found['MONAI']:8.1f} x MONAI")


@main.command("instructions")
@click.option("--engine", "engines", multiple=True, default=("native", "onnxruntime"), show_default=True)
@click.option("--model", default="mito-epfl-2unet", show_default=True)
@click.option("--side", type=int, default=128, show_default=True, help="Of the core, in pixels.")
def instructions_command(engines: Sequence[str], model: str, side: int) -> None:
    """Instructions a pixel of the core, one thread, by valgrind: without noise, but it knows no AVX-512."""
    if shutil.which("valgrind") is None:
        raise click.ClickException("valgrind is not here; install it from your system's packages.")
    for engine in engines:
        few, many = (_instructions(engine, model, side, n) for n in (4, 8))  # whole batches
        click.echo(f"{engine:20} {(many - few) / 4 / side**2:10.1f}")


def _instructions(engine: str, model: str, side: int, n_tiles: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        counter = [
            "valgrind",
            "--tool=cachegrind",
            "--cache-sim=no",
            f"--cachegrind-out-file={folder}/out",
            f"--log-file={log}",
        ]
        command = [sys.executable, str(REPOSITORY / "tools" / "repeat_tile.py"), engine, model, str(side), str(n_tiles)]
        subprocess.run([*counter, *command], check=True)
        found = re.search(r"I\s+refs:\s+([\d,]+)", log.read_text())
    if found is None:
        raise click.ClickException("valgrind counted nothing; see its manual for this CPU.")
    return int(found[1].replace(",", ""))


if __name__ == "__main__":
    main()
