"""A released student -> a network that can learn again: weights out of the ONNX graph, batch normalisation put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdunet.unet import DoubleConv, UNet
from kdunet_infer.engines.native.graph import Network, read_network
from kdunet_infer.engines.native.schedule import Kind
from kdunet_infer.errors import TrainingError, UnsupportedModel
from kdunet_infer.model import Model

MEASURED_SIDE = 256
"""Pixels of the tiles on which statistics are measured: those of a training crop, whose zero padding they then share."""


def network_of(model: Model) -> UNet:
    """The network of a student, in evaluation mode: its foreground probability is the graph's but for float32 rounding.

    It has no batch normalisation, for the export folded it into the convolutions. The graph ends in one map of margins m, this
    network in the logits (0, m). Raises TrainingError for a graph that is no k-Unet as `kdunet export` writes them.
    """
    try:
        graph = read_network(model)
    except UnsupportedModel as exc:
        raise TrainingError(
            f"{model.path} cannot be trained further, for its graph is no k-Unet as `kdunet export` writes them; "
            "give a student that was exported with it."
        ) from exc
    (mean,), (deviation,) = graph.parameters[0]
    network = UNet(graph.layers[1].n_channels, n_levels=_n_levels(graph), intensity=(mean, deviation), batch_norm="none")
    weighted = (own for layer, own in zip(graph.layers, graph.parameters, strict=True) if own and layer.kind != Kind.NORMALISE)
    with torch.no_grad():
        for module, (weights, biases) in zip(_in_order(network), weighted, strict=True):
            for parameter, values in ((module.weight, weights), (module.bias, biases)):
                assert parameter is not None
                parameter.zero_()[-len(values) :] = torch.tensor(values)  # of the head's two maps the second alone
    return network.eval()


def with_batch_norm(network: UNet, images: npt.NDArray[np.uint8]) -> UNet:
    """The same function with batch normalisation after every 3x3 convolution, in evaluation mode.

    network: one without batch normalisation, as `network_of` returns. images: (z, y, x) uint8, y and x at least the network's
    stride. Running statistics are those of the convolutions' answers to these images; scale and shift undo them, so that
    nothing changes but for rounding until something is learned. A channel that never changes keeps its value: its variance is
    0, its scale the root of the normalisation's epsilon.
    """
    assert network.batch_norm == "none", "what is normalised twice is another function"
    statistics = _statistics(network, images)
    copied = UNet(network.width, n_levels=network.n_levels, batch_norm="both")
    copied.load_state_dict(network.state_dict(), strict=False)
    for name, normalisation in _normalised(copied):
        mean, variance = statistics[name]
        assert normalisation.running_mean is not None
        assert normalisation.running_var is not None
        with torch.no_grad():
            normalisation.running_mean.copy_(mean)
            normalisation.running_var.copy_(variance)
            normalisation.weight.copy_((variance + normalisation.eps).sqrt())
            normalisation.bias.copy_(mean)
    return copied.eval()


def _n_levels(graph: Network) -> int:
    return 1 + sum(layer.kind == Kind.POOL for layer in graph.layers)


def _in_order(network: UNet) -> Iterator[nn.Conv2d | nn.ConvTranspose2d]:
    """The modules with weights in order of evaluation, which is the order of the graph's layers."""
    blocks = [*network.encoder, *(part for pair in zip(network.up, network.decoder, strict=True) for part in pair)]
    for module in (*blocks, network.head):
        yield from (part for part in module.modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d))


def _normalised(network: UNet) -> Iterator[tuple[str, nn.BatchNorm2d]]:
    """The normalisations, each with the name of the convolution before it."""
    for name, block in network.named_modules():
        if isinstance(block, DoubleConv):
            for index in (0, 3):
                normalisation = block[index + 1]
                assert isinstance(normalisation, nn.BatchNorm2d)
                yield f"{name}.{index}", normalisation


def _statistics(network: UNet, images: npt.NDArray[np.uint8]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance (float64, one value a channel) of what each 3x3 convolution answers, by its name.

    One pass is enough for all: what a normalisation that changes nothing would pass on is what the convolution gave.
    """
    sums = {
        f"{name}.{index}": torch.zeros(3, part.out_channels, dtype=torch.float64)  # n, sum, sum of squares
        for name, block in network.named_modules()
        if isinstance(block, DoubleConv)
        for index, part in enumerate(block)
        if isinstance(part, nn.Conv2d)
    }

    def counted(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def count(_: nn.Module, __: tuple[Tensor, ...], answer: Tensor) -> None:
            values = answer.double().transpose(0, 1).flatten(1)  # (channels, n y x)
            total.add_(torch.stack([torch.full_like(values[:, 0], values.shape[1]), values.sum(1), values.square().sum(1)]))

        return count

    hooks = [network.get_submodule(name).register_forward_hook(counted(total)) for name, total in sums.items()]
    try:
        with torch.inference_mode():
            for tile in _tiles(images, network.stride):
                network(torch.from_numpy(tile)[:, None].float())
    finally:
        for hook in hooks:
            hook.remove()
    moments = {name: total[1:] / total[0] for name, total in sums.items()}
    return {name: (first, (second - first.square()).clamp(min=0)) for name, (first, second) in moments.items()}


def _tiles(images: npt.NDArray[np.uint8], stride: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Tiles (1, y, x) on the stride's grid that cover the slices but for a rest at the far sides."""
    height, width = (size // stride * stride for size in images.shape[1:])
    for image in images:
        for y in range(0, height, MEASURED_SIDE):
            for x in range(0, width, MEASURED_SIDE):
                yield image[None, y : min(y + MEASURED_SIDE, height), x : min(x + MEASURED_SIDE, width)]
