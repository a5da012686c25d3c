"""A student out of its ONNX file answers as before, with batch normalisation and without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from small_models import small_card, unet_onnx
from torch import nn

from kdunet.onnx_weights import network_of, with_batch_norm
from kdunet.unet import UNet, n_parameters
from kdunet_infer.card import METADATA_KEY
from kdunet_infer.engines import create_engine
from kdunet_infer.errors import TrainingError
from kdunet_infer.model import Model
from kdunet_infer.testing import noise


def answers(network: UNet, tiles: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return network(torch.from_numpy(tiles)[:, None].float()).softmax(1)[:, 1].numpy()


def runtime_answers(model: Model, tiles: np.ndarray) -> np.ndarray:
    return create_engine("onnxruntime", model, device="cpu", n_threads=1).infer(tiles)


def test_the_released_student_answers_as_onnxruntime() -> None:
    model, tiles = Model.load("mito-epfl-2unet"), noise((2, 96, 128))
    network = network_of(model)
    want = runtime_answers(model, tiles)
    assert np.ptp(want) > 0.1
    np.testing.assert_allclose(answers(network, tiles), want, atol=1e-6, rtol=0)
    assert (network.batch_norm, network.width, network.training) == ("none", 2, False)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_any_width_and_depth(levels: int) -> None:
    proto = unet_onnx(levels, 3, small_card(levels, halo=24))
    model = Model.from_bytes(proto.SerializeToString(), Path("unet.onnx"))
    network, tiles = network_of(model), noise((2, 24, 32))
    assert (network.width, network.n_levels) == (3, levels)
    np.testing.assert_allclose(answers(network, tiles), runtime_answers(model, tiles), atol=1e-5, rtol=0)


def test_another_graph_is_refused_in_one_sentence() -> None:
    image = helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, ["n", 1, "y", "x"])
    foreground = helper.make_tensor_value_info("foreground", onnx.TensorProto.FLOAT, ["n", 1, "y", "x"])
    node = helper.make_node("Cast", ["image"], ["foreground"], to=onnx.TensorProto.FLOAT)
    proto = helper.make_model(helper.make_graph([node], "cast", [image], [foreground]), ir_version=9)
    helper.set_model_props(proto, {METADATA_KEY: small_card(1).to_json()})
    model = Model.from_bytes(proto.SerializeToString(), Path("cast.onnx"))
    with pytest.raises(TrainingError, match=r"cast\.onnx cannot be trained further, .* no k-Unet as `kdunet export` writes"):
        network_of(model)


@pytest.fixture(scope="module")
def parent() -> UNet:
    return network_of(Model.load("mito-epfl-2unet"))


def test_batch_normalisation_changes_no_answer(parent: UNet) -> None:
    images, tiles = noise((2, 300, 272)), noise((1, 64, 96))
    network = with_batch_norm(parent, images)
    np.testing.assert_allclose(
        answers(network, tiles), answers(parent, tiles), atol=3e-6, rtol=0
    )  # float32 sums in another order
    assert (network.batch_norm, n_parameters(network), network.training) == ("both", 30_902, False)
    assert (float(network.mean), float(network.std)) == (float(parent.mean), float(parent.std))


def test_running_statistics_are_those_that_torch_measures(parent: UNet) -> None:
    images = noise((3, 64, 80))
    network = with_batch_norm(parent, images)
    found = {name: buffer.clone() for name, buffer in network.named_buffers()}
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average: of one batch, that batch's
            module.reset_running_stats()
    with torch.inference_mode():
        network.train()(torch.from_numpy(images)[:, None].float())
    for name, want in network.named_buffers():
        if "running" in name:
            torch.testing.assert_close(found[name], want, rtol=0.02, atol=1e-5)  # torch divides by n - 1, here 59


def test_a_channel_that_never_changes_keeps_its_value() -> None:
    torch.manual_seed(1)
    network = UNet(1, batch_norm="none", intensity=(100.0, 40.0)).eval()
    first = network.encoder[0][0]
    with torch.no_grad():
        first.weight.zero_()
        first.bias.fill_(2.0)
    images = noise((1, 32, 32))
    normalised = with_batch_norm(network, images)
    np.testing.assert_allclose(answers(normalised, images), answers(network, images), atol=1e-5, rtol=0)
    normalised.train()
    normalised(torch.from_numpy(images)[:, None].float()).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in normalised.parameters() if p.grad is not None)
