"""What tools/bench.py compares: networks of every width, and ways to run them, each with the work it does."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdunet.checkpoint import load_network
from kdunet.export import onnx_graph
from kdunet.unet import N_LEVELS, UNet, halo
from kdunet_infer.blockwise import WindowEngine
from kdunet_infer.card import ModelCard
from kdunet_infer.engines import create_engine
from kdunet_infer.model import Model
from kdunet_infer.plan import YX
from kdunet_infer.speed import Contender, core_run, mirrored

UInt8Array = npt.NDArray[np.uint8]

TRAINED = {2: "mito-epfl-2unet", 16: "epfl-16unet"}
"""Folders of models/teachers, by width; other widths get random weights."""
TEACHERS = Path(__file__).resolve().parents[1] / "models" / "teachers"

ENGINES = {
    "native": Contender("native"),
    "openvino bf16": Contender("openvino", {"precision": "bf16"}),
    "openvino": Contender("openvino"),
    "onnxruntime": Contender("onnxruntime"),
}
TORCH = {"PyTorch channels_last": torch.channels_last, "PyTorch eager": torch.contiguous_format}
MONAI = {"MONAI channels_last": torch.channels_last, "MONAI eager": torch.contiguous_format}
NAMES = (*ENGINES, *TORCH, *MONAI)

MONAI_ROI = (512, 512)
MONAI_OPTIONS: dict[str, Any] = {"overlap": 0.25, "mode": "gaussian", "sw_batch_size": 4}
CROP = 256
"""Side of the crops that random networks estimate their batch normalisation on."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A network, ready for every contender."""

    width: int
    weights: str
    """Where they are from: the name of a released network, or `random`."""
    network: UNet
    model: Model

    @property
    def margins(self) -> YX:
        """Of the halo, in pixels."""
        y, x = self.model.card.halo_zyx[1:]
        return y, x


@dataclass(frozen=True, slots=True)
class Entry:
    """A way to run a network on some slices."""

    run: Callable[[], object]
    """Computes the next slices."""
    description: str
    multiply_adds: int
    """Of a call, as this contender does them: with its halo, or with windows that overlap."""
    n_pixels: int
    """Of output of a call."""


def subject(width: int, slices: UInt8Array) -> Subject:
    """The k-Unet of `width` with trained weights where the repository has them, else with random ones that suit `slices`."""
    name = TRAINED.get(width, "")
    if name and (TEACHERS / name).is_dir():
        network, weights = load_network(TEACHERS / name)[0], name
    else:
        network, weights = _random_network(width, slices), "random"
    margin = halo(network.n_levels)
    card = ModelCard(
        name=f"{width}-unet",
        version="0",
        stride_zyx=(1, network.stride, network.stride),
        halo_zyx=(0, margin, margin),
        threshold=0.5,
    )
    return Subject(width, weights, network, Model.from_bytes(onnx_graph(network, card), Path(f"{width}-unet.onnx")))


def entry(name: str, of: Subject, slices: UInt8Array, n_threads: int) -> Entry:
    """The contender `name` on `slices` (n, y, x), which lie on the network's grid.

    Raises KdunetError or ModuleNotFoundError where it cannot run here.
    """
    tiles = mirrored(slices, of.margins)
    if name in ENGINES:
        chosen = ENGINES[name]
        engine = create_engine(chosen.engine, of.model, n_threads=n_threads, **chosen.options)
        run, n_at_once = core_run(engine, tiles, of.margins)
        windowed = isinstance(engine, WindowEngine)
        work = _windowed_work(of.width, tiles.shape[1:], of.margins) if windowed else tiles[0].size * multiply_adds(of.width)
        return Entry(run, engine.describe(), n_at_once * work, n_at_once * slices[0].size)
    torch.set_num_threads(n_threads)
    threads = f"{n_threads} thread{'s' * (n_threads != 1)}"
    if name in TORCH:
        about = f"torch {torch.__version__}, {threads}"
        work = tiles[0].size * multiply_adds(of.width)
        return Entry(_torch_run(of.network, tiles, of.margins, TORCH[name]), about, work, slices[0].size)
    import monai

    sliding, n_seen = _monai_run(of.network, slices, MONAI[name])
    about = f"monai {monai.__version__} on torch {torch.__version__}, {threads}"
    return Entry(sliding, about, n_seen * multiply_adds(of.width), slices[0].size)


@functools.cache
def multiply_adds(width: int) -> int:
    """Of one pixel of a k-Unet with one output map, normalisation and logistic function not counted."""
    total = 0
    for level in reversed(range(N_LEVELS)):
        n = width << level
        n_in = n // 2 if level else 1
        here = 9 * (n_in * n + n * n)
        if level + 1 < N_LEVELS:
            here += 2 * n * n + 9 * (2 * n * n + n * n)  # up-sampling: one of the four taps reaches a pixel
        total += here << 2 * (N_LEVELS - 1 - level)
    return width + (total >> 2 * (N_LEVELS - 1))


def _windowed_work(width: int, size: tuple[int, ...], margins: YX) -> int:
    """Multiply-adds of one tile in the native engine: of what the core depends on."""
    from kdunet_infer.engines.native.schedule import Kind, make_schedule, unet_layers

    layers = unet_layers(width, N_LEVELS)
    y, x = size
    window = ((margins[0], y - margins[0]), (margins[1], x - margins[1]))
    total = 0
    for task in make_schedule(layers, (y, x), window).tasks:
        n_in = sum(layers[i].n_channels for i in task.layer.inputs)
        taps = {Kind.CONVOLVE: 9, Kind.UPSAMPLE: 1, Kind.HEAD: 1}.get(task.layer.kind, 0)
        n_pixels = (task.rows[1] - task.rows[0]) * (task.columns[1] - task.columns[0])
        total += taps * n_in * task.layer.n_channels * n_pixels
    return total


def _random_network(width: int, slices: UInt8Array) -> UNet:
    """He-normal weights, and batch normalisation as it would be after training on `slices`: features of a usual size."""
    torch.manual_seed(width)
    network = UNet(width, intensity=(float(slices.mean()), max(1.0, float(slices.std()))))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # an average of all that is seen
    network.train()
    with torch.no_grad():
        for one in slices[:2]:
            network(_tensor(one[:CROP, :CROP], torch.contiguous_format))
    return network.eval()


def _torch_run(network: UNet, tiles: UInt8Array, margins: YX, layout: torch.memory_format) -> Callable[[], object]:
    copied = laid_out(network, layout)
    turn = itertools.cycle(tiles)
    rows, columns = (slice(margin, length - margin) for margin, length in zip(margins, tiles.shape[1:], strict=True))

    def run() -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            found: npt.NDArray[np.float32] = copied(_tensor(next(turn), layout)).softmax(1)[0, 1].numpy()
        return found[rows, columns]

    return run


def _monai_run(network: UNet, slices: UInt8Array, layout: torch.memory_format) -> tuple[Callable[[], object], int]:
    """The baseline as its users have it: sliding windows over the slice itself, blended; and how many pixels they have."""
    from monai.inferers import SlidingWindowInferer

    copied = laid_out(network, layout)
    turn = itertools.cycle(slices)
    inferer = SlidingWindowInferer(MONAI_ROI, **MONAI_OPTIONS)

    def run(predict: Callable[[Tensor], Tensor] = copied) -> npt.NDArray[np.float32]:
        with torch.inference_mode():
            logits = inferer(_tensor(next(turn), layout), predict)
            found: npt.NDArray[np.float32] = logits.softmax(1)[0, 1].numpy()
        return found

    n_pixels = 0

    def counting(windows: Tensor) -> Tensor:
        nonlocal n_pixels
        n_pixels += windows[:, 0].numel()
        logits: Tensor = copied(windows)
        return logits

    run(counting)
    return run, n_pixels


def laid_out(network: UNet, layout: torch.memory_format) -> UNet:
    """A copy in evaluation mode, its weights in that layout."""
    copied = UNet(network.width, n_levels=network.n_levels)
    copied.load_state_dict(network.state_dict())
    return copied.eval().to(memory_format=layout)  # type: ignore[call-overload, no-any-return]  # missing in the stubs


def _tensor(image: UInt8Array, layout: torch.memory_format) -> Tensor:
    return torch.from_numpy(image).float()[None, None].contiguous(memory_format=layout)
