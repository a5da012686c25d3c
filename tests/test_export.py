"""What is exported is what was trained: interface, parity, bytes, and no file where parity fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import tifffile
import torch

import kdunet.export
from kdunet.checkpoint import NETWORK_FILE, save_network
from kdunet.config import DataConfig, RunConfig
from kdunet.export import AS_STORED, MAX_DIFFERENCE, export_network, export_run, folded, grey_shares, onnx_graph
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


def test_card_tells_the_grey_values_of_the_training_slab_alone(network: UNet, tmp_path: Path) -> None:
    images = np.concatenate([noise((4, 48, 64)) // 2, np.full((2, 48, 64), 255, np.uint8)])
    for name, stack in (("images", images), ("labels", np.eye(48, 64, dtype=np.uint8)[None].repeat(6, axis=0))):
        tifffile.imwrite(tmp_path / f"{name}.tif", stack, photometric="minisblack")
    data = DataConfig(
        images=str(tmp_path / "images.tif"),
        labels=str(tmp_path / "labels.tif"),
        train_slices=(0, 4),
        validation_slices=(4, 6),
    )
    (tmp_path / CONFIG_FILE).write_text(RunConfig(width=1, data=data).to_toml())
    about = {"validation": {"threshold": 0.5, "iou": 0.8}, "step": 1, "foreground_fraction": 0.1}
    save_network(tmp_path / NETWORK_FILE, network, about)
    exported = export_run(tmp_path, tmp_path / "student.onnx", voxel_size_nm=(50.0, 4.0, 4.0))
    card = Model.load(exported.path).card
    want, _ = np.histogram(images[:4], bins=np.arange(257), density=True)
    np.testing.assert_allclose(card.grey_histogram, want, rtol=1e-5)
    assert card.grey_preparation == AS_STORED
    assert card.voxel_size_nm == (50.0, 4.0, 4.0)


def test_shares_are_rounded_to_six_digits() -> None:
    shares = grey_shares(np.array([[[0, 0, 255]]], np.uint8))
    assert (shares[0], shares[255], sum(shares[1:255])) == (0.666667, 0.333333, 0.0)
