"""A student before and after: the same held-out voxels, the same measure, figures and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdunet.data import Annotated
from kdunet.evaluate import slice_margin
from kdunet.losses import IGNORED
from kdunet.unet import UNet
from kdunet_infer.metrics import confusion
from kdunet_infer.report import write_overlay_png

PICTURES = "before.png", "after.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """IoU of the foreground, pooled over the held-out voxels."""

    own_threshold: float
    """The one in the model's card."""
    iou_at_own: float
    best_threshold: float
    """The one with the highest IoU on these very voxels."""
    best_iou: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What fine-tuning changed on voxels that it did not learn from.

    The step whose network was kept was chosen on these voxels, as its threshold and all best thresholds were: the figures after
    flatter a little.
    """

    parent: str
    """Name and version."""
    held_out: str
    """Where the voxels lie, in words."""
    n_voxels: int
    foreground_fraction: float
    step: int
    """Of the training run, whose network was kept; 0 is the parent's own."""
    before: Score
    after: Score

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @property
    def is_worse(self) -> bool:
        """Whether the parent was better, each at its best threshold."""
        return self.after.best_iou < self.before.best_iou

    def __str__(self) -> str:
        before, after = self.before, self.after
        rows = [
            ("before, at its own threshold", before.own_threshold, before.iou_at_own),
            ("before, at its best threshold", before.best_threshold, before.best_iou),
            ("after, at its own threshold", after.own_threshold, after.iou_at_own),
            ("after, at its best threshold", after.best_threshold, after.best_iou),
        ]
        return "\n".join(
            [
                f"held out: {self.held_out}; {self.n_voxels:,} annotated voxels, {self.foreground_fraction:.1%} foreground",
                f"{'':31}threshold     IoU",
                *(f"{name:31}{threshold:9.4f}  {iou:.4f}" for name, threshold, iou in rows),
                self.verdict,
            ]
        )

    @property
    def verdict(self) -> str:
        """One sentence: whether it was worth it."""
        change = f"from {self.before.best_iou:.4f} to {self.after.best_iou:.4f} at the best thresholds"
        if self.is_worse:
            return f"fine-tuning made it worse ({change}): go on with {self.parent}, or annotate more slices."
        if self.step == 0:
            return (
                f"no step was better than {self.parent} as it came, so its network was kept, with the best threshold here: "
                "annotate more slices, or try a lower --learning-rate."
            )
        return f"fine-tuning helped ({change})."


def score(network: UNet, slab: Annotated, threshold: float) -> Score:
    """Score `network`, in evaluation mode, on the annotated voxels of `slab`, at `threshold` and at its best one."""
    annotated = slab.truth != IGNORED
    probability = np.concatenate([p[counts] for p, counts in zip(_probabilities(network, slab), annotated, strict=True)])
    truth = slab.truth[annotated] == 1
    best_threshold, best_iou = best_cut(probability, truth)
    return Score(
        own_threshold=threshold,
        iou_at_own=confusion(probability >= threshold, truth).iou,
        best_threshold=best_threshold,
        best_iou=best_iou,
    )


def best_cut(probability: npt.NDArray[np.float32], truth: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """The threshold with the highest IoU of all there are, and that IoU, of flat arrays with some foreground.

    Finer than training's multiples of 1/256: on images unlike its own a network may put all answers below the first of them.
    """
    order = np.argsort(-probability, kind="stable")
    found, common = np.arange(1, len(order) + 1), np.cumsum(truth[order])
    iou = common / (found + common[-1] - common)
    iou[:-1][np.diff(probability[order]) == 0] = 0  # no threshold parts equal probabilities
    best = int(np.argmax(iou))
    return float(probability[order[best]]), float(iou[best])


def draw(folder: Path, slab: Annotated, before: tuple[UNet, float], after: tuple[UNet, float]) -> None:
    """Draw the slice of `slab` with the most foreground into PICTURES of `folder`: what each network finds and misses.

    before, after: a network and its threshold. Where nobody annotated nothing is drawn.
    """
    z = int(np.argmax((slab.truth == 1).sum(axis=(1, 2))))
    one = slab.slab((z, z + 1))
    for name, (network, threshold) in zip(PICTURES, (before, after), strict=True):
        (probability,) = _probabilities(network, one)
        found = (probability >= threshold) & (one.truth[0] != IGNORED)
        write_overlay_png(folder / name, one.images[0], found, one.truth[0], foreground=1)


def _probabilities(network: UNet, slab: Annotated) -> Iterator[npt.NDArray[np.float32]]:
    for image in slab.images:
        yield torch.from_numpy(slice_margin(network, image, device=torch.device("cpu"))).sigmoid().numpy()
