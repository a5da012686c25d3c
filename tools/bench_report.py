"""The results of tools/bench.py as a plot and as the tables of docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
BASELINE = "MONAI"
"""What its two layouts are called together: the faster one counts."""
Row = dict[str, Any]


def write_tables(found: dict[str, Any], docs: Path) -> None:
    """Put the tables between the markers of `docs`, whose other text stays as it is."""
    text = docs.read_text(encoding="utf-8")
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise click.ClickException(f"{docs} lacks the lines {BEGIN} and {END}; put them where the tables go.")
    docs.write_text("\n".join([head + BEGIN, *tables(found), END + tail]), encoding="utf-8")


def tables(found: dict[str, Any]) -> Iterator[str]:
    """Lines of markdown."""
    about = found["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    y, x = about["slice_shape"]
    yield f"\n{about['cpu']}, {about['system']}; {found['date']}. Slices of {y} x {x} pixels: {about['slices']}."
    yield f"Python {about['python']}, {versions}. Medians of {about['rounds']} rounds."
    rows = best_of_baseline(found["results"])
    for n_threads in sorted({row["threads"] for row in rows}):
        yield f"\n**{n_threads} thread{'s' * (n_threads != 1)}**: output Mpx/s (times onnxruntime, share of the fp32 peak)\n"
        yield from _table([row for row in rows if row["threads"] == n_threads], _speed)
    yield "\n**Two threads against one**\n"
    yield from _table(_scaling(rows), lambda row: f"{row['scaling']:.2f}")
    yield "\n**Multiply-adds a pixel of output**: needed, and done by each with its halo or its overlap (1 thread)\n"
    yield from _table([row for row in rows if row["threads"] == 1], _work)
    yield ""


def best_of_baseline(rows: Sequence[Row]) -> list[Row]:
    """The rows, with one for the baseline in the place of one for each of its layouts."""
    kept: dict[tuple[int, int, str], Row] = {}
    for row in rows:
        name = BASELINE if row["contender"].startswith(BASELINE) else row["contender"]
        place = (row["width"], row["threads"], name)
        if place not in kept or row.get("mpx_per_s", 0) > kept[place].get("mpx_per_s", 0):
            kept[place] = {**row, "contender": name}
    return list(kept.values())


def _scaling(rows: Sequence[Row]) -> list[Row]:
    one = {(row["width"], row["contender"]): row["mpx_per_s"] for row in rows if row["threads"] == 1 and "mpx_per_s" in row}
    two = [row for row in rows if row["threads"] == 2 and "mpx_per_s" in row]
    return [
        {**row, "scaling": row["mpx_per_s"] / one[row["width"], row["contender"]]}
        for row in two
        if (row["width"], row["contender"]) in one
    ]


def _table(rows: Sequence[Row], cell: Any) -> Iterator[str]:
    """A row for each contender, a column for each width."""
    widths = sorted({row["width"] for row in rows})
    yield "| |" + "".join(f" {width}-Unet |" for width in widths)
    yield "|---|" + "---|" * len(widths)
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = {row["width"]: row for row in rows if row["contender"] == name}
        yield f"| {name} |" + "".join(f" {cell(own[width]) if width in own else '-'} |" for width in widths)


def _speed(row: Row) -> str:
    if "mpx_per_s" not in row:
        return "-"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.1f}x, "
    return f"{row['mpx_per_s']:.3g} ({ratio}{row['share_of_peak_needed']:.0%})"


def _work(row: Row) -> str:
    return "-" if "mpx_per_s" not in row else f"{row['multiply_adds_needed']:,} / {row['multiply_adds_done']:,.0f}"


def write_plot(found: dict[str, Any], path: Path) -> None:
    """Speed over width, a panel for each number of threads, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in best_of_baseline(found["results"]) if "mpx_per_s" in row]
    threads = sorted({row["threads"] for row in rows})
    figure, panels = pyplot.subplots(1, len(threads), figsize=(5 * len(threads), 4.2), sharey=True, squeeze=False)
    for panel, n_threads in zip(panels[0], threads, strict=True):
        for name in dict.fromkeys(row["contender"] for row in rows):
            own = sorted(
                (row["width"], row["mpx_per_s"]) for row in rows if (row["contender"], row["threads"]) == (name, n_threads)
            )
            panel.plot(*zip(*own, strict=True), marker="o", label=name)
        widths = sorted({row["width"] for row in rows})
        panel.set(
            xscale="log", yscale="log", xlabel="width k of the k-Unet", title=f"{n_threads} thread{'s' * (n_threads != 1)}"
        )
        panel.set_xticks(widths, [str(width) for width in widths])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("output Mpx/s")
    panels[0][-1].legend(fontsize=8)
    figure.suptitle(f"{found['about']['cpu']}, {found['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
