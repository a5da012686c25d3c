"""Signals that ask a run to stop where it can go on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_BY_SIGNAL = {"SIGINT": 130, "SIGTERM": 143}
"""Exit codes of a command that was stopped and can go on."""


@contextlib.contextmanager
def stop_requests() -> Iterator[list[str]]:
    """A list that gets the name of a signal; a second Ctrl-C interrupts at once. Only the main thread can catch signals."""
    caught: list[str] = []

    def remember(number: int, _: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
