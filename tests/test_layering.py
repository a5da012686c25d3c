"""Who may import whom: lightness and layers are tests, not intentions."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdunet_infer

PACKAGE = Path(kdunet_infer.__file__).parent
HEAVY = {
    "torch",
    "onnx",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "numba",
    "zarr",
    "tifffile",
    "dask",
    "distributed",
    "click",
    "PIL",
    "cc3d",
    "h5py",
    "mrcfile",
    "llvmlite",
}
PLANNING = ("errors", "geometry", "mirror", "card", "plan", "blockwise", "model", "engines", "testing")


def imported(source: str) -> set[str]:
    """Every module that `source` imports, anywhere in it."""

    def names() -> Iterator[str]:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module or ""
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    return set(names())


def importers(library: str) -> set[str]:
    """Files of the package, relative to it, that import `library` or a part of it."""
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name == library or name.startswith(f"{library}.") for name in imported(path.read_text()))
    }


def test_the_check_finds_imports_wherever_they_stand() -> None:
    assert imported("import a.b\ndef f():\n    from c import d\n    from . import e\n") == {"a.b", "c", "c.d"}
    assert {"mirror.py", "plan.py"} <= importers("kdunet_infer.geometry")


@pytest.mark.parametrize("modules", [(), PLANNING], ids=["package", "planning"])
def test_import_is_light(modules: tuple[str, ...]) -> None:
    code = "; ".join(["import sys, kdunet_infer", *(f"import kdunet_infer.{m}" for m in modules), "print(*sys.modules)"])
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not HEAVY & set(out.split())


@pytest.mark.parametrize("library", ["torch", "kdunet", "pytest"])
def test_deployment_never_imports(library: str) -> None:
    assert importers(library) == set()


@pytest.mark.parametrize("library", ["zarr", "tifffile", "h5py", "mrcfile"])
def test_only_volumes_know_file_formats(library: str) -> None:
    assert importers(library)
    assert not [path for path in importers(library) if not path.startswith("volume/")]


@pytest.mark.parametrize(
    ("library", "file"),
    [
        ("onnxruntime", "engines/onnxruntime.py"),
        ("openvino", "engines/openvino.py"),
        ("h5py", "volume/hdf5.py"),
        ("mrcfile", "volume/mrc.py"),
        ("cc3d", "components.py"),
    ],
)
def test_one_file_knows_each_of_these(library: str, file: str) -> None:
    assert importers(library) == {file}


def test_volumes_are_read_without_what_only_some_formats_need() -> None:
    code = "import sys, kdunet_infer.run, kdunet_infer.volume; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"h5py", "mrcfile", "torch", "onnxruntime", "openvino", "click"} & set(out.split())


def test_help_waits_for_nothing_heavy() -> None:
    code = "import sys, kdunet_infer.cli; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not (HEAVY - {"click"} | {"numpy"}) & set(out.split())


@pytest.mark.parametrize(
    ("module", "must_not_know"),
    [
        ("errors.py", ["numpy", "kdunet_infer"]),
        ("geometry.py", ["numpy", "kdunet_infer.card", "kdunet_infer.plan"]),
        ("mirror.py", ["kdunet_infer.plan", "kdunet_infer.engines", "kdunet_infer.volume"]),
        ("card.py", ["numpy", "onnx", "kdunet_infer.plan", "kdunet_infer.volume"]),
        ("plan.py", ["numpy", "kdunet_infer.engines", "kdunet_infer.volume", "pathlib", "os"]),
        (
            "blockwise.py",
            ["dask", "click", "pathlib", "os", "kdunet_infer.engines", "kdunet_infer.volume", "kdunet_infer.model"],
        ),
        ("model.py", ["numpy", "kdunet_infer.engines", "kdunet_infer.volume", "kdunet_infer.plan"]),
        ("intensity.py", ["kdunet_infer.volume", "kdunet_infer.plan", "kdunet_infer.engines"]),
        ("grey_sample.py", ["kdunet_infer.card", "kdunet_infer.intensity", "kdunet_infer.volume"]),
        ("fitness.py", ["kdunet_infer.volume", "kdunet_infer.engines", "pathlib", "os"]),
        ("components.py", ["kdunet_infer.volume", "kdunet_infer.model", "pathlib", "os"]),
        ("cleaning.py", ["cc3d", "kdunet_infer.volume", "kdunet_infer.model", "pathlib", "os"]),
        ("boundary.py", ["kdunet_infer.volume", "kdunet_infer.metrics"]),
        ("metrics.py", ["kdunet_infer.model", "kdunet_infer.engines", "kdunet_infer.volume"]),
        ("options.py", ["kdunet_infer.engines", "kdunet_infer.model", "click"]),
        ("outputs.py", ["kdunet_infer.engines", "kdunet_infer.plan", "kdunet_infer.blockwise"]),
        ("job.py", ["click", "kdunet_infer.run", "kdunet_infer.cleaning"]),
        ("run.py", ["click", "kdunet_infer.engines", "kdunet_infer.intensity"]),
        ("forecast.py", ["kdunet_infer.run", "click"]),
        ("preview.py", ["kdunet_infer.run", "click"]),
        ("summaries.py", ["click", "json"]),
        ("arguments.py", ["numpy", "kdunet_infer.volume"]),
        ("engines/onnxruntime.py", ["kdunet_infer.volume", "kdunet_infer.plan"]),
    ],
)
def test_layers(module: str, must_not_know: list[str]) -> None:
    assert [name for name in must_not_know if module in importers(name)] == []


def test_training_starts_on_a_bare_machine() -> None:
    """With torch, numpy, tifffile, safetensors, click and Fabric only, as on a borrowed GPU."""
    absent = ("zarr", "onnx", "onnxruntime", "onnxscript", "PIL", "imagecodecs", "scipy")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import kdunet.fit, kdunet.cli, kdunet.evaluate"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_what_the_package_offers_is_there() -> None:
    assert set(kdunet_infer.__all__) == set(kdunet_infer._HOME)
    for name in kdunet_infer.__all__:
        assert getattr(kdunet_infer, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kdunet_infer.nothing  # noqa: B018
