"""Zip files that hold Zarr: a path may go on into one as into a folder. What zipfile raises ends here."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from zarr.storage import ZipStore

from kdunet_infer.errors import VolumeError


@dataclass(frozen=True, slots=True)
class Archive:
    """An open zip file, read-only; paths of what is in it begin with its own."""

    path: Path
    """Absolute."""
    store: ZipStore
    files: frozenset[str]

    def key(self, path: Path) -> str:
        """`path` as a key of the store; empty for the zip file itself."""
        key = Path(os.path.abspath(path)).relative_to(self.path).as_posix()
        return "" if key == "." else key

    def has_file(self, path: Path) -> bool:
        """Whether it holds a file at `path`."""
        return self.key(path) in self.files

    def has(self, path: Path) -> bool:
        """Whether it holds a file or folder at `path`."""
        key = self.key(path)
        return not key or key in self.files or any(name.startswith(f"{key}/") for name in self.files)

    def names_in(self, path: Path) -> frozenset[str]:
        """Names of the files and folders in the folder `path`."""
        return frozenset(key.split("/")[0] for key in self.keys_below(path))

    def keys_below(self, path: Path) -> Iterator[str]:
        """Paths, relative to the folder `path`, of all files in it and its folders."""
        key = self.key(path)
        prefix = f"{key}/" if key else ""
        return (name[len(prefix) :] for name in self.files if name.startswith(prefix))

    def read(self, path: Path) -> bytes:
        """The content of a file. Raises FileNotFoundError."""
        if not self.has_file(path):
            raise FileNotFoundError(path)
        with zipfile.ZipFile(self.path) as file:
            return file.read(self.key(path))


def archive_of(path: Path) -> Archive | None:
    """The zip file that `path` is, or lies in; None for other paths.

    Raises VolumeError for a zip file that cannot be read.
    """
    for zip_path in (path, *path.parents):
        if zip_path.suffix.lower() == ".zip" and os.path.isfile(zip_path):
            try:
                state = os.stat(zip_path)
                return _opened(Path(os.path.abspath(zip_path)), state.st_mtime_ns, state.st_size)
            except Exception as exc:
                raise VolumeError(f"{zip_path} cannot be read as a zip file ({exc}); copy it again or save it anew.") from exc
    return None


@lru_cache(maxsize=8)  # the list of a million files takes seconds to read, and every node asks for it
def _opened(path: Path, mtime_ns: int, size: int) -> Archive:
    with zipfile.ZipFile(path) as file:
        files = frozenset(file.namelist())
    return Archive(path, ZipStore(path, mode="r", read_only=True), files)
