"""Recognises, while training, a network that answers the same whatever it sees: nothing is left to learn from but the prior.

Mangalam & Salzmann 2018, section 3.5, saw it in most runs of small networks without batch normalisation and class weights.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GRACE = 500
"""Steps that are not looked at, where nothing else is said: the warm-up of the default run."""


def constant_floor(foreground_fraction: float, class_weights: tuple[float, float]) -> float:
    """Cross-entropy (nats) of the best constant prediction under L = sum_i w_{y_i} CE_i / sum_i w_{y_i}.

    That constant is the weighted share q* = w_f f / (w_f f + w_b (1 - f)), and the floor its binary entropy. For the report's
    f = 0.053, unweighted, it is 0.207. Its failed runs stand at 0.480 and not there: with that f, 0.480 is the cross-entropy of
    the constants 0.000117 and 0.362, neither of them the 0.053 it names; 0.480 as a floor would ask for f = 0.186.
    """
    return _entropy(_share(foreground_fraction, class_weights))


@dataclass(frozen=True, slots=True, kw_only=True)
class Collapse:
    """What was seen of a network that has collapsed to a constant, as means over a window of steps."""

    cross_entropy: float
    """Class-weighted, against the labels, in nats."""
    floor: float
    """The cross-entropy of the best constant on the same batches."""
    deviation: float
    """The standard deviation of the foreground probability over a batch's pixels."""
    perfect_deviation: float
    """The deviation of the labels themselves."""
    first_step: int
    last_step: int

    def __str__(self) -> str:
        return (
            f"the network has collapsed to a constant: over steps {self.first_step} to {self.last_step} its foreground "
            f"probability deviates by {self.deviation:.2g} between pixels (the labels by {self.perfect_deviation:.2g}), at a "
            f"cross-entropy of {self.cross_entropy:.4g} where the best constant has {self.floor:.4g}; train with batch_norm = "
            '"both", with class_weights = "inverse" or "sqrt" or with another seed, or set on_collapse = "restart".'
        )


class CollapseWatch:
    """Told of every step, says whether the last `window` of them are those of a collapsed network.

    A network has collapsed where its output's deviation is small beside that of the labels and does not grow, and either
    - its cross-entropy is within `tolerance` (relative) of the best constant's: it has found the prior and no more; or
    - the output is flat, whatever the cross-entropy, which does not fall: dead ReLUs, a saturated output, or soft labels at a
      temperature, whose best constant is not the hard labels'.

    It is no proof of death: one 1-Unet was at the floor from step 1,000 on, was reported, and began to learn at step 2,200.
    """

    # A calibrated network with a tenth of the labels' deviation explains a hundredth of their variance, about 1 % of the
    # floor; one still learning passes through here within tens of steps, growing by far more than 10 % in half a window.
    SMALL, FLAT, GROWTH, FALL = 0.1, 0.01, 1.1, 0.01
    ROUNDING = 1e-6  # a constant in float32 deviates by up to 1e-7

    def __init__(
        self, class_weights: tuple[float, float], *, window: int = 100, grace: int = GRACE, tolerance: float = 0.05
    ) -> None:
        """Class weights are of (background, foreground); the first `grace` steps are not looked at.

        500 steps are the warm-up of the default run. Until then healthy networks may have done no more than move their bias
        towards the prior: 2-Unets without batch normalisation were flat for up to 550 steps, and learned all the same.
        """
        self.class_weights, self.grace, self.tolerance = class_weights, grace, tolerance
        self.step = 0
        self._rows: deque[tuple[float, float, float]] = deque(maxlen=window)

    def add(self, *, cross_entropy: float, foreground_fraction: float, deviation: float) -> None:
        """Once a step: class-weighted hard cross-entropy and foreground share of the batch's pixels that have a label, and the
        standard deviation of the predicted foreground probability over all pixels of the batch.
        """
        self.step += 1
        if self.step > self.grace:
            self._rows.append((cross_entropy, foreground_fraction, deviation))

    @property
    def collapsed(self) -> Collapse | None:
        """What was seen, if the window is full and its network has collapsed."""
        if len(self._rows) < (self._rows.maxlen or 0):
            return None
        deviations = [deviation for _, _, deviation in self._rows]
        if _mean(deviations, half=1) > self.GROWTH * _mean(deviations, half=0) + self.ROUNDING:
            return None
        seen = self._seen()
        at_floor = abs(seen.cross_entropy - seen.floor) <= self.tolerance * seen.floor
        limit = self.SMALL if at_floor else self.FLAT
        if seen.deviation >= limit * seen.perfect_deviation or (not at_floor and self._falls(seen.floor)):
            return None
        return seen

    def _seen(self) -> Collapse:
        cross_entropy, fraction, deviation = (_mean(column) for column in zip(*self._rows, strict=True))
        return Collapse(
            cross_entropy=cross_entropy,
            floor=_entropy(_mean(self._shares)),
            deviation=deviation,
            perfect_deviation=math.sqrt(fraction * (1.0 - fraction)),
            first_step=self.step - len(self._rows) + 1,
            last_step=self.step,
        )

    @property
    def _shares(self) -> list[float]:
        # each batch is divided by its own sum of weights, so that shares average where fractions would not
        return [_share(fraction, self.class_weights) for _, fraction, _ in self._rows]

    def _falls(self, floor: float) -> bool:
        # a constant's cross-entropy is a line in the share of foreground: what is left beside that line is the bias moving
        losses, shares = [loss for loss, _, _ in self._rows], self._shares
        spread = statistics.variance(shares)
        slope = statistics.covariance(shares, losses) / spread if spread else 0.0
        rest = [loss - slope * share for loss, share in zip(losses, shares, strict=True)]
        return _mean(rest, half=1) < _mean(rest, half=0) - self.FALL * floor

    def state(self) -> dict[str, Any]:
        """What decides the next answers, as values that JSON keeps exactly."""
        return {"step": self.step, "rows": [list(row) for row in self._rows]}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state` of a watch with the same arguments."""
        self.step = state["step"]
        self._rows.clear()
        self._rows.extend(tuple(row) for row in state["rows"])


def _share(foreground_fraction: float, class_weights: tuple[float, float]) -> float:
    background, foreground = class_weights[0] * (1.0 - foreground_fraction), class_weights[1] * foreground_fraction
    return foreground / (background + foreground)


def _entropy(share: float) -> float:
    return -math.fsum(p * math.log(p) for p in (share, 1.0 - share) if p > 0.0)


def _mean(values: Sequence[float], *, half: int | None = None) -> float:
    middle = len(values) // 2
    part = values if half is None else (values[:middle], values[middle:])[half]
    return math.fsum(part) / len(part)
