"""tools/averaging.py: means over flips and planes against the same written out, and IoU on the phantom."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from click.testing import CliRunner

from kdunet.data import Annotated
from kdunet.losses import IGNORED
from kdunet.teachers import flip_averaged
from kdunet_infer.engines import create_engine
from kdunet_infer.errors import ConfigError
from kdunet_infer.geometry import Box
from kdunet_infer.model import Model
from kdunet_infer.phantom import phantom_box
from kdunet_infer.testing import noise, segment_whole

TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.fixture(scope="module")
def averaging() -> Iterator[ModuleType]:
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("averaging")
    sys.path.remove(str(TOOLS))


def lopsided(image: np.ndarray) -> np.ndarray:
    """An answer that no flip or turn leaves alone: each pixel, twice the one to its right, three times the one below it."""
    wide = np.pad(image.astype(np.float32), ((0, 1), (0, 1)))
    return wide[:-1, :-1] + 2 * wide[:-1, 1:] + 3 * wide[1:, :-1]


def test_flips_are_those_of_teachers(averaging: ModuleType) -> None:
    image = noise((1, 5, 8))[0]
    teacher = flip_averaged(lambda images: torch.stack([torch.from_numpy(lopsided(one[0].numpy())) for one in images]))
    want = teacher(torch.from_numpy(image)[None, None].float())[0].numpy()
    found = averaging.over_flips(lopsided)(image)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert not np.allclose(found, lopsided(image))
    np.testing.assert_allclose(averaging.over_flips(lopsided)(np.rot90(image)), np.rot90(found), rtol=1e-6)


def test_planes_are_the_slices_of_each_axis(averaging: ModuleType) -> None:
    volume = noise((3, 5, 7))
    xy = np.stack([lopsided(volume[z]) for z in range(3)], axis=0)
    xz = np.stack([lopsided(volume[:, y]) for y in range(5)], axis=1)
    yz = np.stack([lopsided(volume[:, :, x]) for x in range(7)], axis=2)
    for average, want in (("none", xy), ("planes", (xy + xz + yz) / 3)):
        np.testing.assert_allclose(averaging.averaged_margins(volume, lopsided, average), want, rtol=1e-6)


def test_both_is_flips_in_each_plane(averaging: ModuleType) -> None:
    volume = noise((3, 5, 7))
    found = averaging.averaged_margins(volume, lopsided, "both")
    want = averaging.averaged_margins(volume, averaging.over_flips(lopsided), "planes")
    np.testing.assert_array_equal(found, want)
    mirrored = averaging.averaged_margins(volume.transpose(2, 1, 0)[::-1], lopsided, "both")
    np.testing.assert_allclose(mirrored[::-1].transpose(2, 1, 0), found, rtol=1e-5)


def test_an_engine_answers_with_the_margins_of_whole_slices(averaging: ModuleType, model: Model) -> None:
    engine = create_engine("onnxruntime", model, n_threads=1)
    image = noise((1, 21, 34))
    p = segment_whole(image, engine, model.card)[0]
    margins = averaging.engine_ask(engine, model.card)(image[0])
    np.testing.assert_allclose(1 / (1 + np.exp(-margins)), p, atol=2e-7)


class Certain:
    """An engine that leaves no doubt."""

    def infer(self, tiles: np.ndarray) -> np.ndarray:
        return (tiles > 127).astype(np.float32)

    def describe(self) -> str:
        return "certain"


def test_certainty_is_a_finite_margin(averaging: ModuleType, model: Model) -> None:
    margins = averaging.engine_ask(Certain(), model.card)(noise((1, 8, 8))[0])
    np.testing.assert_allclose(np.abs(margins), 16, atol=0.2)


def test_only_annotated_voxels_count(averaging: ModuleType) -> None:
    images = noise((2, 8, 8))
    truth = (images >= 200).astype(np.uint8)
    wrong = truth.copy()
    wrong[0] = 1 - truth[0]
    ignored = np.where(np.arange(2)[:, None, None] == 0, IGNORED, wrong).astype(np.uint8)

    def ask(image: np.ndarray) -> np.ndarray:
        return (image.astype(np.float32) - 199.5) + np.float32(np.log(3))

    def iou(truth: np.ndarray) -> float:
        found: dict[str, Any] = averaging.score(Annotated(images, truth), ask, threshold=0.75, average="none")
        return float(found["iou"])

    assert (iou(truth), iou(ignored)) == (1, 1)
    assert iou(wrong) < 0.3


def test_another_average_is_refused(averaging: ModuleType) -> None:
    with pytest.raises(ConfigError, match="average is 'all'; choose none, flips, planes or both"):
        averaging.averaged_margins(noise((1, 4, 4)), lopsided, "all")


def test_the_command_scores_the_phantom(averaging: ModuleType, tmp_path: Path) -> None:
    images, truth = phantom_box(Box((0, 0, 0), (3, 96, 128)), 7)
    for name, stack in (("volume", images), ("truth", truth)):
        tifffile.imwrite(tmp_path / f"{name}.tif", stack, photometric="minisblack")
    arguments = [str(tmp_path / "volume.tif"), str(tmp_path / "truth.tif"), "--model", "phantom-2unet", "--threads", "1"]
    result = CliRunner().invoke(averaging.main, [*arguments, "--average", "none", "--average", "flips", "--json"])
    assert result.exit_code == 0, result.output
    plain, flipped = map(json.loads, result.output.splitlines())
    assert (plain["average"], flipped["average"], plain["model"]) == ("none", "flips", "phantom-2unet")
    model = Model.load("phantom-2unet")
    mask = segment_whole(images, create_engine("onnxruntime", model, n_threads=1), model.card) >= model.card.threshold
    want = (mask & (truth > 0)).sum() / (mask | (truth > 0)).sum()
    assert plain["iou"] == pytest.approx(want, abs=1e-3)
    assert flipped["iou"] > 0.6
    assert plain["sha256"] == model.sha256
    result = CliRunner().invoke(averaging.main, [*arguments, "--average", "none"])
    assert f"none     IoU {plain['iou']:.4f}" in result.output


def test_the_command_names_a_file_that_is_not_there(averaging: ModuleType) -> None:
    result = CliRunner().invoke(averaging.main, ["none.tif", "none.tif", "--model", "phantom-2unet"])
    assert result.exit_code == 1
    assert "there is no file none.tif" in result.output
