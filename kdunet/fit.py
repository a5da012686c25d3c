"""The one training loop: plain training is distillation without a teacher.

Device, precision, processes and nodes come from Lightning Fabric. A run can stop at any step and go on to the same bits.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdunet import losses, planar
from kdunet.bank import training_batches
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
from kdunet.collapse import GRACE, Collapse, CollapseWatch
from kdunet.config import LossConfig, RunConfig
from kdunet.data import Annotated, Batch, BatchDataset, batches, load_annotated, read_annotated
from kdunet.evaluate import Validation, mean_cross_entropy, validate
from kdunet.interrupts import stop_requests
from kdunet.measures import EXAMPLES_FILE, RESULT_FILE, UNSEEN_FILE
from kdunet.records import METRICS_FILE, RunLogs
from kdunet.schedule import learning_rate, loss_at
from kdunet.teachers import Teacher, check_teacher, load_teacher
from kdunet.unet import UNet
from kdunet_infer.errors import ConfigError, TrainingError

try:
    from lightning_fabric import Fabric
except ModuleNotFoundError:  # some machines have the umbrella package only; the class is the same
    from lightning.fabric import Fabric  # type: ignore[no-redef]

CHECKPOINT_FILE = "checkpoint.safetensors"
CONFIG_FILE = "config.toml"
BEFORE_THE_FIRST_STEP = {CONFIG_FILE, METRICS_FILE, EXAMPLES_FILE, UNSEEN_FILE, "tensorboard"}
"""What a run that died before its first checkpoint leaves; such a folder can be used again."""
MAX_RESTARTS = 5
"""With other weights, after collapses; what has failed six times fails for another reason than its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """How a call of `fit` ended."""

    step: int
    """Steps done since the run began, or began again."""
    finished: bool
    """False where it stopped early."""
    stopped_by: str
    """"", "time", "collapse", or the name of a signal; after a collapse alone it cannot go on."""
    best: Validation | None
    """The validation of the saved network; None before the first one."""
    collapse: Collapse | None
    """What the watch saw first, since the run began or began again; None where the network never was a constant."""
    n_restarts: int
    """How often the run began again with other weights."""
    is_global_zero: bool = True
    """Whether this process is the one that writes and reports."""


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
    teacher: Teacher | None = None,
    max_minutes: float | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> FitResult:
    """Train the network that `config` describes, with its teachers if it names any; go on if `out` holds an unfinished run.

    `teacher` stands in for those that the configuration names. Writes to `out`: the merged configuration, metrics as CSV (and
    TensorBoard if installed), the checkpoint, the averaged network with the best validation IoU, and the result once ended.

    Raises ConfigError, VolumeError and TrainingError before the first step for what cannot work; TrainingError naming the
    step where the loss stops being finite, the last checkpoint untouched.
    """
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        precision=cast(Any, config.optim.precision),
    )
    fabric.launch()
    if fabric.is_global_zero:
        _prepare(config, out)
    fabric.barrier()
    train, validation = load_annotated(config.data)
    dataset = training_batches(config, train, rank=fabric.global_rank, n_ranks=fabric.world_size)
    run = _Run(config, out, fabric, train, _teacher(config, fabric.device, dataset, teacher))
    unseen = _load_unseen(config)
    deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
    n_steps, stopped_by = config.optim.steps, ""
    records = RunLogs(out, from_step=run.step) if fabric.is_global_zero else contextlib.nullcontext()
    with stop_requests() as stop, records as logs:
        if config.start and run.step == 0 and logs:
            # what the run began with is kept unless it gets better
            logs.add_validation(0, asdict(run.validate_and_keep_best(validation)))
        stream = batches(dataset, range(run.step, n_steps), workers=config.data.workers)
        while run.step < n_steps and not (stopped_by := _agreed(fabric, stop, deadline)):
            asked = time.monotonic()
            batch = next(stream)
            waited = time.monotonic() - asked
            measured, of_crops = run.train_step(batch)
            if logs:
                logs.add_step(run.step, measured, of_crops, waited)
                if unseen and run.step % config.unseen.every == 0:
                    logs.unseen.add(run.step, mean_cross_entropy(run.averaged_network, unseen, device=fabric.device))
            if run.step % config.validate_every == 0 or run.step == n_steps:
                if logs:
                    logs.add_validation(run.step, asdict(run.validate_and_keep_best(validation)))
                    logs.sync()
                run.save_checkpoint()
            if logs:
                progress(Progress(run.step, n_steps, measured["loss"], run.last))
            if run.collapse and config.on_collapse != "ignore":
                if config.on_collapse == "stop" or run.n_restarts == MAX_RESTARTS:
                    stopped_by = "collapse"
                    break
                run.restart()
                stream = batches(dataset, range(n_steps), workers=config.data.workers)
                if logs:
                    logs.begin_again()
    finished = run.step == n_steps and not stopped_by
    if not finished:
        run.save_checkpoint()
    result = FitResult(
        step=run.step,
        finished=finished,
        stopped_by=stopped_by,
        best=run.best,
        collapse=run.collapse,
        n_restarts=run.n_restarts,
        is_global_zero=fabric.is_global_zero,
    )
    if (finished or stopped_by == "collapse") and fabric.is_global_zero:
        write_whole(out / RESULT_FILE, (json.dumps(asdict(result), indent=1) + "\n").encode())
    return result


class _Run:
    """The state of a run: networks, optimiser, step; each method is one thing that happens to it."""

    def __init__(self, config: RunConfig, out: Path, fabric: Any, train: Annotated, teacher: Teacher | None) -> None:
        self.config, self.out, self.fabric = config, out, fabric
        self.intensity = train.intensity
        self.student = self._new_student(config.seed)
        optimizer = torch.optim.AdamW(self.student.parameters(), weight_decay=config.optim.weight_decay)
        self.network, self.optimizer = fabric.setup(self.student, optimizer)
        self.averaged = self._new_average()
        self.pool = losses.alone if fabric.world_size == 1 else losses.over_processes
        self.class_weights = losses.class_weights(config.loss.class_weights, train.foreground_fraction)
        self.teacher = teacher
        self.about = {"foreground_fraction": train.foreground_fraction, "class_weights": self.class_weights}
        self.watch = self._new_watch()
        self.step, self.n_restarts = 0, 0
        self.best, self.last, self.collapse = None, None, None  # type: Validation | None, Validation | None, Collapse | None
        if (out / CHECKPOINT_FILE).exists():
            self._resume()

    @property
    def averaged_network(self) -> UNet:
        """What is validated, saved and exported, in evaluation mode."""
        return cast(UNet, self.averaged.module.eval())

    def train_step(self, batch: Batch) -> tuple[dict[str, float], list[float]]:
        """One step of the optimiser; returns what it measured by name, and the cross-entropy of each crop."""
        images, labels = (self.fabric.to_device(tensor) for tensor in (batch.images, batch.labels))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config.optim)
        self._set_training()
        margins = losses.margin(self.network(images))
        weights = losses.pixel_weights(labels, self.class_weights)
        terms = loss_terms(
            margins, self._taught(batch, images), labels, weights, config=loss_at(self.step, self.config), pool=self.pool
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
        seen = losses.batch_statistics(margins.detach(), labels, weights, pool=self.pool)
        self.watch.add(
            cross_entropy=seen.weighted_cross_entropy,
            foreground_fraction=seen.foreground_fraction,
            deviation=seen.deviation,
        )
        self.collapse = self.collapse or self.watch.collapsed
        measured = {
            "loss": loss.item(),
            **{name: value.item() for name, value in terms.items()},
            "deviation": seen.deviation,
            "gradient_norm": float(norm),
            "learning_rate": self.optimizer.param_groups[0]["lr"],  # as the optimiser used it
        }
        return measured, seen.cross_entropies

    def validate_and_keep_best(self, slab: Annotated) -> Validation:
        """Validate the averaged network and save it if it is the best so far."""
        autocast = torch.bfloat16 if self.config.optim.precision == "bf16-mixed" else None
        self.last = validate(self.averaged_network, slab, device=self.fabric.device, autocast=autocast)
        if self.best is None or self.last.iou > self.best.iou:
            self.best = self.last
            if self.fabric.is_global_zero:
                about = {**self.about, "step": self.step, "validation": asdict(self.best)}
                save_network(self.out / NETWORK_FILE, self.averaged_network, about)
        return self.last

    def save_checkpoint(self) -> None:
        """Everything the next step depends on, in one file."""
        if self.fabric.is_global_zero:
            about = {
                "step": self.step,
                "best": None if self.best is None else asdict(self.best),
                "watch": self.watch.state(),
                "collapse": None if self.collapse is None else asdict(self.collapse),
                "n_restarts": self.n_restarts,
            }
            state = training_state(self.student, self.averaged, self.optimizer.optimizer)
            save_tensors(self.out / CHECKPOINT_FILE, state, about)
        self.fabric.barrier()

    def restart(self) -> None:
        """Begin again with other weights; the crops stay the same."""
        self.n_restarts += 1
        seed = self.config.seed + 1_000_003 * self.n_restarts  # far from the seeds of other runs
        self.student.load_state_dict(self._new_student(seed).state_dict())
        self.averaged = self._new_average()
        self.optimizer.optimizer.state.clear()
        self.watch = self._new_watch()
        self.step, self.best, self.last, self.collapse = 0, None, None, None
        self.save_checkpoint()

    def _new_student(self, seed: int) -> UNet:
        self.fabric.seed_everything(seed, verbose=False)
        config = self.config
        student = UNet(config.width, intensity=self.intensity, batch_norm=config.batch_norm, init=config.init)
        if config.start:
            start, _ = load_network(Path(config.start))
            if start.architecture != student.architecture:
                raise TrainingError(
                    f"{config.start} holds {start.architecture}, the configuration asks for {student.architecture}; "
                    "set width and batch_norm to those of the network to start from."
                )
            student.load_state_dict(start.state_dict())
        student.to(self.fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if config.optim.precision != "32-true" or self.fabric.device.type != "cpu":
            return student
        planar.keep_freed_memory()
        return student.accelerated()

    def _new_average(self) -> AveragedModel:
        average = get_ema_multi_avg_fn(self.config.optim.ema_decay)  # type: ignore[no-untyped-call]
        return AveragedModel(self.student, multi_avg_fn=average, use_buffers=True)

    def _new_watch(self) -> CollapseWatch:
        steps = self.config.optim.steps
        warmup = round(self.config.optim.warmup * steps)  # healthy networks may look flat so long
        return CollapseWatch(self.class_weights, grace=max(warmup, min(GRACE, steps // 2)))

    def _set_training(self) -> None:
        self.network.train()
        if self.config.optim.freeze_batch_norm:
            for module in self.student.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    def _taught(self, batch: Batch, images: Tensor) -> Tensor | None:
        """The teacher's margins: stored with the crops, or its answer to the same augmented crops."""
        if not self.config.loss.soft_weight:
            return None
        if self.teacher is None:
            return cast(Tensor, self.fabric.to_device(batch.taught))
        with torch.no_grad(), self.fabric.autocast():
            return self.teacher(images)

    def _resume(self) -> None:
        tensors, about = load_tensors(self.out / CHECKPOINT_FILE)
        restore_training_state(tensors, self.student, self.averaged, self.optimizer.optimizer)
        self.step, self.n_restarts = about["step"], about["n_restarts"]
        self.best = self.last = Validation(**about["best"]) if about["best"] else None
        self.watch.restore(about["watch"])
        self.collapse = Collapse(**about["collapse"]) if about["collapse"] else None

    def _refuse_not_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            kept = "the last checkpoint is untouched" if (self.out / CHECKPOINT_FILE).exists() else "nothing was saved yet"
            raise TrainingError(
                f"the {name} is {value} at step {self.step}; {kept}. Lower optim.learning_rate "
                f"(now {self.config.optim.learning_rate:g}) and train into another folder."
            )


def loss_terms(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    *,
    config: LossConfig,
    pool: losses.Pool = losses.alone,
) -> dict[str, Tensor]:
    """The weighted terms of the loss that count, by name; their sum is the loss. Margins, labels and weights (n, y, x)."""
    terms = {}
    if config.hard_weight:
        terms["hard"] = config.hard_weight * losses.hard_loss(student, labels, weights, pool=pool)
    if config.soft_weight and teacher is not None:
        soft = losses.soft_loss(
            student, teacher, weights, temperature=config.temperature, divergence=config.divergence, pool=pool
        )
        terms["soft"] = config.soft_weight * soft
    if config.dice_weight:
        terms["dice"] = config.dice_weight * losses.soft_dice_loss(student, labels, pool=pool)
    return terms


def _teacher(config: RunConfig, device: torch.device, dataset: BatchDataset, teacher: Teacher | None) -> Teacher | None:
    """Who answers in the loop; None where nobody is asked, or where the answers lie with the crops."""
    if not config.loss.soft_weight:
        return None
    if teacher is not None:
        check_teacher(teacher, "the teacher", crop=config.data.crop, device=device)
    elif not dataset.is_taught and (teacher := load_teacher(config, device)) is None:
        bank = f", and the bank {config.data.bank} was not taught" if config.data.bank else ""
        raise TrainingError(
            f"soft_weight is {config.loss.soft_weight} and there is no teacher{bank}; name one with --teacher, or a bank "
            "that was taught with --bank."
        )
    return teacher


def _load_unseen(config: RunConfig) -> Annotated | None:
    if not config.unseen.images:
        return None
    whole = read_annotated(
        config.unseen.images, config.unseen.labels, foreground=config.data.foreground, ignore=config.data.ignore
    )
    begin, end = config.unseen.slices or (0, len(whole.images))
    if not 0 <= begin < end <= len(whole.images):
        raise ConfigError(f"unseen.slices is {begin} to {end}; {config.unseen.images} has slices 0 to {len(whole.images)}.")
    looked_at = slice(begin, end, config.unseen.stride)
    return Annotated(whole.images[looked_at], whole.truth[looked_at])


def _agreed(fabric: Any, stop: list[str], deadline: float) -> str:
    """Why all processes stop before this step, or "": one that is told takes the others along."""
    reason = stop[0] if stop else "time" if time.monotonic() >= deadline else ""
    if fabric.world_size == 1:
        return reason
    reasons = [""] * fabric.world_size
    torch.distributed.all_gather_object(reasons, reason)
    return next(filter(None, reasons), "")


def _prepare(config: RunConfig, out: Path) -> None:
    if (out / RESULT_FILE).exists():
        raise TrainingError(f"{out} holds a finished run; give another --out, or remove it to train again.")
    if (out / CHECKPOINT_FILE).exists():
        if changed := RunConfig.from_toml(out / CONFIG_FILE).differences(config):
            raise TrainingError(f"{out} holds a run with another configuration ({changed[0]}); give another --out.")
    elif out.exists() and (not out.is_dir() or any(path.name not in BEFORE_THE_FIRST_STEP for path in out.iterdir())):
        raise TrainingError(f"{out} exists and holds no training run; give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / CONFIG_FILE, config.to_toml().encode())
