"""What both commands share: one sentence instead of a traceback, and a progress bar that is silent in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from kdunet_infer.errors import KdunetError

INTERRUPTED = 130


class SentenceGroup(click.Group):
    """A group of commands whose KdunetErrors end as one sentence on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KdunetError as exc:
            # a note says where in a long run it happened
            raise click.ClickException("\n".join([str(exc), *getattr(exc, "__notes__", [])])) from exc
        except ModuleNotFoundError as exc:  # what only one command needs, such as the exporter's onnxscript
            if (exc.name or "").startswith("kdunet"):
                raise
            raise click.ClickException(f"this needs {exc.name!r}: pip install 'kdunet[train,cpu]'.") from exc
        except KeyboardInterrupt:
            click.echo("\nstopped.", err=True)
            ctx.exit(INTERRUPTED)


@contextmanager
def progress_bar(length: int, label: str) -> Iterator[Callable[[int, str], None]]:
    """A bar on stderr; yields a function of (how much is done, what to show beside it). Silent where stderr is no terminal."""
    with click.progressbar(
        length=length, label=label, item_show_func=lambda shown: shown, file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as bar:
        yield lambda done, shown: bar.update(done - bar.pos, shown)


@contextmanager
def voxel_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for `progress(done, of)` callbacks in voxels, with Mvox/s and the time left."""
    began = time.perf_counter()
    with progress_bar(1000, label) as show:
        yield lambda done, of: show(1000 * done // of, f"{done / (time.perf_counter() - began) / 1e6:.2f} Mvox/s")
