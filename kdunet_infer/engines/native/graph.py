"""An ONNX graph -> the layers of a k-Unet and their parameters; any other graph is refused. Knows no kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kdunet_infer.engines.native.schedule import Kind, Layer, unet_layers
from kdunet_infer.errors import UnsupportedModel
from kdunet_infer.model import INPUT_NAME, OUTPUT_NAME, Model

if TYPE_CHECKING:
    from onnx import NodeProto

Float32Array = npt.NDArray[np.float32]

_FIXED: Mapping[str, Mapping[str, Any]] = {
    "Conv": {"group": 1, "strides": [1, 1], "dilations": [1, 1], "auto_pad": b"NOTSET"},
    "MaxPool": {"kernel_shape": [2, 2], "strides": [2, 2], "dilations": [1, 1], "pads": [0] * 4, "ceil_mode": 0},
    "ConvTranspose": {
        "group": 1,
        "kernel_shape": [2, 2],
        "strides": [2, 2],
        "dilations": [1, 1],
        "pads": [0] * 4,
        "output_padding": [0, 0],
    },
    "Concat": {"axis": 1},
}
"""What an attribute must be; kernels know nothing else."""
_LEFT_OUT = {"strides": [1, 1]}
"""What ONNX takes for an attribute that is left out, where that is not what we need."""


@dataclass(frozen=True, slots=True)
class Network:
    """A k-Unet: its layers, and for each its parameters."""

    layers: tuple[Layer, ...]
    parameters: tuple[tuple[Float32Array, ...], ...]
    """(mean, deviation) of NORMALISE, (weights, biases) of the layers that have some, () of the others."""


def read_network(model: Model) -> Network:
    """The network of a checked model. Raises UnsupportedModel where it is no k-Unet as `kdunet export` writes them."""
    import onnx

    graph = _Graph(onnx.load_model_from_string(model.onnx_bytes).graph, model)
    mean, deviation = graph.normalisation()
    parameters: list[tuple[Float32Array, ...]] = [(mean, deviation)]
    skips: list[str] = []
    while True:
        parameters += graph.double_convolution()
        skips.append(graph.value)
        if not graph.goes_on_with("MaxPool"):
            break
        graph.step("MaxPool")
        parameters.append(())
    for skip in reversed(skips[:-1]):
        parameters.append(graph.weighted("ConvTranspose", size=2))
        graph.step("Concat", [skip, graph.value])
        parameters += graph.double_convolution()
    parameters.append(graph.weighted("Conv", size=1))
    graph.step("Sigmoid")
    if graph.value != OUTPUT_NAME:
        raise graph.refusal(f"its output {OUTPUT_NAME!r} is not the logistic function of the last layer")
    stride, told = 1 << (len(skips) - 1), model.card.stride_zyx[1:]
    if any(own % stride for own in told):
        raise graph.refusal(f"{len(skips)} levels need a stride of {stride}, and the card says {told}")
    layers = unet_layers(parameters[1][0].shape[0], len(skips))
    _check_shapes(graph, layers, parameters)
    return Network(layers, tuple(parameters))


class _Graph:
    """A walk along a graph from the image to the probability; `value` is the name of where it stands."""

    def __init__(self, graph: Any, model: Model) -> None:
        from onnx import numpy_helper

        self._model = model
        self._readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.value = INPUT_NAME

    def refusal(self, why: str) -> UnsupportedModel:
        """The error to raise."""
        return UnsupportedModel(
            f"engine 'native' runs k-Unets as `kdunet export` writes them, and in {self._model.path} {why}; "
            "use --engine onnxruntime."
        )

    def goes_on_with(self, kind: str) -> bool:
        """Whether a node of this kind reads the value."""
        return any(node.op_type == kind for node in self._readers.get(self.value, []))

    def step(self, kind: str, inputs: list[str] | None = None) -> NodeProto:
        """Go on through the one node of this kind that reads the value, whose first inputs are `inputs`."""
        found = [node for node in self._readers.get(self.value, []) if node.op_type == kind]
        wanted = [self.value] if inputs is None else inputs
        if len(found) != 1 or list(found[0].input[: len(wanted)]) != wanted:
            raise self.refusal(f"{self.value!r} is not followed by one {kind} of {', '.join(wanted)}")
        (node,) = found
        self._check_attributes(node)
        self.value = node.output[0]
        return node

    def normalisation(self) -> tuple[Float32Array, Float32Array]:
        """Mean and deviation."""
        self.step("Cast")
        found = [self._weight(self.step(kind), 1) for kind in ("Sub", "Div")]
        if any(constant.size != 1 for constant in found):
            raise self.refusal(f"mean and deviation have the shapes {found[0].shape} and {found[1].shape}")
        return found[0].reshape(1), found[1].reshape(1)

    def double_convolution(self) -> list[tuple[Float32Array, ...]]:
        """Weights and biases of two convolutions, each with its ReLU."""
        found = []
        for _ in range(2):
            found.append(self.weighted("Conv", size=3))
            self.step("Relu")
        return found

    def weighted(self, kind: str, *, size: int) -> tuple[Float32Array, ...]:
        """Weights and biases of a convolution of `size` x `size`."""
        node = self.step(kind)
        weights = self._weight(node, 1)
        if len(node.input) > 2:
            biases = self._weight(node, 2)
        else:  # the exporter leaves zeros out
            biases = np.zeros(weights.shape[1 if kind == "ConvTranspose" else 0], np.float32)
        pads = self._attributes(node).get("pads", [0] * 4)
        if weights.shape[2:] != (size, size) or (kind == "Conv" and pads != [size // 2] * 4):
            raise self.refusal(f"{node.output[0]!r} is a {kind} of {weights.shape[2:]} with the padding {pads}")
        return weights, biases

    def _weight(self, node: NodeProto, place: int) -> Float32Array:
        name = node.input[place] if len(node.input) > place else ""
        found = self._weights.get(name)
        if found is None or found.dtype != np.float32:
            raise self.refusal(f"{node.output[0]!r} has no float32 weights of its own as input {place}")
        if not np.isfinite(found).all():
            raise self.refusal(f"{name!r} holds NaN or infinity")
        return found

    def _check_attributes(self, node: NodeProto) -> None:
        found = self._attributes(node)
        for name, wanted in _FIXED.get(node.op_type, {}).items():
            there = found.get(name, _LEFT_OUT.get(name, wanted))
            if there != wanted:
                raise self.refusal(f"{node.output[0]!r} is a {node.op_type} whose {name} is {there}")

    @staticmethod
    def _attributes(node: NodeProto) -> Mapping[str, Any]:
        from onnx.helper import get_attribute_value

        return {attribute.name: _plain(get_attribute_value(attribute)) for attribute in node.attribute}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _check_shapes(graph: _Graph, layers: tuple[Layer, ...], parameters: list[tuple[Float32Array, ...]]) -> None:
    for layer, own in zip(layers, parameters, strict=True):
        if layer.kind in (Kind.NORMALISE, Kind.POOL):
            continue
        n_in = sum(layers[i].n_channels for i in layer.inputs)
        channels = (n_in, layer.n_channels) if layer.kind is Kind.UPSAMPLE else (layer.n_channels, n_in)
        if own[0].shape[:2] != channels or own[1].shape != (layer.n_channels,):
            raise graph.refusal(f"weights of shape {own[0].shape} stand where a k-Unet has {channels}")
