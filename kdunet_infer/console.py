"""What both commands share: one sentence instead of a traceback, a progress bar that is silent in a pipe, help by sections."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from kdunet_infer.errors import KdunetError

INTERRUPTED = 130
HELP_WIDTH = 110
"""Columns, where the terminal has them: most options then take one line."""


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


class SectionOption(click.Option):
    """An option that the help shows below a heading."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionCommand(click.Command):
    """A command with many options: its help shows them by section, in the order in which sections first come."""

    def __init__(self, name: str | None, **kwargs: Any) -> None:
        super().__init__(name, **{"context_settings": {"max_content_width": HELP_WIDTH}} | kwargs)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options; those without a section go last."""
        sections: dict[str, list[tuple[str, str]]] = {}
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        for option in sorted(options, key=lambda option: not hasattr(option, "section")):
            if (record := option.get_help_record(ctx)) is not None:
                sections.setdefault(getattr(option, "section", "Other"), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


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
