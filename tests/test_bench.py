"""tools/bench.py: that contenders do the same work, that the work is counted right, and that results become tables."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from kdunet.unet import UNet
from kdunet_infer.engines.native.machine import SMALL
from kdunet_infer.testing import noise

TOOLS = Path(__file__).resolve().parents[1] / "tools"
SHAPE = (48, 64)


@pytest.fixture(scope="module")
def tools() -> Iterator[None]:
    sys.path.insert(0, str(TOOLS))
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)
    sys.path.remove(str(TOOLS))


@pytest.fixture
def bench(tools: None) -> ModuleType:
    return importlib.import_module("bench")


@pytest.fixture
def contenders(tools: None) -> ModuleType:
    return importlib.import_module("bench_contenders")


@pytest.fixture
def report(tools: None) -> ModuleType:
    return importlib.import_module("bench_report")


def test_a_quick_run_measures_every_contender(tmp_path: Path) -> None:
    out = tmp_path / "results" / "engines.json"
    command = [sys.executable, str(TOOLS / "bench.py"), "engines", "--quick", "--seconds", "0", "--rounds", "1"]
    finished = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(out.read_text())
    assert found["about"]["slices"] == "phantom"
    rows = found["results"]
    assert {(row["width"], row["weights"]) for row in rows} == {(1, "random"), (2, "mito-epfl-2unet")}
    measured = [row for row in rows if "mpx_per_s" in row]
    for row in measured:
        assert row["multiply_adds_needed"] == {1: 189, 2: 736}[row["width"]]
        assert row["multiply_adds_done"] > row["multiply_adds_needed"]
        assert row["mpx_per_s"] > 0
        assert row["share_of_peak_done"] >= row["share_of_peak_needed"]
    names = {row["contender"] for row in measured}
    assert {"onnxruntime", "openvino", "PyTorch eager", "PyTorch channels_last"} <= names
    if importlib.util.find_spec("monai") is None:
        assert all("needs 'monai'" in row["refusal"] for row in rows if row["contender"].startswith("MONAI"))
    else:
        assert {"MONAI eager", "MONAI channels_last"} <= names
    assert {row["ratio"] for row in rows if row["contender"] == "onnxruntime"} == {1.0}


def test_a_run_goes_on_where_it_was_stopped(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[int, int]] = []
    stop = [3]

    def fake(of: int, slices: object, n_threads: int, **options: object) -> list[dict[str, Any]]:
        if len(measured) == stop[0]:
            raise KeyboardInterrupt
        measured.append((of, n_threads))
        return [{"width": of, "threads": n_threads}]

    monkeypatch.setattr(bench, "subject", lambda width, slices: width)
    monkeypatch.setattr(bench, "_measured", fake)
    monkeypatch.setattr(bench, "_slices", lambda size, real: (noise((1, 16, 16)), "noise"))
    out = tmp_path / "engines.json"

    def run(*options: str) -> str:
        return CliRunner().invoke(bench.main, ["engines", "--out", str(out), *options]).output

    run()
    assert measured == [(1, 1), (1, 2), (2, 1)]
    stop[0] = 100
    run("--resume")
    everything = [(width, n_threads) for width in (1, 2, 4, 8, 16) for n_threads in (1, 2)]
    assert measured == everything
    assert [(row["width"], row["threads"]) for row in json.loads(out.read_text())["results"]] == everything
    monkeypatch.setattr(bench, "_cpu_name", lambda: "another")
    assert "another machine or other versions: starting over" in run("--resume")
    assert measured == 2 * everything


def test_contenders_compute_the_same(contenders: ModuleType) -> None:
    slices = noise((2, *SHAPE))
    of = contenders.subject(1, slices)
    want = contenders.entry("onnxruntime", of, slices, 1).run()[0]
    assert want.shape == SHAPE
    assert want.std() > 0.001  # the random network sees something
    for name in ("native", "openvino", *contenders.TORCH):
        made = contenders.entry(name, of, slices, 1)
        found = made.run().reshape(-1, *SHAPE)
        assert made.n_pixels == found.size, name
        assert np.abs(found[0] - want).max() < 1e-5, name


def test_the_baseline_is_counted_by_its_windows(contenders: ModuleType) -> None:
    pytest.importorskip("monai", reason="the baseline needs kdunet[bench]")
    slices = noise((1, *SHAPE))
    made = contenders.entry("MONAI eager", contenders.subject(1, slices), slices, 1)
    assert made.run().shape == SHAPE
    assert made.multiply_adds == 189 * 512 * 512  # one window, which is larger than the slice


@pytest.mark.parametrize("width", [1, 2, 3, 8])
def test_multiply_adds_are_those_of_the_layers(contenders: ModuleType, width: int) -> None:
    """Against PyTorch's own layers on one image; it has two output maps, and an exported graph one."""
    total = 0

    def count(layer: nn.Conv2d | nn.ConvTranspose2d, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        # every weight meets every pixel of the output (convolution) or of the input (transposed convolution of stride 2)
        pixels = (inputs[0] if isinstance(layer, nn.ConvTranspose2d) else output)[0, 0].numel()
        total += layer.weight.numel() * pixels

    network = UNet(width).eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(count)  # type: ignore[arg-type]
    network(torch.zeros((1, 1, 32, 48)))
    assert contenders.multiply_adds(width) == total / (32 * 48) - width


def test_a_window_that_is_the_tile_is_all_the_work(contenders: ModuleType) -> None:
    assert contenders._windowed_work(2, SHAPE, (0, 0)) == 736 * 48 * 64
    core = contenders._windowed_work(2, (240, 256), (96, 96))
    assert 736 * 48 * 64 < core < 736 * 240 * 256


def test_the_peak_is_a_loop_of_multiply_adds(tools: None) -> None:
    """x / 2 + 1 three times over, from 0: 1.75 in every lane of every sum."""
    peak = importlib.import_module("fma_peak")
    spin = peak._compiled(peak._source(4, 5), SMALL)
    out = (ctypes.c_float * 20)()
    spin(ctypes.addressof(out), 3)
    assert list(out) == [1.75] * 20
    run, n = peak.peak_run(2)
    run()
    assert n % (2 * peak.N_LOOPS) == 0


def row(width: int, threads: int, contender: str, speed: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"width": width, "threads": threads, "contender": contender}
    if speed is None:
        return {**found, "refusal": "not here"}
    done = {"multiply_adds_needed": 736, "multiply_adds_done": 1092.5, "share_of_peak_needed": 0.25, "ratio": speed / 10}
    return {**found, "mpx_per_s": speed, **done}


def results() -> dict[str, Any]:
    about = {
        "cpu": "A CPU",
        "system": "Linux x86_64",
        "python": "3.11",
        "versions": {"numpy": "2", "monai": None},
        "slices": "phantom",
        "slice_shape": [64, 96],
        "rounds": 7,
    }
    rows = [
        row(2, 1, "native", None),
        row(2, 1, "onnxruntime", 10.0),
        row(2, 1, "MONAI channels_last", 4.0),
        row(2, 1, "MONAI eager", 6.0),
        row(2, 2, "onnxruntime", 18.0),
        row(4, 1, "onnxruntime", 5.0),
    ]
    return {"about": about, "date": "2026-01-02", "results": rows}


def test_tables_go_between_the_markers_and_nothing_else_changes(report: ModuleType, tmp_path: Path) -> None:
    docs = tmp_path / "performance.md"
    docs.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_tables(results(), docs)
    text = docs.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    for line in (
        "A CPU, Linux x86_64; 2026-01-02. Slices of 64 x 96 pixels: phantom.",
        "Python 3.11, numpy 2. Medians of 7 rounds.",
        "| | 2-Unet | 4-Unet |",
        "| native | - | - |",
        "| onnxruntime | 10 (1.0x, 25%) | 5 (0.5x, 25%) |",
        "| MONAI | 6 (0.6x, 25%) | - |",
        "| onnxruntime | 1.80 |",
        "| onnxruntime | 736 / 1,092 | 736 / 1,092 |",
    ):
        assert line in text.splitlines(), line
    report.write_tables(results(), docs)
    assert docs.read_text() == text


def test_docs_without_markers_are_refused(report: ModuleType, tmp_path: Path) -> None:
    docs = tmp_path / "performance.md"
    docs.write_text("no markers")
    with pytest.raises(click.ClickException, match=r"performance\.md lacks the lines <!-- bench:begin --> and"):
        report.write_tables(results(), docs)
    assert docs.read_text() == "no markers"


def test_the_plot_is_a_picture(report: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs kdunet[bench]")
    report.write_plot(results(), tmp_path / "engines.png")
    assert (tmp_path / "engines.png").read_bytes().startswith(b"\x89PNG")


def test_instructions_are_the_difference_of_two_counts(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(command: list[str], check: bool) -> None:
        (log,) = (Path(part.removeprefix("--log-file=")) for part in command if part.startswith("--log-file="))
        side, n_tiles = int(command[-2]), int(command[-1])
        log.write_text(f"==1== I   refs:      {1_000_000 + n_tiles * 50 * side**2:,}\n")

    monkeypatch.setattr(bench.subprocess, "run", fake)
    monkeypatch.setattr(bench.shutil, "which", lambda name: "/usr/bin/valgrind")
    result = CliRunner().invoke(bench.main, ["instructions", "--engine", "native", "--side", "32"])
    assert result.output.split() == ["native", "50.0"]
    monkeypatch.setattr(bench.shutil, "which", lambda name: None)
    assert "valgrind is not here; install it" in CliRunner().invoke(bench.main, ["instructions"]).output


def test_all_ways_of_a_training_step_are_measured(tools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    training = importlib.import_module("bench_training")
    monkeypatch.setattr(training, "WAYS", ("contiguous", "channels_last", "bf16", "planar", "nonsense"))
    monkeypatch.setattr(training, "_peak_memory_mb", lambda *_: 12.0)
    made = training.step_of
    monkeypatch.setattr(training, "step_of", lambda way, *size: made(way, *size) if way != "nonsense" else 1 / 0)
    rows = training.measure_training(1, batch=2, crop=32, n_threads=1, n_rounds=1)
    assert [row["way"] for row in rows] == list(training.WAYS)
    for row in rows[:-1]:
        parts = [row[f"{part}_ms"] for part in training.PARTS]
        assert min(parts) > 0
        assert sum(parts) == pytest.approx(row["step_ms"], abs=0.5)
    assert rows[-1]["refusal"].startswith("ZeroDivisionError")
    table = training.as_table(rows).splitlines()
    assert len(table) == 2 + len(rows)
    assert {line.count("|") for line in table} == {12}
