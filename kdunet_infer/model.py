"""A model file, checked once at the door: ONNX bytes, their SHA-256, and the card. Knows no runtimes and no volumes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kdunet_infer.card import METADATA_KEY, ModelCard
from kdunet_infer.errors import ModelCardError, ModelError, ModelNotFound

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto, ValueInfoProto

INPUT_NAME = "image"
"""uint8 (n, 1, y, x)."""
OUTPUT_NAME = "foreground"
"""float32 (n, 1, y, x), the probability."""


@dataclass(frozen=True, slots=True)
class Model:
    """A student that was checked: made by `load` or `from_bytes` only. Pickles, so that it can go to workers."""

    path: Path
    onnx_bytes: bytes = field(repr=False)
    sha256: str
    """Of the bytes, in hexadecimal: what a run records and refuses to resume without."""
    card: ModelCard

    @classmethod
    def load(cls, name_or_path: str | Path) -> Model:
        """Load a released model by its name, or an ONNX file by its path.

        Raises ModelNotFound where there is neither, ModelError for a file that is no usable model, ModelCardError for its card.
        """
        path = _find(name_or_path)
        try:
            onnx_bytes = path.read_bytes()
        except OSError as exc:
            raise ModelError(f"model {path} cannot be read ({exc.strerror}).") from exc
        return cls.from_bytes(onnx_bytes, path)

    @classmethod
    def from_bytes(cls, onnx_bytes: bytes, path: Path) -> Model:
        """Check the bytes of an ONNX file; `path` says in messages where they came from."""
        proto = parsed(onnx_bytes, path)
        check_self_contained(proto, path)
        _check_interface(proto.graph, path)
        check_graph(proto, path)
        return cls(path, onnx_bytes, hashlib.sha256(onnx_bytes).hexdigest(), _card(proto, path))


def released_models() -> tuple[str, ...]:
    """Names of the models that came with this installation, sorted."""
    # models/teachers holds weights to train from, not models to run
    return tuple(sorted(file.parent.name for file in _models_folder().glob("*/model.onnx") if file.parent.name != "teachers"))


def _models_folder() -> Path:
    """Inside the package where it was installed, beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "models"
    return installed if installed.is_dir() else package.parent / "models"


def _find(name_or_path: str | Path) -> Path:
    if str(name_or_path) in released_models():
        return _models_folder() / name_or_path / "model.onnx"
    path = Path(name_or_path)
    if path.is_dir():
        raise ModelError(f"model {path} is a folder; give the .onnx file in it.")
    if not path.exists():
        released = ", ".join(released_models()) or "none"
        raise ModelNotFound(f"no model is called {str(name_or_path)!r} and no file is there; released models: {released}.")
    return path


def parsed(onnx_bytes: bytes, path: Path) -> ModelProto:
    """The ONNX model in `onnx_bytes`, which came from `path`; ModelError where they are none."""
    # imported here: 0.3 s that planning and scoring need not pay
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        proto = onnx.load_model_from_string(onnx_bytes)
    except DecodeError as exc:
        raise ModelError(f"{path} is not an ONNX file, or is cut short ({exc}); copy or export it again.") from exc
    if not proto.graph.node:
        raise ModelError(f"{path} is not an ONNX file: no network is in it; export one with `kdunet export`.")
    return proto


def check_self_contained(proto: ModelProto, path: Path) -> None:
    """Weights in a second file would be looked for in the current folder, whoever wrote it."""
    for tensor in _tensors(proto.graph):
        if tensor.data_location == tensor.EXTERNAL:
            raise ModelError(f"{path} keeps the weights {tensor.name!r} in another file; export it with external_data=False.")


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _tensors(inner)


def _check_interface(graph: GraphProto, path: Path) -> None:
    from onnx import TensorProto

    weights = {tensor.name for tensor in graph.initializer}  # older exporters list these among the inputs
    inputs = [value for value in graph.input if value.name not in weights]
    for what, values, name, dtype in (
        ("input", inputs, INPUT_NAME, TensorProto.UINT8),
        ("output", list(graph.output), OUTPUT_NAME, TensorProto.FLOAT),
    ):
        wanted = f"{name} {_dtype_name(dtype)} (n, 1, y, x)"
        found = ", ".join(map(signature, values)) or "nothing"
        if found != wanted:
            raise ModelError(f"{path} has the {what} {found}; a student has {wanted}: export it with `kdunet export`.")


def check_graph(proto: ModelProto, path: Path) -> None:
    """What follows relies on it: that nodes have the inputs, outputs and attributes that ONNX says, and weights can be read."""
    import onnx

    try:
        onnx.checker.check_model(proto)
        for tensor in _tensors(proto.graph):
            if tensor.data_type != tensor.UNDEFINED:  # of attributes that are no tensor
                onnx.numpy_helper.to_array(tensor)
    except Exception as exc:  # the checker is C++, and numpy_helper raises anything
        why = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
        raise ModelError(f"{path} holds a network that breaks the ONNX format ({why}); copy or export it again.") from exc


def signature(value: ValueInfoProto) -> str:
    """`image uint8 (n, 1, y, x)`, where every size that is not fixed gets its axis's letter."""
    tensor = value.type.tensor_type
    letters = ("n", "c", "y", "x") if len(tensor.shape.dim) == 4 else ("?",) * len(tensor.shape.dim)
    sizes = (
        str(dim.dim_value) if dim.HasField("dim_value") else letter
        for dim, letter in zip(tensor.shape.dim, letters, strict=True)
    )
    return f"{value.name} {_dtype_name(tensor.elem_type)} ({', '.join(sizes)})"


def _dtype_name(elem_type: int) -> str:
    from onnx import TensorProto

    names: dict[int, str] = {number: name.lower() for name, number in TensorProto.DataType.items()}
    name = names.get(elem_type, "of unknown type")
    return {"float": "float32", "double": "float64"}.get(name, name)


def _card(proto: ModelProto, path: Path) -> ModelCard:
    cards = [prop.value for prop in proto.metadata_props if prop.key == METADATA_KEY]
    if not cards:
        raise ModelError(f"{path} has no model card ({METADATA_KEY!r} in its metadata); export it with `kdunet export`.")
    try:
        return ModelCard.from_json(cards[0])
    except ModelCardError as exc:
        raise ModelCardError(f"{path}: {exc}") from exc
