"""What is exported is what was trained: interface, parity, bytes, and no file where parity fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tifffile
import torch
from scipy.special import expit, logit

import kdunet.export
from kdunet.calibration import Calibration
from kdunet.checkpoint import NETWORK_FILE, save_network
from kdunet.config import DataConfig, RunConfig
from kdunet.evaluate import slice_margin
from kdunet.export import (
    AS_STORED,
    AS_TRAINED,
    CALIBRATED,
    MAX_DIFFERENCE,
    Exported,
    calibrated_card,
    export_network,
    export_run,
    folded,
    grey_shares,
    onnx_graph,
)
from kdunet.fit import CONFIG_FILE
from kdunet.unet import UNet, halo
from kdunet_infer.card import ModelCard
from kdunet_infer.engines import create_engine
from kdunet_infer.errors import TrainingError
from kdunet_infer.model import Model
from kdunet_infer.testing import EngineContract, noise, segment_whole

CARD = ModelCard(name="tiny", version="1.0", stride_zyx=(1, 16, 16), halo_zyx=(0, 96, 96), threshold=0.5, n_parameters=7878)


@pytest.fixture(scope="module")
def network() -> UNet:
    """A 1-Unet whose batch normalisation has something to fold."""
    torch.manual_seed(0)
    network = UNet(1, intensity=(120.0, 50.0))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, 0.0, 1.0)  # or ReLU may leave nothing of a network this thin
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    with torch.no_grad():
        network.head.weight.mul_(0.1)  # probabilities well within 0 and 1, where they can differ
    return network.eval()


@pytest.fixture(scope="module")
def onnx_bytes(network: UNet) -> bytes:
    return onnx_graph(network, CARD)


@pytest.fixture(scope="module")
def model(onnx_bytes: bytes) -> Model:
    return Model.from_bytes(onnx_bytes, Path("tiny.onnx"))


def test_interface_is_that_of_the_design(onnx_bytes: bytes) -> None:
    proto = onnx.load_model_from_string(onnx_bytes)
    onnx.checker.check_model(proto, full_check=True)
    (image,), (foreground,) = proto.graph.input, proto.graph.output
    for value, name, kind in ((image, "image", onnx.TensorProto.UINT8), (foreground, "foreground", onnx.TensorProto.FLOAT)):
        tensor = value.type.tensor_type
        assert (value.name, tensor.elem_type) == (name, kind)
        assert [dim.dim_param or dim.dim_value for dim in tensor.shape.dim] == ["n", 1, "y", "x"]
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    assert Model.from_bytes(onnx_bytes, Path("tiny.onnx")).card == CARD


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 48, 32), (2, 16, 176)])
def test_any_size_on_the_grid_agrees_with_pytorch(network: UNet, model: Model, shape: tuple[int, int, int]) -> None:
    tiles = noise(shape)
    got = create_engine("onnxruntime", model, n_threads=1).infer(tiles)
    with torch.inference_mode():
        want = network(torch.from_numpy(tiles)[:, None].float()).softmax(1)[:, 1].numpy()
    assert np.ptp(want) > 0.01  # or the comparison would say nothing
    np.testing.assert_allclose(got, want, atol=MAX_DIFFERENCE, rtol=0)


def test_the_bytes_are_the_same_each_time_and_tell_no_folder(network: UNet, onnx_bytes: bytes) -> None:
    assert onnx_graph(network, CARD) == onnx_bytes
    for trace in (str(Path.cwd()), str(Path(kdunet.export.__file__).parent), "site-packages", ".py"):
        assert trace.encode() not in onnx_bytes


def test_folding_changes_no_answer_and_leaves_the_network_alone(network: UNet) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    image = torch.rand(1, 1, 32, 32) * 255
    with torch.inference_mode():
        torch.testing.assert_close(folded(network)(image), network(image), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_file_appears_only_after_parity(network: UNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crops = noise((2, 32, 48))
    exported = export_network(network, CARD, tmp_path / "good.onnx", crops=crops)
    assert exported.max_difference <= MAX_DIFFERENCE
    assert Model.load(tmp_path / "good.onnx").sha256 == exported.sha256
    other = UNet(1, intensity=(120.0, 50.0)).eval()
    wrong = onnx_graph(other, CARD)
    monkeypatch.setattr(kdunet.export, "onnx_graph", lambda network, card: wrong)
    with pytest.raises(TrainingError, match=r"differs from PyTorch by .* so .*bad.onnx was not written"):
        export_network(network, CARD, tmp_path / "bad.onnx", crops=crops)
    assert [path.name for path in tmp_path.iterdir()] == ["good.onnx"]


def test_the_cards_halo_is_enough_and_one_step_less_is_not(model: Model) -> None:
    engine = create_engine("onnxruntime", model, n_threads=1)
    image = noise((1, 256, 320))
    whole = segment_whole(image, engine, model.card)
    margin = halo()
    errors = []
    for context in (margin, margin - 16):
        core = slice(128, 144)
        read = slice(128 - context, 144 + context)
        tile = np.ascontiguousarray(image[:, read, read])
        found = engine.infer(tile)[:, context : context + 16, context : context + 16]
        errors.append(float(np.abs(found - whole[:, core, core]).max()))
    assert errors[0] <= 1e-6
    assert errors[1] > 1e-6


class TestExportedStudent(EngineContract):
    """The contract of engines, on a real student."""

    def make(self, model: Model) -> object:
        return create_engine("onnxruntime", model, device="cpu", n_threads=1)


GREY = np.concatenate([noise((4, 48, 64)) // 2, np.full((1, 48, 64), 255, np.uint8), noise((1, 48, 64))])


@pytest.fixture(scope="module")
def run(network: UNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, with labels drawn so that not the network's margin m but m / 2 + 1 is the log odds of foreground."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    margins = np.stack([slice_margin(network, image, device=torch.device("cpu")) for image in GREY])
    labels = (rng.random(margins.shape) < 1 / (1 + np.exp(-0.5 * margins - 1))).astype(np.uint8)
    labels[:4] = 1 - labels[:4]  # of the training slices something else
    for name, stack in (("images", GREY), ("labels", labels)):
        tifffile.imwrite(folder / f"{name}.tif", stack, photometric="minisblack")
    data = DataConfig(
        images=str(folder / "images.tif"),
        labels=str(folder / "labels.tif"),
        train_slices=(0, 4),
        validation_slices=(4, 6),
    )
    config = RunConfig(width=1, data=data, teachers=("/a/teacher",), start="/b/start")
    (folder / CONFIG_FILE).write_text(config.to_toml())
    threshold = float(np.floor(256 / (1 + np.exp(-np.median(margins[5])))) / 256)  # cuts the noise in two halves
    about = {"validation": {"threshold": threshold, "iou": 0.8}, "step": 1, "foreground_fraction": 0.1}
    save_network(folder / NETWORK_FILE, network, about)
    return folder


@pytest.fixture(scope="module")
def both(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Exported, Exported]:
    """The run exported with and without calibration."""
    out = tmp_path_factory.mktemp("both")
    voxel_size_nm = (50.0, 4.0, 4.0)
    return (
        export_run(run, out / "calibrated.onnx", voxel_size_nm=voxel_size_nm),
        export_run(run, out / "plain.onnx", voxel_size_nm=voxel_size_nm, calibration=False),
    )


def test_card_tells_the_grey_values_of_the_training_slab_alone(both: tuple[Exported, Exported]) -> None:
    card = Model.load(both[0].path).card
    want, _ = np.histogram(GREY[:4], bins=np.arange(257), density=True)
    np.testing.assert_allclose(card.grey_histogram, want, rtol=1e-5)
    assert card.grey_preparation == AS_STORED
    assert card.voxel_size_nm == (50.0, 4.0, 4.0)


def test_card_tells_the_recipe_and_no_folder(both: tuple[Exported, Exported]) -> None:
    recipe = Model.load(both[0].path).card.provenance["recipe"]
    assert (recipe["teachers"], recipe["start"], recipe["data"]["images"]) == (["teacher"], "start", "images.tif")
    assert (recipe["data"]["bank"], recipe["unseen"]["labels"]) == ("", "")


def test_calibration_moves_probabilities_and_no_mask(both: tuple[Exported, Exported]) -> None:
    models = [Model.load(exported.path) for exported in both]
    tiles = noise((4, 96, 128), seed=3)
    p, plain = (create_engine("onnxruntime", model, n_threads=1).infer(tiles) for model in models)
    scale, offset = (models[0].card.provenance["calibration"][name] for name in ("scale", "offset"))
    assert abs(scale - 0.5) < 0.2
    assert abs(offset - 1) < 0.3
    np.testing.assert_allclose(p, expit(scale * logit(plain.astype(np.float64)) + offset), atol=MAX_DIFFERENCE)
    masks = [answer >= np.float32(model.card.threshold) for answer, model in zip((p, plain), models, strict=True)]
    assert 0.2 < masks[0].mean() < 0.8
    near = np.abs(plain - models[1].card.threshold) < 1e-6  # float32 may round either way
    np.testing.assert_array_equal(masks[0][~near], masks[1][~near])
    assert near.mean() < 1e-3
    assert models[0].card.threshold != models[1].card.threshold


def test_card_says_what_the_probabilities_mean(both: tuple[Exported, Exported]) -> None:
    told, plain = (Model.load(exported.path).card.provenance for exported in both)
    assert told["probabilities"] == CALIBRATED
    assert set(told["calibration"]) == {
        "scale", "offset", "ece_before", "ece_after", "nll_before", "nll_after", "threshold_before", "on",
    }  # fmt: skip
    assert told["calibration"]["on"] == "validation slices"
    assert told["calibration"]["ece_after"] < told["calibration"]["ece_before"]
    assert told["calibration"]["threshold_before"] == Model.load(both[1].path).card.threshold
    assert (plain["probabilities"], "calibration" in plain, both[1].calibration) == (AS_TRAINED, False, None)


def test_card_says_where_calibration_did_not_work() -> None:
    odd = Calibration(4.0, 1.0, 0.1, 0.1, 0.2, 0.2, remark="the best scale is 9; 4 is the limit")
    assert calibrated_card(CARD, odd).provenance["probabilities"] == "not well calibrated: the best scale is 9; 4 is the limit"


def test_parity_is_that_of_the_calibrated_network(
    run: Path, both: tuple[Exported, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A calibration that reaches PyTorch and not the graph is found out."""
    plain = both[1].path.read_bytes()
    monkeypatch.setattr(kdunet.export, "onnx_graph", lambda network, card: plain)
    with pytest.raises(TrainingError, match="differs from PyTorch"):
        export_run(run, tmp_path / "bad.onnx")


def test_shares_are_rounded_to_six_digits() -> None:
    shares = grey_shares(np.array([[[0, 0, 255]]], np.uint8))
    assert (shares[0], shares[255], sum(shares[1:255])) == (0.666667, 0.333333, 0.0)
