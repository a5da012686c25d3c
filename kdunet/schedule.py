"""What changes from step to step: functions of the step alone, so that a resumed run needs no state for them."""

from __future__ import annotations

import dataclasses
import math

from kdunet.config import LossConfig, OptimConfig, RunConfig


def learning_rate(step: int, config: OptimConfig) -> float:
    """One cycle: linear from a 25th of the peak, then a cosine to a 1,000th of it. A function of the step alone: no state."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.learning_rate * (0.04 + 0.96 * step / warmup)
    share = (step - warmup) / max(1, config.steps - 1 - warmup)
    return config.learning_rate * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def loss_at(step: int, config: RunConfig) -> LossConfig:
    """The configured loss, or the half of it that counts at `step` where the teacher comes first and the labels after."""
    loss = config.loss
    if not loss.soft_first:
        return loss
    if step < round(loss.soft_first * config.optim.steps):
        return dataclasses.replace(loss, hard_weight=0.0, dice_weight=0.0)
    return dataclasses.replace(loss, soft_weight=0.0)
