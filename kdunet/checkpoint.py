"""Saving and loading: safetensors written beside and renamed, so that a file is whole or not there. Never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from kdunet.unet import UNet
from kdunet_infer.errors import TrainingError

NETWORK_FILE = "network.safetensors"
METADATA_KEY = "kdunet"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and a JSON object about them to `path`, atomically and durably."""
    # not save_file, whose files only their owner may read
    content = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {METADATA_KEY: json.dumps(about)})
    write_whole(path, content)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or not there, also after a power cut."""
    beside = path.with_name(path.name + ".partial")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises TrainingError for a file that is missing, damaged, or not ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[METADATA_KEY])
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 - not a dict
    except FileNotFoundError as exc:
        raise TrainingError(f"there is no file {path}; give the folder of a finished or running training run.") from exc
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as exc:
        raise TrainingError(f"{path} is damaged or was not written by kdunet ({exc!r}); restore it or train again.") from exc


def save_network(path: Path, network: UNet, about: Mapping[str, Any], *, dtype: torch.dtype | None = None) -> None:
    """Write a network with what is needed to build it again; floating tensors as `dtype` where one is given."""
    tensors = network.state_dict()
    if dtype is not None:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    save_tensors(path, tensors, {**about, "architecture": network.architecture})


def load_network(path: Path) -> tuple[UNet, dict[str, Any]]:
    """A network in float32 and evaluation mode, and what was saved about it; `path` is the file or the folder it lies in.

    Raises TrainingError where there is none, or none that this version can build.
    """
    file = path / NETWORK_FILE if path.is_dir() else path
    tensors, about = load_tensors(file)
    try:
        network = UNet.of(about["architecture"])
        network.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})
    except (KeyError, RuntimeError, TypeError) as exc:
        raise TrainingError(f"{file} holds no k-Unet that this version can build ({exc}); train or export it again.") from exc
    return network.eval(), about


def training_state(student: nn.Module, averaged: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """All tensors that the next step depends on, by name."""
    state = {f"student.{name}": tensor for name, tensor in student.state_dict().items()}
    state |= {f"averaged.{name}": tensor for name, tensor in averaged.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{slot}": tensor for slot, tensor in slots.items()}
    return state


def restore_training_state(
    tensors: Mapping[str, Tensor], student: nn.Module, averaged: nn.Module, optimizer: Optimizer
) -> None:
    """Put back what `training_state` returned, bit by bit."""
    student.load_state_dict(_below("student.", tensors))
    averaged.load_state_dict(_below("averaged.", tensors))
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _below("optimizer.", tensors).items():
        index, slot = name.split(".", 1)
        slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
