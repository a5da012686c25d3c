"""The one training loop: plain training is distillation without a teacher.

Device, precision and multi-GPU come from Lightning Fabric. A run can stop at any step and go on to the same bits.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdunet import losses
from kdunet.checkpoint import (
    NETWORK_FILE,
    load_network,
    load_tensors,
    restore_training_state,
    save_network,
    save_tensors,
    training_state,
    write_whole,
)
from kdunet.config import LossConfig, OptimConfig, RunConfig
from kdunet.data import Annotated, Batch, CropDataset, batches, load_annotated
from kdunet.evaluate import Validation, validate
from kdunet.unet import UNet
from kdunet_infer.errors import TrainingError

try:
    from lightning_fabric import Fabric
except ModuleNotFoundError:  # some machines have the umbrella package only; the class is the same
    from lightning.fabric import Fabric  # type: ignore[no-redef]

CHECKPOINT_FILE = "checkpoint.safetensors"
CONFIG_FILE = "config.toml"
RESULT_FILE = "result.json"
METRICS_FILE = "metrics.csv"
LOG_EVERY = 50
"""Steps between rows of the metrics file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """How a call of `fit` ended."""

    step: int
    """Steps done since the run began."""
    finished: bool
    """False where it stopped early and can go on."""
    stopped_by: str
    """"", "time", or the name of a signal."""
    best: Validation | None
    """The validation of the saved network; None before the first one."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a progress bar may want to know after each step."""

    step: int
    n_steps: int
    loss: float
    validation: Validation | None


def fit(
    config: RunConfig,
    out: Path,
    *,
    max_minutes: float | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> FitResult:
    """Train the network that `config` describes, with its teacher if it names one; go on if `out` holds an unfinished run.

    Writes to `out`: the merged configuration, metrics as CSV (and TensorBoard if installed), the checkpoint, the averaged
    network with the best validation IoU, and the result once finished.

    Raises ConfigError, VolumeError and TrainingError before the first step for what cannot work; TrainingError naming the
    step where the loss stops being finite, the last checkpoint untouched.
    """
    _prepare(config, out)
    train, validation = load_annotated(config.data)
    fabric = Fabric(accelerator=config.accelerator, devices=config.devices, precision=cast(Any, config.optim.precision))
    fabric.launch()
    run = _Run(config, out, fabric, train)
    deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
    dataset = CropDataset(train, config.data, config.augment, seed=config.seed, rank=fabric.global_rank)
    with _stop_requests() as stop, Metrics(out / METRICS_FILE, from_step=run.step) as metrics:
        wait_s, row_began = 0.0, time.monotonic()
        stream = batches(dataset, range(run.step, config.optim.steps))
        while run.step < config.optim.steps and not stop and time.monotonic() < deadline:
            asked = time.monotonic()
            batch = next(stream)
            wait_s += time.monotonic() - asked
            terms = run.train_step(batch)
            if run.step % LOG_EVERY == 0:
                now = time.monotonic()
                metrics.add(run.step, {**terms, "data_wait": wait_s / (now - row_began), "seconds": now - row_began})
                wait_s, row_began = 0.0, now
            if run.step % config.validate_every == 0 or run.step == config.optim.steps:
                metrics.add(run.step, asdict(run.validate_and_keep_best(validation)))
                run.save_checkpoint()
                wait_s, row_began = 0.0, time.monotonic()  # validation is not training time
            progress(Progress(run.step, config.optim.steps, terms["loss"], run.last))
    finished = run.step == config.optim.steps
    if not finished:
        run.save_checkpoint()
    result = FitResult(
        step=run.step,
        finished=finished,
        stopped_by="" if finished else (stop[0] if stop else "time"),
        best=run.best,
    )
    if finished and fabric.is_global_zero:
        write_whole(out / RESULT_FILE, (json.dumps(asdict(result), indent=1) + "\n").encode())
    return result


class _Run:
    """The state of a run: networks, optimiser, step; each method is one thing that happens to it."""

    def __init__(self, config: RunConfig, out: Path, fabric: Any, train: Annotated) -> None:
        self.config, self.out, self.fabric = config, out, fabric
        fabric.seed_everything(config.seed, verbose=False)
        self.student = _channels_last(UNet(config.width, intensity=train.intensity))
        optimizer = torch.optim.AdamW(self.student.parameters(), weight_decay=config.optim.weight_decay)
        self.network, self.optimizer = fabric.setup(self.student, optimizer)
        average = get_ema_multi_avg_fn(config.optim.ema_decay)  # type: ignore[no-untyped-call]
        self.averaged = AveragedModel(self.student, multi_avg_fn=average, use_buffers=True)
        self.teacher = self._load_teacher()
        self.class_weights = losses.class_weights(config.loss.class_weights, train.foreground_fraction)
        self.about = {"foreground_fraction": train.foreground_fraction, "class_weights": self.class_weights}
        self.step, self.best, self.last = 0, None, None  # type: int, Validation | None, Validation | None
        if (out / CHECKPOINT_FILE).exists():
            self._resume()

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One step of the optimiser; returns the loss, its terms, the gradient's norm and the learning rate."""
        images, labels = self.fabric.to_device(tuple(batch))
        images = images.contiguous(memory_format=torch.channels_last)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config.optim)
        self.network.train()
        terms = loss_terms(
            self.network(images), self._teach(images), labels, config=self.config.loss, class_weights=self.class_weights
        )
        loss = sum(terms.values(), start=torch.zeros((), device=labels.device))
        self._refuse_not_finite("loss", loss.item())
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        norm = self.fabric.clip_gradients(
            self.network, self.optimizer, max_norm=self.config.optim.clip_norm, error_if_nonfinite=False
        )
        self._refuse_not_finite("gradient", float(norm))
        self.optimizer.step()
        self.averaged.update_parameters(self.student)
        self.step += 1
        measured = {name: value.item() for name, value in terms.items()}
        rate = self.optimizer.param_groups[0]["lr"]  # as the optimiser used it
        return {"loss": loss.item(), **measured, "gradient_norm": float(norm), "learning_rate": rate}

    def validate_and_keep_best(self, slab: Annotated) -> Validation:
        """Validate the averaged network and save it if it is the best so far."""
        network = cast(UNet, self.averaged.module.eval())
        autocast = torch.bfloat16 if self.config.optim.precision == "bf16-mixed" else None
        self.last = validate(network, slab, device=self.fabric.device, autocast=autocast)
        if self.best is None or self.last.iou > self.best.iou:
            self.best = self.last
            if self.fabric.is_global_zero:
                about = {**self.about, "step": self.step, "validation": asdict(self.best)}
                save_network(self.out / NETWORK_FILE, network, about)
        return self.last

    def save_checkpoint(self) -> None:
        """Everything the next step depends on, in one file."""
        if self.fabric.is_global_zero:
            about = {"step": self.step, "best": None if self.best is None else asdict(self.best)}
            state = training_state(self.student, self.averaged, self.optimizer.optimizer)
            save_tensors(self.out / CHECKPOINT_FILE, state, about)
        self.fabric.barrier()

    def _resume(self) -> None:
        tensors, about = load_tensors(self.out / CHECKPOINT_FILE)
        restore_training_state(tensors, self.student, self.averaged, self.optimizer.optimizer)
        self.step = about["step"]
        self.best = self.last = Validation(**about["best"]) if about["best"] else None

    def _load_teacher(self) -> UNet | None:
        if not self.config.teacher:
            if self.config.loss.soft_weight:
                raise TrainingError(
                    f"soft_weight is {self.config.loss.soft_weight} and there is no teacher; name one with --teacher."
                )
            return None
        teacher, _ = load_network(Path(self.config.teacher))
        teacher.requires_grad_(False).to(self.fabric.device)
        return _channels_last(teacher)

    def _teach(self, images: Tensor) -> Tensor | None:
        if self.teacher is None:
            return None
        with torch.no_grad(), self.fabric.autocast():  # in situ: the same augmented crop
            logits: Tensor = self.teacher(images)
            return logits

    def _refuse_not_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            kept = "the last checkpoint is untouched" if (self.out / CHECKPOINT_FILE).exists() else "nothing was saved yet"
            raise TrainingError(
                f"the {name} is {value} at step {self.step}; {kept}. Lower optim.learning_rate "
                f"(now {self.config.optim.learning_rate:g}) and train into another folder."
            )


def _channels_last(network: UNet) -> UNet:
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]  # missing in the stubs


def loss_terms(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    config: LossConfig,
    class_weights: tuple[float, float],
) -> dict[str, Tensor]:
    """The weighted terms of the loss that count, by name; their sum is the loss."""
    weights = losses.pixel_weights(labels, class_weights)
    terms = {}
    if config.hard_weight:
        terms["hard"] = config.hard_weight * losses.hard_loss(student, labels, weights)
    if config.soft_weight and teacher is not None:
        terms["soft"] = config.soft_weight * losses.soft_loss(student, teacher, weights, temperature=config.temperature)
    if config.dice_weight:
        terms["dice"] = config.dice_weight * losses.soft_dice_loss(student, labels)
    return terms


def learning_rate(step: int, config: OptimConfig) -> float:
    """One cycle: linear from a 25th of the peak, then a cosine to a 1,000th of it. A function of the step alone: no state."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.learning_rate * (0.04 + 0.96 * step / warmup)
    share = (step - warmup) / max(1, config.steps - 1 - warmup)
    return config.learning_rate * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


class Metrics:
    """Rows of (step, name, value) appended to a CSV file, and to TensorBoard where it is installed."""

    def __init__(self, path: Path, *, from_step: int) -> None:
        rows = _rows_until(path, from_step)  # a stopped run may have logged steps that its checkpoint does not hold
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerows([("step", "name", "value"), *rows])
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board: Any = SummaryWriter(path.parent / "tensorboard", purge_step=from_step)
        except ModuleNotFoundError:
            self._board = None

    def add(self, step: int, values: dict[str, float]) -> None:
        """Append one row a value; on disk when it returns."""
        for name, value in values.items():
            self._writer.writerow((step, name, f"{value:.6g}"))
            if self._board is not None:
                self._board.add_scalar(name, value, step)
        self._file.flush()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _rows_until(path: Path, step: int) -> list[list[str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.reader(file) if row[0].isdigit() and int(row[0]) <= step]


def _prepare(config: RunConfig, out: Path) -> None:
    if (out / RESULT_FILE).exists():
        raise TrainingError(f"{out} holds a finished run; give another --out, or remove it to train again.")
    if (out / CHECKPOINT_FILE).exists():
        if changed := RunConfig.from_toml(out / CONFIG_FILE).differences(config):
            raise TrainingError(f"{out} holds a run with another configuration ({changed[0]}); give another --out.")
    elif out.exists() and (not out.is_dir() or any(path.name != CONFIG_FILE for path in out.iterdir())):
        raise TrainingError(f"{out} exists and holds no training run; give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / CONFIG_FILE, config.to_toml().encode())


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[str]]:
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
