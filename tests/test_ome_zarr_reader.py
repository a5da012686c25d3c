"""Labels and outputs as the reader of the OME-Zarr library finds them, which many viewers' plugins read with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from ome_zarr.io import parse_url
from ome_zarr.reader import Label, Node, Reader
from test_volume_targets import CHUNK, KINDS, MASK, VOXELS, finished_label, three_levels, write_all
from volume_files import write_image

from kdunet_infer.volume import TargetFormat, create_image, create_label, open_source


def nodes(path: Path) -> list[Node]:
    """What the reader shows of a path: images, then their labels."""
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        location = parse_url(str(path))
        assert location is not None
        return [node for node in Reader(location)() if node.data]


def is_label(node: Node) -> bool:
    return any(isinstance(spec, Label) for spec in node.specs)


def levels_of(node: Node) -> list[npt.NDArray[Any]]:
    return [np.asarray(level) for level in node.data]


def transforms_of(node: Node) -> Any:
    return node.metadata["coordinateTransformations"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_consolidated", [False, True], ids=["plain", "consolidated"])
def test_a_label_is_found_from_its_image(tmp_path: Path, kind: str, is_consolidated: bool) -> None:
    path = KINDS[kind](tmp_path / "v.zarr")
    if is_consolidated:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # for v3 it is not in the specification
            zarr.consolidate_metadata(str(path))
    label_path = finished_label(open_source(path))
    image, label = nodes(path)
    assert not is_label(image)
    assert is_label(label)
    assert label.zarr.basename() == "mito"
    assert [level.shape for level in levels_of(label)] == [level.shape[-3:] for level in levels_of(image)]
    np.testing.assert_array_equal(levels_of(label)[0], MASK)
    for index, level in enumerate(levels_of(label)):
        np.testing.assert_array_equal(level, zarr.open_array(str(label_path / str(index)), mode="r")[...])
    if "shared" not in kind:  # the reader leaves out what all levels share, and the label has none of it
        own = [[{**step, step["type"]: step[step["type"]][-3:]} for step in steps] for steps in transforms_of(image)]
        assert transforms_of(label) == own


@pytest.mark.parametrize("target_format", ["ome-zarr-0.5", "ome-zarr-0.4"])
@pytest.mark.parametrize("content", ["mask", "image"])
@pytest.mark.parametrize("n_levels", [1, 5])
def test_an_output_is_read_with_all_its_levels(
    tmp_path: Path, target_format: TargetFormat, content: Literal["mask", "image"], n_levels: int
) -> None:
    levels = [VOXELS[:: 2**index, :: 2**index, :: 2**index] for index in range(n_levels)]
    scales = [(40 * 2**index, 4 * 2**index, 5 * 2**index) for index in range(n_levels)]
    offsets = [tuple((2**index - 1) / 2 * size for size in scales[0]) for index in range(n_levels)]
    image = write_image(tmp_path / "v.zarr", levels, chunk=CHUNK, scales=scales, translations=offsets)
    target = create_image(tmp_path / "out.zarr", like=open_source(image), content=content, target_format=target_format)
    write_all(target, MASK if content == "mask" else VOXELS)
    target.finish({})
    (found,) = nodes(target.path)
    assert is_label(found) == (content == "mask")
    assert [level.shape for level in levels_of(found)] == [level.shape for level in levels]
    np.testing.assert_array_equal(levels_of(found)[0], MASK if content == "mask" else VOXELS)
    assert [steps[0]["scale"] for steps in transforms_of(found)] == [list(scale) for scale in scales]


def test_an_unfinished_label_is_not_found(tmp_path: Path) -> None:
    path = three_levels(tmp_path / "v.zarr")
    finished_label(open_source(path), "done")
    write_all(create_label(open_source(path), "mito"))
    assert [node.zarr.basename() for node in nodes(path)[1:]] == ["done"]
