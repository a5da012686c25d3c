"""A disk that is full or read-only, from any write on: one sentence, nothing that looks finished, and then a run that works."""

from __future__ import annotations

import asyncio
import builtins
import errno
import io
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
import zarr.core.sync
from test_volume_targets import MASK, SHAPE, VOXELS, WHOLE, validated, write_all
from volume_files import halved, hashes, write_image

from kdunet_infer.errors import TargetExists, VolumeError
from kdunet_infer.volume import TargetFormat, VolumeTarget, create_image, create_label, open_labels, open_source

SENTENCES = {
    errno.ENOSPC: r"cannot be written, for the disk is full \(.*No space left.*\); free space there or choose another output",
    errno.EROFS: r"cannot be written, for that is not allowed there \(.*Read-only.*\); get permission or choose another output",
    errno.EACCES: r"cannot be written, for that is not allowed there \(.*Permission denied.*\); get permission or choose",
    errno.EIO: r"cannot be written \(.*Input/output error.*\); check free space and permissions",
}


class Disk:
    """Stands in for the system's calls that write: from number `last` on, each fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        self.code, self.n_writes, self.last = code, 0, 10**9
        self._lock = threading.Lock()
        for where, name in ((io, "open"), (builtins, "open")):
            really = getattr(where, name)
            target = tifffile.tifffile if where is builtins else where
            monkeypatch.setattr(target, name, self._guarded(really, lambda *a, **k: _is_to_write(*a, **k)), raising=False)
        for name in ("replace", "mkdir", "fsync"):
            monkeypatch.setattr(os, name, self._guarded(getattr(os, name), lambda *a, **k: True))

    def _guarded(self, really: Callable[..., Any], is_write: Callable[..., bool]) -> Callable[..., Any]:
        def guarded(*args: Any, **options: Any) -> Any:
            if is_write(*args, **options):
                with self._lock:
                    self.n_writes += 1
                    if self.n_writes >= self.last:
                        raise OSError(self.code, os.strerror(self.code))
            return really(*args, **options)

        return guarded

    @contextmanager
    def failing_from(self, n: int) -> Iterator[None]:
        self.n_writes, self.last = 0, n
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(_others_done(), zarr.core.sync._get_loop()).result()
            self.last = 10**9


async def _others_done() -> None:
    """What zarr still writes after the first write that failed; the end of the process would stop it."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)


def _is_to_write(file: Any, mode: str = "r", *rest: Any, **options: Any) -> bool:
    return not set(mode).isdisjoint("wxa+")


def a_label(folder: Path) -> VolumeTarget:
    return create_label(open_source(folder / "v.zarr"), "mito")


def an_output(target_format: TargetFormat) -> Callable[[Path], VolumeTarget]:
    name = "out.tif" if target_format == "tiff" else "out.zarr"
    return lambda folder: create_image(
        folder / name, like=open_source(folder / "v.zarr"), content="mask", target_format=target_format
    )


def run(create: Callable[[Path], VolumeTarget], folder: Path) -> VolumeTarget:
    target = create(folder)
    write_all(target)
    target.finish({"model": "m"})
    return target


def looks_finished(folder: Path) -> bool:
    """Whether anybody would take an output in the folder for one that is there."""
    if (folder / "out.tif").exists() or any((folder / "v.zarr/labels" / name).exists() for name in ("zarr.json", ".zattrs")):
        return True
    for path in (folder / "v.zarr" / "labels" / "mito", folder / "out.zarr"):
        if any((path / name).exists() for name in ("zarr.json", ".zgroup")):
            attributes = zarr.open(str(path), mode="r").attrs.asdict()
            if attributes not in ({}, {"kdunet": {"state": "unfinished"}}):
                return True
    return False


def clean(folder: Path) -> None:
    """Remove all but the image."""
    for path in (folder / "v.zarr" / "labels", folder / "out.zarr", folder / ".out.tif.kdunet"):
        shutil.rmtree(path, ignore_errors=True)
    (folder / "out.tif").unlink(missing_ok=True)


CREATORS = {"label-0.5": a_label, "label-0.4": a_label} | {
    name: an_output(name) for name in ("ome-zarr-0.5", "ome-zarr-0.4", "zarr", "tiff")
}


@pytest.fixture
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An image of two levels of one chunk each, in the version that the test's `kind` asks for."""
    kind = request.node.callspec.params["kind"]
    return write_image(
        tmp_path / "v.zarr",
        [VOXELS, halved(VOXELS)],
        version="0.4" if kind == "label-0.4" else "0.5",
        chunk=SHAPE,
        scales=[(40, 4, 4), (80, 8, 8)],
    )


def n_writes_of(disk: Disk, create: Callable[[Path], VolumeTarget], folder: Path) -> int:
    with disk.failing_from(10**9):
        run(create, folder)
        return disk.n_writes


@pytest.mark.parametrize("kind", ["label-0.4", "label-0.5", "zarr", "tiff"])
def test_a_disk_that_is_full_from_any_write_on(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    before = hashes(image)
    disk = Disk(monkeypatch, errno.ENOSPC)
    n_writes = n_writes_of(disk, CREATORS[kind], tmp_path)
    assert n_writes > 10
    for n in (*range(1, 6), *range(6, n_writes - 6, 4), *range(n_writes - 6, n_writes + 1)):
        clean(tmp_path)
        with disk.failing_from(n), pytest.raises(VolumeError, match=SENTENCES[errno.ENOSPC]):
            run(CREATORS[kind], tmp_path)
        assert {name: digest for name, digest in hashes(image).items() if name in before} == before
        if looks_finished(tmp_path):  # only where a rename of a label's metadata failed, after all was written
            assert kind.startswith("label"), f"write {n} of {n_writes}"
            assert n > n_writes - 3
            with pytest.raises(TargetExists):  # and then it is, and the next run lists it
                run(CREATORS[kind], tmp_path)
            np.testing.assert_array_equal(open_labels(image / "labels" / "mito").read(WHOLE), MASK)
        else:
            np.testing.assert_array_equal(run(CREATORS[kind], tmp_path).result().read(WHOLE), MASK)
        assert validated(image) == (["mito"] if kind.startswith("label") else [])
    assert not [path for path in image.rglob("*") if path.name.endswith((".partial", ".lock"))]


@pytest.mark.parametrize("kind", ["ome-zarr-0.5", "ome-zarr-0.4"])
@pytest.mark.parametrize("code", SENTENCES, ids=[errno.errorcode[code] for code in SENTENCES])
def test_why_a_disk_refuses_is_said(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch, kind: str, code: int) -> None:
    disk = Disk(monkeypatch, code)
    n_writes = n_writes_of(disk, CREATORS[kind], tmp_path)
    for n in (1, n_writes // 2, n_writes):  # as it is created, as voxels are written, as it is finished
        clean(tmp_path)
        with disk.failing_from(n), pytest.raises(VolumeError, match=SENTENCES[code] + r".*, then run the same command again"):
            run(CREATORS[kind], tmp_path)


def test_what_zarr_writes_to_is_what_the_stand_in_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, errno.EIO)
    with disk.failing_from(1), pytest.raises(OSError, match="Input/output"):
        zarr.create_array(str(tmp_path / "a.zarr"), data=VOXELS)
    with disk.failing_from(1), pytest.raises(OSError, match="Input/output"):
        tifffile.imwrite(tmp_path / "a.tif", VOXELS, photometric="minisblack")
    assert list(tmp_path.iterdir()) == []
