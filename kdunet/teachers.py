"""Teachers: whatever answers images with margins, whether we trained it or not.

Our networks, ONNX files, modules of torch and plain functions all become one `Teacher`. A k-Unet and an exported student hold
their own intensity constants, so several teachers share a crop.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from kdunet.checkpoint import NETWORK_FILE, load_network
from kdunet.config import RunConfig
from kdunet.losses import margin
from kdunet_infer.card import METADATA_KEY
from kdunet_infer.engines import create_engine, missing
from kdunet_infer.errors import EngineUnavailable, KdunetError, ModelError, TrainingError
from kdunet_infer.model import Model, check_graph, check_self_contained, parsed, signature

if TYPE_CHECKING:
    from onnx import GraphProto

Teacher = Callable[[Tensor], Tensor]
"""Images (n, 1, y, x) float32 on the 0 to 255 scale -> margins (n, y, x) float32: foreground logit less background logit."""

CUT = 1e-6
"""Probabilities of an ONNX file are cut to this and 1 less this before their margin is taken, which is then within 13.8."""
FOREIGN = (
    "a teacher has one input float32 (n, 1, y, x) on the 0 to 255 scale, n free or 1, and one output: "
    "a foreground probability (n, 1, y, x) or logits (n, 2, y, x)"
)


def load_teacher(config: RunConfig, device: torch.device) -> Teacher | None:
    """The teachers that `config` names as one that answers on `device`; None where it names none.

    Several answer with the mean of their margins; with teacher_average "flips" that is averaged over flips and quarter turns.
    Autocast is the caller's affair. Raises TrainingError or ModelError for a file that is no teacher for crops of data.crop
    pixels, which it is asked first, EngineUnavailable where an ONNX file's runtime or device is not here.
    """
    if not config.teachers:
        return None
    loaded = [_load(path, device, crop=config.data.crop) for path in config.teachers]
    teacher = loaded[0] if len(loaded) == 1 else _mean_of(loaded)
    return flip_averaged(teacher) if config.teacher_average == "flips" else teacher


def as_teacher(network: nn.Module, *, name: str = "the teacher") -> Teacher:
    """A module that answers images (n, 1, y, x) as a teacher; it is put into evaluation mode and onto the images' device.

    Its answer may be logits (n, 2, y, x) of background and foreground, a foreground logit (n, 1, y, x), or margins (n, y, x);
    raises TrainingError, with `name`, for another shape.
    """
    network.eval()

    def answer(images: Tensor) -> Tensor:
        with torch.no_grad():
            network.to(images.device)
            return _margins(network(images.contiguous(memory_format=torch.channels_last)), images, name)

    return answer


def flip_averaged(teacher: Teacher) -> Teacher:
    """The mean of a teacher's margins over the eight flips and quarter turns of the images, each turned back."""

    def answer(images: Tensor) -> Tensor:
        total = torch.zeros_like(images[:, 0])
        for seen, transposed in ((images, False), (images.mT, True)):
            for axes in ((), (-2,), (-1,), (-2, -1)):
                margins = teacher(seen.flip(axes)).float().flip(axes)
                total += margins.mT if transposed else margins
        return total / 8

    return answer


def check_teacher(teacher: Teacher, name: str, *, crop: int, device: torch.device) -> None:
    """Ask a teacher about two images of `crop` pixels; TrainingError, with `name`, where it fails or answers something else."""
    # grey ramps, not zeros: foreign networks may divide by an image's own standard deviation
    ramp = torch.linspace(0.0, 255.0, crop, device=device).expand(crop, crop)
    images = torch.stack([ramp, ramp.mT])[:, None].contiguous()
    try:
        margins = teacher(images)
    except KdunetError:
        raise
    except Exception as exc:  # of any library that a teacher may be made with
        why = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise TrainingError(
            f"{name} fails on crops of {crop} x {crop} pixels ({why}); choose another data.crop or another teacher."
        ) from exc
    if not isinstance(margins, Tensor) or margins.shape != (2, crop, crop):
        raise TrainingError(
            f"{name} answers images of shape {_shape(images)} with {_shape(margins)}; a teacher gives margins (n, y, x)."
        )
    if not torch.isfinite(margins).all():
        raise TrainingError(f"{name} answers grey ramps with values that are not finite; choose another teacher.")


def teacher_file(path: str) -> Path:
    """The file that holds a teacher's weights: `path` itself, or the network in that folder.

    Raises TrainingError where there is none, or one of a kind that is not read.
    """
    file = Path(path) / NETWORK_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise TrainingError(f"there is no teacher {file}; give a run's folder, a .safetensors or an .onnx file.")
    if file.suffix not in (".safetensors", ".onnx"):
        raise TrainingError(
            f"teacher {file} is no .safetensors or .onnx file; export it as ONNX, or give it to kdunet.fit.fit as a function."
        )
    return file


def teacher_sha256(path: str) -> str:
    """SHA-256 of a teacher's file, in hexadecimal. Raises TrainingError as `teacher_file`."""
    with teacher_file(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(path: str, device: torch.device, *, crop: int) -> Teacher:
    file = teacher_file(path)
    name = f"teacher {file}"
    if file.suffix == ".onnx":
        teacher = _load_onnx(file, device)
    else:
        network = load_network(file)[0].requires_grad_(False)
        teacher = as_teacher(network.to(device, memory_format=torch.channels_last), name=name)  # type: ignore[call-overload]
    check_teacher(teacher, name, crop=crop, device=device)
    return teacher


def _mean_of(teachers: Sequence[Teacher]) -> Teacher:
    return lambda images: torch.stack([teacher(images) for teacher in teachers]).mean(dim=0)


def _margins(answer: Any, images: Tensor, name: str) -> Tensor:
    n, _, y, x = images.shape
    if isinstance(answer, Tensor):
        if answer.shape == (n, 2, y, x):
            return margin(answer)
        if answer.shape == (n, 1, y, x):
            return answer[:, 0].float()
        if answer.shape == (n, y, x):
            return answer.float()
    raise TrainingError(
        f"{name} answers images of shape {_shape(images)} with {_shape(answer)}; a network that teaches gives logits "
        "(n, 2, y, x), a foreground logit (n, 1, y, x), or margins (n, y, x)."
    )


def _shape(value: Any) -> str:
    return f"({', '.join(map(str, value.shape))})" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _load_onnx(file: Path, device: torch.device) -> Teacher:
    """An exported student where the file has a card, a network of any other making where it has none."""
    onnx_bytes = file.read_bytes()
    proto = parsed(onnx_bytes, file)
    where = "cuda" if device.type == "cuda" else "cpu"
    if any(prop.key == METADATA_KEY for prop in proto.metadata_props):
        return _student(Model.from_bytes(onnx_bytes, file), where)
    check_self_contained(proto, file)
    check_graph(proto, file)
    return _foreign(file, onnx_bytes, proto.graph, where)


def _student(model: Model, where: str) -> Teacher:
    engine = create_engine("auto", model, device=where, n_threads=torch.get_num_threads())

    def answer(images: Tensor) -> Tensor:
        tiles = images[:, 0].round().clamp(0, 255).byte().cpu().numpy()
        return torch.from_numpy(engine.infer(tiles)).to(images.device).logit(CUT)

    return answer


def _foreign(file: Path, onnx_bytes: bytes, graph: GraphProto, where: str) -> Teacher:
    name, one_at_a_time = _checked_input(graph, file)
    session = _session(file, onnx_bytes, where)

    def answer(images: Tensor) -> Tensor:
        grey = images.detach().float().cpu().numpy()
        parts = [session.run(None, {name: part})[0] for part in (np.split(grey, len(grey)) if one_at_a_time else [grey])]
        return _foreign_margins(torch.from_numpy(np.concatenate(parts)).float().to(images.device), images, file)

    return answer


def _checked_input(graph: GraphProto, file: Path) -> tuple[str, bool]:
    """The input's name, and whether it takes no more than one image."""
    from onnx import TensorProto

    weights = {tensor.name for tensor in graph.initializer}  # older exporters list these among the inputs
    inputs = [value for value in graph.input if value.name not in weights]
    tensor = inputs[0].type.tensor_type if inputs else None
    sizes = [dim.dim_value for dim in tensor.shape.dim] if tensor else []  # 0 where the size is free
    fits = len(inputs) == 1 and len(sizes) == 4 and sizes[0] in (0, 1) and sizes[1] in (0, 1)
    if not (fits and tensor and tensor.elem_type == TensorProto.FLOAT and len(graph.output) == 1):
        found = (", ".join(map(signature, values)) or "nothing" for values in (inputs, graph.output))
        raise ModelError("teacher {} has the input {} and the output {}; {}.".format(file, *found, FOREIGN))
    return inputs[0].name, sizes[0] == 1


def _session(file: Path, onnx_bytes: bytes, where: str) -> Any:
    if why := missing("onnxruntime"):
        raise EngineUnavailable(why)
    import onnxruntime

    from kdunet_infer.engines.onnxruntime import ERRORS_ONLY, PROVIDERS

    provider, provider_options = PROVIDERS[where]
    if provider not in onnxruntime.get_available_providers():
        raise EngineUnavailable(
            f"onnxruntime {onnxruntime.__version__} here was built without {where.upper()}, where {file} is to teach: "
            "pip uninstall onnxruntime, then pip install 'kdunet[gpu]'."
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(onnx_bytes, options, providers=[(provider, provider_options)], enable_fallback=0)
    except Exception as exc:  # onnxruntime's errors share no base of their own
        raise ModelError(f"onnxruntime cannot load teacher {file} ({exc}); export it again.") from exc


def _foreign_margins(answer: Tensor, images: Tensor, file: Path) -> Tensor:
    n, _, y, x = images.shape
    least, most = answer.min().item(), answer.max().item()
    if answer.shape == (n, 1, y, x):
        if least < -CUT or most > 1 + CUT:
            raise ModelError(
                f"teacher {file} answers with one channel of values from {least:g} to {most:g}, which are no probabilities; "
                "export it with its sigmoid."
            )
        return answer[:, 0].logit(CUT)
    if answer.shape == (n, 2, y, x):
        if least >= 0 and torch.allclose(answer.sum(dim=1), torch.ones_like(answer[:, 0]), atol=1e-3):
            raise ModelError(
                f"teacher {file} answers with two channels that sum to 1, not with logits; export it without its softmax."
            )
        return margin(answer)
    raise ModelError(f"teacher {file} answers images of shape {_shape(images)} with {_shape(answer)}; {FOREIGN}.")
