"""Labels and outputs as napari shows them, by its plugin napari-ome-zarr: what layer, of what shape, with which scale.

Run by `make test-napari` in an environment of its own: napari takes 320 MB, and its pytest plugins raise deprecation warnings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_volume_targets import CHUNK, KINDS, MASK, VOXELS, finished_label, write_all
from volume_files import write_image

from kdunet_infer.volume import TargetFormat, create_image, open_source

pytestmark = [pytest.mark.napari, pytest.mark.filterwarnings("default")]


def layers(path: Path) -> list[tuple[Any, dict[str, Any], str]]:
    """(levels, how they are shown, kind) of each layer."""
    from napari_ome_zarr import napari_get_reader

    reader = napari_get_reader(str(path))
    assert reader is not None
    return list(reader(str(path)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_is_shown_with_its_image(tmp_path: Path, kind: str) -> None:
    path = KINDS[kind](tmp_path / "v.zarr")
    finished_label(open_source(path))
    (_, image, image_kind), (levels, label, label_kind) = layers(path)
    assert (image_kind, label_kind) == ("image", "labels")
    np.testing.assert_array_equal(np.asarray(levels[0]), MASK)
    source = open_source(path)
    assert [np.shape(level) for level in levels] == [level.shape for level in source.layout.levels]
    if "shared" not in kind:  # the plugin leaves out what all levels share, and the label has it folded in
        assert list(label["scale"]) == list(image["scale"])[-3:]


@pytest.mark.parametrize("target_format", ["ome-zarr-0.5", "ome-zarr-0.4"])
def test_an_output_is_shown(tmp_path: Path, target_format: TargetFormat) -> None:
    image = write_image(tmp_path / "v.zarr", [VOXELS], chunk=CHUNK, scales=[(40, 4, 5)])
    for content, voxels, kind in (("mask", MASK, "labels"), ("image", VOXELS, "image")):
        target = create_image(tmp_path / f"{kind}.zarr", like=open_source(image), content=content, target_format=target_format)
        write_all(target, voxels)
        target.finish({})
        ((levels, shown, found),) = layers(target.path)
        assert found == kind
        assert list(shown["scale"]) == [40, 4, 5]
        np.testing.assert_array_equal(np.asarray(levels[0]), voxels)
