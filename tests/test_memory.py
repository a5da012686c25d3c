"""Peak memory of whole runs, measured from outside: below what was foretold, and the same for a volume eight times as large."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper
from volume_files import write_image

from kdunet_infer.card import ModelCard
from kdunet_infer.model import Model

SMALL, LARGE = (32, 512, 512), (64, 1024, 1024)
MARGIN = 48 * 2**20
"""Bytes; the large volume holds 128 MiB of grey values and 64 MiB of mask."""

MEASURE = """
import json, resource, sys
import numpy as np
import cc3d, tifffile, zarr
from kdunet_infer import forecast, job
from kdunet_infer.engines import create_engine
from kdunet_infer.model import Model
from kdunet_infer.run import SegmentOptions, segment

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

volume, out, model, options = sys.argv[1], sys.argv[2], Model.load(sys.argv[3]), json.loads(sys.argv[4])
options["block_shape"] = tuple(options["block_shape"])
chosen = SegmentOptions(engine="onnxruntime", device="cpu", n_threads=1, **options)
create_engine("onnxruntime", model, device="cpu", n_threads=1).infer(np.zeros((1, 64, 64), np.uint8))
began = peak()
foretold = forecast.working_bytes(job.prepare(volume, out, model, chosen))
segment(volume, out, model, chosen)
print(json.dumps({"foretold": foretold, "taken": peak() - began}))
"""


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, int], Path]:
    folder = tmp_path_factory.mktemp("volumes")
    return {shape: write_image(folder / f"{shape[0]}.zarr", [grey(shape)], chunk=(16, 128, 128)) for shape in (SMALL, LARGE)}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.onnx"
    path.write_bytes(with_width(model, 2))
    return path


def grey(shape: tuple[int, int, int]) -> npt.NDArray[np.uint16]:
    """Smooth in x, so that it is read quickly; its slices differ."""
    z, _, x = shape
    ramp = np.arange(x, dtype=np.uint16) % 251 + 16 * (np.arange(z, dtype=np.uint16)[:, None, None] % 7)
    return np.broadcast_to(ramp, shape)


def with_width(model: Model, width: int) -> bytes:
    """The model with a card that says what was built."""
    proto = onnx.load_model_from_string(model.onnx_bytes)
    card: ModelCard = dataclasses.replace(model.card, architecture={"kind": "unet", "levels": 2, "width": width})
    helper.set_model_props(proto, {"kdunet": card.to_json()})
    whole: bytes = proto.SerializeToString()
    return whole


def measured(volume: Path, out: Path, model_file: Path, **options: Any) -> dict[str, int]:
    command = [sys.executable, "-c", MEASURE, str(volume), str(out), str(model_file), json.dumps(options)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    found: dict[str, int] = json.loads(finished.stdout)
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell the peak of a process")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("out.zarr", {"block_shape": (16, 256, 256)}),
        ("out.tif", {"block_shape": (8, 512, 512), "min_size": 50}),
    ],
    ids=["plain", "cleaned-tiff"],
)
def test_memory_is_below_the_forecast_and_does_not_grow_with_the_volume(
    volumes: dict[tuple[int, int, int], Path], model_file: Path, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    small, large = (
        measured(volumes[shape], tmp_path / str(shape[0]) / name, model_file, **options) for shape in (SMALL, LARGE)
    )
    assert small["taken"] < small["foretold"]
    assert large["taken"] < large["foretold"]
    assert large["taken"] - small["taken"] < MARGIN
