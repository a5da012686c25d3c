"""Losses: pure functions of logits and labels. Logits (n, 2, y, x) float; labels (n, y, x) int64, 0 or 1; results scalars.

Everything is computed in float32, also under mixed precision. Pixels are weighted, never class terms: the minimiser of a
class-weighted soft cross-entropy is proportional to w_c p_c instead of the teacher's p_c.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdunet_infer.errors import ConfigError


def class_weights(scheme: str, foreground_fraction: float) -> tuple[float, float]:
    """Weights of (background, foreground) from the share of foreground measured on the training masks.

    "none": 1, 1. "inverse": w_c = N / (2 N_c), so that both classes weigh the same. "sqrt": its square root, the compromise.
    """
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
    """The weight of each pixel, that of its label's class: (n, y, x) float32."""
    return torch.tensor(weights, dtype=torch.float32, device=labels.device)[labels]


def hard_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy with the labels: sum_i w_i CE_i / sum_i w_i over all pixels, in nats."""
    return _weighted_mean(F.cross_entropy(logits.float(), labels, reduction="none"), weights)


def soft_loss(student: Tensor, teacher: Tensor, weights: Tensor, *, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of the logits softened by T: sum_i w_i KL_i / sum_i w_i, in nats.

    T^2 keeps the gradient's size as T grows. Hinton et al. 2015, arXiv:1503.02531, section 2; per pixel as in Mangalam &
    Salzmann 2018. KL is their cross-entropy less a constant: the same gradient, and 0 for a perfect student.
    """
    log_q, log_p = (F.log_softmax(logits.float() / temperature, dim=1) for logits in (student, teacher))
    return temperature**2 * _weighted_mean((log_p.exp() * (log_p - log_q)).sum(dim=1), weights)


def soft_dice_loss(logits: Tensor, labels: Tensor, *, smooth: float = 1.0) -> Tensor:
    """1 - (2 sum p g + s) / (sum p + sum g + s) of the foreground probability p and the mask g, pooled over the batch.

    Milletari et al. 2016, arXiv:1606.04797, with plain instead of squared sums; pooled because crops without foreground
    would each ask for an empty answer at full weight.
    """
    foreground = logits.float().softmax(dim=1)[:, 1]  # (n, y, x)
    mask = labels.float()
    return 1.0 - (2.0 * (foreground * mask).sum() + smooth) / (foreground.sum() + mask.sum() + smooth)


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (weights * values).sum() / weights.sum()
