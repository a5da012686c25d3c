from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from small_models import small_card, unet_onnx

import kdunet_infer.model
from kdunet_infer.errors import ModelCardError, ModelError, ModelNotFound
from kdunet_infer.model import Model, released_models

STUDENT = unet_onnx(levels=2, width=2)
PATH = Path("student.onnx")


@pytest.fixture
def models_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with two released students, a folder of teachers and a folder without a model."""
    folder = tmp_path / "checkout" / "models"
    for name in ("vnc-2unet", "mito-epfl-2unet", "teachers"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.onnx").write_bytes(STUDENT.SerializeToString())
    (folder / "unfinished").mkdir()
    package = tmp_path / "checkout" / "kdunet_infer"
    package.mkdir()
    monkeypatch.setattr(kdunet_infer.model, "__file__", str(package / "model.py"))
    return folder


def test_a_file_is_loaded_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    path.write_bytes(STUDENT.SerializeToString())
    for given in (path, str(path)):
        model = Model.load(given)
        assert (model.path, model.onnx_bytes) == (path, path.read_bytes())
        assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert model.card == small_card(levels=2)


def test_a_released_model_is_loaded_by_its_name(models_folder: Path) -> None:
    assert released_models() == ("mito-epfl-2unet", "vnc-2unet")
    assert Model.load("vnc-2unet").path == models_folder / "vnc-2unet" / "model.onnx"


def test_models_in_the_package_come_first(models_folder: Path) -> None:
    inside = models_folder.parent / "kdunet_infer" / "models" / "in-the-wheel"
    inside.mkdir(parents=True)
    (inside / "model.onnx").write_bytes(STUDENT.SerializeToString())
    assert released_models() == ("in-the-wheel",)


@pytest.mark.usefixtures("models_folder")
def test_an_unknown_name_lists_the_released_models() -> None:
    with pytest.raises(ModelNotFound, match=r"'mito' and no file is there; released models: mito-epfl-2unet, vnc-2unet"):
        Model.load("mito")


def test_the_repr_leaves_the_bytes_out(model: Model) -> None:
    assert len(repr(model)) < 1000


def test_a_model_goes_to_workers(model: Model) -> None:
    assert pickle.loads(pickle.dumps(model)) == model


def test_a_folder_is_refused(models_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"vnc-2unet is a folder; give the \.onnx file in it"):
        Model.load(models_folder / "vnc-2unet")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "student.onnx").touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ModelError, match=r"student.onnx cannot be read \(Permission denied\)"):
        Model.load(tmp_path / "student.onnx")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_a_file_cut_short_is_refused(share: float) -> None:
    whole = STUDENT.SerializeToString()
    with pytest.raises(ModelError, match=r"student.onnx is not an ONNX file, or is cut short .*copy or export it again"):
        Model.from_bytes(whole[: int(share * len(whole))], PATH)


@pytest.mark.parametrize("garbage", [b"", b"\x08\x09", b"PK\x03\x04 a zip file", b"\x89PNG\r\n\x1a\n", bytes(range(256))])
def test_what_is_no_onnx_is_refused(garbage: bytes) -> None:
    with pytest.raises(ModelError, match=r"student.onnx is not an ONNX file"):
        Model.from_bytes(garbage, PATH)


def without_card(proto: onnx.ModelProto) -> None:
    del proto.metadata_props[:]


def with_bad_card(proto: onnx.ModelProto) -> None:
    helper.set_model_props(proto, {"kdunet": "{}"})


def float_input(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT


def other_input_name(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].name = "x"


def rgb_input(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3


def fixed_batch(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def flat_input(proto: onnx.ModelProto) -> None:
    del proto.graph.input[0].type.tensor_type.shape.dim[2:]


def two_outputs(proto: onnx.ModelProto) -> None:
    proto.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["n", 2, "y", "x"]))


def unknown_output_type(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].type.tensor_type.elem_type = 999


def external_weights(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[2].data_location = TensorProto.EXTERNAL


def external_constant_in_a_branch(proto: onnx.ModelProto) -> None:
    hidden = TensorProto(name="hidden", data_location=TensorProto.EXTERNAL)
    branch = helper.make_graph([helper.make_node("Constant", [], ["c"], value=hidden)], "branch", [], [])
    proto.graph.node.append(helper.make_node("If", ["q"], ["r"], then_branch=branch, else_branch=branch))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without_card, r"student.onnx has no model card \('kdunet' in its metadata\); export it with `kdunet export`"),
        (float_input, r"has the input image float32 \(n, 1, y, x\); a student has image uint8 \(n, 1, y, x\): export it"),
        (other_input_name, r"has the input x uint8"),
        (rgb_input, r"has the input image uint8 \(n, 3, y, x\)"),
        (fixed_batch, r"has the input image uint8 \(1, 1, y, x\)"),
        (flat_input, r"has the input image uint8 \(\?, 1\)"),
        (two_outputs, r"has the output foreground float32 \(n, 1, y, x\), logits float16 \(n, 2, y, x\); a student"),
        (unknown_output_type, r"has the output foreground of unknown type \(n, 1, y, x\)"),
        (external_weights, r"keeps the weights 'w2' in another file; export it with external_data=False"),
        (external_constant_in_a_branch, r"keeps the weights 'hidden' in another file"),
    ],
)
def test_what_is_no_student_is_refused(spoil: Callable[[onnx.ModelProto], None], says: str) -> None:
    proto = onnx.ModelProto.FromString(STUDENT.SerializeToString())
    spoil(proto)
    with pytest.raises(ModelError, match=says):
        Model.from_bytes(proto.SerializeToString(), PATH)


def test_a_bad_card_is_refused_with_the_file_named() -> None:
    proto = onnx.ModelProto.FromString(STUDENT.SerializeToString())
    with_bad_card(proto)
    with pytest.raises(ModelCardError, match=r"student.onnx: the model card has no format that is known"):
        Model.from_bytes(proto.SerializeToString(), PATH)


def test_weights_listed_among_the_inputs_are_accepted() -> None:
    proto = onnx.ModelProto.FromString(STUDENT.SerializeToString())
    proto.graph.input.append(helper.make_tensor_value_info("w2", TensorProto.FLOAT, [2, 1, 3, 3]))
    assert Model.from_bytes(proto.SerializeToString(), PATH).card.name == "small"
