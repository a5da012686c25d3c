"""Training steps for tools/bench.py: the same step in several ways, part by part, and the memory that each takes."""

from __future__ import annotations

import itertools
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdunet import losses
from kdunet.config import OptimConfig
from kdunet.unet import UNet

PARTS = ("forward", "losses", "backward", "optimiser")
WAYS = ("contiguous", "channels_last", "compiled", "bf16", "planar")
"""torch as it comes; rows of channels; that under torch.compile; that in bfloat16; what runs in float32 on CPUs do."""
CLASS_WEIGHTS = (0.73, 2.9)
"""As of EPFL, of the scheme sqrt."""

Step = Callable[[], list[float]]


def step_of(way: str, width: int, batch: int, crop: int) -> Step:
    """A training step of a k-Unet on random crops, as `kdunet.fit` takes it from a bank: seconds of each of PARTS."""
    torch.manual_seed(0)
    network = UNet(width, intensity=(140.0, 40.0)).train()
    if way != "contiguous":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if way == "planar":
        network.accelerated()
    run: Callable[[Tensor], Tensor] = torch.compile(network) if way == "compiled" else network
    optimizer = torch.optim.AdamW(network.parameters())
    decay = get_ema_multi_avg_fn(OptimConfig().ema_decay)  # type: ignore[no-untyped-call]
    averaged = AveragedModel(network, multi_avg_fn=decay, use_buffers=True)
    images, labels = torch.rand(batch, 1, crop, crop) * 255, (torch.rand(batch, crop, crop) > 0.94).byte()
    taught = 4 * torch.randn(batch, crop, crop)

    def step() -> list[float]:
        times = [time.perf_counter()]
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16"):
            margins = losses.margin(run(images))
        times.append(time.perf_counter())
        weights = losses.pixel_weights(labels, CLASS_WEIGHTS)
        loss = losses.hard_loss(margins, labels, weights) + losses.soft_dice_loss(margins, labels)
        loss = loss + losses.soft_loss(margins, taught, weights, temperature=5.0)
        losses.batch_statistics(margins.detach(), labels, weights)
        times.append(time.perf_counter())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        times.append(time.perf_counter())
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(network)
        times.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(times)]

    return step


def measure_training(width: int, *, batch: int, crop: int, n_threads: int, n_rounds: int) -> list[dict[str, Any]]:
    """A row for each way: milliseconds of each part and of the step, medians of rounds in turns, and peak memory in MB."""
    torch.set_num_threads(n_threads)
    steps: dict[str, Step] = {}
    refusals: dict[str, str] = {}
    for way in WAYS:
        try:
            steps[way] = step_of(way, width, batch, crop)
            steps[way]()  # compiles
        except Exception as exc:  # whatever one way needs, the others are measured
            refusals[way] = f"{type(exc).__name__}: {str(exc).splitlines()[0][:120]}"
            steps.pop(way, None)
    taken: dict[str, list[list[float]]] = {way: [] for way in steps}
    for _ in range(n_rounds):
        for way, step in steps.items():
            step()
            taken[way].append(step())
    rows: list[dict[str, Any]] = []
    for way in WAYS:
        row: dict[str, Any] = {"width": width, "batch": batch, "crop": crop, "threads": n_threads, "way": way}
        if way in refusals:
            rows.append({**row, "refusal": refusals[way]})
            continue
        parts = [1000 * statistics.median(part) for part in zip(*taken[way], strict=True)]
        step_ms = 1000 * statistics.median(sum(times) for times in taken[way])
        figures = {f"{name}_ms": round(value, 1) for name, value in zip(PARTS, parts, strict=True)}
        memory = _peak_memory_mb(way, width, batch, crop)
        rows.append({**row, **figures, "step_ms": round(step_ms, 1), "peak_mb": memory})
    return rows


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| k | crops | threads | | forward | losses | backward | optimiser | step, ms | steps/s | peak MB |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        head = f"| {row['width']} | {row['batch']} x {row['crop']}² | {row['threads']} | {row['way']} |"
        if "refusal" in row:
            lines.append(f"{head} {row['refusal']} |" + " |" * 6)
            continue
        parts = " | ".join(f"{row[f'{name}_ms']:.1f}" for name in PARTS)
        lines.append(f"{head} {parts} | **{row['step_ms']:.0f}** | {1000 / row['step_ms']:.1f} | {row['peak_mb']:.0f} |")
    return "\n".join(lines)


def _peak_memory_mb(way: str, width: int, batch: int, crop: int) -> float:
    """What two steps add to a process that has torch loaded, in a process of their own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_grown_by, (way, width, batch, crop))


def _grown_by(way: str, width: int, batch: int, crop: int) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = step_of(way, width, batch, crop)
    step()
    step()
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 0)
