"""tools/reliability_plot.py: what is undone, what is fitted, and a picture of both."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner

from kdunet.calibration import fitted
from kdunet.data import Annotated
from kdunet_infer.geometry import Box
from kdunet_infer.model import Model
from kdunet_infer.phantom import phantom_box
from kdunet_infer.testing import noise

TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.fixture(scope="module")
def plot() -> Iterator[ModuleType]:
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("reliability_plot")
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def slabs() -> dict[str, Annotated]:
    images, truth = phantom_box(Box((0, 0, 0), (2, 96, 128)), 7)
    return {"validation": Annotated(images[:1], truth[:1]), "test": Annotated(images[1:], truth[1:])}


def test_without_a_calibration_one_is_fitted_to_the_first_slab(plot: ModuleType, slabs: dict[str, Annotated]) -> None:
    found = plot.answers(Model.load("phantom-2unet"), slabs, n_threads=1)
    want = fitted(found.histograms["validation"])
    assert (found.scale, found.offset) == (want.scale, want.offset) != (1, 0)
    assert want.nll_after < want.nll_before
    assert found.histograms["test"].samples[2].sum() == 96 * 128


def test_the_cards_calibration_is_undone(plot: ModuleType, slabs: dict[str, Annotated]) -> None:
    plain = Model.load("phantom-2unet")
    calibration = {"calibration": {"scale": 2.0, "offset": -0.5}}
    told = dataclasses.replace(plain, card=dataclasses.replace(plain.card, provenance=calibration))
    found = plot.answers(told, slabs, n_threads=1)
    assert (found.scale, found.offset) == (2.0, -0.5)
    uncalibrated = plot.answers(plain, slabs, n_threads=1)
    after = found.histograms["test"].reliability(found.scale, found.offset)
    # the engine's own probabilities are those after calibration
    np.testing.assert_allclose(after.count, uncalibrated.histograms["test"].reliability().count, atol=20)
    before = found.histograms["test"].cross_entropy()
    assert before == pytest.approx(uncalibrated.histograms["test"].cross_entropy(0.5, 0.25), abs=1e-4)


def test_the_command_draws_both_slabs(plot: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs kdunet[bench]")
    for name, n_slices in (("training", 165), ("testing", 2)):
        stack = noise((n_slices, 16, 16))
        tifffile.imwrite(tmp_path / f"{name}.tif", stack, photometric="minisblack")
        tifffile.imwrite(tmp_path / f"{name}_groundtruth.tif", (stack > 200).astype(np.uint8), photometric="minisblack")
    out = tmp_path / "reliability.png"
    arguments = [str(tmp_path), "--model", "phantom-2unet", "--model", "mito-epfl-2unet", "--threads", "1", "-o", str(out)]
    result = CliRunner().invoke(plot.main, arguments)
    assert result.exit_code == 0, result.output
    assert out.read_bytes().startswith(b"\x89PNG")
    assert [line.split()[0] for line in result.output.splitlines() if "ECE" in line] == ["phantom-2unet"] * 2 + [
        "mito-epfl-2unet"
    ] * 2


def test_a_folder_without_the_volumes_is_named(plot: ModuleType, tmp_path: Path) -> None:
    result = CliRunner().invoke(plot.main, [str(tmp_path), "--model", "phantom-2unet"])
    assert result.exit_code == 1
    assert "training.tif; check the path" in result.output
