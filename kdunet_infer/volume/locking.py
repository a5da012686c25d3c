"""One writer at a time in a folder, among the processes of a machine. Knows files; no Zarr, no labels."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kdunet_infer.errors import VolumeError

if sys.platform != "win32":
    import fcntl

LOCK_NAME = ".kdunet.lock"
TIMEOUT_S = 60.0
"""The lock is held while a few small documents are written, so a longer wait means that something hangs."""
_POLL_S = 0.02
_NO_LOCKS_HERE = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def locked(folder: Path, *, timeout_s: float = TIMEOUT_S) -> Iterator[None]:
    """Hold the folder's lock. The system lets go of it when the process dies, so a lock that was left behind locks nobody out.

    On a file system without locks (some clusters') there is none. Raises VolumeError where another process holds it for
    longer than `timeout_s`, OSError where the disk refuses.
    """
    path = folder / LOCK_NAME
    descriptor = _acquire(path, timeout_s)
    try:
        yield
    finally:
        if sys.platform != "win32":  # there, the file goes with its last descriptor
            with suppress(FileNotFoundError):
                path.unlink()  # before letting go: whoever gets the lock next sees that its file is gone, and makes a new one
        os.close(descriptor)


def _acquire(path: Path, timeout_s: float) -> int:
    deadline = time.monotonic() + timeout_s
    while (descriptor := _try(path)) is None:
        if time.monotonic() > deadline:
            raise VolumeError(
                f"another process has held {path} for {timeout_s:.0f} s; wait for it or end it, then run the command again."
            )
        time.sleep(_POLL_S)
    return descriptor


if sys.platform == "win32":

    def _try(path: Path) -> int | None:
        try:
            return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_TEMPORARY)
        except (FileExistsError, PermissionError):  # the latter while the file of the last holder goes away
            return None

else:

    def _try(path: Path) -> int | None:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            if _flock(descriptor) and _is_still(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _flock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as exc:
            if exc.errno not in _NO_LOCKS_HERE:
                raise
        return True

    def _is_still(path: Path, descriptor: int) -> bool:
        """Whether the descriptor is of the file at `path`, not of one that its holder removed in the meantime."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(descriptor))
        except FileNotFoundError:
            return False
