"""Losses: pure functions of margins and labels; results scalars in nats.

The margin of a pixel is its foreground logit less its background logit, (n, y, x) float: softmax of (a, b) is the sigmoid of
b - a, and at temperature T that of (b - a) / T, so nothing is lost and half the arithmetic saved. Labels are (n, y, x) uint8:
0 background, 1 foreground, IGNORED for what nobody annotated.

Everything is computed in float32, also under mixed precision. Pixels are weighted, never class terms: the minimiser of a
class-weighted soft cross-entropy is proportional to w_c p_c instead of the teacher's p_c.

`pool` sums a partial sum over all processes, differentiably; alone it is the identity. Means and Dice are of the whole batch,
however many processes share it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from kdunet_infer.errors import ConfigError

IGNORED = 2
"""The label of a pixel that counts in no loss."""

Pool = Callable[[Tensor], Tensor]


def alone(partial_sum: Tensor) -> Tensor:
    """The pool of a single process."""
    return partial_sum


def margin(logits: Tensor) -> Tensor:
    """Logits (n, 2, y, x) of any float type -> margins (n, y, x) float32."""
    background, foreground = logits.float().unbind(1)  # whose gradients are joined in one pass, unlike two indices'
    return foreground - background


def class_weights(scheme: str | tuple[float, float], foreground_fraction: float) -> tuple[float, float]:
    """Weights of (background, foreground) from the share of foreground measured on the training masks.

    Two numbers are the weights themselves. "none": 1, 1. "inverse": w_c = N / (2 N_c), so that both classes weigh the same.
    "sqrt": its square root, the compromise.
    """
    if not isinstance(scheme, str):
        return scheme
    if scheme == "none":
        return 1.0, 1.0
    if scheme not in ("inverse", "sqrt"):
        raise ConfigError(f"class_weights is {scheme!r}; choose none, inverse or sqrt.")
    if not 0.0 < foreground_fraction < 1.0:
        raise ConfigError(
            f"the labels hold a foreground fraction of {foreground_fraction:g}; class weights need both classes, "
            "so check the label file or set class_weights to none."
        )
    power = 1.0 if scheme == "inverse" else 0.5
    background, foreground = (0.5 / fraction for fraction in (1.0 - foreground_fraction, foreground_fraction))
    return background**power, foreground**power


def pixel_weights(labels: Tensor, weights: tuple[float, float]) -> Tensor:
    """The weight of each pixel, that of its label's class, 0 where it is ignored: (n, y, x) float32."""
    background, foreground = weights
    return torch.where(labels == 1, foreground, background) * (labels != IGNORED)


def hard_loss(margins: Tensor, labels: Tensor, weights: Tensor, *, pool: Pool = alone) -> Tensor:
    """Cross-entropy with the labels: sum_i w_i CE_i / sum_i w_i over all pixels."""
    return _weighted_mean(cross_entropy(margins, labels), weights, pool)


def cross_entropy(margins: Tensor, labels: Tensor) -> Tensor:
    """Of each pixel, (n, y, x) float32; of no meaning where the label is IGNORED."""
    return F.binary_cross_entropy_with_logits(margins.float(), (labels == 1).float(), reduction="none")


def soft_loss(
    student: Tensor, teacher: Tensor, weights: Tensor, *, temperature: float, divergence: str = "kl", pool: Pool = alone
) -> Tensor:
    """T^2 KL(teacher || student) of margins softened by T: sum_i w_i KL_i / sum_i w_i; or "ce", T^2 times their cross-entropy.

    T^2 keeps the gradient's size as T grows. Hinton et al. 2015, arXiv:1503.02531, section 2; per pixel as in Mangalam &
    Salzmann 2018. KL is the cross-entropy less the teacher's entropy: the same gradient, and 0 for a perfect student.
    """
    z, t = student.float() / temperature, teacher.float() / temperature
    taught = torch.sigmoid(t)
    value = F.binary_cross_entropy_with_logits(z, taught, reduction="none")
    if divergence == "kl":
        value = value - F.binary_cross_entropy_with_logits(t, taught, reduction="none")
    return temperature**2 * _weighted_mean(value, weights, pool)


def soft_dice_loss(margins: Tensor, labels: Tensor, *, smooth: float = 1.0, pool: Pool = alone) -> Tensor:
    """1 - (2 sum p g + s) / (sum p + sum g + s) of the foreground probability p and the mask g, pooled over the batch.

    Milletari et al. 2016, arXiv:1606.04797, with plain instead of squared sums; pooled because crops without foreground
    would each ask for an empty answer at full weight.
    """
    foreground = torch.sigmoid(margins.float()) * (labels != IGNORED)
    mask = (labels == 1).float()
    common, predicted, true = pool(torch.stack([(foreground * mask).sum(), foreground.sum(), mask.sum()])).unbind()
    return 1.0 - (2.0 * common + smooth) / (predicted + true + smooth)


def _weighted_mean(values: Tensor, weights: Tensor, pool: Pool) -> Tensor:
    value, weight = pool(torch.stack([(weights * values).sum(), weights.sum()])).unbind()
    return value / weight.clamp(min=1e-12)  # nothing annotated: 0, not a number


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """What one batch says of a network, over all processes."""

    weighted_cross_entropy: float
    """With the labels, each pixel weighted by its class."""
    cross_entropies: list[float]
    """With the labels, unweighted, of each crop of this process."""
    foreground_fraction: float
    """Of the annotated pixels."""
    deviation: float
    """Standard deviation of the predicted foreground probability over the annotated pixels."""


def batch_statistics(margins: Tensor, labels: Tensor, weights: Tensor, *, pool: Pool = alone) -> BatchStatistics:
    """Measure a batch: margins, labels and weights (n, y, x), as for the losses."""
    annotated = labels != IGNORED
    values, p = (term * annotated for term in (cross_entropy(margins, labels), torch.sigmoid(margins)))
    of_crops = [term.sum(dim=(1, 2)) for term in (weights * values, weights, values, p, p * p)]  # float32's sums are pairwise
    of_crops += [torch.count_nonzero(mask, dim=(1, 2)) for mask in (annotated, labels == 1)]
    by_crop = torch.stack([term.double() for term in of_crops])
    weighted, weight, _, first, second, n, foreground = pool(by_crop.sum(dim=1)).tolist()
    n = max(n, 1.0)
    variance = max(0.0, second / n - (first / n) ** 2)
    cross_entropies = by_crop[2] / by_crop[5].clamp(min=1)
    return BatchStatistics(weighted / max(weight, 1e-30), cross_entropies.tolist(), foreground / n, variance**0.5)


def over_processes(partial_sum: Tensor) -> Tensor:
    """The pool of several processes: the sum over all, through which gradients flow back to each one's share.

    Processes average their gradients, and each sees the gradient of all copies of the loss, so that the average is the
    gradient of the one loss.
    """
    return cast(Tensor, all_reduce(partial_sum))  # type: ignore[no-untyped-call]
