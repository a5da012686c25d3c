"""What a user types for boxes and numbers, as click parameter types; a text that is none is a usage error."""

from __future__ import annotations

import re
from typing import Any

import click

from kdunet_infer.geometry import OpenBox

_RANGE = re.compile(r"\s*(\d*)\s*:\s*(\d*)\s*")


class Integers(click.ParamType[Any]):
    """Comma-separated positive integers, as many as `axes` has letters: `64,512,512` -> (64, 512, 512)."""

    def __init__(self, axes: str) -> None:
        self.axes = axes
        self.name = ",".join(axes)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of integers."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if len(parts) != len(self.axes) or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not {len(self.axes)} positive integers {self.name}, such as 64,512,512.", param, ctx)
        return tuple(map(int, parts))


class Numbers(click.ParamType[Any]):
    """Comma-separated numbers: `-100,2.5e3` -> (-100.0, 2500.0); which can be is for the options to say."""

    def __init__(self, names: str, example: str) -> None:
        self.name = names
        self.example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of floats."""
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        n_wanted = self.name.count(",") + 1
        if len(numbers) != n_wanted:
            self.fail(f"{value!r} is not {n_wanted} numbers {self.name}, such as {self.example}.", param, ctx)
        return numbers


class Roi(click.ParamType[Any]):
    """A region of interest, ends left open where they are the volume's: `10:,:,0:512` -> OpenBox."""

    name = "z0:z1,y0:y1,x0:x1"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """An OpenBox."""
        if isinstance(value, OpenBox):
            return value
        parts = [_RANGE.fullmatch(part) for part in str(value).split(",")]
        if len(parts) != 3 or not all(parts):
            self.fail(
                f"{value!r} is not begin:end along z, y and x, such as 0:64,:,512:1024 (the end is not included).", param, ctx
            )
        begin, end = ([_integer(part[group]) for part in parts if part] for group in (1, 2))
        return OpenBox((begin[0], begin[1], begin[2]), (end[0], end[1], end[2]))


def _integer(text: str) -> int | None:
    return int(text) if text else None
