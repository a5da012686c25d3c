"""A student adapted to other images: from ONNX to ONNX, on a tiny synthetic volume."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_models import small_card, unet_onnx

import kdunet.finetune
from kdunet.before_after import PICTURES, Comparison, Score, best_cut, score
from kdunet.checkpoint import load_network
from kdunet.cli import main
from kdunet.config import RunConfig
from kdunet.data import Annotated
from kdunet.evaluate import slice_margin
from kdunet.export import Exported
from kdunet.finetune import COMPARISON_FILE, MODEL_FILE, START_FILE, Finetuned, finetune
from kdunet.finetune_config import FINETUNE
from kdunet.fit import FitResult
from kdunet.onnx_weights import network_of
from kdunet_infer.errors import TrainingError
from kdunet_infer.metrics import confusion
from kdunet_infer.model import Model


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """For networks this small a second thread costs more than it gives."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A 1-Unet of random weights."""
    card = dataclasses.replace(small_card(5, halo=96), provenance={"licence": "as you like", "recipe": {}})
    path = tmp_path_factory.mktemp("parent") / "parent.onnx"
    path.write_bytes(unet_onnx(5, 1, card).SerializeToString())
    return Model.load(path)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Dark discs on noise, 5 slices of 48 x 64, of which the first nobody annotated."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :64]
    labels = np.stack([(y - cy) ** 2 + (x - cx) ** 2 < 150 for cy, cx in rng.integers(16, 32, (5, 2))]).astype(np.uint8)
    images = np.clip(rng.normal(170, 20, labels.shape) - 90 * labels, 0, 255).astype(np.uint8)
    labels[0] = 9
    tifffile.imwrite(folder / "images.tif", images, photometric="minisblack")
    tifffile.imwrite(folder / "labels.tif", labels, photometric="minisblack")
    return FINETUNE.replaced(
        {
            "data.images": str(folder / "images.tif"),
            "data.labels": str(folder / "labels.tif"),
            "data.ignore": 9,
            "data.batch": 2,
            "data.workers": 0,
            "optim.steps": 4,
            "validate_every": 2,
            "accelerator": "cpu",
        }
    )


def no_export(monkeypatch: pytest.MonkeyPatch, parent: Model) -> list[dict[str, object]]:
    """Seconds saved: the parent's own graph stands for the child's. Returns what each export was told."""
    asked: list[dict[str, object]] = []

    def export_run(run: Path, out: Path, **told: object) -> Exported:
        asked.append(told)
        out.write_bytes(parent.onnx_bytes)
        return Exported(out, parent.card, parent.sha256, 0.0)

    card = dataclasses.replace(parent.card, provenance={"step": 0})
    child = dataclasses.replace(parent, card=card)
    monkeypatch.setattr(kdunet.finetune, "export_run", export_run)
    monkeypatch.setattr(kdunet.finetune, "Model", type("Loads", (), {"load": staticmethod(lambda path: child)}))
    return asked


def test_the_command_goes_from_onnx_to_onnx_and_goes_on(parent: Model, config: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "adapted"
    command = ["finetune", "--model", str(parent.path), "--images", config.data.images, "--labels", config.data.labels]
    command += ["--ignore", "9", "--steps", "2", "--accelerator", "cpu", "--voxel-size", "45", "4", "4", "--out", str(out)]
    stopped = CliRunner().invoke(main, [*command, "--max-minutes", "0"])
    assert (stopped.exit_code, stopped.output) == (0, "stopped at step 0 of 2; the same command goes on from there.\n")
    start = (out / START_FILE).read_bytes()
    finished = CliRunner().invoke(main, command)
    assert finished.exit_code == 0, finished.output
    assert (out / START_FILE).read_bytes() == start
    child = Model.load(out / MODEL_FILE)
    told = child.card.provenance
    assert (child.card.name, child.card.voxel_size_nm) == ("adapted", (45.0, 4.0, 4.0))
    assert (told["parent"], told["parent_sha256"], told["parent_licence"]) == ("small 1", parent.sha256, "as you like")
    assert (told["annotated_slices"], told["annotated_voxels"], told["held_out"]) == ("3", str(3 * 48 * 64), "slice 4")
    assert str(tmp_path) not in child.card.to_json()
    figures = json.loads((out / COMPARISON_FILE).read_text())
    assert figures["n_voxels"] == 48 * 64
    for picture in PICTURES:
        with Image.open(out / picture) as image:
            assert image.width > 64
    before, after = figures["before"], figures["after"]
    lines = finished.output.splitlines()
    assert lines[0] == f"held out: slice 4; 3,072 annotated voxels, {figures['foreground_fraction']:.1%} foreground"
    for line, what in zip(lines[2:6], [(before, "own"), (before, "best"), (after, "own"), (after, "best")], strict=True):
        scores, which = what
        iou = scores["iou_at_own" if which == "own" else "best_iou"]
        assert line.endswith(f"{scores[which + '_threshold']:.4f}  {iou:.4f}")
    assert lines[7].startswith(f"wrote {out / MODEL_FILE}; segment with")


def test_what_began_is_the_parent(parent: Model, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = no_export(monkeypatch, parent)
    result = finetune(parent, config, tmp_path / "out")
    assert isinstance(result, Finetuned)
    network, about = load_network(tmp_path / "out" / START_FILE)
    assert (network.batch_norm, about["parent"]) == ("both", "small 1")
    images = torch.randint(0, 256, (1, 1, 32, 32)).float()
    with torch.inference_mode():
        torch.testing.assert_close(network(images), network_of(parent)(images), atol=1e-3, rtol=1e-3)
    comparison = result.comparison
    assert comparison.before == comparison.after  # the same graph stood for both
    assert not comparison.is_worse
    assert finetune(parent, config, tmp_path / "out") == result  # only exports and measures
    assert len(asked) == 2


def test_other_requests_for_the_same_folder_are_refused(
    parent: Model, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_export(monkeypatch, parent)
    out = tmp_path / "out"
    assert isinstance(finetune(parent, config, out, max_minutes=0), FitResult)
    other = dataclasses.replace(parent, sha256="0" * 64)
    with pytest.raises(TrainingError, match=r"another choice of parent \(small 1\); give another --out"):
        finetune(other, config, out)
    with pytest.raises(TrainingError, match="another choice of slices or labels; give another --out"):
        finetune(parent, config.replaced({"data.validation_slices": (3, 5)}), out)
    with pytest.raises(TrainingError, match=r"another configuration \(optim.steps: 4 -> 5\)"):
        finetune(parent, config.replaced({"optim.steps": 5}), out)
    finetune(parent, config, out)
    with pytest.raises(TrainingError, match=r"finished run with another configuration \(seed: 0 -> 1\)"):
        finetune(parent, config.replaced({"seed": 1}), out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(TrainingError, match="full exists and holds no fine-tuning; give another --out"):
        finetune(parent, config, tmp_path / "full")


def test_a_parent_of_other_depth_is_refused(model: Model, config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="small 1 has 2 levels; training takes networks of 5"):
        finetune(model, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"--model": "nobody"}, "no model is called 'nobody' and no file is there"),
        ({"--labels": "flat.tif"}, r"shape \(5, 48, 64\) and .*flat.tif \(1, 48, 64\); give labels of the same slices"),
        ({"--ignore": "7"}, "holds the values 1, 9 beside 0, so it is not binary"),
        ({"--foreground": "5"}, "no annotated voxel is foreground"),
    ],
)
def test_bad_requests_get_one_sentence(
    parent: Model, config: RunConfig, tmp_path: Path, changed: dict[str, str], says: str
) -> None:
    flat = tmp_path / "flat.tif"
    tifffile.imwrite(flat, np.ones((48, 64), np.uint8))
    options = {"--model": str(parent.path), "--images": config.data.images, "--labels": config.data.labels, "--ignore": "9"}
    options |= {"--out": str(tmp_path / "out")} | {key: value.replace("flat.tif", str(flat)) for key, value in changed.items()}
    result = CliRunner().invoke(main, ["finetune", *(part for option in options.items() for part in option)])
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert re.search(says, result.output)
    assert not (tmp_path / "out").exists()


def compared(before: float, after: float, step: int = 100) -> Comparison:
    def at(iou: float) -> Score:
        return Score(own_threshold=0.5, iou_at_own=iou / 2, best_threshold=0.25, best_iou=iou)

    return Comparison(
        parent="mito 1.0",
        held_out="slice 3",
        n_voxels=1234567,
        foreground_fraction=0.0625,
        step=step,
        before=at(before),
        after=at(after),
    )


def test_a_fall_is_told_plainly_with_both_figures() -> None:
    lines = str(compared(0.7, 0.6)).splitlines()
    assert lines[0] == "held out: slice 3; 1,234,567 annotated voxels, 6.2% foreground"
    assert lines[2] == "before, at its own threshold      0.5000  0.3500"
    assert lines[5] == "after, at its best threshold      0.2500  0.6000"
    assert lines[6] == (
        "fine-tuning made it worse (from 0.7000 to 0.6000 at the best thresholds): "
        "go on with mito 1.0, or annotate more slices."
    )
    assert compared(0.7, 0.6).is_worse


def test_what_did_not_help_and_what_did() -> None:
    assert str(compared(0.7, 0.8)).endswith("fine-tuning helped (from 0.7000 to 0.8000 at the best thresholds).")
    assert compared(0.7, 0.7, step=0).verdict.startswith("no step was better than mito 1.0 as it came, so its network was kept")


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=30).filter(lambda v: any(t for _, t in v)))
def test_best_cut_is_the_best_of_all(voxels: list[tuple[int, bool]]) -> None:
    probability = np.array([p / 8 for p, _ in voxels], np.float32)
    truth = np.array([t for _, t in voxels])
    threshold, iou = best_cut(probability, truth)
    assert iou == pytest.approx(max(confusion(probability >= p, truth).iou for p in np.unique(probability)))
    assert iou == pytest.approx(confusion(probability >= threshold, truth).iou)


def test_scores_leave_out_what_nobody_annotated(parent: Model) -> None:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (2, 32, 48), np.uint8)
    truth = rng.integers(0, 3, images.shape, np.uint8)
    network = network_of(parent)
    got = score(network, Annotated(images, truth), 0.5)
    margins = np.stack([slice_margin(network, image, device=torch.device("cpu")) for image in images])
    found, true = margins[truth != 2] >= 0, truth[truth != 2] == 1
    assert got.iou_at_own == pytest.approx((found & true).sum() / (found | true).sum())
    assert 0 < got.iou_at_own <= got.best_iou < 1


def test_the_comparisons_table_is_of_runs_that_are_alike(tmp_path: Path) -> None:
    tool = Path(__file__).resolve().parents[1] / "tools" / "finetune_vnc.py"
    spec = importlib.util.spec_from_file_location("finetune_vnc", tool)
    assert spec is not None
    assert spec.loader is not None
    vnc = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vnc)
    results = tmp_path / "docs" / "finetune.jsonl"
    assert vnc.read_lines(results) == []

    def add(arm: str, iou: float, **told: int) -> None:
        vnc.add_line(results, arm, Score(own_threshold=0.5, iou_at_own=0.1, best_threshold=0.2, best_iou=iou), told)

    add("unchanged", 0.3, n_slices=0, seed=0, steps=0)
    for seed, iou in enumerate((0.7, 0.8, 0.9)):
        add("fine-tuned", iou, n_slices=3, seed=seed, steps=500)
    add("from scratch", 0.6, n_slices=3, seed=0, steps=500)
    add("fine-tuned", 0.1, n_slices=3, seed=0, steps=2)
    assert vnc.table(vnc.read_lines(results), 500).splitlines()[2:] == [
        "| none | 0.300 (0.100 at its own threshold) | |",
        "| 3 | 0.800 ± 0.100 (n = 3) | 0.600 |",
    ]
    data = tmp_path / "data"
    data.mkdir()
    tifffile.imwrite(data / "mitochondria.tif", np.zeros((14, 8, 8), np.uint8), photometric="minisblack")
    written = tifffile.imread(vnc.write_labels(data, tmp_path, 3))
    assert [z for z in range(14) if not written[z].any()] == [0, 4, 7, 10, 11, 12, 13]
