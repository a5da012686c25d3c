"""Scores of a network in training: whole mirrored slices, so that validation sees what overlap-tile inference will give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from kdunet.data import Annotated
from kdunet.losses import IGNORED, margin
from kdunet.unet import UNet, halo
from kdunet_infer.metrics import CrossEntropy, ProbabilityHistogram


@dataclass(frozen=True, slots=True)
class Validation:
    """How good a network is on a slab it has not learned from."""

    iou: float
    """At `threshold`."""
    threshold: float
    """The threshold with the highest IoU on this slab."""
    cross_entropy: float
    """Unweighted, per pixel, in nats."""

    def __str__(self) -> str:
        return f"IoU {self.iou:.4f} at threshold {self.threshold:.3f}, cross-entropy {self.cross_entropy:.4f}"


def validate(network: UNet, slab: Annotated, *, device: torch.device, autocast: torch.dtype | None = None) -> Validation:
    """Score `network`, which must be in evaluation mode, on every annotated voxel of `slab`."""
    histogram, cross_entropy = ProbabilityHistogram(), CrossEntropy()
    for probability, truth in answers(network, slab, device=device, autocast=autocast):
        histogram.add(probability, truth)
        cross_entropy.add(probability, truth)
    threshold, iou = histogram.best_threshold()
    return Validation(iou, threshold, cross_entropy.mean())


def mean_cross_entropy(network: UNet, slab: Annotated, *, device: torch.device) -> float:
    """The cross-entropy alone, per annotated voxel of `slab`, in nats."""
    cross_entropy = CrossEntropy()
    for probability, truth in answers(network, slab, device=device):
        cross_entropy.add(probability, truth)
    return cross_entropy.mean()


def answers(
    network: UNet, slab: Annotated, *, device: torch.device, autocast: torch.dtype | None = None
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]]:
    """Foreground probability and truth of the annotated voxels, slice by slice, each flat."""
    for image, truth in zip(slab.images, slab.truth, strict=True):
        annotated = truth != IGNORED
        if annotated.any():
            margins = slice_margin(network, image, device=device, autocast=autocast)
            yield torch.from_numpy(margins).sigmoid().numpy()[annotated], truth[annotated]


def slice_margin(
    network: UNet, image: npt.NDArray[np.uint8], *, device: torch.device, autocast: torch.dtype | None = None
) -> npt.NDArray[np.float32]:
    """Foreground margin (y, x) float32 of one slice (y, x) uint8, mirrored beyond its faces."""
    beyond, (height, width) = halo(network.n_levels), image.shape
    far = [beyond + -size % network.stride for size in (height, width)]
    padded = np.pad(image, [(beyond, far[0]), (beyond, far[1])], mode="reflect")
    tensor = torch.from_numpy(padded).to(device).float()[None, None].contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        logits = network(tensor)
    whole: npt.NDArray[np.float32] = margin(logits)[0, beyond : beyond + height, beyond : beyond + width].cpu().numpy()
    return whole
