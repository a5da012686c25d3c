"""Teachers of every making answer with margins, and files that are none are refused before the first step."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from scipy.special import logit
from small_models import unet_onnx
from torch import Tensor, nn

from kdunet.checkpoint import NETWORK_FILE, save_network
from kdunet.config import RunConfig
from kdunet.teachers import Teacher, as_teacher, check_teacher, flip_averaged, load_teacher, teacher_sha256
from kdunet.unet import UNet
from kdunet_infer.errors import EngineUnavailable, KdunetError, ModelError, TrainingError

CPU = torch.device("cpu")
CROP = 32


def images(n: int = 3, y: int = 16, x: int = 24) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).uniform(0, 255, (n, 1, y, x)).astype(np.float32))


def loaded(*paths: Path, average: str = "none", crop: int = CROP) -> Teacher:
    config = RunConfig(teachers=tuple(map(str, paths)), teacher_average=average).replaced({"data.crop": crop})
    teacher = load_teacher(config, CPU)
    assert teacher is not None
    return teacher


def unet_file(path: Path, seed: int = 0, n_levels: int = 2) -> UNet:
    torch.manual_seed(seed)
    network = UNet(2, n_levels=n_levels, intensity=(120.0, 60.0)).eval()
    path.parent.mkdir(exist_ok=True)
    save_network(path, network, {})
    return network


def foreign_file(
    path: Path,
    ops: Sequence[str] = (),
    *,
    n_channels: int = 2,
    input_shape: Sequence[int | str] = ("n", 1, "y", "x"),
    dtype: int = TensorProto.FLOAT,
    n_inputs: int = 1,
) -> None:
    """`ops` of a 1x1 convolution with weights 0.01, 0.02, ... and biases 0, -1, ..."""
    weights = [
        numpy_helper.from_array((0.01 * np.arange(1, n_channels + 1, dtype=np.float32)).reshape(-1, 1, 1, 1), "w"),
        numpy_helper.from_array(-np.arange(n_channels, dtype=np.float32), "b"),
    ]
    nodes = [helper.make_node("Cast", ["grey"], ["0"], to=TensorProto.FLOAT), helper.make_node("Conv", ["0", "w", "b"], ["1"])]
    nodes += [
        helper.make_node(op, [str(i)], [str(i + 1)], **({"axis": 1} if op == "Softmax" else {})) for i, op in enumerate(ops, 1)
    ]
    inputs = [helper.make_tensor_value_info(name, dtype, input_shape) for name in ("grey", "second")[:n_inputs]]
    outputs = [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["n", "c", "y", "x"])]
    graph = helper.make_graph(nodes, "foreign", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


class Fixed(nn.Module):
    """Answers with these channels of itself, whatever mode it is in."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.change, self.dropout = change, nn.Dropout(0.5)

    def forward(self, image: Tensor) -> object:
        return self.change(self.dropout(image))


def test_no_teacher_is_none() -> None:
    assert load_teacher(RunConfig(), CPU) is None


def test_a_network_answers_with_its_margin_from_its_folder_and_its_file(tmp_path: Path) -> None:
    network = unet_file(tmp_path / "run" / NETWORK_FILE)
    with torch.inference_mode():
        want = network(images()).softmax(dim=1)[:, 1]
    for path in (tmp_path / "run", tmp_path / "run" / NETWORK_FILE):
        margins = loaded(path)(images())
        assert (margins.dtype, margins.requires_grad) == (torch.float32, False)
        torch.testing.assert_close(margins.sigmoid(), want)


def test_several_answer_with_the_mean_of_their_margins(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    for seed, path in enumerate(paths):
        unet_file(path, seed)
    each = np.stack([loaded(path)(images()).numpy() for path in paths])
    assert np.ptp(each, axis=0).max() > 0.1
    np.testing.assert_allclose(loaded(*paths)(images()).numpy(), each.mean(axis=0), atol=1e-5)


def test_flip_averaging_is_the_mean_of_the_eight_turned_back(tmp_path: Path) -> None:
    unet_file(tmp_path / "plain.safetensors")
    teacher = loaded(tmp_path / "plain.safetensors")
    want = np.zeros((3, 16, 24), np.float64)
    for mirrored in (False, True):
        for k in range(4):
            seen = images().numpy()[..., ::-1] if mirrored else images().numpy()
            answer = teacher(torch.from_numpy(np.rot90(seen, k, axes=(2, 3)).copy())).numpy()
            back = np.rot90(answer, -k, axes=(1, 2))
            want += (back[..., ::-1] if mirrored else back) / 8
    assert np.abs(teacher(images()).numpy() - want).max() > 0.01
    np.testing.assert_allclose(flip_averaged(teacher)(images()).numpy(), want, atol=1e-5)
    averaged = loaded(tmp_path / "plain.safetensors", average="flips")
    np.testing.assert_allclose(averaged(images()).numpy(), want, atol=1e-5)


def test_an_exported_student_answers_with_the_logit_of_its_probability(tmp_path: Path) -> None:
    proto = unet_onnx(1, 1)
    onnx.save(proto, tmp_path / "student.onnx")
    tiles = np.round(images().numpy()).astype(np.uint8)
    (probability,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"image": tiles})
    want = logit(np.clip(probability[:, 0].astype(np.float64), 1e-6, 1 - 1e-6))
    np.testing.assert_allclose(loaded(tmp_path / "student.onnx")(images()).numpy(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", ["n", 1], ids=["any-number", "one-at-a-time"])
def test_a_foreign_file_may_answer_with_logits_or_probability(tmp_path: Path, n: int | str) -> None:
    foreign_file(tmp_path / "logits.onnx", input_shape=(n, 1, "y", "x"))
    foreign_file(tmp_path / "probability.onnx", ["Sigmoid"], n_channels=1, input_shape=(n, 1, "y", "x"))
    grey = images()[:, 0].numpy()
    np.testing.assert_allclose(loaded(tmp_path / "logits.onnx")(images()).numpy(), 0.01 * grey - 1, atol=1e-5)
    np.testing.assert_allclose(loaded(tmp_path / "probability.onnx")(images()).numpy(), 0.01 * grey, atol=1e-4)


def test_a_certain_probability_has_a_margin(tmp_path: Path) -> None:
    foreign_file(tmp_path / "certain.onnx", ["Exp", "Exp", "Reciprocal", "Floor"], n_channels=1)  # 0 everywhere
    np.testing.assert_allclose(loaded(tmp_path / "certain.onnx")(images()).numpy(), logit(1e-6), rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "want"),
    [
        (lambda x: torch.cat([x, 3 * x], dim=1), lambda x: 2 * x[:, 0]),
        (lambda x: 3 * x, lambda x: 3 * x[:, 0]),
        (lambda x: (3 * x[:, 0]).half(), lambda x: (3 * x[:, 0]).half().float()),
    ],
    ids=["two-logits", "one-logit", "margins"],
)
def test_a_module_may_answer_in_three_shapes(change: Callable[[Tensor], Tensor], want: Callable[[Tensor], Tensor]) -> None:
    margins = as_teacher(Fixed(change).train())(images().requires_grad_())  # the dropout is off
    assert (margins.dtype, margins.requires_grad) == (torch.float32, False)
    torch.testing.assert_close(margins, want(images()))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x.expand(-1, 3, -1, -1), r"the teacher answers images of shape \(3, 1, 16, 24\) with \(3, 3, 16, 24\)"),
        (lambda x: x[..., 1:], r"with \(3, 1, 16, 23\); a network that teaches gives logits"),
        (lambda x: {"out": x}, r"with a dict; a network"),
    ],
    ids=["three-classes", "smaller", "dict"],
)
def test_a_module_with_another_answer_is_refused(change: Callable[[Tensor], object], says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        as_teacher(Fixed(change))(images())


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        (lambda x: x, r"mine answers images of shape \(2, 1, 32, 32\) with \(2, 1, 32, 32\); a teacher gives margins"),
        (lambda _: None, r"with a NoneType; a teacher gives"),
        (lambda x: x[:, 0].log(), "mine answers grey ramps with values that are not finite"),
        (lambda x: x[:, 7], r"mine fails on crops of 32 x 32 pixels \(index 7 is out of bounds.*\); choose another data.crop"),
        (lambda _: {}[()], r"mine fails on crops of 32 x 32 pixels \(\(\)\)"),
    ],
    ids=["shape", "nothing", "infinite", "fails", "key"],
)
def test_a_function_is_asked_before_it_is_believed(teacher: Teacher, says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        check_teacher(teacher, "mine", crop=CROP, device=CPU)


def test_teachers_that_are_no_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"")
    (tmp_path / "other.safetensors").write_bytes(b"no tensors")
    for name, says in (
        ("absent", r"there is no teacher .*absent; give a run's folder, a .safetensors or an .onnx file"),
        ("", rf"there is no teacher .*{NETWORK_FILE}; give a run's"),
        ("weights.pth", r"weights.pth is no .safetensors or .onnx file; export it as ONNX"),
        ("other.safetensors", r"other.safetensors is damaged or was not written by kdunet"),
    ):
        with pytest.raises(TrainingError, match=says):
            loaded(tmp_path / name)


def test_a_network_too_deep_for_the_crop_is_refused(tmp_path: Path) -> None:
    unet_file(tmp_path / "deep.safetensors", n_levels=6)
    with pytest.raises(TrainingError, match=r"teacher .*deep.safetensors fails on crops of 48 x 48 pixels \("):
        loaded(tmp_path / "deep.safetensors", crop=48)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"n_inputs": 2},
            "has the input grey float32 .n, 1, y, x., second float32 .* and the output 1 float32 .*; a teacher has one",
        ),
        ({"dtype": TensorProto.UINT8}, r"has the input grey uint8 \(n, 1, y, x\) and the output"),
        ({"input_shape": (4, 1, "y", "x")}, r"has the input grey float32 \(4, 1, y, x\)"),
        ({"input_shape": ("n", "y", "x")}, "has the input grey float32"),
        ({"input_shape": ("n", 1, 64, 64)}, r"\.onnx fails on crops of 32 x 32 pixels \(.*\); choose another data.crop"),
        ({"n_channels": 3}, r"answers images of shape \(2, 1, 32, 32\) with \(2, 3, 32, 32\); a teacher has one input"),
        ({"n_channels": 1}, r"one channel of values from 0 to 2.55, which are no probabilities; export it with its sigmoid"),
        ({"ops": ["Softmax"]}, r"two channels that sum to 1, not with logits; export it without its softmax"),
        ({"ops": ["Log"]}, r"answers grey ramps with values that are not finite"),
        ({"ops": ["Nonsense"]}, r"\.onnx holds a network that breaks the ONNX format"),
    ],
    ids=[
        "two-inputs",
        "uint8",
        "four-at-a-time",
        "rank",
        "fixed-size",
        "three-classes",
        "logit",
        "softmax",
        "infinite",
        "op",
    ],
)
def test_a_foreign_file_of_another_interface_is_refused(tmp_path: Path, options: dict[str, object], says: str) -> None:
    path = tmp_path / "foreign.onnx"
    foreign_file(path, **options)  # type: ignore[arg-type]
    with pytest.raises(KdunetError, match=says) as caught:
        loaded(path)
    assert str(path) in str(caught.value)


def test_a_foreign_file_is_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    path.write_bytes(b"no network")
    with pytest.raises(ModelError, match="is not an ONNX file"):
        loaded(path)
    foreign_file(path)
    proto = onnx.load(path)
    proto.graph.initializer[0].data_location = TensorProto.EXTERNAL
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="keeps the weights 'w' in another file"):
        loaded(path)
    foreign_file(path)
    proto = onnx.load(path)
    proto.graph.node[1].domain = "org.lab.secret"  # the checker knows no rules for it
    proto.opset_import.append(helper.make_opsetid("org.lab.secret", 1))
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(KdunetError, match=r"onnxruntime cannot load teacher .*foreign.onnx \(.*\); export it again"):
        loaded(path)


def test_without_its_runtime_a_foreign_file_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign_file(tmp_path / "foreign.onnx")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    config = RunConfig(teachers=(str(tmp_path / "foreign.onnx"),))
    with pytest.raises(EngineUnavailable, match=r"here was built without CUDA, where .*foreign.onnx is to teach"):
        load_teacher(config, torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "kdunet_infer.engines.onnxruntime", raising=False)
    with pytest.raises(EngineUnavailable, match=r"Engine 'onnxruntime' needs 'onnxruntime': pip install 'kdunet\[cpu\]'"):
        load_teacher(config, CPU)


def test_a_teacher_is_known_by_the_bytes_of_its_file(tmp_path: Path) -> None:
    unet_file(tmp_path / "run" / NETWORK_FILE)
    want = hashlib.sha256((tmp_path / "run" / NETWORK_FILE).read_bytes()).hexdigest()
    assert teacher_sha256(str(tmp_path / "run")) == teacher_sha256(str(tmp_path / "run" / NETWORK_FILE)) == want
