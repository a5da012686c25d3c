"""The frontier: IoU against parameters and against speed, with the figures of the report that the method comes from.

    python tools/frontier.py add mito-epfl-2unet --role student --model mito-epfl-2unet --iou 0.8366 [--iou ...]
    python tools/frontier.py add 64-unet --role teacher --model models/teachers/epfl-64unet --results scores.jsonl
    python tools/frontier.py                  measures what has no speed yet, writes the table and draws the PNG beside it

The table is docs/results/frontier.json: a row for each network, one IoU for each seed. Speed is output Mvox/s of the native
engine on whole slices, as `kdunet-infer engines --bench` measures it; of several seeds one is measured.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from kdunet.checkpoint import NETWORK_FILE, load_network
from kdunet.export import onnx_graph
from kdunet.unet import halo, n_parameters
from kdunet_infer.card import ModelCard
from kdunet_infer.console import SentenceGroup
from kdunet_infer.errors import ConfigError
from kdunet_infer.model import Model
from kdunet_infer.speed import Contender, measure

TABLE = Path("docs/results/frontier.json")
ROLES = {"student": ("tab:blue", "o"), "teacher": ("tab:red", "s")}
"""Role -> colour and marker."""
PUBLISHED = {"64-Unet of the report": (31_042_434, 0.804), "2-Unet of the report": (30_902, 0.759)}
"""Name -> parameters, and IoU on the whole test sub-volume; their speed was not published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A row of the table."""

    name: str
    role: str
    """student or teacher."""
    model: str
    """A released model, an ONNX file, or a folder with a network's safetensors: what is measured."""
    ious: tuple[float, ...]
    """On the test slices, one for each seed."""
    parameters: int = 0
    """0: not looked up yet."""
    mvox_per_s: float | None = None
    """None: not measured yet, or the engine refuses it."""
    engine: str = ""
    """What measured it: engine, CPU, threads."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConfigError(f"{self.name} has the role {self.role!r}; choose {' or '.join(ROLES)}.")
        if not self.ious or not all(0 <= iou <= 1 for iou in self.ious):
            raise ConfigError(f"{self.name} has the IoUs {list(self.ious)}; give one between 0 and 1 for each seed.")

    def to_dict(self) -> dict[str, Any]:
        """The row, with what follows from its IoUs."""
        iou = {"mean": round(statistics.fmean(self.ious), 4), "min": min(self.ious), "max": max(self.ious)}
        return {**dataclasses.asdict(self), "iou": iou, "n_seeds": len(self.ious)}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Network:
        """Read a row; ConfigError where a field is missing, unknown or impossible."""
        given = {key: value for key, value in row.items() if key not in ("iou", "n_seeds")}
        try:
            return cls(**{**given, "ious": tuple(given.get("ious", ()))})
        except TypeError as exc:
            raise ConfigError(f"the row {row.get('name', row)!r} of the table cannot be ({exc}); mend it.") from exc


def read_table(path: Path) -> list[Network]:
    """The rows of a table, none where there is no file. Raises ConfigError for a file that is no table."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["networks"]
    except (ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{path} is no table of networks ({exc!r}); restore it, or remove it to begin another.") from exc
    return [Network.from_dict(row) for row in rows]


def write_table(path: Path, networks: Sequence[Network]) -> None:
    """Write the rows as JSON, with the published figures for comparison."""
    published = [{"name": name, "parameters": n, "iou": iou} for name, (n, iou) in PUBLISHED.items()]
    table = {"networks": [network.to_dict() for network in networks], "published": published}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def loaded(where: str) -> Model:
    """A released model, an ONNX file, or the network in a folder as it would be exported. Raises as `Model.load` does."""
    if not (Path(where) / NETWORK_FILE).is_file():
        return Model.load(where)
    network, _ = load_network(Path(where))
    context = halo(network.n_levels)
    card = ModelCard(
        name=Path(where).name,
        version="0",
        stride_zyx=(1, network.stride, network.stride),
        halo_zyx=(0, context, context),
        threshold=0.5,
        n_parameters=n_parameters(network),
    )
    return Model.from_bytes(onnx_graph(network, card), Path(where))


def measured(network: Network, *, n_threads: int, seconds: float, say: Callable[[str], None] = click.echo) -> Network:
    """The row with the parameters and the speed of its model; without a speed, and saying why, where the engine refuses it."""
    model = loaded(network.model)
    (speed,) = measure(model, [Contender("native")], n_threads=n_threads, seconds=seconds)
    say(f"{network.name:24} {speed.refusal or f'{speed.pixels_per_second / 1e6:8.3g} Mvox/s'}")
    mvox_per_s = None if speed.refusal else float(f"{speed.pixels_per_second / 1e6:.4g}")
    return dataclasses.replace(
        network, parameters=model.card.n_parameters, mvox_per_s=mvox_per_s, engine=speed.description or network.engine
    )


def ious_of(results: Path) -> list[float]:
    """The IoUs of a file of results: one JSON object, or one a line, each with `iou`. Raises ConfigError for any other."""
    text = results.read_text(encoding="utf-8")
    try:
        try:
            found = [json.loads(text)]
        except ValueError:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [float(result["iou"]) for result in found]
    except (ValueError, KeyError, TypeError) as exc:
        raise ConfigError(
            f"{results} holds no results ({exc!r}); give what `kdunet-infer evaluate --json` or averaging.py --json print."
        ) from exc


def best(points: Sequence[tuple[float, float]], *, less_is_better: bool) -> list[tuple[float, float]]:
    """Of (cost or speed, IoU) those that none beats in both, by rising x."""
    kept: list[tuple[float, float]] = []
    for x, iou in sorted(points, key=lambda point: (point[0] if less_is_better else -point[0], -point[1])):
        if not kept or iou > kept[-1][1]:
            kept.append((x, iou))
    return sorted(kept)


def draw(networks: Sequence[Network], path: Path) -> None:
    """Two panels with one IoU axis: against parameters, and against Mvox/s; bars from the worst seed to the best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    for panel, name in ((left, "parameters"), (right, "output Mvox/s")):
        panel.set(xscale="log", xlabel=name)
        panel.grid(alpha=0.3)
    _panel(left, [(network.parameters, network) for network in networks], less_is_better=True)
    _panel(right, [(n.mvox_per_s, n) for n in networks if n.mvox_per_s is not None], less_is_better=False)
    for name, (n, iou) in PUBLISHED.items():
        left.plot(n, iou, marker="D", markerfacecolor="none", color="black", linestyle="none")
        right.axhline(iou, color="black", linewidth=1, linestyle=":")
        right.text(0.01, iou, f"{name}: speed not published", transform=right.get_yaxis_transform(), va="bottom", fontsize=8)
    _label(left, [(n, iou, name) for name, (n, iou) in PUBLISHED.items()])
    left.set_ylabel("IoU, test sub-volume (ours: slices 0 to 63; the report: all)")
    for role, (colour, marker) in ROLES.items():
        left.plot([], [], color=colour, marker=marker, linestyle="none", label=role)
    left.legend(fontsize=8, loc="lower right")
    for panel in (left, right):
        panel.margins(x=0.1, y=0.1)
    engines = dict.fromkeys(network.engine for network in networks if network.engine)
    figure.suptitle("speed: " + "; ".join(engines), fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(panel: Any, placed: Sequence[tuple[float, Network]], *, less_is_better: bool) -> None:
    means = [(x, statistics.fmean(network.ious)) for x, network in placed]
    frontier = best(means, less_is_better=less_is_better)
    panel.plot([x for x, _ in frontier], [iou for _, iou in frontier], color="grey", linewidth=1, zorder=1)
    labels = []
    for (x, iou), (_, network) in zip(means, placed, strict=True):
        colour, marker = ROLES[network.role]
        n_seeds = len(network.ious)
        spread = [[iou - min(network.ious)], [max(network.ious) - iou]]
        panel.errorbar(x, iou, spread, color=colour, marker=marker, capsize=3 if n_seeds > 1 else 0)
        labels.append((x, iou, network.name + (f" ({n_seeds} seeds)" if n_seeds > 1 else "")))
    _label(panel, labels)


def _label(panel: Any, labels: Sequence[tuple[float, float, str]]) -> None:
    """Beside their points, on the side where the panel has room."""
    low, high = panel.get_xlim()
    for x, iou, text in labels:
        side = 1 if x * x < low * high else -1  # the axis is logarithmic
        panel.annotate(
            text, (x, iou), xytext=(8 * side, 0), textcoords="offset points", ha="left" if side > 0 else "right",
            va="center", fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )  # fmt: skip


@click.group(cls=SentenceGroup, invoke_without_command=True)
@click.option("--table", type=click.Path(path_type=Path), default=TABLE, show_default=True)
@click.option("--again", is_flag=True, help="Measure every network, not only those that have no speed yet.")
@click.option("--threads", "n_threads", type=int, default=2, show_default=True)
@click.option(
    "--seconds", type=float, default=5.0, show_default=True, help="Each network in all, and at least one slice a round."
)
@click.pass_context
def main(context: click.Context, table: Path, again: bool, n_threads: int, seconds: float) -> None:
    """Fill the table's speeds and draw it as a PNG beside it."""
    context.obj = table
    if context.invoked_subcommand is not None:
        return
    networks = read_table(table)
    if not networks:
        raise ConfigError(f"{table} has no networks; add them with `python tools/frontier.py add NAME ...`.")
    for i, network in enumerate(networks):
        if again or network.mvox_per_s is None:
            networks[i] = measured(network, n_threads=n_threads, seconds=seconds)
            write_table(table, networks)  # a stop loses nothing
    draw(networks, table.with_suffix(".png"))
    click.echo(f"wrote {table} and {table.with_suffix('.png')}")


@main.command("add")
@click.argument("name")
@click.option("--role", required=True, type=click.Choice(list(ROLES)))
@click.option("--model", required=True, help="A released model, an ONNX file, or a folder with a network's safetensors.")
@click.option("--iou", "ious", multiple=True, type=float, help="On the test slices; one for each seed.")
@click.option("--results", multiple=True, type=click.Path(path_type=Path, exists=True), help="JSON with `iou`, one a line.")
@click.pass_obj
def add_command(table: Path, name: str, role: str, model: str, ious: tuple[float, ...], results: tuple[Path, ...]) -> None:
    """Put the network NAME into the table, in place of one of that name; its speed is measured when the table is drawn."""
    found = (*ious, *(iou for path in results for iou in ious_of(path)))
    network = Network(name=name, role=role, model=model, ious=found)
    kept = [row for row in read_table(table) if row.name != name]
    write_table(table, [*kept, network])
    click.echo(f"{name}: {json.dumps(network.to_dict()['iou'])} of {len(found)} seeds")


if __name__ == "__main__":
    main()
