"""A released student adapted to a lab's own images by a few annotated slices.

parent.onnx -> network -> batch normalisation of the new images -> `fit` -> model.onnx, and figures before and after

OUT/data/            the stacks that the run learns from and is measured on
OUT/start.safetensors    the parent's network as the run starts from it, and what was asked for
OUT/run/             the training run
OUT/model.onnx, finetune.json, before.png, after.png
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdunet.before_after import Comparison, draw, score
from kdunet.checkpoint import load_network, load_tensors, save_network, write_whole
from kdunet.config import RunConfig
from kdunet.data import read_annotated
from kdunet.export import Exported, export_run
from kdunet.fit import CONFIG_FILE, FitResult, Progress, fit
from kdunet.held_out import Split, held_out_split, stacked, write_split
from kdunet.losses import IGNORED
from kdunet.measures import RESULT_FILE
from kdunet.onnx_weights import network_of, with_batch_norm
from kdunet.unet import N_LEVELS
from kdunet_infer.errors import TrainingError
from kdunet_infer.model import Model

START_FILE = "start.safetensors"
DATA_FOLDER, RUN_FOLDER = "data", "run"
MODEL_FILE, COMPARISON_FILE = "model.onnx", "finetune.json"
INHERITED = "licence", "citation"
"""Of the parent's provenance: whoever publishes the child has to know them."""


@dataclass(frozen=True, slots=True)
class Finetuned:
    """What a finished fine-tuning wrote."""

    exported: Exported
    comparison: Comparison


def finetune(
    parent: Model,
    config: RunConfig,
    out: Path,
    *,
    name: str = "",
    voxel_size_nm: tuple[float, float, float] | None = None,
    max_minutes: float | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Finetuned | FitResult:
    """Adapt `parent` to the images and labels that `config` names, usually `FINETUNE` with some values replaced.

    Width, normalisation, start and crop follow from the parent and the images. `config.data.train_slices` and
    `.validation_slices` are as in `held_out_split`. `name` is the child's, by default that of the folder. A call that stopped
    early returns how the run ended, and the same call goes on; one on a finished folder only exports and measures again.

    Raises TrainingError where `out` holds anything else or the parent cannot be trained further; VolumeError and ConfigError
    for images, labels and slices as `read_annotated` and `held_out_split` do.
    """
    data = config.data
    whole = read_annotated(data.images, data.labels, foreground=data.foreground, ignore=data.ignore)
    split = held_out_split(whole, train=data.train_slices, validation=data.validation_slices)
    out = out.resolve()  # a run that goes on from another folder has the same configuration
    config = config.replaced({"data": stacked(split, out / DATA_FOLDER, data), "start": str(out / START_FILE)})
    _begin(parent, split, out)
    start, _ = load_network(out / START_FILE)
    config = config.replaced({"width": start.width, "batch_norm": start.batch_norm})
    run = out / RUN_FOLDER
    if not _is_finished(run, config):
        result = fit(config, run, max_minutes=max_minutes, progress=progress)
        if not (run / RESULT_FILE).exists():
            return result
    exported = export_run(run, out / MODEL_FILE, name=name or out.name, voxel_size_nm=voxel_size_nm, told=_told(parent, split))
    return Finetuned(exported, _compared(parent, exported, split, out))


def _begin(parent: Model, split: Split, out: Path) -> None:
    """Write what the run starts from, or find it written for the same parent and voxels."""
    asked = {"parent": _named(parent), "parent_sha256": parent.sha256, "voxels_sha256": _digest(split)}
    start = out / START_FILE
    if start.exists():
        _, found = load_tensors(start)
        if changed := [key for key, value in asked.items() if found.get(key) != value]:
            what = "slices or labels" if changed == ["voxels_sha256"] else f"parent ({found.get('parent')})"
            raise TrainingError(f"{out} holds a fine-tuning with another choice of {what}; give another --out.")
        return
    if out.exists() and (not out.is_dir() or any(path.name != DATA_FOLDER for path in out.iterdir())):
        raise TrainingError(f"{out} exists and holds no fine-tuning; give another --out.")
    network = network_of(parent)
    if network.n_levels != N_LEVELS:
        raise TrainingError(f"{_named(parent)} has {network.n_levels} levels; training takes networks of {N_LEVELS}.")
    write_split(split, out / DATA_FOLDER)
    save_network(start, with_batch_norm(network, split.train.images), asked)


def _is_finished(run: Path, config: RunConfig) -> bool:
    if not (run / RESULT_FILE).exists():
        return False
    if changed := RunConfig.from_toml(run / CONFIG_FILE).differences(config):
        raise TrainingError(f"{run} holds a finished run with another configuration ({changed[0]}); give another --out.")
    return True


def _compared(parent: Model, exported: Exported, split: Split, out: Path) -> Comparison:
    """Measure parent and child as exported; write the figures and the pictures."""
    child = Model.load(exported.path)
    before, after = ((network_of(model), model.card.threshold) for model in (parent, child))
    comparison = Comparison(
        parent=_named(parent),
        held_out=split.place,
        n_voxels=int((split.held_out.truth != IGNORED).sum()),
        foreground_fraction=split.held_out.foreground_fraction,
        step=child.card.provenance["step"],
        before=score(before[0], split.held_out, before[1]),
        after=score(after[0], split.held_out, after[1]),
    )
    write_whole(out / COMPARISON_FILE, (json.dumps(comparison.to_dict(), indent=1) + "\n").encode())
    draw(out, split.held_out, before, after)
    return comparison


def _told(parent: Model, split: Split) -> Mapping[str, str]:
    """What the child's card says of where it came from."""
    inherited: Mapping[str, Any] = parent.card.provenance
    return {
        "parent": _named(parent),
        "parent_sha256": parent.sha256,
        **{f"parent_{key}": str(inherited[key]) for key in INHERITED if key in inherited},
        "annotated_slices": str(split.n_slices),
        "annotated_voxels": str(int((split.train.truth != IGNORED).sum())),
        "held_out": split.place,
    }


def _named(model: Model) -> str:
    return f"{model.card.name} {model.card.version}".strip()


def _digest(split: Split) -> str:
    digest = hashlib.sha256()
    for part in (split.train, split.held_out):
        digest.update(repr(part.images.shape).encode())
        for voxels in (part.images, part.truth):
            digest.update(voxels.tobytes())
    return digest.hexdigest()
