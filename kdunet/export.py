"""A trained network -> ONNX with its card. Parity with PyTorch is proven before the file appears.

Interface: input `image` uint8 (n, 1, y, x), output `foreground` float32 (n, 1, y, x), the probability; everything else is in
the graph. Batch normalisation is folded into the convolutions, and the two-class softmax into one sigmoid of the difference,
whose weights hold the calibration too.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdunet.calibration import Calibration, calibrate, calibrated, to_json
from kdunet.checkpoint import load_network, write_whole
from kdunet.config import RunConfig
from kdunet.data import Annotated, load_annotated, value_counts
from kdunet.fit import CONFIG_FILE
from kdunet.unet import DoubleConv, UNet, halo, n_parameters
from kdunet_infer.card import METADATA_KEY, ModelCard
from kdunet_infer.engines import create_engine
from kdunet_infer.errors import TrainingError
from kdunet_infer.model import INPUT_NAME, OUTPUT_NAME, Model

OPSET = 20
MAX_DIFFERENCE = 1e-5
"""Largest difference of a probability between PyTorch and the exported graph: float32 sums of a few hundred terms."""
N_PARITY_CROPS = 4
AS_STORED = "uint8 as stored"
"""How training images came to uint8, unless an export is told: training reads nothing else."""
CALIBRATED = "calibrated: of the validation voxels that got a probability p, a share p is foreground; other images may differ"
AS_TRAINED = "as the loss left them: they rank voxels, but a share p of the voxels that got p need not be foreground"


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote."""

    path: Path
    card: ModelCard
    sha256: str
    max_difference: float
    """Largest difference of a probability to PyTorch on the parity crops."""
    calibration: Calibration | None = None
    """What the graph's probabilities were calibrated with; None where they are as trained."""


class _Student(nn.Module):
    """The exported graph: image uint8 (n, 1, y, x) -> foreground probability float32 (n, 1, y, x)."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = folded(network)
        head = self.network.head
        difference = nn.Conv2d(head.in_channels, 1, 1)
        # softmax of (a, b) is sigmoid of b - a: one map instead of two
        difference.weight = nn.Parameter(head.weight[1:] - head.weight[:1])
        difference.bias = nn.Parameter((head.bias[1:] - head.bias[:1]) if head.bias is not None else torch.zeros(1))
        self.network.head = difference

    def forward(self, image: Tensor) -> Tensor:
        probability: Tensor = torch.sigmoid(self.network(image.float()))
        return probability


def export_run(
    run: Path,
    out: Path,
    *,
    name: str | None = None,
    version: str = "1.0",
    voxel_size_nm: tuple[float, float, float] | None = None,
    grey_preparation: str = AS_STORED,
    told: Mapping[str, str] | None = None,
    calibration: bool = True,
) -> Exported:
    """Export the best network of the training run in `run` as `out`, with a card made from its record.

    With `calibration` its probabilities are calibrated on the annotated voxels of the run's validation slab, and the card's
    threshold is moved along, so that masks stay as they are.

    `told` joins the card's provenance: description, licence, citation, whatever the record cannot know. `grey_preparation` says
    what was done to the images before training read them. The card's grey histogram is that of the run's own training slab,
    and parity is measured on crops of its validation slab. Raises TrainingError where there is no network or where the
    exported graph differs, VolumeError or ConfigError where its data cannot be found again.
    """
    network, about = load_network(run)
    config = RunConfig.from_toml(run / CONFIG_FILE)
    training, validation = load_annotated(config.data)
    card = student_card(network, about, config, name=name or out.stem, version=version, told=told or {})
    card = dataclasses.replace(
        card,
        grey_histogram=grey_shares(training.images),
        grey_preparation=grey_preparation,
        voxel_size_nm=voxel_size_nm,
    )
    found = calibrate(network, validation) if calibration else None
    if found is not None:
        network, card = calibrated(network, found), calibrated_card(card, found)
    exported = export_network(network, card, out, crops=parity_crops(validation, network.stride))
    return dataclasses.replace(exported, calibration=found)


def export_network(network: UNet, card: ModelCard, out: Path, *, crops: npt.NDArray[np.uint8]) -> Exported:
    """Write `network` with `card` to `out` (.onnx) once the graph agrees with PyTorch on `crops` (n, y, x) uint8.

    The bytes depend on the weights and the card only. Raises TrainingError where a probability differs by more than
    MAX_DIFFERENCE; EngineUnavailable without onnxruntime, which does the comparison.
    """
    onnx_bytes = onnx_graph(network, card)
    model = Model.from_bytes(onnx_bytes, out)
    got = create_engine("onnxruntime", model, device="cpu").infer(crops)
    with torch.inference_mode():
        want = network.eval()(torch.from_numpy(crops)[:, None].float()).softmax(dim=1)[:, 1].numpy()
    difference = float(np.abs(got - want).max())
    if not difference <= MAX_DIFFERENCE:  # NaN is refused too
        raise TrainingError(
            f"the exported graph differs from PyTorch by {difference:.3g} in a probability (limit {MAX_DIFFERENCE:g}), "
            f"so {out} was not written; report this with the versions of torch and onnxruntime."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, onnx_bytes)
    return Exported(out, card, model.sha256, difference)


def onnx_graph(network: UNet, card: ModelCard) -> bytes:
    """The ONNX file's bytes: the same for the same weights, card and torch version, wherever it runs."""
    rows, columns = (network.stride * torch.export.Dim(name, min=1) for name in ("rows", "columns"))
    with warnings.catch_warnings(), _quiet_exporter():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            _Student(network).eval(),
            (torch.zeros((2, 1, 4 * network.stride, 5 * network.stride), dtype=torch.uint8),),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            opset_version=OPSET,
            dynamic_shapes={"image": {0: torch.export.Dim("n", min=1), 2: rows, 3: columns}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None, "with dynamo=True and no file, the exporter returns the program"
    onnx_bytes: bytes = _clean(program.model_proto, card).SerializeToString(deterministic=True)
    return onnx_bytes


def folded(network: UNet) -> UNet:
    """A copy in which each batch normalisation is folded into the convolution before it, computed in float64."""
    copied = copy.deepcopy(network).eval().double()
    for block in copied.modules():
        if isinstance(block, DoubleConv):
            for index in (0, 3):
                convolution, normalisation = block[index], block[index + 1]
                assert isinstance(convolution, nn.Conv2d)
                if isinstance(normalisation, nn.BatchNorm2d):
                    block[index] = fuse_conv_bn_eval(convolution, normalisation)
                    block[index + 1] = nn.Identity()
    return copied.float()


def student_card(
    network: UNet,
    about: Mapping[str, Any],
    config: RunConfig,
    *,
    name: str,
    version: str,
    told: Mapping[str, str],
) -> ModelCard:
    """What the network and its record say of a trained student: grid and halo, threshold of the validation, recipe."""
    margin = halo(network.n_levels)
    return ModelCard(
        name=name,
        version=version,
        stride_zyx=(1, network.stride, network.stride),
        halo_zyx=(0, margin, margin),
        threshold=float(about["validation"]["threshold"]),
        intensity_mean=float(network.mean),
        intensity_std=float(network.std),
        n_parameters=n_parameters(network),
        architecture=about["architecture"],
        provenance={
            **told,
            "recipe": _recipe(config),
            "validation": about["validation"],
            "step": about["step"],
            "foreground_fraction": about["foreground_fraction"],
            "probabilities": AS_TRAINED,
        },
    )


def calibrated_card(card: ModelCard, calibration: Calibration) -> ModelCard:
    """The card of the network whose probabilities are calibrated: its threshold cuts the same mask out of them.

    Raises TrainingError where no threshold in float32 does.
    """
    figures = {**to_json(calibration), "threshold_before": card.threshold, "on": "validation slices"}
    meaning = f"not well calibrated: {calibration.remark}" if calibration.remark else CALIBRATED
    provenance = {**card.provenance, "probabilities": meaning, "calibration": figures}
    return dataclasses.replace(card, threshold=calibration.threshold(card.threshold), provenance=provenance)


def grey_shares(images: npt.NDArray[np.uint8]) -> tuple[float, ...]:
    """Share of the voxels of `images` (z, y, x) with each grey value 0 to 255, rounded to 6 significant digits."""
    return tuple(float(f"{count / images.size:.6g}") for count in value_counts(images).tolist())


def parity_crops(slab: Annotated, stride: int) -> npt.NDArray[np.uint8]:
    """Crops (n, y, x) uint8 of the validation slab, spread over it; sizes multiples of the stride."""
    n_slices, height, width = slab.images.shape
    y, x = (min(size, 256) // stride * stride for size in (height, width))
    if not (y and x):
        raise TrainingError(f"slices of {height} x {width} pixels are smaller than the network's stride {stride}.")
    rng = np.random.default_rng(0)
    limits = (n_slices, height - y + 1, width - x + 1)
    corners = rng.integers((0, 0, 0), limits, size=(N_PARITY_CROPS, 3))
    return np.stack([slab.images[z, top : top + y, left : left + x] for z, top, left in corners])


def _recipe(config: RunConfig) -> dict[str, Any]:
    """The configuration as JSON, paths cut to their last part: a released file tells no machine's folders."""
    table = dataclasses.asdict(config)
    table["teachers"] = [Path(teacher).name for teacher in table["teachers"]]
    for section, keys in _PATHS.items():
        part = table[section] if section else table
        part.update({key: Path(part[key]).name for key in keys})
    return table


_PATHS = {"": ("start",), "data": ("images", "labels", "probabilities", "bank"), "unseen": ("images", "labels")}
"""Section -> its keys that are paths."""


def _clean(proto: Any, card: ModelCard) -> Any:
    """Clear what depends on the exporting machine (paths and stack traces of nodes), and add the card."""
    graph = proto.graph
    graph.name, graph.doc_string = card.name, ""
    for part in (proto, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        if hasattr(part, "metadata_props"):
            del part.metadata_props[:]
        part.doc_string = ""
    del graph.value_info[:]  # shapes that onnxruntime infers itself
    for value in (*graph.input, *graph.output):
        for index, axis in ((0, "n"), (2, "y"), (3, "x")):
            value.type.tensor_type.shape.dim[index].dim_param = axis
    prop = proto.metadata_props.add()
    prop.key, prop.value = METADATA_KEY, card.to_json()
    return proto


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter's remarks on operators of torchvision, which no k-Unet has."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
