"""Keeps a finished teacher in the repository, so that nobody trains it twice: fp16 weights and the configuration.

    python tools/keep_teacher.py runs/teacher epfl-16unet

Distil from it with `kdunet distill --teacher models/teachers/epfl-16unet`.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from kdunet.checkpoint import NETWORK_FILE, load_network, save_network
from kdunet.config import RunConfig
from kdunet.fit import CONFIG_FILE


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("name")
@click.option("-o", "--out", type=click.Path(path_type=Path), default="models/teachers", show_default=True)
def main(run: Path, name: str, out: Path) -> None:
    """Write OUT/NAME from the training run RUN."""
    network, about = load_network(run)
    config = RunConfig.from_toml(run / CONFIG_FILE)
    files = {key: Path(getattr(config.data, key)).name for key in ("images", "labels")}  # no machine's folders
    config = config.replaced({f"data.{key}": value for key, value in files.items()})
    (out / name).mkdir(parents=True, exist_ok=True)
    save_network(out / name / NETWORK_FILE, network, about, dtype=torch.float16)
    (out / name / CONFIG_FILE).write_text(config.to_toml(), encoding="utf-8")
    click.echo(f"wrote {out / name}: {about['validation']}")


if __name__ == "__main__":
    main()
