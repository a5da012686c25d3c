"""U-Nets of random weights as ONNX bytes, small enough to run whole slices through in milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kdunet_infer.card import METADATA_KEY, ModelCard
from kdunet_infer.model import Model

UNET_HALO = {1: 2, 2: 10}
"""Levels -> halo in voxels, derived by hand. One level: two 3x3 convolutions reach 2. Two levels, output voxel x: the decoder
reaches x - 2; that is voxel floor((x - 2) / 2) of the lower level, where two convolutions reach 2 further, to a pooled pair
whose left voxel is twice that; two convolutions more. For odd x: 2 * ((x - 3) / 2 - 2) - 2 = x - 9; to the right, for even x,
x + 9. Rounded up to the stride of 2: 10."""


def small_model(levels: int = 2, width: int = 2) -> Model:
    """A checked U-Net of `levels`, stride 2^(levels - 1)."""
    return Model.from_bytes(unet_onnx(levels, width).SerializeToString(), Path(f"unet-{levels}-{width}.onnx"))


def small_card(levels: int, halo: int | None = None) -> ModelCard:
    """The card of such a U-Net; for more than two levels give a halo."""
    stride = 2 ** (levels - 1)
    halo = UNET_HALO[levels] if halo is None else halo
    return ModelCard(name="small", version="1", stride_zyx=(1, stride, stride), halo_zyx=(0, halo, halo), threshold=0.5)


def unet_onnx(levels: int, width: int, card: ModelCard | None = None, *, seed: int = 7) -> onnx.ModelProto:
    """Image uint8 (n, 1, y, x) -> foreground float32 (n, 1, y, x); zero padding, max-pooling, transposed convolutions."""
    net = _Net(seed)
    net.add("Cast", ["image"], "scaled", to=TensorProto.FLOAT)
    net.add("Sub", ["scaled", net.weight(np.float32(128))], "centred")
    net.add("Div", ["centred", net.weight(np.float32(64))], "normalised")
    features = net.level("normalised", 1, width, levels)
    net.add("Sigmoid", [net.conv(features, width, 1, size=1)], "foreground")
    proto = helper.make_model(
        helper.make_graph(
            net.nodes,
            "unet",
            [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 1, "y", "x"])],
            [helper.make_tensor_value_info("foreground", TensorProto.FLOAT, ["n", 1, "y", "x"])],
            net.weights,
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    helper.set_model_props(proto, {METADATA_KEY: (card or small_card(levels)).to_json()})
    return proto


class _Net:
    """Nodes and weights of a graph in the making; every method returns the name of its output."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(seed)

    def add(self, op: str, inputs: list[str], output: str = "", **attributes: object) -> str:
        output = output or f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def weight(self, values: np.ndarray | np.float32) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values, np.float32), f"w{len(self.weights)}"))
        return self.weights[-1].name

    def conv(self, x: str, n_in: int, n_out: int, size: int = 3) -> str:
        kernel = self._rng.normal(0, np.sqrt(2 / (n_in * size**2)), (n_out, n_in, size, size))
        inputs = [x, self.weight(kernel), self.weight(self._rng.normal(0, 0.3, n_out))]
        return self.add("Conv", inputs, kernel_shape=[size, size], pads=[size // 2] * 4)

    def double_conv(self, x: str, n_in: int, n_out: int) -> str:
        first = self.add("Relu", [self.conv(x, n_in, n_out)])
        return self.add("Relu", [self.conv(first, n_out, n_out)])

    def level(self, x: str, n_in: int, width: int, levels: int) -> str:
        skip = self.double_conv(x, n_in, width)
        if levels == 1:
            return skip
        pooled = self.add("MaxPool", [skip], kernel_shape=[2, 2], strides=[2, 2])
        below = self.level(pooled, width, 2 * width, levels - 1)
        kernel = self._rng.normal(0, np.sqrt(1 / width), (2 * width, width, 2, 2))
        up = self.add("ConvTranspose", [below, self.weight(kernel)], kernel_shape=[2, 2], strides=[2, 2])
        return self.double_conv(self.add("Concat", [skip, up], axis=1), 2 * width, width)
