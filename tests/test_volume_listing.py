"""Labels where viewers look for them: the list, and consolidated metadata as zarr itself would make them anew."""

from __future__ import annotations

import errno
import fcntl
import json
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import zarr
from volume_files import hashes, write_image

from kdunet_infer.errors import VolumeError
from kdunet_infer.geometry import Box
from kdunet_infer.testing import noise
from kdunet_infer.volume import create_label, create_volume, open_source
from kdunet_infer.volume.listing import _names
from kdunet_infer.volume.locking import LOCK_NAME, locked

Version = Literal["0.4", "0.5"]
VOXELS = noise((16, 16, 16))
MASK = (VOXELS > 128).astype(np.uint8)


def an_image(path: Path, version: Version = "0.5") -> Path:
    return write_image(path, [VOXELS], version=version, chunk=(16, 16, 16))


def finished_label(image: Path, name: str = "mito", **options: Any) -> Path:
    target = create_label(open_source(image), name, **options)
    target.write_box(Box.of_shape(target.shape), MASK)
    target.finish({})
    return target.path


def listed(image: Path) -> list[str]:
    attributes = zarr.open_group(str(image / "labels"), mode="r", use_consolidated=False).attrs.asdict()
    return cast("list[str]", attributes.get("ome", attributes)["labels"])


def consolidate(path: Path) -> None:
    with warnings.catch_warnings(category=UserWarning, action="ignore"):  # for v3 there is no word on it in the specification
        zarr.consolidate_metadata(str(path))


def copy_in(path: Path) -> dict[str, Any]:
    """The consolidated metadata in a group, without the formatting."""
    if (path / ".zmetadata").exists():
        found = cast("dict[str, Any]", json.loads((path / ".zmetadata").read_text()))
        for key, entry in found["metadata"].items():
            if key.endswith(".zgroup"):
                entry.pop("consolidated_metadata", None)  # zarr 3 adds this; the documents themselves and zarr 2 do not
        return found
    return cast("dict[str, Any]", json.loads((path / "zarr.json").read_text())["consolidated_metadata"])


def through_copy(root: Path, path: str) -> zarr.Array[Any] | zarr.Group:
    """What a reader finds that trusts the consolidated metadata at `root`."""
    return zarr.open_group(str(root), mode="r", use_consolidated=True)[path]


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("root", [".", "v.zarr", "v.zarr/labels"], ids=["container", "image", "labels"])
def test_a_copy_of_the_metadata_says_what_a_new_one_would(tmp_path: Path, version: Version, root: str) -> None:
    zarr.create_group(str(tmp_path / "all.zarr"), zarr_format=2 if version == "0.4" else 3)
    image = an_image(tmp_path / "all.zarr" / "v.zarr", version)
    an_image(tmp_path / "all.zarr" / "other.zarr", version)
    finished_label(image, "first")
    root_path = (tmp_path / "all.zarr" / root).resolve()
    consolidate(root_path)
    finished_label(image, "mito")
    found = copy_in(root_path)
    array = through_copy(root_path, (image / "labels/mito/0").relative_to(root_path).as_posix())
    np.testing.assert_array_equal(cast("zarr.Array[Any]", array)[...], MASK)
    consolidate(root_path)
    assert found == copy_in(root_path)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_label_that_is_started_over_is_in_no_copy(tmp_path: Path, version: Version) -> None:
    image = an_image(tmp_path / "v.zarr", version)
    for name in ("mito", "mitochondria"):
        finished_label(image, name)
    consolidate(image)
    create_label(open_source(image), "mito", overwrite=True)
    assert "mito" not in cast("zarr.Group", through_copy(image, "labels"))
    assert cast("zarr.Array[Any]", through_copy(image, "labels/mitochondria/0")).shape == MASK.shape
    attributes = through_copy(image, "labels").attrs.asdict()
    assert attributes.get("ome", attributes)["labels"] == ["mitochondria"]


def test_what_a_copy_says_of_others_stays_as_it_is(tmp_path: Path) -> None:
    image = an_image(tmp_path / "v.zarr", "0.4")
    consolidate(image)
    file = image / ".zmetadata"
    document = json.loads(file.read_text())
    document["metadata"]["s0/.zattrs"] = {"odd": [1, None, {"note": "é"}]}  # of a zarr that is not ours
    document["theirs"] = True
    file.write_text(json.dumps(document))
    finished_label(image)
    found = json.loads(file.read_text())
    assert found["theirs"] is True
    assert {key: found["metadata"][key] for key in document["metadata"]} == document["metadata"]


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_no_copy_is_made_where_there_is_none(tmp_path: Path, version: Version) -> None:
    image = an_image(tmp_path / "v.zarr", version)
    before = hashes(image)
    finished_label(image)
    assert {name: digest for name, digest in hashes(image).items() if not name.startswith("labels/")} == before


def test_a_broken_copy_is_named_and_the_label_stays_unfinished(tmp_path: Path) -> None:
    image = an_image(tmp_path / "v.zarr", "0.4")
    target = create_label(open_source(image), "mito")
    (image / ".zmetadata").write_text("{")
    with pytest.raises(
        VolumeError, match=r"\.zmetadata is no JSON document \(.*\); restore it, or remove it if it is \.zmetadata"
    ):
        target.finish({})
    assert json.loads((target.path / ".zattrs").read_text()) == {"kdunet": {"state": "unfinished"}}
    assert [file.name for file in (image / "labels").iterdir()] == ["mito"]
    (image / ".zmetadata").unlink()
    target.finish({})
    assert listed(image) == ["mito"]


# --- one writer at a time


def test_labels_that_finish_at_once_are_all_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = an_image(tmp_path / "v.zarr")
    targets = [create_label(open_source(image), f"label{index}") for index in range(6)]

    def slow(*where: Any) -> list[str]:
        names = _names(*where)
        time.sleep(0.05)  # what others list meanwhile would be lost
        return names

    monkeypatch.setattr("kdunet_infer.volume.listing._names", slow)
    with ThreadPoolExecutor(len(targets)) as pool:
        list(pool.map(lambda target: target.finish({}), targets))
    assert sorted(listed(image)) == [target.name for target in targets]
    assert not list(image.rglob(LOCK_NAME))


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that holds the lock of the folder."""
    code = f"""
import time
from pathlib import Path
from kdunet_infer.volume.locking import locked
with locked(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_that_does_not_come_free_is_named(tmp_path: Path, holder: Any) -> None:
    says = r"another process has held .*\.kdunet\.lock for 0 s; wait for it or end it, then run the command again"
    with pytest.raises(VolumeError, match=says), locked(tmp_path, timeout_s=0.1):
        raise AssertionError("held by two")
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK_NAME).exists()
    with locked(tmp_path, timeout_s=1):  # nobody is locked out by what a killed process leaves
        pass
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_left_lock_is_no_label_of_others(tmp_path: Path) -> None:
    create_volume(tmp_path / "v.zarr", (16, 16, 16), chunk_shape=(16, 16, 16)).finish({})
    finished_label(tmp_path / "v.zarr")
    (tmp_path / "v.zarr" / "labels" / LOCK_NAME).write_text("")
    create_volume(tmp_path / "v.zarr", (16, 16, 16), chunk_shape=(16, 16, 16), overwrite=True)
    assert not (tmp_path / "v.zarr" / "labels").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="locks are of another kind there")
def test_a_file_system_without_locks_goes_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(code, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    code = errno.ENOSYS
    with locked(tmp_path):
        pass
    code = errno.EIO
    with pytest.raises(OSError, match="not implemented"), locked(tmp_path):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="locks are of another kind there")
def test_a_lock_on_a_file_that_its_holder_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        (tmp_path / LOCK_NAME).unlink()  # by the holder, after it was opened here
        really(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", late)
    with locked(tmp_path):
        assert (tmp_path / LOCK_NAME).exists()
        with pytest.raises(VolumeError, match="another process"), locked(tmp_path, timeout_s=0):
            raise AssertionError("held by two")
