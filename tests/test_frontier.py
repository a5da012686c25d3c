"""tools/frontier.py: a table that fills itself, points that none beats, and a picture."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from small_models import unet_onnx

import kdunet_infer.speed
from kdunet.checkpoint import NETWORK_FILE, save_network
from kdunet.unet import UNet
from kdunet_infer.card import ModelCard
from kdunet_infer.errors import ConfigError
from kdunet_infer.testing import noise

TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.fixture(scope="module")
def frontier() -> Iterator[ModuleType]:
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("frontier")
    sys.path.remove(str(TOOLS))


@pytest.fixture
def quick(frontier: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds of tiny slices of noise: that it works, not how fast."""
    monkeypatch.setattr(kdunet_infer.speed, "synthetic_slices", lambda n, size: noise((n, *size)))
    monkeypatch.setattr(frontier, "measure", functools.partial(frontier.measure, size=(16, 16), n_tiles=1))


def run(frontier: ModuleType, table: Path, *arguments: object) -> Result:
    options = ["--table", table, "--threads", 1, "--seconds", 0]
    return CliRunner().invoke(frontier.main, [str(argument) for argument in (*options, *arguments)])


@pytest.mark.usefixtures("quick")
def test_added_networks_are_measured_once_and_drawn(
    frontier: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs kdunet[bench]")
    table = tmp_path / "results" / "frontier.json"
    scores = tmp_path / "scores.jsonl"
    scores.write_text('{"iou": 0.8}\n{"iou": 0.84, "average": "none"}\n')
    student = run(
        frontier, table, "add", "s", "--role", "student", "--model", "phantom-2unet", "--iou", 0.7, "--results", scores
    )
    assert '"mean": 0.78, "min": 0.7, "max": 0.84} of 3 seeds' in student.output
    assert run(frontier, table, "add", "t", "--role", "teacher", "--model", "mito-epfl-2unet", "--iou", 0.9).exit_code == 0
    drawn = run(frontier, table)
    assert drawn.exit_code == 0, drawn.output
    assert drawn.output.count("Mvox/s") == 2
    assert table.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads(table.read_text())["networks"]
    assert [(row["name"], row["parameters"], row["n_seeds"]) for row in rows] == [("s", 30_902, 3), ("t", 30_902, 1)]
    assert all(row["mvox_per_s"] > 0 and row["engine"].startswith("native") for row in rows)
    monkeypatch.setattr(frontier, "draw", lambda networks, path: None)
    assert "Mvox/s" not in run(frontier, table).output  # measured already
    assert run(frontier, table, "--again").output.count("Mvox/s") == 2
    run(frontier, table, "add", "s", "--role", "student", "--model", "phantom-2unet", "--iou", 0.75)
    assert [(row.name, row.ious, row.mvox_per_s is None) for row in frontier.read_table(table)] == [
        ("t", (0.9,), False), ("s", (0.75,), True),
    ]  # fmt: skip


def test_a_folder_with_a_network_is_exported(frontier: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = UNet(1, n_levels=2).eval()
    save_network(tmp_path / NETWORK_FILE, network, {})
    exported: list[tuple[UNet, ModelCard]] = []

    def fake(network: UNet, card: ModelCard) -> bytes:
        exported.append((network, card))
        return unet_onnx(2, 1, card).SerializeToString()

    monkeypatch.setattr(frontier, "onnx_graph", fake)
    card = frontier.loaded(str(tmp_path)).card
    ((found, given),) = exported
    assert card == given
    assert (card.n_parameters, card.stride_zyx) == (sum(p.numel() for p in network.parameters()), (1, 2, 2))
    assert torch.equal(found.head.weight, network.head.weight)


def test_a_network_that_the_engine_refuses_has_no_speed(frontier: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = frontier.measure.__globals__["Speed"]("native", refusal="native knows no such network.")
    monkeypatch.setattr(frontier, "measure", lambda *_, **__: [refused])
    said: list[str] = []
    row = frontier.Network(name="odd", role="student", model="phantom-2unet", ious=(0.5,))
    found = frontier.measured(row, n_threads=1, seconds=0, say=said.append)
    assert (found.mvox_per_s, found.parameters) == (None, 30_902)
    assert "native knows no such network." in said[0]


def test_the_published_figures_stand_beside_ours(frontier: ModuleType, tmp_path: Path) -> None:
    frontier.write_table(tmp_path / "frontier.json", [])
    published = json.loads((tmp_path / "frontier.json").read_text())["published"]
    assert [(row["parameters"], row["iou"]) for row in published] == [(31_042_434, 0.804), (30_902, 0.759)]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=12), st.booleans())
def test_the_frontier_is_what_none_beats(points: list[tuple[int, int]], less_is_better: bool) -> None:
    best = importlib.import_module("frontier").best
    sign = 1 if less_is_better else -1

    def beaten(point: tuple[int, int]) -> bool:
        others = (other for other in points if other != point)
        return any(sign * x <= sign * point[0] and iou >= point[1] for x, iou in others)

    assert best(points, less_is_better=less_is_better) == sorted({point for point in points if not beaten(point)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"role": "pupil"}, "s has the role 'pupil'; choose student or teacher"),
        ({"ious": []}, r"s has the IoUs \[\]; give one between 0 and 1 for each seed"),
        ({"ious": [83.0]}, r"s has the IoUs \[83.0\]"),
        ({"speed": 1}, "the row 's' of the table cannot be .*'speed'.*; mend it"),
    ],
    ids=["role", "no-iou", "percent", "unknown"],
)
def test_a_row_that_cannot_be_is_refused(frontier: ModuleType, change: dict[str, object], says: str) -> None:
    row = {"name": "s", "role": "student", "model": "m", "ious": [0.5]}
    with pytest.raises(ConfigError, match=says):
        frontier.Network.from_dict({**row, **change})


def test_files_that_are_something_else_are_refused(frontier: ModuleType, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    for text in ("[]", "{", "{}"):
        other.write_text(text)
        with pytest.raises(ConfigError, match=r"other.json is no table of networks .*; restore it"):
            frontier.read_table(other)
    other.write_text('{"dice": 1}')
    with pytest.raises(ConfigError, match=r"other.json holds no results .*; give what `kdunet-infer evaluate --json`"):
        frontier.ious_of(other)


def test_an_empty_table_says_how_to_fill_it(frontier: ModuleType, tmp_path: Path) -> None:
    result = run(frontier, tmp_path / "frontier.json")
    assert result.exit_code == 1
    assert "has no networks; add them with `python tools/frontier.py add NAME ...`" in result.output
